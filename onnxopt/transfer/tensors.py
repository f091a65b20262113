"""How an operand comes from stored tensors, read forwards and written backwards.

A weight rarely reaches its operator as it is stored: exporters transpose, reshape, cast and slice it, quantizers store
integers. `trace` reads such a chain into a `Tensor`, whose `read` gives the array that the operator sees and whose
`write` finds the stored tensors that give another one. What was written lies in a `Store`; the model does not change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxopt.analysis.shapes import Shapes
from onnxopt.graph import attribute, constant_ints, constant_tensor, is_op

Array = npt.NDArray[Any]
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


class Unwritable(Exception):  # noqa: N818 - it is an answer, not a failure
    """A tensor that no stored tensor can be found for; the message is the reason."""


class Store:
    """Stored tensors by the value that holds them: those that were written, else the model's own."""

    def __init__(self) -> None:
        """Start with nothing written."""
        self.written: dict[ir.Value, Array] = {}

    def get(self, value: ir.Value) -> Array:
        """Return what is stored under a constant value."""
        if value in self.written:
            return self.written[value]
        tensor = constant_tensor(value)
        assert tensor is not None, f"{value.name} is no constant"
        return tensor.numpy()

    def put(self, value: ir.Value, array: Array) -> None:
        """Store an array instead, in the type and shape of the model's own.

        Raises:
            Unwritable: If its numbers are too large for the type.
        """
        tensor = constant_tensor(value)
        assert tensor is not None, f"{value.name} is no constant"
        with np.errstate(over="ignore"):
            stored = array.astype(tensor.dtype.numpy())
        if tensor.dtype == ir.DataType.FLOAT16 and not np.isfinite(stored).all() and np.isfinite(array).all():
            raise Unwritable("float16 does not reach as far as the source's numbers")
        self.written[value] = stored.reshape(tuple(tensor.shape.numpy()))


class Tensor(Protocol):
    """An operand as it is computed from stored tensors."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""

    def leaves(self) -> Iterator[ir.Value]:
        """Yield the constants it comes from."""

    def read(self, store: Store) -> Array:
        """Return the array that the operator sees."""

    def write(self, array: Array, store: Store) -> None:
        """Store what gives another array.

        Raises:
            Unwritable: If nothing does.
        """


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A constant itself."""

    value: ir.Value
    shape: tuple[int, ...]

    def leaves(self) -> Iterator[ir.Value]:
        """Yield the constant."""
        yield self.value

    def read(self, store: Store) -> Array:
        """Return its array."""
        return store.get(self.value)

    def write(self, array: Array, store: Store) -> None:
        """Store another array."""
        if array.shape != self.shape:
            raise Unwritable(f"{self.value.name} has shape {list(self.shape)}, not {list(array.shape)}")
        store.put(self.value, array)


@dataclasses.dataclass(frozen=True)
class Filled:
    """A number in every place, which no stored tensor holds."""

    number: float
    shape: tuple[int, ...]

    def leaves(self) -> Iterator[ir.Value]:
        """Yield nothing."""
        return iter(())

    def read(self, store: Store) -> Array:
        """Return the number in every place."""
        return np.full(self.shape, self.number, np.float32)

    def write(self, array: Array, store: Store) -> None:
        """Accept what it is already."""
        if not np.all(array == self.number):
            raise Unwritable("it is computed from a number, not stored")


@dataclasses.dataclass(frozen=True)
class Permuted:
    """Another tensor with its axes in another order."""

    source: Tensor
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self.source.shape[i] for i in self.order)

    def leaves(self) -> Iterator[ir.Value]:
        """Yield those of the source."""
        return self.source.leaves()

    def read(self, store: Store) -> Array:
        """Return the array."""
        return self.source.read(store).transpose(self.order)

    def write(self, array: Array, store: Store) -> None:
        """Write into the source."""
        self.source.write(array.transpose(np.argsort(self.order)), store)


@dataclasses.dataclass(frozen=True)
class Reshaped:
    """Another tensor in another shape."""

    source: Tensor
    shape: tuple[int, ...]

    def leaves(self) -> Iterator[ir.Value]:
        """Yield those of the source."""
        return self.source.leaves()

    def read(self, store: Store) -> Array:
        """Return the array."""
        return self.source.read(store).reshape(self.shape)

    def write(self, array: Array, store: Store) -> None:
        """Write into the source."""
        self.source.write(array.reshape(self.source.shape), store)


