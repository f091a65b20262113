"""What a run of `optimize` reports, as plain frozen values."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxopt.analysis.inspect import ModelStats
    from onnxopt.contract import PassReport
    from onnxopt.measure import Measurement
    from onnxopt.metrics import MetricResult
    from onnxopt.verify import Verification

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
