"""Recurrent layers whose weights are integers, and whose activations become integers while the model runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.products import CONTRIB
from onnxopt.analysis.weights import dtype_name
from onnxopt.contract import Target
from onnxopt.graph import (
    Names,
    Scope,
    attribute,
    constant_tensor,
    first_output,
    has_references,
    is_op,
    remove_unused,
    replace_value,
)
from onnxopt.numeric import adjacent
from onnxopt.rewrite import Builder

RECURRENT = ("LSTM", "GRU", "RNN")
_LSTM_INPUTS = 8


def unfit(node: ir.Node, target: Target) -> str | None:
    """Return why a recurrent node cannot be computed with integer weights, or None."""
    if not is_op(node, "LSTM"):
        return f"ONNX Runtime has no {node.op_type} for integer weights"
    if target != "cpu":
        return "the standard has no LSTM for integer weights; DynamicQuantizeLSTM is for the target cpu"
    if has_references(node):
        return "an attribute refers to the function's caller"
    if attribute(node, "layout", 0):
        return "DynamicQuantizeLSTM has its batch on the second axis alone"
    for value in node.inputs[1:3]:
        tensor = constant_tensor(value)
        if tensor is None:
            return "its weights are not constant"
        if tensor.dtype != ir.DataType.FLOAT:
            return f"its weight is {dtype_name(tensor.dtype)}, and the operator computes with float32 alone"
        if len(tensor.shape) != 3:
            return "its weight has not three axes"
    return None


def write_lstm(node: ir.Node, scope: Scope, names: Names) -> None:
    """Write an LSTM as DynamicQuantizeLSTM, whose weights are transposed.

    Args:
        node: The LSTM.
        scope: The graph it is in.
        names: Where new names come from.
    """
    builder = Builder(scope, names, node, first_output(node))
    inputs: list[ir.Value | None] = [*node.inputs, *[None] * (_LSTM_INPUTS - len(node.inputs))]
    for index, name in ((1, "W"), (2, "R")):
        tensor = constant_tensor(inputs[index])
        assert tensor is not None, "checked before"
        integers, scale = _gates(tensor.numpy())
        inputs[index] = builder.constant(f"{name}_int8", integers)
        zero_point = builder.constant(f"{name}_zero_point", np.zeros(scale.shape, np.int8))
        inputs += [builder.constant(f"{name}_scale", scale), zero_point]
    attributes: dict[str, Any] = {name: attribute(node, name) for name in node.attributes if name != "layout"}
    new = builder.op("DynamicQuantizeLSTM", inputs, attributes, domain=CONTRIB, outputs=len(node.outputs)).producer()
    assert new is not None, "the builder made it"
    for old, made in zip(node.outputs, new.outputs, strict=True):
        if old.name:
            replace_value(old, made)
        else:
            made.name = ""
    remove_unused(node)


def _gates(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize directions x gates x inputs; return directions x inputs x gates, and directions x gates of scales."""
    per_direction = []
    for each in array:
        orders = adjacent.orders_of_matrix(0)
        grid = adjacent.fitting_grid(each, 0, orders)
        per_direction.append((adjacent.fitting_integers(each, grid, orders).T, grid.scale))
    integers, scales = zip(*per_direction, strict=True)
    return np.ascontiguousarray(np.stack(integers)), np.stack(scales)
