"""Clip, HardSigmoid and HardSwish in all exporters' forms become their operator."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.algebra import Monomial, is_product_root, monomial
from onnxopt.analysis.linear import Linear, fits, loss, read, scaled
from onnxopt.analysis.ramps import BOUNDS_AS_INPUT, Clamp, Ramp, clamp, clamps, largest, ramp, resolution
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal
from onnxopt.graph import Scope, is_op, only_use
from onnxopt.rewrite import Answer, Builder, Found, Refused, Same, rewrite

CLIP_OPSET = 6
"""Clip, Relu and HardSigmoid have their present form from this opset on; before, they carry a hint for reuse."""
HARD_SWISH_OPSET = 14
"""HardSwish is a standard operator from this opset on."""

_SIXTH = 1 / 6
_SWISH = {"alpha": _SIXTH, "beta": 0.5}
_NEAR = 4
"""Numbers this many units in the last place apart count as equal: they were rounded before they were written."""
_WITH_BIAS = ("Conv", "ConvTranspose", "Gemm")
_WITH_PARAMETERS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
"""HardSigmoid holds its parameters as float32, which is too coarse for double."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuseActivations(GraphPass):
    """Fuse activations that are made of straight lines.

    Clip, Relu, Max and Min with numbers, one after the other, become one; clamp(a * x + b) between 0 and 1, with its
    constants in any order, becomes HardSigmoid, and its product with x HardSwish where the opset has it (Howard
    et al. 2019, https://arxiv.org/abs/1905.02244). x + x * HardSigmoid(z) becomes x * Clip(z), with slope and offset
    moved into the Conv or Gemm that computes z.
    """

    name: ClassVar[str] = "fuse-activations"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per activation."""
        yield from rewrite(
            self.name,
            model,
            ctx,
            {
                **{op_type: [_clamped, _rectified, _ramp] for op_type in ("Clip", "Relu", "Max", "Min")},
                "Mul": [_ramp, _hard_swish],
                "Div": [_ramp, _hard_swish],
                "Add": [_ramp, _gated_residual],
                "Sub": [_ramp],
            },
        )


# Clip ---------------------------------------------------------------------------------------------------------


def _clamped(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """Several clamps one after the other, at the last of them."""
    user = only_use(node.outputs[0])
    if scope.opset < CLIP_OPSET or (user is not None and clamp(user, scope.opset, ctx.shapes) is not None):
        return None
    found = clamps(node, scope.opset, ctx.shapes)
    if (found is None or len(found.nodes) < 2) and _is_near_clamp(node):
        return Refused("the bounds cross, or are not numbers known in advance")
    if found is None:
        return None
    if found.low == -math.inf and found.high == math.inf:
        return Same(node.outputs[0], found.x, "clamps nothing")
    if len(found.nodes) < 2 or not _expressible(found, node, scope, ctx):
        return None

    def build(builder: Builder) -> ir.Value:
        return _emit_clamp(builder, found, ctx.shapes.dtype(found.x))

    return Found(node.outputs[0], f"{len(found.nodes)} clamps to [{found.low:.6g}, {found.high:.6g}]", build)


def _is_near_clamp(node: ir.Node) -> bool:
    """Whether a Clip follows another one that nothing else uses."""
    source = node.inputs[0] if node.inputs else None
    return is_op(node, "Clip") and source is not None and is_op(source.producer(), "Clip") and only_use(source) is node


def _expressible(found: Clamp, node: ir.Node, scope: Scope, ctx: Context) -> bool:
    """Whether one node can express a clamp: what has one bound only needs an operator that is there already."""
    one_sided = math.isinf(found.low) or math.isinf(found.high)
    return not one_sided or found.low == 0 or any(is_op(n, "Max", "Min") for n in found.nodes)


def _emit_clamp(builder: Builder, found: Clamp, dtype: ir.DataType | None) -> ir.Value:
    assert dtype is not None
    if found.high == math.inf:
        if found.low == 0:
            return builder.op("Relu", [found.x])
        return builder.op("Max", [found.x, builder.constant("low", found.low, dtype)])
    if found.low == -math.inf:
        return builder.op("Min", [found.x, builder.constant("high", found.high, dtype)])
    # Clip without a bound clamps to the largest number there is, so a bound that says so is left out.
    low, high = (None if abs(b) >= largest(dtype) else b for b in (found.low, found.high))
    if builder.scope.opset < BOUNDS_AS_INPUT:
        bounds = {name: b for name, b in (("min", low), ("max", high)) if b is not None}
        return builder.op("Clip", [found.x], bounds)
    inputs: list[ir.Value | None] = [found.x]
    inputs.append(None if low is None else builder.constant("low", low, dtype))
    if high is not None:
        inputs.append(builder.constant("high", high, dtype))
    return builder.op("Clip", inputs)


def _rectified(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """Max(x, 0) of what the runtime fuses with a Relu."""
    found = clamp(node, scope.opset, ctx.shapes) if is_op(node, "Max") else None
    if found is None or found.low != 0 or not is_op(found.x.producer(), "Conv", "Gemm"):
        return None
    return Found(node.outputs[0], "Max with 0 to Relu", lambda builder: builder.op("Relu", [found.x]))


# HardSigmoid and HardSwish ------------------------------------------------------------------------------------


def _ramp(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """A clamp with numbers around it: HardSigmoid, or a plain Clip."""
    if scope.opset < CLIP_OPSET:
        return None
    found = ramp(node, scope.opset, ctx.shapes)
    dtype = None if found is None else ctx.shapes.dtype(found.x)
    if found is None or dtype is None or len(found.nodes) < 2:
        return None
    near = _NEAR * resolution(dtype)
    if abs(found.slope - 1) < near and abs(found.offset) < near and math.isfinite(found.high - found.low):
        plain = Clamp(found.x, found.low, found.high, found.nodes)
        return Found(node.outputs[0], "numbers around a Clip", lambda b: _emit_clamp(b, plain, dtype))
    if not _is_unit(found, dtype):
        return None
    if dtype not in _WITH_PARAMETERS:
        return Refused("HardSigmoid holds its parameters as float32, which is too coarse for this type")
    slope = _slope(found, dtype)
    return Found(node.outputs[0], f"HardSigmoid of {found.x.name}", lambda b: b.op("HardSigmoid", [found.x], slope))


def _is_unit(found: Ramp, dtype: ir.DataType) -> bool:
    """Whether a ramp goes from 0 to 1."""
    near = _NEAR * resolution(dtype)
    return abs(found.low) < near and abs(found.high - 1) < near


def _slope(found: Ramp, dtype: ir.DataType) -> dict[str, float]:
    """Return the attributes of a HardSigmoid; those of HardSwish exactly, because the runtime looks for them."""
    near = _NEAR * resolution(dtype)
    if math.isclose(found.slope, _SIXTH, rel_tol=near) and math.isclose(found.offset, 0.5, rel_tol=near):
        return _SWISH
    return {"alpha": found.slope, "beta": found.offset}


def _hard_swish(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """A product of x and a ramp of x."""
    if scope.opset < CLIP_OPSET or not is_product_root(node):
        return None
    product = monomial(node.outputs[0], ctx.shapes)
    gate, found = _gate_in(product, node, scope, ctx.shapes)
    dtype = None if found is None else ctx.shapes.dtype(found.x)
    if gate is None or found is None or dtype is None:
        return None
    found = found.times(product.coefficient)
    rest = product.without(found.x, gate)
    if not _is_unit(found, dtype):
        return Refused("the product of x and a clamp of it is none that has an operator") if not rest else None
    fused = scope.opset >= HARD_SWISH_OPSET and _slope(found, dtype) is _SWISH
    if len(product.nodes) + len(found.nodes) <= (1 if fused else 2) + len(rest):
        return None
    if any(e not in (1, -1) for _, e in rest):
        return Refused("another factor is raised to a power")

    def build(builder: Builder) -> ir.Value:
        if fused:
            value = builder.op("HardSwish", [found.x])
        else:
            value = builder.op("Mul", [found.x, builder.op("HardSigmoid", [found.x], _slope(found, dtype))])
        return builder.times(value, rest)

    return Found(node.outputs[0], f"HardSwish of {found.x.name}", build)


def _gate_in(product: Monomial, node: ir.Node, scope: Scope, shapes: Shapes) -> tuple[ir.Value | None, Ramp | None]:
    """Return a factor that is a ramp of another factor, and the ramp."""
    for gate, exponent in product.factors:
        producer = gate.producer()
        if exponent != 1 or producer is None or only_use(gate) is None or producer.graph is not node.graph:
            continue
        found = ramp(producer, scope.opset, shapes)
        if found is None or not product.coefficient or shapes.dtype(found.x) not in _WITH_PARAMETERS:
            continue
        if product.exponent(found.x) == 1:
            return gate, found
    return None, None


# Residuals ----------------------------------------------------------------------------------------------------


def _gated_residual(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """Read x + x * ramp(z) as x * (1 + ramp(z)), a Clip when slope and offset move into what computes z."""
    if scope.opset < CLIP_OPSET:
        return None
    for x, other in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        gate = _other_factor(node, x, other)
        producer = gate.producer() if gate is not None else None
        if x is None or producer is None or producer.graph is not node.graph:
            continue
        found = ramp(producer, scope.opset, ctx.shapes)
        before = found.x.producer() if found is not None else None
        if found is None or before is None or before.graph is not node.graph or not is_op(before, *_WITH_BIAS):
            continue
        if not math.isfinite(found.high - found.low):
            continue
        moved = found.times(1, 1)
        linear = _movable(moved, before, ctx.shapes)
        if isinstance(linear, str):
            return Refused(linear)
        summary = f"1 + a gate between {found.low:.6g} and {found.high:.6g}"
        return Found(node.outputs[0], summary, lambda b: _emit_gated(b, x, linear, moved))  # noqa: B023
    return None


def _other_factor(node: ir.Node, x: ir.Value | None, product: ir.Value | None) -> ir.Value | None:
    """Return g when the second operand is x * g, and nothing else uses product and g."""
    mul = product.producer() if product is not None else None
    if x is None or product is None or mul is None or not is_op(mul, "Mul") or mul.graph is not node.graph:
        return None
    if only_use(product) is not node or not any(v is x for v in mul.inputs):
        return None
    gate = next((v for v in mul.inputs if v is not x), None)
    return gate if gate is not None and only_use(gate) is mul else None


def _movable(moved: Ramp, node: ir.Node, shapes: Shapes) -> Linear | str:
    """Return the operator that slope and offset can move into, or why they cannot."""
    linear = read(node, shapes)
    if linear is None or isinstance(linear, str):
        return linear or "slope and offset cannot move into what the gate is computed from"
    if only_use(moved.x) is None or not linear.owns_weight:
        return "what the gate is computed from is used elsewhere, too"
    bias = linear.bias_per_channel()
    if bias is None or not fits(bias * moved.slope + moved.offset, linear.dtype):
        return "the new bias is not one number per channel, or too large"
    return loss(linear.weight, linear.per_output(np.full(linear.channels, moved.slope))) or linear


def _emit_gated(builder: Builder, x: ir.Value, linear: Linear, moved: Ramp) -> ir.Value:
    node, dtype = linear.node, linear.dtype
    bias = linear.bias_per_channel()
    assert bias is not None
    weight = scaled(linear.weight, linear.per_output(np.full(linear.channels, moved.slope)))
    inputs = [node.inputs[0], builder.constant("weight", weight)]
    inputs.append(builder.constant("bias", bias * moved.slope + moved.offset, dtype))
    attributes = {name: a.value for name, a in node.attributes.items() if name != "beta"}
    z = builder.op(node.op_type, inputs, attributes)
    gate = _emit_clamp(builder, Clamp(z, moved.low, moved.high, ()), dtype)
    return builder.op("Mul", [x, gate])
