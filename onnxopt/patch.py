"""A result as its difference from the original: the graph, the weights that are new, and where the others come from.

A patch is an ONNX model in which an initializer that the original has too, whole or cut, is an empty stand-in; the
metadata says which tensor of the original it stands for, which indexes of it are kept, and that tensor's digest.
So what a long search or pruning found can be kept beside the original and made again, to the byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxopt.contract import Guarantee
from onnxopt.errors import ModelError
from onnxopt.graph import copied, scopes
from onnxopt.model import load, save
from onnxopt.proto.keys import HAD_EXTERNAL_DATA

if TYPE_CHECKING:
    from onnxopt.report.data import Report

KEY = "onnxopt.patch"
"""Key of the metadata that makes a model a patch."""
FORMAT = 1
WORTH_BYTES = 1 << 10
"""Smaller tensors are written as they are."""

LINES = 16
"""Lines along an axis whose elements are looked up, at most."""

Array = npt.NDArray[Any]
Place = tuple[str, str]
"""Path of a graph (see `graph.Scope`) and name of an initializer, or of the output of a Constant node."""


@dataclasses.dataclass(frozen=True, slots=True)
class History:
    """How the result came about.

    Attributes:
        pipeline: The passes as a pipeline string.
        guarantee: The weakest guarantee of the passes that left an edit.
    """

    pipeline: str
    guarantee: Guarantee


def history(report: Report) -> History:
    """Return what a patch tells of a run."""
    kept = {p.guarantee for p in report.passes if p.applied}
    weakest = next((g for g in (Guarantee.REDEFINES, Guarantee.APPROXIMATE) if g.value in kept), Guarantee.EXACT)
    return History(report.pipeline, weakest)


@dataclasses.dataclass(frozen=True, slots=True)
class Stand:
    """What an empty initializer of a patch stands for.

    Attributes:
        origin: The tensor of the original.
        digest: SHA-256 of its type, shape and data.
        kept: Per axis the indexes that are kept, None for all of them.
        copied: Whether the result has its bytes and the original one field per element, which files tell apart.
    """

    origin: Place
    digest: str
    kept: tuple[tuple[int, ...] | None, ...]
    copied: bool = False


def write_patch(original: ir.Model, result: ir.Model, history: History, path: str | os.PathLike[str]) -> None:
    """Write what must be done to the original to get the result.

    Args:
        original: The model as it was loaded.
        result: What was made of it; it is not changed.
        history: How.
        path: Where to.

    Raises:
        OutputError: If it cannot be written.
    """
    patch = copied(result)
    patch.graph.meta.pop(HAD_EXTERNAL_DATA, None)
    stands: dict[str, dict[str, Any]] = {}
    finder = _Finder(original)
    for graph, value in _free_initializers(patch):
        tensor = value.const_value
        if tensor is None or not _worth(tensor):
            continue
        stand = finder.find((graph, value.name or ""), tensor)
        if stand is not None:
            stands.setdefault(graph, {})[value.name or ""] = [*stand.origin, stand.digest, stand.kept, stand.copied]
            value.const_value = _empty(tensor)
            value.shape = ir.Shape([0])
    patch.metadata_props[KEY] = json.dumps(
        {
            "format": FORMAT,
            "pipeline": history.pipeline,
            "guarantee": history.guarantee.value,
            "external data": HAD_EXTERNAL_DATA in result.graph.meta,
            "stands": stands,
        }
    )
    save(patch, path)


def apply_patch(original: ir.Model, path: str | os.PathLike[str]) -> tuple[ir.Model, History]:
    """Make the result again from the original and a patch.

    Args:
        original: The model that the patch was made for; it is not changed.
        path: The patch.

    Returns:
        The result, and how it came about.

    Raises:
        ModelError: If the file is no patch, is damaged, or was made for another model.
    """
    model = load(path)
    told = model.metadata_props.pop(KEY, None)
    if told is None:
        raise ModelError(f"{os.fspath(path)} is no patch; `onnxopt optimize --patch FILE` writes one.")
    history, external, stands = _read(told, os.fspath(path))
    tensors = dict(_tensors(original))
    for graph, value in _free_initializers(model):
        stand = stands.pop((graph, value.name or ""), None)
        if stand is not None:
            value.const_value = _restored(stand, tensors, value.const_value, os.fspath(path))
            value.shape = ir.Shape(value.const_value.shape.numpy())
    if stands:
        raise ModelError(f'{os.fspath(path)} is damaged: it has no initializer "{next(iter(stands))[1]}".')
    if external:
        model.graph.meta[HAD_EXTERNAL_DATA] = True
    return model, history


def _restored(
    stand: Stand, tensors: Mapping[Place, ir.TensorProtocol], empty: ir.TensorProtocol | None, path: str
) -> ir.TensorProtocol:
    """Return the tensor that a stand-in stands for.

    Raises:
        ModelError: If the original does not hold it.
    """
    name = stand.origin[1]
    tensor = tensors.get(stand.origin)
    if tensor is None or digest(tensor) != stand.digest:
        what = "has no" if tensor is None else "has another"
        raise ModelError(f'{path} was made for another model: this one {what} initializer "{name}".')
    shape = tensor.shape.numpy()
    if len(stand.kept) != len(shape) or not all(
        k is None or all(0 <= i < size for i in k) for k, size in zip(stand.kept, shape, strict=True)
    ):
        raise ModelError(f'{path} is damaged: its cut of initializer "{name}" does not fit the shape {list(shape)}.')
    if all(k is None for k in stand.kept) and not stand.copied:
        return tensor
    array = tensor.numpy()
    for axis, kept in enumerate(stand.kept):
        if kept is not None:
            array = np.take(array, kept, axis=axis)
    return ir.Tensor(np.ascontiguousarray(array), dtype=tensor.dtype, name=empty.name if empty is not None else name)


def _read(told: str, path: str) -> tuple[History, bool, dict[Place, Stand]]:
    """Read the metadata of a patch.

    Raises:
        ModelError: If it is not as `write_patch` writes it.
    """
    try:
        read = json.loads(told)
        if read["format"] != FORMAT:
            raise ModelError(f"{path} was written by a newer onnxopt (its form is {read['format']}); update onnxopt.")
        stands = {
            (str(graph), str(name)): Stand(
                (str(where), str(origin)),
                str(checksum),
                tuple(None if k is None else tuple(int(i) for i in k) for k in kept),
                bool(copied),
            )
            for graph, entries in read["stands"].items()
            for name, (where, origin, checksum, kept, copied) in entries.items()
        }
        history = History(str(read["pipeline"]), Guarantee(read["guarantee"]))
        return history, bool(read["external data"]), stands
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is damaged: its list of kept weights cannot be read.") from error


class _Finder:
    """Finds tensors in the original: the same data, or a cut of the tensor of the same name."""

    def __init__(self, original: ir.Model) -> None:
        self._tensors = {place: t for place, t in _tensors(original) if _worth(t)}
        self._by_name = {name: place for place in reversed(self._tensors) for name in (place[1],)}
        self._by_form: dict[tuple[ir.DataType, tuple[int, ...]], list[Place]] = {}
        for place, tensor in self._tensors.items():
            self._by_form.setdefault(_form(tensor), []).append(place)
        self._digests: dict[Place, str] = {}

    def find(self, place: Place, tensor: ir.TensorProtocol) -> Stand | None:
        """Return what the tensor can be taken from, if anything."""
        alike = self._by_form.get(_form(tensor), [])
        whole: tuple[None, ...] = (None,) * len(tensor.shape)
        for origin in alike:
            if self._tensors[origin] is tensor:
                return Stand(origin, self._digest(origin), whole)
        if alike:
            own = digest(tensor)
            for origin in sorted(alike, key=lambda p: p != place):
                if self._digest(origin) == own:
                    return Stand(origin, own, whole, copied=_in_fields(self._tensors[origin]))
        source = place if place in self._tensors else self._by_name.get(place[1])
        if source is None or self._tensors[source].dtype != tensor.dtype:
            return None
        kept = cut(self._tensors[source].numpy(), tensor.numpy())
        return None if kept is None else Stand(source, self._digest(source), kept)

    def _digest(self, place: Place) -> str:
        if place not in self._digests:
            self._digests[place] = digest(self._tensors[place])
        return self._digests[place]


def cut(whole: Array, part: Array) -> tuple[tuple[int, ...] | None, ...] | None:
    """Return which indexes of each axis of an array make another one; None when that cannot be told.

    Elements of the part are looked up by their values, so some along each axis must occur once in the whole, as weights
    do; what is found is then compared element by element.

    Args:
        whole: The array that was cut.
        part: What may be left of it.

    Returns:
        Per axis the indexes, None for an axis that is whole.
    """
    if whole.ndim != part.ndim or not part.size or whole.dtype.kind not in "fiu":
        return None
    kept = [_indexes(whole, part, axis) for axis in range(part.ndim)]
    if any((k < 0).any() for k in kept) or not np.array_equal(whole[np.ix_(*kept)], part):
        return None
    return tuple(
        None if np.array_equal(k, np.arange(size)) else tuple(map(int, k))
        for k, size in zip(kept, whole.shape, strict=True)
    )


def _indexes(whole: Array, part: Array, axis: int) -> npt.NDArray[np.int64]:
    """Return where each index of an axis of the part comes from, -1 where that is not found."""
    lines = np.moveaxis(part, axis, -1).reshape(-1, part.shape[axis])
    found = np.full(part.shape[axis], -1, np.int64)
    for line in lines[np.linspace(0, len(lines) - 1, min(len(lines), LINES)).astype(int)]:
        missing = np.flatnonzero(found < 0)
        if not len(missing):
            break
        places = _places(whole.reshape(-1), line[missing])
        at = np.unravel_index(np.maximum(places, 0), whole.shape)[axis]
        found[missing] = np.where(places < 0, -1, at)
    return found


def _places(flat: Array, wanted: Array) -> npt.NDArray[np.int64]:
    """Return where each wanted value is in a flat array, -1 for what is not there exactly once."""
    needles, back = np.unique(wanted, return_inverse=True)
    at = np.minimum(np.searchsorted(needles, flat), len(needles) - 1)
    hits = np.flatnonzero(needles[at] == flat)
    counts = np.bincount(at[hits], minlength=len(needles))
    places = np.full(len(needles), -1, np.int64)
    places[at[hits]] = hits
    return np.where(counts == 1, places, -1)[back]


def digest(tensor: ir.TensorProtocol) -> str:
    """Return the SHA-256 of a tensor's type, shape and data."""
    sha = hashlib.sha256(f"{tensor.dtype.name}{list(tensor.shape.numpy())}".encode())
    sink = _Hashing(sha)
    if hasattr(tensor, "tofile"):
        tensor.tofile(sink)
    else:
        sink.write(tensor.tobytes())
    return sha.hexdigest()


