"""The whole way through: load, passes, verify, measure, report."""

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
from onnxopt import manager, metrics, runtime, slowness
from onnxopt import model as models
from onnxopt.analysis.inspect import summary_stats
from onnxopt.analysis.shapes import Shapes
from onnxopt.calibrate.collector import calibration
from onnxopt.compare.branches import never_run
from onnxopt.contract import TARGETS, Context, GraphPass, Guarantee, Progress, Silent, Target
from onnxopt.errors import RuntimeFailure, UsageError, VerificationError
from onnxopt.feeds import Data, Feed
from onnxopt.inputs.split import split
from onnxopt.judge import Budget, ModelJudge
from onnxopt.measure import Measurement
from onnxopt.measure import measure as measure_models
from onnxopt.metrics import MetricResult
from onnxopt.pipeline import BUDGET_RECIPE, Pipeline
from onnxopt.registry import nearest
from onnxopt.report.data import SCHEMA_VERSION, Report, SlowPass
from onnxopt.report.environment import environment
from onnxopt.runtime import RunOptions
from onnxopt.verify import Verification, Verifier

Source = str | os.PathLike[str] | onnx.ModelProto | ir.Model

FEEDS_TO_VERIFY = 8
"""Of the user's data, this many samples are compared output by output."""


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What `optimize` returns.

    Attributes:
        model: The optimized model; the loaded one itself when nothing could be improved.
        report: What was done, what it gained and what it cost.
    """

    model: ir.Model
    report: Report


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
    progress: Progress = dataclasses.field(default_factory=Silent)


Deny = Callable[[ir.Model, Context], manager.Denials]
"""Says what must not be done to a model."""

Settle = Callable[
    [manager.Outcome, Sequence[GraphPass], slowness.Run, slowness.Measure],
    slowness.Settled,
]
"""Measures an outcome, and may run the passes again without some of them."""


def optimize(
    model: Source,
    *,
    recipe: str | None = None,
    passes: str | Pipeline | None = None,
    target: Target = "portable",
    opset: int | None = None,
    data: str | os.PathLike[str] | Data | None = None,
    verify: bool = True,
    measure: bool = True,
    seed: int = 0,
    max_error: float | None = None,
    max_drop: float | None = None,
    metric: str | None = None,
    labels: str | os.PathLike[str] | np.ndarray | None = None,
    shape: Mapping[str, int] | None = None,
    fix_shape: Mapping[str, int] | None = None,
    provider: str | None = None,
    threads: int = 1,
    custom_ops: Sequence[str] = (),
    allow_fallback: bool = False,
    force_calibration: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Optimize a model, verify it against the original, measure both, and report.

    Args:
        model: Path, `onnx.ModelProto` or `onnx_ir.Model`. It is not changed.
        recipe: Name of a recipe or a TOML file. "lossless" by default; with a budget (`max_error` or `max_drop`) the
            recipe "small".
        passes: A pipeline string such as "fuse-conv-bn,prune-weights{ratio=0.5}", instead of a recipe.
        target: "portable" emits standard ops of the model's own opset; "cpu" and "cuda" may also emit ops that ONNX
            Runtime has kernels for on that provider.
        opset: Convert the standard operator set to this version first; verified like an edit.
        data: Real inputs (see `onnxopt.feeds.load_data` for the forms) instead of generated ones.
        verify: Compare outputs in ONNX Runtime; edits that fail are dropped.
        measure: Compare latencies; passes that make the model slower are dropped.
        seed: Seeds generated inputs, sampling and bootstrap.
        max_error: Budget of lossy passes: worst deviation of an output relative to its range. `inf` for none.
        max_drop: Budget of lossy passes: largest drop of the metric, as a fraction (0.005 is half a point).
        metric: "top1", "cosine", "mse", "spearman" or "module:function". "top1" by default where it is needed.
        labels: Path of an .npy or .npz, or an array: one label per sample of `data`.
        shape: Sizes of dynamic axes to run with, by axis name.
        fix_shape: Sizes of dynamic axes to write into the model.
        provider: Execution provider to verify and measure on; by default the target's own where it is available.
        threads: Intra-op threads per session.
        custom_ops: Libraries with custom operators to register with ONNX Runtime.
        allow_fallback: Accept that the runtime runs the model, or some of its nodes, on another provider.
        force_calibration: Without `data`, let passes that learn from data learn from generated inputs.
        progress: Told what is being done.

    Returns:
        The optimized model and the report.

    Raises:
        OnnxOptError: For any input, option or data that cannot be used, and as `VerificationError` when raising the
            opset changes the outputs. The message says what to do.
    """
    settings = Settings(
        target=target,
        opset=opset,
        data=data,
        verify=verify,
        measure=measure,
        seed=seed,
        max_error=max_error,
        max_drop=max_drop,
        metric=metric,
        labels=labels,
        shape=shape,
        fix_shape=fix_shape,
        provider=provider,
        threads=threads,
        custom_ops=custom_ops,
        allow_fallback=allow_fallback,
        force_calibration=force_calibration,
        progress=progress or Silent(),
    )
    return carry_out(model, _pipeline(recipe, passes, max_error, max_drop), settings)


