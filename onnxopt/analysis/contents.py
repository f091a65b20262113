"""Telling tensors of equal content apart from others, reading no more than needed."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np
import onnx_ir as ir

_SAMPLE = 64
"""Bytes read at the front, in the middle and at the end before anything is hashed."""

_CHUNK = 1 << 20


class Content:
    """A tensor's element type, shape and bytes as a dictionary key.

    Equal means equal to the bit: NaN payloads and the sign of zero count. All bytes are read only when two
    tensors of one type and shape agree in a few samples, and then in chunks; those of external data are read from
    the file, so that they do not stay in memory as mapped pages.
    """

    def __init__(self, tensor: ir.TensorProtocol) -> None:
        """Read the samples."""
        self.tensor = tensor
        sample, self._whole = _sample(tensor)
        self._key = (tensor.dtype, tensor.shape.numpy(), sample)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Content):
            return NotImplemented
        if self.tensor is other.tensor:
            return True
        if self._key != other._key:
            return False
        return self._whole or self._digest == other._digest

    @functools.cached_property
    def _digest(self) -> bytes:
        digest = hashlib.sha256()
        if isinstance(self.tensor, ir.ExternalTensor):
            self.tensor.tofile(_Writer(digest))
        elif self.tensor.dtype == ir.DataType.STRING:
            for text in self.tensor.numpy().reshape(-1).tolist():
                digest.update(len(text).to_bytes(8, "little"))
                digest.update(text)
        else:
            data = _bytes_of(self.tensor)
            for start in range(0, data.size, _CHUNK):
                digest.update(data[start : start + _CHUNK].tobytes())
        return digest.digest()


class _Writer:
    """A file-like object that hashes what is written."""

    def __init__(self, digest: Any) -> None:
        self.write = digest.update


def _bytes_of(tensor: ir.TensorProtocol) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the elements as bytes; without a copy where they are contiguous."""
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)


def _sample(tensor: ir.TensorProtocol) -> tuple[bytes, bool]:
    """Return some of the tensor's bytes, and whether they are all of them."""
    if tensor.dtype == ir.DataType.STRING:
        return b"", False
    data = _bytes_of(tensor)
    if data.size <= _SAMPLE:
        return data.tobytes(), True
    middle = data.size // 2
    return b"".join(data[i : i + _SAMPLE].tobytes() for i in (0, middle, data.size - _SAMPLE)), False
