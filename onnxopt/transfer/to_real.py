"""The real model of a model."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from onnxopt.graph import all_nodes, constant_tensor, copied, is_op, remove_node, scopes
from onnxopt.transfer.integers import LAYERS, RULES
from onnxopt.transfer.real import Real
from onnxopt.transfer.site import At, Conversion
from onnxopt.transfer.windows import read_windows

_PASSING = frozenset(
    {
        "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "MaxPool",
        "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""Operators that hand elements on, or the largest of some: they do to integers what they do to what these stand for."""


def in_real_numbers(model: ir.Model, limits: Mapping[str, float] | None = None) -> Real:
    """Return the real model of a model.

    Args:
        model: It is not changed.
        limits: Where grids that take the place of an activation stand for Clip(x, 0, limit) instead of Relu, by the
            name of their integers. That a calibration met no larger value does not tell.
    """
    if not any(map(_is_on_integers, all_nodes(model))):
        return Real(model, model)
    copy = copied(model)
    real = Real(model, copy, _correspondence(model, copy), limits=dict(limits or {}))
    _convert(real)
    return real


def _convert(real: Real) -> None:
    """Turn the copy into real numbers: first biases, while the pairs around their layers are there."""
    conversion = Conversion(real)
    found = [s for s in scopes(real.model) if s.function is None]
    for scope in found:
        for node in list(scope.graph):
            layer = LAYERS.get((domain_of(node), node.op_type))
            if layer is not None and len(node.inputs) > 2:
                layer(At(conversion, node, scope))
    for scope in found:
        for node in list(scope.graph):
            rule = RULES.get((domain_of(node), node.op_type))
            if rule is not None:
                rule(At(conversion, node, scope))
            elif is_op(node, *_PASSING) and node.inputs[0] in conversion.floats:
                At(conversion, node, scope).pass_on()
            elif is_op(node, "Shape", "Size") and node.inputs[0] in conversion.floats:
                node.replace_input_with(0, conversion.floats[node.inputs[0]])
    for scope in reversed(found):
        for node in reversed(list(scope.graph)):
            if not any(o.uses() or o.is_graph_output() for o in node.outputs):
                remove_node(node)
    for scope in found:
        read_windows(conversion, scope)


def _is_on_integers(node: ir.Node) -> bool:
    if (domain_of(node), node.op_type) not in RULES:
        return False
    return not is_op(node, "DequantizeLinear") or constant_tensor(node.inputs[0]) is None


def domain_of(node: ir.Node) -> str:
    """Return the domain of a node's operator; "" for the standard one."""
    return "" if node.domain == "ai.onnx" else node.domain


def _correspondence(model: ir.Model, copy: ir.Model) -> dict[ir.Value, ir.Value]:
    found: dict[ir.Value, ir.Value] = {}
    for one, two in zip(scopes(model), scopes(copy), strict=True):
        found.update(zip(two.graph.inputs, one.graph.inputs, strict=True))
        found.update({v: one.graph.initializers[n] for n, v in two.graph.initializers.items()})
        for ours, theirs in zip(one.graph, two.graph, strict=True):
            found.update(zip(theirs.outputs, ours.outputs, strict=True))
    return found
