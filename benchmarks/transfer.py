"""Parameters between forms of one network: coverage, wrong ones, and whether outputs agree.

    python benchmarks/transfer.py [--seeds N] [--forms FORM ...] [FOLDER] [WORD ...]

Takes the models of a folder (models/ by default) whose names contain a word, all by default. Every model goes into its
lossless forms (targets portable and cpu), its int8 and 4-bit forms by onnxopt, those in integers by
onnxruntime.quantization (dynamic, QDQ, QOperator), and back, and models whose names differ by an ending alone (NAME,
NAME_legacy, NAME_noopt) into each other. What is calibrated learns from generated inputs. The parameters of the source are
multiplied by random numbers before, so that nothing but the transfer can make the outputs agree. A transfer is wrong when
parameters were moved and the layers' values, or the outputs, contradict it: none may be. "rounding" is what the integers of
the target cost with the new parameters, and before with its own, as parts of an output's range.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import ort_forms

import onnxopt
from onnxopt.errors import OnnxOptError
from onnxopt.feeds import Data, generate_runnable
from onnxopt.runtime import open_session
from onnxopt.transfer.edit import Editor
from onnxopt.transfer.result import Transfer
from onnxopt.transfer.tensors import Store
from onnxopt.transfer.view import Viewer

MODELS = Path(__file__).parent.parent / "models"
ENDINGS = ("", "_legacy", "_noopt")
FORMS = {
    "portable": {"recipe": "lossless"},
    "cpu": {"recipe": "lossless", "target": "cpu"},
    "int8 weights": {"passes": "quantize-weights"},
    "int8 dynamic": {"passes": "quantize-dynamic", "target": "cpu"},
    "int8 static": {"passes": "quantize-static", "target": "cpu", "max_error": math.inf},
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


def made(path: Path, model: ir.Model, form: str, folder: Path) -> ir.Model | None:
    """Return a form of a model; None where there is none, which is printed."""
    with open_session(model, optimized=True) as session:
        feeds = generate_runnable(model, session.run)
    if form in FORMS:
        data = Data("generated", lambda: iter(feeds), len(feeds))
        try:
            return onnxopt.optimize(model, data=data, verify=False, measure=False, **FORMS[form]).model
        except OnnxOptError as error:
            print(f"{path.stem}, {form}: {error}")
            return None
    file = folder / f"{path.stem} {form}.onnx"
    why = ort_forms.made(form, path, file, feeds)
    if why:
        print(f"{path.stem}, {form}: {why}")
        return None
    return onnxopt.load(file)


def pairs(paths: list[Path], forms: list[str], folder: Path) -> Iterator[tuple[str, ir.Model, ir.Model]]:
    """Yield (title, source, target)."""
    names = {p.stem: p for p in paths}
    for name, path in names.items():
        model = onnxopt.load(path)
        before = [n.op_type for n in model.graph]
        for form in forms:
            other = made(path, model, form, folder)
            if other is not None and [n.op_type for n in other.graph] != before:
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


def row(title: str, found: Transfer) -> str:
    """Say in a row what a transfer did."""
    account = found.certificate
    moved = sum(p.moved for p in found.parameters)
    worst = account.verification.worst if account is not None and account.verification is not None else np.nan
    rounding = ""
    if account is not None and account.rounding is not None:
        before = "-" if account.rounding_before is None else f"{account.rounding_before:.1e}"
        rounding = f"{account.rounding:.1e} ({before})"
    wrong = f"  WRONG: {account.reason}" if account is not None and is_wrong(found) else ""
    return (
        f"{title:58} {moved:>4}/{len(found.parameters):<4} {found.coverage:8.2%} {found.count('exact')[0]:>6} "
        f"{found.count('aligned')[0]:>7} {account.verdict if account else '-':>8} {worst:9.1e} {rounding}{wrong}"
    )


def main() -> None:
    """Print one row per pair; exit 1 when anything moved is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=MODELS)
    parser.add_argument("words", nargs="*", help="of the names of models")
    parser.add_argument("--seeds", type=int, default=1)
    every = [*FORMS, *ort_forms.FORMS]
    parser.add_argument("--forms", nargs="+", choices=every, default=every, metavar="FORM", help=", ".join(every))
    arguments = parser.parse_args()
    paths = sorted(
        p for p in arguments.folder.glob("*.onnx") if not arguments.words or any(w in p.stem for w in arguments.words)
    )
    wrong = incomparable = count = 0
    print(
        f"{'pair':58} {'moved':>9} {'coverage':>8} {'exact':>6} {'aligned':>7} {'verdict':>8} {'deviation':>9} "
        "rounding (before)"
    )
    with tempfile.TemporaryDirectory() as folder:
        for title, source, target in pairs(paths, arguments.forms, Path(folder)):
            for seed in range(arguments.seeds):
                found = onnxopt.transfer(perturbed(source, seed), target)
                count += 1
                wrong += is_wrong(found)
                incomparable += found.certificate is None or found.certificate.verdict == "none"
                print(row(title, found), flush=True)
    print(f"{count} transfers, {wrong} wrong, {incomparable} could not be compared")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
