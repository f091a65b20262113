"""Residuals in front of a layer normalization are added up by one Sum where the runtime's own fusion is slower."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from onnxopt.analysis import kernels
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal
from onnxopt.graph import Scope, constant_tensor, is_op, only_use
from onnxopt.rewrite import Answer, Found, Refused, rewrite

FUSED = "com.microsoft.SkipLayerNormalization"
CPU = "CPUExecutionProvider"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SumResiduals(GraphPass):
    """Write the Add in front of a LayerNormalization, and that of a bias before it, as one Sum.

    ONNX Runtime fuses Add and LayerNormalization into SkipLayerNormalization when it loads a model. Where
    `analysis/kernels.py` says that this operator is slower than the two, a Sum keeps them apart. For the target "cpu"
    alone: elsewhere the fusion may well pay.
    """

    name = "sum-residuals"
    guarantee = Guarantee.EXACT

    def skip_reason(self, model: ir.Model, ctx: Context) -> str | None:
        """Return why there is nothing to gain."""
        if ctx.target != "cpu":
            return f"it is for the target cpu, not for {ctx.target}"
        ratio = kernels.ratio(FUSED, CPU)
        return "the runtime's fusion is not slower" if ratio is None or ratio <= kernels.NOT_SLOWER else None

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per normalization."""
        yield from rewrite(self.name, model, ctx, {"LayerNormalization": [_rule]})


def _rule(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    total = node.inputs[0]
    add = total.producer() if total is not None else None
    if total is None or add is None or not is_op(add, "Add") or add.graph is not node.graph:
        return None
    if only_use(total) is None:
        return Refused("the sum is used elsewhere too, so that the runtime does not fuse it")
    if not all(v is not None and ctx.shapes.same_shape(v, total) for v in add.inputs):
        return Refused("the operands are not known to have the same shape, so that the runtime does not fuse them")
    terms = _terms(add, ctx.shapes)
    return Found(total, f"sum of {len(terms)} in front of a LayerNorm", lambda b: b.op("Sum", terms))


def _terms(add: ir.Node, shapes: Shapes) -> list[ir.Value]:
    """Return what is added up: both operands, one of them in two parts where it is a value plus a bias."""
    operands = [v for v in add.inputs if v is not None]
    for value, other in (operands, operands[::-1]):
        inner = value.producer()
        if inner is None or not is_op(inner, "Add") or only_use(value) is None or inner.graph is not add.graph:
            continue
        parts = [v for v in inner.inputs if v is not None]
        if any(constant_tensor(v) is not None for v in parts) and _whole(parts, value, shapes):
            return [*parts, other]
    return operands


def _whole(parts: list[ir.Value], value: ir.Value, shapes: Shapes) -> bool:
    return any(shapes.same_shape(v, value) for v in parts)
