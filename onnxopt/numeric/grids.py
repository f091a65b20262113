"""Quantization grids: what the integers of a quantized tensor stand for, and how to get there and back.

The arithmetic is that of ONNX QuantizeLinear and DequantizeLinear:

    integer = saturate(round_half_to_even(real / scale) + zero_point)
    real    = (integer - zero_point) * scale

computed in float32, or in float64 for float64 input.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from onnxopt.numeric.blocks import along, as_working, blocks, part

Array = npt.NDArray[Any]

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
"""Four bits of exponent, three of mantissa, no infinity (Micikevicius et al., FP8 Formats for Deep Learning, 2022)."""

_FLOAT8_MOST, _FLOAT8_STEP = 448.0, 32.0
"""Its largest number, and the distance of that to the one before."""


@dataclasses.dataclass(frozen=True, slots=True)
class Grid:
    """The real numbers that the integers of one tensor stand for.

    Attributes:
        scale: Distance between two neighbours. Shape () for the whole tensor, or (size of `axis`,).
        zero_point: The integer that stands for 0.0. Same shape as `scale`. Its dtype, int8, uint8 or float8e4m3fn,
            is that of the quantized tensor.
        axis: The axis that has a scale per index, counted from the front; None for one scale for all.
    """

    scale: Array
    zero_point: Array
    axis: int | None

    def __post_init__(self) -> None:
        """Check that the parts fit.

        Raises:
            ValueError: If they do not.
        """
        if self.scale.shape != self.zero_point.shape or self.scale.ndim != (self.axis is not None):
            raise ValueError(
                f"scale {self.scale.shape} and zero point {self.zero_point.shape} do not fit axis {self.axis}"
            )

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the quantized tensor."""
        return self.zero_point.dtype


def value_range(array: Array, axis: int | None = None) -> tuple[Array, Array]:
    """Return the smallest and the largest element, for the whole array or for each index of an axis.

    Reads the array once, in small pieces. A NaN makes both NaN.

    Args:
        array: Floating point, any shape with at least one element.
        axis: Counted from the front; None for the whole array.

    Returns:
        Two arrays of shape () or (size of the axis,), float64 for float64 input and float32 otherwise.
    """
    shape = () if axis is None else (array.shape[axis],)
    dtype = np.float64 if array.dtype == np.float64 else np.float32
    low, high = np.full(shape, np.inf, dtype), np.full(shape, -np.inf, dtype)
    others = tuple(i for i in range(array.ndim) if i != axis)
    for index in blocks(array.shape):
        piece = as_working(array[index])
        where = () if axis is None else index[axis]
        low[where] = np.minimum(low[where], piece.min(axis=others))
        high[where] = np.maximum(high[where], piece.max(axis=others))
    return low, high


def symmetric(low: Array, high: Array, axis: int | None = None, scale_dtype: Any = None, *, levels: int = 127) -> Grid:
    """Return the int8 grid with zero point 0 whose levels -`levels` to `levels` reach the larger of |low| and |high|.

    Args:
        low: Smallest values, finite. Shape () or (size of the axis,).
        high: Largest values, finite, same shape.
        axis: What the ranges are for; None for the whole tensor.
        scale_dtype: Type of the scale; that of `low` by default. A scale that is rounded to a narrower type is
            rounded up, so that the range stays within reach.
        levels: The largest integer.

    Returns:
        The grid. Where the range is zero, or too small for its scale to be a normal number, the scale is 1.
    """
    largest = np.maximum(np.abs(low), np.abs(high)).astype(np.float64)
    scale = _scale(largest / levels, scale_dtype or low.dtype)
    return Grid(scale, np.zeros(scale.shape, np.int8), axis)


def asymmetric(low: Array, high: Array, axis: int | None = None, scale_dtype: Any = None) -> Grid:
    """Return the uint8 grid whose levels 0 to 255 reach from low to high. The range is widened to hold 0.0.

    Args:
        low: Smallest values, finite. Shape () or (size of the axis,).
        high: Largest values, finite, same shape.
        axis: What the ranges are for; None for the whole tensor.
        scale_dtype: Type of the scale; that of `low` by default. A scale that is rounded to a narrower type is
            rounded up, so that the range stays within reach.

    Returns:
        The grid, in which 0.0 is a level. Where the range is zero, or too small for its scale to be a normal
        number, the scale is 1.
    """
    # Halved first, because the range of a float64 tensor may exceed float64.
    bottom, top = np.minimum(low, 0).astype(np.float64), np.maximum(high, 0).astype(np.float64)
    scale = _scale((top / 2 - bottom / 2) / 127.5, scale_dtype or low.dtype)
    zero_point = np.clip(np.rint(-bottom / scale.astype(np.float64)), 0, 255)
    return Grid(scale, np.asarray(zero_point, np.uint8), axis)


