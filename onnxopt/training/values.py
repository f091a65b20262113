"""Values as the interpreter holds them, and the way from and to ONNX.

A tensor is a `torch.Tensor`, a sequence a list of them, an optional without a value None. Half precision is held as
float32, unsigned types that torch can hardly compute with as a wider signed one, four bits as eight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

_D = ir.DataType

HALF = (_D.FLOAT16, _D.BFLOAT16)

WIDENED = (_D.UINT16, _D.UINT32, _D.UINT64, _D.UINT4, _D.INT4)

_TORCH = {
    _D.FLOAT: torch.float32,
    _D.FLOAT16: torch.float32,
    _D.BFLOAT16: torch.float32,
    _D.DOUBLE: torch.float64,
    _D.INT8: torch.int8,
    _D.INT16: torch.int16,
    _D.INT32: torch.int32,
    _D.INT64: torch.int64,
    _D.UINT8: torch.uint8,
    _D.UINT16: torch.int32,
    _D.UINT32: torch.int64,
    _D.UINT64: torch.int64,
    _D.BOOL: torch.bool,
    _D.INT4: torch.int8,
    _D.UINT4: torch.uint8,
    _D.FLOAT8E4M3FN: torch.float32,
    _D.FLOAT8E5M2: torch.float32,
}

_NUMPY: dict[torch.dtype, Any] = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.int8: np.int8,
    torch.int16: np.int16,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}


class NoCounterpart(Exception):  # noqa: N818 - it is caught by the interpreter and never seen outside
    """An operator, or this form of it, that torch is not taught to compute. The message completes "..., which"."""


def torch_dtype(dtype: ir.DataType | int) -> torch.dtype:
    """Return the type that values of an ONNX type are held in.

    Raises:
        NoCounterpart: If there is none.
    """
    dtype = _D(dtype)
    if dtype not in _TORCH:
        raise NoCounterpart(f"has {dtype.name.lower()} elements")
    return _TORCH[dtype]


def to_torch(array: Any, dtype: ir.DataType | None = None) -> torch.Tensor:
    """Return a copy of an array, of which the tensor is then the only owner.

    Args:
        array: A numpy array, types of ml_dtypes included.
        dtype: Its ONNX type; found from the array by default.

    Raises:
        NoCounterpart: If values of this type cannot be held.
    """
    array = np.asarray(array)
    wanted = torch_dtype(dtype if dtype is not None else _onnx_dtype(array))
    return on_device(np.array(array, dtype=_NUMPY[wanted], order="C"))


def on_device(array: np.ndarray) -> torch.Tensor:
    """Return an array as a tensor on the device in use, where functions of torch make theirs; see `devices`."""
    return torch.from_numpy(array).to(torch.get_default_device())


def feed_to_torch(feed: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the arrays of a feed as tensors."""
    return {name: to_torch(value) for name, value in feed.items()}


def _onnx_dtype(array: np.ndarray) -> ir.DataType:
    try:
        return _D.from_numpy(array.dtype)
    except TypeError as error:
        raise NoCounterpart(f"has {array.dtype} elements") from error


def tensor_to_torch(tensor: ir.TensorProtocol) -> torch.Tensor:
    """Return a copy of an ONNX tensor."""
    return to_torch(tensor.numpy(), tensor.dtype)


def to_array(value: torch.Tensor, dtype: ir.DataType | None = None) -> np.ndarray:
    """Return a value as an array, of an ONNX type when one is named."""
    array: np.ndarray = value.detach().cpu().numpy()
    return array if dtype is None else array.astype(dtype.numpy())


def ints(value: torch.Tensor | None) -> list[int]:
    """Return a tensor of integers, such as a shape, as a list; empty for None."""
    return [] if value is None else [int(i) for i in value.reshape(-1).cpu().tolist()]


def normal_axis(axis: int, rank: int) -> int:
    """Return an axis counted from the front."""
    return axis + rank if axis < 0 else axis
