"""Remove nodes that return their input unchanged."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.dims import Dim
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.graph import (
    OPEN_END,
    STANDARD_DOMAINS,
    Scope,
    attribute,
    cannot_replace,
    constant_array,
    constant_ints,
    constant_tensor,
    drop_unused_constants,
    first_output,
    has_references,
    is_op,
    remove_node,
    replace_value,
    scopes,
    use_count,
)

_MAX_NEUTRAL_BYTES = 1 << 24
"""Larger operands are not read to see whether they are all zero or all one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoveIdentities(GraphPass):
    """Remove nodes that return their input unchanged.

    Identity, Dropout outside of training, Cast to the same type, Transpose, Reshape, Flatten, Expand, Tile,
    Slice, Pad, Squeeze, Unsqueeze and Split that change nothing, Concat, Sum, Mean, Max and Min of one input,
    reductions over no axis, and + 0, - 0, * 1, / 1 and ** 1 where neither type nor shape can change, except for
    the scale of a normalization. Adding 0.0 turns -0.0 into 0.0: the two are equal, and losing that counts as
    rounding. Clip without bounds stays, except for integers, because it makes infinities finite.
    """

    name: ClassVar[str] = "remove-identities"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per node that can go."""
        for scope in scopes(model):
            for node in scope.graph:
                verdict = _source(_Node(node, scope, ctx.shapes))
                if verdict is None:
                    continue
                site = Site(self.name, scope.path, first_output(node))
                if isinstance(verdict, str):
                    yield Refusal(site, verdict)
                    continue
                if reason := cannot_replace(node.outputs[0], verdict):
                    yield Refusal(site, reason)
                    continue
                apply = functools.partial(_bypass, node, verdict)
                yield Edit(site, f"removed {node.op_type} of {verdict.name}", apply)


def _bypass(node: ir.Node, source: ir.Value) -> None:
    inputs = [v for v in node.inputs if v is not source]
    replace_value(node.outputs[0], source)
    remove_node(node)
    drop_unused_constants(inputs)


@dataclasses.dataclass(frozen=True, slots=True)
class _Node:
    """A node with what the checks below ask about it."""

    node: ir.Node
    scope: Scope
    shapes: Shapes

    @property
    def opset(self) -> int:
        return self.scope.opset

    def input(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def has(self, index: int) -> bool:
        return self.input(index) is not None

    def ints(self, name: str, since: int, index: int) -> tuple[int, ...] | None:
        """Return integers that are an input since that opset and an attribute before; None when not known."""
        if self.opset >= since:
            return constant_ints(self.input(index))
        found = attribute(self.node, name)
        return None if found is None else tuple(found)

    def sizes(self, name: str, since: int, index: int) -> tuple[Dim | None, ...] | None:
        """Return the same, with elements that depend on the inputs as expressions, None for unknown ones."""
        value = self.input(index)
        if self.opset < since or value is None:
            return self.ints(name, since, index)
        content = self.shapes.content(value)
        return content if isinstance(content, tuple) else None

    @property
    def shape(self) -> tuple[Dim, ...] | None:
        """Shape of the first input."""
        value = self.input(0)
        return None if value is None else self.shapes.of(value)

    @property
    def rank(self) -> int | None:
        """Number of axes of the first input."""
        shape = self.shape
        return None if shape is None else len(shape)

    def dtype(self, index: int) -> ir.DataType | None:
        """Element type of an input."""
        value = self.input(index)
        return None if value is None else self.shapes.dtype(value)


_Check = Callable[[_Node], "ir.Value | str | None"]


def _source(n: _Node) -> ir.Value | str | None:
    """Return the input that the node passes on, or why it only looks like it does, or None."""
    check = _CHECKS.get(n.node.op_type)
    if check is None or n.node.domain not in STANDARD_DOMAINS or has_references(n.node):
        return None
    if not n.node.inputs or any(use_count(o) or o.is_graph_output() for o in n.node.outputs[1:]):
        return None
    return check(n)


def _first_if(condition: Callable[[_Node], bool]) -> _Check:
    """Make a check: the first input passes where the condition holds."""

    def check(n: _Node) -> ir.Value | None:
        return n.input(0) if n.has(0) and condition(n) else None

    return check


def _dropout(n: _Node) -> bool:
    if n.opset < 7:
        return bool(attribute(n.node, "is_test", 0))
    if n.opset < 12 or not n.has(2):
        return True
    training = constant_array(n.input(2), max_bytes=8)
    return training is not None and not training.any()


def _cast(n: _Node) -> bool:
    dtype = n.dtype(0)
    if dtype is None:
        return False
    wanted = n.dtype(1) if n.node.op_type == "CastLike" else attribute(n.node, "to")
    return bool(wanted == dtype)


def _transpose(n: _Node) -> bool:
    order = attribute(n.node, "perm")
    if order is not None:
        return list(order) == list(range(len(order)))
    return n.rank is not None and n.rank < 2


def _reshape(n: _Node) -> bool:
    target, shape = n.sizes("shape", 5, 1), n.shape
    if target is None or shape is None or len(target) != len(shape):
        return False
    copies = not attribute(n.node, "allowzero", 0)
    pairs = list(zip(target, shape, strict=True))
    # One dimension left open is what remains, and that is what it was.
    return sum(wanted == -1 for wanted, _ in pairs) <= 1 and all(
        wanted == dim or wanted == -1 or (wanted == 0 and copies) for wanted, dim in pairs
    )


def _flatten(n: _Node) -> bool:
    return n.rank == 2 and attribute(n.node, "axis", 1) in (1, -1)


def _expand(n: _Node) -> bool:
    target = n.sizes("", 0, 1)
    return target is not None and _keeps_shape(n, n.input(0), target)


def _keeps_shape(n: _Node, value: ir.Value | None, other: Sequence[Dim | None]) -> bool:
    """Whether broadcasting with a tensor of the other shape leaves the value as it is."""
    if not other:
        return True
    known = [d for d in other if d is not None]
    return value is not None and len(known) == len(other) and n.shapes.broadcasts_to(known, value)


def _tile(n: _Node) -> bool:
    repeats = constant_ints(n.input(1))
    return n.opset >= 6 and repeats is not None and all(r == 1 for r in repeats)


def _slice(n: _Node) -> bool:
    starts, ends = n.ints("starts", 10, 1), n.sizes("ends", 10, 2)
    if starts is None or ends is None:
        return False
    axes: Sequence[int] | None = range(len(starts))
    if n.has(3) or "axes" in n.node.attributes:
        axes = n.ints("axes", 10, 3)
    if n.has(4) and any(s != 1 for s in constant_ints(n.input(4)) or (0,)):
        return False
    if axes is None or not len(starts) == len(ends) == len(axes):
        return False
    return all(_takes_all(n, *bounds) for bounds in zip(starts, ends, axes, strict=True))


def _takes_all(n: _Node, start: int, end: Dim | None, axis: int) -> bool:
    if start == 0 and isinstance(end, int) and end >= OPEN_END:
        return True
    shape = n.shape
    dim = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
    if dim is None or (start != 0 and not (isinstance(dim, int) and start <= -dim)):
        return False
    return end == dim or (isinstance(end, int) and isinstance(dim, int) and end >= dim)


def _pad(n: _Node) -> bool:
    pads = n.ints("pads", 11, 1)
    return pads is not None and not any(pads) and n.opset >= 2


def _squeeze(n: _Node) -> bool:
    if n.has(1) or "axes" in n.node.attributes:
        return False
    return n.shape is not None and all(isinstance(d, int) and d != 1 for d in n.shape)


def _unsqueeze(n: _Node) -> bool:
    return n.ints("axes", 13, 1) == ()


def _one_input(n: _Node) -> bool:
    return len(n.node.inputs) == 1


def _one_output(n: _Node) -> bool:
    return len(n.node.outputs) == 1


def _reduce(n: _Node) -> bool:
    if not attribute(n.node, "noop_with_empty_axes", 0) or "axes" in n.node.attributes:
        return False
    return not n.has(1) or constant_ints(n.input(1)) == ()


def _clip(n: _Node) -> ir.Value | str | None:
    if n.opset < 11 or n.has(1) or n.has(2):
        return None
    dtype = n.dtype(0)
    if dtype is not None and dtype.is_integer():
        return n.input(0)
    return "without bounds it still makes infinities finite"


def _neutral(number: float, *, either_side: bool) -> _Check:
    """Make a check of an arithmetic operator whose other operand may be this constant."""

    def check(n: _Node) -> ir.Value | str | None:
        if n.opset < 7 or not (n.has(0) and n.has(1)):
            return None
        for index in (1, 0) if either_side else (1,):
            if _is_filled(n.input(index), number):
                return _kept(n, n.input(1 - index), n.input(index))
        return None

    return check


def _is_filled(value: ir.Value | None, number: float) -> bool:
    """Whether the value is a constant with this number in all elements."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes > _MAX_NEUTRAL_BYTES:
        return False
    array = tensor.numpy()
    # One element settles most of them.
    return bool(array.size and array.flat[0] == number and np.all(array == number))


