"""Metrics that are functions of the user's."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from onnxopt.compare.deviation import nbytes
from onnxopt.errors import DataError, UsageError
from onnxopt.metrics.intervals import resampled_drop
from onnxopt.metrics.outputs import checked
from onnxopt.metrics.result import Figures, Outputs


def imported(metric: str) -> Callable[..., float]:
    """Import the function that a metric names; the current folder is searched first.

    Raises:
        UsageError: If it cannot be imported or is no function.
    """
    module, _, name = metric.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"The metric {metric} cannot be imported: {error}") from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise UsageError(f"The metric {metric} is no function but a {type(found).__name__}.")
    function: Callable[..., float] = found
    return function


class Custom:
    """A function of all outputs and labels."""

    def __init__(self, name: str, function: Callable[..., float]) -> None:
        self._name, self._function = name, function
        self._sign = 1.0 if getattr(function, "higher_is_better", True) else -1.0
        self._sides: tuple[list[Outputs], list[Outputs]] = ([], [])
        self._labels: list[np.ndarray] | None = []
        self._bytes = 0

    def add(self, reference: Outputs, candidate: Outputs, label: np.ndarray | None) -> None:
        """Take in the outputs of both models for one sample."""
        size = sum(nbytes(value) for outputs in (reference, candidate) for value in outputs.values())
        self._bytes = checked(self._bytes + size, self._name)
        self._sides[0].append(reference)
        self._sides[1].append(candidate)
        if label is None:
            self._labels = None
        elif self._labels is not None:
            self._labels.append(label)

    def result(self, seed: int) -> Figures:
        """Return the function's values; it is called again on samples drawn anew for the interval."""

        def both(chosen: np.ndarray) -> tuple[float, float]:
            labels = None if self._labels is None else np.array([self._labels[i] for i in chosen])
            one, two = ([side[i] for i in chosen] for side in self._sides)
            return self._call(one, labels), self._call(two, labels)

        return resampled_drop(both, len(self._sides[0]), seed, sign=self._sign)

    def _call(self, outputs: list[Outputs], labels: np.ndarray | None) -> float:
        value = self._function(outputs, labels)
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"The metric {self._name} returned {type(value).__name__} where a number is expected."
            ) from error
