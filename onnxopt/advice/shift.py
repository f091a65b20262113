"""Whether two sets of samples look alike to a model: can a classifier tell them apart?

The classifier two-sample test (Lopez-Paz and Oquab, "Revisiting Classifier Two-Sample Tests", 2017), with a linear
classifier on features, cross-validated.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from onnxopt.probe.classifier import Array
from onnxopt.probe.folds import stratified
from onnxopt.probe.validation import Accuracy, cross_validate

MOST = 500
"""Samples of each set that are looked at."""

FEWEST = 10

FOLDS = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Shift:
    """How well source and target samples can be told apart.

    Attributes:
        accuracy: Of telling which set a left-out sample is from; one half when nothing tells.
    """

    accuracy: Accuracy

    @property
    def shown(self) -> bool:
        """Whether they differ: the 95% interval lies above one half."""
        return self.accuracy.interval[0] > 0.5

    def sentence(self) -> str:
        """Say it in words."""
        low, high = self.accuracy.interval
        told = f"{self.accuracy.share:.0%} of the time ({low:.0%} to {high:.0%}; 50% is guessing)"
        if not self.shown:
            return f"By its features, a sample is told to be from the target data {told}: no difference is shown."
        degree = "very different" if self.accuracy.share > 0.9 else "different"
        return (
            f"By its features, a sample is told to be from the target data {told}: the two are {degree} to the model."
        )


def two_samples(source: Array, target: Array, *, seed: int) -> Shift | None:
    """Test whether two sets of features differ; None when there are too few.

    Args:
        source: Rows by features.
        target: Likewise.
        seed: Seeds the choice of rows and the folds.
    """
    count = min(len(source), len(target), MOST)
    if count < FEWEST:
        return None
    random = np.random.default_rng(seed)
    rows = [each[random.choice(len(each), count, replace=False)] for each in (source, target)]
    features, which = np.concatenate(rows), np.repeat([0, 1], count)
    splits = stratified(which, FOLDS, seed=seed)
    return Shift(cross_validate("ridge", features, which, 2, splits).accuracy)
