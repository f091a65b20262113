"""What is known about a cut or a graft once it has been proven: for people in words, for programs as JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import onnx_ir as ir

from onnxopt.graft.probe import Change, Match
from onnxopt.graph import scopes
from onnxopt.model import ORIGINAL
from onnxopt.proto.datafile import DataFile
from onnxopt.proto.tensors import EmbeddedTensor, ExternalTensor
from onnxopt.report.words import count, deviation, size

SCHEMA_VERSION = 1

_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True, slots=True)
class FileHash:
    """A file and its content.

    Attributes:
        path: Where it lies.
        sha256: Of its bytes.
    """

    path: str
    sha256: str


@dataclasses.dataclass(frozen=True, slots=True)
class TypedValue:
    """A value at a boundary.

    Attributes:
        name: Its name.
        type: Element type and shape, e.g. "float32 [batch, 64, 56, 56]".
    """

    name: str
    type: str


@dataclasses.dataclass(frozen=True, slots=True)
class ExtractCertificate:
    """What was cut out, and the proof that it computes what it computed inside.

    Attributes:
        schema_version: Of this form.
        operation: "extract".
        source: Files of the model that was cut.
        result: Files that were written; empty until then.
        cut: The cut as it was asked for.
        inputs: The boundary values it reads.
        outputs: The boundary values it computes.
        nodes: How many nodes were cut out.
        captures: How many values bodies of these nodes read from around them.
        functions: Model functions that came along.
        opsets: (domain, version) of the operator sets it is written in.
        sets: How many sets of inputs of the whole model were run.
        matches: Each output of the part alone against the same value inside the model.
        body: Path of the body that was cut; empty for the main graph.
        note: On which of the values that the body is given it was run, in words; empty for the main graph.
    """

    schema_version: int
    operation: str
    source: tuple[FileHash, ...]
    result: tuple[FileHash, ...]
    cut: str
    inputs: tuple[TypedValue, ...]
    outputs: tuple[TypedValue, ...]
    nodes: int
    captures: int
    functions: int
    opsets: tuple[tuple[str, int], ...]
    sets: int
    matches: tuple[Match, ...]
    body: str = ""
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether everything is as it should be."""
        return all(m.ok for m in self.matches)

    def words(self) -> list[str]:
        """Return the certificate in sentences."""
        inside = f", {count(self.captures, 'value')} of them read by bodies of nodes" if self.captures else ""
        functions = f" and {count(self.functions, 'function')}" if self.functions else ""
        return [
            f"Cut out {count(self.nodes, 'node')}{functions}{inside}.",
            *(f"  in   {v.name}  {v.type}" for v in self.inputs),
            *(f"  out  {v.name}  {v.type}" for v in self.outputs),
            f"Certified: alone it computes what it computes inside the model, on the model's own boundary values, over "
            f"{count(self.sets, 'set')} of inputs ({agreement(self.matches)}).",
            *_within(self.body, self.note),
        ]


@dataclasses.dataclass(frozen=True, slots=True)
class Mapped:
    """What a boundary value of the donor is in the host.

    Attributes:
        donor: Name of the value in the donor.
        host: Name of the value in the host whose place it takes, or which it reads.
        adapters: What lies in between, in words; empty when nothing does.
    """

    donor: str
    host: str
    adapters: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Fitted:
    """An adapter that was fitted to data.

    Attributes:
        adapter: Which, in words.
        explained: Share of the variance of what it should give that it gives, on samples it was not fitted to where
            there are enough; else on those it was.
        samples: How many samples it was fitted to.
        held_out: How many others judged it; 0 when there were too few.
    """

    adapter: str
    explained: float
    samples: int
    held_out: int


