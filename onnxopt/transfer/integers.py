"""Operators on integers, and what they are in real numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.graph import attribute, constant_array, is_op, only_use
from onnxopt.transfer.quantized import Dequantized, Product, along
from onnxopt.transfer.real import Sums
from onnxopt.transfer.site import At
from onnxopt.transfer.tensors import Store, reshaped

_MS = "com.microsoft"
_SAME_SCALE = 1e-3
_FACTORS = 4


def _quantize(at: At) -> None:
    value = at.input(0)
    if value is not None and at.conversion.tracer.shapes.dtype(value) in (ir.DataType.FLOAT, None):
        at.rounded(value, at.input(1), at.input(2), at.node.outputs[0])


def _quantize_dynamic(at: At) -> None:
    value, outputs = at.input(0), at.node.outputs
    assert value is not None
    at.conversion.floats[outputs[0]] = value
    at.conversion.scales[outputs[0]] = outputs[1]


def _dequantize(at: At) -> None:
    integers, out = at.input(0), at.node.outputs[0]
    if at.activation(integers) is not None:
        known = at.restored(integers, at.input(1), at.input(2))
        if known is not None:
            at.become(out, known)
        return
    if integers is None:
        return
    made = at.rows(integers, at.input(1), at.input(2))
    if at.node.domain == _MS:
        rank = len(integers.shape or ())
        axis = attribute(at.node, "axis", 1) % max(rank, 1)
        made = at.weight(integers, at.input(1), at.input(2), [-1 if i == axis else 1 for i in range(rank)])
    if made is not None:
        at.become(out, made)


def _conv(at: At) -> None:
    x, scale = at.activation(at.input(0)), at.input(4)
    kernel = at.input(3)
    rank = len(kernel.shape or ()) if kernel is not None else 0
    weight = at.weight(kernel, scale, at.input(5), (-1, *(1,) * (rank - 1)))
    if x is None or weight is None:
        return
    bias = _sums(at, at.input(8), at.input(1), scale)
    made = at.op("Conv", [x, weight, bias], at.attributes())
    at.stands_for(made, {1: 3, 2: 8})
    at.rounded(made, at.input(6), at.input(7), at.node.outputs[0])


def _sums(
    at: At, bias: ir.Value | None, first: ir.Value | None, second: ir.Value | None, times: float = 1.0
) -> ir.Value | None:
    """Return a bias in 32 bits in real numbers: a step of it is one of the input times one of the weight."""
    product = _product(at, first, second, times)
    return None if bias is None or product is None else at.weight(bias, product, None, (-1,))


def _product(at: At, first: ir.Value | None, second: ir.Value | None, times: float = 1.0) -> Product | None:
    one, two = at.conversion.tracer.tensor(first), at.conversion.tracer.tensor(second)
    if one is None or two is None or int(np.prod(one.shape)) != 1:
        return None
    size = int(np.prod(two.shape))
    return Product((reshaped(one, ()), reshaped(two, () if size == 1 else (size,))), times)


def _matmul(at: At) -> None:
    first, second = at.operand(0), at.activation(at.input(3))
    if second is None:
        second = at.weight(at.input(3), at.input(4), at.input(5), (1, -1))
    if first is None or second is None:
        return
    made = at.op("MatMul", [first, second])
    at.stands_for(made, {1: 3})
    at.rounded(made, at.input(6), at.input(7), at.node.outputs[0])


def _gemm(at: At) -> None:
    attributes, scale = at.attributes(), at.input(4)
    first = at.operand(0)
    second = at.weight(at.input(3), scale, at.input(5), (-1, 1) if attributes.get("transB") else (1, -1))
    if first is None or second is None:
        return
    bias = _sums(at, at.input(6), at.input(1), scale, float(attributes.get("alpha", 1.0)))
    made = at.op("Gemm", [first, second, bias], attributes)
    at.stands_for(made, {1: 3, 2: 6})
    if at.input(7) is None:
        at.become(at.node.outputs[0], made)
    else:
        at.rounded(made, at.input(7), at.input(8), at.node.outputs[0])


def _integer_product(at: At) -> None:
    """Read MatMulInteger or ConvInteger with what scales its sums as one layer."""
    integers, weight = at.input(0), at.input(1)
    x = at.activation(integers)
    if x is None or integers is None or weight is None:
        return
    other = at.activation(weight)
    needed = {at.conversion.scales[integers]} | ({at.conversion.scales[weight]} if other is not None else set())
    end, scale = _scaled(at.node.outputs[0], needed, other is None)
    if end is None:
        return
    conv = is_op(at.node, "ConvInteger")
    if other is None:
        rank = len(weight.shape or ())
        shape = (-1, *(1,) * (rank - 1)) if conv else (*(1,) * (rank - 1), -1)
        other = at.weight(weight, scale, at.input(3), shape)
    if other is None:
        return
    made = at.op("Conv" if conv else "MatMul", [x, other], at.attributes())
    at.become(end, made)


def _scaled(sums: ir.Value, needed: set[ir.Value], weight: bool) -> tuple[ir.Value | None, ir.Value | None]:
    """Return where sums have been multiplied by all scales, and that of the weight, if it has one.

    Args:
        sums: The sums of integers.
        needed: Scales of activations.
        weight: Whether there is one of a weight, too.
    """
    value, missing, scale = sums, set(needed), None
    while missing or (weight and scale is None):
        node = only_use(value)
        if node is None or not is_op(node, "Cast", "Mul"):
            return None, None
        if is_op(node, "Mul"):
            other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
            for factor in _factors(other):
                if factor in missing:
                    missing.discard(factor)
                elif weight and scale is None and constant_array(factor) is not None:
                    scale = factor
                else:
                    return None, None
        value = node.outputs[0]
    return value, scale


def _factors(value: ir.Value | None, depth: int = _FACTORS) -> list[ir.Value]:
    if value is None:
        return []
    node = value.producer()
    if node is None or depth == 0 or not is_op(node, "Mul", "Identity", "Reshape", "Unsqueeze", "Squeeze"):
        return [value]
    if is_op(node, "Mul"):
        return [f for v in node.inputs for f in _factors(v, depth - 1)]
    return _factors(node.inputs[0], depth - 1)


def _fused_product(data: int, weight: int, scale: int, zero: int, bias: int) -> Callable[[At], None]:
    def convert(at: At) -> None:
        given = at.input(data)
        x = given if at.node.op_type == "DynamicQuantizeMatMul" else at.activation(given)
        matrix = at.weight(at.input(weight), at.input(scale), at.input(zero), (1, -1))
        if x is None or matrix is None:
            return
        made = at.op("MatMul", [x, matrix])
        at.stands_for(made, {1: weight})
        vector = at.input(bias)
        if vector is not None:
            made = at.op("Add", [made, vector])
            at.stands_for(made, {1: bias})
        at.become(at.node.outputs[0], made)

    return convert


def _attention(at: At) -> None:
    x = at.activation(at.input(0))
    weight = at.weight(at.input(1), at.input(4), at.input(7), (1, -1))
    if x is None or weight is None:
        return
    inputs = [x, weight, at.input(2), at.input(5), at.input(8)]
    made = at.op("Attention", inputs, at.attributes(), _MS)
    at.stands_for(made, {1: 1, 2: 2})
    at.become(at.node.outputs[0], made)


def _lstm(at: At) -> None:
    weights = []
    for index, scale in ((1, 8), (2, 10)):
        steps = at.conversion.tracer.tensor(at.input(scale))
        if steps is None:
            return
        shape = (steps.shape[0], 1, steps.shape[1]) if len(steps.shape) == 2 else (-1, 1, 1)
        restored = at.weight(at.input(index), at.input(scale), at.input(scale + 1), shape)
        if restored is None:
            return
        weights.append(at.op("Transpose", [restored], {"perm": [0, 2, 1]}))
    given = [at.input(0), *weights, *(at.input(i) for i in range(3, 8))]
    first = at.builder.op("LSTM", given, at.attributes(), outputs=len(at.node.outputs))
    at.stands_for(first, {3: 3})
    made = first.producer()
    assert made is not None
    for old, new in zip(at.node.outputs, made.outputs, strict=True):
        if old.name:
            at.become(old, new)
        else:
            new.name = ""


def _unary(op_type: str, *left_out: str) -> Callable[[At], None]:
    def convert(at: At) -> None:
        x = at.activation(at.input(0))
        if x is None or attribute(at.node, "channels_last", 0):
            return
        attributes: dict[str, Any] = at.attributes("channels_last", *left_out)
        inputs: list[ir.Value | None] = [x]
        if op_type == "ReduceMean" and at.scope.opset >= 18:
            inputs.append(at.builder.ints("axes", attributes.pop("axes", ())))
        made = at.op(op_type, inputs, attributes)
        at.rounded(made, at.input(3), at.input(4), at.node.outputs[0])

    return convert


def _binary(op_type: str) -> Callable[[At], None]:
    def convert(at: At) -> None:
        first, second = at.operand(0), at.operand(3)
        if first is None or second is None:
            return
        made = at.op(op_type, [first, second])
        at.stands_for(made, {0: 0, 1: 3})
        at.rounded(made, at.input(6), at.input(7), at.node.outputs[0])

    return convert


def _concat(at: At) -> None:
    parts = [at.operand(i) for i in range(2, len(at.node.inputs), 3)]
    if None not in parts:
        at.rounded(at.op("Concat", parts, at.attributes()), at.input(0), at.input(1), at.node.outputs[0])


def _pool(at: At) -> None:
    """Read a MaxPool in two dimensions with channels last."""
    x = at.activation(at.input(0))
    if x is None:
        return
    first = at.op("Transpose", [x], {"perm": (0, 3, 1, 2)})
    last = at.op("Transpose", [at.op("MaxPool", [first], at.attributes())], {"perm": (0, 2, 3, 1)})
    at.hand_on(at.node.outputs[0], last)


def _where(at: At) -> None:
    first, second = at.operand(1), at.operand(4)
    if first is not None and second is not None:
        at.rounded(at.op("Where", [at.input(0), first, second]), at.input(7), at.input(8), at.node.outputs[0])


def _layer(at: At) -> None:
    """Read the bias of a layer between pairs: its stored scale has to be that of the sums it is added to."""
    bias, x, weight = at.input(2), at.input(0), at.input(1)
    pairs = [None if v is None else v.producer() for v in (x, weight, bias)]
    if not all(is_op(p, "DequantizeLinear") or is_op(p, "DequantizeLinear", domain=_MS) for p in pairs):
        return
    before, kernel, own = (p for p in pairs if p is not None)
    dtype = at.conversion.tracer.shapes.dtype(own.inputs[0]) if own.inputs[0] is not None else None
    product = _product(at, before.inputs[1], kernel.inputs[1], float(attribute(at.node, "alpha", 1.0)))
    stored = own.inputs[1]
    if dtype != ir.DataType.INT32 or product is None or stored is None:
        return
    given = constant_array(stored)
    if given is None or not np.allclose(given, product.read(Store()), rtol=_SAME_SCALE, atol=0):
        return
    made = at.weight(own.inputs[0], product, None, (-1,))
    if made is not None:
        restored = at.conversion.real.tensors[made]
        if isinstance(restored, Dequantized):
            at.conversion.real.tensors[made] = dataclasses.replace(restored, summed=_stored(at, kernel))
        at.node.replace_input_with(2, made)
        at.conversion.real.sums.append(Sums(at.conversion.real.value(stored), product))


def _stored(at: At, node: ir.Node) -> Dequantized | None:
    """Return stored integers that a DequantizeLinear restores, with one step or one per channel."""
    tracer, given = at.conversion.tracer, node.inputs[0]
    integers, scale = tracer.tensor(given), tracer.tensor(node.inputs[1])
    dtype = None if given is None else tracer.shapes.dtype(given)
    if integers is None or scale is None or dtype is None or attribute(node, "block_size", 0):
        return None
    zero = tracer.tensor(node.inputs[2]) if len(node.inputs) > 2 else None
    rank, axis = len(integers.shape), attribute(node, "axis", 1)
    spread = along(scale, rank, axis)
    return None if spread is None else Dequantized(integers, dtype, spread, along(zero, rank, axis))


Rule = Callable[[At], None]
RULES: Mapping[tuple[str, str], Rule] = {
    ("", "QuantizeLinear"): _quantize,
    (_MS, "QuantizeLinear"): _quantize,
    ("", "DynamicQuantizeLinear"): _quantize_dynamic,
    ("", "DequantizeLinear"): _dequantize,
    (_MS, "DequantizeLinear"): _dequantize,
    ("", "QLinearConv"): _conv,
    ("", "QLinearMatMul"): _matmul,
    (_MS, "QLinearConv"): _conv,
    (_MS, "QGemm"): _gemm,
    ("", "MatMulInteger"): _integer_product,
    ("", "ConvInteger"): _integer_product,
    (_MS, "DynamicQuantizeMatMul"): _fused_product(0, 1, 2, 3, 4),
    (_MS, "MatMulIntegerToFloat"): _fused_product(0, 1, 3, 5, 6),
    (_MS, "QAttention"): _attention,
    (_MS, "DynamicQuantizeLSTM"): _lstm,
    (_MS, "QLinearAdd"): _binary("Add"),
    (_MS, "QLinearMul"): _binary("Mul"),
    (_MS, "QLinearSigmoid"): _unary("Sigmoid"),
    (_MS, "QLinearLeakyRelu"): _unary("LeakyRelu"),
    (_MS, "QLinearSoftmax"): _unary("Softmax", "opset"),
    (_MS, "QLinearAveragePool"): _unary("AveragePool"),
    (_MS, "QLinearGlobalAveragePool"): _unary("GlobalAveragePool"),
    (_MS, "QLinearReduceMean"): _unary("ReduceMean"),
    (_MS, "NhwcMaxPool"): _pool,
    (_MS, "QLinearConcat"): _concat,
    (_MS, "QLinearWhere"): _where,
}
LAYERS: Mapping[tuple[str, str], Rule] = {("", "Conv"): _layer, ("", "Gemm"): _layer}
