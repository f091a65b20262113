"""The constants behind weights that are transposed, converted or passed on before they are used."""

from __future__ import annotations

import onnx_ir as ir

from onnxopt.graph import attribute, constant_tensor, has_references, is_op, only_use


def stored(value: ir.Value, axis: int) -> tuple[ir.Value, int]:
    """Return the constant, and its axis, that an axis of a weight is read from; the given ones where there is none.

    Only a constant that serves nothing else is taken for the weight.

    Args:
        value: What a node takes.
        axis: An axis of it, not negative.
    """
    found, place = value, axis
    while constant_tensor(found) is None:
        source = _viewed(found)
        if source is None or only_use(source) is not found.producer():
            return value, axis
        node = found.producer()
        if node is not None and is_op(node, "Transpose"):
            perm = attribute(node, "perm")
            if perm is None and source.shape is None:
                return value, axis
            place = perm[place] if perm is not None else len(source.shape or ()) - 1 - place
        found = source
    return found, place


def _viewed(value: ir.Value) -> ir.Value | None:
    """Return what a node only gives another order of axes or another type, or None for other nodes."""
    node = value.producer()
    if node is None or not is_op(node, "Transpose", "Identity", "Cast", "DequantizeLinear") or has_references(node):
        return None
    return node.inputs[0]
