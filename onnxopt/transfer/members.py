"""What belongs to a layer beyond its operator: the bias, scale and BatchNormalization that follow it."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from onnxopt.graph import attribute, constant_ints, is_op, only_use
from onnxopt.transfer.layers import Layer, norm_member, place_from_end, vector
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
        from_end: Where the channels are in the last value, counted from its last axis (-1).
        onward: Scale and shift that the piecewise linear activation behind it begins with; see `_onward`.
        complete: Whether the last value is what the layer computes, with all its members and nothing else.
    """

    end: ir.Value
    members: list[Member]
    absorbed: list[Operand]
    from_end: int = -1
    onward: tuple[float, float] = (1.0, 0.0)
    complete: bool = True


def follow(node: ir.Node, layer: Layer, tracer: Tracer) -> Chain:
    """Collect what follows a layer and treats its channels one by one."""
    chain = Chain(node.outputs[0], list(layer.members), [], layer.from_end)
    if layer.activated and layer.adds is None:
        chain.onward = _fused_onward(node)
    if layer.activated or layer.adds is not None or layer.packed or layer.kind == "embedding":
        chain.complete = layer.kind == "embedding"
        return chain
    width = layer.weight.shape[layer.channels] if layer.weight is not None else layer.members[0].parts[0].shape[0]
    if layer.kind == "conv" and layer.channels == 1:
        width *= int(str(layer.attributes[1]))
    going, user = True, None
    while going:
        user = only_use(chain.end)
        going = user is not None and _step(chain, user, layer, width, tracer)
    if layer.kind != "affine" and user is not None:
        chain.onward = _onward(user, chain.end, tracer)
    return chain


def _onward(user: ir.Node, value: ir.Value, tracer: Tracer) -> tuple[float, float]:
    """Return what a piecewise linear activation does before it clips from 0.

    HardSigmoid is Clip(alpha * x + beta, 0, 1), and Clip(x, low, high) is low + Clip(x - low, 0, high - low):
    optimizers put such scales and shifts, and those of 1 + HardSigmoid(x), into the layer before. Quantizers write the
    product and the sum as such.
    """
    scale, shift, lowest = 1.0, 0.0, -np.inf
    current: ir.Node | None = user
    while current is not None and is_op(current, "Mul", "Add", "Relu"):
        if is_op(current, "Relu"):
            lowest = max(lowest, 0.0)
        else:
            number = tracer.number(current.inputs[1 if current.inputs[0] is value else 0])
            if number is None or (is_op(current, "Mul") and number <= 0):
                return 1.0, 0.0
            if is_op(current, "Mul"):
                scale, shift, lowest = scale * number, shift * number, lowest * number
            else:
                shift, lowest = shift + number, lowest + number
        value = current.outputs[0]
        current = only_use(value)
    if current is None:
        return 1.0, 0.0
    low = 0.0
    if is_op(current, "HardSigmoid"):
        alpha, beta = float(attribute(current, "alpha", 0.2)), float(attribute(current, "beta", 0.5))
        scale, shift, lowest = alpha * scale, alpha * shift + beta, alpha * lowest + beta
    elif is_op(current, "Clip") and current.inputs[0] is value and len(current.inputs) > 1:
        low = tracer.number(current.inputs[1]) or 0.0
    else:
        return 1.0, 0.0
    # What ends above the low end of the activation has an end of its own.
    return (scale, shift - low) if lowest <= low else (1.0, 0.0)


def _fused_onward(node: ir.Node) -> tuple[float, float]:
    activation, numbers = attribute(node, "activation", ""), attribute(node, "activation_params", ())
    if activation == "HardSigmoid" and len(numbers) == 2:
        return float(numbers[0]), float(numbers[1])
    return (1.0, -float(numbers[0])) if activation == "Clip" and len(numbers) == 2 else (1.0, 0.0)


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
    if layer.kind == "conv" and is_op(user, "Squeeze", "Transpose", "Slice") and index == 0:
        place = _moved_axis(user, chain, width, tracer)
        if place is None:
            return False
        chain.end, chain.from_end = user.outputs[0], place
        return True
    if is_op(user, "Add", "Mul", "Sum"):
        return _vector_operand(chain, user, layer, width, tracer)
    if layer.kind == "affine":
        return False
    if is_op(user, "BatchNormalization") and index == 0 and chain.from_end == layer.from_end:
        member = norm_member(user, tracer)
        if member is None or member.parts[0].shape != (width,):
            return False
        chain.members.append(member)
        chain.absorbed += [(user, i) for i in range(1, 5)]
        chain.end = user.outputs[0]
        return True
    _fused_bias(chain, user, index, width, tracer)
    return False


def _moved_axis(user: ir.Node, chain: Chain, width: int, tracer: Tracer) -> int | None:
    """Return where the channels are behind a node that moves axes, from the last; None where that is not known."""
    shape = tracer.shapes.of(user.outputs[0])
    rank = tracer.shapes.rank(chain.end)
    if rank is None or not shape:
        return None
    axis = rank + chain.from_end
    if is_op(user, "Transpose"):
        axis = attribute(user, "perm", tuple(reversed(range(rank)))).index(axis)
    elif is_op(user, "Squeeze"):
        given = attribute(user, "axes") or (constant_ints(user.inputs[1]) if len(user.inputs) > 1 else None)
        if given is None:
            return None
        axis -= sum(a % rank < axis for a in given)
    place = axis - len(shape)
    return int(place) if shape[place] == width else None


def _vector_operand(chain: Chain, user: ir.Node, layer: Layer, width: int, tracer: Tracer) -> bool:
    scaling = is_op(user, "Mul")
    if layer.kind == "affine" and (scaling or [m.kind for m in chain.members] != ["scale"]):
        return False
    for index, value in enumerate(user.inputs):
        tensor = None if value is chain.end else tracer.parameter(value)
        if width == 1 and not scaling and value is not chain.end:
            tensor = tracer.tensor(value)
        part = vector(tensor)
        if tensor is None or part is None or part.shape != (width,):
            continue
        place = chain.from_end if width == 1 else place_from_end(tensor.shape)
        if place != chain.from_end:
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
