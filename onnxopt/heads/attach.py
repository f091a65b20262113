"""Writes a fitted classifier into a graph: in the place and form of the old head, or as a new one behind features."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.task import main_output
from onnxopt.errors import ModelError
from onnxopt.graph import (
    Names,
    add_constant,
    attribute,
    drop_unused_constants,
    insert_before,
    is_op,
    remove_unused,
    replace_value,
    root_scopes,
)
from onnxopt.heads.locate import BYPASSED, Head, reshaped, weight_shape
from onnxopt.heads.pooling import Builder
from onnxopt.probe.classifier import Array, Linear

CLASSES = "onnxopt.classes"
"""Key of the model's metadata under which the names of the classes stand, as a JSON list."""


def replace_head(model: ir.Model, head: Head, fitted: Linear) -> list[str]:
    """Put a classifier in the place of the head: the same operator with other weights.

    Args:
        model: It is changed.
        head: The head of this very model.
        fitted: The classifier on what the layer takes, flattened where that has positions.

    Returns:
        What else was changed, each in a sentence.

    Raises:
        ModelError: If what follows the head is bound to the old number of classes.
    """
    classes = fitted.weight.shape[1]
    old = (head.bias or head.node).outputs[0]
    declared = [(v, v.shape.copy() if v.shape is not None else None) for v in head.outputs]
    names = [v.name for v, _ in declared]
    new = _layer(model, head, fitted)
    _take_place(old, new)
    remove_unused(head.bias or head.node)
    notes = []
    for node in head.tail:
        notes += _adapt(model, node, head.classes, classes)
    axis = 1 if is_op(head.node, "Conv") else -1
    outputs = {v.name: v for v in model.graph.outputs}
    for name, (_, shape) in zip(names, declared, strict=True):
        outputs[name].shape = _resized(shape, axis, head.classes, classes)
    return notes


def append_head(
    model: ir.Model, features: ir.Value, fitted: Linear, dtype: ir.DataType, *, activation: str, name: str
) -> None:
    """Put a classifier behind features, in the place of the main output.

    Args:
        model: It is changed.
        features: A value of this very model, samples by features.
        fitted: The classifier.
        dtype: Element type of the features.
        activation: "Softmax", "LogSoftmax" or "".
        name: What the output is called.
    """
    build = Builder(model)
    weight = build.constant("head.weight", _cast(fitted.weight, dtype))
    bias = build.constant("head.bias", _cast(fitted.bias, dtype))
    value = build.add("Gemm", features, weight, bias)
    if activation:
        value = build.add(activation, value, axis=1)
    old = main_output(model)
    index = next((i for i, v in enumerate(model.graph.outputs) if v is old), 0)
    batch = features.shape[0] if features.shape is not None else None
    if old is not None and batch is None and old.shape is not None and len(old.shape):
        batch = old.shape[0]
    value.type = ir.TensorType(dtype)
    value.shape = ir.Shape([batch, fitted.weight.shape[1]])
    if old is None:
        model.graph.outputs.append(value)
    else:
        model.graph.outputs[index] = value
        if old.name == name:
            old.name = build.names.fresh(f"{name}/before")
        producer = old.producer()
        if producer is not None:
            remove_unused(producer)
    value.name = name


def name_classes(model: ir.Model, classes: Sequence[str]) -> None:
    """Store the names of the classes in the model's metadata."""
    model.metadata_props[CLASSES] = json.dumps(list(classes), ensure_ascii=False)


def _layer(model: ir.Model, head: Head, fitted: Linear) -> ir.Value:
    """Insert the new layer in front of the old one, and return its scores."""
    scope, names, node = next(root_scopes(model)), Names(model), head.node
    tensor = node.inputs[1]
    dtype = (tensor.dtype if tensor is not None else None) or head.features.dtype or ir.DataType.FLOAT
    classes = fitted.weight.shape[1]

    def constant(base: str, array: Array) -> ir.Value:
        return add_constant(scope, names, base, _cast(array, dtype), node)

    if is_op(node, "Conv"):
        weight = constant("head.weight", fitted.weight.T.reshape(classes, -1, *weight_shape(node)[2:]))
        attributes = {a.name: a for a in node.attributes.values()}
        return _insert(names, "Conv", [head.features, weight, constant("head.bias", fitted.bias)], attributes, node)
    if is_op(node, "Gemm"):
        transposed = attribute(node, "transB", 0)
        weight = constant("head.weight", fitted.weight.T if transposed else fitted.weight)
        attributes = {"transB": ir.AttrInt64("transB", 1)} if transposed else {}
        return _insert(names, "Gemm", [head.features, weight, constant("head.bias", fitted.bias)], attributes, node)
    product = _insert(names, "MatMul", [head.features, constant("head.weight", fitted.weight)], {}, node)
    return _insert(names, "Add", [product, constant("head.bias", fitted.bias)], {}, node)


def _insert(
    names: Names, op_type: str, inputs: list[ir.Value], attributes: dict[str, ir.Attr], before: ir.Node
) -> ir.Value:
    node = ir.Node("", op_type, inputs, list(attributes.values()), name=names.fresh(f"head/{op_type}"))
    node.outputs[0].name = names.fresh(f"head/{op_type}_output")
    node.outputs[0].type = before.outputs[0].type
    insert_before(before, node)
    return node.outputs[0]


def _take_place(old: ir.Value, new: ir.Value) -> None:
    """Let a value have the uses and the name of another."""
    if old.is_graph_output():
        replace_value(old, new)
        return
    name, old.name = old.name, f"{old.name}__replaced"
    old.replace_all_uses_with(new)
    new.name = name


def _adapt(model: ir.Model, node: ir.Node, old: int, new: int) -> list[str]:
    """Make a node behind the head work with another number of classes.

    Raises:
        ModelError: If it cannot be.
    """
    scope, names = next(root_scopes(model)), Names(model)
    if is_op(node, *BYPASSED):
        source = node.inputs[0]
        assert source is not None
        replace_value(node.outputs[0], source)
        remove_unused(node)
        return [f"{node.op_type} after the head was taken out; it was made for the old scores."]
    if is_op(node, "Sigmoid"):
        name = names.fresh(f"{node.name or 'head'}/Softmax")
        softmax = ir.Node("", "Softmax", node.inputs, [ir.AttrInt64("axis", 1)], name=name)
        softmax.outputs[0].name = names.fresh(f"{name}_output")
        insert_before(node, softmax)
        _take_place(node.outputs[0], softmax.outputs[0])
        remove_unused(node)
        return ["Sigmoid became Softmax: each sample has one class."]
    if is_op(node, "Reshape", "Expand"):
        try:
            target = reshaped(node, old, new)
        except ValueError as error:
            raise ModelError(f"The head cannot be replaced: {error}; choose other features with --at.") from error
        if target is not None:
            before = node.inputs[1]
            node.replace_input_with(1, add_constant(scope, names, "head.shape", target, node))
            drop_unused_constants([before])
    for value in node.outputs:
        if not value.is_graph_output():
            value.shape = None
    return []


def _resized(shape: ir.Shape | None, axis: int, old: int, new: int) -> ir.Shape | None:
    """Return a declared shape for another number of classes."""
    if shape is None:
        return None
    dims = list(shape)
    if len(dims) > 1 and dims[axis] == old:
        dims[axis] = new
    return ir.Shape(dims)


def _cast(array: Array, dtype: ir.DataType) -> Array:
    return np.ascontiguousarray(array, dtype=np.float32).astype(dtype.numpy())
