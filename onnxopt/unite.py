"""Several models side by side in one graph, which take the same inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from onnxopt.errors import ModelError
from onnxopt.graph import Names, Scope, add_constant, copied, insert_before, named
from onnxopt.instantiate import Bindings, Instantiation
from onnxopt.model import convert_opset


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """What of the whole one of the models is.

    Attributes:
        name: What the model is called.
        inputs: (its input, the input of the whole) in its order.
        outputs: (its output, the output of the whole) in its order.
    """

    name: str
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]


def unite(models: Sequence[ir.Model], names: Sequence[str]) -> tuple[ir.Model, tuple[Part, ...]]:
    """Put models side by side.

    Inputs of the same name and type are one input of the whole. A model that has none of the inputs of the first, but
    as many, of the same types and sizes, gets them in their order. Outputs and everything inside keep their
    names where these are free; others get the name of the model in front, or a number behind.

    Args:
        models: At least one; they are not changed.
        names: What they are called, each different.

    Returns:
        The whole, in the newest opset of all, and what of it each model is.

    Raises:
        ModelError: If the models import different versions of an operator set other than the standard one, or cannot
            be raised to the newest opset.
    """
    aligned = _aligned(models, names)
    whole = aligned[0]
    whole.ir_version = max(m.ir_version for m in aligned)
    names_in_use = Names(whole)
    end = ir.node("Identity", [next(iter(whole.graph.inputs), None)], name=names_in_use.fresh("end"))
    end.outputs[0].name = names_in_use.fresh("end_output")
    whole.graph.append(end)
    first = [(v.name or "", v.name or "") for v in whole.graph.inputs]
    parts = [Part(names[0], tuple(first), tuple((v.name or "", v.name or "") for v in whole.graph.outputs))]
    for model, name in zip(aligned[1:], names[1:], strict=True):
        parts.append(_add(whole, model, name, names_in_use, end))
    whole.graph.remove(end)
    return whole, tuple(parts)


def _aligned(models: Sequence[ir.Model], names: Sequence[str]) -> list[ir.Model]:
    """Return copies without functions, in one opset.

    Raises:
        ModelError: If that is not possible.
    """
    newest = max(m.opset_imports.get("", 0) for m in models)
    imports: dict[str, tuple[int, str]] = {}
    found = []
    for model, name in zip(models, names, strict=True):
        copy = convert_opset(model, newest) if 0 < model.opset_imports.get("", 0) < newest else copied(model)
        if copy.functions:
            InlinePass()(copy)
        for domain, version in copy.opset_imports.items():
            known, other = imports.setdefault(domain, (version, name))
            if known != version:
                raise ModelError(
                    f'{other} imports version {known} of the operators "{domain}" and {name} version {version}; they '
                    "cannot be in one model."
                )
        found.append(copy)
    for domain, (version, _) in imports.items():
        found[0].opset_imports[domain] = version
    return found


def _add(whole: ir.Model, model: ir.Model, name: str, names: Names, end: ir.Node) -> Part:
    """Put the nodes of another model in front of the end node."""
    graph, other = whole.graph, model.graph
    scope = Scope(graph, "", whole.opset_imports, None, nested=False)
    copier = Instantiation(scope, names, end)
    bindings: Bindings = {}
    matched = _matched_inputs(graph, other)
    for value in other.inputs:
        bindings[value] = matched.get(value) or _new_input(graph, value, names)
    for value in other.initializers.values():
        if not value.is_graph_input() and value.const_value is not None:
            bindings[value] = add_constant(scope, names, value.name or "constant", value.const_value, end)
    copier.nodes(other, bindings)
    outputs = [(v.name or "", _new_output(graph, v, bindings, name, names, end)) for v in other.outputs]
    for key, text in model.metadata_props.items():
        whole.metadata_props.setdefault(key, text)
    inputs = tuple((v.name or "", _name(bindings[v])) for v in other.inputs)
    return Part(name, inputs, tuple(outputs))


def _matched_inputs(graph: ir.Graph, other: ir.Graph) -> dict[ir.Value, ir.Value]:
    """Return which inputs of another model are inputs of the whole.

    Inputs that carry a default are never shared: each model has its own.
    """
    ours = {v.name: v for v in graph.inputs if not v.is_initializer()}
    theirs = [v for v in other.inputs if not v.is_initializer()]
    by_name = {v: ours[v.name] for v in theirs if v.name in ours and _alike(v, ours[v.name])}
    if by_name or len(ours) != len(theirs):
        return by_name
    in_order = list(zip(theirs, ours.values(), strict=True))
    return dict(in_order) if all(_alike(a, b) for a, b in in_order) else {}


def _alike(first: ir.Value, second: ir.Value) -> bool:
    """Return whether one array can be given for both."""
    if first.type != second.type:
        return False
    if first.shape is None or second.shape is None:
        return first.shape is None and second.shape is None
    sizes = list(zip(first.shape, second.shape, strict=False))
    return len(first.shape) == len(second.shape) and all(
        isinstance(a, int) == isinstance(b, int) and (not isinstance(a, int) or a == b) for a, b in sizes
    )


def _new_input(graph: ir.Graph, value: ir.Value, names: Names) -> ir.Value:
    name = names.fresh(value.name or "input")
    shape = value.shape.copy() if value.shape is not None else None
    made = ir.Value(name=name, type=value.type, shape=shape, doc_string=value.doc_string)
    graph.inputs.append(made)
    if value.const_value is not None:
        made.const_value = named(value.const_value, name)
        graph.register_initializer(made)
    return made


def _new_output(graph: ir.Graph, value: ir.Value, bindings: Bindings, model: str, names: Names, end: ir.Node) -> str:
    """Make what stands for an output of another model an output of the whole, and return its name."""
    bound = bindings[value]
    assert bound is not None, "an output is computed"
    if bound.producer() is None or bound.is_graph_output():  # an input or a constant that is handed through
        identity = ir.node("Identity", [bound], name=names.fresh(f"{value.name}/Identity"))
        insert_before(end, identity)
        bound = identity.outputs[0]
        bound.type, bound.name = value.type, names.fresh(value.name or "output")
        bound.shape = value.shape.copy() if value.shape is not None else None
    if bound.name != value.name:
        bound.name = names.fresh(f"{model}.{value.name}")
    graph.outputs.append(bound)
    return bound.name or ""


def _name(value: ir.Value | None) -> str:
    return "" if value is None else value.name or ""
