"""Mean and mean square of each channel of a value, summed up while a model runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class ChannelMoments:
    """Observes the sums of the elements and of their squares along all axes but one. An `onnxopt.contract.Observer`.

    Attributes:
        size: Channels.
        axis: The axis of the observed arrays that holds them.
        count: Vectors of channels seen.
    """

    def __init__(self, size: int, axis: int) -> None:
        """Start from zero."""
        self.size, self.axis, self.count = size, axis, 0
        self._sum: Array = np.zeros(size, np.float64)
        self._squares: Array = np.zeros(size, np.float64)

    def add(self, array: Array) -> None:
        """Take in an array.

        Raises:
            ValueError: If its axis has another size.
        """
        if array.shape[self.axis] != self.size:
            raise ValueError(f"axis {self.axis} of an array of shape {array.shape} should have {self.size} elements")
        others = tuple(i for i in range(array.ndim) if i != self.axis % array.ndim)
        self.count += array.size // max(1, self.size)
        with np.errstate(invalid="ignore", over="ignore"):  # what comes of it is not `usable`
            self._sum += array.sum(axis=others, dtype=np.float64)
            self._squares += np.square(array, dtype=np.float64).sum(axis=others)

    @property
    def usable(self) -> bool:
        """Whether something was seen, and nothing of it was NaN or infinity."""
        return self.count > 0 and bool(np.isfinite(self._squares).all())

    @property
    def mean(self) -> Array:
        """The mean, (size,); zero before the first array."""
        mean: Array = self._sum / max(self.count, 1)
        return mean

    @property
    def mean_square(self) -> Array:
        """The mean of the squares, (size,); zero before the first array."""
        return self._squares / max(self.count, 1)

    @property
    def variance(self) -> Array:
        """The mean square of what lies off the mean, (size,)."""
        variance: Array = np.maximum(self.mean_square - np.square(self.mean), 0)
        return variance
