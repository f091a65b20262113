"""Putting the nodes of a graph in an order in which they can be computed."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnxopt.errors import ModelError
from onnxopt.graph import bodies


def sort(graph: ir.Graph, label: str) -> None:
    """Sort the nodes of a graph, changing their order as little as possible.

    Args:
        graph: The graph; changed in place.
        label: What messages call it.

    Raises:
        ModelError: If a node depends on itself.
    """
    try:
        graph.sort()
    except ValueError:
        raise ModelError(f"{label} has a cycle through {_node_on_a_cycle(graph)}.") from None


def _node_on_a_cycle(graph: ir.Graph) -> str:
    """Return the label of a node that depends on itself."""
    done: set[ir.Node] = set()
    for root in graph:
        path, trail = {root}, [(root, _needed(root))]
        while trail:
            node, rest = trail[-1]
            following = next(rest, None)
            if following is None:
                trail.pop()
                path.discard(node)
                done.add(node)
            elif following in path:
                return f'the node "{following.name or following.outputs[0].name}" ({following.op_type})'
            elif following not in done:
                path.add(following)
                trail.append((following, _needed(following)))
    return "its nodes"


def _needed(node: ir.Node) -> Iterator[ir.Node]:
    """Yield the nodes of the same graph whose outputs a node or the bodies in it use."""
    waiting = [node]
    while waiting:
        user = waiting.pop()
        for value in user.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer.graph is node.graph:
                yield producer
        for _, body in bodies(user):
            waiting.extend(body)
