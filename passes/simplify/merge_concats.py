"""Concat, and the Split and Slice that undo it or that it undoes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import onnx_ir as ir

from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.graph import (
    OPEN_END,
    Scope,
    attribute,
    cannot_replace,
    constant_ints,
    first_output,
    has_references,
    is_op,
    is_used,
    only_use,
    remove_unused,
    replace_value,
    scopes,
)
from onnxopt.rewrite import Answer, Builder, Found, Same, rewrite


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConcats(GraphPass):
    """Merge Concat with what it undoes or what undoes it.

    Concat of a Concat becomes one; empty parts are left out; neighbouring parts that a Split or Slices have cut
    from one tensor stay in one piece; the parts of a Split of a Concat are the inputs of the Concat where the
    sizes agree.
    """

    name: ClassVar[str] = "merge-concats"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per Concat or Split."""
        yield from rewrite(self.name, model, ctx, {"Concat": [_nested, _without_empty, _reassembled]})
        for scope in scopes(model):
            for node in scope.graph:
                parts = _undone(node, scope, ctx.shapes)
                if parts is None:
                    continue
                pairs = [(o, p) for o, p in zip(node.outputs, parts, strict=True) if is_used(o)]
                site = Site(self.name, scope.path, first_output(node))
                reason = next((r for o, p in pairs if (r := cannot_replace(o, p))), None)
                if reason:
                    yield Refusal(site, reason)
                else:
                    yield Edit(site, "Split of a Concat", functools.partial(_replace, node, pairs))


def _replace(node: ir.Node, pairs: Sequence[tuple[ir.Value, ir.Value]]) -> None:
    for old, new in pairs:
        replace_value(old, new)
    remove_unused(node)


def _axis(node: ir.Node, shapes: Shapes, default: int | None = None) -> int | None:
    """Return the axis of a Concat or Split, counted from the front; None when that is not known."""
    axis = attribute(node, "axis", default)
    source = node.inputs[0]
    if axis is None or source is None:
        return None
    if axis >= 0:
        return int(axis)
    rank = shapes.rank(source)
    return None if rank is None else int(axis) + rank


def _values(node: ir.Node) -> list[ir.Value] | None:
    """Return the inputs of a Concat, None when one is missing."""
    found = [v for v in node.inputs if v is not None]
    return found if len(found) == len(node.inputs) else None


def _producer(value: ir.Value, user: ir.Node, op_type: str) -> ir.Node | None:
    """Return what computes a value for one node of the same graph alone, if it is that operator."""
    node = value.producer()
    if node is None or not is_op(node, op_type) or has_references(node) or node.graph is not user.graph:
        return None
    return node if only_use(value) is user else None


# Concat -------------------------------------------------------------------------------------------------------