def carry_out(
    model: Source, pipeline: Pipeline, settings: Settings, *, deny: Deny | None = None, settle: Settle = slowness.settle
) -> Result:
    """Run a pipeline as told: `optimize` once its options are read, and what `quantize` does in its own way.

    Args:
        model: The model; it is not changed.
        pipeline: The passes.
        settings: Everything else that a user may say.
        deny: Says what to leave out from the start; called with the model that the passes will get.
        settle: Measures the result, and decides what to do when it is slower.

    Returns:
        The result and the report.

    Raises:
        OnnxOptError: As `optimize`.
    """
    clock, progress = _Clock(), settings.progress
    options = _run_options(settings)
    with clock("load"):
        progress.stage("loading")
        source = models.load(model)
        reference = models.fix_shape(source, settings.fix_shape) if settings.fix_shape else source
        samples = _samples(settings.data, reference)
        budget = _budget(settings, samples)
        learning = any(p.wants_data() for p in pipeline.passes)
        parts = split(samples, settings.seed) if learning and samples is not None else None
        if parts is not None:
            samples, budget = parts.evaluation, budget.on(parts)
        start = reference if settings.opset is None else models.convert_opset(reference, settings.opset)
    bench = _Bench(reference, options, samples, settings)
    with clock("original"):
        progress.stage("running the original")
        bench.prepare()
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
    )
    judge = bench.judge(budget)

    def run(denials: manager.Denials, verified: bool) -> manager.Outcome:
        return manager.run(
            start, pipeline.passes, ctx, judge() if verified else None, progress=progress, denials=denials
        )

    with clock("passes"):
        outcome = run(manager.Denials() if deny is None else deny(start, ctx), True)
    with clock("measure"):
        outcome, measurement, slow = _settle(bench, outcome, pipeline.passes, run, settle, progress)
    with clock("verify"):
        progress.stage("verifying the result")
        verification = bench.verify(outcome, pipeline.passes, budget)
        not_run = bench.branches_not_run(outcome.model)
        task_metric = _metric(reference, outcome.model, budget, options, bench)
    return Result(
        outcome.model,
        Report(
            schema_version=SCHEMA_VERSION,
            model=os.fspath(model) if isinstance(model, (str, os.PathLike)) else "",
            output="",
            recipe=pipeline.name,
            pipeline=str(pipeline),
            target=settings.target,
            opset=(_opset(source), _opset(outcome.model)),
            environment=environment(options.provider, options.threads),
            data=bench.described,
            passes=outcome.passes,
            slow_passes=slow,
            before=summary_stats(source),
            after=summary_stats(outcome.model),
            verification=verification,
            not_verified=bench.not_verified,
            measurement=measurement,
            not_measured=bench.not_measured,
            metric=task_metric,
            notes=tuple(filter(None, (*_notes(outcome, pipeline.passes, bench), parts.note if parts else "", not_run))),
            seconds=tuple(clock.seconds),
            fixed_axes=tuple((settings.fix_shape or {}).items()),
        ),
    )


class _Clock:
    """Wall time of each stage."""

    def __init__(self) -> None:
        self.seconds: list[tuple[str, float]] = []

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds.append((stage, time.perf_counter() - start))


def _pipeline(
    recipe: str | None, passes: str | Pipeline | None, max_error: float | None, max_drop: float | None
) -> Pipeline:
    """Return the passes to run.

    Raises:
        UsageError: If both a recipe and passes are given, or one of them cannot be read.
    """
    if recipe is not None and passes is not None:
        raise UsageError("Give either recipe or passes, not both.", "recipe", "passes")
    if isinstance(passes, Pipeline):
        return passes
    if passes is not None:
        return Pipeline.parse(passes)
    budgeted = max_error is not None or max_drop is not None
    return Pipeline.recipe(recipe or (BUDGET_RECIPE if budgeted else "lossless"))


