"""From features per token or position to one vector per sample, as nodes of the graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.graph import Names

_SMALLEST = 1e-9
"""A row without a token gives zeros, not NaN."""


def mask_input(model: ir.Model) -> ir.Value | None:
    """Return the graph input that says which tokens are padding: integers or truth values, [batch, tokens]."""
    for value in model.graph.inputs:
        kind = value.dtype
        whole = kind is not None and (kind.is_integer() or kind == ir.DataType.BOOL)
        if whole and value.shape is not None and len(value.shape) == 2 and "mask" in (value.name or ""):
            return value
    return None


class Builder:
    """Appends nodes to a graph, with names that are free and the forms of its opset."""

    def __init__(self, model: ir.Model) -> None:
        """Collect the names in use."""
        self.names = Names(model)
        self.graph = model.graph
        self.opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))

    def add(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Append a node; return its output."""
        node = ir.node(op_type, list(inputs), attributes, name=self.names.fresh(f"head/{op_type}"))
        node.outputs[0].name = self.names.fresh(f"head/{op_type}_output")
        self.graph.append(node)
        return node.outputs[0]

    def constant(self, base: str, array: np.ndarray) -> ir.Value:
        """Add an initializer."""
        tensor = ir.tensor(array, name=self.names.fresh(base))
        value = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def reduce(self, op_type: str, value: ir.Value, axis: int, since: int) -> ir.Value:
        """Append a reduction over an axis, which is gone afterwards; from opset `since` on the axis is an input."""
        if self.opset >= since:
            axes = self.constant("head/axis", np.array([axis], np.int64))
            return self.add(op_type, value, axes, keepdims=0)
        return self.add(op_type, value, axes=[axis], keepdims=0)

    def unsqueezed(self, value: ir.Value, axis: int) -> ir.Value:
        """Append an axis of one element."""
        if self.opset >= 13:
            return self.add("Unsqueeze", value, self.constant("head/axis", np.array([axis], np.int64)))
        return self.add("Unsqueeze", value, axes=[axis])


def pool(model: ir.Model, value: ir.Value, rank: int, dtype: ir.DataType, *, flatten: bool) -> tuple[ir.Value, str]:
    """Append what turns features into one vector per sample.

    Args:
        model: The model, to which nodes are appended.
        value: The features.
        rank: How many axes they have; the first counts samples.
        dtype: Their element type.
        flatten: Whether all positions are kept side by side instead of their mean.

    Returns:
        The vectors, and how they were made in words (empty where nothing had to be done).

    Raises:
        ValueError: If there is no way for this number of axes.
    """
    if rank == 2:
        return value, ""
    build = Builder(model)
    if flatten and rank > 2:
        return build.add("Flatten", value, axis=1), "flattened"
    if rank == 4:
        return build.add("Flatten", build.add("GlobalAveragePool", value), axis=1), "the mean over all positions"
    if rank != 3:
        raise ValueError(f"they have {rank} axes")
    mask = mask_input(model)
    if mask is None:
        return build.reduce("ReduceMean", value, 1, 18), "the mean over all tokens"
    counted = build.unsqueezed(build.add("Cast", mask, to=int(dtype)), 2)
    total = build.reduce("ReduceSum", build.add("Mul", value, counted), 1, 13)
    least = build.constant("head/least", np.array(_SMALLEST, np.float32).astype(dtype.numpy()))
    tokens = build.add("Max", build.reduce("ReduceSum", counted, 1, 13), least)
    return build.add("Div", total, tokens), f'the mean over the tokens that "{mask.name}" marks'
