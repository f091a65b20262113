"""Constants that hold the numbers of a grid: what they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxopt.analysis.weights import FLOATS
from onnxopt.graph import attribute, constant_array, constant_tensor, is_op, only_use

Array = npt.NDArray[Any]

GRIDS = (
    *(ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT2, ir.DataType.UINT2),
    *(ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2),
)
"""Types of which constants are weights on a grid; indexes and sizes have others."""
NUMBERS = (*FLOATS, *GRIDS)
"""Types of weights."""
_ZEROS_AT = {"ConvInteger": 3, "MatMulInteger": 3, "MatMulIntegerToFloat": 5, "DynamicQuantizeMatMul": 3}
_SCALES_AT = {"QLinearConv": (4, 5), "QLinearMatMul": (4, 5), "QGemm": (4, 5), "MatMulIntegerToFloat": (3, 5)}


def numbers(value: ir.Value, tensor: ir.TensorProtocol) -> Array:
    """Return the numbers that a constant stands for, as float32, in its shape; up to a factor where it is not known.

    Args:
        value: The constant.
        tensor: What it held when it was analysed.
    """
    array: Array = tensor.numpy().astype(np.float32, copy=False)
    node = only_use(value)
    if tensor.dtype not in GRIDS or node is None:
        return array
    if is_op(node, "DequantizeLinear") or node.op_type == "DequantizeLinear":
        return _scaled(array, _constant(node, 1), _constant(node, 2), attribute(node, "axis", 1))
    if is_op(node, "Cast") and (user := only_use(node.outputs[0])) is not None and is_op(user, "Mul"):
        scale = next((s for v in user.inputs if (s := constant_array(v)) is not None), None)
        return array if scale is None or scale.ndim > array.ndim else array * scale
    channels = array.ndim - 1 if "MatMul" in node.op_type else 1 if _transposed_gemm(node) else 0
    scale_at, zero_at = _SCALES_AT.get(node.op_type, (None, _ZEROS_AT.get(node.op_type)))
    return _scaled(array, _constant(node, scale_at), _constant(node, zero_at), channels)


def _transposed_gemm(node: ir.Node) -> bool:
    return node.op_type == "QGemm" and not attribute(node, "transB", 0)


def _constant(node: ir.Node, index: int | None) -> Array | None:
    value = node.inputs[index] if index is not None and index < len(node.inputs) else None
    return None if constant_tensor(value) is None else constant_array(value)


def _scaled(array: Array, scale: Array | None, zero: Array | None, axis: int) -> Array:
    """Return a grid's numbers; those of a scale and zero point that do not fit, as in blocks, are left out."""
    for given, apply in ((zero, np.subtract), (scale, np.multiply)):
        if given is None:
            continue
        along = [1] * array.ndim
        if given.size > 1:
            if given.ndim != 1 or given.size != array.shape[axis]:
                continue
            along[axis] = -1
        array = apply(array, given.astype(np.float32).reshape(along))
    return array
