"""Linear operators on the same input are computed as one, for example query, key and value."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.linear import Array, Linear, affine, per_channel, read
from onnxopt.analysis.shapes import Shapes
from onnxopt.analysis.sharing import Sharing, branch, share
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.graph import (
    Names,
    Scope,
    attribute,
    first_output,
    has_references,
    is_op,
    only_use,
    remove_unused,
    replace_value,
    scopes,
)
from onnxopt.numeric import deferred
from onnxopt.rewrite import Builder


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeParallelLinear(GraphPass):
    """Merge MatMuls, Gemms or Convs on the same input into one with a joint weight.

    What each adds to its result is added at once, too. Weights must be constant and have no other use, so that the
    joint one takes their place. Where a Concat puts the results next to each other, the joint one takes the place
    of that. Otherwise a Split follows, where that leaves fewer nodes: for three products, two with a bias, or two
    whose results are then rearranged alike. Not for Convs: the runtime cannot split images in the layout that it
    has them in, and was 3% slower.
    """

    name: ClassVar[str] = "merge-parallel-linear"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per input."""
        names = functools.cache(lambda: Names(model))
        for scope in scopes(model):
            for members in _groups(scope, ctx.shapes):
                site = Site(self.name, scope.path, first_output(members[0].linear.node))
                merge = _merge(members, ctx.shapes)
                if isinstance(merge, str):
                    yield Refusal(site, merge)
                    continue
                yield Edit(site, merge.summary, functools.partial(merge.apply, scope, names))
            for node in scope.graph:
                joined = _joined(node, ctx.shapes) if is_op(node, "Concat") else None
                if joined is not None:
                    site = Site(self.name, scope.path, first_output(node))
                    yield Edit(site, joined.summary, functools.partial(joined.apply, scope, names))


@dataclasses.dataclass(frozen=True, slots=True)
class _Member:
    """One of the operators.

    Attributes:
        linear: The operator.
        bias: What is added per channel, by itself or by an Add behind it; None when nothing is.
        result: Its output, or that of the Add.
    """

    linear: Linear
    bias: Array | None
    result: ir.Value

    @property
    def nodes(self) -> int:
        return 1 if self.result is self.linear.node.outputs[0] else 2


def _groups(scope: Scope, shapes: Shapes) -> list[list[_Member]]:
    """Return the operators that can be merged, by input."""
    groups: dict[Any, list[_Member]] = {}
    for node in scope.graph:
        if not is_op(node, "MatMul", "Gemm"):
            continue
        linear = read(node, shapes)
        if linear is None or isinstance(linear, str) or not linear.owns_weight:
            continue
        member = _member(linear, scope)
        if member is not None:
            groups.setdefault(_key(linear), []).append(member)
    return [members for members in groups.values() if len(members) > 1]


def _key(linear: Linear) -> tuple[Any, ...]:
    node = linear.node
    kernel = linear.weight.shape.numpy()[2:]
    attributes = {name: a.value for name, a in node.attributes.items() if name not in ("beta", "kernel_shape")}
    given = tuple(sorted((name, tuple(v) if isinstance(v, Sequence) else v) for name, v in attributes.items()))
    return (node.inputs[0], node.op_type, linear.dtype, linear.input_channels, tuple(kernel), given)


def _member(linear: Linear, scope: Scope) -> _Member | None:
    output = linear.node.outputs[0]
    if not is_op(linear.node, "MatMul"):
        bias = linear.bias_per_channel()
        return None if bias is None else _Member(linear, bias if linear.bias is not None else None, output)
    user = only_use(output)
    if user is not None and user.graph is linear.node.graph and is_op(user, "Add", "Sub"):
        found = affine(user, scope.opset)
        if found is not None and found.shift is not None and found.scale is None and found.x is output:
            numbers = per_channel(found, found.shift, linear.rank, linear.axis, linear.channels)
            if not isinstance(numbers, str):
                return _Member(linear, numbers, user.outputs[0])
    return _Member(linear, None, output)


