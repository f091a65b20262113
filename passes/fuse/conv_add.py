"""A residual and an activation behind a convolution are computed within it, on the CPU."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import onnx_ir as ir

from onnxopt.analysis.apart import CONV_ATTRIBUTES
from onnxopt.analysis.ramps import clamp
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal
from onnxopt.graph import Scope, attribute, has_references, is_op, only_use
from onnxopt.rewrite import Answer, Builder, Found, Refused, rewrite

BROADCASTING = 7
"""From this opset on, Add broadcasts its operands as in numpy."""

_ACTIVATIONS = ("Relu", "Clip", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuseConvAdd(GraphPass):
    """Fuse a Conv, the residual added to it, and the activation behind that, into FusedConv.

    ONNX Runtime does the same on the CPU, but only at its highest level of optimization. There it also keeps images
    in blocks of channels from one convolution to the next. A FusedConv is part of that only when the residual is laid
    out so, too: one that does not come from a convolution is therefore left to an Add.
    """

    name: ClassVar[str] = "fuse-conv-add"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def skip_reason(self, model: ir.Model, ctx: Context) -> str | None:
        """Say that only one target has the operator."""
        return None if ctx.target == "cpu" else "only the target cpu has FusedConv with a residual"

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per residual."""
        yield from rewrite(self.name, model, ctx, {"Add": [_rule]})


def _rule(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    if scope.opset < BROADCASTING:
        return None
    refused: Refused | None = None
    # The second operand first: it usually is the longer branch, the residual being what is at hand already.
    for value, residual in (tuple(node.inputs)[::-1], tuple(node.inputs)):
        conv = value.producer() if value is not None else None
        if value is None or residual is None or conv is None or not is_op(conv, "Conv"):
            continue
        reason = _unfit(node, conv, value, residual, ctx)
        if reason is None:
            return _found(node, conv, residual, scope, ctx)
        refused = Refused(reason)
    return refused


def _unfit(node: ir.Node, conv: ir.Node, value: ir.Value, residual: ir.Value, ctx: Context) -> str | None:
    if has_references(conv) or conv.graph is not node.graph:
        return "the convolution is in an outer graph, or an attribute refers to the function's caller"
    if only_use(value) is None:
        return "the convolution's output is used elsewhere, too"
    if ctx.shapes.dtype(value) != ir.DataType.FLOAT:
        return "the runtime has FusedConv for float32 only"
    if not ctx.shapes.same_shape(value, residual):
        return "the two may differ in shape"
    return None if _is_blocked(residual) else "the residual does not come from a convolution"


def _is_blocked(value: ir.Value) -> bool:
    """Whether the runtime has a value in blocks of channels, given that it has those of convolutions so."""
    node = value.producer()
    if node is not None and is_op(node, *_ACTIVATIONS, "MaxPool", "AveragePool") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None:
        return False
    return is_op(node, "Conv") or is_op(node, "FusedConv", domain="com.microsoft")


def _found(node: ir.Node, conv: ir.Node, residual: ir.Value, scope: Scope, ctx: Context) -> Found:
    user = only_use(node.outputs[0])
    activation = None if user is None or user.graph is not node.graph else _activation(user, scope, ctx)
    last = node if activation is None or user is None else user
    attributes = {name: a.value for name, a in conv.attributes.items() if name in CONV_ATTRIBUTES}
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None

    def build(builder: Builder) -> ir.Value:
        inputs = [conv.inputs[0], conv.inputs[1], bias, residual]
        return builder.op("FusedConv", inputs, attributes | (activation or {}), domain="com.microsoft")

    return Found(last.outputs[0], "Conv, Add" + (f", {last.op_type}" if last is not node else ""), build)


def _activation(node: ir.Node, scope: Scope, ctx: Context) -> dict[str, Any] | None:
    """Return the attributes that make FusedConv do what a node does, or None."""
    if has_references(node) or not is_op(node, *_ACTIVATIONS):
        return None
    if is_op(node, "LeakyRelu"):
        return {"activation": "LeakyRelu", "activation_params": [attribute(node, "alpha", 0.01)]}
    if is_op(node, "HardSigmoid"):
        slope = [attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)]
        return {"activation": "HardSigmoid", "activation_params": slope}
    if is_op(node, "Clip"):
        found = clamp(node, scope.opset, ctx.shapes)
        if found is None or not math.isfinite(found.high - found.low):
            return None
        return {"activation": "Clip", "activation_params": [found.low, found.high]}
    return {"activation": node.op_type}
