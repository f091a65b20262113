"""How channels and hidden units go through convolutions, pooling, normalization and recurrent layers."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from onnxopt.coupling.builder import Builder, Opaque, label
from onnxopt.coupling.rewrites import SetCount
from onnxopt.coupling.rules import Rule, elementwise, gemm, operand, unary
from onnxopt.graph import attribute, constant_array

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def conv(builder: Builder, node: ir.Node) -> None:
    """Output channels go with rows of the weight; input channels are summed up along, within their group."""
    convolve(builder, node, 1, 2)
    if len(node.inputs) > 3 and node.inputs[3] is not None:  # what FusedConv adds
        builder.broadcast(node.inputs[3], node.outputs[0])


def convolve(builder: Builder, node: ir.Node, kernel: int, bias: int, zeros: int | None = None) -> None:
    """Follow indexes through a convolution of the first input.

    Args:
        builder: Where to.
        node: The node.
        kernel: Which input is the weight.
        bias: Which one is the bias.
        zeros: The input that holds what stands for zero in the weight, where zero does not.
    """
    data, weight, output = operand(node, 0), operand(node, kernel), node.outputs[0]
    groups = attribute(node, "group", 1)
    transposed = node.op_type == "ConvTranspose"
    own_out, own_in = (1, 0) if transposed else (0, 1)
    zero = None if zeros is None else (zeros, own_out)
    builder.tie(data, 0, output, 0)
    _freeze_places(builder, node, data, output, weight)
    sources, results = builder.known_ids(data, 1), builder.known_ids(output, 1)
    if (added := _optional(node, bias)) is not None:
        builder.tie(added, 0, output, 1)
    if groups == 1:
        builder.tie(data, 1, weight, own_in)
        builder.tie(output, 1, weight, own_out)
        builder.sink(node, kernel, own_in, (0, 1), zero=zero)
        return
    rows = builder.known_ids(weight, 0)
    if groups == len(sources):  # depthwise: each channel makes its own ones
        builder.link(results.reshape(groups, -1), sources[:, None])
        builder.rewrites.append(SetCount(node, (data,), "group", 1))
        builder.link(rows, sources if transposed else results)
        builder.freeze(weight, 1, f"{label(node)} is depthwise")
        return
    # Groups keep equal sizes: what goes in one goes at the same place in each.
    inside, outside = builder.known_ids(weight, own_in), builder.known_ids(weight, own_out)
    if transposed:
        builder.link(sources, inside)
        builder.link(inside.reshape(groups, -1), inside[None, : len(inside) // groups])
        builder.link(results.reshape(groups, -1), outside[None])
    else:
        builder.link(sources.reshape(groups, -1), inside[None])
        builder.link(results, outside)
        builder.link(outside.reshape(groups, -1), outside[None, : len(outside) // groups])
    builder.sink(node, kernel, own_in, (0, 1), zero=zero)


def _freeze_places(builder: Builder, node: ir.Node, data: ir.Value, output: ir.Value, weight: ir.Value | None) -> None:
    for value in (data, output, weight):
        if value is not None:
            for axis in range(2, len(builder.shape(value))):
                builder.freeze(value, axis, f"{label(node)} moves a window along it")


def per_channel(builder: Builder, node: ir.Node) -> None:
    """Pooling and normalization with statistics per channel: each channel on its own, places mixed."""
    if len([o for o in node.outputs if o.name]) > 1:
        raise Opaque("it has several outputs")
    data, output = operand(node, 0), node.outputs[0]
    builder.tie(data, 0, output, 0)
    builder.tie(data, 1, output, 1)
    _freeze_places(builder, node, data, output, None)
    if node.op_type in ("InstanceNormalization", "BatchNormalization"):
        for value in node.inputs[1:]:
            if value is not None:
                builder.tie(value, 0, data, 1)


def pool_last(builder: Builder, node: ir.Node) -> None:
    """Pooling where the channels come last."""
    data, output = operand(node, 0), node.outputs[0]
    last = len(builder.shape(data)) - 1
    builder.tie(data, 0, output, 0)
    builder.tie(data, last, output, last)
    for value in (data, output):
        for axis in range(1, last):
            builder.freeze(value, axis, f"{label(node)} moves a window along it")


def batch_norm(builder: Builder, node: ir.Node) -> None:
    """One number per channel each."""
    if len([o for o in node.outputs if o.name]) > 1 or attribute(node, "training_mode", 0):
        raise Opaque("it is in training mode")
    data = operand(node, 0)
    if len(builder.shape(data)) < 2:
        raise Opaque("it has no channels")
    builder.same(data, node.outputs[0])
    for value in node.inputs[1:]:
        if value is not None:
            builder.tie(value, 0, data, 1)


def layer_norm(builder: Builder, node: ir.Node) -> None:
    """Everything behind an axis is normalized together."""
    data, output = operand(node, 0), node.outputs[0]
    rank = len(builder.shape(data))
    first = attribute(node, "axis", -1) % rank
    builder.same(data, output, but=range(first, rank))
    for value in (data, output, *node.inputs[1:]):
        if value is None:
            continue
        own = len(builder.shape(value))
        for axis in range(max(0, own - (rank - first)), own):
            builder.freeze(value, axis, f"{label(node)} normalizes along it")
    for statistic in node.outputs[1:]:
        if statistic.name:
            builder.broadcast(statistic, data)
    for value in node.inputs[1:]:
        if value is not None:
            builder.broadcast(value, output)


def group_norm(builder: Builder, node: ir.Node) -> None:
    """Groups of channels, each normalized together, go out whole."""
    data, output = operand(node, 0), node.outputs[0]
    groups = attribute(node, "num_groups", 1)
    channels = builder.known_ids(data, 1)
    builder.same(data, output, but=range(2, len(builder.shape(data))))
    _freeze_places(builder, node, data, output, None)
    grouped = channels.reshape(groups, -1)
    builder.link(grouped, grouped[:, :1])
    for value in node.inputs[1:]:
        if value is not None:
            ids = builder.known_ids(value, 0)
            builder.link(ids, channels if len(ids) == len(channels) else grouped[:, 0])
    builder.rewrites.append(SetCount(node, (data,), "num_groups", 1, len(channels) // groups))


def recurrent(builder: Builder, node: ir.Node) -> None:
    """Hidden units: the same places of all gates, of the state and of the outputs."""
    data, weight, inner = operand(node, 0), operand(node, 1), operand(node, 2)
    gates = _GATES[node.op_type]
    if attribute(node, "layout", 0) or (node.op_type == "LSTM" and attribute(node, "input_forget", 0)):
        raise Opaque("it has an unusual layout")
    builder.tie(data, 2, weight, 2)
    builder.known_ids(weight, 1)  # the weight, which comes first, gives the group its name
    units = builder.known_ids(inner, 2)
    builder.sink(node, 1, 2, (0, 2))
    builder.sink(node, 2, 2, later=(0, 3))
    per_unit = [(weight, 1, gates), (inner, 1, gates), (_optional(node, 3), 1, 2 * gates), (_optional(node, 7), 1, 3)]
    per_unit += [(_optional(node, index), 2, 1) for index in (5, 6)]
    per_unit += [(output if output.name else None, -1, 1) for output in node.outputs]
    for value, axis, times in per_unit:
        if value is not None:
            axis %= len(builder.shape(value))
            builder.link(builder.known_ids(value, axis).reshape(times, -1), units[None])
    for value in (data, weight, inner, *node.inputs[3:], *node.outputs):
        if value is not None and value.name:
            held = (1, 2) if value in (weight, inner) else (2,) if value is data else _unit_axes(builder, value)
            for axis in set(range(len(builder.shape(value)))) - set(held):
                builder.freeze(value, axis, f"{label(node)} steps along it or keeps it fixed")
    builder.rewrites.append(SetCount(node, (inner,), "hidden_size", 2))


def _unit_axes(builder: Builder, value: ir.Value) -> tuple[int, ...]:
    rank = len(builder.shape(value))
    return (rank - 1,) if rank > 1 else ()


def _optional(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def sample(builder: Builder, node: ir.Node) -> None:
    """Places are picked for all channels alike."""
    data, output = operand(node, 0), node.outputs[0]
    builder.tie(data, 1, output, 1)
    for value in node.inputs[1:]:
        if value is not None:
            builder.freeze_all(value, f"{label(node)} picks places by it")
    builder.freeze(data, 0, f"{label(node)} picks places in it")
    _freeze_places(builder, node, data, output, None)


def fused_conv(builder: Builder, node: ir.Node) -> None:
    """A convolution with a sum and an activation."""
    conv(builder, node)


def bias_activation(builder: Builder, node: ir.Node) -> None:
    """An activation of the sum with a bias."""
    elementwise(builder, node)


def skip_layer_norm(builder: Builder, node: ir.Node) -> None:
    """Normalization along the last axis of a sum."""
    last = len(builder.shape(operand(node, 0))) - 1
    for value in (*node.inputs, *node.outputs):
        if value is None or not value.name:
            continue
        rank = len(builder.shape(value))
        builder.freeze(value, rank - 1, f"{label(node)} normalizes along it")
        if rank > 1 and value is not node.outputs[0]:
            builder.broadcast(value, node.outputs[0], last=1)
    if last < 1:
        raise Opaque("its input has one axis")


def fused_matmul(builder: Builder, node: ir.Node) -> None:
    """A MatMul of two matrices, one of which may be transposed."""
    left, right, output = operand(node, 0), operand(node, 1), node.outputs[0]
    if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        raise Opaque("its batches are transposed")
    a, b, rank = len(builder.shape(left)), len(builder.shape(right)), len(builder.shape(output))
    if min(a, b) < 2:
        raise Opaque("an operand has one axis")
    inner = (a - (2 if attribute(node, "transA", 0) else 1), b - (1 if attribute(node, "transB", 0) else 2))
    builder.tie(left, inner[0], right, inner[1])
    builder.tie(left, 2 * a - 3 - inner[0], output, rank - 2)
    builder.tie(right, 2 * b - 3 - inner[1], output, rank - 1)
    for value in (left, right):
        builder.broadcast(value, output, last=2)
    index = 0 if constant_array(left) is not None and constant_array(right) is None else 1
    builder.sink(node, index, inner[index], (1 - index, inner[1 - index]))


RULES: Mapping[str, Rule] = {
    "Conv": conv,
    "ConvTranspose": conv,
    **dict.fromkeys(
        (
            "AveragePool",
            "GlobalAveragePool",
            "GlobalLpPool",
            "GlobalMaxPool",
            "InstanceNormalization",
            "LpPool",
            "MaxPool",
        ),
        per_channel,
    ),
    "BatchNormalization": batch_norm,
    "LayerNormalization": layer_norm,
    "RMSNormalization": layer_norm,
    # ONNX Runtime reads the standard domain here too.
    "SimplifiedLayerNormalization": layer_norm,
    "GroupNormalization": group_norm,
    **dict.fromkeys(_GATES, recurrent),
    "GridSample": sample,
}
"""Standard operators of neural networks."""

MICROSOFT: Mapping[str, Rule] = {
    "FusedConv": fused_conv,
    "FusedGemm": gemm,
    "NhwcMaxPool": pool_last,
    "FusedMatMul": fused_matmul,
    "BiasGelu": bias_activation,
    "FastGelu": bias_activation,
    "Gelu": unary,
    "QuickGelu": unary,
    "SkipLayerNormalization": skip_layer_norm,
    "SkipSimplifiedLayerNormalization": skip_layer_norm,
    "SimplifiedLayerNormalization": layer_norm,
}
"""Operators of ONNX Runtime."""