@dataclasses.dataclass(frozen=True, slots=True)
class _Merge:
    """What takes the place of several operators.

    Attributes:
        source: Their input.
        members: The operators.
        ends: What the parts of the result replace.
        sharing: How the result is rearranged and split; None when it is what a Concat gave.
    """

    source: ir.Value
    members: tuple[_Member, ...]
    ends: tuple[ir.Value, ...]
    sharing: Sharing | None

    @property
    def summary(self) -> str:
        return f"{len(self.members)} {self.members[0].linear.node.op_type}s on {self.source.name}"

    def apply(self, scope: Scope, names: Callable[[], Names]) -> None:
        first = self.members[0].linear.node
        builder = Builder(scope, names(), first, f"{self.members[0].result.name}/merged")
        value = self._product(builder)
        if self.sharing is None:
            replacements = [value]
        else:
            value = builder.layout(value, self.sharing.steps)
            parts = builder.split(value, self.sharing.axis, self.sharing.sizes, len(self.ends))
            rest = zip(parts, self.sharing.rest, strict=True)
            replacements = [builder.layout(part, steps) for part, steps in rest]
        for end, new in zip(self.ends, replacements, strict=True):
            producer = end.producer()
            assert producer is not None
            replace_value(end, new)
            remove_unused(producer)

    def _product(self, builder: Builder) -> ir.Value:
        """Build the joint operator and its bias."""
        linear = self.members[0].linear
        bias = self._bias(builder)
        inputs = [self.source, builder.tensor("weight", self._weight())]
        if not is_op(linear.node, "MatMul"):
            attributes = {name: a.value for name, a in linear.node.attributes.items() if name != "beta"}
            return builder.op(linear.node.op_type, inputs if bias is None else [*inputs, bias], attributes)
        value = builder.op("MatMul", inputs)
        return value if bias is None else builder.op("Add", [value, bias])

    def _weight(self) -> ir.TensorProtocol:
        linear = self.members[0].linear
        axis = 0 if is_op(linear.node, "Conv") or attribute(linear.node, "transB", 0) else 1
        weights = [m.linear.weight for m in self.members]
        shape = list(linear.weight.shape.numpy())
        shape[axis] = sum(m.linear.channels for m in self.members)
        return deferred.tensor(
            lambda: np.concatenate([w.numpy() for w in weights], axis), linear.dtype, shape, "merged weight"
        )

    def _bias(self, builder: Builder) -> ir.Value | None:
        if all(m.bias is None for m in self.members):
            return None
        each = [np.zeros(m.linear.channels) if m.bias is None else m.bias for m in self.members]
        return builder.constant("bias", np.concatenate(each), self.members[0].linear.dtype)


def _merge(members: Sequence[_Member], shapes: Shapes) -> _Merge | str:
    """Return how to merge operators, or why not to."""
    first = members[0].linear
    source = first.node.inputs[0]
    assert source is not None
    added = is_op(first.node, "MatMul") and any(m.bias is not None for m in members)
    saved = sum(m.nodes for m in members) - (3 if added else 2)
    results = tuple(m.result for m in members)
    sizes = tuple(m.linear.channels for m in members)
    plain = Sharing((), first.axis, sizes, ((),) * len(members))
    if saved > 0:
        return _Merge(source, tuple(members), results, plain)
    branches = [branch(value, shapes) for value in results]
    sharing = share(branches, first.axis, shapes)
    now = sum(len(b.nodes) for b in branches)
    if sharing is None or saved + now - sharing.count <= 0:
        return "merging them would save no node"
    return _Merge(source, tuple(members), tuple(b.result for b in branches), sharing)


def _joined(concat: ir.Node, shapes: Shapes) -> _Merge | None:
    """Return how the operators whose results a Concat puts next to each other become one."""
    members: list[_Member] = []
    for value in concat.inputs:
        node = value.producer() if value is not None else None
        if value is None or node is None or only_use(value) is not concat or node.graph is not concat.graph:
            return None
        linear = read(node, shapes) if is_op(node, "Conv", "Gemm", "MatMul") else None
        if not isinstance(linear, Linear) or not linear.owns_weight or attribute(node, "group", 1) != 1:
            return None
        bias = linear.bias_per_channel()
        if bias is None:
            return None
        members.append(_Member(linear, bias if linear.bias is not None else None, value))
    if len(members) < 2 or len({_key(m.linear) for m in members}) > 1 or has_references(concat):
        return None
    first, source = members[0].linear, members[0].linear.node.inputs[0]
    if source is None or attribute(concat, "axis", None) not in (first.axis, first.axis - first.rank):
        return None
    return _Merge(source, tuple(members), (concat.outputs[0],), None)
