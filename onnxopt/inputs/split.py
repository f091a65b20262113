"""Divides samples: what is learnt from is not judged by."""

from __future__ import annotations

import dataclasses

import numpy as np

from onnxopt.inputs.data import Data

CALIBRATION_SHARE = 0.25
MOST_CALIBRATION = 128
"""More samples hardly move ranges, and each costs a run of the model."""


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """Samples to learn from and samples to judge by.

    Attributes:
        calibration: To learn from.
        evaluation: To judge by.
        evaluated: The numbers of the latter among all samples, ascending.
        note: What the reader of a report should know about it; empty when the two are disjoint.
    """

    calibration: Data
    evaluation: Data
    evaluated: tuple[int, ...]
    note: str

    def labels(self, labels: np.ndarray) -> np.ndarray:
        """Return the labels of the evaluation samples, from those of all samples.

        A sample of a fixed batch size has several labels in a row. Labels that do not fit the samples are returned
        as they are; the metric says so.
        """
        total = len(self.calibration) + len(self.evaluation) if not self.note else len(self.evaluation)
        batch = len(labels) // max(total, 1)
        if batch < 1:
            return labels
        rows = [i * batch + j for i in self.evaluated for j in range(batch)]
        return labels[rows]


def split(data: Data, seed: int) -> Split:
    """Divide samples at random: a quarter of them, at most 128, to learn from, and the others to judge by.

    Args:
        data: The samples. A single one has to serve for both.
        seed: The same seed gives the same division.
    """
    count = len(data)
    if count < 2:
        note = "The data holds a single sample, so what was learnt was judged by the same sample."
        return Split(data, data, tuple(range(count)), note)
    learning = min(max(int(count * CALIBRATION_SHARE), 1), MOST_CALIBRATION)
    order = np.random.default_rng([seed, count]).permutation(count)
    evaluated = tuple(sorted(int(i) for i in order[learning:]))
    return Split(data.select([int(i) for i in order[:learning]]), data.select(evaluated), evaluated, "")
