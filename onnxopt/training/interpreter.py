"""An ONNX graph run in torch, node by node, so that gradients of its parameters can be taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from onnxopt.errors import DataError, ModelError
from onnxopt.graph import RANDOM_OPS, Scope, all_nodes, bodies, root_scopes
from onnxopt.training.call import Call, Operator
from onnxopt.training.table import operator
from onnxopt.training.values import NoCounterpart, tensor_to_torch, to_array, to_torch

Runtime = Callable[[ir.Node, Sequence[np.ndarray | None], int], list[np.ndarray] | None]
"""Computes a node outside of torch: node, inputs and opset in, outputs out; None when it cannot."""


class Interpreter:
    """A model that computes in torch.

    Nodes whose inputs are all constant are computed once. Others are computed in every run, on the graph as it is:
    bodies of If, Loop and Scan see the values around them, and functions are entered with the attributes of their
    caller.

    Attributes:
        model: The model.
        outside: The nodes of the last runs that torch has no counterpart for and that were computed by `runtime`,
            each in words; no gradient passes them.
    """

    def __init__(self, model: ir.Model, runtime: Runtime | None = None) -> None:
        """Prepare a model.

        Args:
            model: The model. It must not be changed while the interpreter is in use.
            runtime: What computes nodes that torch has no counterpart for.

        Raises:
            ModelError: If there is such a node and no `runtime`. The message names it.
        """
        self.model = model
        self._runtime = runtime
        self._roots = {id(scope.graph): scope for scope in root_scopes(model)}
        self._plans: dict[tuple[int, frozenset[str] | None, frozenset[str]], _Plan] = {}
        self._constants: dict[ir.Value, Any] = {}
        self.outside: dict[str, None] = {}
        if runtime is None:
            known = (n for n in all_nodes(model) if self._function(n) is None)
            missing = [n for n in known if operator(n.domain, n.op_type) is None]
            if missing:
                raise ModelError(_lacking(missing[0], "has no counterpart in torch", len(missing) - 1))

    def run(
        self,
        feed: Mapping[str, Any],
        parameters: Mapping[str, torch.Tensor] | None = None,
        only: Collection[str] | None = None,
        instead: Mapping[str, Operator] | None = None,
    ) -> dict[str, Any]:
        """Compute the outputs.

        Args:
            feed: A tensor or array per input; a list of them for a sequence, None for an optional without a value.
            parameters: Tensors to compute with instead of the constants of these names.
            only: Names of the values of the main graph that are wanted; the graph's outputs by default.
            instead: What computes nodes of the main graph in another way, by the names of their first outputs.

        Returns:
            Name -> tensor, list or None.

        Raises:
            ModelError: If a node cannot be computed in torch.
            DataError: If an input is missing, or a node rejects what it is given.
        """
        graph = self.model.graph
        values: dict[ir.Value, Any] = {}
        for value in graph.inputs:
            name = value.name or ""
            if name in feed:
                values[value] = _given(name, feed[name])
            elif not value.is_initializer() and not isinstance(value.type, ir.OptionalType):
                raise DataError(f'The input "{name}" is missing.')
        frame = _Frame(values, None, {}, self._roots[id(graph)], parameters or {}, instead or {})
        wanted = None if only is None else frozenset(only)
        self._compute(graph, frame, wanted)
        named = {v.name: v for v in graph.outputs} if wanted is None else self._named(wanted)
        return {name or "": self._value(value, frame) for name, value in named.items()}

    def _named(self, names: frozenset[str]) -> dict[str | None, ir.Value]:
        graph = self.model.graph
        known: dict[str | None, ir.Value] = {v.name: v for node in graph for v in node.outputs}
        known |= {v.name: v for v in (*graph.inputs, *graph.initializers.values())}
        return {name: known[name] for name in names}

    def _compute(self, graph: ir.Graph, frame: _Frame, wanted: frozenset[str] | None = None) -> None:
        """Compute the nodes that a graph's outputs, or the wanted values, need."""
        key = (id(graph), wanted, frozenset(frame.parameters))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._planned(graph, frame, wanted)
        for step in plan.steps:
            if step.static and all(v in self._constants for v in step.node.outputs):
                continue
            results = self._results(step, frame)
            target = self._constants if step.static else frame.values
            for value, result in zip(step.node.outputs, results, strict=False):
                target[value] = result
            for value in step.last_uses:
                frame.values.pop(value, None)

    def _planned(self, graph: ir.Graph, frame: _Frame, wanted: frozenset[str] | None) -> _Plan:
        keep = list(graph.outputs) if wanted is None else list(self._named(wanted).values())
        needed: set[ir.Value] = set(keep)
        chosen: list[ir.Node] = []
        for node in reversed(graph):
            if any(v in needed for v in node.outputs):
                chosen.append(node)
                needed.update(_read(node))
        chosen.reverse()
        last: dict[ir.Value, int] = {}
        for index, node in enumerate(chosen):
            last |= dict.fromkeys((*_read(node), *node.outputs), index)
        ends: dict[int, list[ir.Value]] = {}
        for value, index in last.items():
            if value.graph is graph and value not in set(keep) and not value.is_graph_input():
                ends.setdefault(index, []).append(value)
        steps = []
        for index, node in enumerate(chosen):
            opset = frame.scope.opsets.get(node.domain, 0) if node.domain else frame.scope.opset
            function = operator(node.domain, node.op_type) if self._function(node) is None else None
            static = not frame.scope.function and self._is_static(node, frame)
            steps.append(_Step(node, opset, function, static, tuple(ends.get(index, ()))))
        return _Plan(tuple(steps))

    def _is_static(self, node: ir.Node, frame: _Frame) -> bool:
        """Whether a node gives the same in every run; remembers which of its outputs do."""
        if node.op_type in RANDOM_OPS or any(True for _ in bodies(node)) or self._function(node) is not None:
            return False
        if any(v.name in frame.parameters for v in node.outputs):
            return False
        for value in node.inputs:
            if value is None or value in frame.static:
                continue
            if not value.is_initializer() or value.is_graph_input() or value.name in frame.parameters:
                return False
        frame.static.update(node.outputs)
        return True

    def _results(self, step: _Step, frame: _Frame) -> Sequence[Any]:
        node = step.node
        if node.op_type in ("Constant", "ConstantOfShape") and node.outputs[0].name in frame.parameters:
            return [frame.parameters[node.outputs[0].name or ""]]
        inputs = [None if v is None else self._value(v, frame) for v in node.inputs]
        function = self._function(node)
        attributes = _attributes(node, frame.attributes)
        if function is not None:
            return self._call_function(function, inputs, attributes)
        try:
            compute = frame.instead.get(node.outputs[0].name or "", step.function)
            if compute is None:
                raise NoCounterpart("has no counterpart in torch")
            call = Call(node, step.opset, attributes, lambda body, given: self._run_body(body, given, frame))
            found = compute(call, *inputs)
        except NoCounterpart as reason:
            return self._outside(step, inputs, str(reason))
        except (RuntimeError, IndexError, ValueError) as error:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"The node {_words(node)} rejects its inputs in torch: {line}") from error
        return found if isinstance(found, tuple) else (found,)

    def _call_function(self, function: ir.Function, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> list[Any]:
        graph = function.graph
        defaults = {name: a.value for name, a in function.attributes.items() if a.value is not None}
        values = dict(zip(graph.inputs, [*inputs, *([None] * (len(graph.inputs) - len(inputs)))], strict=True))
        frame = _Frame(values, None, {**defaults, **attributes}, self._roots[id(graph)], {}, {})
        self._compute(graph, frame)
        return [self._value(v, frame) for v in graph.outputs]

    def _run_body(self, body: ir.Graph, inputs: Sequence[Any], outer: _Frame) -> list[Any]:
        frame = _Frame(
            dict(zip(body.inputs, inputs, strict=True)), outer, outer.attributes, outer.scope, outer.parameters, {}
        )
        self._compute(body, frame)
        return [self._value(v, frame) for v in body.outputs]

    def _outside(self, step: _Step, inputs: Sequence[Any], reason: str) -> list[Any]:
        """Compute a node by the runtime.

        Raises:
            ModelError: If that does not work either.
        """
        tensors = all(v is None or isinstance(v, torch.Tensor) for v in inputs)
        if self._runtime is not None and tensors:
            declared = [v.dtype if v is not None else None for v in step.node.inputs]
            arrays = [None if v is None else to_array(v, d) for v, d in zip(inputs, declared, strict=True)]
            found = self._runtime(step.node, arrays, step.opset)
            if found is not None:
                self.outside[_words(step.node)] = None
                return [to_torch(array) if array is not None and array.size else torch.zeros(0) for array in found]
        raise ModelError(_lacking(step.node, reason))

    def _function(self, node: ir.Node) -> ir.Function | None:
        return self.model.functions.get(node.op_identifier())

    def _value(self, value: ir.Value, frame: _Frame) -> Any:
        """Return a value from the innermost frame that has it, or a constant."""
        around: _Frame | None = frame
        while around is not None:
            if value in around.values:
                return around.values[value]
            around = around.outer
        if value.is_initializer() and value.name in frame.parameters:
            return frame.parameters[value.name or ""]
        if value in self._constants:
            return self._constants[value]
        if value.is_initializer():
            assert value.const_value is not None
            try:
                found = tensor_to_torch(value.const_value)
            except NoCounterpart as reason:
                raise ModelError(f'The constant "{value.name}" {reason}, which torch cannot hold.') from reason
            self._constants[value] = found
            return found
        return None


@dataclasses.dataclass(slots=True)
class _Frame:
    """The values of a graph that is being run.

    Attributes:
        values: What has been computed.
        outer: The graph around it, whose values it may use.
        attributes: Those of the caller of the function it belongs to.
        scope: The main graph or function it belongs to.
        parameters: Tensors that stand in for constants.
        instead: What computes nodes in another way, by the names of their first outputs.
        static: Values that are the same in every run, as far as was found.
    """

    values: dict[ir.Value, Any]
    outer: _Frame | None
    attributes: Mapping[str, Any]
    scope: Scope
    parameters: Mapping[str, torch.Tensor]
    instead: Mapping[str, Operator]
    static: set[ir.Value] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    """A node to be computed.

    Attributes:
        node: The node.
        opset: Version of its operator set.
        function: What computes it; None for a call of a function of the model, and where there is nothing.
        static: Whether it gives the same in every run.
        last_uses: Values of its graph that no later node needs.
    """

    node: ir.Node
    opset: int
    function: Operator | None
    static: bool
    last_uses: tuple[ir.Value, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    steps: tuple[_Step, ...]


def _given(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_given(name, v) for v in value]
    if value is None or isinstance(value, torch.Tensor):
        return value
    try:
        return to_torch(value)
    except NoCounterpart as reason:
        raise ModelError(f'The input "{name}" {reason}, which torch cannot hold.') from reason


def _attributes(node: ir.Node, of_caller: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a node as plain values, references to the caller's among them resolved."""
    found = {}
    for name, attribute in node.attributes.data.items():
        if not attribute.is_ref():
            found[name] = attribute.value
        elif (reference := attribute.ref_attr_name or "") in of_caller:
            found[name] = of_caller[reference]
    return found


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """Yield what a node reads, captures of its bodies included."""
    for value in node.inputs:
        if value is not None:
            yield value
    for _, body in bodies(node):
        yield from body.outputs
        for inner in body:
            yield from _read(inner)


def _words(node: ir.Node) -> str:
    name = node.name or next((v.name for v in node.outputs if v.name), "")
    domain = f" of {node.domain}" if node.domain else ""
    return f'"{name}" ({node.op_type}{domain})'


def _lacking(node: ir.Node, reason: str, others: int = 0) -> str:
    more = f" {others} more nodes are like it." if others else ""
    return f"The node {_words(node)} {reason}, so this model cannot be run in torch.{more}"
