"""What a fitted linear classifier is, and the standardization that its weights absorb."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Linear:
    """Scores of classes, `features @ weight + bias`.

    Attributes:
        weight: Features by classes.
        bias: One number per class.
        penalty: The strength of the L2 penalty it was fitted with, on standardized features.
    """

    weight: Array
    bias: Array
    penalty: float

    def scores(self, features: Array) -> Array:
        """Return the scores, rows by classes."""
        return features @ self.weight + self.bias


class Fit(Protocol):
    """Fits a classifier."""

    def __call__(self, features: Array, classes: Array, count: int, variants: int = 1) -> Linear:
        """Fit to features (rows by features) and classes (whole numbers from 0), of which there are so many.

        The rows are so many blocks of the same size: variants of the same samples, in the same order.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class Standardization:
    """Shifts features to mean 0 and divides them by a scale.

    Attributes:
        mean: Per feature.
        scale: Per feature; infinite where a feature is constant, so that it counts for nothing.
    """

    mean: Array
    scale: Array

    def apply(self, features: Array) -> Array:
        """Return the standardized features in float64."""
        return (features - self.mean) / self.scale

    def fold(self, weight: Array, bias: Array, penalty: float) -> Linear:
        """Return the classifier on features as they are, from one on standardized features."""
        unscaled = weight / self.scale[:, None]
        return Linear(unscaled, bias - self.mean @ unscaled, penalty)


SHRINKAGE = 1.0
"""How much of the typical spread is added to that of a feature.

A unit behind a ReLU that fires for one sample in a thousand has a tiny spread; dividing by it alone would make that
sample stand out more than anything else.
"""

DOUBTED = 250
"""Samples below which the spreads they show are doubted: so many over the number of samples is added to SHRINKAGE.

The spread of a rarely active unit is mostly chance in a few samples, and a common scale does better.
"""


def standardize(features: Array, samples: int | None = None) -> Standardization:
    """Learn mean and scale of features.

    Args:
        features: Rows by features.
        samples: How many samples the rows are variants of; None when each is one.
    """
    mean = features.mean(axis=0, dtype=np.float64)
    spread = features.std(axis=0, dtype=np.float64)
    # What varies less than this is rounding of the model's own arithmetic.
    varies = spread > np.maximum(1e-5 * np.abs(mean), 1e-7 * np.abs(mean).max(initial=0.0))
    typical = float(np.sqrt(np.mean(spread[varies] ** 2))) if varies.any() else 1.0
    scale = np.full(spread.shape, np.inf)
    scale[varies] = spread[varies] + (SHRINKAGE + DOUBTED / max(samples or len(features), 1)) * typical
    return Standardization(mean, scale)


def log_softmax(scores: Array) -> Array:
    """Return logarithms of probabilities along the last axis."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def log_loss(scores: Array, classes: Array) -> float:
    """Return the mean negative log-likelihood of the classes."""
    return float(-log_softmax(scores)[np.arange(len(classes)), classes].mean())


def one_hot(classes: Array, count: int) -> Array:
    """Return a 1 per row where its class is."""
    return np.eye(count)[classes]


def singular(x: Array) -> tuple[Array, Array, Array]:
    """Return left singular vectors, squared singular values and right singular vectors of rows by features.

    Only those of values that are not zero, ascending; by way of the smaller of the two Gram matrices.
    """
    rows, columns = x.shape
    values, vectors = np.linalg.eigh(x @ x.T if rows <= columns else x.T @ x)
    keep = values > max(float(values[-1]), 0.0) * max(rows, columns) * np.finfo(np.float64).eps
    values, vectors = values[keep], vectors[:, keep]
    if rows <= columns:
        return vectors, values, x.T @ (vectors / np.sqrt(values))
    return x @ (vectors / np.sqrt(values)), values, vectors
