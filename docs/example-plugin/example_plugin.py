"""A pass in a package of its own: -(-x) becomes x."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from onnxopt import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.graph import cannot_replace, is_op, remove_node, replace_value, scopes


@dataclasses.dataclass(frozen=True, kw_only=True)
class NegateTwice(GraphPass):
    """Remove pairs of Neg nodes that cancel out."""

    name = "negate-twice"
    guarantee = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per pair."""
        for scope in scopes(model):
            for outer in list(scope.graph):
                inner = outer.inputs[0].producer() if is_op(outer, "Neg") and outer.inputs[0] else None
                if inner is None or not is_op(inner, "Neg") or inner.inputs[0] is None:
                    continue
                site = Site(self.name, scope.path, outer.outputs[0].name or "")
                reason = cannot_replace(outer.outputs[0], inner.inputs[0])
                if reason:
                    yield Refusal(site, reason)
                    continue

                def apply(outer: ir.Node = outer, inner: ir.Node = inner) -> None:
                    assert inner.inputs[0] is not None
                    replace_value(outer.outputs[0], inner.inputs[0])
                    remove_node(outer)
                    if not inner.outputs[0].uses() and not inner.outputs[0].is_graph_output():
                        remove_node(inner)

                yield Edit(site, "Neg(Neg(x)) to x", apply)
