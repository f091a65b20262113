"""Chains of Reshape, Transpose, Squeeze, Unsqueeze and Flatten become the fewest nodes that do the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.dims import symbol_name
from onnxopt.analysis.layout import Step, chain_to, is_layout, joined, plan, rearrangement
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.graph import (
    Names,
    Scope,
    add_constant,
    cannot_replace,
    insert_before,
    make_node,
    only_use,
    remove_node,
    replace_value,
    scopes,
)

AXES_AS_INPUT = 13
"""From this opset on, Squeeze and Unsqueeze take their axes as an input."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeLayout(GraphPass):
    """Merge chains of layout nodes.

    A chain is read as one rearrangement of the factors of its axes (`analysis/layout.py`), from which the fewest
    nodes follow. Where a Reshape cuts across the factors, neighbours of a kind are made one. Shapes may be symbolic.
    """

    name = "merge-layout"
    guarantee = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per chain that has a shorter form."""
        names: Names | None = None
        for scope in scopes(model):
            for node in scope.graph:
                if not is_layout(node) or is_layout(only_use(node.outputs[0])):
                    continue
                chain = chain_to(node)
                steps = _shorter(chain, ctx.shapes)
                if steps is None:
                    continue
                site = Site(self.name, scope.path, node.outputs[0].name or "")
                reason = _keep_reason(chain, steps)
                if reason:
                    yield Refusal(site, reason)
                    continue
                names = names or Names(model)
                yield Edit(site, _summary(chain, steps), _apply(scope, names, chain, steps))


def _shorter(chain: list[ir.Node], shapes: Shapes) -> tuple[Step, ...] | None:
    """Return a plan with fewer nodes than the chain has, or None. A long chain is tried from later starts too."""
    while chain:
        read, inferred = rearrangement(chain, shapes), _infers(chain, shapes)
        steps = None if read is None else plan(read, inferred=inferred)
        if steps is not None:
            return steps if len(steps) < len(chain) else None
        steps = joined(chain, shapes, inferred=inferred)
        if steps is not None and len(steps) < len(chain):
            return steps
        del chain[0]
    return None


def _infers(chain: list[ir.Node], shapes: Shapes) -> bool:
    """Whether a Reshape of the chain leaves a size to be inferred, and so refuses some empty inputs already."""
    for node in chain:
        target = node.inputs[1] if node.op_type == "Reshape" and len(node.inputs) > 1 else None
        content = shapes.content(target) if target is not None else None
        if isinstance(content, tuple) and -1 in content:
            return True
    return False


def _keep_reason(chain: list[ir.Node], steps: tuple[Step, ...]) -> str | None:
    source, result = chain[0].inputs[0], chain[-1].outputs[0]
    assert source is not None
    return None if steps else cannot_replace(result, source)


def _summary(chain: list[ir.Node], steps: tuple[Step, ...]) -> str:
    after = ", ".join(f"{s.op} {list(s.values)}" for s in steps) or "nothing"
    return f"{', '.join(n.op_type for n in chain)} to {after}"


def _apply(scope: Scope, names: Names, chain: list[ir.Node], steps: tuple[Step, ...]) -> Callable[[], None]:
    def apply() -> None:
        last = chain[-1]
        value = chain[0].inputs[0]
        assert value is not None
        for step in steps:
            node = _make(scope, names, value, step, last)
            insert_before(last, node)
            value = node.outputs[0]
        replace_value(last.outputs[0], value)
        for node in reversed(chain):
            remove_node(node)

    return apply


def _make(scope: Scope, names: Names, source: ir.Value, step: Step, last: ir.Node) -> ir.Node:
    result = last.outputs[0]
    inputs: list[ir.Value | None] = [source]
    attributes: dict[str, tuple[int, ...]] = {}
    if step.op == "Transpose":
        attributes["perm"] = step.values
    elif step.op == "Reshape" or scope.opset >= AXES_AS_INPUT:
        kind = "shape" if step.op == "Reshape" else "axes"
        array = np.array(step.values, np.int64)
        inputs.append(add_constant(scope, names, f"{result.name}/{kind}", array, before=last))
    else:
        attributes["axes"] = step.values
    node = make_node(names, step.op, inputs, attributes, like=result)
    if node.outputs[0].type is not None:
        node.outputs[0].shape = ir.Shape(d if isinstance(d, int) else symbol_name(d) for d in step.shape)
    return node
