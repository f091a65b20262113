"""Runs rewrite rules over every graph of a model, bucketed by the operator a rule starts from.

A rule is a function that looks at one node and answers `Found` (what to replace, and how to build the
replacement), `Same` (what to replace by a value that is there already), `Refused` (a near miss and its reason) or
None. Rules look, the driver edits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_ir as ir

from onnxopt.contract import Context, Edit, Refusal, Site
from onnxopt.graph import (
    STANDARD_DOMAINS,
    Names,
    Scope,
    add_constant,
    cannot_replace,
    has_references,
    insert_before,
    remove_unused,
    replace_value,
    scopes,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from onnxopt.analysis.layout import Step

AXES_AS_INPUT = 13
"""From this opset on, Squeeze and Unsqueeze take their axes, and Split its sizes, as an input."""
SPLIT_COUNTS = 18
"""From this opset on, a Split into equal parts says how many."""


SHAPE_RANGE = 15
"""From this opset on, Shape can give a part of the shape."""


class Builder:
    """Makes the nodes of a replacement in front of the node they replace, with names that collide with nothing."""

    def __init__(self, scope: Scope, names: Names, before: ir.Node, base: str) -> None:
        """Build in front of `before`, deriving names from `base`."""
        self.scope = scope
        self._names = names
        self._before = before
        self._base = base

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
    ) -> ir.Value:
        """Add a node and return its first output; the others are `value.producer().outputs`."""
        node = ir.node(
            op_type,
            list(inputs),
            attributes or {},
            domain=domain,
            num_outputs=outputs,
            name=self._names.fresh(f"{self._base}/{op_type}"),
        )
        for output in node.outputs:
            output.name = self._names.fresh(f"{self._base}/{op_type}_output")
        insert_before(self._before, node)
        if domain:
            self.scope.opsets.setdefault(domain, 1)
        return node.outputs[0]

    def constant(self, name: str, array: ArrayLike, dtype: ir.DataType | None = None) -> ir.Value:
        """Add a constant, of the given element type if one is given."""
        made = np.asarray(array, dtype=dtype.numpy() if dtype is not None else None)
        return add_constant(self.scope, self._names, f"{self._base}/{name}", made, self._before)

    def ints(self, name: str, values: Sequence[int]) -> ir.Value:
        """Add a list of int64, for axes, shapes and pads."""
        return self.constant(name, np.array(values, np.int64))

    def at(self, before: ir.Node) -> Builder:
        """Return a builder that puts nodes in front of another node of the same graph."""
        return Builder(self.scope, self._names, before, self._base)

    def tensor(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Add a constant that is a tensor already, without reading it."""
        return add_constant(self.scope, self._names, f"{self._base}/{name}", tensor, self._before)

    def times(
        self,
        value: ir.Value,
        factors: Sequence[tuple[ir.Value, float]],
        coefficient: float = 1.0,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        """Multiply by what a product holds besides.

        Args:
            value: What is multiplied.
            factors: The other factors and their exponents, 1 or -1.
            coefficient: A number to multiply by at last; left out where it is 1 but for rounding.
            dtype: Element type of the number.
        """
        for other, exponent in factors:
            value = self.op("Mul" if exponent == 1 else "Div", [value, other])
        if not math.isclose(coefficient, 1, rel_tol=1e-6):
            value = self.op("Mul", [value, self.constant("factor", coefficient, dtype)])
        return value

    def split(self, source: ir.Value, axis: int, sizes: Sequence[int] | None, parts: int) -> tuple[ir.Value, ...]:
        """Add a Split and return its outputs; without sizes the parts are equal."""
        inputs: list[ir.Value | None] = [source]
        attributes: dict[str, Any] = {"axis": axis}
        if sizes is not None and self.scope.opset >= AXES_AS_INPUT:
            inputs.append(self.ints("sizes", sizes))
        elif sizes is not None:
            attributes["split"] = list(sizes)
        elif self.scope.opset >= SPLIT_COUNTS:
            attributes["num_outputs"] = parts
        node = self.op("Split", inputs, attributes, outputs=parts).producer()
        assert node is not None
        return tuple(node.outputs)

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """Add what reads the size of an axis, as a list of one."""
        if self.scope.opset >= SHAPE_RANGE:
            return self.op("Shape", [value], {"start": axis, "end": axis + 1})
        return self.op("Gather", [self.op("Shape", [value]), self.ints("axis", [axis])], {"axis": 0})

    def layout(self, source: ir.Value, steps: Sequence[Step]) -> ir.Value:
        """Add the nodes of a layout plan (`analysis/layout.py`); without any, return the source."""
        value = source
        for step in steps:
            values = list(step.values)
            if step.op == "Transpose":
                value = self.op("Transpose", [value], {"perm": values})
            elif step.op == "Reshape":
                value = self.op("Reshape", [value, self.ints("shape", values)])
            elif self.scope.opset >= AXES_AS_INPUT:
                value = self.op(step.op, [value, self.ints("axes", values)])
            else:
                value = self.op(step.op, [value], {"axes": values})
        return value


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A place where a rule applies.

    Attributes:
        result: The value that is replaced; its producer and what fed only it are removed.
        summary: What is done, for the report.
        build: Makes the replacement and returns the value that takes the place of `result`. It must be a new one.
    """

    result: ir.Value
    summary: str
    build: Callable[[Builder], ir.Value]


@dataclasses.dataclass(frozen=True, slots=True)
class Same:
    """A value that always equals another one, which is visible wherever the first is used.

    Attributes:
        result: The value that is replaced; its producer and what fed only it are removed.
        value: What takes its place.
        summary: What is done, for the report.
    """

    result: ir.Value
    value: ir.Value
    summary: str


@dataclasses.dataclass(frozen=True, slots=True)
class Refused:
    """A near miss."""

    reason: str


Answer: TypeAlias = Found | Same | Refused | None
Rule: TypeAlias = Callable[[ir.Node, Scope, Context], Answer]


def rewrite(
    pass_name: str, model: ir.Model, ctx: Context, rules: Mapping[str, Sequence[Rule]]
) -> Iterator[Edit | Refusal]:
    """Try rules at every node of the standard domain and yield what they find.

    Args:
        pass_name: The pass the sites belong to.
        model: The model.
        ctx: Handed on to the rules.
        rules: Operator -> the rules that start from it, tried in order until one applies.
    """
    names: Names | None = None
    for scope in scopes(model):
        for node in scope.graph:
            candidates = rules.get(node.op_type)
            if not candidates or node.domain not in STANDARD_DOMAINS or has_references(node):
                continue
            answer = _first(candidates, node, scope, ctx)
            if answer is None:
                continue
            if isinstance(answer, Same) and (reason := cannot_replace(answer.result, answer.value)):
                answer = Refused(reason)
            if isinstance(answer, Refused):
                yield Refusal(Site(pass_name, scope.path, node.outputs[0].name or ""), answer.reason)
                continue
            names = names or Names(model)
            site = Site(pass_name, scope.path, answer.result.name or "")
            yield Edit(site, answer.summary, _apply(answer, scope, names))


def _first(candidates: Sequence[Rule], node: ir.Node, scope: Scope, ctx: Context) -> Answer:
    """Return the first find, or else the first refusal."""
    refused: Answer = None
    for rule in candidates:
        answer = rule(node, scope, ctx)
        if isinstance(answer, (Found, Same)):
            return answer
        refused = refused or answer
    return refused


def _apply(found: Found | Same, scope: Scope, names: Names) -> Callable[[], None]:
    def apply() -> None:
        old = found.result
        producer = old.producer()
        assert producer is not None, "a rule replaces what a node computes"
        if isinstance(found, Same):
            replacement = found.value
        else:
            replacement = found.build(Builder(scope, names, producer, old.name or producer.op_type))
        replace_value(old, replacement)
        remove_unused(producer)

    return apply
