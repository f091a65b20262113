from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from onnxopt.analysis.inspect import ModelStats
from onnxopt.compare.tally import OutputDeviation
from onnxopt.compare.verdict import Verification
from onnxopt.contract import AppliedEdit, DroppedEdit, PassReport, Site
from onnxopt.measure import Measurement
from onnxopt.metrics import MetricResult
from onnxopt.removed import Change, Damage, Fit, Removed, Width
from onnxopt.report.data import (
    SCHEMA_VERSION,
    Candidate,
    Comparison,
    Contender,
    Environment,
    FloatLayer,
    Reached,
    Report,
    SearchReport,
    SlowPass,
)

LONG = "/encoder/layer.11/attention/self/query/some_very_long_component_name/Add_output_0"


def pass_report(name: str, status: Any, **changes: Any) -> PassReport:
    plain = PassReport(
        name=name,
        spec=name,
        guarantee="exact",
        status=status,
        reason="",
        applied=(),
        dropped=(),
        refusals=(),
        seconds=0.0123,
    )
    return dataclasses.replace(plain, **changes)


def applied(name: str, output: str, summary: str, graph: str = "", **changes: Any) -> AppliedEdit:
    return AppliedEdit(Site(name, graph, output), summary, **changes)


def removed(name: str, before: int, after: int, **changes: Any) -> Removed:
    plain = Removed(
        name=name,
        unit="channels",
        units=Change(before, after),
        widths=(Width(name, "outputs", before, after),),
        channels=Change(200, 200 - before + after),
        parameters=Change(1000, 1000 - 2 * (before - after)),
        macs=Change(50_000, 40_000),
    )
    return dataclasses.replace(plain, **changes)


def pruned() -> PassReport:
    """Two groups that one pass made narrower, and a layer that was fitted."""
    first = removed(
        "conv1.weight",
        64,
        48,
        predicted=Damage(0.0213, "outputs"),
        unrepaired=Damage(0.5, "layers"),
        measured=Damage(0.034, "layers"),
        behind=("y1",),
    )
    second = removed(
        "attention.weight",
        12,
        3,
        unit="blocks of 16 channels",
        channels=Change(184, 40),
        parameters=Change(968, 500),
        macs=Change(40_000, 39_990),
    )
    edits = (
        applied("prune-channels", "conv1.weight", "64 to 48 channels", removed=first),
        applied("prune-channels", "attention.weight", "12 to 3 blocks of 16 channels", removed=second),
        applied("prune-channels", "y1", "weights fitted", fit=Fit("y1", 0.5, 0.034)),
    )
    return pass_report("prune-channels", "kept", spec="prune-channels{latency=0.85}", applied=edits)


def passes() -> tuple[PassReport, ...]:
    return (
        pass_report(
            "fold-constants",
            "kept",
            applied=tuple(applied("fold-constants", f"/Slice_{i}_output_0", "Slice computed") for i in range(34)),
            seconds=0.034,
        ),
        pass_report("remove-identities", "unchanged", refusals=(("Dropout in training mode", 2),)),
        pass_report(
            "merge-common-subexpressions",
            "kept",
            applied=(applied("merge", LONG, "same as /Other_output_0", "If_3.then_branch"),),
            dropped=(
                DroppedEdit(Site("merge", "", "/bad_output_0"), "same as /x", "output logits deviates by 3.4e-02"),
            ),
        ),
        pass_report("fuse-conv-bn", "skipped", reason="the model has no BatchNormalization"),
        pass_report("crashing", "dropped", spec="crashing{x=1}", reason="crashed with ValueError: no"),
        pass_report("quantize-weights", "dropped", guarantee="approximate", reason="measured slower"),
    )


MEASUREMENT = Measurement(
    ratio=0.893,
    low=0.87,
    high=0.917,
    verdict="faster",
    rounds=212,
    baseline_ms=1.234,
    candidate_ms=1.101,
    baseline_load_ms=8.1,
    candidate_load_ms=6.2,
    baseline_peak_mb=52.1,
    candidate_peak_mb=51.8,
    threads=1,
    provider="cpu",
    placement={"CPUExecutionProvider": 1190},
    elsewhere=(),
    sessions=5,
)

LOGITS = OutputDeviation(
    name="logits",
    kind="float",
    max_abs=1.2e-6,
    relative=2.1e-7,
    cosine=0.9999999,
    first_index=(0, 3),
    tolerance=1e-5,
    ok=True,
)

VERIFICATION = Verification(
    ok=True,
    reason="",
    mode="exact",
    outputs=(LOGITS,),
    feeds=3,
    worst=2.1e-7,
    shapes=(("batch", (1, 2)),),
    notes=("with the runtime's optimizations on the deviation is 3.0e-07",),
)