@dataclasses.dataclass(frozen=True, slots=True)
class GraftCertificate:
    """What was put where, and the proof that it computes there what it computes in the donor.

    Attributes:
        schema_version: Of this form.
        operation: "graft".
        host: Files of the host.
        donor: Files of the donor.
        result: Files that were written; empty until then.
        replaced: What was cut out of the host; "after T" for an insertion.
        inserted: What was put there.
        copies: How often.
        inputs: What each input of the donor's part reads.
        outputs: What each of its outputs replaces.
        kept: Values of the host's part that its own nodes go on computing, because others need them.
        brought: Inputs of the donor's part that the host has nothing like: the donor's nodes compute them there, from
            the inputs of the model.
        nodes: Nodes of the host before, and of the result.
        shared_bytes: Size of the donor's constants that the host already had.
        opsets: (whose, what was done) for operator sets that were converted.
        sets: How many sets of inputs of the host were run.
        slices: The donor's part alone against the same inside the result, on the values that it reads there.
        untouched: Outputs and boundary values in front of the graft, against the host as it was.
        changed: Outputs of the model behind the graft, and how far they moved.
        fitted: The adapters that were fitted to data.
        body: Path of the host's body that the graft is in; empty for the main graph.
        note: On which of the values that the body is given it was run, in words; empty for the main graph.
    """

    schema_version: int
    operation: str
    host: tuple[FileHash, ...]
    donor: tuple[FileHash, ...]
    result: tuple[FileHash, ...]
    replaced: str
    inserted: str
    copies: int
    inputs: tuple[Mapped, ...]
    outputs: tuple[Mapped, ...]
    kept: tuple[str, ...]
    brought: tuple[str, ...]
    nodes: tuple[int, int]
    shared_bytes: int
    opsets: tuple[tuple[str, str], ...]
    sets: int
    slices: tuple[Match, ...]
    untouched: tuple[Match, ...]
    changed: tuple[Change, ...]
    fitted: tuple[Fitted, ...]
    body: str = ""
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether everything is as it should be."""
        return all(m.ok for m in (*self.slices, *self.untouched))

    def words(self) -> list[str]:
        """Return the certificate in sentences."""
        times = f", {self.copies} times in a row" if self.copies > 1 else ""
        where = self.replaced if self.replaced.startswith("after ") else f"in the place of the host's {self.replaced}"
        lines = [f"Put the donor's {self.inserted} {where}{times}: {_nodes(self.nodes)}."]
        lines += [f"  in   {m.donor} reads {m.host}{_by_way_of(m.adapters)}" for m in self.inputs]
        lines += [f"  out  {m.donor} replaces {m.host}{_by_way_of(m.adapters)}" for m in self.outputs]
        if self.kept:
            lines.append(f"The host's own nodes still compute {', '.join(self.kept)}, which others read.")
        if self.brought:
            lines.append(
                f"The donor's nodes compute {', '.join(self.brought)} there too, from the inputs of the model."
            )
        lines += [f"The {whose}: {what}." for whose, what in self.opsets]
        if self.shared_bytes:
            lines.append(f"{size(self.shared_bytes)} of equal weights are stored once.")
        lines += [_fit(f) for f in self.fitted]
        lines.append(
            f"Certified: the donor's part alone computes what it computes inside the host, on the host's own boundary "
            f"values, over {count(self.sets, 'set')} of inputs ({agreement(self.slices)}). {self._around()}"
        )
        lines += _within(self.body, self.note)
        return lines

    def _around(self) -> str:
        behind = "No output depends on the graft."
        if self.changed:
            behind = f"Behind the graft: {', '.join(map(_moved, self.changed))}."
        return f"What does not depend on it is as it was ({agreement(self.untouched)}). {behind}"


def _within(body: str, note: str) -> list[str]:
    return [f"It lies in the body {body}, which was run alone on what it is given there: {note}."] if body else []


def _nodes(pair: tuple[int, int]) -> str:
    return f"{pair[0]:,} -> {count(pair[1], 'node')}"


def _moved(change: Change) -> str:
    if change.relative == 0.0:
        return f"{change.name} (as it was)"
    if math.isinf(change.relative):
        return f"{change.name} (of another type, shape or with other infinities)"
    return f"{change.name} (moved by up to {deviation(change.relative)} of its range)"


def _by_way_of(adapters: tuple[str, ...]) -> str:
    return f" by way of {', then '.join(adapters)}" if adapters else ""


def _fit(fitted: Fitted) -> str:
    on = f"{count(fitted.held_out, 'other sample')}" if fitted.held_out else "the same samples"
    return (
        f"The {fitted.adapter} was fitted to {count(fitted.samples, 'sample')}; on {on} it gives "
        f"{100 * fitted.explained:.1f}% of the variance."
    )


def agreement(matches: Sequence[Match]) -> str:
    """Say how close values are that should be equal."""
    worst = max((m.relative for m in matches), default=0.0)
    if worst == 0.0:
        return "equal to the bit"
    return f"worst deviation {deviation(worst)} of the range, where rounding allows {deviation(_allowed(matches))}"


def _allowed(matches: Sequence[Match]) -> float:
    return max(matches, key=lambda m: m.relative).tolerance


def typed(values: Iterable[ir.Value]) -> tuple[TypedValue, ...]:
    """Return values with their types in words."""
    return tuple(TypedValue(v.name or "", type_text(v.type, v.shape)) for v in values)


_SHORT = {"float": "float32", "double": "float64"}


def type_text(kind: ir.TypeProtocol | None, shape: ir.Shape | None) -> str:
    """Return element type and shape, e.g. "float32 [batch, 64]"."""
    if kind is None:
        return "unknown"
    if not isinstance(kind, ir.TensorType):
        return str(kind).lower()
    name = kind.dtype.name.lower()
    dims = "[...]" if shape is None else f"[{', '.join(_dim(d) for d in shape)}]"
    return f"{_SHORT.get(name, name)} {dims}"


def _dim(dim: int | ir.SymbolicDim) -> str:
    return str(dim) if isinstance(dim, int) else dim.value or "?"


def files_of(model: ir.Model) -> tuple[FileHash, ...]:
    """Return the files a model was loaded from, with their hashes; none for one that was made in memory."""
    original = model.graph.meta.get(ORIGINAL)
    paths = {original.path} if isinstance(original, DataFile) else set()
    for tensor in _tensors(model):
        if isinstance(tensor, (EmbeddedTensor, ExternalTensor)):
            paths.add(tensor.region.file.path)
    return hashes(sorted(paths))


def hashes(paths: Iterable[Path]) -> tuple[FileHash, ...]:
    """Return files with their hashes."""
    return tuple(FileHash(str(path), _sha256(path)) for path in paths)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for scope in scopes(model):
        yield from (v.const_value for v in scope.graph.initializers.values() if v.const_value is not None)
        for node in scope.graph:
            for attribute in node.attributes.data.values():
                if not attribute.is_ref() and attribute.type == ir.AttributeType.TENSOR:
                    yield attribute.as_tensor()
