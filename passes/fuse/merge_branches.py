"""Convolutions of the same input whose results are added up are one convolution."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.graph import (
    Names,
    Scope,
    attribute,
    constant_array,
    first_output,
    has_references,
    is_op,
    only_use,
    remove_unused,
    replace_value,
    scopes,
    use_count,
)
from onnxopt.rewrite import Builder

_Array = np.ndarray[Any, Any]

_MOST_TERMS = 64

_PER_CHANNEL_OPSET = 9
"""BatchNormalization is per channel from this opset on; before, it may be per element or in training mode."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeBranches(GraphPass):
    """Merge Convs on the same input whose results are added up into one Conv.

    Smaller kernels are put into the largest one where their padding says; a BatchNormalization of the input, or the
    input itself, counts as a kernel of one element. That is what networks such as RepVGG and MobileOne become before
    they are deployed, unless their exporter forgot (Ding et al. 2021, https://arxiv.org/abs/2101.03697). Weights are
    added up in float64 and rounded once.
    """

    name: ClassVar[str] = "merge-branches"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per input of a sum that several Convs read."""
        names = functools.cache(lambda: Names(model))
        for scope in scopes(model):
            for node in scope.graph:
                if not is_op(node, "Add") or _is_inner(node):
                    continue
                terms = _terms(node)
                for source in _sources(terms):
                    site = Site(self.name, scope.path, first_output(node))
                    merged = _merged(source, terms, scope.opset)
                    if isinstance(merged, str):
                        yield Refusal(site, merged)
                    elif merged is not None:
                        apply = functools.partial(_apply, scope, names, node, merged)
                        yield Edit(site, f"{len(merged.taken)} branches of {source.name} as one Conv", apply)
                        break  # another source of the same sum is seen in the next round


def _is_inner(node: ir.Node) -> bool:
    """Whether the only thing that becomes of a sum is that more is added."""
    user = only_use(node.outputs[0])
    return user is not None and is_op(user, "Add") and user.graph is node.graph


def _terms(root: ir.Node) -> list[ir.Value]:
    """Return what is added up, through sums that nothing else uses."""
    found: list[ir.Value] = []
    pending = [value for value in reversed(root.inputs) if value is not None]
    while pending and len(found) < _MOST_TERMS:
        value = pending.pop()
        node = value.producer()
        if node is not None and is_op(node, "Add") and node.graph is root.graph and only_use(value) is not None:
            pending += [v for v in reversed(node.inputs) if v is not None]
        else:
            found.append(value)
    return [*found, *pending]


def _sources(terms: Sequence[ir.Value]) -> list[ir.Value]:
    """Return the inputs of the Convs among the terms, each once."""
    convs = [v.producer() for v in terms if is_op(v.producer(), "Conv")]
    return list(dict.fromkeys(v for v in (conv.inputs[0] for conv in convs if conv is not None) if v is not None))


@dataclasses.dataclass(frozen=True, slots=True)
class _Branch:
    """One term as a convolution.

    Attributes:
        value: The term.
        weight: Output channels x input channels of a group x kernel.
        bias: Per output channel.
        begin: Padding in front, per spatial axis.
        end: Padding behind.
    """

    value: ir.Value
    weight: _Array
    bias: _Array
    begin: tuple[int, ...]
    end: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Merged:
    """What takes the place of several terms.

    Attributes:
        source: Their input.
        conv: The Conv whose attributes the joint one has, but for kernel and padding.
        taken: The terms.
        rest: The other terms of the sum.
        weight: The joint weight.
        bias: The joint bias.
        pads: The joint padding.
    """

    source: ir.Value
    conv: ir.Node
    taken: tuple[ir.Value, ...]
    rest: tuple[ir.Value, ...]
    weight: _Array
    bias: _Array
    pads: tuple[int, ...]


def _merged(source: ir.Value, terms: Sequence[ir.Value], opset: int) -> _Merged | str | None:
    """Return the Conv that the branches of an input are together, why there is none, or None without branches."""
    convs = [v for v in terms if _reads(v, source, "Conv")]
    per_channel = opset >= _PER_CHANNEL_OPSET
    others = [v for v in terms if v is source or (per_channel and _reads(v, source, "BatchNormalization"))]
    first = convs[0].producer()
    if len(convs) + len(others) < 2 or first is None:
        return None
    branches = [_conv(v, first) for v in convs]
    known = [b for b in branches if isinstance(b, _Branch)]
    if len(known) < len(branches):
        return next(b for b in branches if isinstance(b, str))
    units = [_unit(v, known[0], first) for v in others] if _keeps_sizes(known[0], first) else []
    known += [b for b in units if b is not None]
    if len(known) < 2:
        return None
    return _sum(source, first, known, terms)


def _reads(value: ir.Value, source: ir.Value, op_type: str) -> bool:
    node = value.producer()
    return node is not None and is_op(node, op_type) and node.inputs[0] is source


def _conv(value: ir.Value, first: ir.Node) -> _Branch | str:
    """Read a Conv that can be merged with another one."""
    node = value.producer()
    assert node is not None
    if has_references(node) or node.graph is not first.graph or only_use(value) is None:
        return "a branch is used elsewhere, too"
    weight, bias = constant_array(node.inputs[1]), _bias(node)
    if weight is None or bias is None or weight.ndim < 3:
        return "the weight or bias of a branch is not constant"
    if node.inputs[1] is None or use_count(node.inputs[1]) != 1:
        return "the weight of a branch is used elsewhere, too"
    if attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "the padding of a branch depends on the size of the image"
    axes = weight.ndim - 2
    other = constant_array(first.inputs[1])
    same = [(attribute(n, "group", 1), _per_axis(n, "strides", axes), _dilations(n)) for n in (node, first)]
    if other is None or weight.dtype != other.dtype or same[0] != same[1] or bias.shape != weight.shape[:1]:
        return "the branches differ in groups, strides, dilations, channels or type"
    pads = _per_axis(node, "pads", 2 * axes, 0)
    return _Branch(value, weight, bias, pads[:axes], pads[axes:])


def _bias(conv: ir.Node) -> _Array | None:
    if len(conv.inputs) < 3 or conv.inputs[2] is None:
        weight = constant_array(conv.inputs[1])
        return None if weight is None else np.zeros(weight.shape[0], weight.dtype)
    return constant_array(conv.inputs[2])


def _per_axis(conv: ir.Node, name: str, axes: int, usual: int = 1) -> tuple[int, ...]:
    return tuple(attribute(conv, name, None) or (usual,) * axes)


def _dilations(conv: ir.Node) -> tuple[int, ...]:
    """Return the dilations along axes where the kernel has more than one element; 1 elsewhere says the same."""
    weight = constant_array(conv.inputs[1])
    kernel = () if weight is None else weight.shape[2:]
    given = _per_axis(conv, "dilations", len(kernel))
    return tuple(d for d, k in zip(given, kernel, strict=True) if k > 1 and d != 1)


def _keeps_sizes(branch: _Branch, conv: ir.Node) -> bool:
    """Whether a Conv gives as many channels and pixels as it gets."""
    group, kernel = attribute(conv, "group", 1), branch.weight.shape[2:]
    stays = all(b + e == k - 1 for b, e, k in zip(branch.begin, branch.end, kernel, strict=True))
    strides = _per_axis(conv, "strides", len(kernel))
    return branch.weight.shape[0] == branch.weight.shape[1] * group and stays and set(strides) == {1}


def _unit(value: ir.Value, like: _Branch, conv: ir.Node) -> _Branch | None:
    """Read the input itself, or its normalization, as a convolution by one element."""
    node = value.producer()
    channels, width = like.weight.shape[:2]
    scale, shift = np.ones(channels), np.zeros(channels)
    if value is not conv.inputs[0]:
        assert node is not None
        training = attribute(node, "training_mode", 0) or any(o.name for o in node.outputs[1:])
        if training or has_references(node) or only_use(value) is None:
            return None
        parameters = [constant_array(v) for v in node.inputs[1:5]]
        known = [p.astype(np.float64) for p in parameters if p is not None and p.shape == (channels,)]
        if len(known) < 4 or not (known[3] + attribute(node, "epsilon", 1e-5) > 0).all():
            return None
        scale = known[0] / np.sqrt(known[3] + attribute(node, "epsilon", 1e-5))
        shift = known[1] - known[2] * scale
    weight = np.zeros((channels, width, *[1] * (like.weight.ndim - 2)))
    weight[np.arange(channels), np.arange(channels) % width] = scale.reshape(-1, *[1] * (like.weight.ndim - 2))
    none = (0,) * (like.weight.ndim - 2)
    return _Branch(value, weight, shift, none, none)


def _sum(source: ir.Value, conv: ir.Node, branches: Sequence[_Branch], terms: Sequence[ir.Value]) -> _Merged | str:
    """Put all kernels into one, each where its padding says."""
    kernels = np.array([b.weight.shape[2:] for b in branches])
    begins, ends = np.array([b.begin for b in branches]), np.array([b.end for b in branches])
    if len(np.unique(begins + ends - kernels, axis=0)) > 1 or len({b.weight.shape[:2] for b in branches}) > 1:
        return "the results of the branches are not of the same shape"
    begin, size = begins.max(0), begins.max(0) + (kernels - begins).max(0)
    if not (kernels == size).all(1).any():
        return "the joint kernel would be larger than each"
    if _dilations(conv) and not (kernels == size).all():
        return "the branches differ in groups, strides, dilations, channels or type"
    dtype = branches[0].weight.dtype  # the first is a Conv
    weight = np.zeros((*branches[0].weight.shape[:2], *size))
    for branch, kernel, before in zip(branches, kernels, begin - begins, strict=True):
        weight[(..., *(slice(b, b + k) for b, k in zip(before, kernel, strict=True)))] += branch.weight
    bias = np.sum([b.bias for b in branches], 0, dtype=np.float64)
    with np.errstate(over="ignore"):
        rounded = weight.astype(dtype), bias.astype(dtype)
    if not all(np.isfinite(a).all() for a in rounded):
        return "the joint weight or bias does not fit into the element type"
    taken = tuple(b.value for b in branches)
    end = begins[0] + ends[0] - kernels[0] + size - begin  # so that the sizes of the result stay
    pads = tuple(int(p) for p in (*begin, *end))
    return _Merged(source, conv, taken, _without(terms, taken), *rounded, pads)


def _without(terms: Sequence[ir.Value], taken: Sequence[ir.Value]) -> tuple[ir.Value, ...]:
    rest = list(terms)
    for value in taken:
        rest.pop(next(i for i, v in enumerate(rest) if v is value))
    return tuple(rest)


def _apply(scope: Scope, names: Any, root: ir.Node, merged: _Merged) -> None:
    builder = Builder(scope, names(), root, f"{first_output(root)}/merged")
    attributes = {
        n: a.value for n, a in merged.conv.attributes.items() if n not in ("pads", "kernel_shape", "auto_pad")
    }
    attributes |= {"pads": list(merged.pads), "kernel_shape": list(merged.weight.shape[2:])}
    weight, bias = builder.constant("weight", merged.weight), builder.constant("bias", merged.bias)
    value = builder.op("Conv", [merged.source, weight, bias], attributes)
    for other in merged.rest:
        value = builder.op("Add", [value, other])
    replace_value(root.outputs[0], value)
    remove_unused(root)