def _kept(n: _Node, source: ir.Value | None, neutral: ir.Value | None) -> ir.Value | str | None:
    tensor = constant_tensor(neutral)
    assert tensor is not None, "the neutral operand is constant"
    if is_op(n.node, "Mul") and tensor.size > 1 and _is_normalized(source):
        return "it is the scale of a normalization, which ONNX Runtime fuses only with one"
    if _keeps_shape(n, source, tensor.shape.numpy()):
        return source
    return "its neutral operand may change the shape by broadcasting"


def _is_normalized(value: ir.Value | None) -> bool:
    """Whether the value is x / sqrt(something), as RMS and layer normalization end."""
    node = value.producer() if value is not None else None
    if node is None or not is_op(node, "Div") or node.inputs[1] is None:
        return False
    return is_op(node.inputs[1].producer(), "Sqrt")


_CHECKS: dict[str, _Check] = {
    "Identity": _first_if(lambda n: True),
    "Dropout": _first_if(_dropout),
    "Cast": _first_if(_cast),
    "CastLike": _first_if(_cast),
    "Transpose": _first_if(_transpose),
    "Reshape": _first_if(_reshape),
    "Flatten": _first_if(_flatten),
    "Expand": _first_if(_expand),
    "Tile": _first_if(_tile),
    "Slice": _first_if(_slice),
    "Pad": _first_if(_pad),
    "Squeeze": _first_if(_squeeze),
    "Unsqueeze": _first_if(_unsqueeze),
    "Split": _first_if(_one_output),
    "Concat": _first_if(_one_input),
    "Sum": _first_if(_one_input),
    "Mean": _first_if(_one_input),
    "Max": _first_if(_one_input),
    "Min": _first_if(_one_input),
    "ReduceSum": _first_if(_reduce),
    "ReduceMean": _first_if(_reduce),
    "ReduceMax": _first_if(_reduce),
    "ReduceMin": _first_if(_reduce),
    "ReduceProd": _first_if(_reduce),
    "Clip": _clip,
    "Add": _neutral(0, either_side=True),
    "Sub": _neutral(0, either_side=False),
    "Mul": _neutral(1, either_side=True),
    "Div": _neutral(1, either_side=False),
    "Pow": _neutral(1, either_side=False),
}
