"""Builds candidates and finds out how fast and how good they are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import onnx_ir as ir

from onnxopt import manager
from onnxopt.allocation.forecast import Level
from onnxopt.analysis.shapes import Shapes
from onnxopt.calibrate.collector import calibration
from onnxopt.contract import Calibration, Context, Guarantee, PassReport, Progress, Site
from onnxopt.errors import OnnxOptError
from onnxopt.feeds import Data, Feed
from onnxopt.measure import measure
from onnxopt.metrics import Evaluator, MetricResult
from onnxopt.model import model_bytes
from onnxopt.runtime import RunOptions
from onnxopt.search.candidates import HELPERS, KEEP, TIDYING, Proposal, keeping
from onnxopt.search.decision import Limits, Record, Speed
from onnxopt.search.distance import Distance
from onnxopt.search.pruner import Pruner, lossy
from onnxopt.trial import Denials
from onnxopt.verify import LOSSY_FEEDS, Verifier

SCREEN_SECONDS = 1.5
"""Time for a first look at the speed of a candidate."""

PRECISE_SECONDS = 6.0
"""Time for those that may win; twice as much each time that they are timed again."""

CACHE_BYTES = 512 << 20
"""Outputs of the original that are kept for comparing, all samples together."""

BUILT_BYTES = 1 << 30
"""Candidates that are kept so as not to build them again."""

FEW_SAMPLES = 8
"""So many samples are enough to compare layers with each other."""


class Lab(Protocol):
    """What a search asks about candidates."""

    def examine(self, proposal: Proposal, spared: Mapping[Site, str]) -> Record:
        """Build a candidate, screen its speed and, unless it is slower, judge its quality."""

    def judge(self, proposal: Proposal, spared: Mapping[Site, str]) -> Record:
        """Build a candidate and judge its quality alone."""

    def measure(self, proposal: Proposal, spared: Mapping[Site, str], effort: int) -> Speed:
        """Measure the speed of a candidate, with an effort of at least 1; see `Speed`."""

    def layers(self, proposal: Proposal) -> list[Site]:
        """Return the layers whose precision a candidate lowers, in the order of the graph."""

    def distance(self, proposal: Proposal, spared: Mapping[Site, str]) -> float:
        """Return how far the outputs are from the original's on a few samples that do not judge."""

    def forecast(self) -> tuple[Level, ...]:
        """Return what pruning is expected to do to the outputs, the mildest first; nothing where nothing can go."""


@dataclasses.dataclass(frozen=True, slots=True)
class Bench:
    """What candidates are built from and judged by.

    Attributes:
        reference: The original.
        base: The lossless result, on which lossy passes run.
        options: How models are run.
        ctx: What passes may know, calibration included.
        few: Some of what passes learn from, to compare layers with; it does not judge where there is enough data.
        judging: What judges.
        limits: The budget.
        evaluator: Computes the metric; None for none.
        feed: What models are timed on.
        seed: Seeds bootstraps.
        pruner: Prunes the original; None where nothing is to be pruned.
    """

    reference: ir.Model
    base: ir.Model
    options: RunOptions
    ctx: Context
    few: Sequence[Feed]
    judging: Data | Sequence[Feed]
    limits: Limits
    evaluator: Evaluator | None
    feed: Feed
    seed: int
    pruner: Pruner | None = None


