"""Shape arithmetic that has a known result is replaced by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.dims import Dim
from onnxopt.analysis.layout import target_constant
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.graph import (
    Names,
    Scope,
    add_constant,
    constant_tensor,
    has_references,
    is_op,
    replace_value,
    scopes,
)

_Key: TypeAlias = tuple[ir.DataType, int, tuple[Dim, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SettleShapes(GraphPass):
    """Replace computed shapes by constants, and equal ones by one.

    Three things, all from symbolic knowledge of shapes: an integer value whose elements are all known becomes a
    constant; one that provably equals an earlier value becomes that value; the target of a Reshape that can be
    written with constants, 0 (copied from the input) and at most one -1 is written so, which leaves the arithmetic
    that computed it without a use.
    """

    name = "settle-shapes"
    guarantee = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per value or Reshape."""
        names: Names | None = None
        for scope in scopes(model):
            seen: dict[_Key, ir.Value] = {}
            for node in scope.graph:
                for output in node.outputs:
                    edit = self._value(scope, node, output, ctx.shapes, seen)
                    if edit is None:
                        continue
                    if isinstance(edit, _Settled):
                        names = names or Names(model)
                        yield edit.bind(self.name, scope, names)
                    else:
                        yield edit
                target = reshape_target(node, ctx.shapes)
                if target is not None:
                    names = names or Names(model)
                    yield self._reshape(scope, node, target, names)

    def _value(
        self, scope: Scope, node: ir.Node, output: ir.Value, shapes: Shapes, seen: dict[_Key, ir.Value]
    ) -> Edit | _Settled | None:
        if is_op(node, "Constant") or not (output.uses() or output.is_graph_output()):
            return None
        key = content_key(output, shapes)
        if key is None:
            return None
        known = [d for d in key[2] if isinstance(d, int)]
        if len(known) == len(key[2]):
            return None if output.is_graph_output() else _Settled(node, output, key, tuple(known))
        earlier = seen.setdefault(key, output)
        if earlier is output or output.is_graph_output():
            return None

        def apply() -> None:
            replace_value(output, earlier)

        site = Site(self.name, scope.path, output.name or "")
        return Edit(site, f"equals {earlier.name}", apply)

    def _reshape(self, scope: Scope, node: ir.Node, target: tuple[int, ...], names: Names) -> Edit:
        def apply() -> None:
            shape = add_constant(scope, names, f"{node.outputs[0].name}/shape", np.array(target, np.int64), node)
            node.replace_input_with(1, shape)
            node.attributes.pop("allowzero", None)

        site = Site(self.name, scope.path, node.outputs[0].name or "")
        return Edit(site, f"Reshape to {list(target)}", apply)


@dataclasses.dataclass(frozen=True)
class _Settled:
    """An output with known elements."""

    node: ir.Node
    output: ir.Value
    key: _Key
    elements: tuple[int, ...]

    def bind(self, pass_name: str, scope: Scope, names: Names) -> Edit:
        def apply() -> None:
            dtype, rank, _ = self.key
            array = np.array(self.elements if rank else self.elements[0], dtype.numpy())
            constant = add_constant(scope, names, f"{self.output.name}/settled", array, self.node)
            replace_value(self.output, constant)

        shown = list(self.elements) if self.key[1] else self.elements[0]
        return Edit(Site(pass_name, scope.path, self.output.name or ""), f"is always {shown}", apply)


def content_key(value: ir.Value, shapes: Shapes) -> _Key | None:
    """Return (dtype, rank, elements) of a small integer value all of whose elements are expressions."""
    content = shapes.content(value)
    dtype = shapes.dtype(value)
    if content is None or dtype is None:
        return None
    if not isinstance(content, tuple):
        return dtype, 0, (content,)
    elements = tuple(d for d in content if d is not None)
    return (dtype, 1, elements) if len(elements) == len(content) else None


def reshape_target(node: ir.Node, shapes: Shapes) -> tuple[int, ...] | None:
    """Return the constant to give a Reshape instead of a computed shape, or None when there is none."""
    if not is_op(node, "Reshape") or has_references(node) or len(node.inputs) < 2:
        return None
    source, target = node.inputs[0], node.inputs[1]
    if source is None or target is None or constant_tensor(target) is not None:
        return None
    before, after = shapes.of(source), shapes.of(node.outputs[0])
    if before is None or after is None:
        return None
    content = shapes.content(target)
    asked = content if isinstance(content, tuple) else ()
    return target_constant(before, after, inferred=-1 in asked)
