"""What a report says, before it is drawn: the headline, the warnings, the rows of its tables.

The terminal and the page draw the same sentences and rows; only their looks differ.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from onnxopt.report import removals, words

ELSEWHERE = 5
"""Nodes named that do not run on the chosen provider."""

NEAR = 0.01
"""A ratio this near to that of the two latencies needs no word."""

if TYPE_CHECKING:
    from onnxopt.compare.tally import OutputDeviation
    from onnxopt.compare.verdict import Verification
    from onnxopt.contract import PassReport
    from onnxopt.measure import Latency, Measurement
    from onnxopt.metrics import MetricResult
    from onnxopt.report.data import Candidate, Contender, FloatLayer, Report, SearchReport, SlowPass


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One line of the table that compares the original with the result."""

    label: str
    before: str
    after: str
    change: str


def title(report: Report) -> str:
    """Return the model's file name, or "model" for one that was given as an object."""
    return words.printable(PurePath(report.model).name) if report.model else "model"


def headline(report: Report) -> str:
    """Return the whole report in one sentence."""
    return ", ".join(headline_parts(report))


def headline_parts(report: Report) -> list[str]:
    """Return the headline in parts that are better not broken over lines."""
    before, after = report.before, report.after
    asked = [f"{words.printable(axis)} fixed to {size}" for axis, size in report.fixed_axes]
    if report.opset[0] != report.opset[1]:
        asked.append(f"opset {report.opset[0]} -> {report.opset[1]}")
    if report.applied or asked or before != after:
        nodes = f"{before.nodes:,} -> {words.count(after.nodes, 'node')}"
        # what the passes found is the news; what was asked for is, where they found nothing
        nodes = ", ".join([*([] if report.applied else asked), nodes])
        size = words.sizes(before.bytes, after.bytes)
    else:
        what = (
            f"nothing changed, {words.count(report.dropped, 'edit')} dropped" if report.dropped else "nothing to change"
        )
        nodes = f"{what}, {words.count(before.nodes, 'node')}"
        size = words.size(before.bytes)
    parts = [f"{title(report)}: {nodes}", size, _verified(report), _measured(report)]
    if report.metric is not None:
        parts.append(_metric(report.metric))
    return parts


def _metric(metric: MetricResult) -> str:
    return f"{words.printable(metric.name)} {metric.baseline:.4g} -> {metric.candidate:.4g}"


def is_off_target(report: Report) -> bool:
    """Whether the result was run on a processor and is for something else."""
    return report.target == "cuda" and report.environment.provider.lower().startswith("cpu")


def _verified(report: Report) -> str:
    verification = report.verification
    if verification is None:
        return "NOT VERIFIED"
    if not verification.ok:
        return "FAILED VERIFICATION"
    off_target = is_off_target(report)
    how = verification.extent
    if verification.worst != 0:
        whose = "the range" if off_target else "the output's range"
        how = f"worst deviation {words.deviation(verification.worst)} of {whose}"
    return f"NOT VERIFIED ON {report.target.upper()}, only on the cpu ({how})" if off_target else f"verified ({how})"


def _measured(report: Report) -> str:
    if report.measurement is None:
        return "NOT MEASURED"
    return f"on the cpu {speed(report.measurement)}" if is_off_target(report) else speed(report.measurement)


def speed(measurement: Measurement) -> str:
    """Return e.g. "1.12x faster (95% interval 1.09 to 1.15)"."""
    ratio, low, high = measurement.ratio, measurement.low, measurement.high
    if measurement.verdict == "faster":
        return f"{words.factor(1 / ratio)} faster (95% interval {1 / high:.2f} to {1 / low:.2f})"
    if measurement.verdict == "slower":
        return f"{words.factor(ratio)} slower (95% interval {low:.2f} to {high:.2f})"
    return f"no difference in speed shown (95% interval {1 / high:.2f} to {1 / low:.2f} times as fast)"