class _Hashing:
    """A file that keeps nothing but a digest."""

    def __init__(self, sha: hashlib._Hash) -> None:
        self._sha = sha

    def write(self, data: bytes) -> int:
        self._sha.update(data)
        return len(data)


def _form(tensor: ir.TensorProtocol) -> tuple[ir.DataType, tuple[int, ...]]:
    return tensor.dtype, tuple(tensor.shape.numpy())


def _worth(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype != ir.DataType.STRING and tensor.nbytes >= WORTH_BYTES


def _in_fields(tensor: ir.TensorProtocol) -> bool:
    """Return whether a tensor has one field per element in its file."""
    return isinstance(tensor, ir.serde.TensorProtoTensor) and not tensor.raw.HasField("raw_data")


def _empty(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.Tensor(np.zeros([0], tensor.dtype.numpy()), dtype=tensor.dtype, name=tensor.name)


def _free_initializers(model: ir.Model) -> Iterator[tuple[str, ir.Value]]:
    """Yield the initializers that no caller can override, with the path of their graph."""
    for scope in scopes(model):
        for value in scope.graph.initializers.values():
            if not value.is_graph_input():
                yield scope.path, value


def _tensors(model: ir.Model) -> Iterator[tuple[Place, ir.TensorProtocol]]:
    """Yield the weights of a model: initializers and Constant nodes."""
    for scope in scopes(model):
        for name, value in scope.graph.initializers.items():
            if value.const_value is not None:
                yield (scope.path, name), value.const_value
        for node in scope.graph:
            attribute = node.attributes.get("value") if node.op_type == "Constant" else None
            if attribute is not None and attribute.type == ir.AttributeType.TENSOR:
                yield (scope.path, node.outputs[0].name or ""), attribute.as_tensor()
