"""What a cut is: boundary tensors in, boundary tensors out, and all that lies between them.

    tensors     "a,b->c"        from these values to those
    nodes       "nodes:/layer3/*"  the nodes whose name, or the name of an output, fits
    blocks      "block:3"       the fourth of the model's blocks, counted from 0
    backbone    "backbone"      everything in front of the last pooling, or of the last linear layer
    in a body   "block:3 in If_0.then_branch"  any of these, within the body of an If, Loop or Scan

A part is closed: with everything that its nodes and the bodies they carry read, except for the values at its
boundary. What depends on no input of the model (constants, and what is computed from them) belongs to the part.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from onnxopt.errors import UsageError
from onnxopt.graft.reasons import RefusedError
from onnxopt.graph import RANDOM_OPS, bodies, first_output, scopes
from onnxopt.registry import nearest

SIZES = frozenset({"Shape", "Size"})
"""Operators that look at the size of a value alone."""

_MOST_NAMED = 6


@dataclasses.dataclass(frozen=True, slots=True)
class Tensors:
    """From values to values, by name."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __str__(self) -> str:
        return f"{','.join(self.inputs)}->{','.join(self.outputs)}"


@dataclasses.dataclass(frozen=True, slots=True)
class Nodes:
    """The nodes that a glob fits."""

    pattern: str

    def __str__(self) -> str:
        return f"nodes:{self.pattern}"


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A block by its number, counted from 0; negative numbers count from the end."""

    number: int

    def __str__(self) -> str:
        return f"block:{self.number}"


@dataclasses.dataclass(frozen=True, slots=True)
class Backbone:
    """Everything in front of the head."""

    def __str__(self) -> str:
        return "backbone"


@dataclasses.dataclass(frozen=True, slots=True)
class Inside:
    """A cut within the body of a node: its path is "node.attribute", several joined by "/"."""

    cut: Plain
    path: str

    def __str__(self) -> str:
        return f"{self.cut}{WITHIN}{self.path}"


Plain = Tensors | Nodes | Block | Backbone
Cut = Plain | Inside
WITHIN = " in "
"""What stands between a cut and the path of the body that it lies in."""


def parse_cut(text: str) -> Cut:
    """Read a cut as it is written on the command line.

    Raises:
        UsageError: If it is none.
    """
    rest, within, path = text.strip().rpartition(WITHIN)
    return Inside(_parse_plain(rest.strip()), path.strip()) if within else _parse_plain(path)


def _parse_plain(text: str) -> Plain:
    if text == "backbone":
        return Backbone()
    kind, colon, rest = text.partition(":")
    if colon and kind == "nodes" and rest:
        return Nodes(rest)
    if colon and kind == "block":
        try:
            return Block(int(rest))
        except ValueError:
            raise UsageError(f'"{text}" names no block; write for example block:3, counted from 0.') from None
    before, arrow, after = text.partition("->")
    inputs, outputs = (tuple(filter(None, (n.strip() for n in side.split(",")))) for side in (before, after))
    if not arrow or not inputs or not outputs:
        raise UsageError(
            f'"{text}" is no cut; write "a,b->c" with the names of tensors, "nodes:GLOB", "block:N" or "backbone", '
            'with " in PATH" behind it for one in the body of a node.'
        )
    return Tensors(inputs, outputs)


@dataclasses.dataclass(frozen=True)
class Part:
    """A closed part of a model's main graph.

    Attributes:
        model: The model it lies in.
        inputs: The values it reads, in order.
        outputs: The values it is there for, in order.
        nodes: Its nodes, in the order of the graph.
    """

    model: ir.Model
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]

    @property
    def captures(self) -> int:
        """How many values of the part are read by bodies of its nodes."""
        return len({v for node in self.nodes for v in captured(node)})


class Flow:
    """Who reads what in a main graph, bodies counted as their nodes."""

    def __init__(self, model: ir.Model) -> None:
        """Walk over the model once."""
        self.model = model
        self.graph = model.graph
        self.nodes = list(model.graph)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.reads = {node: reads(node) for node in self.nodes}
        self.readers: dict[ir.Value, list[ir.Node]] = {}
        for node, values in self.reads.items():
            for value in values:
                self.readers.setdefault(value, []).append(node)
        self.varying: set[ir.Value] = {v for v in self.graph.inputs if not v.is_initializer()}
        """The values that depend on an input of the model."""
        for node in self.nodes:
            if any(v in self.varying for v in self.reads[node]):
                self.varying.update(node.outputs)

    def value(self, name: str) -> ir.Value:
        """Return the value of this name.

        Raises:
            UsageError: If there is none.
            RefusedError: If it lies inside a body or a function.
        """
        found = self._values.get(name)
        if found is not None:
            return found
        for scope in scopes(self.model):
            inner = (*scope.graph.inputs, *(v for node in scope.graph for v in node.outputs))
            if scope.path and any(v.name == name for v in inner):
                raise RefusedError(
                    "nested",
                    f'"{name}" lies inside {scope.path}; a cut lies in one graph, and not in a function: name values '
                    f"of that body alone and what it reads, or values around it.",
                )
        raise UsageError(
            f'The model computes no tensor "{name}".{nearest(name, list(self._values))} `onnxopt inspect` lists inputs '
            "and outputs; a model viewer shows those in between."
        )

    @property
    def _values(self) -> dict[str, ir.Value]:
        values = (*self.graph.inputs, *(v for node in self.nodes for v in node.outputs))
        return {v.name: v for v in values if v.name and (v.producer() is not None or not v.is_initializer())}

    def needed_for(self, targets: Iterable[ir.Value], known: set[ir.Value]) -> set[ir.Node]:
        """Return the nodes that are needed to compute values once others are known."""
        found: set[ir.Node] = set()
        waiting = list(targets)
        while waiting:
            value = waiting.pop()
            node = None if value in known else value.producer()
            if node is not None and node not in found:
                found.add(node)
                waiting.extend(self.reads[node])
        return found

    def after(self, sources: Iterable[ir.Value], *, through_sizes: bool = True) -> set[ir.Node]:
        """Return the nodes that depend on any of the values; on what they hold, if sizes are left out."""
        found: set[ir.Node] = set()
        waiting = list(sources)
        while waiting:
            for node in self.readers.get(waiting.pop(), ()):
                if node not in found and (through_sizes or node.op_type not in SIZES):
                    found.add(node)
                    waiting.extend(node.outputs)
        return found

    def ordered(self, nodes: Iterable[ir.Node]) -> tuple[ir.Node, ...]:
        """Return nodes in the order of the graph."""
        return tuple(sorted(nodes, key=self.position.__getitem__))

    def with_constants(self, nodes: set[ir.Node]) -> set[ir.Node]:
        """Add the nodes that compute, from no input of the model, what these read."""
        fixed = [v for node in nodes for v in self.reads[node] if v not in self.varying]
        return nodes | self.needed_for(fixed, set())

    def boundary(self, nodes: set[ir.Node]) -> list[ir.Value]:
        """Return what nodes read that others compute and that depends on an input of the model, in order."""
        found = {
            value: None
            for node in self.ordered(nodes)
            for value in self.reads[node]
            if value in self.varying and value.producer() not in nodes
        }
        return list(found)

    def results(self, nodes: set[ir.Node]) -> list[ir.Value]:
        """Return what nodes compute, from an input of the model, that others read or that is an output, in order."""
        return [
            value
            for node in self.ordered(nodes)
            for value in node.outputs
            if value in self.varying
            and (value.is_graph_output() or any(r not in nodes for r in self.readers.get(value, ())))
        ]

    def between(self, sources: Sequence[ir.Value], targets: Sequence[ir.Value]) -> tuple[set[ir.Node], list[ir.Value]]:
        """Return the nodes from values to values, and what they read besides the former."""
        nodes = self.needed_for(targets, set(sources)) & self.after(sources)
        nodes = self.with_constants(nodes)
        return nodes, [v for v in self.boundary(nodes) if v not in sources]


def reads(node: ir.Node) -> list[ir.Value]:
    """Return what a node reads, what the bodies it carries capture included, each once and in order."""
    return list(dict.fromkeys([*(v for v in node.inputs if v is not None), *captured(node)]))


def captured(node: ir.Node) -> list[ir.Value]:
    """Return the values from outside of them that the bodies of a node read, each once and in order."""
    return captured_by(body for _, body in bodies(node))


def captured_by(nested: Iterable[ir.Graph]) -> list[ir.Value]:
    """Return the values from outside of them that graphs read, each once and in order."""
    inside: set[ir.Value] = set()
    read: dict[ir.Value, None] = {}
    graphs = list(nested)
    while graphs:
        graph = graphs.pop()
        inside.update(graph.inputs)
        inside.update(graph.initializers.values())
        for inner in graph:
            inside.update(inner.outputs)
            read.update((v, None) for v in inner.inputs if v is not None)
            graphs.extend(body for _, body in bodies(inner))
        read.update((v, None) for v in graph.outputs)
    return [v for v in read if v not in inside]


def resolve(model: ir.Model, cut: Cut, flow: Flow | None = None) -> Part:
    """Find the part of a model that a cut means.

    Args:
        model: The model.
        cut: The cut.
        flow: Who reads what in the model, where that is known already.

    Raises:
        UsageError: If a name or number means nothing in the model.
        RefusedError: If the part cannot be cut out.
    """
    flow = flow or Flow(model)
    if isinstance(cut, Inside):
        raise RefusedError("nested", f"The cut {cut} lies in a body, which is to be opened first.")
    if isinstance(cut, Tensors):
        part = _tensors(flow, cut)
    elif isinstance(cut, Nodes):
        part = _nodes(flow, cut)
    else:
        part = _found(flow, cut)
    if not part.nodes or not part.outputs:
        raise RefusedError("empty cut", f"Nothing lies within the cut {cut}; nothing would be cut out.")
    _refuse_random(part)
    return part


def _tensors(flow: Flow, cut: Tensors) -> Part:
    inputs, outputs = [flow.value(n) for n in cut.inputs], [flow.value(n) for n in cut.outputs]
    for given in (cut.inputs, cut.outputs):
        twice = next((n for n in given if given.count(n) > 1), None)
        if twice is not None:
            raise UsageError(f'The tensor "{twice}" is named twice.')
    known = set(inputs)
    for value in outputs:
        if value in known or value.producer() is None:
            raise RefusedError("empty cut", f'Nothing lies in front of "{value.name}" within the cut {cut}.')
        if value.producer() not in flow.after(inputs):
            raise RefusedError(
                "empty cut", f'"{value.name}" does not depend on {_listed(inputs)}; nothing lies between.'
            )
    nodes, sides = flow.between(inputs, outputs)
    if sides:
        raise RefusedError(
            "open cut",
            f"What lies between {_listed(inputs)} and {_listed(outputs)} also needs {_listed(sides)}; add "
            f"{'them' if len(sides) > 1 else 'it'} to the boundary (--from).",
        )
    read = {v for node in nodes for v in flow.reads[node]}
    idle = next((v for v in inputs if v not in read), None)
    if idle is not None:
        raise UsageError(f'Nothing within the cut {cut} reads "{idle.name}"; leave it out.')
    return Part(flow.model, tuple(inputs), tuple(outputs), flow.ordered(nodes))


def _nodes(flow: Flow, cut: Nodes) -> Part:
    found = {
        node
        for node in flow.nodes
        if any(name and fnmatch.fnmatchcase(name, cut.pattern) for name in (node.name, *(v.name for v in node.outputs)))
    }
    if not found:
        raise UsageError(f'No node, and no output of one, has a name like "{cut.pattern}".')
    nodes = flow.with_constants(found)
    return Part(flow.model, tuple(flow.boundary(nodes)), tuple(flow.results(nodes)), flow.ordered(nodes))


def _found(flow: Flow, cut: Block | Backbone) -> Part:
    from onnxopt.graft.blocks import backbone, blocks

    if isinstance(cut, Backbone):
        head = backbone(flow)
        nodes = flow.with_constants(flow.needed_for([head], set()))
        return Part(flow.model, tuple(flow.boundary(nodes)), (head,), flow.ordered(nodes))
    found = blocks(flow)
    if not -len(found) <= cut.number < len(found):
        have = f"It has {len(found)}, counted from 0." if found else "None was found; name tensors or nodes instead."
        raise RefusedError("no block", f"The model has no block {cut.number}. {have}")
    return block_part(flow, *found[cut.number])


def block_part(flow: Flow, start: ir.Value, end: ir.Value) -> Part:
    """Return the part between two values, with whatever else it reads and others read of it at its boundary."""
    nodes, sides = flow.between([start], [end])
    others = [v for v in flow.results(nodes) if v is not end]
    # What follows from the size of the activations alone, such as a mask, and serves others too is no part of it.
    data = {v for node in flow.after([start], through_sizes=False) for v in node.outputs}
    shared = [v for v in others if v not in data]
    if shared:
        nodes, sides = flow.between([start, *shared], [end])
        read = {v for node in nodes for v in flow.reads[node]}
        sides = [*(v for v in shared if v in read), *sides]
        # Sizes that it reads and others too, both compute.
        others = [v for v in flow.results(nodes) if v is not end and v in data]
    return Part(flow.model, (start, *sides), (end, *others), flow.ordered(nodes))


def _refuse_random(part: Part) -> None:
    functions = [f.graph for f in part.model.functions.values()]
    inner = [body for node in part.nodes for _, body in bodies(node)]
    for node in (*part.nodes, *(n for graph in (*inner, *functions) for n in graph.all_nodes())):
        if node.op_type in RANDOM_OPS - {"Dropout"} or _drops(node):
            raise RefusedError(
                "random",
                f'The node "{node.name or first_output(node)}" ({node.op_type}) draws random numbers, so that nothing '
                "can be proven about the part it is in.",
            )


def _drops(node: ir.Node) -> bool:
    """Whether a Dropout is in training mode."""
    return node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None


def _listed(values: Sequence[ir.Value]) -> str:
    names = [f'"{v.name}"' for v in values]
    shown = names[:_MOST_NAMED]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
