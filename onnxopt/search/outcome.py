"""What became of each candidate, in words: plain values in, plain values out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnxopt.metrics import MetricResult
from onnxopt.report.data import Candidate, CandidateStatus, Objective
from onnxopt.report.words import count, deviation
from onnxopt.search.decision import (
    COUNTED,
    SAME_SIZE,
    SAME_SPEED,
    Limits,
    Record,
    Speed,
    choose,
    eligible,
    finalists,
    judged,
    of_best_quality,
)

BEYOND_REASON = 20
"""Nobody is asked for more than so many times the samples they brought, and not for `MANY_SAMPLES` either."""

MANY_SAMPLES = 10_000


def needed_samples(metric: MetricResult, max_drop: float, reach: float = 1.0) -> int | None:
    """Return about how many samples would prove a drop that is within the budget, or None beyond reason.

    The interval shrinks with the root of the number of samples; of a loss that was never seen with the number itself.

    Args:
        metric: What was found.
        max_drop: The budget.
        reach: So many times as far from the drop the interval is taken to end.
    """
    room, half = max_drop - metric.drop, reach * (metric.high - metric.drop)
    if room <= 0 or not math.isfinite(half / room):
        return None
    factor = half / room
    wanted = metric.samples * (factor if metric.drop == 0 and metric.name in COUNTED else factor**2)
    if wanted > max(MANY_SAMPLES, BEYOND_REASON * metric.samples):
        return None
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
        return "winner", _victory(record, records, limits, objective)
    if record.failure:
        return "not tried" if not record.tried else "failed" if record.applies else "not applicable", record.failure
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
    return f"it takes {_times(speed)}"


def _times(speed: Speed) -> str:
    return f"{speed.ratio:.2f} times as long as the original (95% interval {speed.low:.2f} to {speed.high:.2f})"


def _victory(winner: Record, records: Sequence[Record], limits: Limits, objective: Objective) -> str:
    if winner.lossless:
        return _retention(records, limits, objective)
    tied = finalists(records, limits, objective)
    if len(tied) == 1:
        return f"it is the {'fastest' if objective == 'latency' else 'smallest that is not slower'} within the budget"
    like = f"of those within the budget that are about as {'fast' if objective == 'latency' else 'small'}"
    good = of_best_quality(tied, limits)
    if len(good) == 1:
        return f"{like}, it costs least quality"
    equal = " and as good" if math.isfinite(limits.negligible) else ", quality aside"
    largest = max(r.bytes or 0 for r in good)
    if objective == "latency" and largest > (winner.bytes or 0) * (1 + SAME_SIZE):
        return f"{like}{equal}, it is the smallest"
    return f"{like}{equal}, it measured fastest"


def _retention(records: Sequence[Record], limits: Limits, objective: Objective) -> str:
    """Say why the model is kept as it is: no other is better, or none may be chosen."""
    if any(not r.lossless for r in eligible(records, limits)):
        gain = "faster" if objective == "latency" else "smaller without being slower"
        return f"no lossy candidate within the budget is clearly {gain}"
    verdicts = judged(records, limits)
    fits = [verdicts[r.name].fit for r in records if not (r.lossless or r.failure or r.slower)]
    if "unproven" in fits:
        return "the samples do not prove of any lossy candidate that it is within the budget"
    if fits:
        return "no lossy candidate that is not slower is within the budget"
    return "every lossy candidate is slower or does not run" if len(records) > 1 else "there is no other candidate"


def _second(record: Record, winner: Record, limits: Limits, objective: Objective) -> str:
    smaller = bool(record.bytes and winner.bytes and record.bytes > winner.bytes * (1 + SAME_SIZE))
    if objective == "size" and smaller:
        return f"{winner.name} is smaller"
    if objective == "size" and record.speed and record.speed.ratio > 1 + SAME_SPEED:
        return f"it measured slower: {_times(record.speed)}"
    if objective == "latency" and record.speed and winner.speed:
        if record.speed.low > winner.speed.high:
            return f"{winner.name} is faster"
        if record.speed.ratio > winner.speed.ratio * (1 + SAME_SPEED):
            return f"{winner.name} measured faster, though their intervals overlap"
        if record.speed.ratio * (1 + SAME_SPEED) < winner.speed.ratio and not record.lossless:
            return f"how fast it is stayed too uncertain to choose it: {_times(record.speed)}"
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
    seen = f"drops by {metric.drop:.2g}, but" if metric.drop > 0 else "does not drop, but"
    text = (
        f"{metric.name} {seen} {count(metric.samples, 'sample')} cannot rule out a drop of {high:.3g}, and "
        f"{allowed:.4g} is allowed"
    )
    if reach > 1 and metric.high <= allowed < high:
        text += ", where several candidates are to be right together"
    wanted = needed_samples(metric, allowed, reach)
    if wanted is not None:
        return f"{text}; about {wanted:,} samples to judge by would show it"
    return f"{text}; with a drop so near the budget no reasonable number of samples would show it"
