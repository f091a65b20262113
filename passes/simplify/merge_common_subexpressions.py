"""Compute once what is computed twice."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Iterator, Mapping
from typing import ClassVar

import onnx_ir as ir

from onnxopt.analysis.contents import attribute_key
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.graph import (
    RANDOM_OPS,
    STANDARD_DOMAINS,
    Scope,
    cannot_replace,
    first_output,
    inner_scopes,
    remove_node,
    replace_value,
    root_scopes,
)

_KNOWN_DOMAINS = frozenset([*STANDARD_DOMAINS, "ai.onnx.ml", "com.microsoft"])
_COMMUTATIVE = frozenset(["Add", "Mul", "And", "Or", "Xor", "Equal"])

_UNKNOWN_OPERATOR = "it is not known whether the operator returns the same for the same inputs"
_BOTH_OUTPUTS = "both are graph outputs, whose names must stay"

_Known = dict[Hashable, ir.Node]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeCommonSubexpressions(GraphPass):
    """Compute once what is computed twice.

    Nodes are equal when operator, attributes and inputs are; nested graphs also reuse what was computed before
    the node that carries them. Random operators, nodes with nested graphs and operators of unknown domains are
    not merged.
    """

    name: ClassVar[str] = "merge-common-subexpressions"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per node that repeats an earlier one."""
        repeatable = _Repeatable(model)
        for scope in root_scopes(model):
            yield from self._merge(scope, (), repeatable)

    def _merge(self, scope: Scope, outer: tuple[_Known, ...], repeatable: _Repeatable) -> Iterator[Edit | Refusal]:
        known: _Known = {}
        for node in scope.graph:
            inner = list(inner_scopes(scope, node))
            for body in inner:
                yield from self._merge(body, (*outer, known), repeatable)
            if inner or not node.outputs or repeatable.is_random(node):
                continue
            key = _key(node, scope.opset)
            found = next((n for d in (*outer, known) if (n := d.get(key)) is not None), None)
            if found is None:
                known[key] = node
            else:
                yield self._judge(scope, node, found, repeatable)

    def _judge(self, scope: Scope, node: ir.Node, found: ir.Node, repeatable: _Repeatable) -> Edit | Refusal:
        site = Site(self.name, scope.path, first_output(node))
        if not repeatable.is_known(node):
            return Refusal(site, _UNKNOWN_OPERATOR)
        pairs = list(zip(node.outputs, found.outputs, strict=True))
        for old, new in pairs:
            if reason := cannot_replace(old, new):
                return Refusal(site, _BOTH_OUTPUTS if new.is_graph_output() else reason)
        summary = f"merged {node.op_type} with {first_output(found)}"
        return Edit(site, summary, functools.partial(_replace, node, pairs))


class _Repeatable:
    """Knows which operators return the same for the same inputs."""

    def __init__(self, model: ir.Model) -> None:
        self._functions: Mapping[ir.OperatorIdentifier, ir.Function] = model.functions
        self._random: dict[ir.OperatorIdentifier, bool] = {}

    def is_known(self, node: ir.Node) -> bool:
        return node.domain in _KNOWN_DOMAINS or node.op_identifier() in self._functions

    def is_random(self, node: ir.Node) -> bool:
        """Whether the node, or anything in the function it calls, draws random numbers."""
        identifier = node.op_identifier()
        function = self._functions.get(identifier)
        if function is None:
            return node.op_type in RANDOM_OPS
        if identifier not in self._random:
            # Functions do not call themselves; the entry only ends the walk over a malformed model.
            self._random[identifier] = False
            self._random[identifier] = any(self.is_random(n) for n in function.all_nodes())
        return self._random[identifier]


def _key(node: ir.Node, opset: int) -> Hashable:
    """Return what equal nodes have in common."""
    inputs = list(node.inputs)
    while inputs and inputs[-1] is None:
        inputs.pop()
    if node.op_type in _COMMUTATIVE and node.domain in STANDARD_DOMAINS and opset >= 7:
        inputs.sort(key=id)
    attributes = [part for name, a in sorted(node.attributes.data.items()) for part in (name, attribute_key(a))]
    # An output that is left out is not computed.
    outputs = [bool(o.name) for o in node.outputs]
    # One flat tuple: a hundred thousand keys of nested ones would keep the garbage collector busy.
    return (*node.op_identifier(), *outputs, *inputs, *attributes)


def _replace(node: ir.Node, pairs: list[tuple[ir.Value, ir.Value]]) -> None:
    for old, new in pairs:
        replace_value(old, new)
    remove_node(node)
