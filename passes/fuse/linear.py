"""Constants that multiply or add per channel move into the weight and bias next to them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.layout import is_layout, rearrangement
from onnxopt.analysis.linear import (
    AFFINE_OPS,
    FLOATS,
    LINEAR_OPS,
    Affine,
    Array,
    Linear,
    affine,
    fits,
    loss,
    per_channel,
    read,
    scaled,
)
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.graph import (
    Names,
    Scope,
    add_constant,
    constant_tensor,
    drop_unused_constants,
    first_output,
    insert_before,
    is_op,
    make_node,
    only_use,
    remove_node,
    replace_value,
    scopes,
)
from onnxopt.numeric import deferred
from onnxopt.rewrite import Answer, Builder, Found, rewrite

GEMM_BROADCASTS = 7
"""From this opset on, Gemm broadcasts its third input as Add does."""

_SHARED = "the weight is used elsewhere, too"
_BIAS = "the bias is not one number per channel"
_RANGE = "the new bias does not fit into its type"
_FUSED = "what it is applied to may be an activation or normalization that the runtime fuses as it is"
_PADDED = "the zeros that the convolution pads with would not be shifted"
_NO_BIAS = "a MatMul has no bias to take what is added in front of it"
_BORDERS = "at the borders of a ConvTranspose fewer weights see what is added"

_MAGNITUDES = (1e-4, 1e4)
"""Factors are merged when they lie in here, so that no product leaves the range of its type."""
_FUSED_OPS = ("Add", "Div", "Mul", "Pow", "Reciprocal", "Sqrt", "Sub")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuseLinear(GraphPass):
    """Fold what multiplies or adds per channel into Conv, ConvTranspose, Gemm and MatMul.

    Takes Mul, Div, Add, Sub and Neg with constants, and BatchNormalization: behind the operator, also with
    Transposes and Reshapes in between, and in front of it where padding allows. New weights are computed in
    float64 and rounded once. A MatMul has no bias: what is added behind it ends in one Add, and the two become a
    Gemm where both are matrices. Numbers that multiply both operands of a MatMul multiply one of them.
    """

    name: ClassVar[str] = "fuse-linear"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per operator and side."""
        names = functools.cache(lambda: Names(model))
        for scope in scopes(model):
            for node in scope.graph:
                if not is_op(node, *LINEAR_OPS):
                    continue
                source = node.inputs[0].name if node.inputs and node.inputs[0] is not None else ""
                for look, name in ((_behind, first_output(node)), (_ahead, source or "")):
                    fold = look(node, scope, ctx.shapes)
                    if fold is None:
                        continue
                    site = Site(self.name, scope.path, name)
                    if isinstance(fold, str):
                        yield Refusal(site, fold)
                    else:
                        yield Edit(site, fold.summary, functools.partial(fold.apply, scope, names))
                found = _factors(node, scope) if is_op(node, "MatMul") else None
                if found is not None:
                    site = Site(self.name, scope.path, first_output(node))
                    yield Edit(
                        site, "merged the factors of both operands", functools.partial(found.apply, scope, names)
                    )
        yield from rewrite(self.name, model, ctx, {"Add": [_gemm]})


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    """An affine node that can be folded, with one number per channel.

    Attributes:
        node: The node.
        index: Which input is what it is applied to.
        scale: What it multiplies each channel by.
        shift: What it then adds.
        shape: How one number per channel broadcasts to its input; None when it does not.
    """

    node: ir.Node
    index: int
    scale: Array
    shift: Array
    shape: tuple[int, ...] | None

    @property
    def source(self) -> ir.Value:
        """What takes the place of its output: not what it was when the step was read, if a step before is gone."""
        value = self.node.inputs[self.index]
        assert value is not None
        return value


