"""Remove nodes, initializers and functions that no output depends on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir

from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.graph import (
    Scope,
    drop_unused_initializers,
    first_output,
    inner_scopes,
    remove_node,
    root_scopes,
    use_count,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoveDeadCode(GraphPass):
    """Remove nodes, initializers and functions that no output depends on.

    Graph inputs stay, with the initializers that give them defaults; so do opset imports, optional outputs of
    nodes that are used, and operators without outputs.
    """

    name: ClassVar[str] = "remove-dead-code"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per dead node, initializer and function."""
        main, *others = root_scopes(model)
        functions = {s.function.identifier(): s for s in others if s.function is not None}
        pending = [main]
        reached = set()
        while pending:
            scope = pending.pop()
            yield from self._sweep(scope)
            # Calls are collected once the dead ones are gone.
            for node in scope.graph.all_nodes():
                identifier = node.op_identifier()
                if identifier in functions and identifier not in reached:
                    reached.add(identifier)
                    pending.append(functions[identifier])
        for identifier, scope in functions.items():
            if identifier not in reached:
                site = Site(self.name, scope.path, identifier[1])
                apply = functools.partial(model.functions.__delitem__, identifier)
                yield Edit(site, "removed a function that nothing calls", apply)

    def _sweep(self, scope: Scope) -> Iterator[Edit]:
        """Go through a graph backwards, so that a node is met after everything that uses it."""
        for node in reversed(scope.graph):
            if node.outputs and not any(o.is_graph_output() or use_count(o) for o in node.outputs):
                site = Site(self.name, scope.path, first_output(node))
                yield Edit(site, f"removed unused {node.op_type}", functools.partial(remove_node, node))
            if node.graph is not None:
                for inner in inner_scopes(scope, node):
                    yield from self._sweep(inner)
        for value in list(scope.graph.initializers.values()):
            if value.is_graph_input() or value.is_graph_output() or use_count(value):
                continue
            site = Site(self.name, scope.path, value.name or "")
            apply = functools.partial(drop_unused_initializers, scope.graph, [value])
            yield Edit(site, "removed an initializer that nothing uses", apply)
