"""Images moved by a few pixels: more samples of the same classes, where a user says that moving keeps the class."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from onnxopt.errors import UsageError
from onnxopt.feeds import Data, Feed


def moved(data: Data, pixels: int) -> list[Data]:
    """Return the samples with their images moved: up, down, left, right and along the diagonals.

    Args:
        data: The samples; images are inputs of floating point with four axes, moved along the last two.
        pixels: How far; what comes in at the border repeats it.

    Raises:
        UsageError: If there is no image, or it is not larger than that.
    """
    sizes = [v.shape[2:] for v in next(iter(data)).values() if isinstance(v, np.ndarray) and _is_image(v)]
    if not sizes:
        raise UsageError("shift moves images, inputs of floating point with four axes; the model takes none.", "shift")
    if pixels >= min(min(size) for size in sizes):
        raise UsageError(f"Images of {' x '.join(map(str, min(sizes)))} cannot be moved by {pixels} pixels.", "shift")
    steps = [(a, b) for a, b in itertools.product((-pixels, 0, pixels), repeat=2) if a or b]
    return [_by(data, down, right) for down, right in steps]


def _by(data: Data, down: int, right: int) -> Data:
    def samples() -> Iterator[Feed]:
        for feed in data:
            yield {k: _shifted(v, down, right) if _is_image(v) else v for k, v in feed.items()}

    return Data(data.name, samples, lambda: len(data), data.notes)


def _shifted(images: np.ndarray, down: int, right: int) -> np.ndarray:
    height, width = images.shape[2:]
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    return images[:, :, rows[:, None], columns]


def _is_image(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 4 and value.dtype.kind == "f"