@dataclasses.dataclass(frozen=True, slots=True)
class _Fold:
    """What changes about one operator.

    Attributes:
        linear: The operator.
        factor: What its weight is multiplied by, shaped like it; None when it stays.
        bias: What it adds per channel; None when that stays.
        steps: The nodes that go.
        kept: The node that becomes the one Add behind a MatMul, if any.
    """

    linear: Linear
    factor: Array | None
    bias: Array | None
    steps: tuple[_Step, ...]
    kept: _Step | None = None

    @property
    def summary(self) -> str:
        folded = ", ".join(s.node.op_type for s in self.steps)
        return f"folded {folded} into {self.linear.node.op_type}"

    def apply(self, scope: Scope, names: Callable[[], Names]) -> None:
        node = self.linear.node
        unused = list(node.inputs[1:3])
        if self.factor is not None:
            node.replace_input_with(1, self._new_weight(scope, names()))
        if self.bias is not None and self.kept is None and not is_op(node, "MatMul"):
            base = unused[1].name if len(unused) > 1 and unused[1] is not None else f"{first_output(node)}/bias"
            bias = self._typed(self.bias)
            if len(node.inputs) < 3:
                node.resize_inputs(3)
            node.replace_input_with(2, add_constant(scope, names(), f"{base}/folded", bias, node))
            node.attributes.pop("beta", None)
        if self.kept is not None and self.bias is not None:
            self._add(self.kept, self.bias, scope, names())
        for step in self.steps:
            unused += step.node.inputs
            replace_value(step.node.outputs[0], step.source)
            remove_node(step.node)
        drop_unused_constants(dict.fromkeys(unused))

    def _new_weight(self, scope: Scope, names: Names) -> ir.Value:
        linear, factor = self.linear, self.factor
        assert factor is not None
        old, name = linear.weight, linear.node.inputs[1].name  # type: ignore[union-attr]
        tensor = deferred.tensor(lambda: scaled(old, factor), old.dtype, old.shape.numpy(), f"{name}/folded")
        return add_constant(scope, names, f"{name}/folded", tensor, linear.node)

    def _typed(self, array: Array) -> Array:
        return np.asarray(array.astype(self.linear.dtype.numpy()))

    def _add(self, step: _Step, bias: Array, scope: Scope, names: Names) -> None:
        """Put an Add of the bias in the place of a step."""
        old = step.node.outputs[0]
        array = bias[:1].reshape(()) if step.shape is None else bias.reshape(step.shape)
        constant = add_constant(scope, names, f"{old.name}/bias", self._typed(array), step.node)
        node = make_node(names, "Add", [step.source, constant], like=old)
        insert_before(step.node, node)
        unused = list(step.node.inputs)
        replace_value(old, node.outputs[0])
        remove_node(step.node)
        drop_unused_constants(unused)


# Behind the operator ------------------------------------------------------------------------------------------


def _behind(node: ir.Node, scope: Scope, shapes: Shapes) -> _Fold | str | None:
    found = _affine_users(node, scope)
    if not found:
        return None
    linear = read(node, shapes)
    if linear is None or isinstance(linear, str):
        return linear
    steps, reason = _foldable(found, linear, shapes)
    shifts = [s for s in steps if np.any(s.shift)]
    if is_op(node, "MatMul") and len(steps) <= min(1, len(shifts)):
        return reason if not steps else None
    if not steps:
        return reason
    scale, shift = _compose(steps, linear.channels)
    bias = linear.bias_per_channel()
    if bias is None:
        return _BIAS
    factor = None if np.all(scale == 1) else linear.per_output(scale)
    problem = None if factor is None else loss(linear.weight, factor)
    bias = bias * scale + shift
    if problem or not fits(bias, linear.dtype):
        return problem or _RANGE
    if not is_op(node, "MatMul"):
        return _Fold(linear, factor, bias, steps)
    kept = shifts[0] if shifts else None
    if kept is not None and kept.shape is None and np.any(bias != bias[0]):
        return "what is added behind the MatMul is not one number per channel at that place"
    return _Fold(linear, factor, bias if kept else None, tuple(s for s in steps if s is not kept), kept)


def _affine_users(node: ir.Node, scope: Scope) -> list[tuple[Affine, tuple[ir.Node, ...]]]:
    """Return the affine nodes behind a node, each with the layout nodes between the two."""
    found: list[tuple[Affine, tuple[ir.Node, ...]]] = []
    layouts: list[ir.Node] = []
    value = node.outputs[0]
    while (user := only_use(value)) is not None and user.graph is node.graph:
        if is_layout(user) and user.inputs[0] is value:
            layouts.append(user)
        elif is_op(user, *AFFINE_OPS) and (read_as := affine(user, scope.opset)) is not None and read_as.x is value:
            found.append((read_as, tuple(layouts)))
        else:
            break
        value = user.outputs[0]
    return found