def float8(low: Array, high: Array, axis: int | None = None, scale_dtype: Any = None) -> Grid:
    """Return the grid of float8e4m3fn numbers whose largest reaches the larger of |low| and |high|.

    Its steps grow with the numbers: about a sixteenth of each is the worst error.

    Args:
        low: Smallest values, finite. Shape () or (size of the axis,).
        high: Largest values, finite, same shape.
        axis: What the ranges are for; None for the whole tensor.
        scale_dtype: Type of the scale; that of `low` by default.
    """
    largest = np.maximum(np.abs(low), np.abs(high)).astype(np.float64)
    scale = _scale(largest / _FLOAT8_MOST, scale_dtype or low.dtype)
    return Grid(scale, np.zeros(scale.shape, FLOAT8), axis)


def _scale(wanted: Array, dtype: Any) -> Array:
    """Round a float64 scale up to a dtype, and replace what is too small to divide by."""
    rounded = wanted.astype(dtype)
    # Only the 16-bit types need it: there the rounding error is a fair part of a step.
    if np.dtype(dtype).itemsize < 4:
        short = rounded.astype(np.float64) < wanted
        rounded = np.where(short, np.nextafter(rounded, np.asarray(np.inf, dtype)), rounded).astype(dtype)
    # The subnormal scales of float16 are normal numbers in the float32 that is computed in.
    small = (rounded == 0) | (rounded.astype(np.float64) < np.finfo(np.float32).tiny)
    return np.asarray(np.where(small, np.ones((), dtype), rounded), dtype)


def quantize(array: Array, grid: Grid) -> Array:
    """Return the integers nearest to an array's elements, as ONNX QuantizeLinear does.

    Values halfway between two levels go to the even one, and values out of reach to the nearest end. The array
    is read in small pieces and is not changed.

    Args:
        array: Floating point, finite.
        grid: Where to go. Its axis must have as many scales as the array has indices there.

    Returns:
        An array of the same shape and of `grid.dtype`.
    """
    whole = grid.dtype != FLOAT8
    result = np.empty(array.shape, grid.dtype)
    scale, zero_point = as_working(grid.scale), as_working(grid.zero_point)
    if array.dtype == np.float64:
        scale, zero_point = scale.astype(np.float64), zero_point.astype(np.float64)
    least, most = (np.iinfo(grid.dtype).min, np.iinfo(grid.dtype).max) if whole else (-_FLOAT8_MOST, _FLOAT8_MOST)
    for index in blocks(array.shape):
        # numpy makes a number, not an array, of what has no axes
        piece = np.asarray(as_working(array[index]) / part(scale, grid.axis, index))
        if whole:
            np.rint(piece, out=piece)
            piece += part(zero_point, grid.axis, index)
        np.clip(piece, least, most, out=piece)
        result[index] = piece.astype(grid.dtype)
    return result


def dequantize(integers: Array, grid: Grid) -> Array:
    """Return the real numbers that integers stand for, as ONNX DequantizeLinear does.

    Args:
        integers: Any shape, of `grid.dtype`.
        grid: What they stand for.

    Returns:
        An array of the same shape and of the scale's dtype.
    """
    scale = along(grid.scale, grid.axis, integers.ndim)
    wide = np.int32 if grid.dtype != FLOAT8 else np.float32
    offset = integers.astype(wide) - along(grid.zero_point.astype(wide), grid.axis, integers.ndim)
    working = as_working(scale)
    result: Array = (offset.astype(working.dtype) * working).astype(grid.scale.dtype)
    return result


def error_bound(low: Array, high: Array, grid: Grid) -> float:
    """Return the worst error a grid can make, as a part of the range (widened to hold 0.0) of its channel.

    Args:
        low: Smallest values that were quantized, shaped like the grid's scale.
        high: Largest values.
        grid: The grid made for them.

    Returns:
        Half the widest step divided by the range, for the worst channel; 0 when every channel is all zero.
    """
    widest = _FLOAT8_STEP if grid.dtype == FLOAT8 else 1.0
    span = np.maximum(high, 0).astype(np.float64) - np.minimum(low, 0).astype(np.float64)
    # A grid can have a step wider than the range only where the range is next to nothing.
    step = np.minimum(widest * grid.scale.astype(np.float64) / 2, span)
    ratio = np.divide(step, span, out=np.zeros_like(span), where=span > 0)
    return float(np.max(ratio, initial=0.0))
