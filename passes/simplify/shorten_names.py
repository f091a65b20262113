"""Call inner values, weights and nodes by names of a few letters."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import string
from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir

from onnxopt.analysis.naming import has_quantization_annotations, is_sparse
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.graph import Scope, inner_scopes, named, replace_value, root_scopes

LETTERS = string.ascii_letters


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortenNames(GraphPass):
    """Call inner values, weights and nodes by names of a few letters.

    Worth it for small models with many nodes, where names take up some percent of the file. Nothing in the model says
    any more where it comes from, so this is for the very end. Inputs and outputs keep their names, those of bodies
    too, and so do sparse weights and everything inside functions.
    """

    name: ClassVar[str] = "shorten-names"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit for the main graph and all bodies in it, which share names."""
        main = next(root_scopes(model))
        graphs = [scope.graph for scope in _nested(main)]
        site = Site(self.name, "", "")
        if any(has_quantization_annotations(graph) for graph in graphs):
            yield Refusal(site, "its quantization annotations refer to values by name")
            return
        values = [value for graph in graphs for value in _inner_values(graph)]
        kept = {v.name for graph in graphs for v in _outer_values(graph)}
        names = list(itertools.islice((n for n in _short() if n not in kept), len(values)))
        saved = sum(len(v.name or "") - len(n) for v, n in zip(values, names, strict=True))
        nodes = [node for graph in graphs for node in graph if node.name]
        if all(v.name == n for v, n in zip(values, names, strict=True)) and not nodes:
            return
        summary = f"{len(values):,} names of values with {saved:,} letters less, {len(nodes):,} of nodes left out"
        yield Edit(site, summary, functools.partial(_rename, values, names, nodes))


def _nested(scope: Scope) -> Iterator[Scope]:
    """Yield a graph and the bodies in it, outer before inner."""
    yield scope
    for node in scope.graph:
        for inner in inner_scopes(scope, node):
            yield from _nested(inner)


def _outer_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yield the values of a graph that keep their names."""
    yield from graph.inputs
    yield from graph.outputs
    yield from filter(is_sparse, graph.initializers.values())


def _inner_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yield the values of a graph whose names mean nothing outside of the model."""
    for value in graph.initializers.values():
        if not (value.is_graph_input() or value.is_graph_output() or is_sparse(value)):
            yield value
    for node in graph:
        yield from (v for v in node.outputs if v.name and not v.is_graph_output())


def _short() -> Iterator[str]:
    """Yield a, b, ... Z, aa, ab and so on."""
    for length in itertools.count(1):
        yield from map("".join, itertools.product(LETTERS, repeat=length))


def _rename(values: list[ir.Value], names: list[str], nodes: list[ir.Node]) -> None:
    weights = [(v, n) for v, n in zip(values, names, strict=True) if v.is_initializer()]
    graphs = [v.graph for v, _ in weights]
    for (value, _), graph in zip(weights, graphs, strict=True):
        assert graph is not None and value.name is not None, "initializers belong to a graph by their name"
        del graph.initializers[value.name]
    for (value, name), graph in zip(weights, graphs, strict=True):
        assert graph is not None and value.const_value is not None, "weights have contents"
        # Renaming the value would rename its tensor, which clones of the model share.
        renamed = ir.Value(name=name, type=value.type, shape=value.shape, const_value=named(value.const_value, name))
        replace_value(value, renamed)
        graph.register_initializer(renamed)
    for value, name in zip(values, names, strict=True):
        if value.producer() is not None:
            value.const_value = None  # what the node says; its tensor would be renamed too
            value.name = name
    for node in nodes:
        node.name = ""
