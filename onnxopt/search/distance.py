"""How far the outputs of candidates are from the original's, as one number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.compare.deviation import kind_of
from onnxopt.feeds import Feed
from onnxopt.runtime import RunOptions, open_session


class Distance:
    """Compares models with one original, whose outputs are computed once."""

    def __init__(self, reference: ir.Model, feeds: Sequence[Feed], options: RunOptions) -> None:
        """Prepare; nothing is run yet.

        Args:
            reference: The original.
            feeds: A few samples; their outputs are held in memory.
            options: How models are run.
        """
        self._reference, self._feeds, self._options = reference, list(feeds), options
        self._known: list[dict[str, np.ndarray]] = []

    def __call__(self, model: ir.Model) -> float:
        """Return the mean square deviation of the outputs by their mean square; inf where it is no number.

        Raises:
            RuntimeFailure: If a model does not run.
        """
        if not self._known:
            with open_session(self._reference, self._options, optimized=True) as session:
                self._known = [_floats(session.run(feed)) for feed in self._feeds]
        with open_session(model, self._options, optimized=True) as session:
            pairs = zip(self._known, self._feeds, strict=True)
            return float(np.mean([_apart(known, session.run(feed)) for known, feed in pairs]))


def _floats(outputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {
        name: value.astype(np.float64)
        for name, value in outputs.items()
        if isinstance(value, np.ndarray) and kind_of(value.dtype) == "float"
    }


def _apart(one: Mapping[str, np.ndarray], two: Mapping[str, Any]) -> float:
    """Return the mean over outputs of their square deviation by their square; inf where it is no number."""
    found = []
    for name, value in one.items():
        other = two[name]
        if other.shape != value.shape:
            return math.inf
        error = float(np.mean(np.square(other.astype(np.float64) - value)))
        found.append(error / max(float(np.mean(np.square(value))), 1e-30))
    whole = float(np.mean(found)) if found else math.inf
    return whole if math.isfinite(whole) else math.inf
