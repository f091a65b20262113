"""The contract between passes and the manager: plain values and one small base class.

A pass looks at a model and yields `Edit`s (what it could change) and `Refusal`s (near misses with their
reason). It changes the graph only inside `Edit.apply`, which the manager calls, or leaves.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from onnxopt.analysis.shapes import Shapes
    from onnxopt.removed import Fit, Goal, Removed

Target = Literal["portable", "cpu", "cuda"]
TARGETS: tuple[Target, ...] = ("portable", "cpu", "cuda")


class Guarantee(enum.Enum):
    """What a pass promises about the outputs of the model it changes."""

    EXACT = "exact"
    """Only floating-point rounding may differ."""
    APPROXIMATE = "approximate"
    """Outputs may move; the user's error budget judges by how much."""
    REDEFINES = "redefines"
    """A new function or signature; the result becomes the reference for what follows."""


@dataclasses.dataclass(frozen=True, order=True, slots=True)
class Site:
    """Where an edit happens. Stable across runs, because passes are deterministic.

    Attributes:
        pass_name: Name of the pass.
        graph: Path of the graph: "" for the main graph, "If_3.then_branch" for a nested one,
            "function domain::name" for a model-local function.
        output: Name of the first output of the node (or of the initializer) that the edit is about.
    """

    pass_name: str
    graph: str
    output: str

    def __str__(self) -> str:
        """Return e.g. `fuse-conv-bn at /layer1/conv1/Conv_output_0 (in If_3.then_branch)`."""
        inside = f" (in {self.graph})" if self.graph else ""
        return f"{self.pass_name} at {self.output}{inside}"


@dataclasses.dataclass(frozen=True, slots=True)
class Edit:
    """One change a pass proposes: `apply` makes it, and nothing else may touch the graph.

    Attributes:
        site: Where.
        summary: What, in words.
        apply: Does it.
        removed: What it takes out; the report lists and draws it.
        fit: How well it fits a layer.
        reference: Makes a model that the edited one must equal to rounding, whatever the budget allows: the original
            changed in another way that is simpler to trust. Called after the last edit of a pass, for all of them; the
            model is compared as it was before the first edit that repairs.
        repairs: Whether it only makes up for edits before it. It is not looked at by itself when edits are judged: it
            is made whenever what it makes up for was.
    """

    site: Site
    summary: str
    apply: Callable[[], None]
    removed: Removed | None = None
    fit: Fit | None = None
    reference: Callable[[], ir.Model] | None = None
    repairs: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """A near miss: something that looked like a site, and why it was left alone.

    Attributes:
        site: Where.
        reason: Why.
        fit: How far a layer is off that was not fitted.
    """

    site: Site
    reason: str
    fit: Fit | None = None


class Evaluate(Protocol):
    """Computes one node from constant inputs, in ONNX Runtime."""

    def __call__(self, node: ir.Node, inputs: Sequence[np.ndarray | None], opset: int) -> list[np.ndarray] | None:
        """Return one array per output, or None where the runtime has no kernel or rejects the node."""


class Observer(Protocol):
    """Sums up what a value of a model takes on while the model runs, array by array; see `onnxopt.numeric`."""

    def add(self, array: np.ndarray) -> None:
        """Take in the value of one run. The array must be neither changed nor kept."""


class Observe(Protocol):
    """Runs a model on the calibration data and shows its values to observers."""

    def __call__(self, model: ir.Model, observers: Mapping[str, Sequence[Observer]]) -> None:
        """Run every calibration sample once, one at a time.

        Args:
            model: The model as it is now; it is not changed.
            observers: Name of a value of the main graph (an input or a node's output) -> who looks at it.

        Raises:
            ValueError: If the main graph computes no value of a name.
            RuntimeFailure: If the model does not run.
        """