def warnings(report: Report) -> list[str]:
    """Return what must not be overlooked: failed or missing verification, missing measurement, a slower result."""
    found = []
    if report.verification is not None and not report.verification.ok:
        found.append(f"FAILED VERIFICATION: {words.sentence(report.verification.reason)}")
    found += not_done(report, verify=True, measure=True)
    if report.measurement is not None and report.measurement.verdict == "slower":
        found.append(slower(report.measurement))
    return found


def not_done(report: Report, *, verify: bool, measure: bool) -> list[str]:
    """Return what could not be done and why, a reason for both only once.

    Args:
        report: The report.
        verify: Whether a missing verification is told.
        measure: Whether a missing measurement is told.
    """
    reasons: dict[str, list[str]] = {}
    if verify and is_off_target(report) and report.verification is not None:
        reasons["outputs were compared on the cpu alone"] = [f"NOT VERIFIED ON {report.target.upper()}"]
    if verify and report.verification is None:
        reasons.setdefault(report.not_verified or "no reason is known", []).append("NOT VERIFIED")
    if measure and report.measurement is None:
        reasons.setdefault(report.not_measured or "no reason is known", []).append("NOT MEASURED")
    return [f"{' and '.join(what)}: {words.sentence(reason)}" for reason, what in reasons.items()]


def slower(measurement: Measurement) -> str:
    """Return the warning about a result that got slower."""
    return f"SLOWER THAN THE ORIGINAL: {speed(measurement)}."


def rows(report: Report) -> list[Row]:
    """Return the comparison of the original with the result."""
    before, after = report.before, report.after
    found = [
        _counted("Nodes", before.nodes, after.nodes),
        _counted("Parameters", before.parameters, after.parameters),
        _sized("File size", before.bytes, after.bytes),
    ]
    if report.verification is not None:
        worst = report.verification.worst
        meaning = "of the output's range" if worst else report.verification.extent
        found.append(Row("Worst deviation", "-", words.deviation(worst), meaning))
    if report.measurement is not None:
        found.extend(time_rows(report.measurement))
    if report.metric is not None:
        found.append(_metric_row(report.metric))
    if report.opset[0] != report.opset[1]:
        found.append(Row("Opset", str(report.opset[0]), str(report.opset[1]), ""))
    for axis, size in report.fixed_axes:
        found.append(Row(f"Axis {words.printable(axis)}", "dynamic", str(size), "fixed"))
    return found


def _counted(label: str, before: int, after: int) -> Row:
    return Row(label, f"{before:,}", f"{after:,}", _difference(before, after))


def _difference(before: int, after: int) -> str:
    if before == after:
        return "unchanged"
    relative = words.change(before, after)
    return f"{after - before:+,}" + (f" ({relative})" if relative else "")


def _sized(label: str, before: int, after: int) -> Row:
    change = words.change(before, after)
    if before != after:
        sign = "+" if after > before else "-"
        change = f"{sign}{words.size(abs(after - before))}" + (f" ({change})" if change else "")
    return Row(label, words.size(before), words.size(after), change)


def time_rows(measurement: Measurement) -> Iterator[Row]:
    """Yield the comparison of latency, load time and memory."""
    yield Row(
        "Latency",
        words.milliseconds(measurement.baseline_ms),
        words.milliseconds(measurement.candidate_ms),
        f"ratio {measurement.ratio:.3f} (95%: {measurement.low:.3f} to {measurement.high:.3f})",
    )
    before, after = measurement.baseline_load_ms, measurement.candidate_load_ms
    yield Row("Load time", words.milliseconds(before), words.milliseconds(after), words.change(before, after))
    before_mb, after_mb = measurement.baseline_peak_mb, measurement.candidate_peak_mb
    if before_mb is not None and after_mb is not None:
        change = words.change(before_mb, after_mb)
        yield Row("Peak memory", f"{words.digits(before_mb)} MB", f"{words.digits(after_mb)} MB", change)


