"""Right on everything ONNX defines: the lossless recipe over the ONNX backend tests. Zero failures is the bar.

    python benchmarks/backend.py [--target portable] [--match WORD] [--sample N --seed S] [--recipe lossless]

Every test that ships in the onnx package (the large "light" and "real" models apart) comes in three variants: as it
is, with all inputs but the first made constant, and with all inputs constant. Each is optimized with verification
off, so that the passes themselves are judged, for the targets "portable" and "cpu". Asked for is that

- the outputs in ONNX Runtime are those of the original, its optimizations off and on, as `onnxopt.verify` compares;
- inputs and outputs keep names, types, shapes and order, and what passed the ONNX checker still does;
- no pass crashed, a second run finds nothing more, and two runs give the same bytes.

Models that ONNX Runtime cannot run as they are are checked for all but their outputs. Takes about four minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

import onnxopt
from onnxopt import model as models
from onnxopt.compare import structure
from onnxopt.contract import Target
from onnxopt.errors import OnnxOptError, RuntimeFailure
from onnxopt.feeds import Feed
from onnxopt.verify import Verifier

KINDS = ("node", "simple", "pytorch-operator", "pytorch-converted")
TARGETS: tuple[Target, ...] = ("portable", "cpu")
FORMS = ("as shipped", "first input free", "all constant")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model with inputs to run it on.

    Attributes:
        name: The test and the form, e.g. "test_add (all constant)".
        model: The model.
        feed: Its inputs.
    """

    name: str
    model: onnx.ModelProto
    feed: Feed


def variants() -> Iterator[Variant]:
    """Yield every variant of every test, the same ones in the same order on each call."""
    for name, model, inputs in _tests():
        names = [i.name for i in model.graph.input if i.name not in {t.name for t in model.graph.initializer}]
        feed = dict(zip(names, inputs, strict=False))
        yield Variant(f"{name} ({FORMS[0]})", model, feed)
        tensors = [n for n, value in feed.items() if isinstance(value, (np.ndarray, np.generic))]
        others = [n for n in tensors if n != names[0]]
        for form, fixed in ((FORMS[1], others), (FORMS[2], tensors if tensors != others else [])):
            if fixed:
                free = {n: value for n, value in feed.items() if n not in fixed}
                yield Variant(f"{name} ({form})", _constant(model, {n: feed[n] for n in fixed}), free)


def _constant(model: onnx.ModelProto, values: Feed) -> onnx.ModelProto:
    """Return the model with inputs made initializers; in models of IR version 3 they stay inputs as well."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    types = {i.name: i.type.tensor_type.elem_type for i in graph.input}
    for name, value in values.items():
        graph.initializer.append(_tensor(name, np.asarray(value), types[name]))
    if copy.ir_version >= 4:
        kept = [i for i in graph.input if i.name not in values]
        del graph.input[:]
        graph.input.extend(kept)
    return copy


def _tensor(name: str, array: np.ndarray, elem_type: int) -> onnx.TensorProto:
    if array.dtype.kind in "OSU":
        texts: list[Any] = [str(text).encode() for text in array.reshape(-1)]
        return onnx.helper.make_tensor(name, elem_type, array.shape, texts)
    tensor = numpy_helper.from_array(array, name)
    tensor.data_type = elem_type
    return tensor


def _tests() -> Iterator[tuple[str, onnx.ModelProto, Sequence[Any]]]:
    """Yield (name, model, inputs) of every test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.loader import load_model_tests

        cases = [case for kind in KINDS for case in sorted(load_model_tests(kind=kind), key=lambda c: c.name)]
    for case in cases:
        if case.model is not None:
            yield case.name, case.model, case.data_sets[0][0] if case.data_sets else []
        elif case.model_dir is not None:
            model = onnx.load(Path(case.model_dir) / "model.onnx")
            yield (
                f"{case.kind}/{case.name}",
                model,
                _stored_inputs(model, Path(case.model_dir) / "test_data_set_0"),
            )


