"""What belongs to a layer beyond its operator: the bias, scale and BatchNormalization that follow it."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnxopt.graph import is_op, only_use
from onnxopt.transfer.layers import Layer, norm_member, vector
from onnxopt.transfer.skeleton import Member, Operand
from onnxopt.transfer.tensors import Sliced, fixed_shape
from onnxopt.transfer.trace import Tracer

_SKIP_BIAS = {"SkipLayerNormalization": 4, "SkipSimplifiedLayerNormalization": 3}
_GELU_BIAS = ("BiasGelu", "FastGelu")


@dataclasses.dataclass
class Chain:
    """What follows a layer.

    Attributes:
        end: The last value of the chain.
        members: All members of the layer, its own and those that follow.
        absorbed: Inputs of later nodes that belong to the layer.
        complete: Whether the last value is what the layer computes, with all its members and nothing else.
    """

    end: ir.Value
    members: list[Member]
    absorbed: list[Operand]
    complete: bool = True


def follow(node: ir.Node, layer: Layer, tracer: Tracer) -> Chain:
    """Collect what follows a layer and treats its channels one by one."""
    chain = Chain(node.outputs[0], list(layer.members), [])
    if layer.activated or layer.adds is not None or layer.packed or layer.kind == "embedding":
        chain.complete = layer.kind == "embedding"
        return chain
    width = layer.weight.shape[layer.channels] if layer.weight is not None else layer.members[0].parts[0].shape[0]
    if layer.kind == "conv" and layer.channels == 1:
        width *= int(str(layer.attributes[1]))
    going = True
    while going:
        user = only_use(chain.end)
        going = user is not None and _step(chain, user, layer, width, tracer)
    return chain


def _step(chain: Chain, user: ir.Node, layer: Layer, width: int, tracer: Tracer) -> bool:
    """Take the next node in; return whether the chain may go on behind it."""
    index = next(i for i, v in enumerate(user.inputs) if v is chain.end)
    if is_op(user, "Identity", "Cast"):
        chain.end = user.outputs[0]
        return True
    if layer.kind == "linear" and is_op(user, "Reshape") and index == 0:
        shape = tracer.shapes.of(user.outputs[0])
        if not shape or shape[-1] != width:
            return False
        chain.end = user.outputs[0]
        return True
    if is_op(user, "Add", "Mul", "Sum"):
        return _vector_operand(chain, user, layer, width, tracer)
    if layer.kind == "affine":
        return False
    if is_op(user, "BatchNormalization") and index == 0:
        member = norm_member(user, tracer)
        if member is None or member.parts[0].shape != (width,):
            return False
        chain.members.append(member)
        chain.absorbed += [(user, i) for i in range(1, 5)]
        chain.end = user.outputs[0]
        return True
    _fused_bias(chain, user, index, width, tracer)
    return False


def _vector_operand(chain: Chain, user: ir.Node, layer: Layer, width: int, tracer: Tracer) -> bool:
    scaling = is_op(user, "Mul")
    if layer.kind == "affine" and (scaling or [m.kind for m in chain.members] != ["scale"]):
        return False
    for index, value in enumerate(user.inputs):
        tensor = None if value is chain.end else tracer.parameter(value)
        part = vector(tensor)
        if tensor is None or part is None or part.shape != (width,):
            continue
        place = next(i for i, n in enumerate(tensor.shape) if n == width) - len(tensor.shape)
        if place != layer.from_end:
            continue
        chain.members.append(Member("scale" if scaling else "bias", (part,)))
        chain.absorbed.append((user, index))
        if len(user.inputs) > 2:
            chain.complete = False
            return False
        chain.end = user.outputs[0]
        return True
    return False


def _fused_bias(chain: Chain, user: ir.Node, index: int, width: int, tracer: Tracer) -> None:
    """Take the bias that a fused operator adds to what it takes."""
    place = _SKIP_BIAS.get(user.op_type, 1 if user.op_type in _GELU_BIAS else 3)
    if user.op_type in _SKIP_BIAS:
        fits = index in (0, 1)
    elif user.op_type in _GELU_BIAS:
        fits = index == 0
    else:
        fits = user.op_type == "MultiHeadAttention" and index < 3
    bias = vector(tracer.parameter(user.inputs[place])) if fits and place < len(user.inputs) else None
    if bias is None or (user, place) in chain.absorbed:
        return
    if user.op_type == "MultiHeadAttention":
        before = [fixed_width(v, tracer) for v in user.inputs[:index]]
        if None in before:
            return
        start = sum(n for n in before if n is not None)
        bias = Sliced(bias, 0, start, start + width)
    if bias.shape == (width,):
        chain.members.append(Member("bias", (bias,)))
        chain.absorbed.append((user, place))
        chain.complete = False


def fixed_width(value: ir.Value | None, tracer: Tracer) -> int | None:
    """Return the size of the last axis, when it is a known number."""
    if value is None:
        return None
    fixed = fixed_shape(value, tracer.shapes)
    shape = fixed or tracer.shapes.of(value)
    return shape[-1] if shape and isinstance(shape[-1], int) else None