def _nested(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """Concat of a Concat along the same axis."""
    values, axis = _values(node), _axis(node, ctx.shapes)
    if values is None or axis is None:
        return None
    flat: list[ir.Value] = []
    for value in values:
        inner = _producer(value, node, "Concat")
        parts = _values(inner) if inner is not None else None
        if inner is not None and parts and _axis(inner, ctx.shapes) == axis:
            flat.extend(parts)
        else:
            flat.append(value)
    if len(flat) == len(values):
        return None
    return Found(node.outputs[0], f"Concat of {len(flat)} parts", _concat(flat, axis))


def _concat(values: Sequence[ir.Value], axis: int) -> functools.partial[ir.Value]:
    return functools.partial(_build_concat, values=values, axis=axis)


def _build_concat(builder: Builder, *, values: Sequence[ir.Value], axis: int) -> ir.Value:
    return builder.op("Concat", values, {"axis": axis})


def _without_empty(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    values, axis = _values(node), _axis(node, ctx.shapes)
    if values is None or axis is None:
        return None
    shapes = [ctx.shapes.of(v) for v in values]
    kept = [v for v, s in zip(values, shapes, strict=True) if s is None or axis >= len(s) or s[axis] != 0]
    if len(kept) == len(values) or not kept:
        return None
    if len(kept) == 1:
        return Same(node.outputs[0], kept[0], f"Concat of {kept[0].name} and nothing")
    return Found(node.outputs[0], "left out empty parts", _concat(kept, axis))


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a tensor along an axis, from start to end."""

    source: ir.Value
    start: int
    end: int


def _reassembled(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """Concat of all parts of a Split, or of Slices that follow on each other."""
    values, axis = _values(node), _axis(node, ctx.shapes)
    if values is None or axis is None or len(values) < 2:
        return None
    found = _whole_splits(node, values, axis, ctx.shapes)
    if found is not None:
        if len(found) == 1:
            return Same(node.outputs[0], found[0], f"put {found[0].name} together again")
        return Found(node.outputs[0], "left a Split tensor whole", _concat(found, axis))
    pieces = [_piece(v, node, axis, scope.opset, ctx.shapes) for v in values]
    joined: list[ir.Value | _Piece] = []
    for value, piece in zip(values, pieces, strict=True):
        last = joined[-1] if joined else None
        if piece is not None and isinstance(last, _Piece) and _follows(last, piece):
            joined[-1] = _Piece(piece.source, last.start, piece.end)
        else:
            joined.append(value if piece is None else piece)
    if len(joined) == len(values):
        return None
    if len(joined) == 1 and isinstance(joined[0], _Piece) and _is_all(joined[0], axis, ctx.shapes):
        source = joined[0].source
        return Same(node.outputs[0], source, f"put {source.name} together again")
    singles = {p: v for v, p in zip(values, pieces, strict=True) if p is not None}

    def build(builder: Builder) -> ir.Value:
        parts = [p if isinstance(p, ir.Value) else _cut(builder, p, axis, scope, singles) for p in joined]
        return parts[0] if len(parts) == 1 else builder.op("Concat", parts, {"axis": axis})

    return Found(node.outputs[0], "joined neighbouring Slices", build)


def _whole_splits(node: ir.Node, values: Sequence[ir.Value], axis: int, shapes: Shapes) -> list[ir.Value] | None:
    """Return the inputs of a Concat with all outputs of a Split replaced by what it splits; None without any."""
    found: list[ir.Value] = []
    position = 0
    while position < len(values):
        split = _producer(values[position], node, "Split")
        outputs = list(split.outputs) if split is not None else []
        if (
            split is not None
            and split.inputs[0] is not None
            and _axis(split, shapes, 0) == axis
            and list(values[position : position + len(outputs)]) == outputs
            and all(only_use(o) is node for o in outputs)
        ):
            found.append(split.inputs[0])
            position += len(outputs)
        else:
            found.append(values[position])
            position += 1
    return found if len(found) < len(values) else None


def _piece(value: ir.Value, user: ir.Node, axis: int, opset: int, shapes: Shapes) -> _Piece | None:
    """Return what a Slice along this axis alone takes, when that is constant and counts from the front."""
    node = _producer(value, user, "Slice")
    if node is None or node.inputs[0] is None:
        return None
    if opset < 10:
        bounds = [attribute(node, name) for name in ("starts", "ends", "axes")]
        steps: Sequence[int] | None = (1,)
    else:
        bounds = [constant_ints(v) for v in (*node.inputs[1:4], None)[:3]]
        has_steps = len(node.inputs) > 4 and node.inputs[4] is not None
        steps = constant_ints(node.inputs[4]) if has_steps else (1,)
    if any(b is None or len(b) != 1 for b in bounds) or steps != (1,):
        return None
    start, end, along = (int(b[0]) for b in bounds)
    rank = shapes.rank(value) if along < 0 else 0
    if rank is None or along + rank != axis or not 0 <= start <= end:
        return None
    return _Piece(node.inputs[0], start, end)


def _follows(first: _Piece, second: _Piece) -> bool:
    return first.source is second.source and first.end == second.start


def _is_all(piece: _Piece, axis: int, shapes: Shapes) -> bool:
    if piece.start != 0:
        return False
    shape = shapes.of(piece.source)
    size = shape[axis] if shape is not None and axis < len(shape) else None
    return piece.end >= OPEN_END or (isinstance(size, int) and piece.end >= size)


def _cut(builder: Builder, piece: _Piece, axis: int, scope: Scope, singles: Mapping[_Piece, ir.Value]) -> ir.Value:
    """Return a piece: what is there already, or a new Slice."""
    if piece in singles:
        return singles[piece]
    columns = {"starts": [piece.start], "ends": [piece.end], "axes": [axis]}
    if scope.opset < 10:
        return builder.op("Slice", [piece.source], columns)
    return builder.op("Slice", [piece.source, *(builder.ints(k, v) for k, v in columns.items())])


# Split --------------------------------------------------------------------------------------------------------


def _undone(node: ir.Node, scope: Scope, shapes: Shapes) -> list[ir.Value] | None:
    """Return the inputs of a Concat when they are the outputs of this Split."""
    if not is_op(node, "Split") or has_references(node) or not node.inputs or node.inputs[0] is None:
        return None
    concat = node.inputs[0].producer()
    if concat is None or not is_op(concat, "Concat") or has_references(concat):
        return None
    values, axis = _values(concat), _axis(concat, shapes)
    if values is None or axis is None or axis != _axis(node, shapes, 0) or len(values) != len(node.outputs):
        return None
    known = [shapes.of(v) for v in values]
    sizes = [s[axis] for s in known if s is not None and axis < len(s)]
    wanted = _split_sizes(node, scope.opset)
    if len(sizes) != len(values):
        return None
    if wanted is not None:
        return values if list(wanted) == sizes else None
    # Without sizes the parts are equal, up to a smaller last one.
    return values if all(size == sizes[0] for size in sizes) else None


def _split_sizes(node: ir.Node, opset: int) -> Sequence[int] | None:
    """Return the sizes a Split is given, None when it makes equal parts; sizes that are not known are empty."""
    if opset < 13:
        found: Sequence[int] | None = attribute(node, "split")
        return found
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return None
    return constant_ints(node.inputs[1]) or ()
