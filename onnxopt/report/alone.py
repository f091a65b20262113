"""What a report says of a pruned result beside the original quantized alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxopt.report import summary, words

if TYPE_CHECKING:
    from onnxopt.report.data import Comparison, Contender

TITLE = "Beside quantization alone"


def titles(comparison: Comparison) -> tuple[str, str, str, str]:
    """Return the titles of the columns of `cells`."""
    metrics = [c.metric.name for c in _contenders(comparison) if c.metric is not None]
    return "", "speed", "size", f"drop of {words.printable(metrics[0])}" if metrics else "worst deviation"


def lines(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    """Return a line for the result, then one for each model that is quantized and not pruned."""
    return [(words.printable(each.name), *summary.candidate_cells(each)) for each in _contenders(comparison)]


def sentences(comparison: Comparison) -> list[str]:
    """Return what is wrong with those that are no rivals, and which of both is to be recommended."""
    failed = [
        f"{words.printable(each.name)}: {words.sentence(words.printable(each.failure))}"
        for each in comparison.rivals
        if each.failure
    ]
    return [*failed, comparison.verdict]


def _contenders(comparison: Comparison) -> list[Contender]:
    own = comparison.result
    return [*comparison.rivals] if own is None else [own, *comparison.rivals]
