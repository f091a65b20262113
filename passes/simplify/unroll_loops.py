"""A Loop that always runs the same few rounds is replaced by its rounds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.graph import (
    RANDOM_OPS,
    Names,
    Scope,
    add_constant,
    all_nodes,
    attribute,
    bodies,
    first_output,
    is_op,
    remove_unused,
    scopes,
    use_count,
)
from onnxopt.instantiate import Bindings, Instantiation, cannot_take_over, node_count, take_over
from onnxopt.rewrite import Builder

AXES_AS_INPUT = 13
"""From this opset on, Unsqueeze takes its axes as an input."""


_NO_ROUNDS = "it runs no round, and the shape of what it collects is not known"
_MANY_ROUNDS = "it runs more than max_rounds rounds"
_MANY_NODES = "its rounds together have more than max_nodes nodes"
_CONDITION = "its body may end it early"
_RANDOM_BODY = "its body draws random numbers, which would repeat"
_MALFORMED = "its body does not fit its inputs and outputs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnrollLoops(GraphPass):
    """Replace a Loop that always runs the same few rounds by its rounds, one after the other.

    The trip count must be constant or follow from shapes, and nothing may end the Loop early. What a round of a
    Loop costs besides its nodes is saved, and constants of one round meet those of the next.

    Attributes:
        max_rounds: Most rounds to unroll.
        max_nodes: Most nodes to replace a Loop with.
    """

    name: ClassVar[str] = "unroll-loops"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    max_rounds: int = 8
    max_nodes: int = 32

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per Loop."""
        names = functools.cache(lambda: Names(model))
        random = functools.cache(lambda: _random_functions(model))
        for scope in scopes(model):
            for node in scope.graph:
                if not is_op(node, "Loop") or not node.inputs:
                    continue
                rounds = _trip_count(node, ctx)
                body = attribute(node, "body")
                if rounds is None or not isinstance(body, ir.Graph):
                    continue
                loop = _Loop(scope, node, body, rounds)
                site = Site(self.name, scope.path, first_output(node))
                if reason := self._refused(loop, ctx) or _draws(body, random()):
                    yield Refusal(site, reason)
                else:
                    yield Edit(site, f"unrolled {rounds} rounds", functools.partial(loop.unroll, names))

    def _refused(self, loop: _Loop, ctx: Context) -> str | None:
        if reason := loop.malformed:
            return reason
        if not _always_continues(loop, ctx):
            return _CONDITION
        if loop.rounds > self.max_rounds:
            return _MANY_ROUNDS
        collected = sum(bool(use_count(v)) or v.is_graph_output() for v in loop.collected)
        if loop.rounds == 0 and collected:
            return _NO_ROUNDS
        if loop.rounds * (node_count(loop.body) + collected) + collected > self.max_nodes:
            return _MANY_NODES
        return cannot_take_over(loop.node.outputs, loop.scope.opset)


def _number(value: ir.Value | None, ctx: Context) -> int | None:
    """Return the single integer or truth value that a value always is, or None."""
    content = None if value is None else ctx.shapes.known_content(value)
    item = content.items[0] if content is not None and len(content.items) == 1 else None
    return item if isinstance(item, int) else None


def _trip_count(node: ir.Node, ctx: Context) -> int | None:
    """Return how many rounds a Loop runs when nothing ends it early, or None."""
    condition = node.inputs[1] if len(node.inputs) > 1 else None
    first = 1 if condition is None else _number(condition, ctx)
    if first == 0:
        return 0
    rounds = _number(node.inputs[0], ctx)
    return None if rounds is None or first is None else max(rounds, 0)


def _always_continues(loop: _Loop, ctx: Context) -> bool:
    """Whether the body's condition is always true; the one it got will do."""
    if loop.rounds == 0:
        return True
    condition: ir.Value | None = loop.body.outputs[0]
    while condition is not None and is_op(condition.producer(), "Identity"):
        producer = condition.producer()
        condition = producer.inputs[0] if producer is not None else None
    return condition is loop.body.inputs[1] or _number(loop.body.outputs[0], ctx) == 1