def _foldable(
    found: Sequence[tuple[Affine, tuple[ir.Node, ...]]], linear: Linear, shapes: Shapes
) -> tuple[tuple[_Step, ...], str | None]:
    """Return the first affine nodes, as many as can be folded, and why the next one cannot."""
    steps: list[_Step] = []
    for map_, layouts in found:
        place = _place(linear, map_.x, layouts, shapes)
        if place is None:
            return tuple(steps), "the number of axes is not known"
        step = _step(map_, *place, linear.channels)
        if isinstance(step, str):
            return tuple(steps), step
        if not linear.owns_weight and np.any(step.scale != 1):
            return tuple(steps), _SHARED
        steps.append(step)
    return tuple(steps), None


def _place(
    linear: Linear, value: ir.Value, layouts: tuple[ir.Node, ...], shapes: Shapes
) -> tuple[int, int | None] | None:
    """Return (rank, axis of the channels) of a value behind layout nodes; no axis when they are spread."""
    if not layouts:
        return linear.rank, linear.axis
    rank = shapes.rank(value)
    if rank is None:
        return None
    read_as = rearrangement(layouts, shapes)
    channels = read_as.before[linear.axis] if read_as is not None else ()
    axes = read_as.after if read_as is not None and channels else ()
    return rank, next((i for i, axis in enumerate(axes) if axis == channels), None)


def _step(map_: Affine, rank: int, axis: int | None, channels: int) -> _Step | str:
    numbers: list[Array] = []
    for array, neutral in ((map_.scale, 1.0), (map_.shift, 0.0)):
        if array is None:
            numbers.append(np.full(channels, neutral))
            continue
        found = per_channel(map_, array, rank, axis, channels)
        if isinstance(found, str):
            return found
        numbers.append(found)
    shape = None if axis is None else (channels, *[1] * (rank - 1 - axis))
    index = next(i for i, v in enumerate(map_.node.inputs) if v is map_.x)
    return _Step(map_.node, index, numbers[0], numbers[1], shape)


def _compose(steps: Sequence[_Step], channels: int) -> tuple[Array, Array]:
    scale, shift = np.ones(channels), np.zeros(channels)
    for step in steps:
        scale, shift = scale * step.scale, shift * step.scale + step.shift
    return scale, shift


# In front of the operator -------------------------------------------------------------------------------------


def _ahead(node: ir.Node, scope: Scope, shapes: Shapes) -> _Fold | str | None:
    source = node.inputs[0] if node.inputs else None
    first = _affine_before(source, node, scope)
    if first is None:
        return None
    linear = read(node, shapes)
    if linear is None or isinstance(linear, str):
        return linear
    steps, reason = _foldable_before(first, linear, scope, shapes)
    if not steps:
        return reason
    scale, shift = _compose(steps[::-1], linear.input_channels)
    factor = None if np.all(scale == 1) else linear.per_input(scale)
    bias = None
    if np.any(shift):
        before = linear.bias_per_channel()
        if before is None:
            return _BIAS
        bias = before + linear.summed_over_input(shift)
    problem = None if factor is None else loss(linear.weight, factor)
    if problem or (bias is not None and not fits(bias, linear.dtype)):
        return problem or _RANGE
    return _Fold(linear, factor, bias, steps[::-1])


def _affine_before(value: ir.Value | None, user: ir.Node, scope: Scope) -> Affine | None:
    node = value.producer() if value is not None else None
    if value is None or node is None or node.graph is not user.graph or only_use(value) is not user:
        return None
    return affine(node, scope.opset) if is_op(node, *AFFINE_OPS) else None


def _foldable_before(
    first: Affine, linear: Linear, scope: Scope, shapes: Shapes
) -> tuple[tuple[_Step, ...], str | None]:
    """Return the affine nodes in front of an operator that can be folded, nearest first, and why not the next."""
    chain: list[Affine] = []
    found: Affine | None = first
    while found is not None:
        chain.append(found)
        found = _affine_before(found.x, found.node, scope)
    root = chain[-1].x.producer()
    if root is not None and is_op(root, *_FUSED_OPS) and all(constant_tensor(v) is None for v in root.inputs):
        return (), _FUSED
    steps: list[_Step] = []
    for map_ in chain:
        step = _step_before(map_, linear, shapes)
        if isinstance(step, str):
            return tuple(steps), step
        steps.append(step)
    return tuple(steps), None


