"""What every run stands on: the options, the models, the inputs, and how the original and candidates are run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from onnxopt import feeds as feeding
from onnxopt import manager, metrics, runtime
from onnxopt import model as models
from onnxopt.analysis.shapes import Shapes
from onnxopt.calibrate.collector import calibration
from onnxopt.compare.branches import never_run
from onnxopt.compare.verdict import Verification
from onnxopt.contract import TARGETS, Context, GraphPass, Guarantee, Progress, Silent, Target
from onnxopt.errors import RuntimeFailure, UsageError, VerificationError
from onnxopt.feeds import Data, Feed
from onnxopt.inputs.split import Split, split
from onnxopt.judge import Budget, ModelJudge
from onnxopt.measure import Measurement
from onnxopt.measure import measure as measure_models
from onnxopt.pipeline import Pipeline
from onnxopt.registry import nearest
from onnxopt.report.data import Objective
from onnxopt.runtime import RunOptions
from onnxopt.trial import Denials
from onnxopt.verify import Verifier

Source = str | os.PathLike[str] | onnx.ModelProto | ir.Model

QUICK_SECONDS, QUICK_PRECISION = 3.0, 0.05
"""What a pass spends on timing one of its candidates, and how precisely it wants to know."""

FEEDS_TO_VERIFY = 8
"""Of the user's data, this many samples are compared output by output."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is told besides model and passes; `optimize` says what each means."""

    target: Target = "portable"
    opset: int | None = None
    data: str | os.PathLike[str] | Data | None = None
    verify: bool = True
    measure: bool = True
    seed: int = 0
    max_error: float | None = None
    max_drop: float | None = None
    metric: str | None = None
    labels: str | os.PathLike[str] | np.ndarray | None = None
    shape: Mapping[str, int] | None = None
    fix_shape: Mapping[str, int] | None = None
    provider: str | None = None
    threads: int = 1
    custom_ops: Sequence[str] = ()
    allow_fallback: bool = False
    force_calibration: bool = False
    objective: Objective = "latency"
    state: str | os.PathLike[str] | None = None
    prune: bool = False
    progress: Progress = dataclasses.field(default_factory=Silent)


