"""Multinomial logistic regression with an L2 penalty, which is cross-validated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxopt.probe.classifier import Array, Linear, log_loss, log_softmax, one_hot, singular, standardize
from onnxopt.probe.folds import stratified
from onnxopt.probe.lbfgs import minimize

PENALTIES = tuple(float(p) for p in np.logspace(0, -5, 6))
"""Penalties on half the squared weights, for a mean log-loss and features of mean square 1/features."""

_ROWS_PER_CHOICE = 2500
"""The penalty is judged on as many folds as make up about so many rows of training: few folds when rows are many."""

_FOLDS = 3


def fit(features: Array, classes: Array, count: int, variants: int = 1) -> Linear:
    """Fit logistic regression.

    Args:
        features: Rows by features.
        classes: A whole number from 0 per row.
        count: How many classes there are.
        variants: The rows are so many blocks of the same samples, which are left out together.
    """
    scaling = standardize(features, len(features) // variants)
    size = np.sqrt(features.shape[1])
    # In the space that the rows span, along its principal axes, there are at most as many coordinates as rows.
    left, values, right = singular(scaling.apply(features) / size)
    x = left * np.sqrt(values)
    penalty = _penalty(x, classes, count, variants)
    weight, bias = _path(x, classes, count, [p for p in PENALTIES if p >= penalty])[-1]
    return scaling.fold(right @ weight / size, bias, penalty)


def _penalty(x: Array, classes: Array, count: int, variants: int) -> float:
    """Return the penalty with the least log-loss on rows that were left out."""
    samples = len(x) // variants
    smallest = int(np.bincount(classes[:samples], minlength=count).min())
    if smallest < 2:
        return PENALTIES[2]
    judged = min(_FOLDS, max(1, _ROWS_PER_CHOICE // len(x)))
    losses = np.zeros(len(PENALTIES))
    for split in stratified(classes[:samples], min(_FOLDS, smallest), seed=0)[:judged]:
        train, test = (np.concatenate([rows + v * samples for v in range(variants)]) for rows in split)
        fits = _path(x[train], classes[train], count, PENALTIES)
        losses += [log_loss(x[test] @ weight + bias, classes[test]) * len(test) for weight, bias in fits]
    return PENALTIES[int(np.argmin(losses))]


def _path(x: Array, classes: Array, count: int, penalties: Sequence[float]) -> list[tuple[Array, Array]]:
    """Return weight and bias for each penalty, the strongest first; each starts where the one before ended.

    Args:
        x: Rows by coordinates, about uncorrelated.
        classes: Per row.
        count: How many classes there are.
        penalties: Descending.
    """
    weight, bias = np.zeros((x.shape[1], count)), np.zeros(count)
    fits = []
    for penalty in penalties:
        weight, bias = _fit(x, one_hot(classes, count), penalty, weight, bias)
        fits.append((weight, bias))
    return fits


def _fit(x: Array, targets: Array, penalty: float, weight: Array, bias: Array) -> tuple[Array, Array]:
    """Return the weight and bias of least loss.

    The search goes in units in which the loss is about equally curved in all directions: the Hessian of the mean
    log-loss is at most a quarter of the mean square of a coordinate, and the penalty adds to it.
    """
    rows, count = targets.shape
    unit = 1 / np.sqrt(0.25 * (x**2).mean(axis=0) + penalty)[:, None]
    scaled = x * unit.T

    def objective(point: Array) -> tuple[float, Array]:
        free, bias = point[:-count].reshape(-1, count), point[-count:]
        logs = log_softmax(scaled @ free + bias)
        error = (np.exp(logs) - targets) / rows
        shrunk = penalty * unit**2 * free
        value = 0.5 * float((shrunk * free).sum()) - float((logs * targets).sum()) / rows
        return value, np.concatenate([(scaled.T @ error + shrunk).ravel(), error.sum(axis=0)])

    point = minimize(objective, np.concatenate([(weight / unit).ravel(), bias]))
    return point[:-count].reshape(-1, count) * unit, point[-count:]
