"""Copies of a graph's nodes in another graph: what inlining a branch, a loop body or a function has in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnxopt.graph import (
    Names,
    Scope,
    add_constant,
    bodies,
    cannot_replace,
    insert_before,
    named,
    replace_value,
)

IDENTITY_OF_SEQUENCES = 14
IDENTITY_OF_OPTIONALS = 16

Bindings = dict[ir.Value, "ir.Value | None"]
"""What stands for a value of the copied graph; None for an optional input that is left out."""


class Instantiation:
    """Copies nodes of one graph into another, in front of a node.

    Every copied value and node gets a name that collides with nothing; nested graphs are copied as well, and refer
    to the copies.
    """

    def __init__(
        self,
        scope: Scope,
        names: Names,
        before: ir.Node,
        attributes: Mapping[str, ir.Attr] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare to copy.

        Args:
            scope: Where the copies go.
            names: Where their names come from.
            before: The node they go in front of.
            attributes: What attributes that refer to a function's caller are replaced by; one that is not there is
                left out. None leaves such references alone.
            metadata: Added to the metadata of every copied node, where it has no such key.
        """
        self._scope = scope
        self._names = names
        self._before = before
        self._attributes = attributes
        self._metadata = metadata or {}

    def constants(self, graph: ir.Graph) -> Bindings:
        """Add the initializers of a graph as constants of the scope, and return what stands for which."""
        made: Bindings = {}
        for value in graph.initializers.values():
            if value.const_value is not None:
                base = value.name or "constant"
                made[value] = add_constant(self._scope, self._names, base, value.const_value, self._before)
        return made

    def nodes(self, graph: ir.Graph, bindings: Bindings) -> list[ir.Node]:
        """Copy all nodes of a graph and add their outputs to the bindings, which must hold its inputs."""
        made = []
        for node in graph:
            copy = self._node(node, bindings)
            insert_before(self._before, copy)
            made.append(copy)
        return made

    def _node(self, node: ir.Node, bindings: Bindings) -> ir.Node:
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if v is None else bindings.get(v, v) for v in node.inputs],
            [a for name in node.attributes.data if (a := self._attribute(node, name, bindings)) is not None],
            overload=node.overload,
            num_outputs=len(node.outputs),
            version=node.version,
            name=self._names.fresh(node.name) if node.name else "",
            doc_string=node.doc_string,
            metadata_props={**self._metadata, **node.metadata_props},
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            self._describe(old, new)
            bindings[old] = new
        return copy

    def _describe(self, old: ir.Value, new: ir.Value) -> None:
        """Give a copied value a name and what its original says about it."""
        # An output without a name is one that is left out.
        new.name = self._names.fresh(old.name) if old.name else ""
        new.type = old.type
        new.shape = old.shape.copy() if old.shape is not None else None
        new.doc_string = old.doc_string
        new.metadata_props.update(old.metadata_props)

    def _attribute(self, node: ir.Node, name: str, bindings: Bindings) -> ir.Attr | None:
        found = node.attributes.data[name]
        if found.is_ref():
            if self._attributes is None:
                return found
            given = self._attributes.get(found.ref_attr_name or "")
            if given is None:
                return None
            if given.is_ref():  # the call is in a function itself
                return ir.RefAttr(name, given.ref_attr_name or "", given.type, doc_string=found.doc_string)
            return ir.Attr(name, given.type, given.value, doc_string=found.doc_string)
        if found.type == ir.AttributeType.GRAPH:
            return ir.Attr(name, found.type, self._graph(found.as_graph(), bindings), doc_string=found.doc_string)
        if found.type == ir.AttributeType.GRAPHS:
            graphs = [self._graph(g, bindings) for g in found.as_graphs()]
            return ir.Attr(name, found.type, graphs, doc_string=found.doc_string)
        return found

    def _graph(self, graph: ir.Graph, bindings: Bindings) -> ir.Graph:
        """Copy a nested graph; what it uses of outer graphs is bound."""
        inside: Bindings = dict(bindings)
        inputs, initializers = [], []
        for value in graph.inputs:
            inside[value] = self._free(value)
            inputs.append(inside[value])
        for value in graph.initializers.values():
            copy = inside[value] = inside.get(value) if value.is_graph_input() else self._free(value)
            assert copy is not None and copy.name is not None, "an initializer has a name"
            copy.const_value = None if value.const_value is None else named(value.const_value, copy.name)
            initializers.append(copy)
        nodes = [self._node(node, inside) for node in graph]
        return ir.Graph(
            [v for v in inputs if v is not None],
            [bound for v in graph.outputs if (bound := inside.get(v, v)) is not None],
            nodes=nodes,
            initializers=initializers,
            doc_string=graph.doc_string,
            opset_imports=dict(graph.opset_imports),
            name=graph.name,
            metadata_props=dict(graph.metadata_props),
        )

    def _free(self, value: ir.Value) -> ir.Value:
        copy = ir.Value()
        self._describe(value, copy)
        return copy


def node_count(graph: ir.Graph) -> int:
    """Return how many nodes a graph holds, nested ones included."""
    return sum(1 + sum(node_count(body) for _, body in bodies(node)) for node in graph)


def cannot_take_over(old: Sequence[ir.Value], opset: int) -> str | None:
    """Return why other values could not take the place of a node's outputs, or None.

    A graph output may need an Identity, which older opsets lack for sequences and optional values.
    """
    for value in old:
        if not value.is_graph_output():
            continue
        if isinstance(value.type, ir.OptionalType) and opset < IDENTITY_OF_OPTIONALS:
            return f"a graph output is an optional value, which needs opset {IDENTITY_OF_OPTIONALS}"
        if isinstance(value.type, ir.SequenceType) and opset < IDENTITY_OF_SEQUENCES:
            return f"a graph output is a sequence, which needs opset {IDENTITY_OF_SEQUENCES}"
    return None


def take_over(old: ir.Value, new: ir.Value, names: Names, before: ir.Node) -> None:
    """Put a value in the place of another, through an Identity where the name of a graph output asks for one."""
    if cannot_replace(old, new):
        identity = ir.node("Identity", [new], name=names.fresh(f"{old.name}/Identity"))
        insert_before(before, identity)
        new = identity.outputs[0]
        new.name = names.fresh(f"{old.name}/Identity_output")
        new.type = old.type
    replace_value(old, new)
