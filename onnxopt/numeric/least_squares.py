"""Ridge regression from streamed products: which change of a linear layer takes away most of what its output lacks.

Rows x of inputs and r of what is lacking come in portions and are only kept as sums of products. A leading axis of
groups holds problems that are independent of one another, as the groups of a convolution are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


PORTION = 256
"""Rows that are multiplied at once: with fewer, adding up large matrices takes longer than multiplying."""


class Moments:
    """Sums over rows of inputs x and residuals r, in float64. Memory is 8 * groups * inputs * (inputs + outputs) bytes.

    Attributes:
        count: Rows seen.
    """

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        """Start from zero."""
        self.count = 0
        self._sums = Sums(
            np.zeros((groups, inputs)),
            np.zeros((groups, outputs)),
            np.zeros((groups, inputs, inputs)),
            np.zeros((groups, inputs, outputs)),
        )
        self._waiting: list[tuple[Array, Array]] = []
        self._rows = 0

    def add(self, x: Array, r: Array) -> None:
        """Take in rows.

        Args:
            x: Inputs, (rows, groups, inputs).
            r: Residuals, (rows, groups, outputs).

        Raises:
            ValueError: If there are not equally many of them.
        """
        if len(x) != len(r):
            raise ValueError(f"{len(x)} rows of inputs do not pair with {len(r)} rows of residuals")
        self.count += len(x)
        self._waiting.append((x, r))
        self._rows += len(x)
        if self._rows >= PORTION:
            self._add_waiting()

    def sums(self) -> Sums:
        """Return what was summed up so far."""
        self._add_waiting()
        return self._sums

    def _add_waiting(self) -> None:
        if not self._waiting:
            return
        x, r = (np.swapaxes(np.concatenate(parts), 0, 1) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._rows = [], 0
        with np.errstate(invalid="ignore", over="ignore"):  # what comes of it is not `usable`
            self._sums.inputs[:] += x.sum(axis=1, dtype=np.float64)
            self._sums.residuals[:] += r.sum(axis=1, dtype=np.float64)
            self._sums.gram[:] += np.swapaxes(x, 1, 2) @ x
            self._sums.cross[:] += np.swapaxes(x, 1, 2) @ r

    @property
    def usable(self) -> bool:
        """Whether something was seen, and nothing of it was NaN, infinity or too large to square."""
        sums = self.sums()
        return self.count > 0 and bool(np.isfinite(sums.gram).all() and np.isfinite(sums.cross).all())


@dataclasses.dataclass(frozen=True, slots=True)
class Sums:
    """What `Moments` sums up.

    Attributes:
        inputs: Sum of x, (groups, inputs).
        residuals: Sum of r, (groups, outputs).
        gram: Sum of x x^T, (groups, inputs, inputs).
        cross: Sum of x r^T, (groups, inputs, outputs).
    """

    inputs: Array
    residuals: Array
    gram: Array
    cross: Array


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """What to add to a linear layer.

    Attributes:
        weight: (groups, outputs, inputs).
        bias: (groups, outputs).
    """

    weight: Array
    bias: Array

    def of(self, x: Array) -> Array:
        """Return by how much the outputs change for rows x of shape (rows, groups, inputs)."""
        moved = np.swapaxes(np.swapaxes(x, 0, 1) @ np.swapaxes(self.weight, 1, 2), 0, 1)
        return np.asarray(moved + self.bias)


def ridge(moments: Moments, damping: float, *, bias: bool = True) -> Change:
    """Return the change that minimizes sum |r - (W x + b)|^2 + count * lambda * |W|^2.

    In float64, with lambda = damping * (mean variance of an input), which makes the normal equations positive definite
    whatever the inputs are.

    Args:
        moments: What was seen, usable.
        damping: Above 0. The larger it is, the smaller the change; 1e-3 is a good guess.
        bias: Whether there is a b, which is free; otherwise it is zero, and nothing is centred.
    """
    count, sums = moments.count, moments.sums()
    x, r = sums.inputs / count * bias, sums.residuals / count * bias
    covariance = sums.gram / count - x[:, :, None] * x[:, None, :]
    cross = sums.cross / count - x[:, :, None] * r[:, None, :]
    variance = np.maximum(np.diagonal(covariance, axis1=1, axis2=2), 0)
    size = covariance.shape[1]
    # Inputs that never varied tell nothing: any positive number leaves their weights as they are.
    mean = variance.mean(axis=1, keepdims=True)
    covariance[:, range(size), range(size)] = variance + np.where(mean > 0, damping * mean, 1.0)
    weight = np.swapaxes(np.linalg.solve(covariance, cross), 1, 2)
    return Change(weight, r - np.einsum("goi,gi->go", weight, x))
