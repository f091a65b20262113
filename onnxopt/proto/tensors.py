"""Tensors whose data stays in a file, and sparse ones."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxopt.proto.checks import check_sparse, data_type, string_map
from onnxopt.proto.datafile import DataFile


class Region:
    """The part of a file that holds one tensor."""

    __slots__ = ("__weakref__", "_last", "dtype", "file", "length", "offset")

    def __init__(self, file: DataFile, offset: int, length: int, dtype: ir.DataType) -> None:
        self.file = file
        self.offset = offset
        self.length = length
        self.dtype = dtype
        self._last: weakref.ref[np.ndarray] | None = None

    @property
    def key(self) -> tuple[int, int, int]:
        """Equal for regions that hold the same bytes of the same open file."""
        return id(self.file), self.offset, self.length

    def array(self, shape: Sequence[int]) -> np.ndarray:
        """Return a read-only array: a view of the mapped file, or a copy where alignment or packing needs one."""
        array = self._last() if self._last is not None else None
        if array is None:
            array = self._make_array(shape)
            array.flags.writeable = False
            # Kept only as long as somebody uses it: several passes ask for the same constant in a row.
            self._last = weakref.ref(array)
        return array

    def _make_array(self, shape: Sequence[int]) -> np.ndarray:
        if not self.length:
            return np.zeros(shape, dtype=self.dtype.numpy())
        if self.dtype.bitwidth < 8:
            proto = onnx.TensorProto(dims=shape, data_type=self.dtype.value, raw_data=self.bytes())
            return ir.serde.TensorProtoTensor(proto).numpy()
        dtype = self.dtype.numpy().newbyteorder("<")
        if self.offset % dtype.alignment:
            return np.frombuffer(self.bytes(), dtype=dtype).reshape(shape)
        count = self.length // dtype.itemsize
        return np.frombuffer(self.file.mapped(), dtype=dtype, count=count, offset=self.offset).reshape(shape)

    def tensor(self, shape: ir.Shape) -> ir.Tensor[np.ndarray]:
        """Return an in-memory tensor around `array`."""
        return ir.Tensor(self.array(shape.numpy()), dtype=self.dtype)

    def bytes(self) -> bytes:
        """Return the bytes of the tensor."""
        return self.file.read(self.offset, self.length)

    def write_to(self, file: Any) -> None:
        """Write the bytes to a file or to anything with a `write` method, in pieces."""
        for chunk in self.file.chunks(self.offset, self.length):
            file.write(chunk)


class EmbeddedTensor(ir.LazyTensor):
    """A tensor whose data stays inside the .onnx file it was loaded from."""

    __slots__ = ("region",)

    def __init__(self, region: Region, shape: ir.Shape, proto: onnx.TensorProto) -> None:
        super().__init__(
            functools.partial(region.tensor, shape),
            region.dtype,
            shape,
            name=proto.name,
            doc_string=proto.doc_string if proto.HasField("doc_string") else None,
            metadata_props=string_map(proto.metadata_props),
        )
        self.region = region

    def tobytes(self) -> bytes:
        """Return the bytes, little-endian and packed as ONNX has them."""
        return self.region.bytes()

    def tofile(self, file: Any) -> None:
        """Write the bytes to a file or to anything with a `write` method, in pieces."""
        self.region.write_to(file)


class ExternalTensor(ir.ExternalTensor):
    """A tensor in a data file, which was checked and opened when the model was loaded.

    Unlike its base class it reads from the open file, so that the path may be replaced or removed meanwhile,
    shares one mapping among all tensors of a file, and does not mind hard links: package managers, caches and
    container layers make them, and who can make one can also make a copy.
    """

    __slots__ = ("region",)

    def __init__(self, region: Region, location: str, base_dir: Path, shape: ir.Shape, proto: onnx.TensorProto) -> None:
        super().__init__(
            location,
            region.offset,
            region.length,
            region.dtype,
            shape=shape,
            name=proto.name,
            doc_string=proto.doc_string if proto.HasField("doc_string") else None,
            metadata_props=string_map(proto.metadata_props),
            base_dir=base_dir,
        )
        self.region = region

    def numpy(self) -> np.ndarray:
        """Return a read-only array, a view of the mapped file where possible."""
        return self.region.array(self.shape.numpy())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def tobytes(self) -> bytes:
        """Return the bytes, little-endian and packed as ONNX has them."""
        return self.region.bytes()

    def tofile(self, file: Any) -> None:
        """Write the bytes to a file, in pieces."""
        self.region.write_to(file)

    def release(self) -> None:
        """Do nothing: no array is held."""


class SparseTensor(ir.LazyTensor):
    """A sparse initializer, which passes see as the dense constant it stands for.

    Attributes:
        proto: How it is stored.
    """

    __slots__ = ("proto",)

    def __init__(self, proto: onnx.SparseTensorProto) -> None:
        """Check the tensor and wrap it.

        Raises:
            ModelError: If values, indices and dimensions do not fit together.
        """
        label = f'the sparse tensor "{proto.values.name}"'
        dtype = data_type(proto.values)
        check_sparse(proto, dtype, label)
        shape = ir.Shape(proto.dims, frozen=True)
        super().__init__(functools.partial(_dense, proto, dtype, shape), dtype, shape, name=proto.values.name)
        self.proto = proto


def _dense(proto: onnx.SparseTensorProto, dtype: ir.DataType, shape: ir.Shape) -> ir.Tensor[np.ndarray]:
    values = ir.serde.TensorProtoTensor(proto.values).numpy().reshape(-1)
    indices = ir.serde.TensorProtoTensor(proto.indices).numpy()
    dense = np.zeros(shape.numpy(), dtype=values.dtype)
    if indices.ndim == 2:
        dense[tuple(indices.T)] = values
    else:
        dense.reshape(-1)[indices] = values
    return ir.Tensor(dense, dtype=dtype)
