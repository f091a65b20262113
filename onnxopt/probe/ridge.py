"""Ridge regression onto one-hot classes, in closed form, with the penalty chosen by leaving one sample out.

A sample is left out with all its variants, such as an image that was moved, as they tell of each other.

One eigendecomposition of the Gram matrix gives the fit and all leave-one-out residuals for every penalty
(Allen, "The relationship between variable selection and data augmentation", 1974: PRESS). Its scores are
regression values, not log-odds; a temperature found on the leave-one-out scores makes them that (Guo et al., "On
Calibration of Modern Neural Networks", 2017).
"""

from __future__ import annotations

import numpy as np

from onnxopt.probe.classifier import Array, Linear, log_softmax, one_hot, singular, standardize

PENALTIES = np.logspace(-5, 3, 25)
"""Relative to the mean eigenvalue of the Gram matrix."""

_GOLDEN = (5**0.5 - 1) / 2


def fit(features: Array, classes: Array, count: int, variants: int = 1) -> Linear:
    """Fit ridge regression.

    Args:
        features: Rows by features.
        classes: A whole number from 0 per row.
        count: How many classes there are.
        variants: The rows are so many blocks of the same samples.

    Returns:
        A classifier whose scores are calibrated: their softmax gives probabilities.
    """
    scaling = standardize(features, len(features) // variants)
    x = scaling.apply(features)
    targets = one_hot(classes, count)
    mean = targets.mean(axis=0)
    centred = targets - mean
    left, values, right = singular(x)
    projected = left.T @ centred
    average = float(values.sum()) / max(len(values), 1)
    penalties = PENALTIES * (average if average > 0 else 1.0)
    held_out = [
        _leave_one_out(values, left, projected, centred, p)
        if variants == 1
        else _leave_samples_out(values, left, projected, centred, p, variants)
        for p in penalties
    ]
    best = int(np.argmin([((centred - h) ** 2).sum() for h in held_out]))
    penalty = float(penalties[best])
    weight = right @ (projected * (np.sqrt(values) / (values + penalty))[:, None])
    temperature = _sharpness(held_out[best] + mean, classes, len(features) // variants)
    return scaling.fold(temperature * weight, temperature * mean, penalty)


def _leave_one_out(values: Array, left: Array, projected: Array, centred: Array, penalty: float) -> Array:
    """Return what a fit without a row predicts for the row, for every row, less the mean of all targets."""
    shrink = values / (values + penalty)
    fitted = left @ (shrink[:, None] * projected)
    leverage = (left**2) @ shrink + 1 / len(left)
    residual = (centred - fitted) / np.maximum(1 - leverage, 1e-9)[:, None]
    return centred - residual


def _leave_samples_out(
    values: Array, left: Array, projected: Array, centred: Array, penalty: float, variants: int
) -> Array:
    """Return what a fit without any variant of a sample predicts for its rows, less the mean of all targets."""
    shrink = values / (values + penalty)
    residual = centred - left @ (shrink[:, None] * projected)

    def by_sample(rows: Array) -> Array:
        return rows.reshape(variants, -1, rows.shape[1]).swapaxes(0, 1)

    vectors = by_sample(left)
    leverage = (vectors * shrink) @ vectors.swapaxes(1, 2) + 1 / len(left)
    # A penalty of nothing may make it singular: the sample is then only known from itself.
    alone = np.eye(variants) * (1 + 1e-9) - leverage
    out = np.linalg.solve(alone, by_sample(residual))
    return np.asarray(centred - out.swapaxes(0, 1).reshape(centred.shape))


def _sharpness(scores: Array, classes: Array, samples: int) -> float:
    """Return the factor under which the softmax of scores has the least log-loss; golden section on its logarithm.

    Every class is taken to have been seen once more, as otherwise a few samples that are all classified rightly would
    make the probabilities 0 and 1 (Platt, "Probabilistic Outputs for Support Vector Machines", 1999).
    """
    count = scores.shape[1]
    unseen = 1 / (samples + count)
    targets = unseen + (1 - count * unseen) * one_hot(classes, count)

    def loss(logarithm: float) -> float:
        return -float((log_softmax(np.exp(logarithm) * scores) * targets).sum())

    low, high = float(np.log(0.1)), float(np.log(1000.0))
    while high - low > 1e-3:
        first, second = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (low, second) if loss(first) < loss(second) else (first, high)
    return float(np.exp((low + high) / 2))
