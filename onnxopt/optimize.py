"""The whole way through: load, passes, verify, measure, report."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxopt import manager, metrics, slowness
from onnxopt.analysis.inspect import summary_stats
from onnxopt.compare.verdict import Verification
from onnxopt.contract import Context, GraphPass, Progress, Silent, Target
from onnxopt.errors import UsageError
from onnxopt.feeds import Data
from onnxopt.ground import Bench, Ground, Settings, Source, prepare
from onnxopt.inputs.likeness import unlike
from onnxopt.judge import Budget
from onnxopt.measure import Measurement
from onnxopt.metrics import MetricResult
from onnxopt.patch import apply_patch
from onnxopt.pipeline import RECIPES, Pipeline
from onnxopt.report.data import OBJECTIVES, SCHEMA_VERSION, Comparison, Objective, Report, SearchReport, SlowPass
from onnxopt.report.environment import environment
from onnxopt.report.removals import reached
from onnxopt.runtime import RunOptions
from onnxopt.search.hunt import Hunt, any_learns, proposals
from onnxopt.search.rivals import PRUNERS, compared
from onnxopt.trial import Denials


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What `optimize` returns.

    Attributes:
        model: The optimized model; the loaded one itself when nothing could be improved.
        report: What was done, what it gained and what it cost.
    """

    model: ir.Model
    report: Report


Deny = Callable[[ir.Model, Context], Denials]
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
    objective: Objective = "latency",
    state: str | os.PathLike[str] | None = None,
    prune: bool = False,
    replay: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Optimize a model, verify it against the original, measure both, and report.

    With a budget (`max_error` or `max_drop`), and neither a recipe nor passes, the best of several ways to quantize
    the model is searched for: see `onnxopt.search`.

    Args:
        model: Path, `onnx.ModelProto` or `onnx_ir.Model`. It is not changed.
        recipe: Name of a recipe or a TOML file. "lossless" by default.
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
        metric: "top1", "ctc", "cosine", "mse", "spearman" or "module:function". By default what fits labels and
            outputs.
        labels: Path of an .npy or .npz, or an array: one label per sample of `data`.
        shape: Sizes of dynamic axes to run with, by axis name.
        fix_shape: Sizes of dynamic axes to write into the model.
        provider: Execution provider to verify and measure on; by default the target's own where it is available.
        threads: Intra-op threads per session.
        custom_ops: Libraries with custom operators to register with ONNX Runtime.
        allow_fallback: Accept that the runtime runs the model, or some of its nodes, on another provider.
        force_calibration: Without `data`, let passes that learn from data learn from generated inputs.
        objective: What to search for: the fastest model within the budget, or the smallest that is not slower.
        state: File that remembers what a search has found out, so that it can go on after an interruption.
        prune: Let the search also try to remove channels, before and besides quantizing, where a forecast leaves hope.
            It needs `data`, and takes its time.
        replay: A patch that `onnxopt.patch.write_patch` made of an earlier result: instead of running passes, that
            result is made again from the same original, verified and measured.
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
        objective=objective,
        state=state,
        prune=prune,
        progress=progress or Silent(),
    )
    if replay is not None:
        told = {"recipe": recipe, "passes": passes, "opset": opset, "fix_shape": fix_shape, "state": state}
        return _replay(model, replay, settings, [name for name, value in told.items() if value is not None])
    if recipe is None and passes is None and (max_error is not None or max_drop is not None):
        return _search(model, settings)
    if objective != "latency" or state is not None or prune:
        name = "state" if state is not None else "prune" if prune else "objective"
        raise UsageError(
            f"{name} is about the search within a budget; give max_drop or max_error, and no recipe or passes.",
            name,
            "max_drop",
            "max_error",
        )
    return carry_out(model, _pipeline(recipe, passes), settings)


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
    ground = prepare(model, settings, lambda _: any(p.wants_data() for p in pipeline.passes))
    bench = ground.bench
    with ground.clock("passes"):
        outcome = ground.run(pipeline)(Denials() if deny is None else deny(ground.start, ground.ctx), True)
    with ground.clock("measure"):
        outcome, measurement, slow = _settle(
            bench, outcome, pipeline.passes, ground.run(pipeline), settle, settings.progress
        )
    with ground.clock("verify"):
        settings.progress.stage("verifying the result")
        verification = bench.verify(outcome, pipeline.passes, ground.budget)
        not_run = bench.branches_not_run(outcome.model)
        metric = _metric(ground.reference, outcome.model, ground.budget, ground.options, bench)
    with ground.clock("comparison"):
        comparison = compared(ground, outcome, measurement)
    if comparison is None:
        ground.clock.seconds.pop()
    notes = (not_run,) if not_run else ()
    told = (outcome, measurement, slow, verification, metric)
    return _result(ground, pipeline, *told, notes=notes, alone=comparison)


