"""Which candidate wins, and what became of the others: plain values in, plain values out."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Literal

from onnxopt.metrics import MetricResult
from onnxopt.report.data import Candidate, CandidateStatus, FloatLayer, Objective
from onnxopt.report.words import count, deviation

NEGLIGIBLE = 0.1
"""Losses that differ by less than this part of the budget count as equal."""

SAME_SIZE = 0.01
"""Sizes that differ by less than this part count as equal."""

BEYOND_REACH = 1e4
"""Nobody has so many times as many samples."""

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
    """Time by the original's time, with its 95% interval; `precise` after more than a first look."""

    ratio: float
    low: float
    high: float
    precise: bool


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
    """Return the best, and what is not distinguishable from it by the objective alone."""
    possible = eligible(records, limits)
    if objective == "size":
        least = min(r.bytes or 0 for r in possible)
        return [r for r in possible if (r.bytes or 0) <= least * (1 + SAME_SIZE)]
    high = min(1.0 if r.speed is None else r.speed.high for r in possible)
    return [r for r in possible if (r.speed.low if r.speed else 1.0) <= high]


def choose(records: Sequence[Record], limits: Limits, objective: Objective) -> Record:
    """Return the winner: of the contenders those of the best quality, of these the smallest, and of these the fastest.

    Args:
        records: The candidates, each with a name of its own; one of them keeps the model as it is.
        limits: The budget.
        objective: What to look for.
    """
    good = _good(contenders(records, limits, objective), limits)
    least = min(r.bytes or 0 for r in good)
    small = [r for r in good if (r.bytes or 0) <= least * (1 + SAME_SIZE)]
    return min(small, key=lambda r: (_ratio(r), r.bytes or 0, r.loss, r.name))


def _good(records: Sequence[Record], limits: Limits) -> list[Record]:
    """Return those of the best quality, as far as differences count."""
    least = min(r.loss for r in records)
    return [r for r in records if r.loss <= least + limits.negligible]


def _ratio(record: Record) -> float:
    return 1.0 if record.speed is None else record.speed.ratio


def needed_samples(metric: MetricResult, max_drop: float, reach: float = 1.0) -> int | None:
    """Return about how many samples would prove a drop that is within the budget, or None where none would.

    The interval shrinks with the root of the number of samples; of a loss that was never seen with the number itself.

    Args:
        metric: What was found.
        max_drop: The budget.
        reach: So many times as far from the drop the interval is taken to end.
    """
    room, half = max_drop - metric.drop, reach * (metric.high - metric.drop)
    if room <= 0 or not math.isfinite(half):
        return None
    factor = half / room
    if factor > BEYOND_REACH:
        return None
    wanted = metric.samples * (factor if metric.drop == 0 and metric.name in COUNTED else factor**2)
    digits = max(0, math.floor(math.log10(max(wanted, 1))) - 1)
    return int(math.ceil(wanted / 10**digits) * 10**digits)


def describe(record: Record, records: Sequence[Record], limits: Limits, objective: Objective) -> Candidate:
    """Return a candidate with what became of it, in words.

    Args:
        record: One of the candidates.
        records: All of them.
        limits: The budget.
        objective: What was looked for.
    """
    status, reason = _outcome(record, records, limits, objective)
    speed = record.speed
    return Candidate(
        name=record.name,
        pipeline=record.pipeline,
        status=status,
        reason=reason,
        ratio=None if speed is None else speed.ratio,
        low=None if speed is None else speed.low,
        high=None if speed is None else speed.high,
        bytes=record.bytes,
        worst=record.worst,
        metric=record.metric,
        in_float=record.in_float,
    )


def _outcome(
    record: Record, records: Sequence[Record], limits: Limits, objective: Objective
) -> tuple[CandidateStatus, str]:
    winner = choose(records, limits, objective)
    if record is winner:
        return "winner", _victory(record, contenders(records, limits, objective), limits, objective)
    if record.failure:
        return "failed" if record.applies else "not applicable", record.failure
    if record.slower and not record.lossless:
        assert record.speed is not None
        return "slower", _slowness(record.speed)
    verdict = judged(records, limits)[record.name]
    if verdict.fit == "over":
        return "over budget", _excess(record, limits)
    if verdict.fit == "unproven":
        return "not proven", _doubt(record, limits, verdict.reach)
    if record.speed is None and not record.lossless:
        return "failed", "it was not measured"
    return "kept", _second(record, winner, limits, objective)


def _slowness(speed: Speed) -> str:
    return (
        f"it takes {speed.ratio:.2f} times as long as the original (95% interval {speed.low:.2f} to {speed.high:.2f})"
    )


def _victory(winner: Record, tied: Sequence[Record], limits: Limits, objective: Objective) -> str:
    if winner.lossless:
        gain = "faster" if objective == "latency" else "smaller without being slower"
        return f"no lossy candidate within the budget is clearly {gain}"
    if len(tied) == 1:
        return f"it is the {'fastest' if objective == 'latency' else 'smallest that is not slower'} within the budget"
    like = f"of those within the budget that are about as {'fast' if objective == 'latency' else 'small'}"
    good = _good(tied, limits)
    if len(good) == 1:
        return f"{like}, it costs least quality"
    equal = " and as good" if math.isfinite(limits.negligible) else ", however good"
    largest = max(r.bytes or 0 for r in good)
    if objective == "latency" and largest > (winner.bytes or 0) * (1 + SAME_SIZE):
        return f"{like}{equal}, it is the smallest"
    return f"{like}{equal}, it measured fastest"


def _second(record: Record, winner: Record, limits: Limits, objective: Objective) -> str:
    smaller = bool(record.bytes and winner.bytes and record.bytes > winner.bytes * (1 + SAME_SIZE))
    if objective == "size" and smaller:
        return f"{winner.name} is smaller"
    if objective == "latency" and record.speed and winner.speed and record.speed.low > winner.speed.high:
        return f"{winner.name} is faster"
    equal = "as small" if objective == "size" else "about as fast"
    if record.loss > winner.loss + limits.negligible:
        return f"{winner.name} is {equal} and costs less quality"
    return f"{winner.name} is {equal} and {'smaller' if smaller else 'measured faster'}"


def _excess(record: Record, limits: Limits) -> str:
    metric = record.metric
    if limits.max_error is not None and not (record.worst is not None and record.worst <= limits.max_error):
        worst = "unknown" if record.worst is None else deviation(record.worst)
        return f"an output deviates by {worst} of its range, and {limits.max_error:.4g} is allowed"
    if metric is None:
        return "its quality is not known"
    return (
        f"{metric.name} drops by {metric.drop:.4g} (95% interval {metric.low:.4g} to {metric.high:.4g}), and "
        f"{limits.max_drop:.4g} is allowed"
    )


def _doubt(record: Record, limits: Limits, reach: float) -> str:
    metric, allowed = record.metric, limits.max_drop
    assert metric is not None and allowed is not None
    high = metric.drop + reach * (metric.high - metric.drop)
    text = (
        f"{metric.name} drops by {metric.drop:.4g}, but {count(metric.samples, 'sample')} cannot rule out "
        f"{high:.4g}, and {allowed:.4g} is allowed"
    )
    if reach > 1 and metric.high <= allowed < high:
        text += ", where several candidates are to be right together"
    wanted = needed_samples(metric, allowed, reach)
    return text if wanted is None else f"{text}; about {wanted:,} samples to judge by would show it"
