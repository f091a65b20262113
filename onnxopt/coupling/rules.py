"""How indexes of axes go through each operator: elementwise, layout, products and reductions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from onnxopt.coupling.builder import Builder, Opaque, is_constant, label
from onnxopt.coupling.reshaping import follow_sizes, reshape
from onnxopt.coupling.rewrites import SetBounds, SetIndexes, SetSplit
from onnxopt.coupling.sizes import measured
from onnxopt.graph import attribute, constant_array, constant_scalar

Rule: TypeAlias = Callable[[Builder, ir.Node], None]


def operand(node: ir.Node, index: int) -> ir.Value:
    """Return an input of a node.

    Raises:
        Opaque: If it is absent.
    """
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise Opaque(f"input {index} is missing")
    return value


def elementwise(builder: Builder, node: ir.Node) -> None:
    """All inputs are stretched to the shape of the output."""
    for output in node.outputs:
        if output.name:
            builder.same(output, node.outputs[0])
    for value in node.inputs:
        if value is not None:
            builder.broadcast(value, node.outputs[0])


def unary(builder: Builder, node: ir.Node) -> None:
    """What further inputs there are are numbers, not tensors."""
    for output in node.outputs:
        if output.name:
            builder.same(operand(node, 0), output)


def along_axis(builder: Builder, node: ir.Node) -> None:
    """The elements along one axis depend on one another: softmax, cumulative sums, normalization by length."""
    data, output = operand(node, 0), node.outputs[0]
    rank = len(builder.shape(data))
    default = 1 if builder.opset < 13 and node.op_type != "LpNormalization" else -1
    if node.op_type == "CumSum":
        found = constant_scalar(operand(node, 1))
        if found is None:
            raise Opaque("its axis is computed")
        default = int(found)
    axis = attribute(node, "axis", default) % rank
    flattens = node.op_type in ("Softmax", "LogSoftmax", "Hardmax") and builder.opset < 13
    mixed = range(axis, rank) if flattens else [axis]
    _mix(builder, node, data, output, mixed)


def _mix(builder: Builder, node: ir.Node, data: ir.Value, output: ir.Value, axes: range | list[int]) -> None:
    builder.same(data, output, but=axes)
    for axis in axes:
        for value in (data, output):
            builder.freeze(value, axis, f"{label(node)} mixes the elements along it")


def mixes_channels(builder: Builder, node: ir.Node) -> None:
    """Local response normalization."""
    _mix(builder, node, operand(node, 0), node.outputs[0], [1])


def mean_variance(builder: Builder, node: ir.Node) -> None:
    """Normalization over given axes."""
    data = operand(node, 0)
    rank = len(builder.shape(data))
    _mix(builder, node, data, node.outputs[0], [a % rank for a in attribute(node, "axes", (0, 2, 3))])


def reduction(builder: Builder, node: ir.Node) -> None:
    """Reduced axes are frozen, the others go on."""
    data, output = operand(node, 0), node.outputs[0]
    rank = len(builder.shape(data))
    if node.op_type in ("ArgMax", "ArgMin"):
        axes: tuple[int, ...] | None = (attribute(node, "axis", 0),)
    else:
        axes = builder.ints(node, "axes", 1)
    if not axes:
        axes = () if attribute(node, "noop_with_empty_axes", 0) else tuple(range(rank))
    reduced = {axis % rank for axis in axes}
    for axis in reduced:
        builder.freeze(data, axis, f"{label(node)} reduces it")
    kept = list(range(rank)) if attribute(node, "keepdims", 1) else [a for a in range(rank) if a not in reduced]
    for place, axis in enumerate(kept):
        if axis not in reduced:
            builder.tie(data, axis, output, place)


def top_k(builder: Builder, node: ir.Node) -> None:
    """The largest along one axis."""
    data = operand(node, 0)
    axis = attribute(node, "axis", -1) % len(builder.shape(data))
    for output in node.outputs:
        _mix(builder, node, data, output, [axis])


def matmul(builder: Builder, node: ir.Node) -> None:
    """Sums over the last axis of the left and the second-to-last of the right operand."""
    multiply(builder, node, 0, 1)


def multiply(builder: Builder, node: ir.Node, first: int, second: int, zeros: int | None = None) -> None:
    """Follow indexes through a product of two inputs as MatMul defines it.

    Args:
        builder: Where to.
        node: The node.
        first: Which input is the left operand.
        second: Which one is the right operand.
        zeros: The input that holds what stands for zero in the right one, where zero does not.
    """
    left, right, output = operand(node, first), operand(node, second), node.outputs[0]
    a, b, rank = len(builder.shape(left)), len(builder.shape(right)), len(builder.shape(output))
    if a == 0 or b == 0:
        raise Opaque("an operand is a number")
    inner = (a - 1, max(b - 2, 0))
    builder.tie(left, inner[0], right, inner[1])
    if a > 1:
        builder.tie(left, a - 2, output, rank - (2 if b > 1 else 1))
    if b > 1:
        builder.tie(right, b - 1, output, rank - 1)
    for value, own in ((left, a), (right, b)):
        if own > 2:
            shift = rank - (a > 1) - (b > 1) - (own - 2)
            for axis in range(own - 2):
                if builder.shape(value)[axis] != 1 or builder.shape(output)[axis + shift] == 1:
                    builder.tie(value, axis, output, axis + shift)
    if zeros is None and is_constant(left) and not is_constant(right):
        builder.sink(node, first, inner[0], (second, inner[1]))
    else:
        builder.sink(node, second, inner[1], (first, inner[0]), zero=None if zeros is None else (zeros, b - 1))


def gemm(builder: Builder, node: ir.Node) -> None:
    """One matrix product with a bias that is stretched."""
    multiply_transposed(builder, node, 0, 1, 2)


def multiply_transposed(
    builder: Builder, node: ir.Node, first: int, second: int, bias: int, zeros: int | None = None
) -> None:
    """Follow indexes through a product of two inputs as Gemm defines it; see `multiply`."""
    left, right, output = operand(node, first), operand(node, second), node.outputs[0]
    inner = (0 if attribute(node, "transA", 0) else 1, 1 if attribute(node, "transB", 0) else 0)
    builder.tie(left, inner[0], right, inner[1])
    builder.tie(left, 1 - inner[0], output, 0)
    builder.tie(right, 1 - inner[1], output, 1)
    if len(node.inputs) > bias and (added := node.inputs[bias]) is not None:
        builder.broadcast(added, output)
    if zeros is None and is_constant(left) and not is_constant(right):
        builder.sink(node, first, inner[0], (second, inner[1]))
    else:
        builder.sink(node, second, inner[1], (first, inner[0]), zero=None if zeros is None else (zeros, 1 - inner[1]))


def einsum(builder: Builder, node: ir.Node) -> None:
    """Axes of one letter go together; a letter that is missing in the result is summed up along."""
    equation = attribute(node, "equation", "").replace(" ", "")
    terms, arrow, result = equation.partition("->")
    letters = terms.split(",")
    if not arrow or "." in equation or len(letters) != len(node.inputs) or len(letters) > 2:
        raise Opaque(f"its equation is {equation}")
    if any(len(set(term)) != len(term) for term in [*letters, result]):
        raise Opaque(f"its equation is {equation}")
    places: dict[str, tuple[ir.Value, int]] = {letter: (node.outputs[0], i) for i, letter in enumerate(result)}
    constants = [is_constant(value) for value in node.inputs]
    for index, term in enumerate(letters):
        for axis, letter in enumerate(term):
            value = operand(node, index)
            if letter in places:
                builder.tie(value, axis, *places[letter])
            elif len(letters) == 1 or letter not in letters[1 - index]:
                builder.freeze(value, axis, f"{label(node)} sums it up")
            else:
                places[letter] = value, axis
            both = len(letters) == 2 and letter in letters[1 - index] and letter not in result
            if both and index == (0 if constants[0] and not constants[1] else 1):
                builder.sink(node, index, axis)


def transpose(builder: Builder, node: ir.Node) -> None:
    """Axes change places."""
    data = operand(node, 0)
    rank = len(builder.shape(data))
    for place, axis in enumerate(attribute(node, "perm", tuple(reversed(range(rank))))):
        builder.tie(data, axis, node.outputs[0], place)


def concat(builder: Builder, node: ir.Node) -> None:
    """Parts lie one behind the other."""
    output = node.outputs[0]
    axis = attribute(node, "axis", 0) % len(builder.shape(output))
    parts = [builder.ids(operand(node, i), axis) for i in range(len(node.inputs))]
    whole = builder.ids(output, axis)
    for index in range(len(node.inputs)):
        builder.same(operand(node, index), output, but=[axis])
    known = [part for part in parts if part is not None]
    if whole is not None and sum(map(len, known)) == len(whole) and len(known) == len(parts):
        builder.link(np.concatenate(known), whole)
        return
    for value in (*node.inputs, output):
        if value is not None:
            builder.freeze(value, axis, f"{label(node)} joins parts of unknown size")


def split(builder: Builder, node: ir.Node) -> None:
    """Parts of one axis go on alone."""
    data = operand(node, 0)
    axis = attribute(node, "axis", 0) % len(builder.shape(data))
    start, whole = 0, builder.known_ids(data, axis)
    for output in node.outputs:
        builder.same(data, output, but=[axis])
        part = builder.known_ids(output, axis)
        builder.link(part, whole[start : start + len(part)])
        start += len(part)
    if start != len(whole):
        raise Opaque("its parts do not add up")
    if len(node.inputs) > 1 and node.inputs[1] is not None and not is_constant(node.inputs[1]):
        raise Opaque("its sizes are computed")
    builder.rewrites.append(SetSplit(node, tuple(node.outputs), axis))


def slice_(builder: Builder, node: ir.Node) -> None:
    """A range of each axis."""
    data, output = operand(node, 0), node.outputs[0]
    shape = builder.shape(data)
    starts, ends = builder.ints(node, "starts", 1), builder.ints(node, "ends", 2)
    axes, steps = builder.ints(node, "axes", 3), builder.ints(node, "steps", 4)
    if starts is None or ends is None:
        raise Opaque("its bounds are missing")
    axes = tuple(range(len(starts))) if axes is None else tuple(a % len(shape) for a in axes)
    builder.same(data, output, but=axes)
    for place, axis in enumerate(axes):
        whole, part = builder.ids(data, axis), builder.ids(output, axis)
        if whole is None or part is None or (steps is not None and steps[place] != 1):
            for value in (data, output):
                builder.freeze(value, axis, f"{label(node)} cuts it in steps or at an unknown size")
            continue
        start, end, _ = slice(starts[place], ends[place]).indices(len(whole))
        builder.link(part, whole[start:end])
        if (start, end) != (0, len(whole)):
            builder.rewrites.append(SetBounds(node, (data,), axis, place, start, end, starts, ends))


def gather(builder: Builder, node: ir.Node) -> None:
    """A constant list of indexes picks from an axis; computed ones freeze it."""
    data, indexes, output = operand(node, 0), operand(node, 1), node.outputs[0]
    shape = builder.shape(data)
    axis = attribute(node, "axis", 0) % len(shape)
    inserted = len(builder.shape(indexes))
    for old in range(len(shape)):
        if old != axis:
            builder.tie(data, old, output, old if old < axis else old + inserted - 1)
    picked = constant_array(indexes, max_bytes=1 << 20)
    whole = builder.ids(data, axis)
    if picked is not None and inserted == 1 and whole is not None:
        picked = np.where(picked < 0, picked + len(whole), picked)
        builder.link(builder.known_ids(output, axis), whole[picked])
        builder.rewrites.append(SetIndexes(node, (data, output), axis, tuple(int(i) for i in picked), axis))
        return
    builder.freeze(data, axis, f"{label(node)} looks things up in it")
    for place in range(inserted):
        builder.tie(indexes, place, output, axis + place)


def expand(builder: Builder, node: ir.Node) -> None:
    """Axes of size 1 are stretched."""
    builder.broadcast(operand(node, 0), node.outputs[0])
    follow_sizes(builder, node, 1)


def tile(builder: Builder, node: ir.Node) -> None:
    """Axes that are repeated are frozen."""
    data, output = operand(node, 0), node.outputs[0]
    repeats = builder.ints(node, "repeats", 1)
    if repeats is None:
        raise Opaque("its repeats are missing")
    _unless_changed(builder, node, data, output, [r != 1 for r in repeats])


def pad(builder: Builder, node: ir.Node) -> None:
    """Axes that are padded are frozen."""
    data, output = operand(node, 0), node.outputs[0]
    rank = len(builder.shape(data))
    pads, axes = builder.ints(node, "pads", 1), builder.ints(node, "axes", 3)
    if pads is None:
        raise Opaque("its pads are missing")
    axes = tuple(range(rank)) if axes is None else tuple(a % rank for a in axes)
    changed = [False] * rank
    for place, axis in enumerate(axes):
        changed[axis] = pads[place] != 0 or pads[place + len(axes)] != 0
    _unless_changed(builder, node, data, output, changed)


def resize(builder: Builder, node: ir.Node) -> None:
    """Axes that keep their size go on; the others, and all when a region is cropped, are frozen."""
    data, output = operand(node, 0), node.outputs[0]
    if attribute(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise Opaque("it crops")
    same = [a == b for a, b in zip(builder.shape(data), builder.shape(output), strict=True)]
    _unless_changed(builder, node, data, output, [not equal for equal in same])
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        if attribute(node, "axes") is not None:
            raise Opaque("it resizes some axes by sizes")
        follow_sizes(builder, node, 3)


def _unless_changed(builder: Builder, node: ir.Node, data: ir.Value, output: ir.Value, changed: list[bool]) -> None:
    axes = [axis for axis, moved in enumerate(changed) if moved]
    builder.same(data, output, but=axes)
    for axis in axes:
        for value in (data, output):
            builder.freeze(value, axis, f"{label(node)} changes its size")


def shape_of(builder: Builder, node: ir.Node) -> None:
    """Axes whose sizes are used in other ways than as shapes are frozen."""
    data = operand(node, 0)
    for axis in measured(node, len(builder.shape(data)), builder.known):
        builder.freeze(data, axis, f"{label(node)} reads its size")


def depth_to_space(builder: Builder, node: ir.Node) -> None:
    """Blocks of channels become places, or the other way round."""
    data, output = operand(node, 0), node.outputs[0]
    wide, narrow = (data, output) if node.op_type == "DepthToSpace" else (output, data)
    block = attribute(node, "blocksize", 1) ** 2
    many, few = builder.known_ids(wide, 1), builder.known_ids(narrow, 1)
    inner = attribute(node, "mode", "DCR") == "CRD" and node.op_type == "DepthToSpace"
    builder.link(many.reshape(-1, block) if inner else many.reshape(block, -1), few[:, None] if inner else few[None])
    builder.tie(data, 0, output, 0)
    for value in (data, output):
        for axis in (2, 3):
            builder.freeze(value, axis, f"{label(node)} mixes places")


def branches(builder: Builder, node: ir.Node) -> None:
    """The outputs of an If are those of its branches."""
    for name in ("then_branch", "else_branch"):
        for inner, output in zip(node.attributes[name].as_graph().outputs, node.outputs, strict=True):
            builder.same(inner, output)


def filled(builder: Builder, node: ir.Node) -> None:
    """A tensor of one number."""
    follow_sizes(builder, node, 0)


def nothing(builder: Builder, node: ir.Node) -> None:
    """A constant: its axes are as free as their uses let them be."""


def numbers(builder: Builder, node: ir.Node) -> None:
    """The result depends on sizes or holds single numbers."""
    for value in (*node.inputs, *node.outputs):
        if value is not None and value.name:
            builder.freeze_all(value, f"{label(node)} computes with it")


_ELEMENTWISE = (
    "Add Sub Mul Div Pow Mod Max Min Sum Mean And Or Xor Equal Greater GreaterOrEqual Less LessOrEqual Where PRelu "
    "BitShift BitwiseAnd BitwiseOr BitwiseXor"
)
_UNARY = (
    "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast CastLike Ceil Celu Clip Cos Cosh Dropout Elu Erf Exp Floor "
    "Gelu HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink "
    "Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu"
)
_REDUCTIONS = (
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum "
    "ReduceSumSquare ArgMax ArgMin"
)
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), elementwise),
    **dict.fromkeys(_UNARY.split(), unary),
    **dict.fromkeys(_REDUCTIONS.split(), reduction),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax", "CumSum", "LpNormalization"), along_axis),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), reshape),
    "LRN": mixes_channels,
    "MeanVarianceNormalization": mean_variance,
    "TopK": top_k,
    "MatMul": matmul,
    "Gemm": gemm,
    "Einsum": einsum,
    "Transpose": transpose,
    "Concat": concat,
    "Split": split,
    "Slice": slice_,
    "Gather": gather,
    "Expand": expand,
    "Tile": tile,
    "Pad": pad,
    "Resize": resize,
    "Upsample": resize,
    "Shape": shape_of,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": depth_to_space,
    "If": branches,
    "Constant": nothing,
    "ConstantOfShape": filled,
}
"""Standard operators. What is in no table is frozen."""
