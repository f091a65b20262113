"""Store equal initializers once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir

from onnxopt.analysis.contents import Content
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.graph import Scope, drop_unused_initializers, inner_scopes, replace_value, root_scopes

_Known = tuple[dict[Content, ir.Value], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeduplicateInitializers(GraphPass):
    """Store equal initializers once.

    Equal means the same element type, shape and bits. Initializers of nested graphs are merged with equal ones
    of the graphs around them. Those that the caller can override stay as they are.
    """

    name: ClassVar[str] = "deduplicate-initializers"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per initializer that repeats another."""
        for scope in root_scopes(model):
            yield from self._merge(scope, ())

    def _merge(self, scope: Scope, outer: _Known) -> Iterator[Edit | Refusal]:
        known: dict[Content, ir.Value] = {}
        for value in list(scope.graph.initializers.values()):
            if value.is_graph_input() or value.const_value is None:
                continue
            content = Content(value.const_value)
            found = next((v for d in (*outer, known) if (v := d.get(content)) is not None), None)
            if found is None:
                known[content] = value
                continue
            site = Site(self.name, scope.path, value.name or "")
            if value.is_graph_output():
                yield Refusal(site, "it is a graph output, whose name must stay")
                continue
            summary = f"merged with {found.name}, saving {value.const_value.nbytes:,} bytes"
            yield Edit(site, summary, functools.partial(_replace, scope.graph, value, found))
        for node in scope.graph:
            for inner in inner_scopes(scope, node):
                yield from self._merge(inner, (*outer, known))


def _replace(graph: ir.Graph, value: ir.Value, by: ir.Value) -> None:
    replace_value(value, by)
    drop_unused_initializers(graph, [value])
