"""Parameters between forms of one network: coverage, wrong ones, and whether outputs agree.

Usage: python benchmarks/transfer.py [--seeds N] FOLDER [WORD ...]

Takes the models of a folder whose names contain a word, all by default. Every model goes into its lossless forms
(targets portable and cpu), its int8 and 4-bit forms, and back, and models whose names differ by an ending alone
(NAME, NAME_legacy, NAME_noopt) into each other. The parameters of the source are multiplied by random numbers before, so
that nothing but the transfer can make the outputs agree. A transfer is wrong when parameters were moved and the layers'
values, or the outputs, contradict it: none may be.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

import onnxopt
from onnxopt.transfer.edit import Editor
from onnxopt.transfer.result import Transfer
from onnxopt.transfer.tensors import Store
from onnxopt.transfer.view import Viewer

ENDINGS = ("", "_legacy", "_noopt")
FORMS = {
    "portable": {"recipe": "lossless"},
    "cpu": {"recipe": "lossless", "target": "cpu"},
    "int8 weights": {"passes": "quantize-weights"},
    "int8 dynamic": {"passes": "quantize-dynamic", "target": "cpu"},
    "4 bits": {"passes": "quantize-matmul", "target": "cpu"},
}
LEAST_PARAMETERS = 16
"""Vectors with fewer elements keep their numbers: constants of a formula look like them."""


def perturbed(model: ir.Model, seed: int) -> ir.Model:
    """Return a model whose weights, biases and scales are multiplied by random numbers, each by its own."""
    copy = model.clone()
    copy.meta.update(model.meta)
    skeleton, store, random = Viewer(copy).view(), Store(), np.random.default_rng(seed)
    frequencies = {g.index for g in skeleton.layers if not g.edges and g.kind == "affine"}
    for group in skeleton.layers:
        for leaf in group.leaves() if group.index not in frequencies else ():
            array = store.get(leaf)
            if leaf not in store.written and array.dtype.kind == "f" and array.size >= LEAST_PARAMETERS:
                store.put(leaf, array * random.uniform(0.9, 1.1, array.shape))
    Editor(skeleton.real).commit(store)
    return copy


def pairs(paths: list[Path]) -> Iterator[tuple[str, ir.Model, ir.Model]]:
    """Yield (title, source, target)."""
    names = {p.stem: p for p in paths}
    for name, path in names.items():
        model = onnxopt.load(path)
        before = [n.op_type for n in model.graph]
        for form, options in FORMS.items():
            other = onnxopt.optimize(model, verify=False, measure=False, **options).model
            if [n.op_type for n in other.graph] != before:
                yield f"{name} > {form}", model, other
                yield f"{name} < {form}", other, model
        versions = [name + ending for ending in ENDINGS if name + ending in names]
        for one, two in itertools.permutations(versions, 2):
            yield f"{one} > {two}", onnxopt.load(names[one]), onnxopt.load(names[two])


def is_wrong(found: Transfer) -> bool:
    """Whether outputs, or values between layers, contradict what was moved."""
    account = found.certificate
    if account is None or account.verdict in ("equal", "close"):
        return False
    return account.verification is not None or bool(account.first_difference)


def main() -> None:
    """Print one row per pair; exit 1 when anything moved is wrong."""
    arguments = sys.argv[1:]
    seeds = int(arguments[arguments.index("--seeds") + 1]) if "--seeds" in arguments else 1
    if "--seeds" in arguments:
        del arguments[arguments.index("--seeds") : arguments.index("--seeds") + 2]
    folder, words = Path(arguments[0]), arguments[1:]
    paths = sorted(p for p in folder.glob("*.onnx") if not words or any(w in p.stem for w in words))
    wrong = 0
    print(f"{'pair':58} {'moved':>9} {'coverage':>8} {'exact':>6} {'aligned':>7} {'verdict':>8} {'deviation':>9}")
    for title, source, target in pairs(paths):
        for seed in range(seeds):
            found = onnxopt.transfer(perturbed(source, seed), target)
            account = found.certificate
            moved = sum(p.moved for p in found.parameters)
            worst = account.verification.worst if account is not None and account.verification is not None else np.nan
            wrong += is_wrong(found)
            print(
                f"{title:58} {moved:>4}/{len(found.parameters):<4} {found.coverage:8.2%} {found.count('exact')[0]:>6} "
                f"{found.count('aligned')[0]:>7} {account.verdict if account else '-':>8} {worst:9.1e}"
                f"{'  WRONG: ' + account.reason if account and is_wrong(found) else ''}",
                flush=True,
            )
    print(f"{wrong} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
