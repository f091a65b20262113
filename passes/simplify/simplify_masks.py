"""Attention masks as exporters spell them: gathers along counting indices, conditions that hold, NaN guards."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.algebra import summands
from onnxopt.analysis.attention import is_over_last_axis
from onnxopt.analysis.bounds import Bounds, bounds
from onnxopt.analysis.dims import Dim, broadcast
from onnxopt.analysis.grids import Grid, grid, some_true_in_row, truth
from onnxopt.analysis.layout import Axis, Rearrangement, is_layout, plan, rearrangement
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal
from onnxopt.graph import Scope, attribute, constant_array, constant_scalar, is_op
from onnxopt.rewrite import Answer, Builder, Found, Refused, Rule, Same, rewrite

_MAX_DEPTH = 8
"""Masks are followed this deep."""
_MAX_CONSTANT = 1 << 22


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimplifyMasks(GraphPass):
    """Simplify the arithmetic of attention masks.

    Four things. Gather and GatherND whose indices count along axes only move the axes of their data. And, Or and
    Where with a condition that always holds, such as Range >= 0, become what they then are; a mask gets narrower
    by that where the scores it is added to have the whole shape. Adding a mask that is all zero is left out.
    Where(IsNaN(p), 0, p) around a softmax p is left out where no row can be masked in full with -infinity, the
    only way to NaN as long as the attention scores themselves are finite: a model that computes infinities from
    its inputs gives NaN where it gave 0.
    """

    name = "simplify-masks"
    guarantee = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per node that can go."""
        made: _Made = {}
        rules: dict[str, Sequence[Rule]] = {
            "GatherND": [_gather_nd],
            "Gather": [_gather],
            "And": [_logical],
            "Or": [_logical],
            "Where": [_guard, functools.partial(_where, made=made)],
            "Add": [functools.partial(_add, made=made)],
        }
        yield from rewrite(self.name, model, ctx, rules)


_Made: TypeAlias = dict[ir.Value, ir.Value]
"""Mask -> what stands for it; several layers use the same."""


# Gathers -----------------------------------------------------------------------------------------------


