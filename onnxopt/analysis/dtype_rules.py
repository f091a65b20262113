"""Element types of outputs, for values whose type no one declared."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import onnx_ir as ir

from onnxopt.analysis.shape_rules_control import body_of

Source: TypeAlias = ir.DataType | ir.Value | None
"""A type, or a value that has the same one."""


def output_type(node: ir.Node, index: int) -> Source:
    """Return the element type of an output of the node, or a value that shares it; None when unknown."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    rule = _RULES.get((domain, node.op_type, index))
    if rule is None:
        rule = _RULES.get((domain, node.op_type, None))
    if rule is None or any(a.is_ref() for a in node.attributes.values()):
        return None
    return rule(node)


_DtypeRule: TypeAlias = Callable[[ir.Node], Source]


def _always(dtype: ir.DataType) -> _DtypeRule:
    return lambda node: dtype


def _input(index: int) -> _DtypeRule:
    return lambda node: node.inputs[index] if index < len(node.inputs) else None


def _first(node: ir.Node) -> Source:
    """Return an operand of known type, since all share one."""
    given = [value for value in node.inputs if value is not None]
    return next((v for v in given if v.type is not None), given[0] if given else None)


def _named(name: str, otherwise: _DtypeRule) -> _DtypeRule:
    """Return the rule of an operator whose attribute may name the type."""

    def rule(node: ir.Node) -> Source:
        found = node.attributes.get(name)
        if found is None or not isinstance(found.value, int) or found.value == 0:
            return otherwise(node)
        return ir.DataType(found.value)

    return rule


def _nothing(node: ir.Node) -> Source:
    return None


def _filled(node: ir.Node) -> Source:
    fill = node.attributes.get("value")
    return ir.DataType.FLOAT if fill is None else fill.as_tensor().dtype


def _constant(node: ir.Node) -> Source:
    for name, attribute in node.attributes.items():
        if name == "value":
            dtype: ir.DataType = attribute.value.dtype
            return dtype
        if name in _LITERALS:
            return _LITERALS[name]
    return None


_LITERALS = {
    "value_float": ir.DataType.FLOAT,
    "value_floats": ir.DataType.FLOAT,
    "value_int": ir.DataType.INT64,
    "value_ints": ir.DataType.INT64,
    "value_string": ir.DataType.STRING,
    "value_strings": ir.DataType.STRING,
}


def _quantized(node: ir.Node) -> Source:
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    return ir.DataType.UINT8 if zero is None else zero


def _member(node: ir.Node) -> Source:
    """Return a tensor that went into the sequence, where what made it is in sight."""
    maker = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if maker is None or maker.op_type not in ("SplitToSequence", "SequenceConstruct") or not maker.inputs:
        return None
    return maker.inputs[0]


def _branch(index: int) -> _DtypeRule:
    def rule(node: ir.Node) -> Source:
        body = body_of(node, "then_branch")
        return body.outputs[index] if body is not None and index < len(body.outputs) else None

    return rule


_FLOAT, _BOOL, _INT64 = ir.DataType.FLOAT, ir.DataType.BOOL, ir.DataType.INT64
_INT32, _UINT8 = ir.DataType.INT32, ir.DataType.UINT8

_OF_FIRST_INPUT = """
Abs Acos Acosh Add ArrayFeatureExtractor Asin Asinh Atan Atanh AveragePool BatchNormalization BitShift
BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CausalConvWithState Ceil Celu CenterCropPad Clip Col2Im Compress
Concat Conv ConvTranspose Cos Cosh CumProd CumSum DFT DeformConv DepthToSpace Det Div Dropout Einsum Elu Erf Exp
Expand Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool
GridSample GroupNormalization HardSigmoid HardSwish Hardmax Identity InstanceNormalization LRN LSTM
LayerNormalization LeakyRelu LinearAttention Log LogSoftmax LpNormalization LpPool MatMul Max MaxPool MaxRoiPool
MaxUnpool Mean MeanVarianceNormalization Min Mish Mod Mul Neg NegativeLogLikelihoodLoss PRelu Pad Pow
RMSNormalization RNN Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean
ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign RotaryEmbedding
Round STFT Scatter ScatterElements ScatterND Selu Shrink Sigmoid Sign SimplifiedLayerNormalization Sin Sinh
Slice Softmax SoftmaxCrossEntropyLoss Softplus Softsign SpaceToDepth Split Sqrt Squeeze StringConcat
StringNormalizer StringSplit Sub Sum SwiGLU Swish Tan Tanh TensorScatter ThresholdedRelu Tile TopK Transpose
Trilu Unique Unsqueeze Upsample
"""
_OF_ANY_INPUT = "Add Concat Div Gemm MatMul Max Mean Min Mul Sub Sum"
_TRUTH = """
And Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not OptionalHasElement Or RegexFullMatch Xor
"""
_COUNTS = "ArgMax ArgMin NonMaxSuppression NonZero SequenceLength Shape Size"
_WINDOWS = "BlackmanWindow HammingWindow HannWindow MelWeightMatrix"
_CONTRIB_OF_FIRST_INPUT = """
Attention BiasAdd BiasGelu BiasSoftmax DynamicQuantizeMatMul FastGelu FusedConv FusedGemm FusedMatMul Gelu
GroupNorm GroupQueryAttention LayerNormalization MatMulNBits MoE MultiHeadAttention NhwcMaxPool QLinearAdd
QLinearLeakyRelu QLinearMul QLinearSigmoid QLinearSoftmax QMoE QuickGelu RotaryEmbedding SimplifiedLayerNormalization
SkipGroupNorm SkipLayerNormalization SkipSimplifiedLayerNormalization TransposeMatMul Trilu
"""

