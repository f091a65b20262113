"""Bodies of If, Loop and Scan as models of their own, so that they are cut and grafted like main graphs.

What a body reads from around it becomes an input, constants become initializers, and it is run on the values that the
model around it gives it: a branch where it is taken, a loop in its first iteration.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.errors import UsageError
from onnxopt.feeds import Feed
from onnxopt.graft.cut import Cut, Inside, Nodes, Plain, Tensors, captured_by
from onnxopt.graft.probe import Probe, Values
from onnxopt.graft.reasons import RefusedError
from onnxopt.graft.slicing import Types
from onnxopt.graph import attribute, bodies, constant_array, constant_tensor, copied, first_output, is_op
from onnxopt.registry import nearest

_MOST_NAMED = 4
_SCAN_SINCE = 9


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a body is.

    Attributes:
        path: "node.attribute", several joined by "/"; empty for the main graph.
        steps: For each node on the way the position in its graph, and the attribute.
        graph: The graph.
    """

    path: str
    steps: tuple[tuple[int, str], ...]
    graph: ir.Graph


@dataclasses.dataclass(frozen=True)
class Body:
    """A body as a model.

    Attributes:
        model: The model; the main graph is the model that was given itself.
        feeds: What it was given, for each set of inputs of the model around it; empty where that was not run.
        note: What there is to know about these values, in words; empty for the main graph.
        idle: Whether no input of the model leads there.
    """

    model: ir.Model
    feeds: tuple[Feed, ...]
    note: str
    idle: bool = False


def places(model: ir.Model) -> Iterator[Place]:
    """Yield the main graph and all bodies below it, outer before inner."""
    waiting = [Place("", (), model.graph)]
    while waiting:
        place = waiting.pop()
        yield place
        for position, node in enumerate(place.graph):
            for name, body in bodies(node):
                inner = f"{node.name or first_output(node)}.{name}"
                path = f"{place.path}/{inner}" if place.path else inner
                waiting.append(Place(path, (*place.steps, (position, name)), body))


def locate(model: ir.Model, cut: Cut) -> tuple[Place, Plain]:
    """Return in which graph a cut lies, and the cut there.

    Tensors and nodes of one body are found without its path.

    Raises:
        UsageError: If there is no such body, or several fit.
    """
    main = Place("", (), model.graph)
    if isinstance(cut, Inside):
        found = [p for p in places(model) if p.path == cut.path]
        if not found:
            paths = [p.path for p in places(model) if p.path]
            raise UsageError(f'The model has no body "{cut.path}".{nearest(cut.path, paths)} {_have(paths)}')
        return found[0], cut.cut
    if _holds(main.graph, cut):
        return main, cut
    found = [p for p in places(model) if _holds(p.graph, cut)]
    if len(found) > 1:
        raise UsageError(
            f'{cut} fits in {len(found)} bodies: {_listed([p.path for p in found])}; write "{cut} in PATH" for one of '
            "them."
        )
    return (found[0] if found else main), cut


def _have(paths: list[str]) -> str:
    return f"It has {_listed(paths)}." if paths else "It has no If, Loop or Scan."


def _listed(paths: list[str]) -> str:
    shown = ", ".join(paths[:_MOST_NAMED])
    return shown + (f" and {len(paths) - _MOST_NAMED} more" if len(paths) > _MOST_NAMED else "")


def _holds(graph: ir.Graph, cut: Plain) -> bool:
    """Whether a cut by names means something in a graph; others are meant for the main graph."""
    if isinstance(cut, Nodes):
        names = (name for node in graph for name in (node.name, *(v.name for v in node.outputs)))
        return any(name and fnmatch.fnmatchcase(name, cut.pattern) for name in names)
    computed = {v.name for node in graph for v in node.outputs}
    if not isinstance(cut, Tensors) or not computed.issuperset(cut.outputs):
        return False
    return (computed | {v.name for v in (*graph.inputs, *captured_by([graph]))}).issuperset(cut.inputs)


def opened(model: ir.Model, place: Place, probe: Probe | None = None) -> Body:
    """Return a body as a model.

    Args:
        model: The model around it.
        place: Where the body is in it.
        probe: Runs the model, to see what the body is given; None where that is not asked for.

    Raises:
        RefusedError: If nothing tells the types of what it reads, or what it is given cannot be told.
    """
    feeds = tuple(probe.feeds) if probe is not None else ()
    notes: list[str] = []
    idle = False
    for position, name in place.steps:
        node = list(model.graph)[position]
        inner = _detached(model, node, name, Types(model, probe))
        if probe is not None:
            given = [_given(inner, node, name, values) for values in _around(inner, node, probe)]
            taken = [feed for feed, is_taken in given if is_taken]
            idle |= not taken
            notes.append(_note(node, name, len(taken), len(given)))
            feeds = tuple(taken or (feed for feed, _ in given))
            probe = Probe(inner, feeds, probe.options)
        model = inner
    return Body(model, feeds, "; ".join(dict.fromkeys(filter(None, notes))), idle)