def _gather_nd(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """GatherND(x, Concat(grids)) where grid k counts along axis k of x."""
    data, indices = node.inputs
    shape = ctx.shapes.of(data) if data is not None else None
    pack = indices.producer() if indices is not None else None
    result = ctx.shapes.of(node.outputs[0])
    if data is None or shape is None or result is None or attribute(node, "batch_dims", 0) or pack is None:
        return None
    parts = [v for v in pack.inputs if v is not None]
    last = len(result)
    if not is_op(pack, "Concat") or attribute(pack, "axis") not in (-1, last) or len(parts) != len(shape):
        return None
    axes: list[Axis] = [()] * len(result)
    for k, part in enumerate(parts):
        read = grid(part, ctx.shapes)
        found = _counted_axis(read, 1, shape[k]) if read is not None else None
        if found is None or len(result) <= found or axes[found]:
            return None
        axes[found] = (k,)
    before: tuple[Axis, ...] = tuple((k,) for k in range(len(shape)))
    return _moved(node, data, Rearrangement(shape, before, tuple(axes)), result, ctx.shapes)


def _counted_axis(read: Grid, step: Dim, size: Dim) -> int | None:
    """Return the axis along which alone a grid counts, from 0 by `step`, `size` times."""
    moving = [k for k, s in enumerate(read.steps) if s != 0]
    if read.base != 0 or len(moving) != 1 or read.steps[moving[0]] != step or read.shape[moving[0]] != size:
        return None
    return moving[0]


def _gather(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """Gather(flattened x, i * T + j) where i and j count along two axes that were made one."""
    data, indices = node.inputs
    read = grid(indices, ctx.shapes) if indices is not None and ctx.shapes.rank(indices) else None
    if data is None or read is None or read.base != 0 or sum(s != 0 for s in read.steps) < 2:
        return None
    flat = data.producer()
    source = flat.inputs[0] if flat is not None and is_layout(flat) else None
    result, shape = ctx.shapes.of(node.outputs[0]), ctx.shapes.of(data)
    view = rearrangement([flat], ctx.shapes) if flat is not None and source is not None else None
    if view is None or source is None or result is None or shape is None:
        return None
    axis = attribute(node, "axis", 0) % len(shape)
    inner = _unravelled(view.after[axis], view.sizes, read)
    if inner is None:
        return None
    after = (*view.after[:axis], *inner, *view.after[axis + 1 :])
    return _moved(node, source, dataclasses.replace(view, after=after), result, ctx.shapes)


def _unravelled(factors: Axis, sizes: Sequence[Dim], read: Grid) -> list[Axis] | None:
    """Return for each axis of the indices the factor it counts along, or None."""
    axes: list[Axis] = [()] * len(read.shape)
    stride: Dim = 1
    for factor in reversed(factors):
        matches = [k for k, s in enumerate(read.steps) if s == stride and s != 0 and not axes[k]]
        if len(matches) != 1 or read.shape[matches[0]] != sizes[factor]:
            return None
        axes[matches[0]] = (factor,)
        stride = stride * sizes[factor]
    uncounted = any(s != 0 and not axis for s, axis in zip(read.steps, axes, strict=True))
    return None if uncounted else axes


def _moved(node: ir.Node, source: ir.Value, wanted: Rearrangement, result: tuple[Dim, ...], shapes: Shapes) -> Answer:
    if wanted.shape(wanted.after) != result:
        return None
    steps = plan(wanted)
    if steps is None:
        return Refused("the gather only moves axes, but constants cannot express how")
    if not steps:
        return Same(node.outputs[0], source, f"{node.op_type} along counting indices takes everything")

    def build(builder: Builder) -> ir.Value:
        return builder.layout(source, steps)

    words = ", ".join(f"{s.op} {list(s.values)}" for s in steps)
    return Found(node.outputs[0], f"{node.op_type} along counting indices is {words}", build)


# Conditions that always hold ---------------------------------------------------------------------------


def _logical(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    for value, other in _orders(node):
        if truth(value, ctx.shapes) is is_op(node, "And") and ctx.shapes.same_shape(node.outputs[0], other):
            return Same(node.outputs[0], other, f"the other operand of {node.op_type} changes nothing")
    return None


def _where(node: ir.Node, scope: Scope, ctx: Context, *, made: _Made) -> Answer:
    """Where with a known condition, or one that gets narrower while a branch has the whole shape."""
    condition, yes, no = node.inputs
    known = truth(condition, ctx.shapes) if condition is not None else None
    taken = yes if known else no
    if condition is None or yes is None or no is None or taken is None:
        return None
    if known is not None and ctx.shapes.same_shape(node.outputs[0], taken):
        return Same(node.outputs[0], taken, f"the condition is always {str(known).lower()}")
    mask = _narrowed(condition, ctx.shapes)
    if mask is None or _broadcast([mask.shape, *_shapes_of([yes, no], ctx.shapes)]) != ctx.shapes.of(node.outputs[0]):
        return None
    return Found(node.outputs[0], mask.summary, lambda b: b.op("Where", [mask.build(b, made), yes, no]))


def _add(node: ir.Node, scope: Scope, ctx: Context, *, made: _Made) -> Answer:
    """Add of a mask, where the other operand has the whole shape, so that the mask may get narrower."""
    for value, other in _orders(node):
        if not is_op(value.producer(), *_MASKING) or not ctx.shapes.same_shape(node.outputs[0], other):
            continue
        if bounds(value, ctx.shapes) == Bounds(0, 0):
            return Same(node.outputs[0], other, "the mask is all zero")
        mask = _narrowed(value, ctx.shapes)
        if mask is not None:
            return _added(node, other, mask, made)
    return None


def _added(node: ir.Node, other: ir.Value, mask: _Narrow, made: _Made) -> Found:
    return Found(node.outputs[0], mask.summary, lambda b: b.op("Add", [other, mask.build(b, made)]))


def _orders(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    first, second = node.inputs
    if first is not None and second is not None:
        yield first, second
        yield second, first


_MASKING = ("Where", "And", "Or", "Not", "Mul", "Expand", "Unsqueeze")


@dataclasses.dataclass(frozen=True, slots=True)
class _Narrow:
    """A mask without the parts that change nothing: a node over other masks, or a value that is there.

    Attributes:
        mask: The mask it stands for.
        shape: Its shape, which broadcasts to that of the mask.
        operands: What the node takes; a single value when there is no node.
        op: The operator, or None.
    """

    mask: ir.Value
    shape: tuple[Dim, ...]
    operands: tuple[_Narrow | ir.Value, ...]
    op: str | None = None
    summary: str = "left out a condition that always holds"

    def build(self, builder: Builder, made: _Made) -> ir.Value:
        """Return the value, made in front of the first node that uses it."""
        there = made.get(self.mask)
        producer = there.producer() if there is not None else None
        if there is not None and (producer is None or producer.graph is builder.scope.graph):
            return there
        parts = [o.build(builder, made) if isinstance(o, _Narrow) else o for o in self.operands]
        made[self.mask] = parts[0] if self.op is None else builder.op(self.op, parts)
        return made[self.mask]


def _narrowed(mask: ir.Value, shapes: Shapes, depth: int = _MAX_DEPTH) -> _Narrow | None:
    """Return the mask without conditions that always hold, or None when there are none."""
    node = mask.producer()
    if node is None or depth == 0 or not is_op(node, "And", "Or", "Not", "Where"):
        return None
    inputs = [v for v in node.inputs if v is not None]
    if is_op(node, "And", "Or"):
        for value, other in _orders(node):
            if truth(value, shapes) is is_op(node, "And"):
                return _narrowed(other, shapes, depth - 1) or _there(mask, other, shapes)
    if is_op(node, "Where"):
        known = truth(inputs[0], shapes)
        if known is not None:
            return _there(mask, inputs[1 if known else 2], shapes)
        inner = [_narrowed(inputs[0], shapes, depth - 1), None, None]
    else:
        inner = [_narrowed(v, shapes, depth - 1) for v in inputs]
    if all(i is None for i in inner):
        return None
    parts = [i.shape if i is not None else shapes.of(v) for i, v in zip(inner, inputs, strict=True)]
    shape = _broadcast([p for p in parts if p is not None]) if None not in parts else None
    if shape is None:
        return None
    return _Narrow(mask, shape, tuple(i or v for i, v in zip(inner, inputs, strict=True)), node.op_type)


def _there(mask: ir.Value, value: ir.Value, shapes: Shapes) -> _Narrow | None:
    shape = shapes.of(value)
    return None if shape is None else _Narrow(mask, shape, (value,))


def _shapes_of(values: Sequence[ir.Value], shapes: Shapes) -> list[tuple[Dim, ...]]:
    found = [shapes.of(v) for v in values]
    return [s for s in found if s is not None]


def _broadcast(found: Sequence[tuple[Dim, ...]]) -> tuple[Dim, ...] | None:
    rank = max(len(s) for s in found)
    sizes = [broadcast(*(s[axis] for s in found if len(s) >= -axis)) for axis in range(-rank, 0)]
    known = tuple(s for s in sizes if s is not None)
    return known if len(known) == len(sizes) else None


# NaN guards --------------------------------------------------------------------------------------------


def _guard(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """Where(IsNaN(p), 0, p) of a softmax p."""
    condition, zero, weights = node.inputs
    test = condition.producer() if condition is not None else None
    if test is None or weights is None or not is_op(test, "IsNaN") or test.inputs[0] is not weights:
        return None
    softmax = weights.producer()
    if softmax is None or not is_op(softmax, "Softmax") or constant_scalar(zero) != 0:
        return None
    reason = may_be_nan(softmax, ctx.shapes, scope.opset)
    if reason is not None:
        return Refused(reason)
    if not ctx.shapes.same_shape(node.outputs[0], weights):
        return Refused("the shape of the softmax is not known")
    return Same(node.outputs[0], weights, "no row of the softmax can be masked in full")


def may_be_nan(softmax: ir.Node, shapes: Shapes, opset: int) -> str | None:
    """Return why a softmax over scores may give NaN though the scores are finite, or None."""
    scores = softmax.inputs[0]
    if scores is None or not is_over_last_axis(softmax, shapes, opset):
        return "the softmax is not over the last axis"
    total = summands(scores, shapes)
    masks = [t.value for t in total.terms if not _is_score(t.value, shapes)]
    if len(masks) == len(total.terms):
        return "it is not known that what is put into the softmax is finite"
    unsafe = [m for m in masks if not _never_all_infinite(m, shapes)]
    # The sum of two masks may be -infinity where neither is, and masked in full where neither is.
    if not unsafe and (len(masks) < 2 or _finite_sum(masks, shapes)):
        return None
    return "a row may be masked in full with -infinity, which gives NaN, and the guard makes that 0"


def _is_score(value: ir.Value, shapes: Shapes) -> bool:
    """Whether a value is a scaled product of matrices, perhaps with a number where a condition does not hold."""
    for _ in range(_MAX_DEPTH):
        node = value.producer()
        if node is None:
            return False
        if is_op(node, "MatMul", "Einsum", "Gemm"):
            return True
        if is_op(node, "Where"):
            source = _where_kept(node, shapes)
        elif is_op(node, "Mul", "Div"):
            source = _scaled(node)
        elif is_op(node, "Reshape", "Transpose", "Cast", "Identity", "Tanh"):
            source = node.inputs[0]
        else:
            return False
        if source is None:
            return False
        value = source
    return False


def _scaled(node: ir.Node) -> ir.Value | None:
    """Return what a constant number multiplies or divides; any other factor may be infinite."""
    first, second = node.inputs
    for source, factor in ((first, second), (second, first)):
        number = constant_scalar(factor)
        if number is not None and math.isfinite(number) and (is_op(node, "Mul") or (factor is second and number != 0)):
            return source
    return None


def _where_kept(node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """Return what a Where picks from besides a number, unless whole rows may become -infinity."""
    condition, yes, no = node.inputs
    for source, other in ((yes, no), (no, yes)):
        fill = constant_scalar(other)
        if fill is None or math.isnan(fill) or fill == math.inf:
            continue
        kept = condition is not None and source is yes and some_true_in_row(condition, shapes)
        whole = condition is not None and (shapes.of(condition) or ())[-1:] == (shapes.of(node.outputs[0]) or ())[-1:]
        return source if math.isfinite(fill) or (kept and whole) else None
    return None


def _never_all_infinite(mask: ir.Value, shapes: Shapes) -> bool:
    """Whether a mask that is added cannot be -infinity, or +infinity or NaN, along a whole row."""
    known = bounds(mask, shapes)
    if known is None or known.high == float("inf"):
        return False
    if known.finite:
        return True
    array = constant_array(mask, max_bytes=_MAX_CONSTANT)
    if array is not None:
        return array.ndim > 0 and bool(np.isfinite(array.max(axis=-1)).all())
    node = mask.producer()
    if node is None or not is_op(node, "Where") or not all(v is not None for v in node.inputs):
        return False
    condition, yes, no = node.inputs
    assert condition is not None and yes is not None and no is not None
    kept = bounds(yes, shapes)
    whole = shapes.of(mask) == shapes.of(condition)
    return whole and kept is not None and kept.finite and some_true_in_row(condition, shapes)


def _finite_sum(masks: Sequence[ir.Value], shapes: Shapes) -> bool:
    known = [bounds(m, shapes) for m in masks]
    dtype = shapes.dtype(masks[0])
    if dtype is None or any(b is None for b in known):
        return False
    return sum(b.low for b in known if b is not None) >= float(np.finfo(dtype.numpy()).min)
