"""What an edit takes out of a model, what that saves and what it costs. Plain values: passes tell, reports show."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, slots=True)
class Width:
    """How wide a layer is before and after an edit.

    Attributes:
        layer: Name of its weight.
        side: Whether it is about what the layer computes ("outputs") or what it takes in ("inputs").
        before: Its width before the edit.
        after: Its width after the edit.
    """

    layer: str
    side: Literal["outputs", "inputs"]
    before: int
    after: int


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """A number before and after an edit."""

    before: int
    after: int

    @property
    def gone(self) -> int:
        """How much the edit took away."""
        return self.before - self.after


@dataclasses.dataclass(frozen=True, slots=True)
class Damage:
    """What a removal costs.

    Attributes:
        share: 0 for nothing, 1 for all.
        of: What it is a share of. "outputs": deviation of the model's outputs, root of the lost part of their power.
            "layers": deviation of the layer behind that deviates most, by the spread of what it computed. "weights":
            the squared norms of the weights that the units consist of. "activations": the energy that the units bring
            into the layers behind them, less what others make up for where they are merged.
    """

    share: float
    of: Literal["outputs", "layers", "weights", "activations"]


@dataclasses.dataclass(frozen=True, slots=True)
class Removed:
    """What an edit takes out of a model: units of a group that can only go together.

    Attributes:
        name: What the group is called.
        unit: What its units are, e.g. "channels".
        units: How many of them there are.
        widths: The layers that become narrower.
        channels: Channels of the whole model that could go; None where the pass does not count them.
        parameters: Elements of the constants of the whole model, counted as in `ModelStats`.
        macs: Multiply-accumulates of one run of the whole model, every node counted once, with the sizes of dynamic
            axes that `onnxopt inspect` assumes.
        predicted: What was expected of it before it was done; None where nothing was.
        unrepaired: What was measured before the layers that are left were fitted; None where nothing was.
        measured: What was measured with the layers fitted where that helps; None where nothing was.
        behind: Outputs of the layers that take the units in.
    """

    name: str
    unit: str
    units: Change
    widths: tuple[Width, ...]
    channels: Change | None
    parameters: Change
    macs: Change
    predicted: Damage | None = None
    unrepaired: Damage | None = None
    measured: Damage | None = None
    behind: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Fit:
    """How far the output of a layer is from what it was, before and after its weights were fitted.

    Attributes:
        layer: Name of the output.
        before: Root of the square error by the spread of what it should compute, on samples held back.
        after: The same with the fitted weights.
    """

    layer: str
    before: float
    after: float


@dataclasses.dataclass(frozen=True, slots=True)
class Goal:
    """What a pass was asked to leave of a model.

    Attributes:
        of: "channels" (of those that could go), "parameters" or "time".
        part: What may be left, as a part of the original.
    """

    of: Literal["channels", "parameters", "time"]
    part: float