METRIC = MetricResult(
    name="top1", baseline=0.978, candidate=0.977, drop=0.001, low=-0.002, high=0.004, samples=1000, labelled=True
)


def candidate(name: str, status: Any, ratio: float | None = None, drop: float = 0.0, **changes: Any) -> Candidate:
    plain = Candidate(
        name=name,
        pipeline=f"quantize-{name.partition(' ')[0]},quantize-weights",
        status=status,
        reason=f"because it is {status}",
        ratio=ratio,
        low=None if ratio is None else 0.98 * ratio,
        high=None if ratio is None else 1.02 * ratio,
        bytes=None if ratio is None else int(1_850_000 * ratio),
        worst=None if ratio is None else 0.01,
        metric=None if ratio is None else dataclasses.replace(METRIC, drop=drop, low=-drop, high=2 * drop),
        in_float=(),
    )
    return dataclasses.replace(plain, **changes)


SEARCH = SearchReport(
    objective="latency",
    max_error=None,
    max_drop=0.005,
    metric="top1",
    metric_reason="the labels are whole numbers",
    samples=872,
    calibration_samples=128,
    candidates=(
        candidate(
            "static int8, 2 layers in float",
            "winner",
            0.4,
            0.001,
            in_float=(FloatLayer("", LONG, "it costs most"), FloatLayer("If_3.then_branch", "/b", "it costs much")),
        ),
        candidate("keep fp32", "kept", 0.9, pipeline=""),
        candidate("static int8", "over budget", 0.3, 0.02),
        candidate("dynamic int8", "slower", 1.3, 0.002),
        candidate("8-bit weights", "not proven", 0.9, 0.004),
        candidate("4-bit <b>blocks</b>", "failed", reason="MatMulNBits failed: no kernel"),
    ),
    resumed=2,
    notes=("Only 12 samples judged.",),
)

REPORT = Report(
    schema_version=SCHEMA_VERSION,
    model="models/encoder.onnx",
    output="",
    recipe="lossless",
    pipeline="fold-constants,fuse-conv-bn",
    target="portable",
    opset=(17, 17),
    environment=Environment(
        versions=(("onnxopt", "0.1.0"), ("onnxruntime", "1.32.0")),
        python="3.11.7",
        machine="Example CPU, 2 cores, Linux 6.1 on x86_64",
        provider="cpu",
        threads=1,
    ),
    data="3 sets of generated inputs (seed 0)",
    passes=passes(),
    slow_passes=(SlowPass("quantize-weights", "quantize-weights", 1.2, 1.15, 1.24, 12),),
    before=ModelStats(nodes=1234, parameters=462_346, bytes=1_852_000, initializer_bytes=1_849_384),
    after=ModelStats(nodes=1190, parameters=461_962, bytes=1_850_464, initializer_bytes=1_847_848),
    verification=VERIFICATION,
    not_verified="",
    measurement=MEASUREMENT,
    not_measured="",
    metric=None,
    notes=("Zeros alone bring no speed in this runtime.",),
    seconds=(("load", 0.12), ("passes", 0.5), ("measure", 6.1)),
)


@pytest.fixture
def report() -> Report:
    return REPORT


@pytest.fixture
def removals(make: Callable[..., Any]) -> Any:
    """Return a report of a pass that made groups narrower."""
    goal = Reached("prune-channels{latency=0.85}", "time", 0.85, 0.862, 0.84, 0.88)
    return make(passes=(*passes(), pruned()), reached=(goal,))


@pytest.fixture
def beside() -> Comparison:
    """A pruned result beside quantization alone: one that is faster, and one that does not run."""
    own = Contender("this result", "prune-channels", "", 0.5, 0.48, 0.52, 900_000, 0.2, METRIC)
    int8 = Contender("static [int8]", "quantize-static", "", 0.4, 0.38, 0.42, 400_000, 0.1, METRIC)
    failed = Contender("half", "convert-float16", "it does not run", None, None, None, None, None, None)
    return Comparison(own, (int8, failed), int8.name, 1.25, 1.2, 1.3, "Pruning is not to be recommended here.")


@pytest.fixture
def make() -> Callable[..., Any]:
    """Return a maker of variants: of the report, and of the parts named in brackets."""

    def variant(**changes: Any) -> Report:
        for part, base in (
            ("verification", VERIFICATION),
            ("measurement", MEASUREMENT),
            ("metric", METRIC),
            ("search", SEARCH),
        ):
            if isinstance(changes.get(part), dict):
                changes[part] = dataclasses.replace(base, **changes[part])
        return dataclasses.replace(REPORT, **changes)

    return variant


@pytest.fixture
def logits() -> OutputDeviation:
    return LOGITS
