"""Outputs that nothing uses are not computed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import ClassVar

import onnx_ir as ir

from onnxopt.analysis.dims import known_int
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.graph import (
    Names,
    Scope,
    attribute,
    constant_ints,
    first_output,
    has_references,
    insert_before,
    is_op,
    is_used,
    remove_unused,
    replace_value,
    scopes,
)
from onnxopt.rewrite import Builder

_OPTIONAL: dict[str, int] = {
    "Dropout": 1,
    "GRU": 0,
    "LSTM": 0,
    "LayerNormalization": 1,
    "MaxPool": 1,
    "RNN": 0,
    "SoftmaxCrossEntropyLoss": 1,
    "Unique": 1,
}
"""Operators with outputs that can be left out, and the first of them. Not BatchNormalization, which in old
operator sets is in training mode when it has them."""

_BRANCHES = ("then_branch", "else_branch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropUnusedOutputs(GraphPass):
    """Leave out outputs that nothing uses.

    Optional outputs such as the indices of MaxPool; outputs of If with what the branches compute for them; what
    Loop collects; and a Split of which one part is used becomes a Slice.
    """

    name: ClassVar[str] = "drop-unused-outputs"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per node."""
        names = functools.cache(lambda: Names(model))
        for scope in scopes(model):
            for node in scope.graph:
                if len(node.outputs) < 2:
                    continue
                apply = _change(scope, node, ctx.shapes, names)
                if apply is not None:
                    unused = [o.name for o in node.outputs if o.name and not is_used(o)]
                    summary = f"left out {', '.join(map(str, unused))}"
                    yield Edit(Site(self.name, scope.path, first_output(node)), summary, apply)


def _change(scope: Scope, node: ir.Node, shapes: Shapes, names: Callable[[], Names]) -> Callable[[], None] | None:
    """Return what leaves the unused outputs of a node out, or None when there is nothing to do."""
    unused = [i for i, output in enumerate(node.outputs) if not is_used(output)]
    if not unused or len(unused) == len(node.outputs):
        return None
    if is_op(node, *_OPTIONAL):
        dropped = [i for i in unused if i >= _OPTIONAL[node.op_type] and node.outputs[i].name]
        return functools.partial(_blank, node, dropped) if dropped else None
    if is_op(node, "If"):
        return functools.partial(_narrow, node, unused, dict.fromkeys(_BRANCHES, 0))
    if is_op(node, "Loop"):
        collected = [i for i in unused if i >= len(node.inputs) - 2]
        return functools.partial(_narrow, node, collected, {"body": 1}) if collected else None
    if is_op(node, "Split") and len(unused) == len(node.outputs) - 1 and not has_references(node):
        return _only_part(scope, node, shapes, names)
    return None


def _blank(node: ir.Node, dropped: list[int]) -> None:
    """Take the names of outputs away, and the outputs themselves at the end."""
    for index in dropped:
        node.outputs[index].name = ""
    kept = max(i for i, output in enumerate(node.outputs) if output.name) + 1
    node.resize_outputs(kept)


def _narrow(node: ir.Node, unused: list[int], bodies: dict[str, int]) -> None:
    """Replace a node by one without these outputs, and take them from its bodies.

    Args:
        node: The node.
        unused: Which outputs go.
        bodies: Attribute -> how many outputs the body has in front of the node's.
    """
    attributes = list(node.attributes.data.values())
    for name, offset in bodies.items():
        outputs = node.attributes[name].as_graph().outputs
        for index in reversed(unused):
            outputs.pop(index + offset)
    kept = [output for i, output in enumerate(node.outputs) if i not in unused]
    new = ir.Node(
        node.domain,
        node.op_type,
        list(node.inputs),
        attributes,
        num_outputs=len(kept),
        name=node.name,
        doc_string=node.doc_string,
        metadata_props=dict(node.metadata_props),
    )
    insert_before(node, new)
    for old, output in zip(kept, new.outputs, strict=True):
        own_name = old.name
        output.type, output.shape, output.doc_string = old.type, old.shape, old.doc_string
        output.metadata_props.update(old.metadata_props)
        replace_value(old, output)
        old.name, output.name = f"{own_name}__replaced", own_name
    # The bodies belong to the new node.
    node.attributes.clear()
    remove_unused(node)


def _only_part(scope: Scope, node: ir.Node, shapes: Shapes, names: Callable[[], Names]) -> Callable[[], None] | None:
    index = next(i for i, output in enumerate(node.outputs) if is_used(output))
    sizes, source = _sizes(scope, node, shapes), node.inputs[0]
    if sizes is None or source is None:
        return None
    start, end, axis = sum(sizes[:index]), sum(sizes[: index + 1]), attribute(node, "axis", 0)

    def apply() -> None:
        builder = Builder(scope, names(), node, node.outputs[index].name or "Split")
        columns = {"starts": [start], "ends": [end], "axes": [axis]}
        if scope.opset < 10:
            value = builder.op("Slice", [source], columns)
        else:
            value = builder.op("Slice", [source, *(builder.ints(k, v) for k, v in columns.items())])
        replace_value(node.outputs[index], value)
        remove_unused(node)

    return apply


def _sizes(scope: Scope, node: ir.Node, shapes: Shapes) -> list[int] | None:
    """Return the sizes of the parts of a Split."""
    given = attribute(node, "split") if scope.opset < 13 else None
    if scope.opset >= 13 and len(node.inputs) > 1 and node.inputs[1] is not None:
        given = constant_ints(node.inputs[1])
    if given is not None:
        return list(given) if len(given) == len(node.outputs) else None
    known = [shapes.of(output) for output in node.outputs]
    axis = attribute(node, "axis", 0)
    sizes = [known_int(s[axis]) if s is not None and axis < len(s) else None for s in known]
    return [s for s in sizes if s is not None] if None not in sizes else None
