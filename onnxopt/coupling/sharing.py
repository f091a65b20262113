"""Small constants that several nodes share, which would make all of their channels go together."""

from __future__ import annotations

import onnx_ir as ir

from onnxopt.graph import Names, is_op, named, remove_unused, scopes, use_count

_LARGEST = 1 << 16
"""Bytes of a constant that may be copied for each of its users."""


def shared_vectors(model: ir.Model) -> list[ir.Value]:
    """Return the small initializers with one axis of channels that several nodes use, such as biases of zeros.

    What an Identity passes on, as exporters write parameters that are equal, is used by those behind it.
    """
    return [
        value
        for scope in scopes(model)
        if scope.function is None
        for value in scope.graph.initializers.values()
        if use_count(value) and not (value.is_graph_input() or value.is_graph_output())
        if _is_vector(value) and len(_uses(value)) > 1
    ]


def _is_vector(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes > _LARGEST:
        return False
    return 1 < tensor.size == max(tensor.shape.numpy(), default=0)


def _uses(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """Return the nodes and their inputs that use a value, those behind an Identity in place of it."""
    found = []
    for node, index in value.uses():
        if is_op(node, "Identity") and use_count(node.outputs[0]) and not node.outputs[0].is_graph_output():
            found += _uses(node.outputs[0])
        else:
            found.append((node, index))
    return found


def copy_apart(model: ir.Model, values: list[ir.Value]) -> None:
    """Give every use of the values but the first a copy of its own; the data stays shared."""
    names = Names(model)
    for value in values:
        graph, tensor = value.graph, value.const_value
        assert graph is not None and tensor is not None, "they are initializers"
        passed_on = [use.node for use in value.uses() if is_op(use.node, "Identity")]
        for place, (node, index) in enumerate(_uses(value)):
            copy = value
            if place:
                name = names.fresh(f"{value.name}_copy")
                copy = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()))
                copy.const_value = named(tensor, name)
                graph.register_initializer(copy)
            node.replace_input_with(index, copy)
        for node in passed_on:
            remove_unused(node)
