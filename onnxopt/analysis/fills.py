"""Tensors that a ConstantOfShape fills with one number: constants that take no room in the file."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.graph import attribute, constant_array, constant_ints, has_references, is_op, scopes
from onnxopt.rewrite import Builder

_MAX_ELEMENTS = 1 << 58
"""Beyond it, NumPy cannot address a tensor of 16-byte elements, not even as a view of one."""

STORED_BYTES = 2048
"""Tensors up to this size are stored even when they could be filled in: a node costs more than they do."""


def fill(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """Return what a ConstantOfShape of a constant shape makes, as a view of one element, or None.

    An Unsqueeze of it is one as well.
    """
    node = value.producer() if value is not None else None
    if node is None or not is_op(node, "ConstantOfShape", "Unsqueeze") or has_references(node):
        return None
    if is_op(node, "Unsqueeze"):
        inner = fill(node.inputs[0])
        axes = constant_ints(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "axes")
        return None if inner is None or axes is None else np.expand_dims(inner, tuple(axes))
    shape = constant_ints(node.inputs[0])
    number = attribute(node, "value")
    if shape is None or min(shape, default=0) < 0 or math.prod(size for size in shape if size) > _MAX_ELEMENTS:
        return None
    element = np.zeros((), np.float32) if number is None else number.numpy().reshape(())
    return np.broadcast_to(element, shape)


def filled_elements(model: ir.Model, *, but: Collection[ir.DataType] = ()) -> int:
    """Return how many elements ConstantOfShape nodes of constant shapes make, except those of some types."""
    nodes = (node for scope in scopes(model) for node in scope.graph if is_op(node, "ConstantOfShape"))
    arrays = (array for node in nodes if (array := fill(node.outputs[0])) is not None)
    return sum(array.size for array in arrays if ir.DataType.from_numpy(array.dtype) not in but)


def constant_or_fill(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """Return the array of a constant or of a filled tensor, or None; treat it as read-only."""
    found = constant_array(value)
    return fill(value) if found is None else found


def is_uniform(array: np.ndarray[Any, Any]) -> bool:
    """Whether all elements are the same number."""
    return bool(array.size) and bool((array == array.reshape(-1)[0]).all())


def store(builder: Builder, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    """Add a constant; a large one whose elements are all alike is filled in."""
    if array.nbytes <= STORED_BYTES or not is_uniform(array):
        return builder.constant(name, array)
    number = ir.tensor(array.reshape(-1)[:1].copy())
    return builder.op("ConstantOfShape", [builder.ints(f"{name}/shape", array.shape)], {"value": number})
