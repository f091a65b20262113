"""A Gemm between two Reshapes becomes MatMul and Add, which take any number of axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.dims import Dim
from onnxopt.analysis.layout import Step, reshape_step
from onnxopt.analysis.shapes import Shapes
from onnxopt.analysis.weights import FLOATS
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal
from onnxopt.graph import Scope, attribute, constant_tensor, has_references, is_op, only_use, use_count
from onnxopt.numeric import deferred
from onnxopt.rewrite import Answer, Builder, Found, Refused, rewrite

BROADCASTING = 7
"""From this opset on, Gemm and Add broadcast the bias."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnflattenLinear(GraphPass):
    """Replace Reshape, Gemm, Reshape by MatMul and Add.

    Exporters flatten all axes but the last for a Gemm, and bring them back behind it. Without the Reshapes, the Add
    is open to what the runtime fuses it with: an activation, or a residual and a normalization.
    """

    name: ClassVar[str] = "unflatten-linear"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per Gemm."""
        yield from rewrite(self.name, model, ctx, {"Reshape": [_rule]})


def _rule(node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    value = node.inputs[0]
    gemm = value.producer() if value is not None else None
    if value is None or gemm is None or not is_op(gemm, "Gemm") or gemm.graph is not node.graph:
        return None
    flat = gemm.inputs[0]
    before = flat.producer() if flat is not None else None
    if before is None or not is_op(before, "Reshape", "Flatten") or before.inputs[0] is None:
        return None
    reason = _unfit(value, gemm, before, scope, ctx)
    if reason:
        return Refused(reason)
    columns = _columns(gemm, ctx.shapes)
    shape, source = ctx.shapes.of(node.outputs[0]), before.inputs[0]
    if columns is None or shape is None or len(shape) < 3 or shape[-1] != columns[1]:
        return Refused("the second Reshape does not leave the columns as they are")
    steps = _steps(source, (*shape[:-1], columns[0]), ctx.shapes)
    if steps is None:
        return Refused("the axes before the columns are not known well enough")

    def build(builder: Builder) -> ir.Value:
        x = builder.layout(source, steps)
        product = builder.op("MatMul", [x, _weight(gemm, builder)])
        bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
        return product if bias is None else builder.op("Add", [product, bias])

    return Found(node.outputs[0], "Reshape, Gemm, Reshape to MatMul", build)


def _unfit(value: ir.Value, gemm: ir.Node, before: ir.Node, scope: Scope, ctx: Context) -> str | None:
    if scope.opset < BROADCASTING or has_references(gemm) or has_references(before):
        return "an attribute refers to the function's caller, or the opset is too old"
    if only_use(value) is None:
        return "the result is used in its flat form, too"
    if ctx.shapes.dtype(value) not in FLOATS:
        return "the numbers are integers"
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    shape = ctx.shapes.of(bias) if bias is not None else ()
    if shape is None or any(size != 1 for size in shape[:-1]):
        return "the bias may differ from row to row"
    if attribute(gemm, "alpha", 1.0) != 1 or (bias is not None and attribute(gemm, "beta", 1.0) != 1):
        return "the Gemm multiplies by a number"
    if attribute(gemm, "transA", 0):
        return "the Gemm transposes its input"
    weight = gemm.inputs[1]
    if attribute(gemm, "transB", 0) and (weight is None or constant_tensor(weight) is None or use_count(weight) != 1):
        return "the Gemm transposes a weight that is not constant or used elsewhere, too"
    return None


def _columns(gemm: ir.Node, shapes: Shapes) -> tuple[Dim, Dim] | None:
    """Return (columns of the input, columns of the result)."""
    shape = shapes.of(gemm.inputs[1]) if gemm.inputs[1] is not None else None
    if shape is None or len(shape) != 2:
        return None
    return (shape[1], shape[0]) if attribute(gemm, "transB", 0) else (shape[0], shape[1])


def _steps(source: ir.Value, wanted: tuple[Dim, ...], shapes: Shapes) -> tuple[Step, ...] | None:
    """Return what gives the input its axes; nothing where it has them before it is flattened."""
    shape = shapes.of(source)
    if shape is None or shape == wanted:
        return None if shape is None else ()
    step = reshape_step(shape, wanted)
    return None if step is None else (step,)


def _weight(gemm: ir.Node, builder: Builder) -> ir.Value:
    value = gemm.inputs[1]
    assert value is not None
    if not attribute(gemm, "transB", 0):
        return value
    tensor = constant_tensor(value)
    assert tensor is not None
    rows, columns = tensor.shape.numpy()
    turned = deferred.tensor(lambda: np.transpose(tensor.numpy()), tensor.dtype, (columns, rows), "transposed")
    return builder.tensor("weight", turned)
