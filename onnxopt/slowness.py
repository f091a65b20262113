"""Makes sure that what comes out is not slower, and names the pass that made it so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from onnxopt.report.data import SlowPass

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from onnxopt.contract import GraphPass
    from onnxopt.manager import Outcome
    from onnxopt.measure import Measurement
    from onnxopt.trial import Denials

Measure = Callable[["ir.Model"], "Measurement"]
"""Times a model against the original."""

Run = Callable[["Denials", bool], "Outcome"]
"""Runs the pipeline with these denials; verified when the flag is set."""


@dataclasses.dataclass(frozen=True, slots=True)
class Settled:
    """A result that did not measure slower, and what had to go for it."""

    outcome: Outcome
    measurement: Measurement
    slow_passes: tuple[SlowPass, ...]


def settle(outcome: Outcome, passes: Sequence[GraphPass], run: Run, measure: Measure) -> Settled:
    """Take out slow passes, one after the other, until the model does not measure slower than the original.

    A slowdown must show in two measurements before anything is taken out.

    Args:
        outcome: The verified result of all passes.
        passes: The pipeline.
        run: Runs the pipeline again without some passes.
        measure: Times a model against the original.
    """
    slow: list[SlowPass] = []
    measurement = measure(outcome.model)
    while measurement.verdict == "slower":
        again = measure(outcome.model)
        if again.verdict != "slower":
            return Settled(outcome, again, tuple(slow))
        position, evidence = _first_slow(outcome, run, measure, again)
        slow.append(
            SlowPass(
                name=passes[position].name,
                spec=outcome.passes[position].spec,
                ratio=evidence.ratio,
                low=evidence.low,
                high=evidence.high,
                edits=len(outcome.passes[position].applied),
            )
        )
        denials = outcome.denials.copy()
        denials.passes[position] = f"measured slower: {evidence.sentence()}"
        outcome = run(denials, True)
        measurement = measure(outcome.model)
    return Settled(outcome, measurement, tuple(slow))


def accept(outcome: Outcome, passes: Sequence[GraphPass], run: Run, measure: Measure) -> Settled:
    """Measure, and keep everything, slower or not: for those who said exactly which passes they want.

    Args:
        outcome: The verified result of all passes.
        passes: The pipeline.
        run: Runs the pipeline again; not needed here.
        measure: Times a model against the original.
    """
    return Settled(outcome, measure(outcome.model), ())


def _first_slow(outcome: Outcome, run: Run, measure: Measure, last: Measurement) -> tuple[int, Measurement]:
    """Bisect to the first pass with which the model measures slower than the original."""
    active = [i for i, p in enumerate(outcome.passes) if p.applied]
    fine, slow, evidence = 0, len(active), last
    while slow - fine > 1:
        middle = (fine + slow) // 2
        denials = outcome.denials.copy()
        denials.passes.update(dict.fromkeys(active[middle:], "left out while looking for the slow pass"))
        measured = measure(run(denials, False).model)
        if measured.verdict == "slower":
            slow, evidence = middle, measured
        else:
            fine = middle
    return active[slow - 1], evidence
