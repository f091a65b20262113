"""Quantization for those who know what they want: exactly the passes that a mode stands for."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxopt import manager, slowness
from onnxopt.analysis.selection import Selection
from onnxopt.contract import Context, Guarantee, PassReport, Progress, Silent, Site, Target
from onnxopt.errors import NothingDoneError, UsageError
from onnxopt.feeds import Data
from onnxopt.ground import Settings, Source
from onnxopt.optimize import Result, carry_out
from onnxopt.pipeline import Pipeline, make_pass
from onnxopt.registry import nearest
from onnxopt.trial import Denials

Mode = Literal["static", "dynamic", "weights", "matmul", "float16", "fp16-storage"]
Granularity = Literal["tensor", "channel"]
Ranges = Literal["auto", "minmax", "percentile", "entropy", "mse"]
Method = Literal["rtn", "mse", "gptq"]
MODES: tuple[Mode, ...] = typing.get_args(Mode)


@dataclasses.dataclass(frozen=True, slots=True)
class _Way:
    """What a mode runs, and which options of the scheme go to its pass."""

    pass_name: str
    options: tuple[str, ...] = ()


_WAYS: dict[str, _Way] = {
    "static": _Way("quantize-static", ("ranges",)),
    "dynamic": _Way("quantize-dynamic"),
    "weights": _Way("quantize-weights", ("bits", "granularity", "block", "method")),
    "matmul": _Way("quantize-matmul", ("bits", "block", "method")),
    "float16": _Way("convert-float16"),
    "fp16-storage": _Way("store-float16"),
}
_SMOOTHED = "dynamic"
"""The mode that smooths activations before."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """How to quantize; options that are None are the pass's own.

    Attributes:
        mode: "static": 8-bit layers with activation ranges learnt from data, for convolutional nets. "dynamic": 8-bit
            matrix products whose activations are scaled as they come. "weights": weights alone, for size. "matmul":
            MatMulNBits, for language models. "float16": half precision on cuda. "fp16-storage": weights in half
            precision, computed as before.
        bits: Bits of a weight, with modes "weights" and "matmul": 8, 4 or 2.
        granularity: A scale per "tensor" or per "channel".
        block: A scale per so many elements along the sum instead.
        ranges: How activation ranges follow from the data: "auto", "minmax", "percentile", "entropy" or "mse".
        method: How weights are rounded: "rtn" (to nearest), "mse" (clipped where that lowers the error) or "gptq"
            (errors of one column made up for by the next; learns from data).
        smooth: Whether scale moves from activations into weights first.
    """

    mode: Mode
    bits: int | None = None
    granularity: Granularity | None = None
    block: int | None = None
    ranges: Ranges | None = None
    method: Method | None = None
    smooth: bool | None = None

    def __post_init__(self) -> None:
        """Check the options against each other.

        Raises:
            UsageError: If one does not go with another.
        """
        if self.mode not in _WAYS:
            raise UsageError(
                f'There is no mode "{self.mode}".{nearest(str(self.mode), list(MODES))} Known: {", ".join(MODES)}.'
            )
        for option in ("bits", "granularity", "block", "ranges", "method"):
            if getattr(self, option) is not None and option not in _WAYS[self.mode].options:
                *most, last = (mode for mode, way in _WAYS.items() if option in way.options)
                fit = f"{', '.join(most)} or {last}" if most else last
                raise UsageError(f"{option} is for mode {fit}; leave it out with mode {self.mode}.", option, "mode")
        if self.smooth is not None and self.mode != _SMOOTHED:
            raise UsageError(f"smooth is for mode {_SMOOTHED}; leave it out with mode {self.mode}.", "smooth", "mode")
        if self.block is not None and self.granularity is not None:
            raise UsageError(
                "block and granularity both say what shares a scale; give one of them.", "block", "granularity"
            )

    def pipeline(self, target: Target, *, simplify: bool, data: bool) -> Pipeline:
        """Return the passes.

        Args:
            target: What the simplified model may contain.
            simplify: Whether the "lossless" recipe comes first.
            data: Whether there are real inputs; then smoothing is on unless turned off.
        """
        way = _WAYS[self.mode]
        options = {o: value for o in way.options if (value := getattr(self, o)) is not None}
        smooth = self.mode == _SMOOTHED and (data if self.smooth is None else self.smooth)
        if smooth:
            options["correct_bias"] = True
        return Pipeline(
            (
                *(Pipeline.recipe("lossless").passes if simplify else ()),
                *([make_pass("smooth-activations", {})] if smooth else []),
                make_pass(way.pass_name, options),
            ),
            f"quantize {self.mode}",
        )


def quantize(
    model: Source,
    *,
    mode: Mode,
    bits: int | None = None,
    granularity: Granularity | None = None,
    block: int | None = None,
    ranges: Ranges | None = None,
    method: Method | None = None,
    smooth: bool | None = None,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    simplify: bool = True,
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
    """Quantize a model in one way, whatever it costs unless there is a budget, and report what it costs.

    Passes are not taken out because the model gets slower with them; the report warns. `optimize` looks for the
    fastest result instead.

    Args:
        model: Path, `onnx.ModelProto` or `onnx_ir.Model`. It is not changed.
        mode: What is quantized; see `Scheme`, as for `bits` to `smooth`.
        bits: Bits of a weight.
        granularity: What shares a scale.
        block: So many elements share a scale.
        ranges: How activation ranges follow from the data.
        method: How weights are rounded.
        smooth: Whether scale moves from activations into weights first; by default when there is `data`.
        only: Patterns of names (`*`, `?`, `[ab]`): nodes, outputs and weights to quantize, and no others.
        exclude: Patterns of names to leave as they are.
        simplify: Whether the "lossless" recipe runs first.
        target: As `optimize`, like all that follow.
        opset: Convert to this version of the standard operator set first.
        data: Real inputs.
        verify: Compare the outputs.
        measure: Compare the latencies.
        seed: Seeds generated inputs, sampling and bootstrap.
        max_error: Layers beyond this deviation stay as they are; no limit by default.
        max_drop: Layers beyond this drop of the metric stay as they are.
        metric: What `max_drop` is about.
        labels: One label per sample of `data`.
        shape: Sizes of dynamic axes to run with.
        fix_shape: Sizes of dynamic axes to write into the model.
        provider: Execution provider.
        threads: Intra-op threads per session.
        custom_ops: Libraries with custom operators.
        allow_fallback: Accept other providers.
        force_calibration: Without `data`, learn from generated inputs.
        progress: Told what is being done.

    Returns:
        The quantized model and the report.

    Raises:
        NothingDoneError: If nothing could be quantized; the message says why.
        OnnxOptError: As `optimize`.
    """
    scheme = Scheme(
        mode=mode, bits=bits, granularity=granularity, block=block, ranges=ranges, method=method, smooth=smooth
    )
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
    pipeline = scheme.pipeline(target, simplify=simplify, data=data is not None)
    selection = Selection(tuple(only), tuple(exclude))

    def deny(start: ir.Model, ctx: Context) -> Denials:
        # Told before the passes run and are timed: what it depends on does not change while they do.
        skipped = pipeline.passes[-1].skip_reason(start, ctx)
        if skipped is not None:
            raise NothingDoneError(f"Nothing was quantized: {pipeline.passes[-1].name}: {skipped.rstrip('.')}.")
        return _denials(start, ctx, pipeline, selection)

    result = carry_out(model, pipeline, settings, deny=deny, settle=slowness.accept)
    done = result.report.passes[-1]
    if not done.applied:
        raise NothingDoneError(f"Nothing was quantized: {done.name}: {_why(done)}.")
    return result


def _denials(start: ir.Model, ctx: Context, pipeline: Pipeline, selection: Selection) -> Denials:
    """Return the sites that the user spares.

    Raises:
        UsageError: If a pattern fits no name.
    """
    if not (selection.only or selection.exclude):
        return Denials()
    exact = [p for p in pipeline.passes if p.guarantee is Guarantee.EXACT]
    lossy = [p for p in pipeline.passes if p.guarantee is not Guarantee.EXACT]
    simplified = manager.run(start, exact, ctx).model
    unmatched = selection.unmatched([start, simplified])
    if unmatched is not None:
        pattern, near = unmatched
        offer = f" Near it are: {', '.join(near)}." if near else ""
        raise UsageError(f'No node, output or weight is called "{pattern}".{offer}')
    # An exact edit may be dropped later on: then the names of the start still hold.
    spared = selection.spared(start, start) | selection.spared(start, simplified)
    sites: dict[Site, str] = {
        Site(p.name, graph, output): reason for p in lossy for (graph, output), reason in spared.items()
    }
    return Denials(spared=sites)


def _why(done: PassReport) -> str:
    """Return why a pass left nothing in the model."""
    if done.reason:
        return done.reason.rstrip(".")
    if done.dropped:
        return f"{len(done.dropped)} edits were dropped, the last because {done.dropped[-1].reason.rstrip('.')}"
    if done.refusals:
        reason, times = max(done.refusals, key=lambda item: (item[1], item[0]))
        return f"{times} near {'miss' if times == 1 else 'misses'}, because {reason.rstrip('.')}"
    return "the model has nothing that it applies to"
