"""Mean products of vectors, about any centre, also where the vectors vary little around a mean far from zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.numeric.gram import Gram
from onnxopt.numeric.least_squares import PORTION

Array = npt.NDArray[Any]


class Products:
    """Adds up products of vectors in float32, about the mean of the first of them.

    About zero, rounding would leave nothing of what vectors with a large mean have of their own.
    """

    def __init__(self, size: int) -> None:
        """Start from nothing, for vectors of so many elements."""
        self._sums = Gram(size, dtype=np.float64)
        self._shift: Array | None = None
        self._waiting: list[Array] = []

    def add(self, rows: Array) -> None:
        """Take in vectors, (rows, elements)."""
        if not len(rows):
            return
        rows = np.asarray(rows, np.float32)
        with np.errstate(invalid="ignore", over="ignore"):  # what comes of it is not `usable`
            if self._shift is None:
                self._shift = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
            self._waiting.append(rows - self._shift)
        # With few rows, adding up large matrices takes longer than multiplying.
        if sum(map(len, self._waiting)) >= PORTION:
            self._add_waiting()

    @property
    def count(self) -> int:
        """How many vectors were taken in."""
        return self._gram.count

    @property
    def usable(self) -> bool:
        """Whether there were any, and nothing of them was NaN, infinity or too large to square."""
        return self._gram.usable

    @property
    def mean(self) -> Array:
        """The mean vector; zero before the first one."""
        mean: Array = self._gram.mean + self._centre
        return mean

    def about(self, centre: Array) -> Array:
        """Return the mean products of how far vectors are off a centre, within each group of elements.

        Args:
            centre: (groups, elements of a group).

        Returns:
            (groups, elements of a group, elements of a group).
        """
        groups, size = centre.shape
        blocks = [slice(group * size, (group + 1) * size) for group in range(groups)]
        products: Array = np.stack([self._gram.total[b, b] for b in blocks]) / max(self._gram.count, 1)
        apart = centre - self._centre.reshape(centre.shape)
        crossed = self._gram.mean.reshape(centre.shape)[:, :, None] * apart[:, None, :]
        about: Array = products - crossed - np.swapaxes(crossed, 1, 2) + apart[:, :, None] * apart[:, None, :]
        return about

    @property
    def _centre(self) -> Array:
        return np.zeros(self._sums.size) if self._shift is None else self._shift.astype(np.float64)

    @property
    def _gram(self) -> Gram:
        self._add_waiting()
        return self._sums

    def _add_waiting(self) -> None:
        if self._waiting:
            self._sums.add(np.concatenate(self._waiting))
            self._waiting = []
