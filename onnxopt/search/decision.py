"""Which candidate wins, and which must be timed again before that is clear: plain values in, plain values out."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Literal

from onnxopt.metrics import MetricResult
from onnxopt.report.data import FloatLayer, Objective

NEGLIGIBLE = 0.1
"""Losses that differ by less than this part of the budget count as equal."""

SAME_SIZE = 0.01
"""Sizes that differ by less than this part count as equal."""

GAIN = 0.97
"""Something takes its time to try; it is worth that when less than this part of the best so far is expected of it."""

SAME_SPEED = 0.05
"""Times that differ by less than this part count as equal where their intervals overlap."""

MOST_EFFORT = 3
"""So often a candidate is timed again, each time longer."""

Fit = Literal["within", "over", "unproven"]


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """The budget; None where it does not limit. See `onnxopt.judge.Budget`."""

    max_error: float | None
    max_drop: float | None

    @property
    def negligible(self) -> float:
        """How much loss makes no difference."""
        limit = self.max_drop if self.max_drop is not None else self.max_error
        return NEGLIGIBLE * limit if limit is not None else math.inf


COUNTED = ("top1", "ctc")
"""Metrics whose losses are counted as rare events."""


@dataclasses.dataclass(frozen=True, slots=True)
class Speed:
    """Time by the original's time, with its 95% interval.

    Attributes:
        ratio: The time.
        low: Lower end of the interval.
        high: Upper end.
        effort: How it was measured: 0 for a first look, one more each time it was timed again and longer.
    """

    ratio: float
    low: float
    high: float
    effort: int

    @property
    def width(self) -> float:
        """Return the width of the interval relative to the ratio."""
        return (self.high - self.low) / self.ratio


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """What is known about a candidate.

    Attributes:
        name: What it is.
        pipeline: Its lossy passes; empty for the one that keeps the model as it is, which is always within budget.
        failure: Why there is no model, or it does not run; empty when it does.
        bytes: Its size.
        speed: None when it was not measured.
        worst: Worst deviation of an output relative to its range; None when quality was not looked at.
        metric: The task metric; None when there is none.
        in_float: Layers left in floating point.
        applies: Whether the model has something for its passes to do; otherwise `failure` says why not.
        moved: Root of the square error of the outputs by their power, on a few samples; None when not known.
        tried: Whether it was tried at all; otherwise `failure` says why not.
    """

    name: str
    pipeline: str
    failure: str = ""
    bytes: int | None = None
    speed: Speed | None = None
    worst: float | None = None
    metric: MetricResult | None = None
    in_float: tuple[FloatLayer, ...] = ()
    applies: bool = True
    moved: float | None = None
    tried: bool = True

    @property
    def lossless(self) -> bool:
        """Whether nothing lossy was done."""
        return not self.pipeline

    @property
    def loss(self) -> float:
        """How much quality it costs: the drop of the metric, or without one the worst deviation."""
        if self.lossless:
            return 0.0
        found = self.worst if self.metric is None else self.metric.drop
        return math.inf if found is None or math.isnan(found) else max(found, 0.0)

    @property
    def slower(self) -> bool:
        """Whether it was shown to be slower than the original."""
        return self.speed is not None and self.speed.low > 1.0


def fit(record: Record, limits: Limits, reach: float = 1.0) -> Fit:
    """Return how a candidate stands to the budget.

    The drop of the metric is within it when the upper end of its 95% interval is; the worst deviation when no sample
    exceeds it.

    Args:
        record: The candidate.
        limits: The budget.
        reach: The upper end is taken to be so many times as far from the drop: more than 1 where one of several
            attempts is to be the first that fits, which makes a lucky one more likely.
    """
    if record.lossless:
        return "within"
    if limits.max_error is not None and not (record.worst is not None and record.worst <= limits.max_error):
        return "over"
    if limits.max_drop is None:
        return "within"
    if record.metric is None or not record.metric.within(limits.max_drop):
        return "over"
    high = record.metric.drop + reach * (record.metric.high - record.metric.drop)
    return "within" if high <= limits.max_drop else "unproven"


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """How a candidate stands to the budget when all are judged together.

    Attributes:
        fit: The answer.
        reach: So many times as far from the drop its interval was taken to end.
    """

    fit: Fit
    reach: float


def reach(metric: str, tests: int) -> float:
    """Return how much farther the ends of 95% intervals must lie for so many of them to hold together.

    The error that is allowed is shared out among the tests. For top1 and ctc what limits most is how many losses were
    seen, rare events: where none was, 3.0 = ln 20 were to be expected, and ln(20 * tests) for several. Other metrics
    are taken to be normally distributed. A two-sided interval already allows two tests of one side.

    Args:
        metric: Name of the metric.
        tests: How many intervals.
    """
    if metric in COUNTED:
        return math.log(20 * tests) / math.log(20)
    normal = statistics.NormalDist()
    return max(1.0, normal.inv_cdf(1 - 0.05 / tests) / normal.inv_cdf(0.975))


def judged(records: Sequence[Record], limits: Limits) -> dict[str, Verdict]:
    """Return how each candidate stands to the budget, so that a wrong "within" has a chance of 5% for all of them.

    This is Holm's procedure: the candidate with most room below the budget is tested first, against the error
    shared out among all; each that passes leaves one fewer for the rest; after one that does not, none does.

    Args:
        records: The candidates, each with a name of its own.
        limits: The budget.
    """
    verdicts = {r.name: Verdict(fit(r, limits), 1.0) for r in records}
    tested = sorted((r for r in records if _is_tested(r, limits)), key=lambda r: (-_room(r, limits), r.name))
    passing = True
    factor = 1.0
    for place, record in enumerate(tested):
        if passing:
            factor = reach(record.metric.name if record.metric else "", len(tested) - place)
        found = fit(record, limits, factor)
        passing = passing and found == "within"
        verdicts[record.name] = Verdict("unproven" if found == "within" and not passing else found, factor)
    return verdicts


def open_tests(records: Sequence[Record], limits: Limits) -> int:
    """Return how many candidates were tested and not found within the budget."""
    verdicts = judged(records, limits)
    return sum(_is_tested(r, limits) and verdicts[r.name].fit != "within" for r in records)


def withstands(record: Record, records: Sequence[Record], limits: Limits) -> bool:
    """Return whether a candidate stays within the budget when one more is judged, which may not be.

    Args:
        record: The candidate.
        records: All of them.
        limits: The budget.
    """
    if record.lossless or record.metric is None:
        return True
    lost = dataclasses.replace(record.metric, drop=math.inf, high=math.inf)
    another = dataclasses.replace(record, name="", metric=lost)
    return judged([*records, another], limits)[record.name].fit == "within"


def _is_tested(record: Record, limits: Limits) -> bool:
    """Whether the candidate could win by a wrong interval."""
    judgeable = limits.max_drop is not None and record.metric is not None
    return judgeable and not (record.lossless or record.failure or record.slower)


def _room(record: Record, limits: Limits) -> float:
    """Return how far the budget lies above the drop, in lengths of the interval's upper half."""
    assert record.metric is not None and limits.max_drop is not None, "only tested candidates come here"
    room, half = limits.max_drop - record.metric.drop, record.metric.high - record.metric.drop
    if math.isnan(room) or math.isnan(half):
        return -math.inf
    return room / half if half > 0 else math.copysign(math.inf, room)


