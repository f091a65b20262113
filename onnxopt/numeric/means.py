"""Means of the channels of a value, summed up array by array."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


class ChannelMeans:
    """The mean of each index of an axis, over all other axes and all arrays seen."""

    def __init__(self, axis: int = 1) -> None:
        """Start empty.

        Args:
            axis: Of the channels; -1 for the last one.
        """
        self._axis = axis
        self._sums: npt.NDArray[np.float64] | None = None
        self._count = 0

    def add(self, array: npt.NDArray[Any]) -> None:
        """Take in an array of numbers, of rank 2 or more and as many channels as those before."""
        channels = self._axis % array.ndim
        others = tuple(axis for axis in range(array.ndim) if axis != channels)
        sums = array.sum(axis=others, dtype=np.float64)
        self._sums = sums if self._sums is None else self._sums + sums
        self._count += array.size // max(array.shape[channels], 1)

    @property
    def means(self) -> npt.NDArray[np.float64] | None:
        """One number per channel; None when no elements were seen."""
        return None if self._sums is None or not self._count else self._sums / self._count


def mean_response(
    weight: npt.NDArray[Any], means: npt.NDArray[np.float64], channel_axis: int
) -> npt.NDArray[np.float64]:
    """Return the mean of each output channel of a convolution or matrix product.

    Zeros around an image are taken for further values of the same mean.

    Args:
        weight: Of rank 2 or more; one of the first two axes is that of the output channels, the other that of the input
            channels, those of one group if there are several. The rest are summed up.
        means: Mean of each input channel.
        channel_axis: The axis of the output channels, 0 or 1.
    """
    taps = weight.reshape(*weight.shape[:2], -1).sum(axis=2, dtype=np.float64)
    taps = taps if channel_axis == 0 else taps.T
    groups = means.size // taps.shape[1]
    by_group: npt.NDArray[np.float64] = np.einsum(
        "gci,gi->gc", taps.reshape(groups, -1, taps.shape[1]), means.reshape(groups, -1)
    )
    return by_group.reshape(-1)
