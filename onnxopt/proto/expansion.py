"""How large a model is once its functions are inlined, as runtimes do when they load it."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnxopt.errors import ModelError

MAX_NODES = 10_000_000
"""More than any real model has: a few functions that call one another twice are enough for any number."""

_Calls = Mapping[ir.OperatorIdentifier, int]


def require_expandable(graph: ir.Graph, functions: Sequence[ir.Function]) -> None:
    """Check that no function calls itself, and that inlining all of them leaves a model that fits into memory.

    Raises:
        ModelError: If it does not.
    """
    if not functions:
        return
    calls = {f.identifier(): _operators(f) for f in functions}
    sizes: dict[ir.OperatorIdentifier, int] = {}
    for name in _callees_first(calls):
        sizes[name] = _expanded(calls[name], sizes)
        if sizes[name] > MAX_NODES:
            break
    total = max(_expanded(_operators(graph), sizes), *sizes.values())
    if total > MAX_NODES:
        raise ModelError(
            f"its functions call one another so often that they stand for more than {MAX_NODES:,} nodes; export it "
            "with fewer levels of functions."
        )


def _operators(graph: ir.Graph | ir.Function) -> _Calls:
    return collections.Counter(node.op_identifier() for node in ir.traversal.RecursiveGraphIterator(graph))


def _expanded(operators: _Calls, sizes: Mapping[ir.OperatorIdentifier, int]) -> int:
    return sum(times * sizes.get(name, 1) for name, times in operators.items())


def _callees_first(calls: Mapping[ir.OperatorIdentifier, _Calls]) -> list[ir.OperatorIdentifier]:
    """Return all functions, each behind those that it calls.

    Raises:
        ModelError: If one calls itself, directly or not.
    """
    order: dict[ir.OperatorIdentifier, None] = {}
    open_: set[ir.OperatorIdentifier] = set()
    stack = [(name, False) for name in calls]
    while stack:
        name, done = stack.pop()
        if done:
            open_.discard(name)
            order[name] = None
        elif name in open_:
            raise ModelError(f'the function "{name[0]}::{name[1]}" calls itself, which ONNX does not allow.')
        elif name not in order:
            open_.add(name)
            stack.append((name, True))
            stack.extend((callee, False) for callee in calls[name] if callee in calls)
    return list(order)
