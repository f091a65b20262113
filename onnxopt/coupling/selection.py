"""How many units of a group stay, and which ones go."""

from __future__ import annotations

import numpy as np

from onnxopt.coupling.analysis import Group
from onnxopt.coupling.importance import Scores
from onnxopt.coupling.partition import Ints

MULTIPLE, LEAST = 8, 4
"""What is left of a layer is usually a multiple of the first, and not less than the second."""

MAX_MULTIPLE = 1024
"""No kernel computes more channels at once."""


def rounded(wanted: float, width: int, multiple: int, least: int) -> int:
    """Return a width near the wanted one that kernels like.

    Args:
        wanted: How many units should stay.
        width: How many there are.
        multiple: What the result is a multiple of, if at least two of them are wanted; else a half of it, and so on.
        least: No fewer stay, unless there are fewer.
    """
    while multiple > 1 and wanted < 2 * multiple:
        multiple //= 2
    return min(width, max(least, round(wanted / multiple) * multiple))


def kept(group: Group, ratio: float, multiple: int, least: int) -> int:
    """Return how many units of a group stay when a part of them goes; blocks such as heads may go down to one."""
    wanted = group.units * (1 - ratio)
    return max(1, round(wanted)) if group.span > 1 else rounded(wanted, group.units, multiple, least)


def widths(group: Group, multiple: int, least: int) -> tuple[int, ...]:
    """Return how many units of a group may stay when some go, ascending; see `kept`."""
    if group.span > 1:
        return tuple(range(1, group.units))
    found = {rounded(wanted, group.units, multiple, least) for wanted in range(1, group.units)}
    return tuple(sorted(width for width in found if width < group.units))


def least_important(scores: Scores, count: int) -> Ints:
    """Return the places of the lowest scores, the first ones of equals, in ascending order."""
    return np.sort(np.argsort(scores, kind="stable")[:count])


def part(scores: Scores, gone: Ints) -> float:
    """Return which part of all scores those at some places make up; 0 where the scores do not tell."""
    total = float(scores.sum())
    return float(scores[gone].sum()) / total if np.isfinite(total) and total > 0 else 0.0
