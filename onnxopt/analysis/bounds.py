"""Between which numbers the elements of a float or truth tensor lie, whatever the inputs of the model.

Made for attention masks: `Where(mask, 0, -3.4e38)` cannot hold an infinity, so a softmax over scores to which
it is added cannot give NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from onnxopt.analysis import grids
from onnxopt.analysis.shapes import Shapes
from onnxopt.graph import attribute, constant_array, has_references, is_op

_MAX_DEPTH = 16
_MAX_CONSTANT = 1 << 22


class Bounds(NamedTuple):
    """No element is below `low`, above `high` or NaN."""

    low: float
    high: float

    @property
    def finite(self) -> bool:
        """Whether no element is an infinity."""
        return math.isfinite(self.low) and math.isfinite(self.high)


def bounds(value: ir.Value, shapes: Shapes, depth: int = _MAX_DEPTH) -> Bounds | None:
    """Return bounds of the elements, or None when nothing is known or they may be NaN."""
    dtype = shapes.dtype(value)
    if dtype is None or depth == 0:
        return None
    if dtype == ir.DataType.BOOL:
        known = grids.truth(value, shapes)
        return Bounds(0, 1) if known is None else Bounds(known, known)
    node = value.producer()
    if node is None or is_op(node, "Constant"):
        return _of_constant(value) or _of_type(dtype)
    found = _computed(node, shapes, depth - 1) or _of_type(dtype)
    return None if found is None else _rounded(found, dtype)


def _of_type(dtype: ir.DataType) -> Bounds | None:
    if not dtype.is_integer():
        return None
    info = np.iinfo(dtype.numpy())
    return Bounds(float(info.min), float(info.max))


def _of_constant(value: ir.Value) -> Bounds | None:
    array = constant_array(value, max_bytes=_MAX_CONSTANT)
    if array is None or array.size == 0 or array.dtype.kind not in "fiu":
        return None
    low, high = float(array.min()), float(array.max())
    return None if math.isnan(low) or math.isnan(high) else Bounds(low, high)


def _rounded(found: Bounds, dtype: ir.DataType) -> Bounds | None:
    """Return the bounds as a type holds them: beyond its largest number lies infinity."""
    if math.isnan(found.low) or math.isnan(found.high):
        return None
    if not dtype.is_floating_point():  # integers wrap around
        whole = _of_type(dtype)
        return found if whole is not None and whole.low <= found.low and found.high <= whole.high else whole
    largest = float(np.finfo(dtype.numpy()).max) if dtype in _PLAIN else None
    if largest is None:
        return None
    low, high = (b if abs(b) <= largest else math.copysign(math.inf, b) for b in found)
    return Bounds(low, high)


_PLAIN = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
_FIRST_INPUT = ("Expand", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze",
                "Split")  # fmt: skip
_FIXED = {"Sigmoid": Bounds(0, 1), "Tanh": Bounds(-1, 1), "Cos": Bounds(-1, 1), "Sin": Bounds(-1, 1)}


def _computed(node: ir.Node, shapes: Shapes, depth: int) -> Bounds | None:
    if not is_op(node, node.op_type) or has_references(node):
        return None
    inputs = [v for v in node.inputs if v is not None]
    ask = [v for v in inputs if node.op_type not in _FIRST_INPUT or v is inputs[0]]
    match node.op_type:
        case "Where":
            return _where(node, shapes, depth)
        case "Gather" | "GatherND" | "GatherElements":
            return bounds(inputs[0], shapes, depth)
        case "ConstantOfShape":
            fill = attribute(node, "value")
            number = 0.0 if fill is None else float(fill.numpy().reshape(-1)[0])
            return None if math.isnan(number) else Bounds(number, number)
        case "Cast":
            return bounds(inputs[0], shapes, depth)
        case op if op in _FIXED:
            return _FIXED[op]
    known = [bounds(v, shapes, depth) for v in ask] if node.op_type in _COMBINED else []
    found = [b for b in known if b is not None]
    if not found or len(found) < len(known):
        return None
    return _combined(node.op_type, found)


_COMBINED = (*_FIRST_INPUT, "Add", "Concat", "Max", "Min", "Mul", "Neg", "Sub", "Trilu")


def _where(node: ir.Node, shapes: Shapes, depth: int) -> Bounds | None:
    condition, yes, no = node.inputs
    if condition is None or yes is None or no is None:
        return None
    known = grids.truth(condition, shapes)
    if known is not None:
        return bounds(yes if known else no, shapes, depth)
    first, second = bounds(yes, shapes, depth), bounds(no, shapes, depth)
    return None if first is None or second is None else _union([first, second])


def _union(found: Sequence[Bounds]) -> Bounds:
    return Bounds(min(b.low for b in found), max(b.high for b in found))


def _sum(first: Bounds, second: Bounds) -> Bounds | None:
    """Return the bounds of a sum; opposite infinities make NaN."""
    if any(a.high == math.inf and b.low == -math.inf for a, b in ((first, second), (second, first))):
        return None
    return Bounds(first.low + second.low, first.high + second.high)


def _combined(op: str, found: Sequence[Bounds]) -> Bounds | None:
    first, *others = found
    match op:
        case "Neg":
            return Bounds(-first.high, -first.low)
        case "Max":
            return Bounds(max(b.low for b in found), max(b.high for b in found))
        case "Min":
            return Bounds(min(b.low for b in found), min(b.high for b in found))
        case "Trilu":
            return _union([first, Bounds(0, 0)])
        case "Add":
            return _sum(first, others[0])
        case "Sub":
            return _sum(first, Bounds(-others[0].high, -others[0].low))
        case "Mul":
            corners = [x * y for x in first for y in others[0]]
            # 0 * infinity is NaN, and so may an element between the corners be.
            if not first.finite or not others[0].finite:
                return None
            return Bounds(min(corners), max(corners))
    return _union(found)
