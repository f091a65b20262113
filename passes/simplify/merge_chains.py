"""Two of Cast, Pad, Slice, or a reduction and what undoes its axes, become one node."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

import onnx_ir as ir

from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal
from onnxopt.graph import OPEN_END, Scope, attribute, constant_ints, constant_tensor, has_references, is_op, only_use
from onnxopt.rewrite import Answer, Builder, Found, Refused, Same, rewrite

NEGATIVE_INDICES = 11
"""From this opset on, Gather takes indices that count from the end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeChains(GraphPass):
    """Merge a node with the one before it.

    Cast of a Cast that lost nothing; Pad of a Pad with the same constant; Slice of a Slice; a Slice of length one
    and the Squeeze behind it, which are a Gather; a reduction and the Squeeze or Unsqueeze behind it, which are
    its keepdims.
    """

    name: ClassVar[str] = "merge-chains"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per pair."""
        yield from rewrite(
            self.name,
            model,
            ctx,
            {
                "Cast": [_casts],
                "Pad": [_pads],
                "Slice": [_slices],
                "Squeeze": [_picked, _reduced],
                "Unsqueeze": [_kept],
            },
        )


def _before(node: ir.Node, *op_types: str) -> ir.Node | None:
    """Return what computes the first input, if it is such a node of the same graph without references."""
    source = node.inputs[0] if node.inputs else None
    found = source.producer() if source is not None else None
    if found is None or not is_op(found, *op_types) or found.graph is not node.graph or has_references(found):
        return None
    return found if found.inputs and found.inputs[0] is not None else None


def _alone(node: ir.Node) -> bool:
    """Whether the only output that is used has a single use."""
    return only_use(node.outputs[0]) is not None and not any(o.uses() or o.is_graph_output() for o in node.outputs[1:])


# Cast ---------------------------------------------------------------------------------------------------------

_EXACT_BITS: dict[ir.DataType, int] = {
    ir.DataType.BFLOAT16: 8,
    ir.DataType.FLOAT16: 11,
    ir.DataType.FLOAT: 24,
    ir.DataType.DOUBLE: 53,
}
"""Integers of so many bits are exact in a floating-point type."""

_WIDER: dict[ir.DataType, tuple[ir.DataType, ...]] = {
    ir.DataType.BFLOAT16: (ir.DataType.FLOAT, ir.DataType.DOUBLE),
    ir.DataType.FLOAT16: (ir.DataType.FLOAT, ir.DataType.DOUBLE),
    ir.DataType.FLOAT: (ir.DataType.DOUBLE,),
}

_INTEGERS: dict[ir.DataType, tuple[int, bool]] = {
    ir.DataType.INT8: (7, True),
    ir.DataType.INT16: (15, True),
    ir.DataType.INT32: (31, True),
    ir.DataType.INT64: (63, True),
    ir.DataType.UINT8: (8, False),
    ir.DataType.UINT16: (16, False),
    ir.DataType.UINT32: (32, False),
    ir.DataType.UINT64: (64, False),
}
"""Bits for the magnitude, and whether there is a sign."""


def _loses_nothing(source: ir.DataType, to: ir.DataType) -> bool:
    """Whether every value of one type is a value of the other."""
    if source == to:
        return True
    if source == ir.DataType.BOOL:
        return to in _INTEGERS or to in _EXACT_BITS
    if source in _INTEGERS:
        bits, signed = _INTEGERS[source]
        if to in _EXACT_BITS:
            return bits <= _EXACT_BITS[to]
        if to not in _INTEGERS:
            return False
        wide, takes_sign = _INTEGERS[to]
        return bits <= wide and (takes_sign or not signed)
    return to in _WIDER.get(source, ())


def _casts(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    first = _before(node, "Cast")
    if first is None or first.inputs[0] is None:
        return None
    source, between = ctx.shapes.dtype(first.inputs[0]), ctx.shapes.dtype(first.outputs[0])
    to = ir.DataType(attribute(node, "to", 0))
    if source is None or between is None:
        return None
    if not _loses_nothing(source, between):
        return Refused("the first Cast may lose something")
    if to == source:
        return Same(node.outputs[0], first.inputs[0], f"Cast to {between.name} and back")
    if not _alone(first):
        return None
    if to not in _INTEGERS and to not in _EXACT_BITS and to != ir.DataType.BOOL:
        return None
    # What does not fit into an integer is converted in ways that depend on the type it comes from.
    if to in _INTEGERS and between in _EXACT_BITS and not _loses_nothing(source, to):
        return Refused("a floating-point number may not fit into the integer type")
    origin = first.inputs[0]
    return Found(node.outputs[0], f"Cast over {between.name}", lambda b: b.op("Cast", [origin], {"to": int(to)}))


# Pad ----------------------------------------------------------------------------------------------------------


def _pads(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    first = _before(node, "Pad")
    if first is None or scope.opset < 2 or not _alone(first):
        return None
    both = [_amounts(n, scope.opset) for n in (first, node)]
    if both[0] is None or both[1] is None or len(both[0]) != len(both[1]):
        return None
    if any(attribute(n, "mode", "constant") != "constant" for n in (first, node)):
        return None
    if min(*both[0], *both[1], 0) < 0:
        return Refused("one Pad cuts something off")
    if not _same_filling(first, node, scope.opset):
        return Refused("the two do not fill with the same constant")
    sums = [a + b for a, b in zip(*both, strict=True)]

    def build(builder: Builder) -> ir.Value:
        if scope.opset < 11:
            value = attribute(node, "value", 0.0)
            return builder.op("Pad", [first.inputs[0]], {"pads": sums, "value": value})
        value_given = [v for v in node.inputs[2:3] if v is not None]
        return builder.op("Pad", [first.inputs[0], builder.ints("pads", sums), *value_given])

    return Found(node.outputs[0], f"Pad by {sums}", build)


def _amounts(node: ir.Node, opset: int) -> tuple[int, ...] | None:
    if opset < 11:
        found = attribute(node, "pads")
        return None if found is None else tuple(found)
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        return None
    return constant_ints(node.inputs[1])


def _same_filling(a: ir.Node, b: ir.Node, opset: int) -> bool:
    if opset < 11:
        return bool(attribute(a, "value", 0.0) == attribute(b, "value", 0.0))
    first, second = (n.inputs[2] if len(n.inputs) > 2 else None for n in (a, b))
    if first is second:
        return True
    one, two = constant_tensor(first), constant_tensor(second)
    if one is None or two is None:
        present = one if two is None else two
        left_out = first is None or second is None
        return left_out and present is not None and not present.numpy().any()
    return one.dtype == two.dtype and one.tobytes() == two.tobytes()


# Slice --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Cut:
    """Elements start, start + step ... before end of an axis."""

    start: int
    end: int
    step: int

    def within(self, size: int) -> _Cut:
        """Return the same cut of an axis of this size, counted from its beginning."""
        if self.step < 0:
            return self
        start, end = (max(b + size, 0) if b < 0 else min(b, size) for b in (self.start, self.end))
        return _Cut(start, end, self.step)


def _cuts(node: ir.Node, opset: int, shapes: Shapes) -> dict[int, _Cut] | None:
    """Return what a Slice cuts from which axis, or None when it is not constant."""
    parameters: list[Sequence[int] | None]
    if opset < 10:
        parameters = [attribute(node, "starts"), attribute(node, "ends"), attribute(node, "axes"), None]
    else:
        given = [*node.inputs[1:5], None, None]
        parameters = [constant_ints(v) for v in given[:4]]
        if any(v is not None and p is None for v, p in zip(given, parameters, strict=False)):
            return None
    starts, ends, axes, steps = parameters
    if starts is None or ends is None or len(starts) != len(ends):
        return None
    axes = list(range(len(starts))) if axes is None else list(axes)
    steps = [1] * len(starts) if steps is None else steps
    source = node.inputs[0]
    shape = shapes.of(source) if source is not None else None
    if len(axes) != len(starts) or len(steps) != len(starts) or (shape is None and min(axes, default=0) < 0):
        return None
    found: dict[int, _Cut] = {}
    for axis, *bounds in zip(axes, starts, ends, steps, strict=True):
        position = axis + len(shape) if axis < 0 and shape is not None else axis
        size = shape[position] if shape is not None and position < len(shape) else None
        found[position] = _Cut(*bounds) if not isinstance(size, int) else _Cut(*bounds).within(size)
    return found if len(found) == len(axes) else None


def _slices(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    first = _before(node, "Slice")
    if first is None or not _alone(first):
        return None
    before, after = (_cuts(n, scope.opset, ctx.shapes) for n in (first, node))
    if before is None or after is None:
        return None
    merged = dict(before)
    for axis, cut in after.items():
        joined = _joined(before[axis], cut) if axis in before else cut
        if joined is None:
            return Refused("both cut the same axis in a way that depends on its size")
        merged[axis] = joined
    axes = sorted(merged)
    columns = {
        "starts": [merged[a].start for a in axes],
        "ends": [merged[a].end for a in axes],
        "axes": axes,
        "steps": [merged[a].step for a in axes],
    }

    def build(builder: Builder) -> ir.Value:
        if scope.opset < 10:
            return builder.op("Slice", [first.inputs[0]], {k: columns[k] for k in ("starts", "ends", "axes")})
        given = [k for k in columns if k != "steps" or any(s != 1 for s in columns[k])]
        return builder.op("Slice", [first.inputs[0], *(builder.ints(k, columns[k]) for k in given)])

    return Found(node.outputs[0], f"Slice of a Slice, axes {axes}", build)


def _joined(first: _Cut, second: _Cut) -> _Cut | None:
    """Return both cuts of one axis as one, if that holds for every size of the axis."""
    if first.step != 1 or second.step != 1 or min(first.start, second.start, second.end) < 0:
        return None
    start = first.start + second.start
    if second.end >= OPEN_END:
        return _Cut(start, first.end, 1)
    if first.end < 0:
        return None
    return _Cut(start, min(first.end, first.start + second.end), 1)


def _picked(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """Slice of one element of an axis, then Squeeze of the axis: Gather with that index."""
    first = _before(node, "Slice")
    if first is None or not _alone(first) or first.inputs[0] is None:
        return None
    cuts, axes = _cuts(first, scope.opset, ctx.shapes), _axes(node, scope.opset, 13)
    rank = ctx.shapes.rank(first.inputs[0])
    if cuts is None or axes is None or len(cuts) != 1 or len(axes) != 1 or not rank:
        return None
    ((axis, cut),) = cuts.items()
    if axes[0] % rank != axis or not _is_one(cut) or (cut.start < 0 and scope.opset < NEGATIVE_INDICES):
        return None
    source, index = first.inputs[0], cut.start

    def build(builder: Builder) -> ir.Value:
        return builder.op("Gather", [source, builder.constant("index", index, ir.DataType.INT64)], {"axis": axis})

    return Found(node.outputs[0], f"element {index} of axis {axis}", build)


def _is_one(cut: _Cut) -> bool:
    """Whether a cut is of one element, or of none where the index would be out of bounds."""
    if cut.step != 1:
        return False
    return cut.end == cut.start + 1 if cut.start != -1 else cut.end >= OPEN_END


def _axes(node: ir.Node, opset: int, since: int) -> tuple[int, ...] | None:
    """Return the axes of a node, an attribute before that opset and its second input from then on."""
    if opset < since:
        found = attribute(node, "axes")
        return None if found is None else tuple(found)
    return constant_ints(node.inputs[1]) if len(node.inputs) > 1 else None


# Reductions ---------------------------------------------------------------------------------------------------

_AXES_AS_INPUT = {
    "ReduceSum": 13,
    **dict.fromkeys(
        (
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSum",
            "ReduceLogSumExp",
            "ReduceMax",
            "ReduceMean",
            "ReduceMin",
            "ReduceProd",
            "ReduceSumSquare",
        ),
        18,
    ),
}
"""Since which opset the axes of a reduction are an input."""
_ARGS = ("ArgMax", "ArgMin")


def _reduced(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """A reduction that keeps its axes, then Squeeze of them."""
    return _with_keepdims(node, scope, ctx, keepdims=0)


def _kept(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """A reduction that drops its axes, then Unsqueeze of them."""
    return _with_keepdims(node, scope, ctx, keepdims=1)


def _with_keepdims(node: ir.Node, scope: Scope, ctx: Context, *, keepdims: int) -> Answer:
    first = _before(node, *_AXES_AS_INPUT, *_ARGS)
    if first is None or not _alone(first) or attribute(first, "keepdims", 1) == keepdims:
        return None
    source = first.inputs[0]
    rank = None if source is None else ctx.shapes.rank(source)
    if first.op_type in _ARGS:
        reduced: tuple[int, ...] | None = (attribute(first, "axis", 0),)
    else:
        reduced = _axes(first, scope.opset, _AXES_AS_INPUT[first.op_type])
    axes = _axes(node, scope.opset, 13)
    if not reduced or not axes or not rank or len(axes) != len(reduced):
        return None
    if {a % rank for a in axes} != {a % rank for a in reduced}:
        return None
    attributes = {name: a.value for name, a in first.attributes.items()} | {"keepdims": keepdims}

    def build(builder: Builder) -> ir.Value:
        return builder.op(first.op_type, list(first.inputs), attributes)

    return Found(node.outputs[0], f"{first.op_type} with keepdims={keepdims}", build)
