"""Cut and paste on every block of real models and every node of the ONNX backend tests: certified, refused or wrong.

Usage: python benchmarks/graft.py [--only WORD] [--alone] [--no-backend] [FOLDER ...]

For every block and the backbone of every .onnx in the folders (models/ and models/fetched/ by default):

- extract it;
- graft it onto itself: the outputs must be equal to the bit;
- graft it from the same model after the lossless recipe, which fuses and renames, and the other way round: the outputs
  must be those of the host within 1e-3 of their range;
- graft it from another export of the same model where the folder has one (NAME_legacy, NAME_noopt), both ways. Where
  both exports hold the same weights, the outputs must be the same too;
- where the model is in opset 11 or older: graft it into the same model in opset 20;
- where activations have four axes: graft the block in half precision, and with channels last (with Transposes at both
  ends), which takes adapters. Outputs within 1e-3 of their range; 3e-2 in half precision.

For every node of those ONNX backend tests that have bodies, which may capture values, and of one in --every others that
have more than one node, and for the blocks or first nodes of all bodies: extract it, and graft it onto itself. "Wrong" is what was certified and fails these demands, which the certificate does not know
of, and whatever ends in anything but a refusal. The bar: 95% certified, none wrong.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import glob
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
from backend import variants

import onnxopt
from onnxopt.contract import Silent
from onnxopt.errors import OnnxOptError
from onnxopt.graft.blocks import blocks
from onnxopt.graft.cut import Backbone, Block, Cut, Flow, Inside, Nodes, Tensors, resolve
from onnxopt.graft.extraction import take_out
from onnxopt.graft.nested import opened, places
from onnxopt.graft.probe import Probe, distance, find_feeds
from onnxopt.graft.reasons import RefusedError
from onnxopt.graft.request import Request
from onnxopt.graft.slicing import Types, standalone
from onnxopt.graft.transplant import carry_out
from onnxopt.graph import bodies
from onnxopt.model import model_bytes
from onnxopt.opset import convert_opset
from onnxopt.runtime import RunOptions

ROOT = Path(__file__).parent.parent
FEEDS = 2
LARGE = 50_000_000
"""Models of so many bytes and more are run on one set of inputs only."""
OTHER_EXPORT = 1e-3
BAR = 0.95
MOST_NODES = 4
"""Of a body without blocks, so many nodes are cut out."""
HALF_PRECISION = 3e-2
OLD, NEW = 11, 20
KINDS = (
    "extract",
    "onto itself",
    "optimized",
    "other export",
    "older opset",
    "half precision",
    "channels last",
    "extract (backend)",
    "onto itself (backend)",
    "extract (bodies)",
    "onto itself (bodies)",
)
EXPORTS = re.compile(r"(_legacy|_noopt)?\.onnx$")


@dataclasses.dataclass
class Tally:
    """What came out.

    Attributes:
        certified: How many were.
        refused: Reason -> how many.
        wrong: What was wrong, in words.
    """

    certified: int = 0
    refused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)

    def add(self, label: str, attempt: Callable[[], str]) -> None:
        """Try something; it returns what is wrong with the result, empty when nothing is."""
        try:
            fault = attempt()
        except RefusedError as refused:
            self.refused[refused.reason] += 1
            print(f"  refused  {label}: {refused.reason}: {str(refused)[:300]}", flush=True)
            return
        except Exception as error:  # whatever is raised is what this looks for
            fault = f"{type(error).__name__}: {error}"
        if fault:
            self.wrong.append(f"{label}: {fault}")
            print(f"  WRONG    {label}: {fault[:300]}", flush=True)
        else:
            self.certified += 1

    @property
    def total(self) -> int:
        """How many were tried."""
        return self.certified + self.refused.total() + len(self.wrong)

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason} {number}" for reason, number in self.refused.most_common()) or "none"
        share = 100 * self.certified / max(self.total, 1)
        return (
            f"{self.certified} of {self.total} certified ({share:.1f}%), refused: {reasons}; wrong: {len(self.wrong)}"
        )


class Subject:
    """A model, run once on a few inputs, whose parts are cut out and put back."""

    def __init__(self, name: str, model: ir.Model, feeds: list[dict[str, object]] | None = None) -> None:
        self.name = name
        self.model = model
        count = 1 if model_bytes(model) >= LARGE else FEEDS
        found = find_feeds(model, None, RunOptions())[:count] if feeds is None else feeds
        self.probe = Probe(model, found)
        self.flow = Flow(model)
        self.types = Types(model, self.probe)

    def extract(self, cut: Cut) -> str:
        """Cut a part out and prove it."""
        part = resolve(self.model, cut, self.flow)
        take_out(part, self.types, self.probe)
        return ""

    def graft(self, donor: Subject, cut: Cut, allowed: float, *, adapters: bool) -> str:
        """Put a part of a donor in the place of the same part; return how outputs move more than is allowed."""
        request = Request(
            self.model, donor.model, cut, None, cut, 1, "allow" if adapters else "none", self.probe.options
        )
        return self.carry_out(request, allowed)

    def carry_out(self, request: Request, allowed: float) -> str:
        """Graft something into the model; return how outputs move more than is allowed."""
        done = carry_out(request, self.probe, None, Silent())
        moved = [c for c in done.certificate.changed if not c.relative <= allowed]
        return "; ".join(f"{c.name} moved by {c.relative:.1e}" for c in moved)

    def prefetch(self, cuts: list[Cut]) -> None:
        """Run the model once for all boundary values."""
        names = [v.name or "" for v in self.model.graph.outputs]
        for cut in cuts:
            try:
                part = resolve(self.model, cut, self.flow)
            except OnnxOptError:
                continue
            names += [v.name or "" for v in (*part.inputs, *part.outputs)]
        self.probe.values(names)


def real(paths: list[Path], tallies: dict[str, Tally], *, alone: bool) -> None:
    """Sweep over real models."""
    exports: dict[Path, Subject] = {}
    for path in paths:
        start = time.perf_counter()
        try:
            subject = Subject(path.name, onnxopt.load(path))
            cuts = cuts_of(subject)
            subject.prefetch(cuts)
        except OnnxOptError as error:
            print(f"{path.name}: does not run here: {error}", flush=True)
            continue
        _alone(subject, cuts, tallies["extract"], tallies["onto itself"])
        _bodies(subject, tallies["extract (bodies)"], tallies["onto itself (bodies)"])
        print(f"{path.name}: {len(cuts)} cuts, {time.perf_counter() - start:.0f} s", flush=True)
        if alone:
            continue
        fused = onnxopt.optimize(subject.model, verify=False, measure=False).model
        exchange(subject, Subject(f"optimized {path.name}", fused, subject.probe.feeds), tallies["optimized"])
        if subject.model.opset_imports[""] <= OLD:
            _older(subject, cuts, tallies["older opset"])
        _interfaces(subject, cuts, tallies)
        exports = {p: s for p, s in exports.items() if EXPORTS.sub("", p.name) == EXPORTS.sub("", path.name)}
        for donor in exports.values():
            exchange(subject, donor, tallies["other export"])
        exports[path] = subject


def cuts_of(subject: Subject) -> list[Cut]:
    return [*(Block(i) for i in range(len(blocks(subject.flow)))), Backbone()]


def _alone(subject: Subject, cuts: list[Cut], extracted: Tally, grafted: Tally) -> None:
    """Cut every part out, and put it back in its own place."""
    for cut in cuts:
        label = f"{subject.name} {cut}"
        extracted.add(label, lambda c=cut: subject.extract(c))
        grafted.add(label, lambda c=cut: subject.graft(subject, c, 0.0, adapters=False))


def _bodies(subject: Subject, extracted: Tally, grafted: Tally) -> None:
    """Cut every block, or without blocks the first nodes, out of every body, and put it back in its own place."""
    for place in places(subject.model):
        if not place.path:
            continue
        try:
            body = opened(subject.model, place, subject.probe)
            inner = Subject(f"{subject.name} {place.path}", body.model, list(body.feeds))
            cuts: list[Cut] = [Block(i) for i in range(len(blocks(inner.flow)))] or _nodes_of(inner)[:MOST_NODES]
            inner.prefetch(cuts)
        except OnnxOptError as error:
            print(f"  {subject.name} {place.path} does not run: {error}", flush=True)
            continue
        for cut in cuts:
            label = f"{inner.name} {cut}"
            inside = Inside(cut, place.path)
            extracted.add(label, lambda c=cut, i=inner: i.extract(c))
            grafted.add(label, lambda c=inside: subject.graft(subject, c, 0.0, adapters=False))


def _nodes_of(subject: Subject) -> list[Cut]:
    """Return the nodes of a main graph as cuts, but for those that are constant, or used by nobody."""
    wanted = [n for n in subject.model.graph if subject.flow.results({n})]
    return [Nodes(glob.escape(next(v.name for v in n.outputs if v.name))) for n in wanted]


def _older(subject: Subject, cuts: list[Cut], tally: Tally) -> None:
    """Graft every block into the same model in a newer opset."""
    try:
        host = Subject(subject.name, convert_opset(subject.model, NEW), subject.probe.feeds)
        host.prefetch(cuts)
    except OnnxOptError as error:
        print(f"  {subject.name} cannot be converted: {error}", flush=True)
        return
    for cut in cuts:
        label = f"{subject.name} {cut} into opset {NEW}"
        tally.add(label, lambda c=cut: host.graft(subject, c, OTHER_EXPORT, adapters=False))


def _interfaces(subject: Subject, cuts: list[Cut], tallies: dict[str, Tally]) -> None:
    """Graft blocks of four axes in half precision and with channels last."""
    for cut in cuts[:-1]:
        part = resolve(subject.model, cut, subject.flow)
        alone = standalone(part, subject.types)
        ends = [*alone.graph.inputs, *alone.graph.outputs]
        ends = [v for v in ends if not v.is_initializer()]
        if len(ends) != 2 or any(v.shape is None or len(v.shape) != 4 or v.dtype != ir.DataType.FLOAT for v in ends):
            continue
        for kind, change, allowed in (
            ("half precision", halved, HALF_PRECISION),
            ("channels last", channels_last, OTHER_EXPORT),
        ):
            donor = change(alone)
            names = (donor.graph.inputs[0].name or "", donor.graph.outputs[0].name or "")
            inside = Tensors((part.inputs[0].name or "",), (part.outputs[0].name or "",))
            request = Request(
                subject.model,
                donor,
                inside,
                None,
                Tensors(names[:1], names[1:]),
                1,
                "allow",
                subject.probe.options,
            )
            tallies[kind].add(f"{subject.name} {cut} {kind}", lambda r=request, a=allowed: subject.carry_out(r, a))


def halved(model: ir.Model) -> ir.Model:
    """Return a model that computes in half precision."""
    copy = model.clone()
    graph = copy.graph
    for value in graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT16)
    for value in (*graph.inputs, *(v for node in graph for v in node.outputs)):
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(ir.DataType.FLOAT16)
    for node in graph:
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == ir.DataType.FLOAT:
                half = ir.tensor(attribute.as_tensor().numpy().astype(np.float16))
                node.attributes[name] = ir.AttrTensor(name, half)
            elif name in ("value_float", "value_floats"):
                half = ir.tensor(np.asarray(attribute.value, np.float16))
                node.attributes.pop(name)
                node.attributes["value"] = ir.AttrTensor("value", half)
            elif name == "to" and attribute.as_int() == ir.DataType.FLOAT:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT16))
    return copy


def channels_last(model: ir.Model) -> ir.Model:
    """Return a model of an input and an output with four axes that takes and gives channels at the end."""
    copy = model.clone()
    graph = copy.graph
    source, result = next(v for v in graph.inputs if not v.is_initializer()), graph.outputs[0]
    outer = ir.Value(name="channels_last", type=source.type, shape=_moved(source.shape))
    first = ir.node("Transpose", [outer], {"perm": [0, 3, 1, 2]}, name="first")
    first.outputs[0].name, first.outputs[0].type, first.outputs[0].shape = "first_output", source.type, source.shape
    last = ir.node("Transpose", [result], {"perm": [0, 2, 3, 1]}, name="last")
    last.outputs[0].name, last.outputs[0].type = "last_output", result.type
    last.outputs[0].shape = _moved(result.shape)
    source.replace_all_uses_with(first.outputs[0])
    graph.inputs[list(graph.inputs).index(source)] = outer
    graph.insert_before(next(iter(graph)), first)
    graph.append(last)
    graph.outputs[0] = last.outputs[0]
    return copy


def _moved(shape: ir.Shape | None) -> ir.Shape | None:
    return None if shape is None else ir.Shape([shape[0], shape[2], shape[3], shape[1]])


def exchange(one: Subject, other: Subject, tally: Tally) -> None:
    """Graft every block of either into the other."""
    cuts = cuts_of(one)
    if len(cuts) != len(cuts_of(other)):
        print(f"  {one.name} and {other.name} have different numbers of blocks", flush=True)
        return
    other.prefetch(cuts)
    allowed = OTHER_EXPORT if _equal(one, other) else math.inf
    if math.isinf(allowed):
        print(f"  {one.name} and {other.name} hold different weights: outputs are not judged", flush=True)
    for host, donor in ((one, other), (other, one)):
        for cut in cuts:
            label = f"{host.name} {cut} from {donor.name}"
            tally.add(label, lambda h=host, d=donor, c=cut: h.graft(d, c, allowed, adapters=True))


def _equal(one: Subject, other: Subject) -> bool:
    """Whether two models compute the same."""
    names = [v.name or "" for v in one.model.graph.outputs]
    theirs = [v.name or "" for v in other.model.graph.outputs]
    found = Probe(other.model, one.probe.feeds).values(theirs)
    renamed = [{n: values[t] for n, t in zip(names, theirs, strict=True)} for values in found]
    return all(distance(n, one.probe.values(names), renamed).relative < OTHER_EXPORT for n in names)


def backend(every: int) -> Iterator[tuple[Subject, list[Cut]]]:
    """Yield those backend tests whose nodes lie in a graph that is more than the node."""
    others = 0
    for variant in variants():
        try:
            model = onnxopt.load(variant.model)
            nodes = list(model.graph)
            if not any(next(bodies(n), None) for n in nodes):
                others += len(nodes) > 1
                if len(nodes) < 2 or others % every:
                    continue
            subject = Subject(variant.name, model, [variant.feed])
            cuts = _nodes_of(subject)
            subject.prefetch(cuts)
        except (OnnxOptError, StopIteration):
            continue  # the runtime has no kernel for it
        yield subject, cuts


def main() -> int:
    """Sweep over what is asked for; return 1 when the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[ROOT / "models", ROOT / "models" / "fetched"])
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--no-backend", action="store_true")
    parser.add_argument("--alone", action="store_true", help="extract, and graft onto itself, nothing else")
    parser.add_argument("--every", type=int, default=20, help="of backend tests without bodies, one in so many")
    args = parser.parse_args()
    tallies = {name: Tally() for name in KINDS}
    paths = [p for f in args.folders for p in sorted(f.glob("*.onnx")) if args.only in p.name]
    real(paths, tallies, alone=args.alone)
    if not args.no_backend:
        for subject, cuts in backend(args.every):
            _alone(subject, cuts, tallies["extract (backend)"], tallies["onto itself (backend)"])
            _bodies(subject, tallies["extract (bodies)"], tallies["onto itself (bodies)"])
    missed = False
    for name, tally in tallies.items():
        if tally.total:
            print(f"{name}: {tally}")
            missed |= bool(tally.wrong) or tally.certified < BAR * tally.total
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
