"""Sums up the products of vectors that go through a model: the Gram matrix X^T X.

From it the square error of a linear layer follows for any change of its weight, without the vectors themselves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def _vectors(array: Array, axis: int, size: int) -> Array:
    """Return an array as float32 or float64 (count, size): one row for each place along the other axes."""
    if array.shape[axis] != size:
        raise ValueError(f"axis {axis} of an array of shape {array.shape} should have {size} elements")
    dtype = np.float64 if array.dtype == np.float64 else np.float32
    return np.moveaxis(array, axis, -1).reshape(-1, size).astype(dtype, copy=False)


class Gram:
    """Observes X^T X, with the sum of the vectors beside it. An `onnxopt.contract.Observer`.

    Attributes:
        size: Elements of a vector.
        axis: The axis of the observed arrays that holds a vector.
        count: Vectors seen.
        total: X^T X, (size, size).
        sum: The sum of the vectors, (size,), in float64.
    """

    def __init__(self, size: int, axis: int = -1, dtype: Any = np.float32) -> None:
        """Start from zero.

        Args:
            size: Elements of a vector.
            axis: The axis of the observed arrays that holds a vector.
            dtype: What products are added up in, float32 or float64. Memory is size * size elements of it.
        """
        self.size, self.axis, self.count = size, axis, 0
        self.total: Array = np.zeros((size, size), dtype)
        self.sum: Array = np.zeros(size, np.float64)

    def add(self, array: Array) -> None:
        """Take in an array.

        Raises:
            ValueError: If its axis has another size.
        """
        rows = _vectors(array, self.axis, self.size)
        self.count += len(rows)
        with np.errstate(invalid="ignore", over="ignore"):  # what comes of it is not `usable`
            self.total += rows.T @ rows
        self.sum += rows.sum(axis=0, dtype=np.float64)

    @property
    def usable(self) -> bool:
        """Whether something was seen, and nothing of it was NaN, infinity or too large to square."""
        return self.count > 0 and bool(np.isfinite(self.total).all())

    @property
    def mean(self) -> Array:
        """The mean vector; zero before the first one."""
        return self.sum / max(self.count, 1)
