"""What a pruned model has to be better than: the same model quantized and not pruned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from onnxopt import manager, metrics
from onnxopt.analysis.inspect import summary_stats
from onnxopt.errors import DataError, OnnxOptError
from onnxopt.pipeline import Pipeline
from onnxopt.report.data import Comparison, Contender
from onnxopt.report.words import deviation, factor
from onnxopt.search.decision import Limits, Record, Speed
from onnxopt.search.hunt import laboratory, proposals
from onnxopt.search.progress import Labelled
from onnxopt.trial import Denials

if TYPE_CHECKING:
    from onnxopt.ground import Ground
    from onnxopt.measure import Measurement

PRUNERS = {"prune-channels", "prune-layers", "merge-channels"}
"""Passes that trade quality for speed by leaving out parts of a model."""

COARSER = {"quantize-static", "quantize-dynamic", "convert-float16"}
"""Passes that trade quality for speed by computing with fewer bits."""

SAME_ERROR = 0.1
"""Worst deviations that differ by less than this part are not told apart."""

Order = Literal[-1, 0, 1]
"""-1 when the first of two is better, 1 when the second is, 0 when no difference is shown."""


def compared(ground: Ground, outcome: manager.Outcome, measurement: Measurement | None) -> Comparison | None:
    """Compare a pruned result with the original quantized alone, on samples that neither learnt from.

    Args:
        ground: The models, the inputs and the options.
        outcome: The result.
        measurement: How fast it is.

    Returns:
        What was found; None where nothing was pruned, or where there is nothing to compare on.
    """
    pruned = ",".join(done.spec for done in outcome.passes if done.name in PRUNERS and done.applied)
    if not pruned or ground.parts is None or measurement is None or ground.bench.not_verified:
        return None
    speed = Speed(measurement.ratio, measurement.low, measurement.high, effort=1)
    try:
        return _compared(
            ground, outcome, Record("this result", pruned, bytes=summary_stats(outcome.model).bytes, speed=speed)
        )
    except OnnxOptError as error:
        return _incomparable(str(error))


def _compared(ground: Ground, outcome: manager.Outcome, own: Record) -> Comparison:
    progress = Labelled(ground.settings.progress)
    progress.label = "for comparison, without pruning"
    base = ground.run(Pipeline.recipe("lossless"))(Denials(), True)
    lab = laboratory(ground, base.model, Limits(None, None), _metric(ground), progress)
    own = lab.assess(own, outcome.model)
    rivals = {}
    for proposal in proposals(ground.reference, ground.settings):
        if COARSER & set(proposal.names):
            record = lab.examine(proposal, {})
            rivals[record.name] = proposal, record
    if own.failure:
        return _incomparable(f"{own.failure}.")
    records = [record for _, record in rivals.values()]
    told = tuple(_contender(record) for record in records if record.applies)
    rival = strongest(own, records)
    if rival is None:
        return Comparison(_contender(own), told, "", None, None, None, unrivalled(records))
    against = lab.against(outcome.model, rivals[rival.name][0])
    times = (against.ratio, against.low, against.high)
    return Comparison(_contender(own), told, rival.name, *times, verdict(own, rival, against))


def _incomparable(reason: str) -> Comparison:
    text = f"It could not be compared with quantization alone: {reason}"
    return Comparison(None, (), "", None, None, None, text)


def _contender(record: Record) -> Contender:
    speed = record.speed
    return Contender(
        record.name,
        record.pipeline,
        record.failure,
        ratio=None if speed is None else speed.ratio,
        low=None if speed is None else speed.low,
        high=None if speed is None else speed.high,
        bytes=record.bytes,
        worst=record.worst,
        metric=record.metric,
    )


def _metric(ground: Ground) -> str | None:
    """Return what the user wants to be judged by, or else the metric that fits the model."""
    if ground.budget.metric is not None:
        return ground.budget.metric
    try:
        return metrics.choose(ground.reference, ground.budget.labels)[0]
    except DataError:
        return None


def strongest(own: Record, rivals: Sequence[Record]) -> Record | None:
    """Return what makes most of a case against pruning: better in all, better at something, or just the fastest.

    Args:
        own: What is known about the pruned model.
        rivals: What is known about the model quantized in several ways.

    Returns:
        One of the rivals, or None where none runs without being slower than the original.
    """
    ran = [r for r in rivals if not r.failure and r.speed is not None and not r.slower]
    return min(ran, key=lambda r: (_rank(r, own), r.speed.ratio if r.speed else 1.0), default=None)


def unrivalled(rivals: Sequence[Record]) -> str:
    """Say why there is nothing to compare with.

    Args:
        rivals: What is known about the model quantized in several ways, none of which is a rival.
    """
    tried = "; ".join(f"{r.name}: {r.failure or 'slower than the original'}" for r in rivals if r.applies)
    if not tried:
        return "There is no way to quantize the model alone that this could be compared with."
    return f"Quantization alone is no alternative here ({tried})."


def verdict(own: Record, rival: Record, against: Speed) -> str:
    """Say whether pruning is to be recommended.

    Args:
        own: What is known about the pruned model.
        rival: What is known about the model quantized instead.
        against: Time of the pruned model by that of the other, measured in turns.
    """
    speeds: Order = -1 if against.low > 1 else 1 if against.high < 1 else 0
    return (
        f"Tried for comparison without pruning, {rival.name}: {_figures(rival)}. This result: {_figures(own)}. It "
        f"takes {against.ratio:.2f} of the time (95% interval {against.low:.2f} to {against.high:.2f}). "
        f"{_ADVICE[speeds, _losses(rival, own)]}"
    )


def _rank(rival: Record, own: Record) -> int:
    """Return 0 for a rival that makes pruning pointless, 1 for one that is better at something, 2 for others."""
    orders = (_speeds(rival, own), _losses(rival, own))
    return 0 if max(orders) < 1 and min(orders) < 0 else 1 if min(orders) < 0 else 2


_NOT = "Pruning is not to be recommended here: quantization alone is"
_ADVICE: dict[tuple[Order, Order], str] = {
    (-1, -1): f"{_NOT} faster and closer to the original.",
    (-1, 0): f"{_NOT} faster, and no difference in quality is shown.",
    (0, -1): f"{_NOT} closer to the original, and no difference in speed is shown.",
    (0, 0): "No difference from quantization alone is shown; of the two, that is the simpler one.",
    (1, 1): "Pruning pays here: it is faster than quantization alone, and closer to the original.",
    (1, 0): "Pruning pays here: it is faster than quantization alone, and no difference in quality is shown.",
    (0, 1): "Pruning pays here: it is closer to the original than quantization alone, and as fast.",
    (-1, 1): "Quantization alone is faster, and this result closer to the original.",
    (1, -1): "Pruned, it is faster than with quantization alone, which is closer to the original.",
}


def _speeds(one: Record, two: Record) -> Order:
    first, second = one.speed, two.speed
    assert first is not None and second is not None, "only what was measured is compared"
    return -1 if first.high < second.low else 1 if second.high < first.low else 0


def _losses(one: Record, two: Record) -> Order:
    """Compare by the intervals of the metric, or by the worst deviation where there is none."""
    if one.metric is not None and two.metric is not None:
        return -1 if one.metric.high < two.metric.low else 1 if two.metric.high < one.metric.low else 0
    near = 1 - SAME_ERROR
    return -1 if one.loss < near * two.loss else 1 if two.loss < near * one.loss else 0


def _figures(record: Record) -> str:
    assert record.speed is not None, "only what was measured is compared"
    faster = f"{factor(1 / record.speed.ratio)} as fast as the original"
    metric = record.metric
    if metric is None:
        return f"{faster}, outputs deviate by up to {deviation(record.loss)} of their range"
    name = f"{metric.name} {'rises' if metric.drop < 0 else 'drops'} by {abs(metric.drop):.2g}"
    return f"{faster}, {name} (95% interval {metric.low:.2g} to {metric.high:.2g})"
