"""Values on their way into and out of ONNX Runtime, the element types that numpy lacks included.

Every function that makes an OrtValue takes the `onnxruntime` module, which only `onnxopt.session.ort` imports.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.errors import RuntimeFailure

NATIVE = frozenset(
    {
        ir.DataType.FLOAT,
        ir.DataType.DOUBLE,
        ir.DataType.FLOAT16,
        ir.DataType.INT8,
        ir.DataType.INT16,
        ir.DataType.INT32,
        ir.DataType.INT64,
        ir.DataType.UINT8,
        ir.DataType.UINT16,
        ir.DataType.UINT32,
        ir.DataType.UINT64,
        ir.DataType.BOOL,
    }
)
"""Element types that numpy and the runtime's Python API both know."""

REINTERPRETED = frozenset(
    {
        ir.DataType.BFLOAT16,
        ir.DataType.FLOAT8E4M3FN,
        ir.DataType.FLOAT8E4M3FNUZ,
        ir.DataType.FLOAT8E5M2,
        ir.DataType.FLOAT8E5M2FNUZ,
        ir.DataType.FLOAT8E8M0,
        ir.DataType.INT4,
        ir.DataType.UINT4,
        ir.DataType.FLOAT4E2M1,
        ir.DataType.INT2,
        ir.DataType.UINT2,
    }
)
"""Element types that pass the runtime's Python API as unsigned integers of the same bits only."""

_BY_NAME = {dtype.name.lower(): dtype for dtype in REINTERPRETED}


def reinterpreted(type_name: str) -> ir.DataType | None:
    """Return the element type of e.g. "tensor(bfloat16)" when it is one of `REINTERPRETED`."""
    return _BY_NAME.get(type_name.removeprefix("tensor(").removesuffix(")"))


def from_tensor(ort: Any, tensor: ir.TensorProtocol) -> Any:
    """Return an OrtValue over the memory of a tensor, which must outlive it."""
    dtype = tensor.dtype
    if dtype in NATIVE:
        return ort.OrtValue.ortvalue_from_numpy(_contiguous(tensor.numpy()))
    if dtype.bitwidth < 8:
        # The API wants one array element per element of the tensor, and reads the packed beginning only.
        shape = tuple(tensor.shape.numpy())
        buffer = np.empty(math.prod(shape), np.uint8)
        packed = np.frombuffer(tensor.tobytes(), np.uint8)
        buffer[: packed.size] = packed
        bits = buffer.reshape(shape)
    else:
        bits = _contiguous(tensor.numpy()).view(f"u{dtype.bitwidth // 8}")
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, dtype.value)


def to_input(ort: Any, name: str, type_name: str, value: Any) -> Any:
    """Return a value as a session's `run` takes it.

    Args:
        ort: The `onnxruntime` module.
        name: Name of the input.
        type_name: Its type as ONNX Runtime writes it.
        value: An array, a list of arrays for a sequence, None for an empty optional.

    Raises:
        RuntimeFailure: If the input is of an element type that numpy lacks and the array is not.
    """
    if value is None:
        return None
    if not type_name.startswith("tensor(") and isinstance(value, (list, tuple)):
        return [np.asarray(element) for element in value]
    array = np.asarray(value)
    dtype = reinterpreted(type_name)
    if dtype is None:
        return array
    if array.dtype != dtype.numpy():
        raise RuntimeFailure(
            f'The input "{name}" is of type {array.dtype}, but {dtype.name.lower()} of ml_dtypes is expected.'
        )
    return from_tensor(ort, ir.tensor(array, dtype=dtype))


def to_ort_values(ort: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of `to_input` as OrtValues.

    Raises:
        RuntimeFailure: If one of them cannot be one.
    """
    values = {}
    for name, value in inputs.items():
        is_text = isinstance(value, np.ndarray) and value.dtype.kind in "OUS"
        if value is None or isinstance(value, list) or is_text:
            raise RuntimeFailure(
                f'The input "{name}" is no numeric tensor; the Python API of ONNX Runtime cannot combine it with '
                "outputs of element types that numpy lacks."
            )
        values[name] = on_device(ort, value, "cpu")
    return values


def on_device(ort: Any, value: Any, device: str) -> Any:
    """Return an OrtValue in the memory of a device ("cpu", "cuda") for an array; OrtValues stay where they are."""
    if not isinstance(value, np.ndarray):
        return value
    return ort.OrtValue.ortvalue_from_numpy(_contiguous(value), device, 0)


def to_array(value: Any) -> np.ndarray:
    """Return the array of an OrtValue in host memory whose element type numpy lacks, in the types of ml_dtypes."""
    dtype = ir.DataType(value.element_type())
    shape = tuple(value.shape())
    size = math.ceil(math.prod(shape) * dtype.itemsize)
    raw = np.frombuffer(ctypes.string_at(value.data_ptr(), size) if size else b"", np.uint8)
    if dtype.bitwidth < 8:
        return ir.PackedTensor(raw, dtype, shape=shape).numpy()
    return raw.view(dtype.numpy()).reshape(shape)


def _contiguous(array: np.ndarray) -> np.ndarray:
    """Return the array itself where the runtime can use its memory as it is, else a copy."""
    return np.require(array, requirements=["C", "A"])
