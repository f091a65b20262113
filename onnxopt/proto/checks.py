"""What can be wrong with a model, as far as its protobuf tells, and what the size of a tensor has to be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from onnxopt.errors import ModelError

_MAX_BYTES = 1 << 62
_MAX_DENSE = 1 << 31
_KNOWN_TYPES = frozenset(int(d) for d in ir.DataType)
_FIELD_OF = {
    ir.DataType.FLOAT: "float_data",
    ir.DataType.COMPLEX64: "float_data",
    ir.DataType.DOUBLE: "double_data",
    ir.DataType.COMPLEX128: "double_data",
    ir.DataType.INT64: "int64_data",
    ir.DataType.UINT32: "uint64_data",
    ir.DataType.UINT64: "uint64_data",
    ir.DataType.STRING: "string_data",
}


def check_header(proto: onnx.ModelProto) -> None:
    """Check that there is a graph with outputs, in versions that the installed onnx knows.

    Raises:
        ModelError: If there is not.
    """
    if not proto.HasField("graph"):
        raise ModelError("there is no graph in it, so it is not an ONNX model.")
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"its IR version is {proto.ir_version}, and the installed onnx {onnx.__version__} reads up to "
            f"{onnx.IR_VERSION}; upgrade onnx, or export the model for an older one."
        )
    if proto.ir_version < 1:
        raise ModelError("it states no IR version, so it is not an ONNX model or is damaged.")
    if not proto.opset_import:
        raise ModelError("it imports no operator set, so what its operators mean is unknown; export it again.")
    if not proto.graph.output:
        raise ModelError("its graph has no outputs, so it computes nothing.")
    check_opsets(proto.opset_import)
    for function in proto.functions:
        check_opsets(function.opset_import)


def check_opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> None:
    """Check that operator sets are imported once, in versions that the installed onnx knows.

    Raises:
        ModelError: If one is not.
    """
    known: dict[str, tuple[int, int]] = onnx.defs.C.schema_version_map()
    seen: dict[str, int] = {}
    for entry in imports:
        require_text(entry.domain)
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if seen.setdefault(domain, entry.version) != entry.version:
            raise ModelError(f'it imports the operator set "{domain or "ai.onnx"}" in two different versions.')
        newest = known[domain][1] if domain in known else None
        if newest is not None and entry.version > newest:
            raise ModelError(
                f'it uses version {entry.version} of the operator set "{domain or "ai.onnx"}", and the installed '
                f"onnx {onnx.__version__} knows up to {newest}; upgrade onnx, or export it with opset {newest}."
            )
        if newest is not None and entry.version < 1:
            raise ModelError(f'it imports version {entry.version} of the operator set "{domain or "ai.onnx"}".')


def require_text(*texts: object) -> None:
    """Check that texts are UTF-8: protobuf hands out bytes for those that are not.

    Raises:
        ModelError: If one is not.
    """
    for text in texts:
        if type(text) is not str:
            raise ModelError(f"it holds a name or another text that is not UTF-8, {text!r}; it is damaged.")


def string_map(entries: Sequence[onnx.StringStringEntryProto]) -> dict[str, str] | None:
    """Return key -> value, or None where there is nothing.

    Raises:
        ModelError: If a text is not UTF-8.
    """
    for entry in entries:
        require_text(entry.key, entry.value)
    return {entry.key: entry.value for entry in entries} or None


def data_type(proto: onnx.TensorProto) -> ir.DataType:
    """Return the element type of a tensor.

    Raises:
        ModelError: If it is undefined or unknown.
    """
    if proto.data_type not in _KNOWN_TYPES or not proto.data_type:
        raise ModelError(f'the tensor "{proto.name}" has the element type {proto.data_type}, which does not exist.')
    return ir.DataType(proto.data_type)


def byte_count(dtype: ir.DataType, dims: Sequence[int], label: str) -> int:
    """Return how many bytes a tensor takes; 0 for strings, whose size the shape does not tell.

    Raises:
        ModelError: If a dimension is negative, or the whole is beyond any memory.
    """
    if any(d < 0 for d in dims):
        raise ModelError(f"{label} has the shape {list(dims)}; a dimension cannot be negative.")
    bits = 8 if dtype == ir.DataType.STRING else dtype.bitwidth
    # Zero-size tensors too: NumPy multiplies the other dimensions.
    if math.prod(d for d in dims if d) * bits > _MAX_BYTES:
        raise ModelError(f"{label} has the absurd shape {list(dims)}.")
    return 0 if dtype == ir.DataType.STRING else -(-math.prod(dims) * bits // 8)


def check_data(proto: onnx.TensorProto, dtype: ir.DataType, label: str) -> int:
    """Return how many bytes an embedded tensor takes, having checked that this much data is there.

    Raises:
        ModelError: If data and shape do not fit.
    """
    expected = byte_count(dtype, proto.dims, label)
    if proto.HasField("raw_data"):
        if dtype == ir.DataType.STRING:
            raise ModelError(f"{label} is of strings and stored as raw data, which ONNX does not allow.")
        unit, found = "bytes", len(proto.raw_data)
    else:
        unit = "values"
        found = len(getattr(proto, _FIELD_OF.get(dtype, "int32_data")))
        expected = _stored_values(dtype, math.prod(proto.dims))
    if found != expected:
        raise ModelError(
            f"{label} has the shape {list(proto.dims)} of {dtype.name}, which takes {expected} {unit}, but "
            f"holds {found}: the file is damaged."
        )
    return byte_count(dtype, proto.dims, label)


def _stored_values(dtype: ir.DataType, size: int) -> int:
    """Return how many entries of its typed field a tensor takes: types of 2 and 4 bits share a byte."""
    if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        return 2 * size
    if dtype != ir.DataType.STRING and dtype.bitwidth in (2, 4):
        return -(-size * dtype.bitwidth // 8)
    return size


def check_sparse(proto: onnx.SparseTensorProto, dtype: ir.DataType, label: str) -> None:
    """Check that values, indices and dimensions of a sparse tensor fit together.

    Raises:
        ModelError: If they do not.
    """
    if byte_count(dtype, proto.dims, label) > _MAX_DENSE:
        raise ModelError(f"{label} would take more than 2 GB when it is expanded.")
    for part in (proto.values, proto.indices):
        if part.data_location == onnx.TensorProto.EXTERNAL:
            raise ModelError(f"{label} has external data, which runtimes do not read for sparse tensors.")
        check_data(part, data_type(part), label)
    count, rank = math.prod(proto.values.dims), len(proto.dims)
    if proto.indices.data_type != ir.DataType.INT64 or list(proto.indices.dims) not in ([count], [count, rank]):
        raise ModelError(f"{label} has indices that do not fit its {count} values.")
    indices = ir.serde.TensorProtoTensor(proto.indices).numpy()
    limit = np.array(proto.dims) if indices.ndim == 2 else np.array(math.prod(proto.dims))
    if (indices < 0).any() or (indices >= limit).any():
        raise ModelError(f"{label} has indices outside its shape {list(proto.dims)}.")
