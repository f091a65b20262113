"""Quantization: integers are held as the numbers they stand for, so that gradients pass.

QuantizeLinear rounds in the forward direction and is the identity within the range of its integers backwards (the
straight-through estimator, arXiv:1308.3432). What it returns has integral values in floating point; DequantizeLinear
takes these as well as real integers.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from onnxopt.training.call import Call, Operator
from onnxopt.training.values import NoCounterpart, normal_axis

_D = ir.DataType
_RANGES = {
    _D.INT4: (-8, 7),
    _D.UINT4: (0, 15),
    _D.INT8: (-128, 127),
    _D.UINT8: (0, 255),
    _D.INT16: (-32768, 32767),
    _D.UINT16: (0, 65535),
}


def _aligned(call: Call, values: Tensor, x: Tensor) -> Tensor:
    """Return scales or zero points so that they broadcast to x: one, one per slice of an axis, or per block."""
    if values.numel() == 1 and values.ndim <= 1:
        return values.reshape(())
    axis = normal_axis(call.get("axis", 1), x.ndim)
    if values.ndim == 1:
        return values.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    block = call.get("block_size", 0)
    if not block:
        raise NoCounterpart("has scales of several axes without a block size")
    return values.repeat_interleave(block, dim=axis).narrow(axis, 0, x.shape[axis])


def _integers(call: Call) -> tuple[int, int]:
    """Return the range of the integers a QuantizeLinear makes."""
    zero = call.node.inputs[2] if len(call.node.inputs) > 2 else None
    dtype = _D(call.get("output_dtype", 0)) or (zero.dtype if zero is not None and zero.dtype else None)
    dtype = dtype or (zero.const_value.dtype if zero is not None and zero.const_value is not None else None)
    dtype = dtype or call.node.outputs[0].dtype or _D.UINT8
    if dtype not in _RANGES:
        raise NoCounterpart(f"makes {dtype.name.lower()} elements")
    return _RANGES[dtype]


def straight_through(x: Tensor) -> Tensor:
    """Round to nearest, ties to even; backwards the identity."""
    return x + (torch.round(x) - x).detach()


def quantize(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Round to integers of a range."""
    low, high = _integers(call)
    shift = 0 if zero is None else _aligned(call, zero, x).to(x.dtype)
    return torch.clamp(straight_through(x.to(scale.dtype) / _aligned(call, scale, x)) + shift, low, high)


def dequantize(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Return what integers stand for."""
    shift = 0 if zero is None else _aligned(call, zero, x).to(scale.dtype)
    return (x.to(scale.dtype) - shift) * _aligned(call, scale, x)


def dynamic_quantize(call: Call, x: Tensor) -> Any:
    """Round to 0..255 by the range of x, which itself has no gradient."""
    low, high = torch.clamp(x.min(), max=0).detach(), torch.clamp(x.max(), min=0).detach()
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.clamp(torch.round(-low / scale), 0, 255)
    return torch.clamp(straight_through(x / scale) + zero, 0, 255), scale, zero


def matmul_integer(
    call: Call, a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
) -> Tensor:
    """Multiply integers, in double precision, which holds their sums exactly."""
    a, b = a.to(torch.float64), b.to(torch.float64)
    if a_zero is not None:
        a = a - (a_zero.reshape(-1, 1) if a_zero.ndim == 1 and a_zero.numel() > 1 else a_zero).to(torch.float64)
    if b_zero is not None:
        b = b - b_zero.to(torch.float64)
    return a @ b


OPS: dict[str, Operator] = {
    "QuantizeLinear": quantize,
    "DequantizeLinear": dequantize,
    "DynamicQuantizeLinear": dynamic_quantize,
    "MatMulInteger": matmul_integer,
}