def _step_before(map_: Affine, linear: Linear, shapes: Shapes) -> _Step | str:
    shape = shapes.of(map_.x)
    if shape is None:
        return "the shape of what it is applied to is not known"
    if len(shape) != linear.rank or shape[linear.input_axis] != linear.input_channels:
        return "the constant is not one number per channel"
    step = _step(map_, linear.rank, linear.input_axis, linear.input_channels)
    if isinstance(step, str):
        return step
    if np.any(step.shift):
        if is_op(linear.node, "MatMul"):
            return _NO_BIAS
        if is_op(linear.node, "ConvTranspose"):
            return _BORDERS
        if is_op(linear.node, "Conv") and linear.pads:
            return _PADDED
    return step if linear.owns_weight or np.all(step.scale == 1) else _SHARED


# Factors of both operands -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Factors:
    """Two operands of a MatMul that are multiplied by a number each."""

    left: Affine
    right: Affine
    factor: float

    def apply(self, scope: Scope, names: Callable[[], Names]) -> None:
        left, right = self.left.node, self.right.node
        unused = [*left.inputs, *right.inputs]
        old = left.outputs[0]
        constant = next(v for v in left.inputs if v is not self.left.x)
        dtype = constant_tensor(constant).dtype.numpy()  # type: ignore[union-attr]
        factor = add_constant(scope, names(), f"{old.name}/factor", np.array(self.factor, dtype), left)
        node = make_node(names(), "Mul", [self.left.x, factor], like=old)
        insert_before(left, node)
        for affine_node, value in ((left, node.outputs[0]), (right, self.right.x)):
            replace_value(affine_node.outputs[0], value)
            remove_node(affine_node)
        drop_unused_constants(dict.fromkeys(unused))


def _factors(node: ir.Node, scope: Scope) -> _Factors | None:
    """(a * s) @ (b * t) is (a * (s * t)) @ b, also with layout nodes in between."""
    left, right = (_scaled_operand(value, node, scope) for value in node.inputs)
    if left is None or right is None or left.scale is None or right.scale is None:
        return None
    low, high = _MAGNITUDES
    product = left.scale.item() * right.scale.item()
    fits_in = all(low <= abs(f) <= high for f in (left.scale.item(), right.scale.item(), product))
    return _Factors(left, right, product) if fits_in else None


def _scaled_operand(value: ir.Value | None, user: ir.Node, scope: Scope) -> Affine | None:
    """Return the multiplication by a number that a value comes from, through layout nodes."""
    while value is not None and only_use(value) is not None:
        node = value.producer()
        if node is None or node.graph is not user.graph:
            return None
        if is_layout(node):
            value = node.inputs[0]
            continue
        found = affine(node, scope.opset) if is_op(node, "Mul", "Div") else None
        # A constant of no axes cannot give the product more axes.
        fits_in = found is not None and found.scale is not None and found.scale.ndim == 0
        return found if fits_in else None
    return None


# MatMul and Add -----------------------------------------------------------------------------------------------


def _gemm(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """The product of two matrices plus a row: Gemm."""
    if scope.opset < GEMM_BROADCASTS:
        return None
    for index, value in enumerate(node.inputs):
        product, bias = value.producer() if value is not None else None, node.inputs[1 - index]
        if product is None or bias is None or not is_op(product, "MatMul") or product.graph is not node.graph:
            continue
        left, right = product.inputs
        assert value is not None
        if left is None or right is None or only_use(value) is not node:
            continue
        if ctx.shapes.rank(left) != 2 or ctx.shapes.rank(right) != 2 or ctx.shapes.dtype(left) not in FLOATS:
            continue
        row, columns = ctx.shapes.of(bias), ctx.shapes.of(right)
        if not row or columns is None or len(row) > 2 or row[-1] != columns[1] or row[:-1] not in ((), (1,)):
            continue
        return Found(node.outputs[0], "MatMul and Add to Gemm", _gemm_of(left, right, bias))
    return None


def _gemm_of(left: ir.Value, right: ir.Value, bias: ir.Value) -> Callable[[Builder], ir.Value]:
    return lambda builder: builder.op("Gemm", [left, right, bias])
