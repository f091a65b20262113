"""Types and shapes, from protobuf to the IR."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from onnxopt.errors import ModelError
from onnxopt.proto.checks import require_text


def type_attribute(proto: onnx.TypeProto, name: str) -> ir.TypeAndShape:
    """Return the value of an attribute that holds a type.

    Raises:
        ModelError: If the IR cannot express it.
    """
    kind = type_of(proto)
    if kind is None and proto.WhichOneof("value") is not None:
        raise ModelError(f'the attribute "{name}" holds a map, opaque or incomplete type, which is not supported.')
    return ir.TypeAndShape(kind, shape_of(proto))


def type_of(proto: onnx.TypeProto) -> ir.TypeProtocol | None:
    """Return the type, or None where the IR cannot express it."""
    which = proto.WhichOneof("value")
    require_text(proto.denotation)
    denotation = proto.denotation or None
    if which in ("tensor_type", "sparse_tensor_type"):
        leaf = getattr(proto, which)
        if not leaf.HasField("elem_type"):
            return None
        try:
            dtype = ir.DataType(leaf.elem_type)
        except ValueError:
            raise ModelError(f"a value has the element type {leaf.elem_type}, which does not exist.") from None
        return (ir.TensorType if which == "tensor_type" else ir.SparseTensorType)(dtype, denotation=denotation)
    if which in ("sequence_type", "optional_type"):
        inner = type_of(getattr(proto, which).elem_type)
        if inner is None:
            return None
        return (ir.SequenceType if which == "sequence_type" else ir.OptionalType)(inner, denotation=denotation)
    return None


def shape_of(proto: onnx.TypeProto) -> ir.Shape | None:
    """Return the shape of a tensor, or of the tensors in a sequence or optional."""
    which = proto.WhichOneof("value")
    if which in ("tensor_type", "sparse_tensor_type"):
        leaf = getattr(proto, which)
        return _dims(leaf.shape) if leaf.HasField("shape") else None
    if which in ("sequence_type", "optional_type"):
        return shape_of(getattr(proto, which).elem_type)
    return None


def _dims(proto: onnx.TensorShapeProto) -> ir.Shape:
    dims: list[int | str | None] = []
    for dim in proto.dim:
        which = dim.WhichOneof("value")
        require_text(dim.dim_param, dim.denotation)
        dims.append(dim.dim_value if which == "dim_value" else dim.dim_param or None)
    return ir.Shape(dims, denotations=[dim.denotation or None for dim in proto.dim])
