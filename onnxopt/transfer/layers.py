"""Which operators are layers: what of their operands is data and what are parameters, in one form for all spellings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping

import numpy as np
import onnx_ir as ir

from onnxopt.graph import attribute, is_op
from onnxopt.transfer.quantized import Packed
from onnxopt.transfer.skeleton import Member, Operand
from onnxopt.transfer.tensors import Filled, Tensor, chain, permuted, reshaped
from onnxopt.transfer.trace import Tracer


@dataclasses.dataclass
class Layer:
    """What a node computes from data and parameters.

    Attributes:
        kind: "linear", "conv", "affine" or "embedding".
        weight: Matrix (contraction, channels), kernel or table.
        members: What follows within the node.
        operands: Indexes of the inputs that are parameters.
        data: Indexes of the inputs that are not.
        channels: The axis of the weight that has an index per channel.
        from_end: Where the channels are in the output, counted from its last axis (-1).
        attributes: What else must be equal for two to correspond.
        adds: Index of an input that is added to the result.
        activated: Whether a nonlinearity follows within the node.
        gain: By what the result is multiplied.
        packed: Whether the weight holds those of query, key and value, and attention follows within the node.
    """

    kind: str
    weight: Tensor | None
    members: list[Member]
    operands: tuple[int, ...]
    data: tuple[int, ...] = (0,)
    channels: int = 0
    from_end: int = -1
    attributes: tuple[object, ...] = ()
    adds: int | None = None
    activated: bool = False
    gain: float = 1.0
    packed: bool = False


def read_layer(node: ir.Node, tracer: Tracer, absorbed: Collection[Operand]) -> Layer | None:
    """Return a node as a layer, or None when it is none, or belongs to the layer before it."""
    reader = LAYERS.get((node.domain if node.domain != "ai.onnx" else "", node.op_type))
    if reader is None:
        return None
    # What the layer before takes of SkipLayerNormalization is a bias; its scale is its own.
    taken = any((node, i) in absorbed for i in range(len(node.inputs)))
    return None if taken and not node.op_type.startswith("Skip") else reader(node, tracer)


def vector(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor with one axis that is longer than 1 as a vector."""
    if tensor is None or sum(n != 1 for n in tensor.shape) > 1:
        return None
    return reshaped(tensor, (int(np.prod(tensor.shape)),))


def place_from_end(shape: tuple[int, ...]) -> int | None:
    """Return the one axis that is longer than 1, counted from the last (-1); None when there are more."""
    long = [i for i, n in enumerate(shape) if n != 1]
    return long[0] - len(shape) if len(long) == 1 else None


def bias_of(tensor: Tensor | None) -> list[Member]:
    """Return a bias as members: none where it is absent or a computed zero."""
    found = vector(tensor)
    if found is None or any(isinstance(t, Filled) for t in chain(found)):
        return []
    return [Member("bias", (found,))]


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _matmul(node: ir.Node, tracer: Tracer) -> Layer | None:
    weight = tracer.parameter(_input(node, 1))
    if weight is None or len(weight.shape) != 2 or attribute(node, "transA", 0) or attribute(node, "transBatchB", 0):
        return None
    if attribute(node, "transB", 0):
        weight = permuted(weight, (1, 0))
    return Layer("linear", weight, [], (1,), channels=1, gain=float(attribute(node, "alpha", 1.0)))


def _gemm(node: ir.Node, tracer: Tracer) -> Layer | None:
    layer = _matmul(node, tracer)
    bias = tracer.tensor(_input(node, 2))
    if layer is None or (bias is None and _input(node, 2) is not None):
        return None
    members = bias_of(bias)
    if members and (layer.gain != 1 or attribute(node, "beta", 1.0) != 1):
        return None
    return dataclasses.replace(layer, members=members, operands=(1, 2) if members else (1,))


def _blocks(node: ir.Node, tracer: Tracer) -> Layer | None:
    codes, scale = tracer.tensor(_input(node, 1)), tracer.tensor(_input(node, 2))
    zero = tracer.tensor(_input(node, 3))
    bits, block = int(attribute(node, "bits", 4)), int(attribute(node, "block_size", 0))
    shape = int(attribute(node, "K", 0)), int(attribute(node, "N", 0))
    usable = codes is not None and scale is not None and (zero is not None or _input(node, 3) is None)
    if not usable or bits not in (2, 4, 8) or block < 1 or _input(node, 4) is not None:
        return None
    assert codes is not None
    assert scale is not None
    members = bias_of(tracer.parameter(_input(node, 5)))
    return Layer("linear", Packed(codes, scale, zero, shape, bits, block), members, (1, 2, 3, 5), channels=1)


def _conv(node: ir.Node, tracer: Tracer) -> Layer | None:
    weight, bias = tracer.parameter(_input(node, 1)), tracer.tensor(_input(node, 2))
    if weight is None or len(weight.shape) < 3 or (bias is None and _input(node, 2) is not None):
        return None
    members = bias_of(bias)
    group, spatial = int(attribute(node, "group", 1)), len(weight.shape) - 2
    attributes = (
        node.op_type == "ConvTranspose",
        group,
        tuple(attribute(node, "strides", (1,) * spatial)),
        tuple(attribute(node, "dilations", (1,) * spatial)),
    )
    return Layer(
        "conv",
        weight,
        members,
        (1, 2) if members else (1,),
        channels=1 if node.op_type == "ConvTranspose" else 0,
        from_end=-1 - spatial,
        attributes=attributes,
        adds=3 if _input(node, 3) is not None else None,
        activated=bool(attribute(node, "activation", "")),
    )


