"""Plausible values for one input, from what it is called, its type, and what uses it."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.errors import DataError
from onnxopt.graph import attribute, is_op
from onnxopt.inputs import parameters
from onnxopt.inputs.axes import Axes, Axis, Kind, words
from onnxopt.inputs.consumers import bounded, first_uses, index_bounds

_VOCABULARY = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "1", "2.5", "")
_SEQUENCE_LENGTH = 2
"""Elements in a generated sequence."""

_SAMPLE_RATE = 16000
_TIMESTEPS = 1000

_DOMAINS: Mapping[tuple[str, int], tuple[float, float]] = {
    ("Log", 0): (0.1, 2.0),
    ("Sqrt", 0): (0.0, 2.0),
    ("Pow", 0): (0.1, 2.0),
    ("Pow", 1): (0.0, 3.0),
    ("Div", 1): (1.0, 5.0),
    ("Mod", 1): (1.0, 5.0),
    ("Asin", 0): (-0.9, 0.9),
    ("Acos", 0): (-0.9, 0.9),
    ("Atanh", 0): (-0.9, 0.9),
    ("Acosh", 0): (1.1, 3.0),
    ("BitShift", 1): (0.0, 4.0),
    ("Bernoulli", 0): (0.0, 1.0),
}
"""Where an operator is defined, or gives numbers worth comparing."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ask:
    """What is to be made.

    Attributes:
        value: The graph input.
        dtype: Element type.
        shape: Sizes of its axes.
        index: Number of the set of inputs it belongs to.
        sizes: Sizes of the named axes.
        random: Source of randomness.
    """

    value: ir.Value
    dtype: ir.DataType
    shape: tuple[int, ...]
    index: int
    sizes: Mapping[str, int]
    random: np.random.Generator

    @property
    def words(self) -> frozenset[str]:
        """The words of the input's name."""
        return frozenset(words(self.value.name or ""))

    @property
    def is_float(self) -> bool:
        """Whether its elements are floating-point numbers."""
        return self.dtype.is_floating_point()

    def cast(self, numbers: Any) -> np.ndarray:
        """Return numbers broadcast to the shape, as an array of the element type."""
        array = np.broadcast_to(np.asarray(numbers), self.shape)
        return np.array(array.astype(self.dtype.numpy()), order="C")


class Roles:
    """Makes the inputs of one model."""

    def __init__(self, model: ir.Model, inputs: Sequence[ir.Value], axes: Axes) -> None:
        """Remember the model's inputs and functions.

        Args:
            model: The model.
            inputs: The inputs that are to be made.
            axes: Their axes.
        """
        self._axes = axes
        self._inputs = inputs
        self._functions = dict(model.functions)

    def make(self, value: ir.Value, index: int, sizes: Mapping[str, int], seed: int) -> Any:
        """Return a value for an input: an array, a list of arrays for a sequence, None for an empty optional.

        Args:
            value: The input.
            index: Number of the set of inputs it is for.
            sizes: Sizes of the named axes.
            seed: Seed of the run; every input draws from a stream of its own.

        Raises:
            DataError: If inputs of its type cannot be generated.
        """
        name = value.name or ""
        kind: Any = value.type
        if isinstance(kind, ir.OptionalType):
            if index % 2 and any(is_op(u.node, "OptionalHasElement") for u in value.uses()):
                return None
            kind = kind.elem_type
        many = isinstance(kind, ir.SequenceType)
        if many:
            kind = kind.elem_type
        if not isinstance(kind, ir.TensorType):
            raise DataError(
                f"The input {name} is of the type {value.type or 'unknown'}, which cannot be generated; give real "
                "inputs with --data module:function."
            )
        random = np.random.default_rng([seed, index, zlib.crc32(name.encode())])
        ask = Ask(value, kind.dtype, self._axes.concrete(name, sizes), index, sizes, random)
        return [self._array(ask) for _ in range(_SEQUENCE_LENGTH)] if many else self._array(ask)

    def _array(self, ask: Ask) -> np.ndarray:
        if ask.dtype == ir.DataType.STRING:
            return _strings(ask)
        steering = _steering(ask)
        if steering is not None:
            return steering
        if ask.dtype == ir.DataType.BOOL:
            return self._booleans(ask)
        if ask.dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
            return ask.cast(ask.random.standard_normal(ask.shape) + 1j * ask.random.standard_normal(ask.shape))
        named = self._named(ask)
        return self._numbers(ask) if named is None else named

    def _booleans(self, ask: Ask) -> np.ndarray:
        if "mask" in ask.words:
            # In PyTorch's padding masks True marks what is to be left out.
            kept = valid_mask(ask.shape, ask.index)
            return ~kept if "padding" in ask.words else kept
        if {"cache", "branch"} <= ask.words:
            return ask.cast(False)
        return ask.cast(ask.random.random(ask.shape) < 0.5)

    def _named(self, ask: Ask) -> np.ndarray | None:
        """Return what the name of the input asks for, None when it asks for nothing special."""
        about, shape = ask.words, ask.shape
        bounds = self._bounds(ask)
        if "mask" in about and shape and (len(shape) == 2 or not ask.is_float or "attention" in about):
            return ask.cast(valid_mask(shape, ask.index))
        if {"scale", "factor"} <= about:
            return ask.cast(1)
        if about & {"shape", "size", "sizes"} and about & {"im", "img", "image", "orig", "original", "target"}:
            return self._image_size(ask)
        if "sr" in about or {"sample", "rate"} <= about or {"sampling", "rate"} <= about:
            return ask.cast(_SAMPLE_RATE)
        if about & {"timestep", "timesteps"}:
            return ask.cast(ask.random.integers(0, _TIMESTEPS, shape))
        if ask.is_float:
            return None
        if about & {"position", "positions", "pos"} and shape:
            rows = bounds[1] if bounds else np.iinfo(np.int32).max
            return ask.cast(np.arange(shape[-1]) % rows)
        if about & {"segment", "segments"} or {"token", "type"} <= about:
            return ask.cast(ask.random.integers(0, min(2, bounds[1]) if bounds else 2, shape))
        if about & {"len", "lens", "length", "lengths"} and len(shape) <= 2:
            return self._lengths(ask)
        return None

    def _numbers(self, ask: Ask) -> np.ndarray:
        shape, random = ask.shape, ask.random
        domain = next((_DOMAINS[key] for key in _direct(ask.value) if key in _DOMAINS), None)
        if ask.is_float:
            if domain is not None:
                return ask.cast(random.uniform(*domain, shape))
            if int(np.prod(shape)) == 1 and len(shape) <= 1:
                return ask.cast(random.uniform(0.5, 1.0, shape))
            return ask.cast(random.standard_normal(shape, dtype=np.float32))
        bounds = self._bounds(ask)
        if bounds is not None:
            return ask.cast(random.integers(*bounds, shape))
        if domain is not None:
            return ask.cast(random.integers(int(domain[0]), int(domain[1]), shape))
        if ask.dtype.bitwidth <= 8:
            return ask.cast(random.integers(int(ask.dtype.min), int(ask.dtype.max) + 1, shape))
        return ask.cast(random.integers(0, 10, shape))

    def _bounds(self, ask: Ask) -> tuple[int, int] | None:
        """Return the range of integers that stay inside every table they index."""
        if ask.is_float:
            return None
        found = index_bounds(ask.value, self._functions)
        return bounded([(s, o, r if isinstance(r, int) else ask.sizes.get(r or "")) for s, o, r in found])

    def _lengths(self, ask: Ask) -> np.ndarray:
        """Lengths of the rows of a padded batch; they agree with the masks."""
        rows = ask.shape[0] if ask.shape else 1
        lengths = np.asarray(valid_lengths(rows, self._length(ask), ask.index))
        return ask.cast(lengths.reshape(lengths.shape + (1,) * (len(ask.shape) - 1)) if ask.shape else lengths[0])

    def _length(self, ask: Ask) -> int:
        """Return the size of the axis that lengths are about."""
        for axis in self._axes:
            if axis.kind in (Kind.SEQUENCE, Kind.SAMPLES) and axis.input != ask.value.name:
                return self._axes.concrete(axis.input, ask.sizes)[axis.index]
        for other in self._inputs:
            shape = self._axes.concrete(other.name or "", ask.sizes)
            if other is not ask.value and len(shape) > 1:
                return shape[1]
        return 1

    def _image_size(self, ask: Ask) -> np.ndarray | None:
        """Return height and width of the image input, for inputs that tell it to the model."""
        for shape in self._axes.shapes.values():
            if len(shape) == 4 and ask.shape and ask.shape[-1] >= 2:
                name = next(n for n, s in self._axes.shapes.items() if s is shape)
                size = self._axes.concrete(name, ask.sizes)
                first = 2 if not _channels_last(shape) else 1
                return ask.cast([size[first], size[first + 1], *([1] * (ask.shape[-1] - 2))])
        return None