def _run_options(settings: Settings) -> RunOptions:
    target, provider, threads = settings.target, settings.provider, settings.threads
    if target not in TARGETS:
        raise UsageError(f'There is no target "{target}".{nearest(target, list(TARGETS))} Known: {", ".join(TARGETS)}.')
    if threads < 1:
        raise UsageError(f"threads must be at least 1, not {threads}.", "threads")
    if provider is None:
        wanted = "cuda" if target == "cuda" else "cpu"
        provider = wanted if wanted == "cpu" or _has_cuda() else "cpu"
    return RunOptions(provider, threads, tuple(settings.custom_ops), settings.allow_fallback)


def _has_cuda() -> bool:
    return "CUDAExecutionProvider" in runtime.available_providers()


def _samples(data: str | os.PathLike[str] | Data | None, model: ir.Model) -> Data | None:
    if data is None or isinstance(data, Data):
        return data
    return feeding.load_data(os.fspath(data), model)


def _budget(settings: Settings, samples: Data | None) -> Budget:
    """Check the options of the budget against each other.

    Raises:
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
    if metric is None and (max_drop is not None or labels is not None):
        metric = "top1"
    return Budget(max_error, max_drop, metric, labels, samples)


class _Bench:
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
    ) -> None:
        self.reference = reference
        self.options = options
        self.not_verified = "" if settings.verify else "verification was turned off"
        self.not_measured = "" if settings.measure else "measuring was turned off"
        self.described = "no inputs were needed"
        self.data_notes: tuple[str, ...] = ()
        self._samples = samples
        self._shape = settings.shape
        self._seed = settings.seed
        self._feeds: list[Feed] = []
        self._verifier: Verifier | None = None

    def prepare(self) -> None:
        """Find inputs that run and compute the original's outputs.

        A model that ONNX Runtime cannot run here is still optimized: the reason is kept for the report.
        """
        if self.not_verified and self.not_measured:
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
        if self._verifier is None:
            return None
        kept = {p.guarantee for p, r in zip(passes, outcome.passes, strict=True) if r.applied}
        for guarantee in (Guarantee.REDEFINES, Guarantee.APPROXIMATE):
            if guarantee in kept:
                return self._verifier.check(outcome.model, guarantee, budget.max_error)
        return self._verifier.check(outcome.model, Guarantee.EXACT)

    def branches_not_run(self, result: ir.Model) -> str:
        """Say which branches of the result no input ran."""
        return "" if self._verifier is None else never_run(result, self._feeds, self.options)

    def measure(self, candidate: ir.Model, progress: Progress) -> Measurement:
        """Time a candidate against the original."""
        return measure_models(
            self.reference,
            candidate,
            feed=self._feeds[0],
            options=self.options,
            seed=self._seed,
            progress=progress,
        )


def _require_same(bench: _Bench, converted: ir.Model, opset: int | None) -> None:
    """Raise when another opset changed what the model computes."""
    verification = bench.same(converted)
    if verification is not None and not verification.ok:
        raise VerificationError(
            f"Converting the opset to {opset} changes the model: {verification.reason} Run without --opset."
        )


def _settle(
    bench: _Bench,
    outcome: manager.Outcome,
    passes: Sequence[GraphPass],
    run: slowness.Run,
    settle: Settle,
    progress: Progress,
) -> tuple[manager.Outcome, Measurement | None, tuple[SlowPass, ...]]:
    """Measure, and do about a slower model what `settle` does."""
    if bench.not_measured:
        return outcome, None, ()

    def timed(candidate: ir.Model) -> Measurement:
        progress.stage("measuring")
        return bench.measure(candidate, progress)

    settled = settle(outcome, passes, run, timed)
    return settled.outcome, settled.measurement, settled.slow_passes


def _metric(
    reference: ir.Model, result: ir.Model, budget: Budget, options: RunOptions, bench: _Bench
) -> MetricResult | None:
    if budget.metric is None or budget.data is None or bench.not_verified:
        return None
    return metrics.evaluate(reference, result, budget.data, budget.labels, budget.metric, options)


def _notes(outcome: manager.Outcome, passes: Sequence[GraphPass], bench: _Bench) -> tuple[str, ...]:
    """Return the caveats of the passes that left an edit, each once."""
    caveats = [p.caveat() for p, r in zip(passes, outcome.passes, strict=True) if r.applied]
    return (*dict.fromkeys(c for c in caveats if c), *bench.data_notes)


def _opset(model: ir.Model) -> int:
    return model.opset_imports.get("", 0)
