"""LayerNorm and RMSNorm in all exporters' forms become their operator, or the form that ONNX Runtime fuses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.algebra import is_product_root, monomial
from onnxopt.analysis.dims import Dim
from onnxopt.analysis.normalization import Factors, Norm, read
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal
from onnxopt.graph import Scope, is_op, only_use
from onnxopt.rewrite import Builder, Found, Refused, rewrite

LAYER_NORMALIZATION_OPSET = 17
RMS_NORMALIZATION_OPSET = 23
AXES_AS_INPUT = 18
"""From this opset on, ReduceMean takes its axes as an input."""

NO_SIZE = "there is no scale, and the normalized size is not known"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuseNormalization(GraphPass):
    """Fuse (x - mean(x)) / sqrt(mean((x - mean(x)) ** 2) + eps) * scale + bias, and the same without the mean.

    How it is read stands in `analysis/normalization.py`. Layer normalization: Ba, Kiros and Hinton 2016,
    https://arxiv.org/abs/1607.06450. RMS normalization: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
    Where the opset has no RMSNormalization, it is rewritten in the order that ONNX Runtime fuses when it loads.
    """

    name = "fuse-normalization"
    guarantee = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per normalization."""
        yield from rewrite(self.name, model, ctx, {"Mul": [_rule], "Div": [_rule]})


@dataclasses.dataclass(frozen=True, slots=True)
class _Parts:
    """A product that holds a normalization.

    Attributes:
        norm: The normalization.
        scale: The factor that has just the normalized shape; None without one.
        others: The factors besides, with exponents 1 and -1.
        coefficient: The number among the factors.
        dtype: Element type of what is normalized.
    """

    norm: Norm
    scale: ir.Value | None
    others: Factors
    coefficient: float
    dtype: ir.DataType | None

    @property
    def lacks_size(self) -> bool:
        """Whether a scale has to be made up, and its size is not known."""
        return self.scale is None and not all(isinstance(d, int) for d in self.norm.normalized)

    def gain(self, builder: Builder) -> ir.Value:
        """Return the scale that the operator asks for; ones where the product has none."""
        sizes = tuple(d for d in self.norm.normalized if isinstance(d, int))
        return self.scale or builder.constant("scale", np.ones(sizes), self.dtype)

    def times(self, builder: Builder, value: ir.Value) -> ir.Value:
        """Multiply by what the product holds besides normalization and scale."""
        return builder.times(value, self.others, self.coefficient, self.dtype)


def _rule(node: ir.Node, scope: Scope, ctx: Context) -> Found | Refused | None:
    if not is_product_root(node):
        return None
    product = monomial(node.outputs[0], ctx.shapes)
    norm = read(product, ctx.shapes)
    if norm is None:
        return None
    if isinstance(norm, str):
        return Refused(norm)
    scale, others = _take_scale(norm.rest, norm.normalized, ctx.shapes)
    if any(e not in (1, -1) for _, e in others):
        return Refused("another factor is raised to a power")
    parts = _Parts(norm, scale, others, product.coefficient * norm.factor, ctx.shapes.dtype(norm.x))
    return _layer_norm(node, parts, scope, ctx) if norm.centred else _rms_norm(node, parts, scope)


def _take_scale(factors: Factors, normalized: tuple[Dim, ...], shapes: Shapes) -> tuple[ir.Value | None, Factors]:
    """Split off the first factor that has just the normalized shape."""
    for value, exponent in factors:
        if exponent == 1 and shapes.same_shape(value, normalized):
            return value, tuple(f for f in factors if f[0] is not value)
    return None, factors


