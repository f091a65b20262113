"""The largest magnitude of a stream of arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.numeric.blocks import as_working, blocks


class Peak:
    """Observes the largest finite magnitude; memory and time are those of one pass over small pieces.

    Attributes:
        largest: The largest finite magnitude so far; 0.0 before there is any.
        unbounded: Whether an infinity was seen.
    """

    def __init__(self) -> None:
        """Start with nothing seen."""
        self.largest = 0.0
        self.unbounded = False

    def add(self, array: npt.NDArray[Any]) -> None:
        """Take in an array of floating-point numbers; NaN is passed over."""
        for index in blocks(array.shape):
            working = as_working(array[index])
            low, high = float(working.min()), float(working.max())
            if not (math.isfinite(low) and math.isfinite(high)):
                self.unbounded |= bool(np.isinf(working).any())
                working = working[np.isfinite(working)]
                if not working.size:
                    continue
                low, high = float(working.min()), float(working.max())
            self.largest = max(self.largest, -low, high)
