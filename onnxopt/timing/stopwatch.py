"""Times things against each other so that noise and drift do not decide.

One timing runs a function until some milliseconds have passed. One round times A, B, B, A, the next one B, A, A,
B: a machine that slows down meanwhile hits both alike, and each side runs as often after itself as after the
other, which matters for caches. The ratio of a round is that of the fastest runs, because other programs can only
make a run slower: on a machine with four times more to do than it has cores, this was six times more precise than
means or medians. What counts of all rounds is the median.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

Run = Callable[[], None]
Clock = Callable[[], float]

SLOT_SECONDS = 0.01
"""How long one timing lasts at least."""

FEWEST_RUNS = 3
"""Runs in one timing, unless they are slow."""

SLOW_SECONDS = 0.05
"""A run that takes as long is slow."""

LEVEL = 4
"""Up to this ratio of run counts both sides get the larger one: the fastest of more runs is faster by chance."""

RESAMPLES = 1000

PLACEMENT = 0.015
"""Two sessions of one model differ by about this much for as long as they live, by where their memory lies.

Every interval is widened by it, less the more matches were timed.
"""


FEW = {2: 12.7, 3: 3.5, 4: 2.0}
"""By how much the interval of so few ratios is widened, to be about that of Student's t."""


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
    """A ratio of times and its 95% confidence interval."""

    ratio: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """Width relative to the ratio."""
        return (self.high - self.low) / self.ratio


@dataclasses.dataclass(frozen=True, slots=True)
class Round:
    """The seconds of all runs of A and of B in one round."""

    a: tuple[float, ...]
    b: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Time of the fastest run of B by that of A."""
        return min(self.b) / min(self.a)

    @property
    def swapped(self) -> Round:
        """The round with A and B exchanged."""
        return Round(self.b, self.a)


def repetitions(run: Run, clock: Clock = time.perf_counter) -> int:
    """Warm a function up and return how often it must run for one timing."""
    run()
    spent, count, fastest = 0.0, 0, math.inf
    while spent < SLOT_SECONDS or (count < 2 and spent < 10 * SLOW_SECONDS):
        start = clock()
        run()
        took = clock() - start
        spent, count, fastest = spent + took, count + 1, min(fastest, took)
    fewest = FEWEST_RUNS if fastest < SLOW_SECONDS else 1
    return max(fewest, math.ceil(SLOT_SECONDS / max(fastest, 1e-7)))


def leveled(count_a: int, count_b: int) -> tuple[int, int]:
    """Return how often each side runs in one timing: equally often where they are alike."""
    most = max(count_a, count_b)
    return (most, most) if most <= LEVEL * min(count_a, count_b) else (count_a, count_b)


def timing(run: Run, count: int, clock: Clock = time.perf_counter) -> tuple[float, ...]:
    """Return the seconds of `count` runs; the garbage collector is off meanwhile."""
    times = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(count):
            start = clock()
            run()
            times.append(clock() - start)
    finally:
        if collecting:
            gc.enable()
    return tuple(times)


def series(run: Run, budget_seconds: float, clock: Clock = time.perf_counter) -> list[float]:
    """Warm a function up and return the seconds of single runs, ten at least, until the time is spent."""
    repetitions(run, clock)
    times: list[float] = []
    end = clock() + budget_seconds
    while len(times) < 10 or clock() < end:
        start = clock()
        run()
        times.append(clock() - start)
    return times


def one_round(a: Run, b: Run, count_a: int, count_b: int, clock: Clock = time.perf_counter) -> Round:
    """Time A, B, B, A."""
    first = timing(a, count_a, clock)
    inner = timing(b, count_b, clock) + timing(b, count_b, clock)
    return Round(first + timing(a, count_a, clock), inner)


def rounds(a: Run, b: Run, count_a: int, count_b: int, clock: Clock = time.perf_counter) -> Iterator[Round]:
    """Time rounds without end; every other one begins with B."""
    while True:
        yield one_round(a, b, count_a, count_b, clock)
        yield one_round(b, a, count_b, count_a, clock).swapped


def match(first: Sequence[Round], second: Sequence[Round]) -> list[float]:
    """Return the ratios of two pairs of sessions: in the first A came first in everything, in the second B.

    Of two sessions of one model the one that was loaded later was seen to be faster by 2%, so each ratio is the
    geometric mean of one round of both.
    """
    return [math.sqrt(one.ratio * two.ratio) for one, two in zip(first, second, strict=False)]


def interval(matches: Sequence[Sequence[float]], seed: int) -> Interval:
    """Return the median of ratios with a bootstrap confidence interval.

    Rounds of one match are more alike than rounds of several, so matches are drawn first and then rounds within
    them. Few rounds say too little about their own spread, so the interval is widened as Student's t would.

    Args:
        matches: The ratios of each match; none is empty.
        seed: Seeds the resampling.
    """
    rng = np.random.default_rng(seed)
    sizes = np.array([len(found) for found in matches])
    ratios = np.full((len(matches), sizes.max()), np.nan)
    for row, found in zip(ratios, matches, strict=True):
        row[: len(found)] = found
    drawn = rng.integers(len(matches), size=(RESAMPLES, len(matches), 1))
    rounds = (rng.random((RESAMPLES, len(matches), sizes.max())) * sizes[drawn]).astype(np.intp)
    medians = np.median(ratios[drawn, rounds].reshape(RESAMPLES, -1), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    ratio = float(np.nanmedian(ratios))
    few = FEW.get(int(sizes.sum()), 1 + 3 / int(sizes.sum()))
    margin = PLACEMENT / math.sqrt(len(matches))
    low, high = (ratio * (float(end) / ratio) ** few for end in (low, high))
    return Interval(ratio, low * (1 - margin), high * (1 + margin))
