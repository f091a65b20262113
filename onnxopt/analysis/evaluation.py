"""Computing a node whose inputs are constant: in numpy where that is exact, else in the runtime."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.shape_inference import InferenceError, infer_node_outputs

from onnxopt.contract import Evaluate
from onnxopt.graph import constant_tensor
from onnxopt.numeric import kernels
from onnxopt.proto.encode import encode_node

_SMALL_TENSOR = 1024
"""Inputs of up to this many bytes are shown to the shape inference, which needs axes, pads, scales and so on."""

_DATA_DEPENDENT = frozenset(["NonZero", "Unique", "Compress", "NonMaxSuppression"])
"""Operators whose output size depends on values, but is about that of the inputs."""
_MAX_DATA_DEPENDENT = 1 << 20


class NotComputableError(Exception):
    """A node was not computed.

    Attributes:
        reason: Why, in the words of a refusal.
    """

    def __init__(self, reason: str) -> None:
        """Keep the reason."""
        super().__init__(reason)
        self.reason = reason


def compute(
    node: ir.Node, opset: int, evaluate: Evaluate, max_bytes: int, cast_to: ir.DataType | None = None
) -> list[kernels.Array]:
    """Compute a node of the standard domain.

    Args:
        node: Its inputs are constant (of CastLike, the first one).
        opset: Version of the standard operator set.
        evaluate: Computes what there is no numpy kernel for.
        max_bytes: The outputs together may not be larger; their size is worked out before they are.
        cast_to: The type that a CastLike casts to.

    Returns:
        One array per output; one of any content for an output that has no name.

    Raises:
        NotComputableError: If nothing can compute it, or its outputs are not tensors of numbers.
        kernels.TooLargeError: If the outputs would be larger than `max_bytes`.
    """
    if cast_to is not None:
        call = kernels.Call(_arrays(node)[:1], {"to": int(cast_to)}, 1, opset, max_bytes)
        found = kernels.compute("Cast", call)
        if found is None:
            raise NotComputableError("neither onnxopt nor the runtime can compute it")
        return found
    arrays = _arrays(node)
    if node.op_type in kernels.OPERATORS:
        attributes = {name: _plain(a) for name, a in node.attributes.data.items()}
        found = kernels.compute(node.op_type, kernels.Call(arrays, attributes, len(node.outputs), opset, max_bytes))
        if found is not None:
            return found
    return _in_runtime(node, arrays, opset, evaluate, max_bytes)


def _arrays(node: ir.Node) -> list[kernels.Array | None]:
    tensors = [constant_tensor(v) for v in node.inputs]
    return [None if t is None else t.numpy() for t in tensors]


def _plain(attr: ir.Attr) -> Any:
    return attr.value.numpy() if attr.type == ir.AttributeType.TENSOR else attr.value


def _in_runtime(
    node: ir.Node, arrays: Sequence[kernels.Array | None], opset: int, evaluate: Evaluate, max_bytes: int
) -> list[kernels.Array]:
    expected = _expected(node, opset)
    if sum(size for _, size in expected) > max_bytes:
        raise kernels.TooLargeError
    found = evaluate(node, arrays, opset)
    fits = found is not None and all(
        isinstance(array, np.ndarray) and (not output.name or array.dtype == dtype.numpy())
        for array, (dtype, _), output in zip(found, expected, node.outputs, strict=True)
    )
    if found is None or not fits:
        raise NotComputableError("neither onnxopt nor the runtime can compute it")
    return found


def _expected(node: ir.Node, opset: int) -> list[tuple[ir.DataType, int]]:
    """Return (element type, bytes) of each output of a node with constant inputs, before it is computed."""
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    total = 0
    for value in node.inputs:
        tensor = constant_tensor(value)
        if value is None or tensor is None:
            continue
        name = value.name or ""
        types[name] = onnx.helper.make_tensor_type_proto(int(tensor.dtype), list(tensor.shape.numpy()))
        total += tensor.nbytes
        if tensor.nbytes <= _SMALL_TENSOR:
            data[name] = ir.serde.serialize_tensor(tensor)
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
        imports = [onnx.helper.make_opsetid("", opset)]
        inferred = infer_node_outputs(schema, encode_node(node), types, data, opset_imports=imports)
    except (onnx.defs.SchemaError, InferenceError, RuntimeError):
        raise NotComputableError("the size of its result is not known before it is computed") from None
    return [_size_of(inferred.get(o.name or ""), node, total) for o in node.outputs]


def _size_of(proto: onnx.TypeProto | None, node: ir.Node, input_bytes: int) -> tuple[ir.DataType, int]:
    if proto is None:
        # An output without a name is not computed.
        return ir.DataType.UNDEFINED, 0
    if not proto.HasField("tensor_type") or proto.tensor_type.elem_type in (0, onnx.TensorProto.STRING):
        raise NotComputableError("its result is not a tensor of numbers")
    dtype = ir.DataType(proto.tensor_type.elem_type)
    shape = proto.tensor_type.shape
    if proto.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in shape.dim):
        return dtype, math.ceil(math.prod(d.dim_value for d in shape.dim) * dtype.itemsize)
    if node.op_type in _DATA_DEPENDENT and input_bytes <= _MAX_DATA_DEPENDENT:
        return dtype, 0
    raise NotComputableError("the size of its result is not known before it is computed")
