"""GELU in all exporters' forms becomes the Gelu operator, or the form that ONNX Runtime fuses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Literal

import onnx_ir as ir

from onnxopt.analysis.algebra import Monomial, is_product_root, monomial, summands
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Target
from onnxopt.graph import Scope, is_op
from onnxopt.rewrite import Builder, Found, Refused, rewrite

GELU_OPSET = 20
"""Gelu is a standard operator from this opset on."""

CUBIC = 0.044715
"""Coefficient of the tanh approximation (Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415)."""

Form = Literal["none", "tanh"]
"""Values of Gelu's attribute `approximate`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuseGelu(GraphPass):
    """Fuse x * (1 + erf(x / sqrt(2))) / 2 and its tanh approximation, factors and constants in any order.

    Where the model's opset has no Gelu and the target no contrib operator, the exact form is rewritten in the
    order that ONNX Runtime fuses when it loads the model.
    """

    name = "fuse-gelu"
    guarantee = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per activation."""
        yield from rewrite(self.name, model, ctx, {"Mul": [_rule], "Div": [_rule]})


def _rule(node: ir.Node, scope: Scope, ctx: Context) -> Found | Refused | None:
    if not is_product_root(node):
        return None
    product = monomial(node.outputs[0], ctx.shapes)
    found = _gelu_in(product, ctx.shapes)
    if found is None:
        return None
    x, gate, form = found
    rest = product.without(x, gate)
    if product.exponent(x) != 1 or any(e not in (1, -1) for _, e in rest):
        return Refused("the input or another factor is raised to a power")
    emit = _emitter(scope.opset, ctx.target, form)
    if emit is None or (emit is _recognized and _is_recognized(node, x)):
        return None
    factor = product.coefficient / 0.5

    def build(builder: Builder) -> ir.Value:
        dtype = ctx.shapes.dtype(x)
        return builder.times(emit(builder, x, form, dtype), rest, factor, dtype)

    kind = "GELU" if form == "none" else "GELU (tanh)"
    return Found(node.outputs[0], f"{kind} of {x.name}", build)


def _gelu_in(product: Monomial, shapes: Shapes) -> tuple[ir.Value, ir.Value, Form] | None:
    """Find (x, the factor 1 + erf or 1 + tanh, the form) in a product."""
    for gate, exponent in product.factors:
        if exponent != 1 or not is_op(gate.producer(), "Add"):
            continue
        total = summands(gate, shapes)
        if len(total.terms) != 1 or total.terms[0].sign != 1 or not math.isclose(total.constant, 1, rel_tol=1e-3):
            continue
        inner = total.terms[0].value.producer()
        if inner is None or inner.inputs[0] is None:
            continue
        for x, _ in product.factors:
            if x is gate:
                continue
            if is_op(inner, "Erf") and _is_scaled(inner.inputs[0], x, math.sqrt(0.5), shapes):
                return x, gate, "none"
            if is_op(inner, "Tanh") and _is_tanh_argument(inner.inputs[0], x, shapes):
                return x, gate, "tanh"
    return None


def _is_scaled(value: ir.Value, x: ir.Value, factor: float, shapes: Shapes) -> bool:
    """Whether value = factor * x."""
    product = monomial(value, shapes)
    return product.factors == ((x, 1.0),) and math.isclose(product.coefficient, factor, rel_tol=2e-3)


def _is_tanh_argument(value: ir.Value, x: ir.Value, shapes: Shapes) -> bool:
    """Whether value = sqrt(2 / pi) * (x + 0.044715 * x ** 3), factored or not."""
    outer = monomial(value, shapes)
    if not math.isclose(outer.coefficient, math.sqrt(2 / math.pi), rel_tol=2e-3):
        return False
    powers: dict[float, float] = {}
    shared = outer.exponent(x)
    sums = outer.without(x)
    if len(sums) != 1 or sums[0][1] != 1:
        return False
    total = summands(sums[0][0], shapes)
    if total.constant:
        powers[shared] = total.constant
    for term in total.terms:
        part = monomial(term.value, shapes)
        if part.without(x):
            return False
        powers[shared + part.exponent(x)] = term.sign * part.coefficient
    return set(powers) == {1.0, 3.0} and powers[1] == 1 and math.isclose(powers[3], CUBIC, rel_tol=2e-3)


Emit = Callable[[Builder, ir.Value, Form, "ir.DataType | None"], ir.Value]


def _emitter(opset: int, target: Target, form: Form) -> Emit | None:
    """Return what builds the activation for this opset and target, or None when the graph is good as it is."""
    if opset >= GELU_OPSET:
        return _standard
    if target != "portable":
        return _contrib
    return _recognized if form == "none" else None


def _standard(builder: Builder, x: ir.Value, form: Form, dtype: ir.DataType | None) -> ir.Value:
    return builder.op("Gelu", [x], {"approximate": form})


def _contrib(builder: Builder, x: ir.Value, form: Form, dtype: ir.DataType | None) -> ir.Value:
    return builder.op("Gelu" if form == "none" else "FastGelu", [x], domain="com.microsoft")


def _recognized(builder: Builder, x: ir.Value, form: Form, dtype: ir.DataType | None) -> ir.Value:
    """Build x * (1 + erf(x / sqrt(2))) * 0.5 in the order that ONNX Runtime's own fusion looks for."""
    scaled = builder.op("Div", [x, builder.constant("root2", math.sqrt(2), dtype)])
    gate = builder.op("Add", [builder.op("Erf", [scaled]), builder.constant("one", 1, dtype)])
    return builder.op("Mul", [builder.op("Mul", [x, gate]), builder.constant("half", 0.5, dtype)])


def _is_recognized(node: ir.Node, x: ir.Value) -> bool:
    """Whether a product root is already (x * gate) * 0.5 or (x * 0.5) * gate."""
    if node.op_type != "Mul":
        return False
    inner = next((v.producer() for v in node.inputs if v is not None and is_op(v.producer(), "Mul")), None)
    return inner is not None and any(v is x for v in inner.inputs)
