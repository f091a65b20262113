"""An If whose condition is known, or makes no difference, is replaced by the nodes of a branch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import ClassVar

import onnx_ir as ir

from onnxopt.analysis.contents import equal_graphs
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.graph import Names, Scope, attribute, first_output, is_op, remove_unused, scopes
from onnxopt.instantiate import Instantiation, cannot_take_over, take_over


@dataclasses.dataclass(frozen=True, kw_only=True)
class InlineBranches(GraphPass):
    """Replace an If by the nodes of the branch it always takes, or of either when both are the same.

    A condition is known when it is constant or follows from shapes.
    """

    name: ClassVar[str] = "inline-branches"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per If."""
        names = functools.cache(lambda: Names(model))
        for scope in scopes(model):
            for node in scope.graph:
                yield from self._visit(scope, node, ctx, names)

    def _visit(self, scope: Scope, node: ir.Node, ctx: Context, names: Callable[[], Names]) -> Iterator[Edit | Refusal]:
        found = _taken(node, ctx)
        if found is None:
            return
        taken, why = found
        site = Site(self.name, scope.path, first_output(node))
        if reason := _unfit(scope, node, taken):
            yield Refusal(site, reason)
            return
        inlined: list[ir.Node] = []

        def apply() -> None:
            inlined.extend(_inline(scope, node, taken, names()))

        yield Edit(site, why, apply)
        for inner in inlined:
            if inner.graph is not None:
                yield from self._visit(scope, inner, ctx, names)


def _taken(node: ir.Node, ctx: Context) -> tuple[ir.Graph, str] | None:
    """Return the branch that gives what the node gives, and why it does, or None."""
    if not is_op(node, "If") or not node.inputs or node.inputs[0] is None:
        return None
    branches = [attribute(node, f"{which}_branch") for which in ("else", "then")]
    if not all(isinstance(branch, ir.Graph) for branch in branches):
        return None
    content = ctx.shapes.known_content(node.inputs[0])
    condition = content.items[0] if content is not None and len(content.items) == 1 else None
    if isinstance(condition, int):
        return branches[condition != 0], f"the {'then' if condition else 'else'} branch is always taken"
    return (branches[0], "both branches are the same") if equal_graphs(*branches) else None


def _unfit(scope: Scope, node: ir.Node, taken: ir.Graph) -> str | None:
    if len(taken.outputs) != len(node.outputs):
        return "the branch and the node have different numbers of outputs"
    for old, new in zip(node.outputs, taken.outputs, strict=True):
        if old.type is not None and new.type is not None and old.type != new.type:
            return "the branch returns another type than is declared"
    return cannot_take_over(node.outputs, scope.opset)


def _inline(scope: Scope, node: ir.Node, taken: ir.Graph, names: Names) -> list[ir.Node]:
    copies = Instantiation(scope, names, node)
    bindings = copies.constants(taken)
    inlined = copies.nodes(taken, bindings)
    for old, inner in zip(node.outputs, taken.outputs, strict=True):
        new = bindings.get(inner, inner)
        assert new is not None, "a branch has no inputs that could be left out"
        take_over(old, new, names, node)
    remove_unused(node)
    return inlined
