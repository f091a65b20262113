"""The safetensors format, of which checkpoints are: a header of JSON, then plain arrays. Nothing in it is ever run.

https://huggingface.co/docs/safetensors: eight bytes with the length of the header, little-endian; the header, an
object of name -> dtype, shape, data_offsets and of __metadata__ with strings; the bytes of the arrays.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxopt.errors import DataError, OutputError

_TYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(t): name for name, t in _TYPES.items()}
_MOST_HEADER = 100_000_000


def write(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write arrays and strings; the file appears under its name when it is complete.

    Raises:
        OutputError: If it cannot be written.
    """
    target = Path(path)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for array in arrays.values():
                file.write(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        temporary.replace(target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the arrays and strings of a file.

    Raises:
        DataError: If it cannot be read, or its parts do not fit together.
    """
    source = Path(path)
    try:
        content = source.read_bytes()
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}.") from error
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > min(len(content) - 8, _MOST_HEADER):
        raise DataError(f"{source} is no safetensors file, or is cut off.")
    try:
        header = json.loads(content[8 : 8 + length])
        metadata = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
        data = memoryview(content)[8 + length :]
        return {name: _array(entry, data) for name, entry in header.items()}, metadata
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{source} is a damaged safetensors file: {error}.") from error


def _array(entry: Mapping[str, Any], data: memoryview) -> np.ndarray:
    dtype = np.dtype(_TYPES[entry["dtype"]])
    shape = [int(size) for size in entry["shape"]]
    first, last = (int(offset) for offset in entry["data_offsets"])
    if min(shape, default=1) < 0 or not 0 <= first <= last <= len(data):
        raise ValueError("an array lies outside of the file")
    if last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError("an array has another size than its shape says")
    return np.frombuffer(data[first:last], dtype.newbyteorder("<")).astype(dtype).reshape(shape)
