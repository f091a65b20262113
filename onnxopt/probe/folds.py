"""Stratified folds, and intervals of a share."""

from __future__ import annotations

import numpy as np

from onnxopt.probe.classifier import Array


def stratified(classes: Array, folds: int, *, seed: int) -> list[tuple[Array, Array]]:
    """Divide rows into folds with about the same part of each class.

    Args:
        classes: A whole number per row.
        folds: How many; at most as many as the rarest class has rows.
        seed: The same seed gives the same folds.

    Returns:
        (rows to train with, rows to test with) per fold, ascending. Every row is tested once.
    """
    random = np.random.default_rng(seed)
    fold_of = np.empty(len(classes), dtype=np.int64)
    start = 0
    for label in np.unique(classes):
        rows = random.permutation(np.flatnonzero(classes == label))
        fold_of[rows] = (start + np.arange(len(rows))) % folds
        # The next class goes on where this one ended, so that fold sizes differ by one at most.
        start += len(rows)
    return [(np.flatnonzero(fold_of != f), np.flatnonzero(fold_of == f)) for f in range(folds)]


def wilson(hits: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95% score interval of a share (Wilson, 1927)."""
    if not trials:
        return 0.0, 1.0
    share = hits / trials
    centre = share + z * z / (2 * trials)
    half = z * float(np.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)))
    scale = 1 + z * z / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