def _replay(model: Source, patch: str | os.PathLike[str], settings: Settings, told: Sequence[str]) -> Result:
    """Make a result again from its patch.

    Raises:
        UsageError: If other options say what to do to the model.
        ModelError: If the patch cannot be used, or is for another model.
    """
    if told:
        raise UsageError(f"replay makes what the patch holds; leave out {told[0]}.", "replay", told[0])
    ground = prepare(model, settings, lambda _: False)
    bench, progress = ground.bench, settings.progress
    with ground.clock("passes"):
        result, history = apply_patch(ground.source, patch)
        outcome = manager.Outcome(result, (), Denials())
    with ground.clock("measure"):
        progress.stage("measuring")
        measurement = None if bench.not_measured else bench.measure(result, progress)
    with ground.clock("verify"):
        progress.stage("verifying the result")
        verification = bench.check(result, history.guarantee, ground.budget)
        not_run = bench.branches_not_run(result)
        metric = _metric(ground.reference, result, ground.budget, ground.options, bench)
    note = f"Made again from {os.fspath(patch)}, which holds the result of {_in_words(history.pipeline)}."
    notes = tuple(filter(None, (note, _not_listed(history.pipeline), not_run)))
    replayed = Pipeline((), "replay")
    return _result(ground, replayed, outcome, measurement, (), verification, metric, notes=notes)


def _not_listed(pipeline: str) -> str:
    """Say why no removed groups are listed of a pipeline that prunes; nothing of others."""
    if not any(name in pipeline for name in PRUNERS):
        return ""
    return (
        "A patch holds the result, not how it came about: which groups were removed stands in the report of that run."
    )


def _in_words(pipeline: str) -> str:
    """Name the recipe whose pipeline string this is; otherwise its passes, with room to break the line."""
    recipe = next((name for name in RECIPES if str(Pipeline.recipe(name)) == pipeline), "")
    return f"the recipe {recipe}" if recipe else pipeline.replace(",", ", ") or "no pass"


def _search(model: Source, settings: Settings) -> Result:
    """Search for the best candidate within the budget.

    Raises:
        UsageError: If the search is kept from running or timing models.
    """
    if settings.objective not in OBJECTIVES:
        raise UsageError(f"objective must be {' or '.join(OBJECTIVES)}, not {settings.objective}.", "objective")
    if settings.prune and settings.data is None and not settings.force_calibration:
        raise UsageError("prune needs real inputs to learn from; give them with data.", "prune", "data")
    ground = prepare(model, settings, lambda start: settings.prune or any_learns(proposals(start, settings)))
    if not (settings.verify and settings.measure):
        what = "verified" if not settings.verify else "measured"
        raise UsageError(
            f'A budget alone asks for a search, whose candidates have to be {what}; name a recipe such as "small", or '
            "passes, to do without."
        )
    if ground.off_target:
        raise UsageError(
            f"A search times its candidates on the target. {ground.off_target} With the provider cpu, what is fastest "
            "there is searched for."
        )
    lossless = Pipeline.recipe("lossless")
    if ground.bench.not_verified or ground.bench.not_measured:
        reason = ground.bench.not_verified or ground.bench.not_measured
        with ground.clock("passes"):
            outcome = ground.run(lossless)(Denials(), True)
        note = f"Nothing was searched, because candidates could not be run: {reason}"
        return _result(ground, lossless, outcome, None, (), None, None, notes=(note,))
    with ground.clock("passes"):
        base = ground.run(lossless)(Denials(), True)
    with ground.clock("measure"):
        base, measurement, slow = _settle(
            ground.bench, base, lossless.passes, ground.run(lossless), slowness.settle, settings.progress
        )
    assert measurement is not None
    with ground.clock("search"):
        hunt = Hunt(ground, lossless, base, measurement)
        found, outcome, measurement = hunt.run()
    pipeline = found.winner.proposal.whole(lossless)
    with ground.clock("verify"):
        settings.progress.stage("verifying the result")
        verification = ground.bench.verify(outcome, pipeline.passes, ground.budget)
        not_run = ground.bench.branches_not_run(outcome.model)
    return _result(
        ground,
        pipeline,
        outcome,
        measurement,
        slow,
        verification,
        found.winner.record.metric,
        notes=(not_run,) if not_run else (),
        search=hunt.report(found),
    )


