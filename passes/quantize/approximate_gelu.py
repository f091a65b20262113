"""Write GELU between convolutions in a form that can be computed with 8-bit integers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.graph import (
    Names,
    Scope,
    constant_tensor,
    first_output,
    has_references,
    is_op,
    remove_unused,
    replace_value,
    scopes,
)
from onnxopt.rewrite import Builder

STEEPNESS = 1.702
"""With it the logistic function is within .0095 of the normal distribution's (Hendrycks and Gimpel, 2016)."""

BROADCASTING = 7
"""From this opset on Mul broadcasts by itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApproximateGelu(GraphPass):
    """Replace GELU behind a convolution by x * sigmoid(1.702 x), which differs from it by .0204 at most.

    For `quantize-static` behind it: ONNX Runtime has 8-bit kernels for the sigmoid, a table of 256 entries, and for the
    product, but none for GELU, so that each one would take the activation back to floating point and compute erf there.
    An error of .02 is about a step of the 8-bit grid of such activations. On PP-OCRv6's detector, without VNNI and with
    7-bit weights, it makes 1.22 times as fast 1.46 times, and costs .006 and .004 of mask IoU.
    """

    name: ClassVar[str] = "approximate-gelu"
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per GELU."""
        names = functools.cache(lambda: Names(model))
        for scope in scopes(model):
            for node in scope.graph:
                if not (is_op(node, "Gelu") or is_op(node, "Gelu", domain="com.microsoft")):
                    continue
                site = Site(self.name, scope.path, first_output(node))
                reason = _reason(node, scope, ctx)
                if reason:
                    yield Refusal(site, reason)
                else:
                    yield Edit(site, "GELU as x * sigmoid(1.702 x)", functools.partial(_apply, node, scope, names))


def _reason(node: ir.Node, scope: Scope, ctx: Context) -> str:
    """Return why a GELU stays, or nothing."""
    source = node.inputs[0]
    producer = source.producer() if source is not None else None
    if source is None or has_references(node):
        return "an attribute refers to the function's caller"
    if not (is_op(producer, "Conv") or is_op(producer, "FusedConv", domain="com.microsoft")):
        return "it does not follow a convolution, so that nothing before it is computed with 8-bit integers"
    assert producer is not None, "is_op said that there is one"
    if constant_tensor(producer.inputs[1]) is None:
        return "the convolution before it has no constant weight, so that it is not computed with 8-bit integers"
    if ctx.shapes.dtype(source) != ir.DataType.FLOAT:
        return "8-bit kernels stand for float32"
    return "" if scope.opset >= BROADCASTING else f"Mul broadcasts from opset {BROADCASTING} on"


def _apply(node: ir.Node, scope: Scope, names: Callable[[], Names]) -> None:
    source, old = node.inputs[0], node.outputs[0]
    assert source is not None, "checked before"
    builder = Builder(scope, names(), node, old.name or "gelu")
    steep = builder.op("Mul", [source, builder.constant("steepness", np.asarray(STEEPNESS, np.float32))])
    share = builder.op("Sigmoid", [steep])
    for made in (steep, share):
        made.type, made.shape = source.type, source.shape
    replace_value(old, builder.op("Mul", [source, share]))
    remove_unused(node)
