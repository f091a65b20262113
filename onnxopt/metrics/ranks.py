"""Rank correlation over samples, or over pairs of samples."""

from __future__ import annotations

import math

import numpy as np

from onnxopt.errors import DataError
from onnxopt.metrics.intervals import resampled_drop
from onnxopt.metrics.outputs import checked, main_output
from onnxopt.metrics.result import Figures, Outputs

MOST_PAIRED = 256
"""Samples compared in pairs at most: pairs grow with the square."""


class Spearman:
    """A rank correlation over samples, or over pairs of samples."""

    def __init__(self) -> None:
        self._sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        self._labels: list[float] = []
        self._bytes = 0

    def add(self, reference: Outputs, candidate: Outputs, label: np.ndarray | None) -> None:
        """Take in the outputs of both models for one sample."""
        one, two = main_output(reference), main_output(candidate)
        if label is not None:
            if one.size != 1 or label.size != 1:
                raise DataError(
                    f"spearman with labels needs one number per sample and label; an output has {one.size} "
                    f"elements and a label {label.size}."
                )
            self._labels.append(float(label.reshape(())))
        elif one.size > 1 and len(self._sides[0]) >= MOST_PAIRED:
            return
        self._bytes = checked(self._bytes + one.nbytes + two.nbytes, "spearman")
        self._sides[0].append(one)
        self._sides[1].append(two)

    def result(self, seed: int) -> Figures:
        """Return the correlations; samples are drawn again for the interval."""
        if len(self._sides[0]) < 3:
            raise DataError(f"spearman needs three samples at least, and there are {len(self._sides[0])}.")
        one, two = (_columns(side) for side in self._sides)
        if self._labels:
            labels = np.array(self._labels)
            before, after = one.reshape(-1), two.reshape(-1)

            def correlate(chosen: np.ndarray) -> tuple[float, float]:
                return spearman(before[chosen], labels[chosen]), spearman(after[chosen], labels[chosen])

        elif one.shape[1] == 1:
            before, after = one.reshape(-1), two.reshape(-1)

            def correlate(chosen: np.ndarray) -> tuple[float, float]:
                return 1.0, spearman(after[chosen], before[chosen])

        else:
            near, nearby = _similarities(one), _similarities(two)

            def correlate(chosen: np.ndarray) -> tuple[float, float]:
                first, second = np.triu_indices(len(chosen), 1)
                pairs = chosen[first], chosen[second]
                different = pairs[0] != pairs[1]
                rows, columns = pairs[0][different], pairs[1][different]
                return 1.0, spearman(nearby[rows, columns], near[rows, columns])

        return resampled_drop(correlate, len(one), seed, sign=1.0)


def spearman(one: np.ndarray, two: np.ndarray) -> float:
    """Return the rank correlation of two flat arrays, ties ranked by their mean.

    It is 0 where one of them is constant, and NaN where there are fewer than two elements.
    """
    if one.size < 2:
        return math.nan
    first, second = _ranks(one), _ranks(two)
    first, second = first - first.mean(), second - second.mean()
    norm = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / norm if norm else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: np.ndarray = (last - (counts - 1) / 2)[inverse.reshape(-1)]
    return ranks


def _columns(vectors: list[np.ndarray]) -> np.ndarray:
    """Return one row per sample; outputs that differ in length only are averaged over it.

    Raises:
        DataError: If the outputs differ in another way.
    """
    if len({v.size for v in vectors}) > 1:
        if any(v.ndim < 3 for v in vectors) or len({(v.shape[0], v.shape[-1]) for v in vectors}) > 1:
            raise DataError("spearman needs outputs of one size; give samples of one shape.")
        vectors = [v.mean(axis=tuple(range(1, v.ndim - 1))) for v in vectors]
    return np.stack([v.reshape(-1) for v in vectors])


def _similarities(vectors: np.ndarray) -> np.ndarray:
    """Return the cosine similarity of all pairs of rows."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(norms > 0, norms, 1.0)
    return unit @ unit.T