@dataclasses.dataclass(frozen=True)
class Sliced:
    """Some neighbours along an axis of another tensor."""

    source: Tensor
    axis: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        shape = list(self.source.shape)
        shape[self.axis] = self.stop - self.start
        return tuple(shape)

    def leaves(self) -> Iterator[ir.Value]:
        """Yield those of the source."""
        return self.source.leaves()

    def read(self, store: Store) -> Array:
        """Return the array."""
        return self.source.read(store)[self._index()]

    def write(self, array: Array, store: Store) -> None:
        """Write into the source, whose other parts stay."""
        whole = np.array(self.source.read(store))
        whole[self._index()] = array
        self.source.write(whole, store)

    def _index(self) -> tuple[slice, ...]:
        return (*(slice(None),) * self.axis, slice(self.start, self.stop))


@dataclasses.dataclass(frozen=True)
class Repeated:
    """A vector that is stored several times in a row, where small differences may have been added to each: their mean.

    Attributes:
        source: What is stored.
        times: How often.
    """

    source: Tensor
    times: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Its size."""
        return (self.source.shape[0] // self.times,)

    def leaves(self) -> Iterator[ir.Value]:
        """Yield those of the source."""
        return self.source.leaves()

    def read(self, store: Store) -> Array:
        """Return the vector."""
        found: Array = self.source.read(store).reshape(self.times, -1).mean(0)
        return found

    def write(self, array: Array, store: Store) -> None:
        """Write it into the source as often."""
        self.source.write(np.tile(array, self.times), store)


@dataclasses.dataclass(frozen=True)
class Joined:
    """Tensors one after another along an axis."""

    sources: tuple[Tensor, ...]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        shape = list(self.sources[0].shape)
        shape[self.axis] = sum(s.shape[self.axis] for s in self.sources)
        return tuple(shape)

    def leaves(self) -> Iterator[ir.Value]:
        """Yield those of the sources."""
        for source in self.sources:
            yield from source.leaves()

    def read(self, store: Store) -> Array:
        """Return the array."""
        return np.concatenate([s.read(store) for s in self.sources], self.axis)

    def write(self, array: Array, store: Store) -> None:
        """Write into the sources."""
        ends = np.cumsum([s.shape[self.axis] for s in self.sources])[:-1]
        for source, part in zip(self.sources, np.split(array, ends, self.axis), strict=True):
            source.write(part, store)


def chain(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor and what it is a rearrangement or part of, the stored one last."""
    yield tensor
    while isinstance(tensor, (Permuted, Repeated, Reshaped, Sliced)):
        tensor = tensor.source
        yield tensor


def leaf(value: ir.Value | None) -> Leaf | None:
    """Return a constant as a tensor, or None when it is none."""
    tensor = constant_tensor(value)
    if value is None or tensor is None or tensor.dtype == ir.DataType.STRING:
        return None
    return Leaf(value, tuple(int(n) for n in tensor.shape.numpy()))


def fixed_shape(value: ir.Value, shapes: Shapes) -> tuple[int, ...] | None:
    """Return the sizes of a value when all are known numbers."""
    shape = shapes.of(value)
    if shape is None or not all(isinstance(n, int) for n in shape):
        return None
    return tuple(n for n in shape if isinstance(n, int))


def reshaped(source: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor in another shape; the same when it has it."""
    return source if source.shape == tuple(shape) else Reshaped(source, tuple(shape))


def permuted(source: Tensor, order: Sequence[int]) -> Tensor:
    """Return a tensor with its axes in another order; two orders in a row become one."""
    if isinstance(source, Permuted):
        inner = source.order
        source, order = source.source, [inner[i] for i in order]
    return source if list(order) == list(range(len(order))) else Permuted(source, tuple(order))


def constant_split(node: ir.Node, size: int, count: int) -> tuple[int, ...] | None:
    """Return the sizes of the parts that a Split makes of so many, or None when they are not known."""
    given = attribute(node, "split")
    if given is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        given = constant_ints(node.inputs[1])
        if given is None:
            return None
    if given is None:
        each = -(-size // count)
        given = [each] * (count - 1) + [size - each * (count - 1)]
    parts = tuple(int(n) for n in given)
    return parts if sum(parts) == size and len(parts) == count else None


def constant_slice(node: ir.Node, rank: int) -> tuple[int, int, int] | None:
    """Return (axis, start, stop) of a Slice along one axis with step 1, or None; stop may lie beyond the end."""
    given = []
    for number, name in enumerate(("starts", "ends", "axes"), 1):
        found = attribute(node, name) if name in node.attributes else None
        if found is None and number < len(node.inputs) and node.inputs[number] is not None:
            found = constant_ints(node.inputs[number])
        given.append(found)
    starts, ends, axes = given
    if starts is None or ends is None or len(starts) != 1:
        return None
    if len(node.inputs) > 4 and node.inputs[4] is not None and constant_ints(node.inputs[4]) != (1,):
        return None
    axis = axes[0] if axes is not None else 0
    return axis % rank, int(starts[0]), int(ends[0])


def is_same(node: ir.Node) -> bool:
    """Whether a node passes its first input on as it is, up to its type."""
    return is_op(node, "Identity", "Cast", "CastLike")