class Clock:
    """Wall time of each stage.

    Attributes:
        seconds: (stage, seconds) in order.
    """

    def __init__(self) -> None:
        self.seconds: list[tuple[str, float]] = []

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Take the time of a stage."""
        start = time.perf_counter()
        yield
        self.seconds.append((stage, time.perf_counter() - start))


class Bench:
    """Runs the original and its candidates: the feeds, the verifier and the stopwatch of one `optimize`.

    Attributes:
        not_verified: Why there is no verification; empty when there is one.
        not_measured: Why there is no measurement; empty when there is one.
        described: Where the feeds came from, in words.
        data_notes: What was done to the user's data, in sentences.
    """

    def __init__(
        self,
        reference: ir.Model,
        options: RunOptions,
        samples: Data | None,
        settings: Settings,
        *,
        timeable: bool = True,
    ) -> None:
        self.reference = reference
        self.options = options
        self.not_verified = "" if settings.verify else "verification was turned off"
        self.not_measured = "" if settings.measure else "measuring was turned off"
        if not timeable and settings.measure:
            self.not_measured = f"the target {settings.target} is not here, and times on the cpu tell nothing of it"
        self.described = "no inputs were needed"
        self.data_notes: tuple[str, ...] = ()
        self._samples = samples
        self._shape = settings.shape
        self._seed = settings.seed
        self._feeds: list[Feed] = []
        self._verifier: Verifier | None = None
        self._times: dict[str, float] = {}

    def prepare(self, *, learning: bool) -> None:
        """Find inputs that run and compute the original's outputs.

        A model that ONNX Runtime cannot run here is still optimized: the reason is kept for the report.

        Args:
            learning: Whether passes learn from these inputs, so that they are wanted in any case.
        """
        if self.not_verified and self.not_measured and not learning:
            return
        try:
            self._feeds = self._find_feeds()
            if not self.not_verified:
                self._verifier = Verifier(self.reference, self._feeds, self.options)
        except RuntimeFailure as error:
            self.not_verified = self.not_verified or str(error)
            self.not_measured = self.not_measured or str(error)

    def _find_feeds(self) -> list[Feed]:
        if self._samples is not None:
            feeds = list(self._samples.take(FEEDS_TO_VERIFY))
            self.data_notes = tuple(self._samples.notes)
            self.described = f"{len(feeds)} of {len(self._samples)} samples of {self._samples.name}"
            return feeds
        with runtime.open_session(self.reference, self.options, optimized=True) as session:
            feeds = feeding.generate_runnable(self.reference, session.run, seed=self._seed, shape=self._shape)
        self.described = f"{len(feeds)} sets of generated inputs (seed {self._seed})"
        return feeds

    @property
    def generated(self) -> list[Feed]:
        """The generated inputs; empty when the user gave data or nothing runs."""
        return [] if self._samples is not None else self._feeds

    @property
    def typical(self) -> Feed:
        """What models are timed on: of the inputs that are held, the first of median size."""
        sizes = [sum(value.size for value in feed.values() if isinstance(value, np.ndarray)) for feed in self._feeds]
        return self._feeds[sizes.index(sorted(sizes)[(len(sizes) - 1) // 2])]

    def judge(self, budget: Budget) -> Callable[[], ModelJudge | None]:
        """Return a maker of fresh judges, one per run of the manager."""

        def make() -> ModelJudge | None:
            if self._verifier is None:
                return None
            return ModelJudge(self.reference, self._verifier, self._feeds, self.options, budget)

        return make

    def same(self, candidate: ir.Model) -> Verification | None:
        """Compare an exact candidate with the original."""
        return None if self._verifier is None else self._verifier.check(candidate, Guarantee.EXACT)

    def verify(self, outcome: manager.Outcome, passes: Sequence[GraphPass], budget: Budget) -> Verification | None:
        """Compare the result with the original under the weakest guarantee of the passes that left an edit."""
        kept = {p.guarantee for p, r in zip(passes, outcome.passes, strict=True) if r.applied}
        weakest = (g for g in (Guarantee.REDEFINES, Guarantee.APPROXIMATE) if g in kept)
        return self.check(outcome.model, next(weakest, Guarantee.EXACT), budget)

    def check(self, candidate: ir.Model, guarantee: Guarantee, budget: Budget) -> Verification | None:
        """Compare a finished model with the original under a guarantee."""
        return None if self._verifier is None else self._verifier.check(candidate, guarantee, budget.max_error)

    def branches_not_run(self, result: ir.Model) -> str:
        """Say which branches of the result no input ran."""
        return "" if self._verifier is None else never_run(result, self._feeds, self.options)

    def timed(self, key: str, make: Callable[[], ir.Model]) -> float:
        """Return the time of a candidate of a pass by that of the original, from a short measurement."""
        if key not in self._times:
            measured = measure_models(
                self.reference,
                make(),
                feed=self.typical,
                options=self.options,
                budget_seconds=QUICK_SECONDS,
                precision=QUICK_PRECISION,
                seed=self._seed,
                memory=False,
            )
            self._times[key] = measured.ratio
        return self._times[key]

    @property
    def runs(self) -> bool:
        """Whether there are inputs to run models on."""
        return bool(self._feeds)

    def measure(self, candidate: ir.Model, progress: Progress, seconds: float = 10.0) -> Measurement:
        """Time a candidate against the original, for about so many seconds."""
        return measure_models(
            self.reference,
            candidate,
            feed=self.typical,
            options=self.options,
            budget_seconds=seconds,
            seed=self._seed,
            progress=progress,
        )


@dataclasses.dataclass(frozen=True)
class Ground:
    """What every run stands on: the models, the inputs, and how they are run.

    Attributes:
        name: Path of the model; empty when an object was given.
        settings: What the user said.
        clock: Takes the time of each stage.
        options: How models are run.
        off_target: Why that is not on the target; empty when it is, or the user chose it.
        source: The model as loaded.
        reference: The same with the axes fixed that the user wants fixed: what results are compared with.
        start: The same in the opset the user wants: what passes run on.
        parts: The division of the data; None when nothing learns from it.
        samples: What judges; None without data.
        budget: What lossy passes may cost.
        bench: Runs the original and candidates.
        ctx: What passes may know.
    """

    name: str
    settings: Settings
    clock: Clock
    options: RunOptions
    off_target: str
    source: ir.Model
    reference: ir.Model
    start: ir.Model
    parts: Split | None
    samples: Data | None
    budget: Budget
    bench: Bench
    ctx: Context

    def run(self, pipeline: Pipeline) -> Callable[[Denials, bool], manager.Outcome]:
        """Return what runs a pipeline with denials, verified when the flag is set."""
        judge, progress = self.bench.judge(self.budget), self.settings.progress

        def run(denials: Denials, verified: bool) -> manager.Outcome:
            verdicts = judge() if verified else None
            return manager.run(self.start, pipeline.passes, self.ctx, verdicts, progress=progress, denials=denials)

        return run


def prepare(model: Source, settings: Settings, learns: Callable[[ir.Model], bool]) -> Ground:
    """Load the model and the data, check the options, and run the original.

    Args:
        model: The model.
        settings: What the user said.
        learns: Whether anything that is to be done to the model learns from data.
    """
    clock, progress = Clock(), settings.progress
    options, off_target = _run_options(settings)
    with clock("load"):
        progress.stage("loading")
        source = models.load(model)
        reference = models.fix_shape(source, settings.fix_shape) if settings.fix_shape else source
        samples = _samples(settings.data, reference)
        budget = _budget(settings, samples, reference)
        learning = learns(reference)
        parts = split(samples, settings.seed) if learning and samples is not None else None
        if parts is not None:
            samples, budget = parts.evaluation, budget.on(parts)
        start = reference if settings.opset is None else models.convert_opset(reference, settings.opset)
    bench = Bench(reference, options, samples, settings, timeable=not off_target)
    with clock("original"):
        progress.stage("running the original")
        bench.prepare(learning=learning and settings.force_calibration)
    if start is not reference:
        _require_same(bench, start, settings.opset)
    learnt = (
        parts.calibration if parts is not None else bench.generated if learning and settings.force_calibration else None
    )
    ctx = Context(
        target=settings.target,
        seed=settings.seed,
        evaluate=runtime.evaluate_node,
        shapes=Shapes(start),
        calibration=None if not learnt else calibration(learnt, options, real=parts is not None, progress=progress),
        timed=bench.timed if bench.runs and not off_target else None,
    )
    name = os.fspath(model) if isinstance(model, (str, os.PathLike)) else ""
    return Ground(
        name, settings, clock, options, off_target, source, reference, start, parts, samples, budget, bench, ctx
    )


def _run_options(settings: Settings) -> tuple[RunOptions, str]:
    """Return how models are run, and why that is not on the target; empty when it is, or the user chose it.

    Raises:
        UsageError: If an option cannot be used, or the provider that the user named is not there.
    """
    target, provider, threads = settings.target, settings.provider, settings.threads
    if target not in TARGETS:
        raise UsageError(f'There is no target "{target}".{nearest(target, list(TARGETS))} Known: {", ".join(TARGETS)}.')
    if threads < 1:
        raise UsageError(f"threads must be at least 1, not {threads}.", "threads")
    on_cpu = runtime.run_options(provider, threads, settings.custom_ops, settings.allow_fallback)
    if provider is not None or target != "cuda":
        return on_cpu, ""
    on_target = dataclasses.replace(on_cpu, provider="cuda")
    try:
        runtime.require_provider(on_target)
    except UsageError as error:
        return on_cpu, str(error)
    return on_target, ""


def _samples(data: str | os.PathLike[str] | Data | None, model: ir.Model) -> Data | None:
    if data is None or isinstance(data, Data):
        return data
    return feeding.load_data(os.fspath(data), model)


def _budget(settings: Settings, samples: Data | None, model: ir.Model) -> Budget:
    """Check the options of the budget against each other.

    Raises:
        DataError: If a metric is needed, none is named, and no built-in one fits, or the labels do not fit the samples.
        UsageError: If one of them needs another that is missing, or is out of range.
    """
    max_error, max_drop = settings.max_error, settings.max_drop
    metric, labels = settings.metric, settings.labels
    if max_error is not None and not max_error >= 0:
        raise UsageError(f"max_error must be at least 0, not {max_error}.", "max_error")
    if max_drop is not None and not max_drop >= 0:
        raise UsageError(f"max_drop must be at least 0, not {max_drop}.", "max_drop")
    if samples is None and (max_drop is not None or metric is not None or labels is not None):
        name = "max_drop" if max_drop is not None else "metric" if metric is not None else "labels"
        raise UsageError(f"{name} needs real inputs to score the model on; give them with data.", name, "data")
    if labels is not None and not isinstance(labels, np.ndarray):
        labels = feeding.load_labels(labels)
    if labels is not None and samples is not None:
        metrics.labels_per_sample(labels, len(samples))
    reason = ""
    if metric is None and (max_drop is not None or labels is not None):
        metric, reason = metrics.choose(model, labels)
    return Budget(max_error, max_drop, metric, labels, samples, reason)


def _require_same(bench: Bench, converted: ir.Model, opset: int | None) -> None:
    """Raise when another opset changed what the model computes."""
    verification = bench.same(converted)
    if verification is not None and not verification.ok:
        raise VerificationError(
            f"Converting the opset to {opset} changes the model: {verification.reason} Run without --opset."
        )
