"""Small constants that several nodes share, which would make all of their channels go together."""

from __future__ import annotations

import onnx_ir as ir

from onnxopt.graph import Names, named, scopes, use_count

_LARGEST = 1 << 16
"""Bytes of a constant that may be copied for each of its users."""


def shared_vectors(model: ir.Model) -> list[ir.Value]:
    """Return the small initializers with one axis of channels that several nodes use, such as biases of zeros."""
    return [
        value
        for scope in scopes(model)
        if scope.function is None
        for value in scope.graph.initializers.values()
        if use_count(value) > 1 and not (value.is_graph_input() or value.is_graph_output()) and _is_vector(value)
    ]


def _is_vector(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes > _LARGEST:
        return False
    return 1 < tensor.size == max(tensor.shape.numpy(), default=0)


def copy_apart(model: ir.Model, values: list[ir.Value]) -> None:
    """Give every use of the values but the first a copy of its own; the data stays shared."""
    names = Names(model)
    for value in values:
        graph, tensor = value.graph, value.const_value
        assert graph is not None and tensor is not None, "they are initializers"
        for use in list(value.uses())[1:]:
            name = names.fresh(f"{value.name}_copy")
            copy = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()))
            copy.const_value = named(tensor, name)
            graph.register_initializer(copy)
            use.node.replace_input_with(use.idx, copy)
