"""What is known about a cut or a graft once it has been proven: for people in words, for programs as JSON."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import onnx_ir as ir

from onnxopt.graft.probe import Match
from onnxopt.graph import scopes
from onnxopt.model import ORIGINAL
from onnxopt.proto.datafile import DataFile
from onnxopt.proto.tensors import EmbeddedTensor, ExternalTensor
from onnxopt.report.words import count, deviation

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
        ]


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