def _norm(scale: int, bias: int, data: tuple[int, ...] = (0,)) -> Callable[[ir.Node, Tracer], Layer | None]:
    def read(node: ir.Node, tracer: Tracer) -> Layer | None:
        factor = vector(tracer.parameter(_input(node, scale)))
        if factor is None:
            return None
        members = [Member("scale", (factor,)), *bias_of(tracer.parameter(_input(node, bias)) if bias else None)]
        return Layer("affine", None, members, (scale, bias) if len(members) > 1 else (scale,), data)

    return read


def _batch_norm(node: ir.Node, tracer: Tracer) -> Layer | None:
    member = norm_member(node, tracer)
    return None if member is None else Layer("affine", None, [member], (1, 2, 3, 4))


def norm_member(node: ir.Node, tracer: Tracer) -> Member | None:
    """Return a BatchNormalization as what it does to channels; None in training mode."""
    parts = [vector(tracer.tensor(_input(node, i))) for i in range(1, 5)]
    known = tuple(p for p in parts if p is not None)
    if len(known) < 4 or attribute(node, "training_mode", 0):
        return None
    return Member("norm", known, float(attribute(node, "epsilon", 1e-5)))


def _channelwise(node: ir.Node, tracer: Tracer) -> Layer | None:
    if all(tracer.is_constant(v) for v in node.inputs):
        return None
    for index in (1, 0):
        tensor, other = tracer.parameter(_input(node, index)), _input(node, 1 - index)
        part = vector(tensor)
        if tensor is None or part is None or tracer.tensor(other) is not None:
            continue
        place = place_from_end(tensor.shape)
        member = Member("scale" if is_op(node, "Mul") else "bias", (part,))
        return Layer("affine", None, [member], (index,), (1 - index,), from_end=place or -1)
    return None


def _embedding(node: ir.Node, tracer: Tracer) -> Layer | None:
    table = tracer.parameter(_input(node, 0))
    if table is None or len(table.shape) < 2 or tracer.tensor(node.outputs[0]) is not None:
        return None
    if attribute(node, "axis", 0) not in (0, -len(table.shape)):
        return None
    return Layer("embedding", table, [], (0,), (1,), channels=len(table.shape) - 1)


def _window(node: ir.Node, tracer: Tracer) -> Layer | None:
    """Read a Slice of a table whose bounds are computed: positions without an index."""
    table = tracer.parameter(_input(node, 0))
    if table is None or len(table.shape) < 2 or tracer.tensor(node.outputs[0]) is not None:
        return None
    while table.shape[0] == 1 and len(table.shape) > 2:
        table = reshaped(table, table.shape[1:])
    return Layer("embedding", table, [], (0,), (), channels=len(table.shape) - 1)


def _block_table(node: ir.Node, tracer: Tracer) -> Layer | None:
    codes, scale, zero = (tracer.tensor(_input(node, i)) for i in (0, 2, 3))
    bits, block = int(attribute(node, "bits", 4)), int(attribute(node, "block_size", 128))
    if codes is None or scale is None or (zero is None and _input(node, 3) is not None):
        return None
    operand = _input(node, 0)
    if operand is None or tracer.shapes.dtype(operand) != ir.DataType.UINT8 or len(codes.shape) != 2:
        return None
    columns = codes.shape[1] * 8 // bits
    table = permuted(Packed(codes, scale, zero, (columns, codes.shape[0]), bits, block), (1, 0))
    return Layer("embedding", table, [], (0, 2, 3), (1,), channels=1)


def _attention(node: ir.Node, tracer: Tracer) -> Layer | None:
    layer = _matmul(node, tracer)
    if layer is None or int(attribute(node, "do_rotary", 0)):
        return None
    members = bias_of(tracer.parameter(_input(node, 2)))
    return dataclasses.replace(layer, members=members, operands=(1, 2) if members else (1,), packed=True, gain=1.0)


_MS = "com.microsoft"
LAYERS: Mapping[tuple[str, str], Callable[[ir.Node, Tracer], Layer | None]] = {
    ("", "MatMul"): _matmul,
    (_MS, "FusedMatMul"): _matmul,
    ("", "Gemm"): _gemm,
    (_MS, "MatMulNBits"): _blocks,
    ("", "Conv"): _conv,
    ("", "ConvTranspose"): _conv,
    (_MS, "FusedConv"): _conv,
    (_MS, "NhwcFusedConv"): _conv,
    ("", "LayerNormalization"): _norm(1, 2),
    ("", "RMSNormalization"): _norm(1, 0),
    ("", "SimplifiedLayerNormalization"): _norm(1, 0),
    ("", "InstanceNormalization"): _norm(1, 2),
    ("", "GroupNormalization"): _norm(1, 2),
    (_MS, "GroupNorm"): _norm(1, 2),
    (_MS, "SkipLayerNormalization"): _norm(2, 3, (0, 1)),
    (_MS, "SkipSimplifiedLayerNormalization"): _norm(2, 0, (0, 1)),
    ("", "BatchNormalization"): _batch_norm,
    ("", "Mul"): _channelwise,
    ("", "Add"): _channelwise,
    ("", "Gather"): _embedding,
    ("", "Slice"): _window,
    (_MS, "GatherBlockQuantized"): _block_table,
    (_MS, "Attention"): _attention,
}