def _random_functions(model: ir.Model) -> frozenset[ir.OperatorIdentifier]:
    """Return the functions, which may draw random numbers, if anything in the model does."""
    return frozenset(model.functions) if any(n.op_type in RANDOM_OPS for n in all_nodes(model)) else frozenset()


def _draws(graph: ir.Graph, functions: frozenset[ir.OperatorIdentifier]) -> str | None:
    for node in graph:
        if node.op_type in RANDOM_OPS or node.op_identifier() in functions:
            return _RANDOM_BODY
        if any(_draws(body, functions) for _, body in bodies(node)):
            return _RANDOM_BODY
    return None


@dataclasses.dataclass(frozen=True, slots=True)
class _Loop:
    """A Loop with a known number of rounds."""

    scope: Scope
    node: ir.Node
    body: ir.Graph
    rounds: int

    @property
    def states(self) -> int:
        """How many values are carried from round to round."""
        return len(self.node.inputs) - 2

    @property
    def collected(self) -> list[ir.Value]:
        """The outputs that hold something from every round."""
        return list(self.node.outputs[self.states :])

    @property
    def malformed(self) -> str | None:
        """Why the body cannot belong to the node, if it cannot."""
        inputs, outputs = len(self.body.inputs), len(self.body.outputs)
        fits = inputs == self.states + 2 and outputs == len(self.node.outputs) + 1
        complete = self.states >= 0 and all(v is not None for v in self.node.inputs[2:])
        return None if fits and complete else _MALFORMED

    def unroll(self, all_names: Callable[[], Names]) -> None:
        """Put the rounds in the place of the node."""
        names = all_names()
        copies = Instantiation(self.scope, names, self.node)
        shared = copies.constants(self.body) if self.rounds else {}
        carried: list[ir.Value] = [v for v in self.node.inputs[2:] if v is not None]
        slices: list[list[ir.Value]] = [[] for _ in self.collected]
        for number in range(self.rounds):
            bindings: Bindings = {**shared, **self._formals(number, carried, names)}
            copies.nodes(self.body, bindings)
            results = [bindings.get(v, v) for v in self.body.outputs[1:]]
            given = [v for v in results if v is not None]
            carried, scanned = given[: self.states], given[self.states :]
            for collected, value in zip(slices, scanned, strict=True):
                collected.append(value)
        for old, new in zip(self.node.outputs, carried, strict=False):
            take_over(old, new, names, self.node)
        for old, parts in zip(self.collected, slices, strict=True):
            if use_count(old) or old.is_graph_output():
                take_over(old, self._stacked(old, parts, names), names, self.node)
        remove_unused(self.node)

    def _formals(self, number: int, carried: list[ir.Value], names: Names) -> Bindings:
        """Bind the body's inputs for one round."""
        found: Bindings = dict(zip(self.body.inputs[2:], carried, strict=True))
        for formal, array in zip(self.body.inputs[:2], (np.array(number, np.int64), np.array(True)), strict=True):
            if use_count(formal) or formal.is_graph_output():
                shaped = array.reshape(1) if formal.shape is not None and len(formal.shape) == 1 else array
                base = f"{first_output(self.node)}/{formal.name}"
                found[formal] = add_constant(self.scope, names, base, shaped, self.node)
        return found

    def _stacked(self, old: ir.Value, parts: list[ir.Value], names: Names) -> ir.Value:
        """Put what the rounds gave one behind the other along a new first axis."""
        builder = Builder(self.scope, names, self.node, old.name or "Loop")
        if self.scope.opset < AXES_AS_INPUT:
            rows = [builder.op("Unsqueeze", [part], {"axes": [0]}) for part in parts]
        else:
            axes = builder.ints("axes", [0])
            rows = [builder.op("Unsqueeze", [part, axes]) for part in parts]
        return rows[0] if len(rows) == 1 else builder.op("Concat", rows, {"axis": 0})
