"""Metrics that are the mean of one number per sample: top1, cosine, mse."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from onnxopt.errors import DataError
from onnxopt.metrics.intervals import bootstrap_mean, most
from onnxopt.metrics.outputs import IGNORED, classes, main_output
from onnxopt.metrics.result import Figures, Outputs

PerSample = Callable[[np.ndarray, np.ndarray], float]
"""Compares one output with what it should be."""


class Mean:
    """A metric that is the mean of one number per sample; the target is the label or the original's output."""

    def __init__(self, per_sample: PerSample, *, higher_is_better: bool) -> None:
        self._per_sample = per_sample
        self._sign = 1.0 if higher_is_better else -1.0
        self._pairs: list[tuple[float, float]] = []

    def add(self, reference: Outputs, candidate: Outputs, label: np.ndarray | None) -> None:
        """Take in the outputs of both models for one sample."""
        one, two = main_output(reference), main_output(candidate)
        target = one if label is None else label
        self._pairs.append((self._per_sample(one, target), self._per_sample(two, target)))

    def result(self, seed: int) -> Figures:
        """Return the means and the drop, paired by sample."""
        pairs = np.array(self._pairs)
        drops = self._sign * (pairs[:, 0] - pairs[:, 1])
        before, after = pairs.mean(axis=0)
        return Figures(float(before), float(after), float(drops.mean()), *bootstrap_mean(drops, seed))


class Top1(Mean):
    """The share of positions with the right class."""

    def __init__(self) -> None:
        super().__init__(_share_right, higher_is_better=True)
        self._positions = self._counted = 0

    def add(self, reference: Outputs, candidate: Outputs, label: np.ndarray | None) -> None:
        """Take in the outputs of both models for one sample."""
        found = classes(main_output(reference))
        label = found if label is None else label
        counted = int(np.count_nonzero(label > IGNORED)) if label.dtype.kind in "iuf" else found.size
        self._counted += counted
        self._positions += max(1, counted)
        super().add(reference, candidate, label)

    def result(self, seed: int) -> Figures:
        """Return the shares. The interval also holds what the number of samples that differ allows.

        Resampling knows of no loss that was not seen, and takes a rare one for rarer than it may be.

        Raises:
            DataError: If no position has a label that counts.
        """
        if not self._counted:
            raise DataError(f"All labels are {IGNORED} or below, and such positions do not count for top1.")
        found = super().result(seed)
        pairs = np.array(self._pairs)
        drops = pairs[:, 0] - pairs[:, 1]
        losses, gains = drops[drops > 0], -drops[drops < 0]
        smallest = len(drops) / self._positions
        return dataclasses.replace(
            found,
            low=min(found.low, -most(gains, losses, len(drops), smallest)),
            high=max(found.high, most(losses, gains, len(drops), smallest)),
        )


def _share_right(scores: np.ndarray, label: np.ndarray) -> float:
    found = classes(scores)
    if label.size != found.size:
        raise DataError(
            f"There are {label.size} labels for a sample whose output, of shape {list(scores.shape)}, takes "
            f"{found.size}; give the labels of these samples alone, in their order."
        )
    if label.dtype.kind not in "iub" and not np.array_equal(label, np.floor(label)):
        raise DataError("top1 needs whole numbers as labels, the positions of the right classes.")
    label = label.reshape(-1)
    if label.max() >= scores.shape[-1]:
        raise DataError(
            f"The label {label.max():g} is none of the {scores.shape[-1]} classes of the output, which are counted "
            f"from 0; give positions that do not count the label {IGNORED}."
        )
    counts = label > IGNORED
    return float(np.mean(found.reshape(-1)[counts] == label[counts])) if counts.any() else 1.0


def cosine(output: np.ndarray, target: np.ndarray) -> float:
    """Return the cosine between two arrays of as many elements; that of zeros with zeros is 1."""
    one, two = _alike("cosine", output, target)
    norm = math.sqrt(float(one @ one)) * math.sqrt(float(two @ two))
    return float(one @ two) / norm if norm else float(not one.any() and not two.any())


def squared_error(output: np.ndarray, target: np.ndarray) -> float:
    """Return the mean squared difference of two arrays of as many elements."""
    one, two = _alike("mse", output, target)
    return float(np.mean(np.square(one - two)))


def _alike(metric: str, output: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both as flat float64 arrays.

    Raises:
        DataError: If they have not the same number of elements.
    """
    if output.size != target.size or target.dtype.kind not in "fiub":
        raise DataError(
            f"{metric} compares the output with a label of as many numbers; the output has the shape "
            f"{list(output.shape)} and the label {list(target.shape)} ({target.dtype})."
        )
    return output.reshape(-1), target.reshape(-1).astype(np.float64)