def _metric_row(metric: MetricResult) -> Row:
    drop = f"drop {metric.drop:.4g}"
    if math.isfinite(metric.low) and math.isfinite(metric.high):
        drop += f" (95%: {metric.low:.4g} to {metric.high:.4g})"
    return Row(words.printable(metric.name), f"{metric.baseline:.4g}", f"{metric.candidate:.4g}", drop)


def alike(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Put candidates together of which the same is to be said; those that leave layers in float stand by themselves."""
    groups: dict[tuple[str, str, str], list[Candidate]] = {}
    for candidate in candidates:
        alone = candidate.name if candidate.in_float else ""
        groups.setdefault((candidate.status, candidate.reason, alone), []).append(candidate)
    return list(groups.values())


def searched(search: SearchReport) -> str:
    """Return what was searched for and how it was judged, in a sentence."""
    goal = "the fastest" if search.objective == "latency" else "the smallest that is not slower"
    limits = []
    if search.max_drop is not None:
        limits.append(f"a drop of {words.printable(search.metric)} up to {search.max_drop:.4g}")
    if search.max_error is not None:
        any_error = math.isinf(search.max_error)
        limits.append("any deviation" if any_error else f"a deviation up to {search.max_error:.4g} of the range")
    learnt = f", learnt from {search.calibration_samples:,} others" if search.calibration_samples else ""
    return (
        f"{words.count(len(search.candidates), 'candidate')}; wanted: {goal} with {' and '.join(limits)}; judged by "
        f"{words.count(search.samples, 'sample')}{learnt}"
    )


def candidate_cells(candidate: Candidate | Contender) -> tuple[str, str, str]:
    """Return speed, size and quality of a candidate of a search or a comparison."""
    ratio = candidate.ratio
    speed = "-" if ratio is None else words.factor(1 / ratio)
    size = "-" if candidate.bytes is None else words.size(candidate.bytes)
    return speed, size, _quality(candidate)


def _quality(candidate: Candidate | Contender) -> str:
    metric = candidate.metric
    if metric is None:
        return "-" if candidate.worst is None else f"deviates {words.deviation(candidate.worst)}"
    interval = f" ({metric.low:.2g} to {metric.high:.2g})" if math.isfinite(metric.high - metric.low) else ""
    return f"{_short(metric.drop)}{interval}"


def _short(number: float) -> str:
    return "0" if number == 0 else f"{number:.2g}"


def quality_title(search: SearchReport) -> str:
    """Return what the column of qualities shows."""
    return f"drop of {words.printable(search.metric)}" if search.metric else "worst deviation"


def float_layers(layers: Sequence[FloatLayer], limit: int) -> str:
    """Name the layers left in floating point, at most `limit` of them."""
    named = [words.printable(layer.output) for layer in layers[:limit]]
    rest = len(layers) - len(named)
    return ", ".join(named) + (f" and {rest:,} more" if rest > 0 else "")


def search_notes(search: SearchReport) -> list[str]:
    """Return what a user should know about a search, one sentence each."""
    found = list(search.notes)
    if search.metric_reason:
        found.append(f"The metric is {search.metric}, because {search.metric_reason}.")
    if search.resumed:
        found.append(f"{words.count(search.resumed, 'candidate')} known from before the interruption.")
    return [words.sentence(text) for text in found]


def outcome(done: PassReport, slow: Sequence[SlowPass]) -> str:
    """Return what became of a pass, in words."""
    taken = next((s for s in slow if s.spec == done.spec), None)
    if done.status == "dropped":
        text = _taken_back(taken) if taken is not None else _dropped(done)
    elif done.status == "skipped":
        text = words.sentence(done.reason)
    elif done.status == "kept":
        lost = f", {len(done.dropped):,} dropped" if done.dropped else ""
        text = words.count(len(done.applied), "edit") + lost
    else:
        text = "nothing to do"
    missed = near_misses(done)
    return f"{text}, {words.count(missed, 'near miss', 'near misses')}" if missed else text


def _taken_back(taken: SlowPass) -> str:
    return (
        f"{words.count(taken.edits, 'edit')} taken back, because they make it slower: {taken.ratio:.2f} times the "
        f"original's latency (95% interval {taken.low:.2f} to {taken.high:.2f})"
    )


def _dropped(done: PassReport) -> str:
    return words.sentence(done.reason) if done.reason else f"{words.count(len(done.dropped), 'edit')} dropped"


def near_misses(done: PassReport) -> int:
    """Return how many near misses a pass had."""
    return sum(times for _, times in done.refusals)


def compared(verification: Verification, data: str) -> str:
    """Return how the outputs were compared, in words."""
    how = "with the runtime's optimizations off" if verification.mode == "exact" else "as they will run"
    tried = "".join(f", {_axis(axis)} = {_listed(sizes)}" for axis, sizes in verification.shapes)
    return f"compared {how}, over {words.printable(data)}{tried}"


def _axis(name: str) -> str:
    """Return what an axis is called; "?" is what some exporters write for all of them."""
    return "axes without a name" if name == "?" else words.printable(name)


def _listed(sizes: Sequence[int]) -> str:
    """Return e.g. "1, 2 and 3"."""
    texts = [f"{size:,}" for size in sizes]
    return " and ".join(filter(None, (", ".join(texts[:-1]), *texts[-1:])))


def shown_outputs(verification: Verification, limit: int) -> tuple[list[OutputDeviation], int]:
    """Return the outputs to show, in their order, and how many are left out: the least deviating ones."""
    outputs = list(verification.outputs)
    if len(outputs) <= limit:
        return outputs, 0
    worst = sorted(outputs, key=lambda o: (o.ok, -o.relative if o.relative == o.relative else float("-inf")))
    chosen = {id(o) for o in worst[:limit]}
    return [o for o in outputs if id(o) in chosen], len(outputs) - limit


def placed(measurement: Measurement) -> str:
    """Return how the latency was measured and which provider ran how many nodes, in a sentence."""
    rounds, where = words.count(measurement.rounds, "round"), placement(measurement)
    parts = [f"Latency: median of {rounds}, original and result in turn", ratio_note(measurement)]
    return "; ".join(filter(None, (*parts, f"ran {where}" if where else "")))


def ratio_note(measurement: Measurement) -> str:
    """Say what the ratio is of, where it is visibly not that of the two latencies shown; empty elsewhere."""
    quotient = measurement.candidate_ms / measurement.baseline_ms
    if abs(quotient / measurement.ratio - 1) < NEAR:
        return ""
    return "the ratio is the median of the rounds' ratios, each of its fastest runs, which noise disturbs least"


def placement(measurement: Measurement | Latency) -> str:
    """Return which provider ran how many nodes, e.g. "9 nodes on CPUExecutionProvider"."""
    return ", ".join(f"{words.count(n, 'node')} on {provider}" for provider, n in measurement.placement.items())


def elsewhere(measurement: Measurement | Latency) -> str:
    """Return which nodes do not run on the chosen provider, in a sentence; empty when all do."""
    nodes = measurement.elsewhere
    if not nodes:
        return ""
    shown = ", ".join(words.printable(n) for n in nodes[:ELSEWHERE])
    more = f" and {len(nodes) - ELSEWHERE:,} more" if len(nodes) > ELSEWHERE else ""
    verb = "runs" if len(nodes) == 1 else "run"
    return f"{words.count(len(nodes), 'node')} {verb} elsewhere than on {measurement.provider}: {shown}{more}."


def notes(report: Report) -> list[str]:
    """Return what a user should know besides the figures, one sentence each."""
    found = [*removals.missed(report), *(words.sentence(note) for note in report.notes)]
    if report.search is not None:
        found.extend(search_notes(report.search))
    if report.measurement is not None and report.measurement.elsewhere:
        found.append(elsewhere(report.measurement))
    if report.metric is not None:
        against = "labels" if report.metric.labelled else "the original's outputs"
        name, samples = words.printable(report.metric.name), words.count(report.metric.samples, "sample")
        found.append(f"{name} was computed on {samples} against {against}.")
    return found