def _layer_norm(node: ir.Node, parts: _Parts, scope: Scope, ctx: Context) -> Found | Refused:
    norm = parts.norm
    if scope.opset < LAYER_NORMALIZATION_OPSET:
        return Refused(f"LayerNormalization needs opset {LAYER_NORMALIZATION_OPSET}; raise it with --opset")
    if parts.lacks_size:
        return Refused(NO_SIZE)
    result, bias = node.outputs[0], None
    if not parts.others and math.isclose(parts.coefficient, 1, rel_tol=1e-6):
        result, bias = _take_bias(node, norm.normalized, ctx.shapes)

    def build(builder: Builder) -> ir.Value:
        gain = parts.gain(builder)
        value = builder.op(
            "LayerNormalization",
            [norm.x, gain] if bias is None else [norm.x, gain, bias],
            {"axis": -norm.axes, "epsilon": norm.epsilon},
        )
        return parts.times(builder, value)

    over = "the last axis" if norm.axes == 1 else f"the last {norm.axes} axes"
    return Found(result, f"LayerNorm of {norm.x.name} over {over}", build)


def _take_bias(node: ir.Node, normalized: tuple[Dim, ...], shapes: Shapes) -> tuple[ir.Value, ir.Value | None]:
    """Return (value to replace, bias): the sum with a bias of the normalized shape, when that is the only use."""
    add = only_use(node.outputs[0])
    if add is None or not is_op(add, "Add") or add.graph is not node.graph:
        return node.outputs[0], None
    bias = next((v for v in add.inputs if v is not None and v is not node.outputs[0]), None)
    if bias is None or not shapes.same_shape(bias, normalized):
        return node.outputs[0], None
    producer = bias.producer()
    if producer is not None and not is_op(producer, "Constant"):
        return node.outputs[0], None  # it may be computed after the place where the node goes
    return add.outputs[0], bias


def _rms_norm(node: ir.Node, parts: _Parts, scope: Scope) -> Found | Refused | None:
    norm, standard = parts.norm, scope.opset >= RMS_NORMALIZATION_OPSET
    if parts.lacks_size:
        return Refused(NO_SIZE)
    if not standard and _is_recognized(node, norm, parts.scale):
        return None

    def build(builder: Builder) -> ir.Value:
        gain = parts.gain(builder)
        if standard:
            attributes = {"axis": -norm.axes, "epsilon": norm.epsilon}
            value = builder.op("RMSNormalization", [norm.x, gain], attributes)
        else:
            value = _recognized(builder, norm, gain, scope.opset, parts.dtype)
        return parts.times(builder, value)

    return Found(node.outputs[0], f"RMSNorm of {norm.x.name}", build)


def _recognized(builder: Builder, norm: Norm, scale: ir.Value, opset: int, dtype: ir.DataType | None) -> ir.Value:
    """Build x / sqrt(mean(x ** 2) + eps) * scale in the order that ONNX Runtime's own fusion looks for."""
    square = builder.op("Pow", [norm.x, builder.constant("two", 2, dtype)])
    axes = list(range(-norm.axes, 0))
    if opset >= AXES_AS_INPUT:
        mean = builder.op("ReduceMean", [square, builder.ints("axes", axes)], {"keepdims": 1})
    else:
        mean = builder.op("ReduceMean", [square], {"axes": axes, "keepdims": 1})
    total = builder.op("Add", [mean, builder.constant("epsilon", norm.epsilon, dtype)])
    return builder.op("Mul", [builder.op("Div", [norm.x, builder.op("Sqrt", [total])]), scale])


def _is_recognized(node: ir.Node, norm: Norm, scale: ir.Value | None) -> bool:
    """Whether the product already is (x / sqrt(...)) * scale; without the scale the runtime does not fuse it."""
    divide = next((v.producer() for v in node.inputs if v is not None and v is not scale), None)
    if scale is None or node.op_type != "Mul" or divide is None or not is_op(divide, "Div"):
        return False
    if divide.inputs[0] is not norm.x or divide.inputs[1] is None:
        return False
    root = divide.inputs[1].producer()
    return root is not None and is_op(root, "Sqrt") and root.inputs[0] is norm.inverse and _is_squared_by_pow(norm)


def _is_squared_by_pow(norm: Norm) -> bool:
    """Whether the mean is over Pow(x, 2); the runtime does not look for Mul(x, x)."""
    total = norm.inverse.producer()
    means = [v.producer() for v in total.inputs if v is not None] if total is not None else []
    squares = [m.inputs[0] for m in means if m is not None and is_op(m, "ReduceMean")]
    return any(s is not None and is_op(s.producer(), "Pow") for s in squares)
