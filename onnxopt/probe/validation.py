"""How well a classifier does on samples it was not fitted to: cross-validation, accuracy against labelled samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from onnxopt.contract import Progress, Silent
from onnxopt.probe import logistic, ridge
from onnxopt.probe.classifier import Array, Fit, Linear, log_loss
from onnxopt.probe.folds import stratified, wilson

METHODS: Mapping[str, Fit] = {"ridge": ridge.fit, "logistic": logistic.fit}

STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Labelled samples per class at which the learning curve is taken."""

_REPEATS = {"ridge": 4, "logistic": 1}
"""How often a step of the curve is repeated with other samples; logistic regression takes far longer."""

_ROWS_PER_STEP = 1200
"""There are fewer repetitions when the fits of a step see more rows than this."""


@dataclasses.dataclass(frozen=True, slots=True)
class Accuracy:
    """A share of right answers with its 95% interval (Wilson).

    Attributes:
        right: How many samples were classified rightly.
        samples: Of how many.
    """

    right: int
    samples: int

    @property
    def share(self) -> float:
        """The accuracy."""
        return self.right / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95% interval."""
        return wilson(self.right, self.samples)


@dataclasses.dataclass(frozen=True, slots=True)
class Validation:
    """What a method reaches on samples that were left out.

    Attributes:
        method: Its name.
        accuracy: Over all samples, each classified by a fit without it.
        log_loss: Mean negative log-likelihood of the classes.
        predicted: The class of every sample, by the fit without it.
    """

    method: str
    accuracy: Accuracy
    log_loss: float
    predicted: Array


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """Accuracy at one number of labelled samples per class.

    Attributes:
        per_class: Labelled samples of each class.
        mean: Mean accuracy on samples that were left out, over the draws.
        low: The worst of the draws but for one in twenty: what an unlucky choice of samples gives.
        high: The best but for one in twenty.
        draws: How many draws of samples that is.
    """

    per_class: int
    mean: float
    low: float
    high: float
    draws: int


def fit_rows(
    method: str, features: Array, classes: Array, count: int, rows: Array, copies: Sequence[Array] = ()
) -> Linear:
    """Fit to some samples and their variants.

    Args:
        method: One of METHODS.
        features: Of all samples.
        classes: Of all samples.
        count: How many classes there are.
        rows: Which samples to fit to.
        copies: Features of variants of the same samples.
    """
    stacked = np.concatenate([features[rows], *(c[rows] for c in copies)])
    return METHODS[method](stacked, np.tile(classes[rows], 1 + len(copies)), count, 1 + len(copies))


def cross_validate(
    method: str,
    features: Array,
    classes: Array,
    count: int,
    splits: Sequence[tuple[Array, Array]],
    copies: Sequence[Array] = (),
) -> Validation:
    """Classify every sample by a fit to the other folds; standardization and penalty are learnt there too.

    Variants of samples are only learnt from, never judged by.
    """
    scores = np.zeros((len(classes), count))
    for train, test in splits:
        scores[test] = fit_rows(method, features, classes, count, train, copies).scores(features[test])
    predicted = scores.argmax(axis=1)
    accuracy = Accuracy(int((predicted == classes).sum()), len(classes))
    return Validation(method, accuracy, log_loss(scores, classes), predicted)


def compare(
    methods: Sequence[str],
    features: Array,
    classes: Array,
    count: int,
    *,
    folds: int,
    seed: int,
    copies: Sequence[Array] = (),
    progress: Progress | None = None,
) -> tuple[Validation, ...]:
    """Cross-validate methods on the same folds; the most right answers come first, then the least loss."""
    progress = progress or Silent()
    splits = stratified(classes, folds, seed=seed)
    progress.stage("cross-validating", total=len(methods))
    found = []
    for method in methods:
        found.append(cross_validate(method, features, classes, count, splits, copies))
        progress.advance()
    return tuple(sorted(found, key=order))


def order(found: Validation) -> tuple[int, float]:
    """Return what sorts the better one first."""
    return -found.accuracy.right, found.log_loss


def learning_curve(
    method: str,
    features: Array,
    classes: Array,
    count: int,
    *,
    folds: int,
    seed: int,
    copies: Sequence[Array] = (),
    progress: Progress | None = None,
) -> tuple[Step, ...]:
    """Return the accuracy on samples that were left out, against the number of labelled samples per class.

    Of each fold's training samples so many of every class are drawn; small numbers are drawn several times.
    """
    progress = progress or Silent()
    splits = stratified(classes, folds, seed=seed)
    available = min(int(np.bincount(classes[train], minlength=count).min()) for train, _ in splits)
    steps = [s for s in STEPS if s <= available]
    progress.stage("accuracy against labelled samples", total=len(steps))
    random = np.random.default_rng(seed)
    found = []
    for per_class in steps:
        shares = []
        for _ in range(max(1, min(_REPEATS[method], _ROWS_PER_STEP // (per_class * count * folds)))):
            for train, test in splits:
                chosen = _drawn(random, train, classes, per_class, count)
                fitted = fit_rows(method, features, classes, count, chosen, copies)
                shares.append(float((fitted.scores(features[test]).argmax(axis=1) == classes[test]).mean()))
        low, high = np.quantile(shares, [0.05, 0.95])
        found.append(Step(per_class, float(np.mean(shares)), float(low), float(high), len(shares)))
        progress.advance()
    return tuple(found)


def _drawn(random: np.random.Generator, rows: Array, classes: Array, per_class: int, count: int) -> Array:
    """Return so many rows of each class."""
    of_class = (rows[classes[rows] == label] for label in range(count))
    return np.concatenate([random.choice(r, per_class, replace=False) for r in of_class])


def confusions(classes: Array, predicted: Array, count: int) -> Array:
    """Return how often each class (row) was taken for each (column)."""
    return np.bincount(classes * count + predicted, minlength=count * count).reshape(count, count)