class JointObserver(Protocol):
    """Sums up values of two models that run on the same sample."""

    @property
    def reference(self) -> tuple[str, ...]:
        """Names of the values of the first model that it looks at."""

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the values of the second model that it looks at."""

    def add(self, reference: Sequence[np.ndarray], changed: Sequence[np.ndarray]) -> None:
        """Take in the values of one run of each model. The arrays must be neither changed nor kept."""


class ObserveBoth(Protocol):
    """Runs two models in step on the calibration data and shows the values of both to observers."""

    def __call__(
        self, reference: ir.Model, changed: ir.Model, observers: Sequence[JointObserver], most: int | None = None
    ) -> None:
        """Run every calibration sample once through each model.

        Args:
            reference: For example the model as it was before a change; it is not changed.
            changed: For example the model as it is now; it is not changed.
            observers: Who looks at which values of the main graphs (inputs or nodes' outputs).
            most: The first so many samples are enough; None for all.

        Raises:
            ValueError: If a main graph computes no value of a name.
            RuntimeFailure: If a model does not run.
        """


class ShowBeside(Protocol):
    """Shows values of one model after the other beside those of a reference."""

    def __call__(self, changed: ir.Model, observers: Sequence[JointObserver], samples: Collection[int]) -> None:
        """Run some samples through a model, and through the reference where its values are not known any more.

        Args:
            changed: It is not changed.
            observers: Who looks at which values; of the reference, at some of those named when it was given.
            samples: Numbers of calibration samples, counted from 0; shown in their order in the data.

        Raises:
            ValueError: If a main graph computes no value of a name.
            RuntimeFailure: If a model does not run.
        """


class ObserveBeside(Protocol):
    """Runs many models on the calibration data and shows their values beside those of one reference."""

    def __call__(self, reference: ir.Model, names: Sequence[str]) -> ShowBeside:
        """Prepare to run the reference, once for each sample as far as its values fit into bounded memory.

        Args:
            reference: It is not changed, and must not change as long as models are shown.
            names: Values of its main graph (inputs or nodes' outputs) that will be looked at.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class Stop:
    """Where two models that are run part by part are looked at.

    Attributes:
        reference: Names of values of the first model.
        changed: Names of values of the second model.
        replaced: Outputs of nodes of the second model that get other constants after the stop.
    """

    reference: tuple[str, ...]
    changed: tuple[str, ...]
    replaced: tuple[str, ...]


class WalkBoth(Protocol):
    """Runs two models in step on the calibration data, part by part."""

    def __call__(
        self, reference: ir.Model, changed: ir.Model, stops: Sequence[Stop]
    ) -> Callable[[Sequence[JointObserver]], None]:
        """Prepare to run both models from stop to stop.

        Args:
            reference: It is not changed.
            changed: Between two stops it may change as the first of them says, and not otherwise.
            stops: What is looked at, in order. What one shows of the second model must not depend on what a later one
                replaces.

        Returns:
            Called once for each stop with those who look: runs every sample from the last stop on.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class Calibration:
    """What passes that depend on data may learn it from.

    Attributes:
        observe: Runs the model on the data.
        observe_both: Runs two models on the data, in step.
        observe_beside: The same for many models and one reference, which is run once.
        walk_both: The same, part by part, where the second model changes on the way.
        samples: How many samples there are.
        real: Whether they are the user's own; otherwise they were generated, and the user insisted.
    """

    observe: Observe
    observe_both: ObserveBoth
    observe_beside: ObserveBeside
    walk_both: WalkBoth
    samples: int
    real: bool


NEEDS_DATA = (
    "it needs real inputs to see which values the model computes with; give some with --data, or insist on generated "
    "ones with --force-calibration"
)
"""Why a pass that depends on data is skipped without any."""


class Timed(Protocol):
    """Times candidates of a pass."""

    def __call__(self, key: str, make: Callable[[], ir.Model]) -> float:
        """Return the time of a candidate by that of the original, as they will run.

        Args:
            key: What the result is remembered by, so that a pass that runs again decides the same.
            make: Makes the candidate; called when it is not remembered.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """What a pass may know besides the model.

    Attributes:
        target: "portable" allows standard ONNX ops of the model's own opset; "cpu" and "cuda" also allow ops
            that ONNX Runtime has kernels for on that provider.
        seed: Seeds whatever a pass draws at random.
        evaluate: Computes a node from constants.
        shapes: What is known about the shapes of this model's values. The manager gives every trial its own; it stays
            valid while exact passes edit the model.
        calibration: Data to run the model on; None without any.
        timed: Times models; None where none can be run.
    """

    target: Target
    seed: int
    evaluate: Evaluate
    shapes: Shapes
    calibration: Calibration | None = None
    timed: Timed | None = None


class GraphPass:
    """Base of every pass. A pass is a frozen, keyword-only dataclass whose fields are its options.

    The option fields are builtins or Literal types with defaults; their meaning and unit stand in the
    class docstring under `Attributes:`. The command line, recipe files and `onnxopt passes NAME` are derived
    from them. A pass does no I/O, opens no session and keeps no state.

    Attributes:
        name: What pipelines call it, in kebab-case.
        guarantee: What it promises about the outputs.
        needs_data: Whether it learns from `Context.calibration` whatever its options; see `wants_data`.
        repairs: Whether it yields edits that repair what its others did.
    """

    name: ClassVar[str]
    guarantee: ClassVar[Guarantee]
    needs_data: ClassVar[bool] = False
    repairs: ClassVar[bool] = False

    def wants_data(self) -> bool:
        """Return whether it learns from `Context.calibration`, with the options it has.

        The user's samples are then divided: some to learn from, the others to judge by.
        """
        return self.needs_data

    def skip_reason(self, model: ir.Model, ctx: Context) -> str | None:
        """Return why the pass does not apply to this model, or None. Not applicable is not a failure."""
        return None

    def goal(self) -> Goal | None:
        """Return what it was asked to reach, which the report compares with what it did; None for nothing."""
        return None

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield what could be changed and what was refused.

        The generator is resumed after the manager has called `apply`, or has not: it must look at the graph as
        it then is.
        """
        raise NotImplementedError

    def caveat(self) -> str:
        """Return a sentence that the report prints whenever an edit of this pass stands, or an empty string."""
        return ""


@dataclasses.dataclass(frozen=True, slots=True)
class AppliedEdit:
    """An edit that stands in the result; see `Edit`."""

    site: Site
    summary: str
    removed: Removed | None = None
    fit: Fit | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class DroppedEdit:
    """An edit that was found guilty and is not in the result.

    Attributes:
        reason: In words: the crash, the output that deviated and by how much, or the slowdown.
    """

    site: Site
    summary: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class PassReport:
    """What one pass did.

    Attributes:
        name: Name of the pass.
        spec: The pass as a pipeline string, with the options that differ from their defaults.
        guarantee: "exact", "approximate" or "redefines".
        status: "kept" (at least one edit stands), "dropped" (all its edits were), "unchanged" (nothing to do),
            "skipped" (does not apply).
        reason: Why it was skipped or dropped as a whole; empty otherwise.
        applied: The edits that stand, in order.
        dropped: The edits that do not, each with its reason.
        refusals: Reason -> how often, for near misses.
        seconds: Time spent in the pass itself, all rounds together.
    """

    name: str
    spec: str
    guarantee: str
    status: Literal["kept", "dropped", "unchanged", "skipped"]
    reason: str
    applied: tuple[AppliedEdit, ...]
    dropped: tuple[DroppedEdit, ...]
    refusals: tuple[tuple[str, int], ...]
    seconds: float


class Progress(Protocol):
    """Told what a long run is doing. The command line draws it; the library's default ignores it."""

    def stage(self, text: str, total: int | None = None) -> None:
        """A new stage begins; `total` is its number of steps where that is known."""

    def advance(self, steps: int = 1) -> None:
        """`steps` of the current stage are done."""


class Silent:
    """The progress nobody sees."""

    def stage(self, text: str, total: int | None = None) -> None:
        """Ignore."""

    def advance(self, steps: int = 1) -> None:
        """Ignore."""