def valid_lengths(rows: int, length: int, index: int) -> list[int]:
    """Return how much of each row of a padded batch is filled: row 0 entirely, none less than one element.

    Args:
        rows: Number of rows.
        length: Their padded length.
        index: Number of the set of inputs: a single row is padded too, except in the first set.
    """
    if rows == 1 and index > 0:
        return [max(1, length - length // 4)]
    step = max(1, length // 3)
    return [max(1, length - (row * step) % max(length, 1)) if row else length for row in range(rows)]


def valid_mask(shape: tuple[int, ...], index: int) -> np.ndarray:
    """Return a mask over the last axis, True as far as a row is filled; another first axis counts rows."""
    if not shape:
        return np.array(True)
    rows = shape[0] if len(shape) > 1 else 1
    lengths = np.asarray(valid_lengths(rows, shape[-1], index)).reshape(rows, *([1] * (len(shape) - 1)))
    return np.array(np.broadcast_to(np.arange(shape[-1]) < lengths, shape))


def _direct(value: ir.Value) -> list[tuple[str, int]]:
    return [(node.op_type, index) for node, index in first_uses(value)]


def _steering(ask: Ask) -> np.ndarray | None:
    """Return what a node that the input steers can work with."""
    length = int(np.prod(ask.shape))
    for node, index in first_uses(ask.value):
        answer = parameters.find(node, index, length, ask.sizes)
        if answer is None:
            continue
        array = np.asarray(answer)
        if array.size == length or array.ndim == 0:
            return ask.cast(array.reshape(ask.shape) if array.ndim else array)
    return None


def _strings(ask: Ask) -> np.ndarray:
    known: Sequence[str] = _VOCABULARY
    for node, _ in first_uses(ask.value):
        for name in ("keys_strings", "cats_strings", "classes_strings"):
            known = attribute(node, name, None) or known
    array = np.empty(ask.shape, dtype=object)
    array[...] = ask.random.choice(np.asarray(known, dtype=object), ask.shape)
    return array


def _channels_last(shape: tuple[int | Axis, ...]) -> bool:
    return any(isinstance(axis, Axis) and axis.kind is Kind.HEIGHT and axis.index == 1 for axis in shape) or (
        shape[-1] in (1, 3, 4) and shape[1] not in (1, 3, 4)
    )
