"""Which values have both signs, as far as the operators tell."""

from __future__ import annotations

import onnx_ir as ir

from onnxopt.graph import attribute, is_op

_DEPTH = 24
_LAYERS = frozenset(
    {
        "BatchNormalization", "Conv", "ConvTranspose", "Gemm", "InstanceNormalization", "LayerNormalization", "MatMul",
        "Sub",
    }
)  # fmt: skip
_AS_BEFORE = frozenset(
    {
        "AveragePool", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "GlobalAveragePool", "GlobalMaxPool",
        "Identity", "MaxPool", "ReduceMax", "ReduceMean", "ReduceSum", "Reshape", "Resize", "Slice", "SpaceToDepth",
        "Split", "Squeeze", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
_AS_ALL = frozenset({"Add", "Concat", "Sum"})


def is_signed(value: ir.Value, depth: int = _DEPTH) -> bool:
    """Whether a value is what a layer computes, of either sign, with no activation behind it.

    Of everything else, which may be negative too, rounding to a grid from 0 on is not taken for an activation.
    """
    node = value.producer()
    if node is None or depth == 0:
        return False
    if is_op(node, *_LAYERS):
        return True
    if node.op_type in ("FusedConv", "NhwcFusedConv"):
        return not attribute(node, "activation", "")
    if is_op(node, *_AS_BEFORE):
        return node.inputs[0] is not None and is_signed(node.inputs[0], depth - 1)
    return is_op(node, *_AS_ALL) and any(v is not None and is_signed(v, depth - 1) for v in node.inputs)
