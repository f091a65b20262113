"""Tensors that are stored as integers: read as the real numbers they stand for, written on the same kind of grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnxopt.numeric import adjacent, nbits
from onnxopt.transfer.tensors import Array, Reshaped, Store, Tensor, Unwritable

LEVELS = {
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT16: (-(2**15), 2**15 - 1),
    ir.DataType.UINT16: (0, 2**16 - 1),
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT2: (-2, 1),
    ir.DataType.UINT2: (0, 3),
}
"""The lowest and the highest integer."""
_SMALLEST = float(np.finfo(np.float32).tiny)
_LARGEST_SUM = 2.0**30
"""Integers of a bias stay below this, so that the sum they are added to stays within 32 bits."""


@dataclasses.dataclass(frozen=True)
class Dequantized:
    """(integers - zero point) * scale, as DequantizeLinear, or Cast, Sub and Mul, compute it.

    Attributes:
        integers: What is stored.
        dtype: Its type.
        scale: Of a shape that broadcasts to that of the integers once each of its elements is repeated `block` times
            along `axis`.
        zero: The same for the zero point; None where that is 0.
        axis: The axis that is divided into blocks; -1 without any.
        block: How many neighbours share a scale; 1 without blocks.
        summed: Of a bias: the weight whose products it is added to, where its steps may be made larger for it.
    """

    integers: Tensor
    dtype: ir.DataType
    scale: Tensor
    zero: Tensor | None
    axis: int = -1
    block: int = 1
    summed: Dequantized | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self.integers.shape

    def leaves(self) -> Iterator[ir.Value]:
        """Yield integers, scale and zero point."""
        for part in (self.integers, self.scale, self.zero):
            if part is not None:
                yield from part.leaves()

    def read(self, store: Store) -> Array:
        """Return the real numbers."""
        codes = self.integers.read(store).astype(np.float32)
        if self.zero is not None:
            codes = codes - self._spread(self.zero.read(store).astype(np.float32))
        found: Array = codes * self._spread(self.scale.read(store).astype(np.float32))
        return found

    def write(self, array: Array, store: Store) -> None:
        """Quantize: symmetric grids stay symmetric, others reach from the lowest to the highest value."""
        if not np.isfinite(array).all():
            raise Unwritable("values that are not finite cannot be quantized")
        if self.dtype == ir.DataType.INT32:
            self._write_sums(array, store)
            return
        if self.dtype not in LEVELS:
            raise Unwritable(f"grids of {self.dtype.name} are not known")
        low, high = LEVELS[self.dtype]
        bottom, top = np.minimum(self._reduced(array, np.minimum), 0), np.maximum(self._reduced(array, np.maximum), 0)
        middle = (low + high + 1) // 2
        zero = None if self.zero is None else self.zero.read(store).astype(np.float64)
        if zero is None or np.all(zero == middle):
            step = np.maximum(-bottom, top) / (high - middle)
            if self.dtype == ir.DataType.INT8 and not np.any(zero):
                step = self._fitting(array, step, adjacent.held_orders(self.integers.read(store)))
            offset = np.full(step.shape, float(middle if zero is not None else 0))
        else:
            step = (top - bottom) / (high - low)
            offset = np.clip(np.rint(low - bottom / np.where(step < _SMALLEST, 1, step)), low, high)
        step = np.where(step < _SMALLEST, 1, step)
        self.scale.write(step.astype(np.float32).reshape(self.scale.shape), store)
        if self.zero is not None and not np.all(zero == middle):
            self.zero.write(offset.reshape(self.zero.shape), store)
        scale = self._spread(self.scale.read(store).astype(np.float64).reshape(step.shape))
        codes = np.rint(array / scale) + self._spread(offset)
        # A symmetric grid of signed integers has no use for its lowest code.
        self.integers.write(np.clip(codes, low + 1 if zero is None and low < 0 else low, high), store)
        self._require_near(array, scale, store)

    def _fitting(self, array: Array, step: Array, orders: list[adjacent.Order]) -> Array:
        """Widen steps until sums of neighbours fit into 16 bits, as `numeric/adjacent.py` has it, where they did."""
        finest = step
        for levels in adjacent.LEVELS[1:]:
            step = np.where(step < _SMALLEST, 1, step)
            wide = adjacent.too_large(np.rint(array / self._spread(step.reshape(self.scale.shape))), orders)
            if not wide.any():
                break
            step = np.where(self._reduced(wide, np.maximum) > 0, finest * adjacent.LEVELS[0] / levels, step)
        return step

    def _write_sums(self, array: Array, store: Store) -> None:
        """Quantize a bias, whose scale is the product of two others.

        Next to weights that are almost 0 it may be too large for it: then their steps are made larger.
        """
        scale = self._spread(self.scale.read(store).astype(np.float64))
        larger = np.abs(array / scale) / _LARGEST_SUM
        if self.summed is not None and np.any(larger > 1):
            self.summed.coarsen(np.maximum(larger, 1), store)
            scale = self._spread(self.scale.read(store).astype(np.float64))
        self.integers.write(np.clip(np.rint(array / scale), -(2**31), 2**31 - 1), store)
        self._require_near(array, scale, store)

    def coarsen(self, factors: Array, store: Store) -> None:
        """Make steps larger, each by its factor, or all by the largest where there is one step."""
        if self.zero is not None and np.any(self.zero.read(store)):
            return
        array, scale = self.read(store).astype(np.float64), self.scale.read(store).astype(np.float64)
        scale = scale * (factors.reshape(scale.shape) if scale.size == factors.size else factors.max())
        self.scale.write(scale.astype(np.float32), store)
        self.integers.write(np.rint(array / self._spread(self.scale.read(store).astype(np.float64))), store)

    def _require_near(self, array: Array, scale: Array, store: Store) -> None:
        """Raise where an integer stands for something else than its number, rounded: half a step and half of 0's."""
        step = np.broadcast_to(np.abs(scale), array.shape)
        # Integers are multiplied in float32, in which large ones of 32 bits are rounded again.
        slack = step + 2.0**-22 * np.abs(array)
        if np.any(np.abs(self.read(store) - array) > slack):
            raise Unwritable("the target's grid for it does not reach as far as the source's numbers")

    def _spread(self, values: Array) -> Array:
        if self.block == 1:
            return values
        return np.repeat(values, self.block, self.axis).take(range(self.shape[self.axis]), self.axis)

    def _reduced(self, array: Array, function: np.ufunc) -> Array:
        """Return the extreme of what shares a scale, in the shape of the scale."""
        found = array.astype(np.float64)
        if self.block > 1:
            found = function.reduceat(found, range(0, self.shape[self.axis], self.block), axis=self.axis)
        sizes = (1,) * (found.ndim - len(self.scale.shape)) + self.scale.shape
        axes = tuple(i for i, (n, own) in enumerate(zip(sizes, found.shape, strict=True)) if n == 1 and own != 1)
        found = function.reduce(found, axis=axes, keepdims=True) if axes else found
        return found.reshape(self.scale.shape)