def _result(
    ground: Ground,
    pipeline: Pipeline,
    outcome: manager.Outcome,
    measurement: Measurement | None,
    slow: tuple[SlowPass, ...],
    verification: Verification | None,
    metric: MetricResult | None,
    *,
    notes: tuple[str, ...] = (),
    search: SearchReport | None = None,
    alone: Comparison | None = None,
) -> Result:
    """Put the report together."""
    bench, settings, parts = ground.bench, ground.settings, ground.parts
    said = (*_off_target(ground), *_notes(outcome, pipeline.passes, bench), *notes)
    if parts is not None:
        said = (*said, *filter(None, (parts.note,)), *unlike(parts.calibration, parts.evaluation))
    if metric is not None and search is None and ground.budget.metric_reason:
        said = (*said, f"The metric is {metric.name}, because {ground.budget.metric_reason}.")
    return Result(
        outcome.model,
        Report(
            schema_version=SCHEMA_VERSION,
            model=ground.name,
            output="",
            recipe=pipeline.name,
            pipeline=str(pipeline),
            target=settings.target,
            opset=(_opset(ground.source), _opset(outcome.model)),
            environment=environment(ground.options.provider, ground.options.threads),
            data=bench.described,
            passes=outcome.passes,
            slow_passes=slow,
            before=summary_stats(ground.source),
            after=summary_stats(outcome.model),
            verification=verification,
            not_verified=bench.not_verified,
            measurement=measurement,
            not_measured=bench.not_measured,
            metric=metric,
            notes=said,
            seconds=tuple(ground.clock.seconds),
            fixed_axes=tuple((settings.fix_shape or {}).items()),
            search=search,
            reached=tuple(reached(pipeline.passes, outcome.passes, measurement)),
            alone=alone,
        ),
    )


def _off_target(ground: Ground) -> tuple[str, ...]:
    """Say why the result was run elsewhere than on its target, where that is so."""
    target = ground.settings.target
    if not ground.off_target:
        return ()
    return (f"The result is for {target} and could only be compared on the cpu. {ground.off_target}",)


def _pipeline(recipe: str | None, passes: str | Pipeline | None) -> Pipeline:
    """Return the passes to run.

    Raises:
        UsageError: If both a recipe and passes are given, or one of them cannot be read.
    """
    if recipe is not None and passes is not None:
        raise UsageError("Give either recipe or passes, not both.", "recipe", "passes")
    if isinstance(passes, Pipeline):
        return passes
    return Pipeline.recipe(recipe or "lossless") if passes is None else Pipeline.parse(passes)


def _settle(
    bench: Bench,
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
    reference: ir.Model, result: ir.Model, budget: Budget, options: RunOptions, bench: Bench
) -> MetricResult | None:
    if budget.metric is None or budget.data is None or bench.not_verified:
        return None
    return metrics.evaluate(reference, result, budget.data, budget.labels, budget.metric, options)


def _notes(outcome: manager.Outcome, passes: Sequence[GraphPass], bench: Bench) -> tuple[str, ...]:
    """Return the caveats of the passes that left an edit, each once."""
    caveats = [p.caveat() for p, r in zip(passes, outcome.passes, strict=True) if r.applied]
    return (*dict.fromkeys(c for c in caveats if c), *bench.data_notes)


def _opset(model: ir.Model) -> int:
    return model.opset_imports.get("", 0)
