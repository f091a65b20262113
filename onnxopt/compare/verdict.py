"""The verdict on a model that was compared with another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from onnxopt.compare.tally import OutputDeviation
from onnxopt.compare.yardstick import Mode
from onnxopt.feeds import Feed


@dataclasses.dataclass(frozen=True, slots=True)
class Verification:
    """The verdict on a model.

    Attributes:
        ok: Whether it may take the place of the reference.
        reason: Why not, in one sentence that begins in lower case and ends without a period; empty when it may.
        mode: "exact": with the runtime's optimizations off; "as run": with them on.
        outputs: One entry per output, in the model's order; none when it did not come to a comparison.
        feeds: Number of input sets that were run.
        worst: The largest `relative` of all outputs.
        shapes: Dynamic axes and the sizes that were tried, e.g. (("batch", (1, 2)),).
        notes: What else there is to know, in words.
    """

    ok: bool
    reason: str
    mode: Mode
    outputs: tuple[OutputDeviation, ...]
    feeds: int
    worst: float
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def extent(self) -> str:
        """How far the outputs were found equal, in words, for when nothing deviates."""
        compared = sum(output.compared for output in self.outputs)
        if compared == len(self.outputs):
            return "outputs are equal"
        if compared == 0:
            return "no values could be compared, only types and shapes"
        return f"values of {compared} of {len(self.outputs)} outputs could be compared and are equal"


def refused(reason: str, mode: Mode) -> Verification:
    """Return the verdict on a model that did not come to a comparison."""
    return Verification(False, reason, mode, (), 0, math.inf)


def sizes(model: ir.Model, feeds: Iterable[Feed]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return the dynamic axes of the inputs and the sizes they took."""
    taken: dict[str, set[int]] = {}
    for feed in feeds:
        for value in model.graph.inputs:
            array = feed.get(value.name or "")
            if value.shape is None or not isinstance(array, np.ndarray) or array.ndim != len(value.shape):
                continue
            for axis, (dim, size) in enumerate(zip(value.shape, array.shape, strict=True)):
                if not isinstance(dim, int):
                    taken.setdefault(str(dim.value or f"{value.name}:{axis}"), set()).add(size)
    return tuple((axis, tuple(sorted(found))) for axis, found in taken.items())
