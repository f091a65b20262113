"""Walk over a large array in pieces that stay small.

Weights are often memory-mapped and larger than the memory a temporary copy should take, and NumPy is fastest
on pieces that fit a cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK_ELEMENTS = 1 << 19
"""2 MiB of float32: within the second-level cache of most CPUs, and large enough to hide NumPy's call overhead."""

Index = tuple[slice, ...]


def blocks(shape: Sequence[int], limit: int = BLOCK_ELEMENTS) -> Iterator[Index]:
    """Yield index tuples that cover an array of this shape once, in memory order.

    Each is a tuple of one slice per axis, so that `array[index]` is a view of the array's own rank.

    Args:
        shape: The shape to cover. Nothing is yielded when it holds no elements, one empty tuple for a scalar.
        limit: Most elements a piece may have, at least 1.
    """
    if math.prod(shape) == 0:
        return
    axis, inner = len(shape), 1
    while axis > 0 and inner * shape[axis - 1] <= limit:
        axis -= 1
        inner *= shape[axis]
    if axis == 0:
        yield tuple(slice(0, size) for size in shape)
        return
    # Axes behind `axis` are taken whole, the one before them in steps, and those before that one by one.
    split = axis - 1
    step = max(1, limit // inner)
    tail = tuple(slice(0, size) for size in shape[axis:])
    for outer in np.ndindex(*shape[:split]):
        head = tuple(slice(i, i + 1) for i in outer)
        for start in range(0, shape[split], step):
            yield (*head, slice(start, min(start + step, shape[split])), *tail)


def along(values: npt.NDArray[Any], axis: int | None, rank: int) -> npt.NDArray[Any]:
    """Shape one value per index of an axis, or a single value, so that it broadcasts against the whole array.

    Args:
        values: Shape (size of the axis,), or () when `axis` is None.
        axis: The axis they belong to, counted from the front; None for one value for all.
        rank: The rank of the array.

    Returns:
        A view of shape (1, ..., size, ..., 1), or of shape () when `axis` is None.
    """
    if axis is None:
        return values
    return values.reshape([-1 if i == axis else 1 for i in range(rank)])


def part(values: npt.NDArray[Any], axis: int | None, index: Index) -> npt.NDArray[Any]:
    """Return the share of `along(values, axis, rank)` that belongs to one block."""
    if axis is None:
        return values
    return along(values[index[axis]], axis, len(index))


def as_working(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the array in the type that is computed in: float64 as it is, other floats as float32."""
    return array if array.dtype == np.float64 else array.astype(np.float32, copy=False)