def eligible(records: Sequence[Record], limits: Limits) -> list[Record]:
    """Return those that may win: within the budget, run, and not slower than the original."""
    verdicts = judged(records, limits)
    return [
        r
        for r in records
        if r.lossless
        or (not r.failure and r.speed is not None and not r.slower and verdicts[r.name].fit == "within" and r.bytes)
    ]


def contenders(records: Sequence[Record], limits: Limits, objective: Objective) -> list[Record]:
    """Return the best, and what its interval does not tell from it, by the objective alone."""
    possible = eligible(records, limits)
    if objective == "size":
        return _smallest(possible)
    high = min(_speed(r).high for r in possible)
    return [r for r in possible if _speed(r).low <= high]


def finalists(records: Sequence[Record], limits: Limits, objective: Objective) -> list[Record]:
    """Return those between which quality and size decide.

    For size these are the smallest that did not measure slower. For latency the yardstick is the fastest that was shown
    to be faster than the original, or is lossless; what measured about as fast, and overlaps with it, stands beside it.
    """
    possible = eligible(records, limits)
    return _alike(possible, [r for r in possible if r.lossless or _speed(r).high < 1.0], objective)


def _alike(possible: Sequence[Record], yardsticks: Sequence[Record], objective: Objective) -> list[Record]:
    """Return what is as good as the best yardstick, by ratios of which a small difference does not count."""
    if objective == "size":
        return _smallest([r for r in possible if r.lossless or _speed(r).ratio <= 1 + SAME_SPEED])
    best = _speed(_fastest(yardsticks))
    return [r for r in possible if _speed(r).low <= best.high and _speed(r).ratio <= best.ratio * (1 + SAME_SPEED)]


