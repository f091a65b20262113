"""Does torch compute what the runtime computes? Asked before training and after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from onnxopt import runtime
from onnxopt.errors import VerificationError
from onnxopt.feeds import Feed
from onnxopt.runtime import RunOptions
from onnxopt.training.interpreter import Interpreter
from onnxopt.training.parameters import computes_in_half
from onnxopt.training.values import to_array

TOLERANCE = 1e-4
"""The largest deviation, as a fraction of the output's range."""

HALF_TOLERANCE = 2e-2
"""The same for models that compute in half precision, where torch computes in single precision."""

OWN_DIFFERENCE = 4.0
"""Where the runtime itself differs with its optimizations on and off, so many times that is allowed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Agreement:
    """How far torch and the runtime are apart.

    Attributes:
        worst: The largest deviation of any output, as a fraction of its range.
        allowed: What is allowed.
        output: The output it is of.
    """

    worst: float
    allowed: float
    output: str

    @property
    def ok(self) -> bool:
        """Whether it is within what is allowed."""
        return self.worst <= self.allowed


def agreement(
    model: ir.Model,
    interpreter: Interpreter,
    feeds: Sequence[Feed],
    options: RunOptions,
    parameters: Mapping[str, torch.Tensor] | None = None,
) -> Agreement:
    """Compare what torch computes with what ONNX Runtime computes.

    Args:
        model: What the runtime runs.
        interpreter: What torch runs.
        feeds: Inputs to compare on.
        options: How the runtime runs.
        parameters: What torch takes instead of the constants of its model.
    """
    allowed = HALF_TOLERANCE if computes_in_half(model) else TOLERANCE
    worst, at = 0.0, ""
    with (
        runtime.open_session(model, options, optimized=False) as plain,
        runtime.open_session(model, options, optimized=True) as fast,
        torch.no_grad(),
    ):
        for feed in feeds:
            expected, other = plain.run(feed), fast.run(feed)
            found = interpreter.run(feed, parameters)
            for name, wanted in expected.items():
                deviation = distance(found[name], wanted)
                own = distance(other[name], wanted)
                if np.isfinite(own):
                    allowed = max(allowed, OWN_DIFFERENCE * own)
                if deviation > worst or (np.isnan(deviation) and not at):
                    worst, at = deviation, name
    return Agreement(worst, allowed, at)


def require_agreement(found: Agreement, what: str) -> None:
    """Raise when torch computes something else.

    Raises:
        VerificationError: With the deviation.
    """
    if not found.ok:
        raise VerificationError(
            f'{what}: the output "{found.output}" deviates by {found.worst:.2g} of its range from what ONNX Runtime '
            f"computes, and {found.allowed:.2g} is allowed. Training would optimize something else; please report it."
        )


def distance(ours: Any, theirs: Any) -> float:
    """Return the largest deviation as a fraction of the range; infinite where shapes or infinities differ."""
    if theirs is None or ours is None:
        return 0.0 if ours is theirs else np.inf
    if isinstance(theirs, list):
        if len(ours) != len(theirs):
            return np.inf
        return max(map(distance, ours, theirs), default=0.0)
    array = to_array(ours) if isinstance(ours, torch.Tensor) else ours
    if array.shape != theirs.shape:
        return np.inf
    if theirs.dtype.kind in "OSU":
        return 0.0 if np.array_equal(array, theirs) else np.inf
    one, two = np.asarray(array, np.float64), theirs.astype(np.float64)
    finite = np.isfinite(two)
    if not np.array_equal(finite, np.isfinite(one)) or not np.array_equal(one[~finite], two[~finite], equal_nan=True):
        return np.inf
    if not finite.any():
        return 0.0
    span = float(np.ptp(two[finite])) or float(np.abs(two[finite]).max()) or 1.0
    return float(np.abs(one[finite] - two[finite]).max()) / span