def _detached(model: ir.Model, node: ir.Node, name: str, types: Types) -> ir.Model:
    """Return a body as a model that takes what the body reads."""
    copy = copied(model)
    position = next(i for i, n in enumerate(model.graph) if n is node)
    body = dict(bodies(list(copy.graph)[position]))[name]
    original = dict(bodies(node))[name]
    inside = set(body.all_nodes())
    read = zip(captured_by([original]), captured_by([body]), strict=True)
    states = _types_of_inputs(original, node, types)
    for value, (kind, shape) in zip(body.inputs, states, strict=True):
        value.type, value.shape = value.type or kind, value.shape if value.shape is not None else shape
    given: list[ir.Value] = []
    for outer, value in list(read):
        tensor = constant_tensor(outer)
        new = ir.Value(name=outer.name, const_value=tensor)
        new.type = ir.TensorType(tensor.dtype) if tensor is not None else types.type(outer)
        new.shape = ir.Shape(tensor.shape.numpy()) if tensor is not None else types.shape(outer)
        for use in [u for u in value.uses() if u.node in inside]:
            use.node.replace_input_with(use.idx, new)
        for index, output in enumerate(list(body.outputs)):
            if output is value:
                body.outputs[index] = new
        if tensor is None:
            given.append(new)
        else:
            body.register_initializer(new)
    body.inputs.extend(given)
    graph = body.clone()
    graph.name = graph.name or name
    graph.opset_imports.clear()
    graph.opset_imports.update(model.opset_imports)
    graph.meta.update(model.graph.meta)
    inner = ir.Model(
        graph,
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        functions=[f.clone() for f in model.functions.values()],
    )
    inner.meta.update(model.meta)
    known = Types(inner)
    for output in graph.outputs:
        output.type = known.type(output)
        output.shape = output.shape if output.shape is not None else known.shape(output)
    return inner


def _types_of_inputs(
    body: ir.Graph, node: ir.Node, types: Types
) -> list[tuple[ir.TypeProtocol | None, ir.Shape | None]]:
    """Return types and shapes of what a loop gives to its body."""
    if is_op(node, "Loop"):
        counters: list[tuple[ir.TypeProtocol | None, ir.Shape | None]] = [
            (ir.TensorType(ir.DataType.INT64), ir.Shape([])),
            (ir.TensorType(ir.DataType.BOOL), ir.Shape([])),
        ]
        # What is carried from one iteration to the next may change its shape.
        carried = [(types.type(v), None) for v in node.inputs[2:] if v is not None]
        return [*counters, *carried]
    if is_op(node, "Scan"):
        return [(types.type(v), None) for v in node.inputs if v is not None]
    return [(None, None) for _ in body.inputs]


def _around(inner: ir.Model, node: ir.Node, probe: Probe) -> list[Values]:
    """Return the values of a graph that a node, and a body that it carries, read."""
    wanted = [v.name for v in inner.graph.inputs if not v.is_initializer()]
    own = {v.name: v for v in node.inputs if v is not None}
    fixed = {
        name: array
        for name, value in own.items()
        if value.is_initializer() and (array := _stored(value)) is not None and name
    }
    known = {v.name for v in (*probe.model.graph.inputs, *(o for n in probe.model.graph for o in n.outputs))}
    names = [n for n in dict.fromkeys([*wanted, *own]) if n in known and n not in fixed]
    return [{**fixed, **values} for values in probe.values([n for n in names if n is not None])]


def _stored(value: ir.Value) -> np.ndarray | None:
    return constant_array(value) if value.const_value is None else value.const_value.numpy()


def _given(inner: ir.Model, node: ir.Node, name: str, values: Values) -> tuple[Feed, bool]:
    """Return what a body is given first, and whether it is run at all."""
    inputs = [v for v in inner.graph.inputs if not v.is_initializer()]
    first, taken = _first(node, name, values)
    names = [v.name or "" for v in inputs]
    feed = dict(zip(names, first, strict=False))
    feed.update((n, values[n]) for n in names[len(first) :])
    return feed, taken


def _first(node: ir.Node, name: str, values: Values) -> tuple[list[Any], bool]:
    """Return what a node gives to the inputs of its body in the first iteration, and whether there is one."""
    given = [None if v is None else values[v.name or ""] for v in node.inputs]
    if is_op(node, "If"):
        return [], bool(np.all(given[0])) == (name == "then_branch")
    if is_op(node, "Loop"):
        runs = [given[0] is None or int(np.max(given[0])) > 0, given[1] is None or bool(np.all(given[1]))]
        return [np.array(0, np.int64), np.array(True), *given[2:]], all(runs)
    if is_op(node, "Scan") and node.version in (None, *range(_SCAN_SINCE, 100)):
        return _first_scan(node, given)
    raise RefusedError("nested", f"What {node.op_type} gives to its body is not known; cut around it.")


