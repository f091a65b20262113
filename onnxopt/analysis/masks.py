"""What the masks of an attention are: conditions and what stands where they do not hold."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.attention_scores import Mask
from onnxopt.analysis.bounds import bounds
from onnxopt.analysis.dims import Dim
from onnxopt.analysis.grids import at_least, some_true_in_row
from onnxopt.analysis.shapes import Shapes
from onnxopt.graph import attribute, constant_array, constant_scalar, is_op

CERTAIN = -1e30
"""Scores to which less than this is added leave nothing of themselves: the sum is what was added, rounded."""
_MAX_SEEN = 256
LIKELY = -1e4
"""What at least is added where a row has other keys: their weight is then exactly zero."""


@dataclasses.dataclass(frozen=True, slots=True)
class Term:
    """One mask as a term that is added to the scores.

    Attributes:
        shape: Its shape.
        value: What is added; None when the scores are replaced where the condition does not hold.
        condition: The scores count where it holds; None for a mask that is no choice between 0 and `fill`.
        inverted: They count where it does not hold.
        fill: What is added elsewhere.
        low: What is added is at least this; None when unknown.
        row_kept: In every row there is a key that counts.
    """

    shape: tuple[Dim, ...]
    value: ir.Value | None
    condition: ir.Value | None
    inverted: bool
    fill: float
    low: float | None
    row_kept: bool

    @property
    def holds_infinity(self) -> bool:
        """Whether an infinity of the model's own may be added, as far as its constants tell."""
        return self.low == -math.inf or (self.low is None and self.value is not None and _has_infinity(self.value))

    @property
    def finite(self) -> bool:
        """Whether no infinity can be added."""
        return self.low is not None and math.isfinite(self.low)

    @property
    def may_lose_rows(self) -> bool:
        """Whether -infinity may be added to a whole row."""
        return not self.finite and not self.row_kept


def term(mask: Mask, shapes: Shapes) -> Term | str:
    """Read a mask as a term that is added, or return why it is none."""
    if mask.fill is None:
        return _added(mask.value, shapes)
    shape = shapes.of(mask.value)
    if shape is None:
        return "the shape of a mask is unknown"
    kept = not mask.inverted and some_true_in_row(mask.value, shapes)
    if mask.fill > CERTAIN and not (kept and mask.fill <= LIKELY):
        return f"masked scores become {mask.fill:g}, which is not the same as adding it"
    return Term(shape, None, mask.value, mask.inverted, mask.fill, mask.fill, kept)


def _added(value: ir.Value, shapes: Shapes) -> Term | str:
    shape = shapes.of(value)
    if shape is None:
        return "the shape of a mask is unknown"
    known = bounds(value, shapes)
    low = None if known is None or known.high == math.inf else known.low
    node = value.producer()
    if node is not None and is_op(node, "Where"):
        condition, yes, no = node.inputs
        for zero, other, inverted in ((yes, no, False), (no, yes, True)):
            fill = constant_scalar(other)
            if condition is not None and constant_scalar(zero) == 0 and fill is not None and fill <= LIKELY:
                whole = shapes.of(condition) == shape
                kept = whole and not inverted and some_true_in_row(condition, shapes)
                return Term(shape, value, condition, inverted, fill, low, kept)
    return Term(shape, value, None, False, 0.0, low, _constant_row_kept(value))


def _constant_row_kept(value: ir.Value) -> bool:
    """Whether a constant mask leaves a key in every row."""
    array = constant_array(value, max_bytes=1 << 22)
    return array is not None and array.ndim > 0 and bool((np.max(array, axis=-1) > LIKELY).all())


def _has_infinity(value: ir.Value) -> bool:
    """Whether what a value is computed from has an infinite constant, or too much to look at."""
    seen: set[ir.Value] = set()
    pending = [value]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if len(seen) > _MAX_SEEN:
            return True
        node = current.producer()
        array = constant_array(current, max_bytes=1 << 22)
        fill = attribute(node, "value") if node is not None and is_op(node, "ConstantOfShape") else None
        for found in (array, None if fill is None else fill.numpy()):
            if found is not None and found.dtype.kind == "f" and not np.isfinite(found).all():
                return True
        if node is not None and array is None:
            if is_op(node, "Log"):
                return True
            pending.extend(v for v in node.inputs if v is not None)
    return False


def is_causal(found: Term, queries: Dim, keys: Dim, shapes: Shapes) -> bool:
    """Whether the term hides the keys after each query and nothing else, where there are as many keys as queries."""
    if found.condition is None or queries != keys or found.fill > LIKELY:
        return False
    read = at_least(found.condition, shapes)
    if read is None or read[1] is found.inverted or len(read[0].shape) < 2:
        return False
    grid = read[0]
    return (
        grid.base == 0
        and grid.shape[-2:] == (queries, keys)
        and grid.steps[-2:] == (1, -1)
        and not any(grid.steps[:-2])
    )


def is_key_padding(found: Term, batch: Dim, keys: Dim) -> bool:
    """Whether the term hides keys by a condition of shape batch x 1 x 1 x keys."""
    return found.condition is not None and found.shape == (batch, 1, 1, keys)