@dataclasses.dataclass(frozen=True)
class Product:
    """The step of sums: that of what comes in times that of the weight, which are parameters of others.

    Attributes:
        factors: One number, and one or one per channel.
        times: Multiplies both.
    """

    factors: tuple[Tensor, Tensor]
    times: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self.factors[1].shape

    def leaves(self) -> Iterator[ir.Value]:
        """Yield nothing: it follows from what belongs to others."""
        return iter(())

    def read(self, store: Store) -> Array:
        """Return the numbers."""
        first, second = (f.read(store).astype(np.float64) for f in self.factors)
        return first * second * self.times

    def write(self, array: Array, store: Store) -> None:
        """Refuse."""
        raise Unwritable("the scale of its sums follows from others")


@dataclasses.dataclass(frozen=True)
class Packed:
    """A matrix of few bits with a scale per block of its contraction, as MatMulNBits has it; (columns, rows) here.

    Attributes:
        codes: Packed, (rows, blocks, bytes).
        scale: A scale for each row and block.
        zero: Zero points; None where that is the middle code.
        shape: (contraction, rows): as MatMul wants it.
        bits: Bits of a code.
        block: Neighbours that share a scale.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    shape: tuple[int, ...]
    bits: int
    block: int

    def leaves(self) -> Iterator[ir.Value]:
        """Yield codes, scales and zero points."""
        for part in (self.codes, self.scale, self.zero):
            if part is not None:
                yield from part.leaves()

    def read(self, store: Store) -> Array:
        """Return the real numbers."""
        columns, rows = self.shape
        packed = self.codes.read(store).reshape(rows, -1)
        codes = nbits.unpack(packed, self.bits, self._blocks * self.block).reshape(rows, self._blocks, self.block)
        return nbits.decode(codes.reshape(rows, -1), self._grid(store), columns).T

    def write(self, array: Array, store: Store) -> None:
        """Round to the nearest code of a grid of the same kind."""
        matrix = np.ascontiguousarray(array.T, np.float32)
        spec = nbits.Spec(self.bits, self.block, symmetric=self.zero is None, scale_dtype=self.scale.read(store).dtype)
        grid = nbits.fit(matrix, spec)
        codes = nbits.encode(matrix, grid).reshape(self.shape[1], -1)
        self.codes.write(nbits.pack(codes, self.bits).reshape(self.codes.shape), store)
        self.scale.write(grid.scale.reshape(self.scale.shape), store)
        if self.zero is not None:
            self.zero.write(nbits.pack(grid.zero_point, self.bits).reshape(self.zero.shape), store)

    @property
    def _blocks(self) -> int:
        return -(-self.shape[0] // self.block)

    def _grid(self, store: Store) -> nbits.BlockGrid:
        scale = self.scale.read(store).reshape(self.shape[1], self._blocks)
        if self.zero is None:
            zero = np.full(scale.shape, 2 ** (self.bits - 1), np.uint8)
        else:
            zero = nbits.unpack(self.zero.read(store).reshape(self.shape[1], -1), self.bits, self._blocks)
        return nbits.BlockGrid(scale, zero, self.bits, self.block)


def along(part: Tensor | None, rank: int, axis: int) -> Tensor | None:
    """Return a vector of one number per index of an axis in a shape that broadcasts; one number stays one."""
    if part is None or len(part.shape) != 1:
        return part
    if part.shape[0] == 1:
        return Reshaped(part, ())
    return Reshaped(part, tuple(part.shape[0] if i == axis % rank else 1 for i in range(rank)))
