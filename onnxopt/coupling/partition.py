"""Sets of integers that are merged pair by pair, whole arrays of pairs at a time."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.int64]


def components(count: int, left: Ints, right: Ints) -> Ints:
    """Return for each of `count` numbers the smallest one that the pairs connect it with.

    Every round hooks each root to the least root beside it and then shortens all paths to length one; each component
    that can still grow at least doubles, so there are few rounds.
    """
    labels = np.arange(count, dtype=np.int64)
    while len(left):
        a, b = labels[left], labels[right]
        apart = a != b
        if not apart.any():
            break
        left, right, a, b = left[apart], right[apart], a[apart], b[apart]
        low = np.minimum(a, b)
        np.minimum.at(labels, a, low)
        np.minimum.at(labels, b, low)
        labels = _shortened(labels)
    return labels


def _shortened(labels: Ints) -> Ints:
    while True:
        jumped = labels[labels]
        if np.array_equal(jumped, labels):
            return labels
        labels = jumped


class Partition:
    """The sets, each with its smallest member as its name and with a reason why it is frozen, if it is.

    Attributes:
        labels: Name of the set of each number.
        reasons: Index of the first reason by the name of a set; -1 for a free one.
    """

    def __init__(self, labels: Ints, reasons: Ints) -> None:
        """Take sets as `components` returns them, and the reasons of the numbers themselves."""
        self._first = labels  # the sets at the start; what is merged later maps their names, which are far fewer
        named = labels == np.arange(len(labels))
        self._names: Ints = np.flatnonzero(named)
        self._dense: Ints = (np.cumsum(named) - 1)[labels]
        self._root: Ints = np.arange(len(self._names), dtype=np.int64)
        self._reasons: Ints = np.full(len(self._names), -1, np.int64)
        frozen = np.flatnonzero(reasons >= 0)[::-1]  # of several reasons the first written one stays
        self._reasons[self._dense[frozen]] = reasons[frozen]

    @property
    def labels(self) -> Ints:
        """Name of the set of each number."""
        return self._names[self._root[self._dense]]

    def reasons_of(self, numbers: Ints) -> Ints:
        """Return for each number the reason that freezes its set, or -1."""
        return self._reasons[self._root[self._dense[numbers]]]

    def free_after(self, left: Ints, right: Ints, frozen: Ints, of: Ints) -> int:
        """Return into how many sets that are not frozen `of` would fall, were the pairs merged and `frozen` frozen."""
        place, merged, reasons = self._merged(left, right, frozen, 0, of)[1:]
        found = merged[place[self._roots(of)]]
        return int(np.count_nonzero(np.bincount(found[reasons[found] < 0], minlength=1)))

    def merge(self, left: Ints, right: Ints, frozen: Ints, reason: int) -> None:
        """Merge the pairs and freeze the sets of some numbers for a reason."""
        involved, _, merged, reasons = self._merged(left, right, frozen, reason, frozen)
        moved: Ints = np.arange(len(self._root), dtype=np.int64)
        moved[involved] = involved[merged]
        self._reasons[involved] = reasons[merged]
        self._root = moved[self._root]

    def _roots(self, numbers: Ints) -> Ints:
        return self._root[self._dense[numbers]]

    def _merged(self, left: Ints, right: Ints, frozen: Ints, reason: int, also: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """Return the roots that take part, each root's place among them, the place each falls to, and their reasons."""
        a, b, c, d = (self._roots(numbers) for numbers in (left, right, frozen, also))
        taking = np.zeros(len(self._root), bool)
        for roots in (a, b, c, d):
            taking[roots] = True
        involved = np.flatnonzero(taking)
        place: Ints = np.empty(len(self._root), np.int64)
        place[involved] = np.arange(len(involved))
        merged = components(len(involved), place[a], place[b])
        own = self._reasons[involved].copy()
        fresh = place[c]
        own[fresh] = np.where(own[fresh] < 0, reason, own[fresh])
        reasons: Ints = np.full(len(involved), -1, np.int64)
        order = np.flatnonzero(own >= 0)[::-1]
        reasons[merged[order]] = own[order]
        return involved, place, merged, reasons


def as_ints(array: Any) -> Ints:
    """Return an array of int64."""
    return np.asarray(array, dtype=np.int64)
