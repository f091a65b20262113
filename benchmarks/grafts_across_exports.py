"""Parts of models that are the same network in other forms: other exports, 8 bits, behind themselves, one trunk.

    python benchmarks/grafts_across_exports.py [--kinds KIND ...] [FOLDER or FILE ...]

For every .onnx in the folders (models/ by default; `graft.py` has what a model alone is asked):

    exports     every block and the backbone into each other export, both ways: all files of a folder whose names begin
                alike up to a double underscore, such as deit__dynamo.onnx and deit__torchscript.onnx. Outputs of the
                host within 1e-3 of their range where both hold the same weights
    8 bits      every block from and into the static 8-bit form that onnxopt makes with generated inputs
    behind      every block behind itself, once and three times, without adapters
    trunk       `merge-trunk` of the model and a copy whose last weights differ: equal to the bit, or it is refused

Ends with 1 when something certified is wrong. Refusals are counted by reason; many are due: a block that changes width or shape
fits behind itself only with an adapter.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
from graft import Subject, Tally, cuts_of, exchange

import onnxopt
from onnxopt.errors import OnnxOptError
from onnxopt.feeds import Data
from onnxopt.graft.cut import Backbone, resolve
from onnxopt.graft.request import Request
from onnxopt.graph import constant_tensor

MODELS = Path(__file__).parent.parent / "models"
KINDS = ("exports", "8 bits", "behind", "trunk")
SEPARATOR = "__"


def in_8_bits(subject: Subject, tally: Tally) -> None:
    """Graft every block between a model and its static 8-bit form."""
    data = Data("generated", lambda: iter(subject.probe.feeds), len(subject.probe.feeds))
    other = onnxopt.optimize(
        subject.model,
        passes="quantize-static",
        target="cpu",
        data=data,
        max_error=math.inf,
        verify=False,
        measure=False,
    )
    if not other.report.passes[0].applied:
        print(f"  {subject.name} has nothing to quantize: {other.report.passes[0].reason}", flush=True)
        return
    exchange(subject, Subject(f"8-bit {subject.name}", other.model, subject.probe.feeds), tally)


def behind(subject: Subject, tally: Tally) -> None:
    """Put every block behind itself."""
    for cut in cuts_of(subject):
        if isinstance(cut, Backbone):
            continue
        for repeat in (1, 3):
            label = f"{subject.name} {cut} behind itself, {repeat} times"
            tally.add(label, lambda c=cut, r=repeat: put_behind(subject, c, r))


def put_behind(subject: Subject, cut: object, repeat: int) -> str:
    """Put a block behind itself; what it moves is wanted."""
    part = resolve(subject.model, cut, subject.flow)
    after = part.outputs[0].name or ""
    request = Request(subject.model, subject.model, None, after, cut, repeat, "none", subject.probe.options)
    return subject.carry_out(request, math.inf)


def trunk(subject: Subject, tally: Tally) -> None:
    """Merge a model and a copy of it whose last weights differ."""
    copy = disturbed(subject.model)
    if copy is None:
        print(f"  {subject.name} stores no matrix that could be changed", flush=True)
        return

    def merged() -> str:
        onnxopt.merge_trunk([subject.model, copy], measure=False)
        return ""  # it raises what is not equal to the bit

    tally.add(f"{subject.name} and a copy", merged)


def disturbed(model: ir.Model) -> ir.Model | None:
    """Return a copy in which the last stored matrix differs; None when there is none."""
    copy = model.clone()
    copy.meta.update(model.meta)
    for node in reversed(list(copy.graph)):
        for value in node.inputs:
            tensor = None if value is None else constant_tensor(value)
            if value is None or tensor is None or len(tensor.shape) < 2 or not tensor.dtype.is_floating_point():
                continue
            array = tensor.numpy()
            noise = np.random.default_rng(0).uniform(0.9, 1.1, array.shape)
            changed = ir.tensor((array * noise).astype(array.dtype), name=value.name)
            producer = value.producer()
            if producer is None:
                value.const_value = changed
            else:
                producer.attributes["value"] = ir.AttrTensor("value", changed)
            return copy
    return None


def main() -> int:
    """Try what is asked for, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, default=[MODELS])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    arguments = parser.parse_args()
    tallies = {kind: Tally() for kind in KINDS}
    files = [f for p in arguments.paths for f in (sorted(p.glob("*.onnx")) if p.is_dir() else [p])]
    for _, group in itertools.groupby(files, key=lambda f: f.stem.split(SEPARATOR)[0]):
        subjects: list[Subject] = []
        for file in group:
            try:
                subjects.append(Subject(file.name, onnxopt.load(file)))
            except OnnxOptError as error:
                print(f"{file.name}: does not run here: {error}", flush=True)
        if "exports" in arguments.kinds:
            for one, other in itertools.combinations(subjects, 2):
                exchange(one, other, tallies["exports"])
        for subject in subjects:
            subject.prefetch(cuts_of(subject))
            for kind, attempt in (("8 bits", in_8_bits), ("behind", behind), ("trunk", trunk)):
                if kind in arguments.kinds:
                    attempt(subject, tallies[kind])
    for kind, tally in tallies.items():
        if tally.total:
            print(f"{kind}: {tally}")
    return int(any(tally.wrong for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
