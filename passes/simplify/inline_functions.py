"""Calls of model-local functions are replaced by what the functions compute."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import onnx_ir as ir

from onnxopt.analysis.size import model_size
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.graph import (
    STANDARD_DOMAINS,
    Names,
    Scope,
    first_output,
    remove_unused,
    scopes,
)
from onnxopt.instantiate import Bindings, Instantiation, cannot_take_over, take_over

_NODE_BYTES = 96
"""What a node takes in a file, roughly."""
_SMALLEST_ALLOWANCE = 4096

_GRAPH_ATTRIBUTE = "it is called with a graph as an attribute"
_OTHER_OPSET = "it is written in another version of an operator set than its caller"
_MANY_INPUTS = "it is called with more inputs or outputs than it has"
_RECURSIVE = "it calls itself"
_GROWS = "copying its body to every call would make the model bigger"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InlineFunctions(GraphPass):
    """Replace calls of model-local functions by what the functions compute.

    ONNX Runtime does the same when it loads, but what other passes know ends at a function: inside of it neither
    shapes nor constants of the caller are known. A function that is called often stays when copies of it would
    make the model bigger.

    Attributes:
        max_growth: Share of the size of the model by which the copies of one function may exceed the function
            (rounded down to a power of two; at least 4 KiB are allowed).
    """

    name: ClassVar[str] = "inline-functions"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    max_growth: float = 0.002

    def skip_reason(self, model: ir.Model, ctx: Context) -> str | None:
        """Skip models without functions."""
        return None if model.functions else "the model has no functions"

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per call."""
        names = functools.cache(lambda: Names(model))
        refused = _refused(model, self.max_growth)
        for scope in scopes(model):
            for node in scope.graph:
                yield from self._visit(model, scope, node, refused, names)

    def _visit(
        self,
        model: ir.Model,
        scope: Scope,
        node: ir.Node,
        refused: Mapping[ir.OperatorIdentifier, str],
        names: Callable[[], Names],
    ) -> Iterator[Edit | Refusal]:
        identifier = node.op_identifier()
        function = model.functions.get(identifier)
        if function is None:
            return
        site = Site(self.name, scope.path, first_output(node))
        reason = refused.get(identifier) or _unfit(scope, node, function)
        if reason:
            yield Refusal(site, reason)
            return
        inlined: list[ir.Node] = []

        def apply() -> None:
            inlined.extend(_inline(model, scope, node, function, names()))

        yield Edit(site, f"inlined {function.domain}::{function.name}", apply)
        for inner in inlined:
            if inner.graph is not None:
                yield from self._visit(model, scope, inner, refused, names)


def _refused(model: ir.Model, max_growth: float) -> dict[ir.OperatorIdentifier, str]:
    """Return the functions that are not inlined anywhere, and why."""
    callers = _callers(model)
    share = int(model_size(model).bytes * max_growth)
    allowance = max(_SMALLEST_ALLOWANCE, 1 << max(share.bit_length() - 1, 0))
    found = dict.fromkeys(_recursive(callers), _RECURSIVE)
    copies: dict[ir.OperatorIdentifier | None, int] = {None: 1, **dict.fromkeys(found, 1)}
    pending = [identifier for identifier in model.functions if identifier not in copies]
    while pending:
        identifier = pending.pop()
        unknown = [caller for caller in callers[identifier] if caller not in copies]
        if unknown:
            pending.append(identifier)
            pending.extend(caller for caller in unknown if caller is not None)
            continue
        if identifier in copies:
            continue
        copies[identifier] = sum(copies[caller] * calls for caller, calls in callers[identifier].items())
        if (copies[identifier] - 1) * _size(model.functions[identifier]) > allowance:
            found[identifier] = _GROWS
            copies[identifier] = 1
    return found


def _callers(model: ir.Model) -> dict[ir.OperatorIdentifier, Counter[ir.OperatorIdentifier | None]]:
    """Return which functions call a function, and how often; None stands for the main graph."""
    found: dict[ir.OperatorIdentifier, Counter[ir.OperatorIdentifier | None]] = {
        identifier: Counter() for identifier in model.functions
    }
    graphs: list[tuple[ir.OperatorIdentifier | None, ir.Graph]] = [(None, model.graph)]
    graphs += [(identifier, function.graph) for identifier, function in model.functions.items()]
    for caller, graph in graphs:
        for node in graph.all_nodes():
            if node.op_identifier() in found:
                found[node.op_identifier()][caller] += 1
    return found


def _recursive(
    callers: Mapping[ir.OperatorIdentifier, Counter[ir.OperatorIdentifier | None]],
) -> Iterator[ir.OperatorIdentifier]:
    """Yield the functions that call themselves, which ONNX forbids, directly or not."""
    for identifier in callers:
        reached: set[ir.OperatorIdentifier] = set()
        pending = [identifier]
        while pending:
            new = {caller for caller in callers[pending.pop()] if caller is not None} - reached
            reached |= new
            pending.extend(new)
        if identifier in reached:
            yield identifier


def _size(function: ir.Function) -> int:
    """Return roughly how many bytes the body of a function takes."""
    total = 0
    for node in function.all_nodes():
        total += _NODE_BYTES
        for attr in node.attributes.data.values():
            if not attr.is_ref() and attr.type == ir.AttributeType.TENSOR:
                total += attr.as_tensor().nbytes
    return total


def _unfit(scope: Scope, node: ir.Node, function: ir.Function) -> str | None:
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.data.values()):
        return _GRAPH_ATTRIBUTE
    if len(node.inputs) > len(function.inputs) or len(node.outputs) > len(function.outputs):
        return _MANY_INPUTS
    for domain, version in function.opset_imports.items():
        names = STANDARD_DOMAINS if domain in STANDARD_DOMAINS else (domain,)
        used = next((scope.opsets[n] for n in names if n in scope.opsets), version)
        if used != version and any(n.domain in names for n in function.all_nodes()):
            return _OTHER_OPSET
    return cannot_take_over(node.outputs, scope.opset)


def _inline(model: ir.Model, scope: Scope, node: ir.Node, function: ir.Function, names: Names) -> list[ir.Node]:
    imports = model.opset_imports if scope.function is None else scope.function.opset_imports
    for domain, version in function.opset_imports.items():
        if domain not in imports and not (domain in STANDARD_DOMAINS and scope.opset):
            imports[domain] = version
    given = {name: a for name, a in function.attributes.items() if a.value is not None} | node.attributes.data
    copies = Instantiation(scope, names, node, given, node.metadata_props)
    bindings: Bindings = dict.fromkeys(function.inputs)
    bindings.update(zip(function.inputs, node.inputs, strict=False))
    inlined = copies.nodes(function.graph, bindings)
    for old, inner in zip(node.outputs, function.outputs, strict=False):
        new = bindings.get(inner)
        if new is not None:
            take_over(old, new, names, node)
    remove_unused(node)
    return inlined
