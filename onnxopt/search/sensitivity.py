"""Which layers cost most: groups of layers left in floating point, halved where leaving them gains most."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Sequence

from onnxopt.contract import Site

MOST_EVALUATIONS = 24
"""Each takes a run of the passes and of the result on a few samples."""

WORTHWHILE = 0.02
"""Groups whose gain is below this part of the whole deviation are not divided any further."""

Distance = Callable[[frozenset[Site]], float]
"""How far the outputs are from the original's when these layers are left in floating point."""


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring layers.

    Attributes:
        sites: The layers, in the order of the graph.
        gain: Which part of the deviation goes away when they are left in floating point.
    """

    sites: tuple[Site, ...]
    gain: float

    @property
    def gain_per_layer(self) -> float:
        """Gain by number of layers."""
        return self.gain / len(self.sites)


def rank(
    sites: Sequence[Site],
    distance: Distance,
    *,
    evaluations: int = MOST_EVALUATIONS,
    in_time: Callable[[], bool] = lambda: True,
) -> list[Group]:
    """Divide layers into groups and rank these by what each costs, the most costly per layer first.

    Args:
        sites: The layers in the order of the graph.
        distance: Measures the deviation.
        evaluations: How often it may be called.
        in_time: Whether there is time for more.

    Returns:
        Groups that hold every layer once; a single one where nothing could be told.
    """
    whole = distance(frozenset())
    if not sites or not 0 < whole < float("inf"):
        return [Group(tuple(sites), 1.0)] if sites else []
    used = 1
    heap: list[tuple[float, int, Group]] = [(-1.0, 0, Group(tuple(sites), 1.0))]
    done: list[Group] = []
    while heap:
        group = heapq.heappop(heap)[2]
        enough = used + 2 > evaluations or not in_time()
        if enough or len(group.sites) == 1 or group.gain < WORTHWHILE:
            done.append(group)
            continue
        middle = len(group.sites) // 2
        for half in (group.sites[:middle], group.sites[middle:]):
            gain = 1.0 - distance(frozenset(half)) / whole
            used += 1
            heapq.heappush(heap, (-gain, used, Group(half, gain)))
    return sorted(done, key=lambda g: -g.gain_per_layer)


def fewest(groups: Sequence[Group], good: Callable[[tuple[Group, ...]], bool], *, tries: int) -> tuple[Group, ...]:
    """Return about the shortest beginning of a ranking that is good, found by halving; empty when none is.

    Args:
        groups: The ranking. All of it together is not asked for: that is no longer a candidate.
        good: Whether leaving these groups in floating point meets the budget.
        tries: How often it may be asked.
    """
    found: tuple[Group, ...] = ()
    bad, end = 0, len(groups)
    while end - bad > 1 and tries > 0:
        middle = (bad + end) // 2
        tries -= 1
        if good(tuple(groups[:middle])):
            found, end = tuple(groups[:middle]), middle
        else:
            bad = middle
    return found
