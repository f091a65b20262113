"""Residual blocks: stretches of a network between two values that everything passes, which can be left out.

Activations are what is computed from the inputs by way of a layer with weights; masks, positions and sizes are not.
A bottleneck is an activation at whose place in the order of computation no other one is still needed. Where the way
from one bottleneck to another of the same shape leads along several paths, one of them carries the value on, and the
model still runs without the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from onnxopt.analysis.shapes import Shapes
from onnxopt.analysis.weights import FLOATS
from onnxopt.graph import bodies, constant_tensor, is_op

_SIZES = ("Shape", "Size")
_VIEWS = ("Transpose", "Identity", "Cast")
_WEIGHTY = 64
"""Elements from which on a constant of more than one axis counts as weights."""


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A stretch of the main graph that can be left out.

    Attributes:
        start: What goes in.
        end: What comes out: of the same shape and type, so that `start` can take its place.
        layers: The operators with weights between them, in order.
    """

    start: ir.Value
    end: ir.Value
    layers: tuple[ir.Node, ...]


def residual_blocks(model: ir.Model, shapes: Shapes) -> list[Block]:
    """Return the blocks of the main graph that can be left out, in order.

    What lies between two residual stretches without weights of its own, such as a normalization or an activation,
    belongs to either: a block is returned with it in front, and with it behind, where that makes a difference.
    """
    segments = list(_segments(model))
    found: dict[tuple[ir.Value, ir.Value], Block] = {}
    for index, segment in enumerate(segments):
        if not segment.layers or not segment.forks or segment.leaks:
            continue
        start, end = segment.start, segment.end
        for before in reversed(segments[:index]):
            if before.layers or before.forks or before.leaks:
                break
            start = before.start
        for behind in segments[index + 1 :]:
            if behind.layers or behind.forks or behind.leaks:
                break
            end = behind.end
        ways = [(start, segment.end), (segment.start, end)]
        fitting = [way for way in ways if _alike(*way, shapes)] or [(segment.start, segment.end)]
        for first, last in fitting:
            if _alike(first, last, shapes):
                found.setdefault((first, last), Block(first, last, segment.layers))
    return list(found.values())


def _alike(start: ir.Value, end: ir.Value, shapes: Shapes) -> bool:
    same = shapes.same_shape(start, end) and shapes.dtype(start) == shapes.dtype(end)
    return same and not end.is_graph_output()


@dataclasses.dataclass(frozen=True, slots=True)
class _Segment:
    """What lies between two bottlenecks that follow one another.

    Attributes:
        start: The first.
        end: The second.
        layers: The nodes with weights in between.
        forks: Whether the start is used by several nodes.
        leaks: Whether an output of the model is computed in between.
    """

    start: ir.Value
    end: ir.Value
    layers: tuple[ir.Node, ...]
    forks: bool
    leaks: bool


def _segments(model: ir.Model) -> Iterator[_Segment]:
    nodes = list(model.graph)
    active = _activations(nodes)
    last_use: dict[ir.Value, int] = {}
    for index, node in enumerate(nodes):
        if not is_op(node, *_SIZES):
            last_use.update((value, index) for value in _read(node))
    outputs = set(model.graph.outputs)
    live: set[ir.Value] = set()
    layers: list[ir.Node] = []
    start: ir.Value | None = None
    leaks = False
    for index, node in enumerate(nodes):
        if _is_layer(node) and any(o in active for o in node.outputs):
            layers.append(node)
        live.update(v for v in node.outputs if v in active and last_use.get(v, -1) > index)
        live -= {v for v in _read(node) if last_use.get(v, -1) <= index}
        value = next(iter(live)) if len(live) == 1 else None
        leaks = leaks or any(v in outputs and v is not value for v in node.outputs)
        if value is None or value is start:
            continue
        if start is not None:
            users = {use.node for use in start.uses() if any(o in active for o in use.node.outputs)}
            yield _Segment(start, value, tuple(layers), len(users) > 1, leaks)
        start, layers, leaks = value, [], False


def _activations(nodes: Sequence[ir.Node]) -> set[ir.Value]:
    """Return the floating-point values that are computed from inputs by way of weights."""
    given: set[ir.Value] = set()  # what depends on inputs at all
    active: set[ir.Value] = set()
    for node in nodes:
        if is_op(node, *_SIZES):
            continue
        read = list(_read(node))
        if not any(v in given or v.is_graph_input() for v in read):
            continue
        given.update(node.outputs)
        if _is_layer(node) or any(v in active for v in read):
            active.update(v for v in node.outputs if v.dtype in FLOATS or v.dtype is None)
    return active


def _is_layer(node: ir.Node) -> bool:
    """Whether a node computes with a matrix or a kernel of weights, or looks rows of one up."""
    for value in node.inputs:
        tensor = constant_tensor(_origin(value))
        if tensor is not None and len(tensor.shape) > 1 and tensor.size >= _WEIGHTY:
            return tensor.dtype in FLOATS and max(tensor.shape.numpy()) < tensor.size
    return any(_is_layer(inner) for _, body in bodies(node) for inner in body)


def _origin(value: ir.Value | None) -> ir.Value | None:
    """Return what a value is a rearranged copy of."""
    while value is not None and (node := value.producer()) is not None and is_op(node, *_VIEWS):
        value = node.inputs[0]
    return value


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the values that a node reads, with those that its bodies take from outside."""
    yield from (v for v in node.inputs if v is not None)
    for _, body in bodies(node):
        for inner in body:
            yield from _read(inner)
        yield from body.outputs
