"""What ONNX Runtime computes in float16 on cuda, and at which inputs and outputs of a node."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx
import onnx_ir as ir

from onnxopt.analysis.shapes import Shapes
from onnxopt.graph import bodies, has_references

KERNELS = frozenset(
    (
        "Abs",
        "Add",
        "ArgMax",
        "ArgMin",
        "AveragePool",
        "BatchNormalization",
        "Cast",
        "Ceil",
        "Clip",
        "Compress",
        "Concat",
        "ConstantOfShape",
        "Conv",
        "ConvTranspose",
        "Cos",
        "CumSum",
        "DepthToSpace",
        "Div",
        "Dropout",
        "Einsum",
        "Elu",
        "Equal",
        "Erf",
        "Exp",
        "Expand",
        "Flatten",
        "Floor",
        "GRU",
        "Gather",
        "GatherElements",
        "GatherND",
        "Gelu",
        "Gemm",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "Greater",
        "GreaterOrEqual",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "InstanceNormalization",
        "IsInf",
        "IsNaN",
        "LRN",
        "LSTM",
        "LayerNormalization",
        "LeakyRelu",
        "Less",
        "LessOrEqual",
        "Log",
        "LogSoftmax",
        "MatMul",
        "Max",
        "MaxPool",
        "Min",
        "Mod",
        "Mul",
        "Neg",
        "NonZero",
        "OneHot",
        "PRelu",
        "Pad",
        "Pow",
        "RMSNormalization",
        "RNN",
        "Reciprocal",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
        "Relu",
        "Reshape",
        "Resize",
        "ReverseSequence",
        "RotaryEmbedding",
        "Round",
        "Scatter",
        "ScatterElements",
        "ScatterND",
        "Selu",
        "Shape",
        "Shrink",
        "Sigmoid",
        "Sign",
        "Sin",
        "Size",
        "Slice",
        "Softmax",
        "Softplus",
        "Softsign",
        "SpaceToDepth",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Sum",
        "Tanh",
        "ThresholdedRelu",
        "Tile",
        "TopK",
        "Transpose",
        "Trilu",
        "Unsqueeze",
        "Upsample",
        "Where",
    )
)
"""Standard operators with a float16 kernel in ONNX Runtime's CUDA provider, after docs/OperatorKernels.md of 1.24."""

CONTRIB: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "Attention": ((0, 1, 2, 4, 5), (0, 1)),
    "BiasGelu": ((0, 1), (0,)),
    "FastGelu": ((0, 1), (0,)),
    "FusedMatMul": ((0, 1), (0,)),
    "Gelu": ((0,), (0,)),
    "MultiHeadAttention": ((0, 1, 2, 3, 5, 6, 7), (0, 1, 2)),
    "QuickGelu": ((0,), (0,)),
    "RotaryEmbedding": ((0, 2, 3), (0,)),
    "SkipLayerNormalization": ((0, 1, 2, 3, 4), (0, 3)),
    "SkipSimplifiedLayerNormalization": ((0, 1, 2, 3), (0, 3)),
}
"""Operators of com.microsoft with one -> (inputs, outputs) whose type it is."""

_ALSO = {"BatchNormalization": ("T", "T1", "T2", "U"), "Pow": ("T", "T1"), "LayerNormalization": ("T",)}
"""Type parameters that turn together, where it is not only that of the first output."""

_SINCE = {"Clip": 12, "MaxPool": 8, "Round": 11}
"""Versions from which the kernel has float16, where the operator's own definition allowed it before."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ports:
    """Where a node takes and gives float32 that can be float16.

    Attributes:
        inputs: Numbers of the inputs.
        outputs: Numbers of the outputs.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def values(self, node: ir.Node) -> list[ir.Value]:
        """Return the values at these places."""
        found = [node.inputs[i] for i in self.inputs]
        return [v for v in found if v is not None] + [node.outputs[i] for i in self.outputs]


def ports(node: ir.Node, opset: int, shapes: Shapes) -> Ports | str:
    """Return where a node can turn to float16, or why it cannot; empty ports where it has no float32 at all.

    Args:
        node: The node.
        opset: Version of the standard operator set.
        shapes: Knows the types of values.
    """
    reals = [v for v in (*node.inputs, *node.outputs) if v is not None and shapes.dtype(v) == ir.DataType.FLOAT]
    if not reals or node.op_type == "Constant":
        return Ports((), ())
    if has_references(node):
        return "its attributes are those of a calling node"
    if next(bodies(node), None) is not None:
        return f"{node.op_type} hands values to graphs inside it, which stay as they are"
    if node.domain == "com.microsoft" and node.op_type in CONTRIB:
        return _those(node, *CONTRIB[node.op_type], shapes)
    if node.domain not in ("", "ai.onnx") or node.op_type not in KERNELS or opset < _SINCE.get(node.op_type, 0):
        return f"{node.op_type} has no float16 kernel on cuda"
    if node.op_type == "Cast":
        return _those(node, (0,), (0,), shapes)
    if "dtype" in node.attributes:
        return f"{node.op_type} names the type of its result"
    return _by_schema(node, opset, shapes)


def _those(node: ir.Node, inputs: tuple[int, ...], outputs: tuple[int, ...], shapes: Shapes) -> Ports | str:
    """Return those of the places where there is float32, or why that is not certain."""
    real: list[list[int]] = []
    for values, places in ((node.inputs, inputs), (node.outputs, outputs)):
        real.append([])
        for index in places:
            value = values[index] if index < len(values) else None
            # An optional output that is left out has no name.
            if value is None or (index and values is node.outputs and not value.name):
                continue
            dtype = shapes.dtype(value)
            if dtype is None:
                return f"the type of one of {node.op_type}'s values is not known"
            if dtype == ir.DataType.FLOAT:
                real[-1].append(index)
    return Ports(tuple(real[0]), tuple(real[1]))


def _by_schema(node: ir.Node, opset: int, shapes: Shapes) -> Ports | str:
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return f"{node.op_type} is not in opset {opset}"
    halves = {c.type_param_str for c in schema.type_constraints if "tensor(float16)" in c.allowed_type_strs}
    ins = [_formal(schema.inputs, i) for i in range(len(node.inputs))]
    outs = [_formal(schema.outputs, i) for i in range(len(node.outputs))]
    turning = set(_ALSO.get(node.op_type, ())) or {_main(node, ins, outs, shapes)}
    if not turning & halves:
        return f"{node.op_type} does not take float16 in opset {opset}"
    found = _those(
        node,
        tuple(i for i, t in enumerate(ins) if t in turning & halves),
        tuple(i for i, t in enumerate(outs) if t in turning & halves),
        shapes,
    )
    if found == Ports((), ()):
        return f"{node.op_type} takes float32 only where float16 is not allowed"
    return found


def _formal(parameters: Sequence[onnx.defs.OpSchema.FormalParameter], index: int) -> str:
    """Return the type parameter at a place; the last one may stand for many."""
    return parameters[min(index, len(parameters) - 1)].type_str if parameters else ""


def _main(node: ir.Node, ins: list[str], outs: list[str], shapes: Shapes) -> str:
    """Return the type parameter of the first output, or of the first real input where the output is of another type."""
    if outs and shapes.dtype(node.outputs[0]) == ir.DataType.FLOAT:
        return outs[0]
    for value, parameter in zip(node.inputs, ins, strict=True):
        if value is not None and shapes.dtype(value) == ir.DataType.FLOAT:
            return parameter
    return ""
