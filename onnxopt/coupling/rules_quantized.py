"""How channels go through numbers on grids: quantized, multiplied as integers, and back.

With a grid that the file gives, what a channel becomes depends on nothing but itself, so that it can go. A grid that
follows from the values while the model runs depends on all of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from onnxopt.coupling.builder import Builder, Opaque, is_constant, label
from onnxopt.coupling.rules import Rule, multiply, multiply_transposed, operand
from onnxopt.coupling.rules_nn import convolve
from onnxopt.graph import attribute


def quantize(builder: Builder, node: ir.Node) -> None:
    """A scale and a zero point for all, or one for each index of an axis."""
    data, output = operand(node, 0), node.outputs[0]
    builder.same(data, output)
    axis = attribute(node, "axis", 1) % max(1, len(builder.shape(data)))
    _grid(builder, node, (1, 2), data, axis)


def _grid(builder: Builder, node: ir.Node, inputs: tuple[int, ...], value: ir.Value, axis: int) -> None:
    """Follow scales and zero points: one for all, or one for each index of an axis of a value."""
    for index in inputs:
        given = node.inputs[index] if index < len(node.inputs) else None
        if given is None:
            continue
        shape = builder.shape(given)
        if len(shape) > 1:
            raise Opaque("it works in blocks")
        if shape and shape[0] != 1:
            builder.tie(given, 0, value, axis)


def _one(builder: Builder, node: ir.Node, *inputs: int) -> None:
    """Make sure that inputs hold one number for all.

    Raises:
        Opaque: If one does not.
    """
    for index in inputs:
        given = node.inputs[index] if index < len(node.inputs) else None
        if given is not None and builder.shape(given) not in ((), (1,)):
            raise Opaque("its activations have a scale for each row")


def _weight(builder: Builder, node: ir.Node, index: int) -> ir.Value:
    """Return a weight that the file holds.

    Raises:
        Opaque: If it does not: no zeros could be put in its place.
    """
    value = operand(node, index)
    if not is_constant(value):
        raise Opaque("it multiplies two results as integers")
    return value


def _zeros(node: ir.Node, index: int) -> int | None:
    """Return the place of a zero point that is given.

    Raises:
        Opaque: If it is computed.
    """
    given = node.inputs[index] if index < len(node.inputs) else None
    if given is not None and not is_constant(given):
        raise Opaque("the zero point of its weight is computed")
    return None if given is None else index


def dynamic_quantize(builder: Builder, node: ir.Node) -> None:
    """One range for all that is in a tensor, found while the model runs."""
    data = operand(node, 0)
    for value in (data, node.outputs[0]):
        builder.freeze_all(value, f"{label(node)} takes its range from all channels together")


def conv_integer(builder: Builder, node: ir.Node) -> None:
    """A convolution of integers."""
    weight = _weight(builder, node, 1)
    _one(builder, node, 2)
    convolve(builder, node, 1, len(node.inputs), _zeros(node, 3))
    _grid(builder, node, (3,), weight, 0)


def matmul_integer(builder: Builder, node: ir.Node) -> None:
    """A matrix product of integers."""
    weight = _weight(builder, node, 1)
    _one(builder, node, 2)
    multiply(builder, node, 0, 1, _zeros(node, 3))
    _grid(builder, node, (3,), weight, len(builder.shape(weight)) - 1)


def matmul_to_float(builder: Builder, node: ir.Node) -> None:
    """A matrix product of integers, scaled, with a bias."""
    weight = _weight(builder, node, 1)
    _one(builder, node, 2, 4)
    multiply(builder, node, 0, 1, _zeros(node, 5))
    last = len(builder.shape(weight)) - 1
    _grid(builder, node, (3, 5, 6), weight, last)


def dynamic_matmul(builder: Builder, node: ir.Node) -> None:
    """The same with activations that it quantizes itself."""
    data, weight = operand(node, 0), _weight(builder, node, 1)
    multiply(builder, node, 0, 1, _zeros(node, 3))
    _grid(builder, node, (2, 3, 4), weight, len(builder.shape(weight)) - 1)
    builder.freeze_all(data, f"{label(node)} takes its range from all channels together")


def linear_conv(builder: Builder, node: ir.Node) -> None:
    """A convolution of integers to a given grid."""
    weight = _weight(builder, node, 3)
    _one(builder, node, 1, 2, 6, 7)
    convolve(builder, node, 3, 8, _zeros(node, 5))
    _grid(builder, node, (4, 5), weight, 0)


def linear_matmul(builder: Builder, node: ir.Node) -> None:
    """A matrix product of integers to a given grid."""
    weight = _weight(builder, node, 3)
    _one(builder, node, 1, 2, 6, 7)
    multiply(builder, node, 0, 3, _zeros(node, 5))
    _grid(builder, node, (4, 5), weight, len(builder.shape(weight)) - 1)


def linear_gemm(builder: Builder, node: ir.Node) -> None:
    """QGemm: a Gemm of integers to a given grid."""
    weight = _weight(builder, node, 3)
    _one(builder, node, 1, 2, 7, 8)
    multiply_transposed(builder, node, 0, 3, 6, _zeros(node, 5))
    _grid(builder, node, (4, 5), weight, 0 if attribute(node, "transB", 0) else 1)


def linear_binary(builder: Builder, node: ir.Node) -> None:
    """QLinearAdd and QLinearMul: two tensors, each with a grid, to a given grid."""
    _one(builder, node, 1, 2, 4, 5, 6, 7)
    for index in (0, 3):
        builder.broadcast(operand(node, index), node.outputs[0])


def linear_unary(builder: Builder, node: ir.Node) -> None:
    """A function of each element, from one grid to another."""
    _one(builder, node, 1, 2, 3, 4)
    builder.same(operand(node, 0), node.outputs[0])


RULES: Mapping[str, Rule] = {
    "QuantizeLinear": quantize,
    "DequantizeLinear": quantize,
    "DynamicQuantizeLinear": dynamic_quantize,
    "ConvInteger": conv_integer,
    "MatMulInteger": matmul_integer,
    "QLinearConv": linear_conv,
    "QLinearMatMul": linear_matmul,
}
"""Standard operators on grids."""

MICROSOFT: Mapping[str, Rule] = {
    "QuantizeLinear": quantize,
    "DequantizeLinear": quantize,
    "DynamicQuantizeMatMul": dynamic_matmul,
    "MatMulIntegerToFloat": matmul_to_float,
    "QGemm": linear_gemm,
    "QLinearAdd": linear_binary,
    "QLinearMul": linear_binary,
    "QLinearSigmoid": linear_unary,
    "QLinearLeakyRelu": linear_unary,
}
"""Operators of ONNX Runtime on grids."""
