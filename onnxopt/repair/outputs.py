"""How far the outputs of a changed model are from those of the original."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class OutputError:
    """Observes how far outputs of a changed model are from the original's. An `onnxopt.contract.JointObserver`.

    Attributes:
        reference: The outputs.
        changed: The same.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Observe the named outputs."""
        self.reference = self.changed = tuple(names)
        self._lost, self._power = np.zeros(len(names)), np.zeros(len(names))

    def add(self, reference: Sequence[np.ndarray], changed: Sequence[np.ndarray]) -> None:
        """Take in the outputs for a sample."""
        for index, (wanted, got) in enumerate(zip(reference, changed, strict=True)):
            wanted = wanted.astype(np.float64)
            self._lost[index] += np.square(wanted - got).sum()
            self._power[index] += np.square(wanted).sum()

    @property
    def error(self) -> float:
        """Root of the lost part of the power, averaged over the outputs; NaN or infinity when an output was.

        Where an output was all zero and is not any more, all of it counts as lost.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = np.where(self._power == 0, np.sign(self._lost), self._lost / self._power)
            return float(np.sqrt(shares).mean())
