"""Which vectors to replace by multiples of others, with the least error in the sums behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Merge(NamedTuple):
    """What goes, and what it goes into.

    Attributes:
        gone: (count,) the vectors that go, ascending.
        into: (count,) the vector that each is replaced by a multiple of; none of them goes.
    """

    gone: Array
    into: Array


def factors(gram: Array, merge: Merge) -> Array:
    """Return by what to multiply the vector that stays to come closest to the one that goes, (count,)."""
    own = np.diag(gram)[merge.into]
    products = gram[merge.gone, merge.into]
    found: Array = np.divide(products, own, out=np.zeros_like(products), where=own > 0)
    return found


def lost(gram: Array, norms: Array, merge: Merge) -> float:
    """Return the part of the energy of all vectors that is lost when some are replaced by multiples of others.

    Args:
        gram: (n, n) products of the vectors.
        norms: (n,) squared norms of the weights that they are multiplied by.
        merge: What is replaced.
    """
    energy = np.diag(gram).astype(np.float64)
    kept = factors(gram, merge) * gram[merge.gone, merge.into]
    total = float((energy * norms).sum())
    gone = float((np.maximum(energy[merge.gone] - kept, 0) * norms[merge.gone]).sum())
    return gone / total if total > 0 else 0.0


def costs(gram: Array, norms: Array) -> Array:
    """Return the square error of replacing each vector by its best multiple of each other one, (n, n).

    Args:
        gram: (n, n) products of the vectors.
        norms: (n,) squared norms of the weights that they are multiplied by.

    Returns:
        Row i, column j: vector i is replaced by one of j; infinite on the diagonal.
    """
    energy = np.diag(gram).astype(np.float64)
    inverse = np.divide(1.0, energy, out=np.zeros_like(energy), where=energy > 0)
    lost: Array = np.maximum(energy[:, None] - np.square(gram) * inverse[None], 0) * norms[:, None]
    np.fill_diagonal(lost, np.inf)
    return lost


def least_costly(matrices: Sequence[Array], count: int) -> Merge:
    """Choose greedily which vectors go: always the one that is cheapest to replace by one that still stays.

    A vector that others were merged into can go as well; then they all go into the same one.

    Args:
        matrices: Costs as `costs` gives them, of which the sum counts.
        count: How many go, fewer than there are.
    """
    total = np.sum(matrices, axis=0)
    n = len(total)
    best = total.argmin(axis=1)
    lowest = total[np.arange(n), best]
    into = np.arange(n)
    for _ in range(count):
        gone = int(lowest.argmin())
        into[into == gone] = best[gone]
        total[:, gone] = np.inf
        lowest[gone] = np.inf
        total[gone] = np.inf
        for row in np.flatnonzero((best == gone) & np.isfinite(lowest)):
            best[row] = total[row].argmin()
            lowest[row] = total[row, best[row]]
    moved = np.flatnonzero(into != np.arange(n))
    return Merge(moved, into[moved])
