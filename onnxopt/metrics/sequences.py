"""What readers of text or speech read: scores step by step, decoded as connectionist temporal classification.

The largest class of each step is taken, repeats are collapsed and blanks dropped (greedy decoding; Graves et al., 2006,
"Connectionist Temporal Classification", https://doi.org/10.1145/1143844.1143891).

By convention the blank is the first class or the last. It is the one of the two that the original says more often over
all samples: a reader says blank between symbols, and before and after them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxopt.errors import DataError
from onnxopt.metrics.intervals import bootstrap_ratio, most
from onnxopt.metrics.outputs import IGNORED, classes, main_output
from onnxopt.metrics.result import Figures, Outputs


class Sequences:
    """The share of symbols that are read right."""

    def __init__(self) -> None:
        """Begin without samples."""
        self._sides: tuple[list[list[np.ndarray]], list[list[np.ndarray]]] = ([], [])
        self._labels: list[list[list[int]]] = []
        self._last = 0

    def add(self, reference: Outputs, candidate: Outputs, label: np.ndarray | None) -> None:
        """Take in the outputs of both models for one sample, which may be a batch."""
        one, two = main_output(reference), main_output(candidate)
        self._last = one.shape[-1] - 1 if one.ndim else 0
        rows = steps(one)
        self._sides[0].append(rows)
        self._sides[1].append(steps(two))
        if label is not None:
            self._labels.append(_sequences(label, len(rows)))

    def result(self, seed: int) -> Figures:
        """Return the shares.

        The interval also holds what the number of samples that differ allows: resampling knows of no error that was not
        seen, and takes a rare one for rarer than it may be.
        """
        blank = self._blank()
        read = [[[collapsed(row, blank) for row in rows] for rows in side] for side in self._sides]
        wanted = self._labels or read[0]
        before, after = (
            np.array([_errors(rows, right) for rows, right in zip(side, wanted, strict=True)], float) for side in read
        )
        lengths = np.array([sum(map(len, rows)) for rows in wanted], float)
        total = max(float(lengths.sum()), 1.0)
        drop = float((after - before).sum()) / total
        low, high = bootstrap_ratio(after - before, lengths, seed)
        drops = (after - before) * len(lengths) / total
        losses, gains = drops[drops > 0], -drops[drops < 0]
        smallest = len(lengths) / total
        return Figures(
            1 - float(before.sum()) / total,
            1 - float(after.sum()) / total,
            drop,
            min(low, -most(gains, losses, len(drops), smallest)),
            max(high, most(losses, gains, len(drops), smallest)),
        )

    def _blank(self) -> int:
        said = np.concatenate([row for rows in self._sides[0] for row in rows])
        first, last = np.count_nonzero(said == 0), np.count_nonzero(said == self._last)
        return 0 if first >= last else self._last


def steps(scores: np.ndarray) -> list[np.ndarray]:
    """Return the largest class of each step, for each sequence of a batch.

    Args:
        scores: Of shape [steps, classes], [batch, steps, classes], or [steps, 1, classes].

    Raises:
        DataError: If it has another shape.
    """
    if scores.ndim not in (2, 3):
        raise DataError(
            "ctc needs an output with the steps and the classes along its last two axes, and the model's has the "
            f"shape {list(scores.shape)}."
        )
    found = classes(scores)
    if scores.ndim == 3 and scores.shape[1] == 1:
        found = found.T
    return list(found.reshape(-1, found.shape[-1]))


def collapsed(said: np.ndarray, blank: int) -> list[int]:
    """Return what the classes of all steps spell: repeats count once unless a blank is between them."""
    first = np.ones(len(said), bool)
    first[1:] = said[1:] != said[:-1]
    found: list[int] = said[first & (said != blank)].tolist()
    return found


def distance(one: Sequence[int], two: Sequence[int]) -> int:
    """Return how many insertions, deletions and replacements make one sequence of the other (Levenshtein)."""
    if one == two:
        return 0
    row = list(range(len(two) + 1))
    for i, left in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(two, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def _errors(rows: list[list[int]], wanted: list[list[int]]) -> int:
    return sum(distance(row, right) for row, right in zip(rows, wanted, strict=True))


def _sequences(label: np.ndarray, rows: int) -> list[list[int]]:
    """Return a label as one sequence per row, without what fills it up.

    Raises:
        DataError: If it holds something else.
    """
    if label.dtype.kind not in "iu" or label.size % rows:
        raise DataError(
            "ctc needs labels of whole numbers, the classes of each sample in a row, filled up with -1; a label has "
            f"the shape {list(label.shape)} ({label.dtype})."
        )
    return [row[row > IGNORED].tolist() for row in label.reshape(rows, -1)]
