"""Which pruned candidates are worth the time it takes to make them: plain values in, plain values out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnxopt.allocation.forecast import Level
from onnxopt.report.data import Objective
from onnxopt.search.decision import GAIN, Limits, Record, fit

HOPE = 0.5
"""Repaired outputs may move by this part of what is expected."""


def prospects(
    levels: Sequence[Level], base: Record, best: Record, records: Sequence[Record], limits: Limits, objective: Objective
) -> tuple[list[Level], Level, str]:
    """Return how much may be pruned so that it could win.

    It could not where even what is expected of it is no better than what is at hand, nor where outputs move farther
    than those of a candidate that is over the budget.

    Args:
        levels: How much could be left, and what that is expected to do to the outputs; the mildest first, at least one.
        base: What is known about the model when the same is done to it without pruning.
        best: The best candidate so far.
        records: All candidates so far.
        limits: The budget.
        objective: What to look for.

    Returns:
        The levels that may win; and the one that comes closest where none may, with the reason.
    """
    useful = [level for level in levels if not _pointless(level, base, best, objective)]
    if not useful:
        return [], levels[-1], _pointless(levels[-1], base, best, objective)
    hopeful = [level for level in useful if not _hopeless(level, base, records, limits)]
    return hopeful, useful[0], _hopeless(useful[0], base, records, limits)


def _pointless(level: Level, base: Record, best: Record, objective: Objective) -> str:
    """Return why a level would not be better than what is at hand; empty where it may."""
    if objective == "size":
        expected, limit = level.left * (base.bytes or 0), float(best.bytes or 0)
        text = f"even with {level.left:.0%} of the parameters it would hardly be smaller than {best.name}"
    else:
        expected, limit = level.left * _ratio(base), _ratio(best)
        text = f"even in {level.left:.0%} of the time it would hardly be faster than {best.name}"
    return text if expected >= GAIN * limit else ""


def _hopeless(level: Level, base: Record, records: Sequence[Record], limits: Limits) -> str:
    """Return why a level would be over the budget; empty where it may not be."""
    moved = math.hypot(level.moved, base.moved or 0.0)
    over = [(r.moved, r.name) for r in records if r.moved is not None and not r.failure and fit(r, limits) == "over"]
    least, name = min(over, default=(math.inf, ""))
    if HOPE * moved < least:
        return ""
    return (
        f"with {level.left:.0%} left, outputs are expected to move by {moved:.1%}, and {name}, which moves them by "
        f"{least:.1%}, is over the budget"
    )


def _ratio(record: Record) -> float:
    return 1.0 if record.speed is None else record.speed.ratio