_RULES: dict[tuple[str, str, int | None], _DtypeRule] = {
    # (domain, operator, output or None for every other) -> rule
    **{("", op, None): _input(0) for op in _OF_FIRST_INPUT.split()},
    **{("", op, None): _first for op in _OF_ANY_INPUT.split()},
    **{("", op, None): _always(_BOOL) for op in _TRUTH.split()},
    **{("", op, None): _always(_INT64) for op in _COUNTS.split()},
    **{("", op, None): _named("output_datatype", _always(_FLOAT)) for op in _WINDOWS.split()},
    **{("", "If", i): _branch(i) for i in range(16)},
    ("", "Attention", None): _input(0),
    ("", "Attention", 1): _input(1),
    ("", "Attention", 2): _input(2),
    **{("", "BatchNormalization", i): _input(3) for i in (1, 2)},
    ("", "Bernoulli", None): _named("dtype", _input(0)),
    ("", "BitCast", None): _named("to", _nothing),
    ("", "Cast", None): _named("to", _nothing),
    ("", "CastLike", None): _input(1),
    ("", "Constant", None): _constant,
    ("", "ConstantOfShape", None): _filled,
    ("", "ConvInteger", None): _always(_INT32),
    ("", "DequantizeLinear", None): _named("output_dtype", _input(1)),
    # Before opset 10 the mask was a number.
    ("", "Dropout", 1): _nothing,
    ("", "DynamicQuantizeLinear", None): _always(_UINT8),
    ("", "DynamicQuantizeLinear", 1): _always(_FLOAT),
    ("", "EyeLike", None): _named("dtype", _input(0)),
    ("", "ImageDecoder", None): _always(_UINT8),
    **{("", "LayerNormalization", i): _named("stash_type", _always(_FLOAT)) for i in (1, 2)},
    ("", "MatMulInteger", None): _always(_INT32),
    ("", "MaxPool", 1): _always(_INT64),
    ("", "Multinomial", None): _named("dtype", _always(_INT32)),
    ("", "OneHot", None): _input(2),
    ("", "QLinearConv", None): _input(7),
    ("", "QLinearMatMul", None): _input(7),
    ("", "QuantizeLinear", None): _named("output_dtype", _quantized),
    ("", "RandomNormal", None): _named("dtype", _always(_FLOAT)),
    ("", "RandomNormalLike", None): _named("dtype", _input(0)),
    ("", "RandomUniform", None): _named("dtype", _always(_FLOAT)),
    ("", "RandomUniformLike", None): _named("dtype", _input(0)),
    ("", "SequenceAt", None): _member,
    ("", "StringSplit", 1): _always(_INT64),
    ("", "TfIdfVectorizer", None): _always(_FLOAT),
    ("", "TopK", 1): _always(_INT64),
    **{("", "Unique", i): _always(_INT64) for i in (1, 2, 3)},
    ("", "Where", None): _input(1),
    **{("com.microsoft", op, None): _input(0) for op in _CONTRIB_OF_FIRST_INPUT.split()},
    ("com.microsoft", "DequantizeLinear", None): _input(1),
    ("com.microsoft", "EmbedLayerNormalization", None): _input(2),
    ("com.microsoft", "EmbedLayerNormalization", 1): _always(_INT32),
    ("com.microsoft", "MatMulIntegerToFloat", None): _input(2),
    ("com.microsoft", "QAttention", None): _input(2),
    ("com.microsoft", "QuantizeLinear", None): _quantized,
    **{
        ("com.microsoft", op, i): _always(_FLOAT)
        for op in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
        for i in (1, 2)
    },
}