class RuntimeLab:
    """Runs candidates in ONNX Runtime."""

    def __init__(self, bench: Bench, progress: Progress) -> None:
        """Prepare; nothing is run yet."""
        self._bench, self._progress = bench, progress
        self._verifiers: list[Verifier] = []
        self._built: dict[tuple[str, frozenset[Site]], manager.Outcome] = {}
        self._few = list(bench.few[:FEW_SAMPLES]) or [bench.feed]
        fresh = list(_part(bench.judging, 0, FEW_SAMPLES)) or [bench.feed]
        self._apart = Distance(bench.reference, self._few, bench.options)
        self._moved = Distance(bench.reference, fresh, bench.options)

    def build(self, proposal: Proposal, spared: Mapping[Site, str]) -> manager.Outcome:
        """Run the lossy passes on the lossless result, unless it is still known how that ends.

        Raises:
            IdlePassError: If a pass that the candidate is about left no edit.
        """
        key = (proposal.spec, frozenset(spared))
        if key not in self._built:
            outcome = self._run(proposal, spared, self._bench.ctx)
            _require_edits(outcome, proposal)
            if proposal.first:
                before = self._pruned(proposal.first)
                outcome = manager.Outcome(outcome.model, (*before.passes, *outcome.passes), before.denials)
            self._remember(key, outcome)
        return self._built[key]

    def _pruned(self, first: str) -> manager.Outcome:
        """Return the original pruned, with the lossless passes behind."""
        key = (first, frozenset[Site]())
        if key not in self._built:
            assert self._bench.pruner is not None, "only with one such candidates are proposed"
            outcome = self._bench.pruner.prune(first, self._progress)
            _require_edits(lossy(outcome), Proposal("", "", first))
            self._remember(key, outcome)
        return self._built[key]

    def _remember(self, key: tuple[str, frozenset[Site]], outcome: manager.Outcome) -> None:
        """Keep an outcome, and no more of those before than fit."""
        self._built[key] = outcome
        room = BUILT_BYTES
        for known in reversed(list(self._built)):
            room -= model_bytes(self._built[known].model)
            if room < 0 and known != key:
                del self._built[known]

    def _run(self, proposal: Proposal, spared: Mapping[Site, str], ctx: Context) -> manager.Outcome:
        base = self._pruned(proposal.first).model if proposal.first else self._bench.base
        passes = proposal.pipeline.passes
        ctx = dataclasses.replace(ctx, shapes=Shapes(base))
        denials = Denials(spared=spared)
        return manager.run(base, passes, ctx, None, progress=self._progress, denials=denials)

    def keep(self, speed: Speed) -> Record:
        """Return what is known about keeping the model as it is.

        Raises:
            DataError: If the metric does not fit the model or its labels.
            RuntimeFailure: If it does not run.
        """
        base = self._bench.base
        record = self.assess(Record(keeping(base), KEEP.spec, bytes=model_bytes(base), speed=speed), base)
        return dataclasses.replace(record, failure="")

    def examine(self, proposal: Proposal, spared: Mapping[Site, str]) -> Record:
        """Build a candidate, screen its speed and, unless it is slower, judge its quality."""
        record = Record(proposal.name, proposal.spec)
        try:
            model = self.build(proposal, spared).model
            record = dataclasses.replace(record, bytes=model_bytes(model), speed=self._timed(model, 0))
            return record if record.slower else self.assess(record, model)
        except OnnxOptError as error:
            return _failed(record, error)

    def judge(self, proposal: Proposal, spared: Mapping[Site, str]) -> Record:
        """Build a candidate and judge its quality alone."""
        record = Record(proposal.name, proposal.spec)
        try:
            model = self.build(proposal, spared).model
            return self.assess(dataclasses.replace(record, bytes=model_bytes(model)), model)
        except OnnxOptError as error:
            return _failed(record, error)

    def assess(self, record: Record, model: ir.Model) -> Record:
        """Add to what is known about a candidate how far its outputs are off and what that costs.

        Raises:
            DataError: If the metric does not fit the model or its labels.
            RuntimeFailure: If it does not run.
        """
        worst, complaint = self._worst(model)
        if complaint:
            return dataclasses.replace(record, worst=worst, failure=complaint)
        moved = math.sqrt(self._moved(model))
        return dataclasses.replace(record, worst=worst, moved=moved, metric=self.metric(model))

    def _worst(self, model: ir.Model) -> tuple[float, str]:
        """Return the worst deviation and what is wrong besides, such as NaN."""
        limit = self._bench.limits.max_error
        worst = 0.0
        for verifier in self._all_verifiers():
            self._progress.stage("comparing outputs")
            found = verifier.check(model, Guarantee.APPROXIMATE, math.inf)
            worst = max(worst, found.worst)
            if not found.ok:
                return worst, found.reason
            if limit is not None and not worst <= limit:
                break
        return worst, ""

    def _all_verifiers(self) -> list[Verifier]:
        """Return what compares outputs: over all samples where these are limited, else over a few."""
        if not self._verifiers:
            judging, bench = self._bench.judging, self._bench
            limited = bench.limits.max_error not in (None, math.inf)
            starts = range(0, len(judging), LOSSY_FEEDS) if limited else [0]
            size, room = LOSSY_FEEDS if limited else FEW_SAMPLES, CACHE_BYTES // len(starts)
            self._verifiers = [
                Verifier(bench.reference, _part(judging, start, size), bench.options, cache_bytes=room)
                for start in starts
            ]
        return self._verifiers

    def metric(self, model: ir.Model) -> MetricResult | None:
        """Return the task metric of a model."""
        if self._bench.evaluator is None:
            return None
        self._progress.stage("computing the metric")
        return self._bench.evaluator.evaluate(model)

    def measure(self, proposal: Proposal, spared: Mapping[Site, str], effort: int) -> Speed:
        """Measure the speed of a candidate, with an effort of at least 1; see `Speed`."""
        return self._timed(self.build(proposal, spared).model, effort)

    def against(self, model: ir.Model, proposal: Proposal) -> Speed:
        """Measure the time of a model by that of a candidate, in turns."""
        return self._timed(model, 1, self.build(proposal, {}).model)

    def _timed(self, model: ir.Model, effort: int, reference: ir.Model | None = None) -> Speed:
        """Time a candidate against the original or another model, again if a first look sees it slower by a little."""
        found = measure(
            reference or self._bench.reference,
            model,
            feed=self._bench.feed,
            options=self._bench.options,
            budget_seconds=PRECISE_SECONDS * 2 ** (effort - 1) if effort else SCREEN_SECONDS,
            precision=0.02 if effort else 0.1,
            seed=self._bench.seed,
            memory=False,
            progress=self._progress,
        )
        if found.verdict == "slower" and not effort and found.ratio < 1.2:
            return self._timed(model, 1, reference)
        return Speed(found.ratio, found.low, found.high, effort)

    def layers(self, proposal: Proposal) -> list[Site]:
        """Return the layers whose precision a candidate lowers, in the order of the graph."""
        outcome = self.build(proposal, {})
        return [e.site for p in outcome.passes for e in p.applied if p.name not in _helpers(proposal)]

    def distance(self, proposal: Proposal, spared: Mapping[Site, str]) -> float:
        """Return the mean square deviation of the outputs by their mean square, on a few samples."""
        try:
            return self._apart(self._run(proposal, spared, self._few_ctx()).model)
        except OnnxOptError:
            return math.inf

    def forecast(self) -> tuple[Level, ...]:
        """Return what pruning is expected to do to the outputs, the mildest first; nothing where nothing can go."""
        return () if self._bench.pruner is None else self._bench.pruner.forecast()

    def _few_ctx(self) -> Context:
        """Return a context whose passes learn from few samples, which is quicker and hardly worse."""
        ctx = self._bench.ctx
        if ctx.calibration is None:
            return ctx
        return dataclasses.replace(ctx, calibration=self._little(ctx.calibration))

    def _little(self, whole: Calibration) -> Calibration:
        return calibration(self._few, self._bench.options, real=whole.real, progress=self._progress)


