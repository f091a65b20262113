"""Shape rules for nodes that carry graphs: If, Loop and Scan."""

from __future__ import annotations

import onnx_ir as ir

from onnxopt.analysis import dims
from onnxopt.analysis.dims import Dim
from onnxopt.analysis.shape_view import PartialShape, Rule, Shape, Unknown, View, normalized_axis


def body_of(node: ir.Node, name: str) -> ir.Graph | None:
    """Return the graph a node carries under this attribute name, if it does."""
    attribute = node.attributes.get(name)
    if attribute is None or attribute.is_ref() or attribute.type != ir.AttributeType.GRAPH:
        return None
    return attribute.as_graph()


def _bodies(node: ir.Node, names: tuple[str, ...]) -> list[ir.Graph]:
    found = [body_of(node, name) for name in names]
    return [body for body in found if body is not None]


def branch_outputs(node: ir.Node) -> list[ir.Value]:
    """Return the outputs of both branches of an If."""
    return [value for body in _bodies(node, ("then_branch", "else_branch")) for value in body.outputs]


def taken_branch(view: View) -> ir.Graph | None:
    """Return the branch an If always takes, or None when the condition is not known."""
    content = view.content_or_none(0)
    condition = content.items[0] if content is not None and len(content.items) == 1 else None
    if condition is None:
        return None
    return body_of(view.node, "else_branch" if condition == 0 else "then_branch")


def _if(view: View) -> list[PartialShape]:
    known = view.knowledge.known_shape
    taken = taken_branch(view)
    if taken is not None:
        return [known(value) for value in taken.outputs]
    branches = _bodies(view.node, ("then_branch", "else_branch"))
    if len(branches) != 2:
        raise Unknown
    pairs = zip(branches[0].outputs, branches[1].outputs, strict=False)
    return [_agreed(known(a), known(b)) for a, b in pairs]


def _agreed(a: Shape | None, b: Shape | None) -> PartialShape:
    if a is None or b is None or len(a) != len(b):
        return None
    # What two branches agree on cannot come from within one of them.
    return [x if x == y else None for x, y in zip(a, b, strict=True)]


def _loop_states(node: ir.Node) -> list[ir.Value]:
    body = body_of(node, "body")
    return [] if body is None else list(body.inputs)


def _loop(view: View) -> list[PartialShape]:
    # A state whose shape is known inside the body has been proved to keep it (see Shapes), for no rounds too.
    return [view.knowledge.known_shape(state) for state in _loop_states(view.node)[2:]]


def _scan_outputs(node: ir.Node) -> list[ir.Value]:
    body = body_of(node, "body")
    return [] if body is None else list(body.outputs)


def scan_states(node: ir.Node, body: ir.Graph) -> int:
    """Return how many inputs of a Scan are states.

    Raises:
        Unknown: If the node is of operator set 8, which had another signature.
    """
    scanned = node.attributes.get("num_scan_inputs")
    if scanned is None or scanned.is_ref() or len(node.inputs) != len(body.inputs):
        raise Unknown
    return len(node.inputs) - scanned.as_int()


def scan_axis(node: ir.Node, name: str, position: int, rank: int) -> int:
    """Return the axis that the scanned input or output at this position moves along.

    Raises:
        Unknown: If there is no such axis.
    """
    axes = node.attributes.get(name)
    if axes is not None and axes.is_ref():
        raise Unknown
    return normalized_axis(axes.as_ints()[position] if axes is not None else 0, rank)


def _scan(view: View) -> list[PartialShape]:
    body = body_of(view.node, "body")
    if body is None:
        raise Unknown
    states = scan_states(view.node, body)
    scanned = view.shape(states)
    steps = scanned[scan_axis(view.node, "scan_input_axes", 0, len(scanned))]
    shapes: list[PartialShape] = [view.shape_or_none(i) for i in range(states)]
    for position, value in enumerate(body.outputs[states:]):
        shapes.append(_stacked(view, body, position, view.knowledge.known_shape(value), steps))
    return shapes


def _stacked(view: View, body: ir.Graph, position: int, shape: Shape | None, steps: Dim) -> PartialShape:
    """Return the shape of one scanned output: what a round gives, repeated along an axis."""
    if shape is None:
        return None
    axis = scan_axis(view.node, "scan_output_axes", position, len(shape) + 1)
    # Without any round nothing tells the sizes of what a round would have given.
    sure = dims.provably_positive(steps)
    sizes = [d if sure and view.knowledge.outside(d, body) else None for d in shape]
    return [*sizes[:axis], steps, *sizes[axis:]]


RULES: dict[str, Rule] = {
    "If": Rule(_if, (0,), also=branch_outputs),
    "Loop": Rule(_loop, also=_loop_states),
    "Scan": Rule(_scan, also=_scan_outputs),
}
