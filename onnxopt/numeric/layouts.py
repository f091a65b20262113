"""How a weight of any rank is seen as rows that share scales, and how rows become the weight again."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Which elements of a weight share a scale.

    Attributes:
        shape: The weight's shape.
        axis: The axis along which blocks lie, for a matrix; with `block` 0 the axis that has a scale per index, or None
            for one scale for all.
        block: Neighbours along the axis that share a scale; 0 when blocks are not used.
    """

    shape: tuple[int, ...]
    axis: int | None
    block: int = 0

    def __post_init__(self) -> None:
        """Check that the parts fit.

        Raises:
            ValueError: If they do not.
        """
        if self.block and (len(self.shape) != 2 or self.axis is None):
            raise ValueError(f"blocks need a matrix and an axis, not {self.shape} and {self.axis}")

    @property
    def width(self) -> int:
        """Columns of a block in a row."""
        if self.block:
            return self.block
        return math.prod(self.shape) // (1 if self.axis is None else self.shape[self.axis])

    @property
    def keeps_order(self) -> bool:
        """Whether the rows of a matrix are those that it is stored in."""
        return self.axis == 1 if self.block else self.axis != 1

    def rows(self, array: Array) -> Array:
        """Return the weight as a matrix whose rows are made of whole blocks."""
        if self.block:
            return array if self.axis == 1 else array.T
        if self.axis is None:
            return array.reshape(1, -1)
        return np.moveaxis(array, self.axis, 0).reshape(self.shape[self.axis], -1)

    def restore(self, rows: Array) -> Array:
        """Undo `rows`; columns that fill up the last block are left out."""
        if self.block:
            assert self.axis is not None, "checked at the start"
            whole = rows[:, : self.shape[self.axis]]
            return whole if self.axis == 1 else whole.T
        if self.axis is None:
            return rows.reshape(self.shape)
        moved = (self.shape[self.axis], *self.shape[: self.axis], *self.shape[self.axis + 1 :])
        return np.moveaxis(rows.reshape(moved), 0, self.axis)

    def shared(self, values: Array) -> Array:
        """Shape a value per block, given as (rows, blocks), as DequantizeLinear takes scales."""
        if self.block:
            return values if self.axis == 1 else values.T
        return np.asarray(values[0, 0]) if self.axis is None else values[:, 0]

    def broadcast(self, values: Array) -> Array:
        """Shape a value per block, given as (rows, blocks), so that it broadcasts over `split`."""
        if self.block:
            return values[:, :, None] if self.axis == 1 else values.T[:, None, :]
        if self.axis is None:
            return np.asarray(values[0, 0])
        return values[:, 0].reshape([-1 if i == self.axis else 1 for i in range(len(self.shape))])

    @property
    def split(self) -> tuple[int, ...]:
        """The weight's shape with the axis divided into blocks, which must be whole."""
        if not self.block:
            return self.shape
        rows, columns = self.shape
        return (rows, -1, self.block) if self.axis == 1 else (rows // self.block, self.block, columns)