def _stored_inputs(model: onnx.ModelProto, folder: Path) -> list[Any]:
    inputs: list[Any] = []
    for number, value in enumerate(model.graph.input):
        path = folder / f"input_{number}.pb"
        if not path.exists():
            break
        if value.type.HasField("sequence_type"):
            sequence = onnx.SequenceProto.FromString(path.read_bytes())
            inputs.append(numpy_helper.to_list(sequence))
        else:
            inputs.append(numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes())))
    return inputs


@dataclasses.dataclass(frozen=True)
class Finding:
    """What came out for one variant and target.

    Attributes:
        failures: What is wrong, one sentence each.
        ran: Whether ONNX Runtime could run the original, so that outputs were compared.
        edits: How many edits the recipe made.
    """

    failures: tuple[str, ...]
    ran: bool
    edits: int


def check(variant: Variant, target: Target, folder: Path, recipe: str = "lossless") -> Finding:
    """Optimize a variant and judge the result.

    Args:
        variant: What to optimize.
        target: What for.
        folder: Where files can be written.
        recipe: Name of the recipe.
    """
    failures: list[str] = []

    def optimized(source: onnx.ModelProto | Path, name: str) -> tuple[Path, int]:
        result = onnxopt.optimize(source, recipe=recipe, target=target, verify=False, measure=False)
        for report in result.report.passes:
            if report.status == "dropped":
                failures.append(f"{report.name}: {report.reason or 'all edits crashed'}")
            failures.extend(f"{dropped.site}: {dropped.reason}" for dropped in report.dropped)
        models.save(result.model, folder / name)
        return folder / name, sum(len(report.applied) for report in result.report.passes)

    try:
        reference = models.load(variant.model)
    except OnnxOptError:
        return Finding((), False, 0)
    try:
        first, edits = optimized(variant.model, "first.onnx")
        second, _ = optimized(variant.model, "second.onnx")
        if first.read_bytes() != second.read_bytes():
            failures.append("two runs give different bytes")
        again, more = optimized(first, "again.onnx")
        if more or again.read_bytes() != first.read_bytes():
            failures.append(f"a second run makes {more} more edits")
        candidate = models.load(first)
    except Exception as error:  # whatever is raised is what this looks for
        return Finding((*failures, f"{type(error).__name__}: {error}"), False, 0)
    try:
        verification = Verifier(reference, [variant.feed]).check(candidate)
    except RuntimeFailure:
        return Finding((*failures, *_structure(reference, candidate)), False, edits)
    if not verification.ok:
        failures.append(verification.reason)
    return Finding(tuple(failures), verification.feeds > 0, edits)


def _structure(reference: Any, candidate: Any) -> Iterator[str]:
    change = structure.signature_change(reference, candidate)
    if change:
        yield change
    complaint = structure.checker_complaint(candidate, structure.checker_level(reference))
    if complaint:
        yield f"the ONNX checker rejects the result: {complaint}"


def sweep(chosen: Sequence[Variant], targets: Sequence[Target], recipe: str) -> int:
    """Check variants, print what fails and a summary, and return the number of failures."""
    start, failed = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as name:
        for target in targets:
            ran = edited = wrong = 0
            for variant in chosen:
                found = check(variant, target, Path(name), recipe)
                ran += found.ran
                edited += found.edits > 0
                wrong += bool(found.failures)
                for failure in found.failures:
                    print(f"{variant.name} for {target}: {failure}", flush=True)
            print(
                f"{target}: {wrong} of {len(chosen)} variants fail; {edited} were changed, {ran} run in ONNX Runtime",
                flush=True,
            )
            failed += wrong
    print(f"{time.perf_counter() - start:.0f} s")
    return failed


def main() -> int:
    """Check what is asked for; return 1 when anything fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, action="append", help="both by default")
    parser.add_argument("--match", default="", help="only variants whose name contains this")
    parser.add_argument("--sample", type=int, default=0, help="only so many variants, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", default="lossless")
    args = parser.parse_args()
    chosen = [v for v in variants() if args.match in v.name]
    if args.sample:
        chosen = random.Random(args.seed).sample(chosen, min(args.sample, len(chosen)))
    return int(sweep(chosen, args.target or TARGETS, args.recipe) > 0)


if __name__ == "__main__":
    sys.exit(main())
