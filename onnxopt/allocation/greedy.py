"""Which group to make narrower next: the one that loses least for what it saves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.allocation.costs import Costs

Array = npt.NDArray[Any]


def path(lost: Sequence[Array], choices: Sequence[Array], costs: Costs) -> Iterator[Array]:
    """Yield how many units of each group are gone, (groups,), from nothing to all that may go.

    Each step goes to the number of units of one group that loses least for what it saves, be it the next smaller width
    or a much smaller one. The array must not be changed.

    Args:
        lost: For each group what is lost when so many units are gone; beginning with none.
        choices: For each group how many units may be gone, ascending, without 0.
        costs: What is to be saved.
    """
    gone = np.zeros(len(lost), np.int64)
    best: dict[int, tuple[float, int]] = {}
    stale = set(range(len(lost)))
    while True:
        yield gone
        for group in stale:
            found = _best(gone, group, lost[group], choices[group], costs)
            best.pop(group, None)
            if found is not None:
                best[group] = found
        if not best:
            return
        chosen = min(best, key=lambda group: (best[group][0], group))
        gone = gone.copy()
        gone[chosen] = best[chosen][1]
        stale = costs.together(chosen) | {chosen}


def _best(gone: Array, group: int, lost: Array, choices: Array, costs: Costs) -> tuple[float, int] | None:
    """Return the least loss for what is saved, and how many units of a group are gone then."""
    further = choices[choices > gone[group]]
    saved = costs.saved(gone, group, further)
    further, saved = further[saved > 0], saved[saved > 0]
    if not len(further):
        return None
    rates = (lost[further] - lost[gone[group]]) / saved
    index = int(rates.argmin())
    return float(rates[index]), int(further[index])
