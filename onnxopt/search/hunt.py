"""A search on prepared ground: from the options to the laboratory, and from its winner to a confirmed result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onnxopt import manager
from onnxopt.metrics import Evaluator
from onnxopt.report.environment import environment
from onnxopt.search import lab, state
from onnxopt.search.candidates import Proposal, propose, take_inventory
from onnxopt.search.decision import MOST_EFFORT, SAME_SPEED, Limits, Speed
from onnxopt.search.progress import Labelled
from onnxopt.search.pruner import Pruner
from onnxopt.search.run import Entry, Found, Search
from onnxopt.search.summary import summarize

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnxopt.contract import Progress
    from onnxopt.feeds import Data, Feed
    from onnxopt.ground import Ground, Settings
    from onnxopt.measure import Measurement
    from onnxopt.pipeline import Pipeline
    from onnxopt.report.data import SearchReport


CONFIRMING_SECONDS = (10.0, 20.0, 40.0)
"""Time for measuring a winner anew, and again."""


def proposals(model: ir.Model, settings: Settings) -> list[Proposal]:
    """Return what is worth trying on a model."""
    learning = settings.data is not None or settings.force_calibration
    return propose(take_inventory(model), settings.target, learning=learning, objective=settings.objective)


def any_learns(found: Sequence[Proposal]) -> bool:
    """Return whether any proposal learns from data, so that some has to be set aside for it."""
    return any(p.learns for p in found)


def laboratory(
    ground: Ground,
    base: ir.Model,
    limits: Limits,
    metric: str | None,
    progress: Progress,
    pruner: Pruner | None = None,
) -> lab.RuntimeLab:
    """Return what builds and judges candidates.

    Args:
        ground: The models, the inputs and the options.
        base: The lossless result, on which lossy passes run.
        limits: The budget.
        metric: Name of the metric; None for none.
        progress: Told what is being done.
        pruner: Prunes the original; None where nothing is to be pruned.
    """
    settings, data = ground.settings, ground.budget.data
    evaluator = None
    if metric is not None and data is not None:
        labels = ground.budget.labels
        evaluator = Evaluator(ground.reference, data, labels, metric, ground.options, seed=settings.seed)
    few = ground.bench.generated if ground.parts is None else list(ground.parts.calibration.take(lab.FEW_SAMPLES))
    bench = lab.Bench(
        reference=ground.reference,
        base=base,
        options=ground.options,
        ctx=ground.ctx,
        few=few,
        judging=_judging(ground),
        limits=limits,
        evaluator=evaluator,
        feed=ground.bench.typical,
        seed=settings.seed,
        pruner=pruner,
    )
    return lab.RuntimeLab(bench, progress)


def _judging(ground: Ground) -> Data | list[Feed]:
    return ground.samples if ground.samples is not None else ground.bench.generated


def conclusive(measure: Callable[[float], Measurement]) -> Measurement:
    """Measure a winner for longer and longer while it looks slower, or its interval says nothing.

    Args:
        measure: Measures it for about so many seconds.
    """
    for seconds in CONFIRMING_SECONDS[:-1]:
        found = measure(seconds)
        narrow = found.high - found.low <= SAME_SPEED * found.ratio
        if found.verdict == "faster" or (found.verdict != "slower" and narrow):
            return found
    return measure(CONFIRMING_SECONDS[-1])


class Hunt:
    """One search on prepared ground."""

    def __init__(self, ground: Ground, lossless: Pipeline, base: manager.Outcome, measurement: Measurement) -> None:
        """Prepare to search.

        Args:
            ground: The models, the inputs and the options.
            lossless: The passes that run first.
            base: Their result, on which lossy passes run.
            measurement: How fast it is.
        """
        self._ground, self._base, self._measurement = ground, base, measurement
        self._progress = Labelled(ground.settings.progress)
        budget = ground.budget
        self._limits = Limits(budget.max_error, budget.max_drop)
        self._judging = _judging(ground)
        self._pruner = Pruner(ground, lossless) if ground.settings.prune else None
        self._lab = laboratory(ground, base.model, self._limits, budget.metric, self._progress, self._pruner)

    def run(self) -> tuple[Found, manager.Outcome, Measurement]:
        """Return what was found, the winner, and its measurement, which is not the one it won by."""
        settings = self._ground.settings
        keep = self._lab.keep(self._speed(self._measurement))
        goal = None if self._pruner is None else self._pruner.goal
        search = Search(self._lab, self._limits, settings.objective, self._state(), self._progress, goal)
        measured: dict[str, Measurement] = {}

        def timed(entry: Entry) -> Speed:
            self._progress.label = ""
            model = self._lab.build(entry.proposal, entry.spared).model
            measured[entry.record.name] = conclusive(lambda s: self._ground.bench.measure(model, self._progress, s))
            return self._speed(measured[entry.record.name])

        found = search.confirm(search.run(proposals(self._ground.reference, settings), keep), timed)
        winner = found.winner
        if winner.record.lossless:
            return found, self._base, self._measurement
        outcome = self._lab.build(winner.proposal, winner.spared)
        passes = outcome.passes if winner.proposal.first else (*self._base.passes, *outcome.passes)
        return found, manager.Outcome(outcome.model, passes, self._base.denials), measured[winner.record.name]

    def report(self, found: Found) -> SearchReport:
        """Return the report of the search."""
        ground, parts = self._ground, self._ground.parts
        return summarize(
            found,
            self._limits,
            ground.settings.objective,
            metric=ground.budget.metric or "",
            metric_reason=ground.budget.metric_reason,
            samples=len(self._judging),
            calibration_samples=0 if parts is None else len(parts.calibration),
            real=ground.samples is not None,
        )

    def _speed(self, measured: Measurement) -> Speed:
        return Speed(measured.ratio, measured.low, measured.high, MOST_EFFORT)

    def _state(self) -> state.State:
        ground, settings = self._ground, self._ground.settings
        if settings.state is None:
            return state.State(None, "")
        self._progress.stage("reading model and data")
        options = (
            settings.target,
            settings.opset,
            settings.seed,
            settings.max_error,
            ground.budget.metric,
            dict(settings.shape or {}),
            ground.options,
            environment(ground.options.provider, ground.options.threads),
        )
        key = state.fingerprint(ground.reference, self._judging, ground.budget.labels, options)
        return state.State(Path(settings.state), key)