class IdlePassError(OnnxOptError):
    """A candidate that is not what it says, because all that a pass did was dropped or crashed."""


class NothingToDoError(IdlePassError):
    """A candidate that is not what it says, because a pass has nothing to do."""


def _require_edits(outcome: manager.Outcome, proposal: Proposal) -> None:
    for done in outcome.passes:
        if not done.applied and done.name not in _helpers(proposal) - {"smooth-activations"}:
            if done.status != "skipped" and (done.reason or done.dropped):
                raise IdlePassError(f"{done.name} {done.reason or done.dropped[0].reason}")
            raise NothingToDoError(f"{done.name} {_idleness(done)}")


def _idleness(done: PassReport) -> str:
    """Return why a pass had nothing to do, with the most frequent reason where there are several."""
    if done.status == "skipped":
        return f"does not apply: {done.reason}"
    if done.refusals:
        return f"finds nothing to do: {max(done.refusals, key=lambda item: item[1])[0]}"
    return "finds nothing to do"


def _helpers(proposal: Proposal) -> set[str]:
    """Return the passes that are beside the point of a candidate; what it consists of is never."""
    tidying = {name for name in proposal.names if name in TIDYING}
    helpers = {name for name in proposal.names if name in HELPERS}
    return tidying if helpers | tidying == set(proposal.names) else helpers | tidying


def _part(data: Data | Sequence[Feed], start: int, size: int) -> Data | Sequence[Feed]:
    end = min(start + size, len(data))
    return data.select(range(start, end)) if isinstance(data, Data) else data[start:end]


def _failed(record: Record, error: Exception) -> Record:
    applies = not isinstance(error, NothingToDoError)
    return dataclasses.replace(record, failure=str(error).rstrip("."), applies=applies)