def choose(records: Sequence[Record], limits: Limits, objective: Objective) -> Record:
    """Return the winner: of the finalists those of the best quality, of these the smallest, and of these the fastest.

    Args:
        records: The candidates, each with a name of its own; one of them keeps the model as it is.
        limits: The budget.
        objective: What to look for.
    """
    return _best(finalists(records, limits, objective), limits)


def next_to_time(records: Sequence[Record], limits: Limits, objective: Objective) -> Record | None:
    """Return the candidate whose time must be known better before the choice is clear, or None.

    All contenders get more than a first look, the fastest first. Then it matters whether wide intervals decide: where
    taking all that overlap for equally fast and taking the ratios at their word choose differently, what they choose,
    and the fastest, are timed again and longer, the widest interval first.

    Args:
        records: The candidates, each with a name of its own; one of them keeps the model as it is.
        limits: The budget.
        objective: What is looked for.
    """
    overlapping = contenders(records, limits, objective)
    rough = [r for r in overlapping if not r.lossless and _speed(r).effort == 0]
    if rough:
        return _fastest(rough)
    possible = eligible(records, limits)
    choices = [_best(overlapping, limits), _best(_alike(possible, possible, objective), limits)]
    if choices[0] is choices[1]:
        return None
    wide = [r for r in (*choices, _fastest(overlapping)) if not r.lossless and _speed(r).width > SAME_SPEED]
    return max(
        (r for r in wide if _speed(r).effort < MOST_EFFORT), key=lambda r: (_speed(r).width, r.name), default=None
    )


def _best(records: Sequence[Record], limits: Limits) -> Record:
    return min(
        _smallest(of_best_quality(records, limits)), key=lambda r: (_speed(r).ratio, r.bytes or 0, r.loss, r.name)
    )


def of_best_quality(records: Sequence[Record], limits: Limits) -> list[Record]:
    """Return those of the best quality, as far as differences count."""
    least = min(r.loss for r in records)
    return [r for r in records if r.loss <= least + limits.negligible]


def _smallest(records: Sequence[Record]) -> list[Record]:
    least = min(r.bytes or 0 for r in records)
    return [r for r in records if (r.bytes or 0) <= least * (1 + SAME_SIZE)]


def _fastest(records: Sequence[Record]) -> Record:
    return min(records, key=lambda r: (_speed(r).ratio, r.name))


def _speed(record: Record) -> Speed:
    """Return how fast a candidate is; what keeps the model as it is may not have been measured."""
    return record.speed or Speed(1.0, 1.0, 1.0, MOST_EFFORT)
