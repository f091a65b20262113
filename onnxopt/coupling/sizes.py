"""Where the elements of a shape given to Reshape, Expand or Resize come from, and how to give it others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import onnx_ir as ir

from onnxopt.graph import attribute, constant_array, constant_ints, insert_before, is_op

if TYPE_CHECKING:
    from onnxopt.analysis.shapes import Shapes

Place: TypeAlias = tuple[ir.Value, int]
"""An axis of a value."""
Element: TypeAlias = int | tuple[Place, ...] | None
"""A number of the file; the axes whose sizes it is the product of, mostly one; or something else."""


_SIZES_AT = {"ConstantOfShape": 0, "Expand": 1, "Reshape": 1, "Resize": 3}
"""Operators whose output has the sizes that they are given, and which input lists them."""


def _keeps_elements(node: ir.Node, shapes: Shapes) -> bool:
    """Whether the elements of the first input come out unchanged and in the same order."""
    if is_op(node, "Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape"):
        return True
    if not is_op(node, "Expand") or node.inputs[0] is None:
        return False
    return shapes.same_shape(node.inputs[0], node.outputs[0])


def element(value: ir.Value | None, index: int, shapes: Shapes) -> Element:
    """Return where an element of a list of sizes comes from."""
    constant = constant_ints(value)
    if constant is not None:
        return constant[index] if index < len(constant) else None
    node = None if value is None else value.producer()
    if node is None:
        return None
    if _keeps_elements(node, shapes):
        return element(node.inputs[0], index, shapes)
    if is_op(node, "Shape"):
        source = node.inputs[0]
        rank = None if source is None else shapes.rank(source)
        axes = None if rank is None else _read(node, rank)
        return None if axes is None or source is None or index >= len(axes) else ((source, axes[index]),)
    if is_op(node, "Concat"):
        for piece, start, length in _pieces(node, shapes):
            if start <= index < start + length:
                return element(piece, index - start, shapes)
        return None
    if is_op(node, "Mul"):
        return _product(node, shapes)
    chosen = _chosen(node, shapes)
    if chosen is None or index >= len(chosen):
        return None
    return element(node.inputs[0], chosen[index], shapes)


def _product(node: ir.Node, shapes: Shapes) -> Element:
    """Return the axes whose sizes a Mul multiplies; only of single numbers."""
    factors: list[Place] = []
    for value in node.inputs:
        found = element(value, 0, shapes) if value is not None and shapes.of(value) in ((), (1,)) else None
        if not isinstance(found, tuple):
            return None
        factors += found
    return tuple(factors)


def _read(shape: ir.Node, rank: int) -> list[int]:
    """Return the axes whose sizes a Shape node gives."""
    return list(range(rank))[slice(attribute(shape, "start", 0), attribute(shape, "end"))]


def _pieces(concat: ir.Node, shapes: Shapes) -> Iterator[tuple[ir.Value, int, int]]:
    """Yield what a Concat of lists joins, where each begins and how long it is, as far as that is known."""
    start = 0
    for piece in concat.inputs:
        shape = None if piece is None else shapes.of(piece)
        if piece is None or shape is None or len(shape) != 1 or not isinstance(shape[0], int):
            return
        yield piece, start, shape[0]
        start += shape[0]


def _chosen(node: ir.Node, shapes: Shapes) -> list[int] | None:
    """Return which elements of its first input a Gather or Slice of a list gives, or None for other nodes."""
    data = node.inputs[0] if node.inputs else None
    shape = None if data is None else shapes.of(data)
    if shape is None or len(shape) != 1 or not isinstance(shape[0], int):
        return None
    places = list(range(shape[0]))
    if is_op(node, "Gather"):
        indexes = constant_ints(node.inputs[1])
        if indexes is None or any(not -len(places) <= i < len(places) for i in indexes):
            return None
        return [places[i] for i in indexes]
    if is_op(node, "Slice"):
        starts, ends = (
            attribute(node, name) or constant_ints(node.inputs[i] if i < len(node.inputs) else None)
            for name, i in (("starts", 1), ("ends", 2))
        )
        steps = constant_ints(node.inputs[4]) if len(node.inputs) > 4 else (1,)
        if starts is None or ends is None or steps != (1,):
            return None
        return places[slice(starts[0], ends[0])]
    return None


def measured(shape: ir.Node, rank: int, shapes: Shapes) -> set[int]:
    """Return the axes whose sizes, read by a Shape node, end up in anything but a shape that `element` follows."""
    found: set[int] = set()
    # Each value with the axes whose sizes it holds, and whether it holds them one by one in this order.
    pending: list[tuple[ir.Value, list[int], bool]] = [(shape.outputs[0], _read(shape, rank), True)]
    while pending:
        value, axes, listed = pending.pop()
        if value.is_graph_output():
            found.update(axes)
        for use in value.uses():
            node = use.node
            if use.idx == 0 and _keeps_elements(node, shapes):
                pending.append((node.outputs[0], axes, listed))
            elif is_op(node, "Concat") and shapes.rank(value) == 1:
                pending.append((node.outputs[0], axes, False))
            elif is_op(node, "Gather", "Slice") and use.idx == 0 and (places := _chosen(node, shapes)) is not None:
                pending.append((node.outputs[0], [axes[i] for i in places] if listed else axes, listed))
            elif is_op(node, "Mul") and _product(node, shapes) is not None:
                pending.append((node.outputs[0], axes, False))
            elif not takes_sizes(node, use.idx):
                found.update(axes)
    return found


def takes_sizes(node: ir.Node, index: int) -> bool:
    """Whether an input is a list of sizes whose elements rules look up one by one."""
    place = _SIZES_AT.get(node.op_type)
    return place == index and is_op(node, *_SIZES_AT)


def with_elements(
    value: ir.Value,
    changes: Mapping[int, int],
    user: ir.Node,
    constant: Callable[[str, np.ndarray], ir.Value],
    fresh: Callable[[str], str],
    shapes: Shapes,
) -> ir.Value:
    """Return a list of sizes with other numbers at some places, for one node; others may share the given one.

    Args:
        value: The list as it is.
        changes: Place -> number. What is not a number of the file follows by itself, and stays.
        user: The node that takes the list.
        constant: Adds a constant under a name that is free.
        fresh: Makes a name that is free.
        shapes: What is known about shapes.
    """
    array = constant_array(value)
    if array is not None:
        return constant(value.name or "sizes", _changed(array, changes))
    node = value.producer()
    if node is None or is_op(node, "Shape"):
        return value
    inputs: list[ir.Value | None] = list(node.inputs)
    for place, (piece, own) in _passed_on(node, changes, shapes).items():
        if own:
            inputs[place] = with_elements(piece, own, user, constant, fresh, shapes)
    if all(new is old for new, old in zip(inputs, node.inputs, strict=True)):
        return value
    attributes = list(node.attributes.values())
    copy = ir.Node(node.domain, node.op_type, inputs, attributes, name=fresh(f"{node.name or 'sizes'}_kept"))
    output = copy.outputs[0]
    output.name, output.type = fresh(f"{value.name}_kept"), value.type
    output.shape = value.shape.copy() if value.shape is not None else None
    insert_before(user, copy)
    return output


def _passed_on(
    node: ir.Node, changes: Mapping[int, int], shapes: Shapes
) -> Mapping[int, tuple[ir.Value, Mapping[int, int]]]:
    """Return for inputs of a node that lists go through what is to change in them."""
    if is_op(node, "Concat"):
        return {
            place: (piece, {i - start: number for i, number in changes.items() if start <= i < start + length})
            for place, (piece, start, length) in enumerate(_pieces(node, shapes))
        }
    data = node.inputs[0]
    assert data is not None, "rules only follow lists through nodes that take one"
    if _keeps_elements(node, shapes):
        return {0: (data, changes)}
    chosen = _chosen(node, shapes) or []
    return {0: (data, {chosen[i]: number for i, number in changes.items() if i < len(chosen)})}


def _changed(array: np.ndarray, changes: Mapping[int, int]) -> np.ndarray:
    """Return a copy with other numbers; 0 (as in the input) and -1 (what is left) stay."""
    changed = np.array(array)
    flat = changed.reshape(-1)
    for index, number in changes.items():
        if flat[index] > 0:
            flat[index] = number
    return changed
