"""What a run of `optimize` reports, as plain frozen values."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from onnxopt.analysis.inspect import ModelStats
    from onnxopt.compare.verdict import Verification
    from onnxopt.contract import PassReport
    from onnxopt.measure import Measurement
    from onnxopt.metrics import MetricResult

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Environment:
    """Where the run took place.

    Attributes:
        versions: (package, version) pairs of onnxopt, onnx, onnx-ir and the runtime.
        python: Version of Python.
        machine: Processor and operating system in words.
        provider: Execution provider by its short name.
        threads: Threads the runtime used per session.
    """

    versions: tuple[tuple[str, str], ...]
    python: str
    machine: str
    provider: str
    threads: int


@dataclasses.dataclass(frozen=True, slots=True)
class SlowPass:
    """A pass that was taken out again because the model measured slower with it.

    Attributes:
        name: Name of the pass.
        spec: The pass as a pipeline string.
        ratio: Time with it over time of the original; above 1 is slower.
        low: Lower end of the 95% interval of the ratio.
        high: Upper end.
        edits: How many edits were taken back.
    """

    name: str
    spec: str
    ratio: float
    low: float
    high: float
    edits: int


CandidateStatus = Literal[
    "winner", "kept", "over budget", "not proven", "slower", "not tried", "not applicable", "failed"
]

Objective = Literal["latency", "size"]
OBJECTIVES: tuple[Objective, ...] = ("latency", "size")


@dataclasses.dataclass(frozen=True, slots=True)
class FloatLayer:
    """A layer that the search left in floating point.

    Attributes:
        graph: Path of the graph it is in; empty for the main graph.
        output: Name of its first output.
        reason: Why it was left alone, in words.
    """

    graph: str
    output: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """One way to make the model faster or smaller that the search tried.

    Attributes:
        name: What it is, in a few words.
        pipeline: Its lossy passes; what prunes runs before the lossless ones, all else behind them. Empty for keeping
            the model as it is.
        status: "winner", "kept" (within the budget, but another one is better), "over budget", "not proven" (within the
            budget as far as the samples show, which are too few), "slower" (than the original), "not tried" (because
            it would not win), "not applicable" (the model has nothing for it to do) or "failed".
        reason: Why, in words.
        ratio: Time of the candidate by time of the original; None when it was not measured.
        low: Lower end of the 95% interval of the ratio.
        high: Upper end.
        bytes: Size in files; None when there is no model.
        worst: Worst deviation of an output relative to its range; None when quality was not looked at.
        metric: The task metric; None when there is none, or quality was not looked at.
        in_float: Layers that were left in floating point to meet the budget.
    """

    name: str
    pipeline: str
    status: CandidateStatus
    reason: str
    ratio: float | None
    low: float | None
    high: float | None
    bytes: int | None
    worst: float | None
    metric: MetricResult | None
    in_float: tuple[FloatLayer, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class SearchReport:
    """What a search within a budget tried, and what it chose.

    Attributes:
        objective: "latency" or "size".
        max_error: Budget: worst deviation of an output relative to its range; None when not limited.
        max_drop: Budget: largest drop of the metric; None when not limited.
        metric: Name of the metric; empty when there is none.
        metric_reason: Why this metric; empty when the user chose it.
        samples: Samples that judged.
        calibration_samples: Samples that passes learnt from; none of them judged unless a note says so.
        candidates: Everything that was tried, the winner first, then in the order of trying.
        resumed: How many of them were known from an interrupted search.
        notes: What to know about the data, in sentences.
    """

    objective: Objective
    max_error: float | None
    max_drop: float | None
    metric: str
    metric_reason: str
    samples: int
    calibration_samples: int
    candidates: tuple[Candidate, ...]
    resumed: int
    notes: tuple[str, ...]

    @property
    def winner(self) -> Candidate:
        """The candidate that was chosen."""
        return self.candidates[0]


@dataclasses.dataclass(frozen=True, slots=True)
class Reached:
    """What a pass was asked to leave of the model, and what is left.

    Attributes:
        spec: The pass as a pipeline string.
        of: "channels" (of those that could go), "parameters" or "time".
        asked: What may be left, as a part of the original.
        reached: What is left; None for time that was not measured. Time is the whole result's by the original's,
            the rest what this pass found and left.
        low: Lower end of the 95% interval of the time; None for what is counted.
        high: Upper end.
    """

    spec: str
    of: Literal["channels", "parameters", "time"]
    asked: float
    reached: float | None
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Contender:
    """A model in the comparison of a pruned result with quantization alone.

    Attributes:
        name: What it is, in a few words.
        pipeline: Its lossy passes.
        failure: Why there is no such model, or it does not run; empty when it does.
        ratio: Its time by that of the original; None when it was not measured.
        low: Lower end of the 95% interval of the ratio.
        high: Upper end.
        bytes: Size in files; None when there is no model.
        worst: Worst deviation of an output relative to its range; None when quality was not looked at.
        metric: The task metric; None when there is none, or quality was not looked at.
    """

    name: str
    pipeline: str
    failure: str
    ratio: float | None
    low: float | None
    high: float | None
    bytes: int | None
    worst: float | None
    metric: MetricResult | None


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """A pruned result beside the original quantized alone, on samples that neither learnt from.

    Attributes:
        result: The result; None when it could not be compared.
        rivals: The original quantized in the ways that there are for it, and not pruned.
        rival: Name of the rival that speaks most against pruning; empty when none runs as fast as the original.
        ratio: Time of the result by that of this rival, measured in turns; None without one.
        low: Lower end of the 95% interval of the ratio.
        high: Upper end.
        verdict: What was found and whether pruning is to be recommended, in sentences.
    """

    result: Contender | None
    rivals: tuple[Contender, ...]
    rival: str
    ratio: float | None
    low: float | None
    high: float | None
    verdict: str


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """Everything one run did, gained and cost.

    Attributes:
        schema_version: Version of the JSON form; it grows when a field changes its meaning or goes away.
        model: Path of the input; empty when a model object was given.
        output: Path the result was written to; empty when it was not written.
        recipe: Name of the recipe; "custom" for a pipeline string.
        pipeline: The passes as a pipeline string.
        target: "portable", "cpu" or "cuda".
        opset: Version of the standard operator set before and after.
        environment: Where the run took place.
        data: Where the feeds came from, in words.
        passes: What each pass did, in order.
        slow_passes: Passes taken out because they measured slower.
        before: Size of the original.
        after: Size of the result.
        verification: How the outputs compare; None when verification was turned off or impossible.
        not_verified: Why it was not verified; empty when it was.
        measurement: How the latencies compare; None when measuring was turned off or impossible.
        not_measured: Why it was not measured; empty when it was.
        metric: The task metric before and after; None when none was asked for.
        notes: Sentences a user should know.
        seconds: Wall time of each stage, in order.
        fixed_axes: Dynamic axes that were given a fixed size, as asked for.
        search: The candidates that were tried within a budget; None when nothing was searched.
        reached: What passes were asked to leave of the model, and what is left.
        alone: A pruned result beside quantization alone; None where nothing was pruned, or no data to compare on.
    """

    schema_version: int
    model: str
    output: str
    recipe: str
    pipeline: str
    target: str
    opset: tuple[int, int]
    environment: Environment
    data: str
    passes: tuple[PassReport, ...]
    slow_passes: tuple[SlowPass, ...]
    before: ModelStats
    after: ModelStats
    verification: Verification | None
    not_verified: str
    measurement: Measurement | None
    not_measured: str
    metric: MetricResult | None
    notes: tuple[str, ...]
    seconds: tuple[tuple[str, float], ...]
    fixed_axes: tuple[tuple[str, int], ...] = ()
    search: SearchReport | None = None
    reached: tuple[Reached, ...] = ()
    alone: Comparison | None = None

    @property
    def applied(self) -> int:
        """Number of edits that stand."""
        return sum(len(p.applied) for p in self.passes)

    @property
    def dropped(self) -> int:
        """Number of edits and whole passes, slow ones included, that were found guilty and taken out."""
        whole = sum(p.status == "dropped" and bool(p.reason) for p in self.passes)
        return sum(len(p.dropped) for p in self.passes) + whole

    def __str__(self) -> str:
        """Return the report as plain text."""
        from onnxopt.report.terminal import to_text

        return to_text(self)
