"""Conv, ConvTranspose, Gemm and MatMul with constant weights, read as one kind of thing.

Each computes, per channel, a weighted sum of its input plus a bias. Constants that multiply or add per channel
behind it, or in front of it, can therefore move into its weight and bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxopt.analysis.shapes import Shapes
from onnxopt.analysis.weights import FLOATS
from onnxopt.graph import attribute, constant_array, constant_tensor, has_references, is_op, use_count

Array = np.ndarray[Any, Any]

LINEAR_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

_BLOCK = 1 << 20
"""Elements that are worked on at a time, so that a large weight is never held in float64 as a whole."""


@dataclasses.dataclass(frozen=True, slots=True)
class Linear:
    """One of `LINEAR_OPS` with a constant weight.

    Attributes:
        node: The node.
        weight: Its weight.
        bias: The tensor it adds, None when there is none. A MatMul has none.
        rank: Number of axes of the output.
        axis: The axis of the output that counts its channels.
        channels: How many there are.
        input_axis: The axis of the input that is summed over.
        input_channels: How many channels that is.
    """

    node: ir.Node
    weight: ir.TensorProtocol
    bias: ir.TensorProtocol | None
    rank: int
    axis: int
    channels: int
    input_axis: int
    input_channels: int

    @property
    def dtype(self) -> ir.DataType:
        """Element type of weight, bias, input and output."""
        return self.weight.dtype

    @property
    def owns_weight(self) -> bool:
        """Whether nothing else uses the weight, so that a new one replaces it and is not stored besides it."""
        value = self.node.inputs[1]
        return value is not None and use_count(value) == 1 and not value.is_graph_output()

    @property
    def pads(self) -> bool:
        """Whether a Conv surrounds its input with zeros."""
        padding = attribute(self.node, "auto_pad", "NOTSET")
        return padding != "VALID" and (padding != "NOTSET" or any(attribute(self.node, "pads", ())))

    def bias_per_channel(self) -> Array | None:
        """Return what is added to each channel, in float64; None when that is not one number per channel."""
        if self.bias is None:
            return np.zeros(self.channels)
        bias = self.bias.numpy().astype(np.float64)
        if any(size != 1 for size in bias.shape[:-1]) or bias.size not in (1, self.channels):
            return None
        beta = attribute(self.node, "beta", 1.0) if is_op(self.node, "Gemm") else 1.0
        return np.broadcast_to(bias.reshape(-1) * beta, (self.channels,))

    def per_output(self, factor: Array) -> Array:
        """Shape one number per output channel so that it broadcasts over the weight."""
        shape = self.weight.shape.numpy()
        ones = [1] * (len(shape) - 2)
        if is_op(self.node, "Conv"):
            return factor.reshape(-1, 1, *ones)
        if is_op(self.node, "ConvTranspose"):
            # (input channels, output channels of a group, ...); groups split the input channels.
            groups = attribute(self.node, "group", 1)
            return np.repeat(factor.reshape(groups, -1), shape[0] // groups, axis=0).reshape(*shape[:2], *ones)
        return factor.reshape(-1, 1) if attribute(self.node, "transB", 0) else factor.reshape(1, -1)

    def per_input(self, factor: Array) -> Array:
        """Shape one number per input channel so that it broadcasts over the weight."""
        shape = self.weight.shape.numpy()
        ones = [1] * (len(shape) - 2)
        if is_op(self.node, "Conv"):
            groups = attribute(self.node, "group", 1)
            return np.repeat(factor.reshape(groups, -1), shape[0] // groups, axis=0).reshape(*shape[:2], *ones)
        if is_op(self.node, "ConvTranspose"):
            return factor.reshape(-1, 1, *ones)
        return factor.reshape(1, -1) if attribute(self.node, "transB", 0) else factor.reshape(-1, 1)

    def summed_over_input(self, per_channel: Array) -> Array:
        """Return what a constant per input channel adds to each output channel where there is no padding."""
        weighted = self.weight.numpy().astype(np.float64) * self.per_input(per_channel)
        keep = 0 if is_op(self.node, "Conv") or attribute(self.node, "transB", 0) else 1
        summed = np.asarray(weighted.sum(axis=tuple(i for i in range(weighted.ndim) if i != keep)))
        return summed * attribute(self.node, "alpha", 1.0) if is_op(self.node, "Gemm") else summed


def read(node: ir.Node, shapes: Shapes) -> Linear | str | None:
    """Read a node.

    Returns:
        The node as a `Linear`; why it cannot be seen as one; or None when it is no such operator at all.
    """
    if not is_op(node, *LINEAR_OPS):
        return None
    if has_references(node):
        return "an attribute refers to the function's caller"
    if len(node.inputs) < 2 or node.inputs[0] is None:
        return None
    weight = constant_tensor(node.inputs[1])
    if weight is None:
        return None if is_op(node, "MatMul") else "the weight is not constant"
    if weight.dtype not in FLOATS:
        return None
    bias_value = node.inputs[2] if len(node.inputs) > 2 else None
    bias = constant_tensor(bias_value)
    if bias_value is not None and bias is None:
        return "the bias is not constant"
    shape = tuple(weight.shape.numpy())
    return _matrix(node, weight, bias, shapes) if len(shape) == 2 else _convolution(node, weight, bias, shape)


def _convolution(
    node: ir.Node, weight: ir.TensorProtocol, bias: ir.TensorProtocol | None, shape: tuple[int, ...]
) -> Linear | str | None:
    if not is_op(node, "Conv", "ConvTranspose"):
        return None
    groups = attribute(node, "group", 1)
    if len(shape) < 3 or groups < 1 or shape[0] % groups:
        return "the weight does not fit the operator"
    if is_op(node, "Conv"):
        return Linear(node, weight, bias, len(shape), 1, shape[0], 1, shape[1] * groups)
    return Linear(node, weight, bias, len(shape), 1, shape[1] * groups, 1, shape[0])


def _matrix(
    node: ir.Node, weight: ir.TensorProtocol, bias: ir.TensorProtocol | None, shapes: Shapes
) -> Linear | str | None:
    rows, columns = weight.shape.numpy()
    if is_op(node, "Gemm"):
        if attribute(node, "transB", 0):
            rows, columns = columns, rows
        return Linear(node, weight, bias, 2, 1, columns, 0 if attribute(node, "transA", 0) else 1, rows)
    if not is_op(node, "MatMul") or node.inputs[0] is None:
        return None
    rank = shapes.rank(node.inputs[0])
    if rank is None:
        return "the number of axes of the input is not known"
    return Linear(node, weight, bias, rank, rank - 1, columns, rank - 1, rows) if rank else None


def scaled(weight: ir.TensorProtocol, factor: Array) -> Array:
    """Return a weight times a factor that broadcasts over it, computed in float64 and rounded once."""
    source = weight.numpy()
    result = np.empty(source.shape, source.dtype)
    with np.errstate(over="ignore", under="ignore"):
        for rows, numbers in _blocks(source, factor):
            result[rows] = (source[rows].astype(np.float64) * numbers).astype(source.dtype)
    return result


def loss(weight: ir.TensorProtocol, factor: Array) -> str | None:
    """Return why a weight times a factor cannot be stored in its own type without losing precision, or None."""
    source = weight.numpy()
    largest, smallest = _range(source.dtype)
    if not np.isfinite(factor).all():
        return "a factor is not finite"
    for rows, numbers in _blocks(source, factor):
        before = np.abs(source[rows].astype(np.float64))
        after = before * np.abs(numbers)
        top = after.max(initial=0.0)
        if not top <= largest:
            return "the new weight does not fit into its type"
        # Where a whole row shrinks into the subnormal numbers, its relative precision is gone.
        axes = tuple(range(1, after.ndim))
        tops, tops_before = after.max(axis=axes, initial=0.0), before.max(axis=axes, initial=0.0)
        if np.any((tops < smallest) & (tops_before >= smallest) & (tops > 0)):
            return "the new weight would lose precision in its type"
    return None


def _blocks(source: Array, factor: Array) -> Iterator[tuple[slice, Array]]:
    """Yield slices of the first axis and the factor's part for each."""
    step = max(1, _BLOCK // max(1, source[:1].size))
    for start in range(0, source.shape[0], step):
        rows = slice(start, start + step)
        yield rows, factor[rows] if factor.shape[0] != 1 else factor


def fits(array: Array, dtype: ir.DataType) -> bool:
    """Whether all elements are finite and lie in the range of a type."""
    return bool((np.abs(array) <= _range(dtype.numpy())[0]).all())


def _range(dtype: np.dtype[Any]) -> tuple[float, float]:
    """Return the largest number of a type, and the smallest that it holds with full precision."""
    info = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return float(info.max), float(info.smallest_normal)


# What multiplies or adds --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Affine:
    """A node that computes scale * x + shift with constants, which broadcast to x.

    Attributes:
        node: The node.
        x: What it is applied to.
        scale: None where it multiplies by 1.
        shift: None where it adds 0.
    """

    node: ir.Node
    x: ir.Value
    scale: Array | None
    shift: Array | None


AFFINE_OPS = ("Mul", "Div", "Add", "Sub", "Neg", "BatchNormalization")
BROADCASTING = 7
"""From this opset on, operands of arithmetic are broadcast as in numpy."""
_MAX_BYTES = 1 << 22


def affine(node: ir.Node, opset: int) -> Affine | None:
    """Read a node as an affine map, or return None. Integers are left out."""
    if not is_op(node, *AFFINE_OPS) or has_references(node) or opset < BROADCASTING:
        return None
    if is_op(node, "BatchNormalization"):
        return _normalization(node, opset)
    if is_op(node, "Neg"):
        return None if node.inputs[0] is None else Affine(node, node.inputs[0], np.array(-1.0), None)
    left, right = node.inputs
    if left is None or right is None:
        return None
    for x, constant in ((left, right), (right, left)):
        tensor = constant_tensor(constant)
        if tensor is None or constant_tensor(x) is not None or tensor.nbytes > _MAX_BYTES:
            continue
        if tensor.dtype not in FLOATS or not tensor.size:
            return None
        return _arithmetic(node, x, tensor.numpy().astype(np.float64), first=x is right)
    return None


def _arithmetic(node: ir.Node, x: ir.Value, array: Array, *, first: bool) -> Affine | None:
    """Read x op constant, or constant op x when the constant comes first."""
    match node.op_type:
        case "Mul":
            return Affine(node, x, array, None)
        case "Add":
            return Affine(node, x, None, array)
        case "Sub":
            return Affine(node, x, np.array(-1.0), array) if first else Affine(node, x, None, -array)
        case _:
            if first or not array.all():
                return None
            return Affine(node, x, 1 / array, None)


def _normalization(node: ir.Node, opset: int) -> Affine | None:
    if len(node.inputs) != 5 or node.inputs[0] is None or any(o.name for o in node.outputs[1:]):
        return None
    if attribute(node, "training_mode", 0) or not attribute(node, "spatial", 1):
        return None
    parameters = [constant_array(v) for v in node.inputs[1:]]
    if any(p is None or p.ndim != 1 for p in parameters):
        return None
    scale, shift, mean, variance = (p.astype(np.float64) for p in parameters if p is not None)
    spread = variance + attribute(node, "epsilon", 1e-5)
    if not (spread > 0).all() or not scale.shape == shift.shape == mean.shape == variance.shape:
        return None
    factor = scale / np.sqrt(spread)
    return Affine(node, node.inputs[0], factor, shift - mean * factor)


def per_channel(found: Affine, array: Array, rank: int, axis: int | None, channels: int) -> Array | str:
    """Return one number per channel from a constant of an affine node.

    Args:
        found: The node.
        array: Its scale or its shift.
        rank: Number of axes of what it is applied to.
        axis: The axis that counts the channels, None when they are spread over several.
        channels: How many there are.

    Returns:
        An array of as many numbers, or why the constant is not one.
    """
    if is_op(found.node, "BatchNormalization"):
        array = array.reshape(-1, *[1] * (rank - 2)) if rank >= 2 else array
    if array.ndim > rank:
        return "the constant gives the result more axes"
    if array.size == 1:
        return np.broadcast_to(array.reshape(-1), (channels,))
    shape = (1,) * (rank - array.ndim) + array.shape
    if axis is None or any(size != 1 for i, size in enumerate(shape) if i != axis) or shape[axis] != channels:
        return "the constant is not one number per channel"
    return array.reshape(-1)