def _first_scan(node: ir.Node, given: list[Any]) -> tuple[list[Any], bool]:
    count = int(attribute(node, "num_scan_inputs"))
    states, scanned = given[: len(given) - count], given[len(given) - count :]
    axes = attribute(node, "scan_input_axes") or (0,) * count
    backward = attribute(node, "scan_input_directions") or (0,) * count
    sizes = [np.shape(a)[axis] for a, axis in zip(scanned, axes, strict=True)]
    if not all(sizes):
        raise RefusedError("does not run", f"{node.name or first_output(node)} scans nothing; give longer inputs.")
    slices = [np.take(a, -1 if b else 0, axis) for a, axis, b in zip(scanned, axes, backward, strict=True)]
    return [*states, *slices], True


def with_advice(body: Body, refused: RefusedError) -> RefusedError:
    """Return why something in a body was refused, with what may help there."""
    if refused.reason == "data":
        needed = str(refused).split(": it is fitted")[0]
        return RefusedError(
            "adapter", f"{needed}: what is fitted to data cannot be put into a body; choose another cut."
        )
    if refused.reason != "does not run" or not body.idle:
        return refused
    return RefusedError("does not run", f"{refused} It is a body that no input led to: {body.note}.")


def _note(node: ir.Node, name: str, taken: int, total: int) -> str:
    """Say on which values a body was run."""
    if is_op(node, "If"):
        if taken:
            return f"{name} of {node.name or first_output(node)} is taken on {taken} of {total} sets of inputs"
        return (
            f"no input takes {name} of {node.name or first_output(node)}, which was run on what it would have been "
            "given; --data with others proves more"
        )
    if taken:
        return f"of {node.name or first_output(node)} the first iteration was compared"
    return (
        f"{node.name or first_output(node)} does not iterate on these inputs; its body was run on what it begins with"
    )


def put_back(model: ir.Model, place: Place, body: ir.Model) -> ir.Model:
    """Return a copy of a model in which a body is what a model says that was made of it.

    Args:
        model: The model.
        place: Where the body is.
        body: The changed body as a model, from `opened`.
    """
    result = copied(model)
    graph, known = result.graph, _values(result.graph)
    for position, name in place.steps[:-1]:
        graph = dict(bodies(list(graph)[position]))[name]
        known.update(_values(graph))
    position, name = place.steps[-1]
    node = list(graph)[position]
    old = dict(bodies(node))[name]
    held = {name for p in places(result) for name in _values(p.graph)} - _below(old)
    own = len(old.inputs)
    new = copied(body).graph
    for value in [*list(new.inputs)[own:], *(v for v in new.initializers.values() if v.name in known)]:
        if value.name not in known:
            continue
        outer = known[value.name]
        value.replace_all_uses_with(outer, replace_graph_outputs=True)
        if value in new.inputs:
            new.inputs.remove(value)
        if value.name in new.initializers:
            del new.initializers[value.name]
    _rename(new, held)
    for ours, theirs in zip(new.outputs, old.outputs, strict=True):
        ours.type, ours.shape = theirs.type, theirs.shape
    new.opset_imports.clear()
    _set(node, name, new)
    result.ir_version = max(result.ir_version, body.ir_version)
    for domain, version in body.opset_imports.items():
        result.opset_imports.setdefault(domain, version)
    for identifier, function in body.functions.items():
        if identifier not in result.functions:
            result.functions[identifier] = function.clone()
    return result


def _set(node: ir.Node, name: str, graph: ir.Graph) -> None:
    plain, bracket, rest = name.partition("[")
    if not bracket:
        node.attributes[plain] = ir.AttrGraph(plain, graph)
        return
    graphs = list(node.attributes[plain].as_graphs())
    graphs[int(rest.rstrip("]"))] = graph
    node.attributes[plain] = ir.AttrGraphs(plain, graphs)


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    values = (*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs))
    return {v.name: v for v in values if v.name}


def _rename(graph: ir.Graph, held: set[str]) -> None:
    """Give new names to what a body computes under a name that the model around it has."""
    own = _below(graph)
    for each in (graph, *(g for node in graph.all_nodes() for _, g in bodies(node))):
        for name, value in list(_values(each).items()):
            if name in held:
                number = 1
                while f"{name}_{number}" in held | own:
                    number += 1
                own.add(f"{name}_{number}")
                value.name = f"{name}_{number}"


def _below(graph: ir.Graph) -> set[str]:
    """Return the names of all values of a graph and of the bodies in it."""
    graphs = (graph, *(g for node in graph.all_nodes() for _, g in bodies(node)))
    return {name for g in graphs for name in _values(g)}
