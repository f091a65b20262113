"""From what a search found to its report."""

from __future__ import annotations

from collections.abc import Iterator

from onnxopt.report.data import Objective, SearchReport
from onnxopt.report.words import count
from onnxopt.search import outcome
from onnxopt.search.decision import Limits
from onnxopt.search.run import Found

FEW = 20
"""Fewer samples than this say little."""


def summarize(
    found: Found,
    limits: Limits,
    objective: Objective,
    *,
    metric: str,
    metric_reason: str,
    samples: int,
    calibration_samples: int,
    real: bool,
) -> SearchReport:
    """Return the report of a search.

    Args:
        found: What it ended with.
        limits: The budget.
        objective: What was looked for.
        metric: Name of the metric; empty for none.
        metric_reason: Why this metric; empty when it was named.
        samples: How many samples judged.
        calibration_samples: How many were learnt from.
        real: Whether the samples are the user's own.
    """
    records = [e.record for e in found.entries]
    entries = sorted(found.entries, key=lambda e: e is not found.winner)
    return SearchReport(
        objective=objective,
        max_error=limits.max_error,
        max_drop=limits.max_drop,
        metric=metric,
        metric_reason=metric_reason,
        samples=samples,
        calibration_samples=calibration_samples,
        candidates=tuple(outcome.describe(e.record, records, limits, objective) for e in entries),
        resumed=found.resumed,
        notes=tuple(_notes(samples, limits, real=real)),
    )


def _notes(samples: int, limits: Limits, *, real: bool) -> Iterator[str]:
    if not real:
        yield (
            f"Quality was judged by {count(samples, 'set')} of generated inputs, which real ones may differ from; give "
            "real ones with --data."
        )
    elif samples < FEW:
        share = 3 / samples
        yield (
            f"Only {count(samples, 'sample')} judged: what goes wrong with fewer than {share:.0%} of all inputs can "
            "have gone unseen."
        )
    if limits.max_error is not None and limits.max_drop is None and samples >= FEW and real:
        yield (
            f"The worst deviation is that of {count(samples, 'sample')}: up to {3 / samples:.1%} of all inputs may "
            "deviate more, at 95% confidence."
        )
