"""What metrics look at in the outputs of a model."""

from __future__ import annotations

import numpy as np

from onnxopt.compare.deviation import kind_of
from onnxopt.errors import DataError
from onnxopt.metrics.result import Outputs

KEPT_BYTES = 2 << 30
"""Outputs that a metric has to hold at once may take up this much."""

IGNORED = -1
"""Labels of this value or below, such as -100, mark positions that do not count for top1."""


def main_output(outputs: Outputs) -> np.ndarray:
    """Return the first floating-point output as float64.

    Raises:
        DataError: If there is none.
    """
    for value in outputs.values():
        if isinstance(value, np.ndarray) and kind_of(value.dtype) == "float":
            return value.astype(np.float64)
    raise DataError(
        f"The metric needs a floating-point output, and the model has none; its outputs are {', '.join(outputs)}."
    )


def classes(scores: np.ndarray) -> np.ndarray:
    """Return the positions of the largest scores along the last axis.

    Raises:
        DataError: If the last axis does not hold classes.
    """
    if scores.ndim == 0 or scores.shape[-1] < 2:
        raise DataError(
            f"top1 needs an output with the classes along its last axis, and the model's has the shape "
            f"{list(scores.shape)}."
        )
    found: np.ndarray = np.argmax(scores, axis=-1)
    return found


def checked(size: int, metric: str) -> int:
    """Return the size of outputs that a metric holds.

    Raises:
        DataError: If they take up too much memory.
    """
    if size > KEPT_BYTES:
        raise DataError(
            f"{metric} has to hold all outputs at once, and they take up more than {KEPT_BYTES >> 30} GB; give "
            "fewer samples."
        )
    return size
