"""What one run of a model costs, estimated from the shapes of its values."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from onnxopt.analysis import dims
from onnxopt.analysis.shapes import Shapes
from onnxopt.graph import STANDARD_DOMAINS, attribute, bodies, constant_ints, has_references

IMAGE_SIDE = 224
"""Assumed for a dynamic axis of an image (rank 4, not the first axis)."""
LENGTH = 128
"""Assumed for any other dynamic axis but the first, which counts as 1."""


@dataclasses.dataclass(frozen=True, slots=True)
class Flops:
    """What one run costs.

    Attributes:
        macs: Multiply-accumulates of convolutions, matrix products, recurrent layers and attention: two
            floating-point operations each.
        elementwise: Operations of all other arithmetic, one for each element computed, or read where fewer are
            computed than read (reductions, normalizations, softmax).
        by_op: (operator, multiply-accumulates), most expensive first.
        assumed: (axis, size) of each dynamic axis of the inputs; an axis without a name stands as "input[index]".
        not_counted: (operator, nodes) whose cost or whose shapes are unknown.
        loops: Bodies of Loop and Scan whose number of runs is not known; they are counted as if they ran once.
    """

    macs: int
    elementwise: int
    by_op: tuple[tuple[str, int], ...]
    assumed: tuple[tuple[str, int], ...]
    not_counted: tuple[tuple[str, int], ...]
    loops: int

    @property
    def total(self) -> int:
        """Floating-point operations: two for each multiply-accumulate, one for everything else."""
        return 2 * self.macs + self.elementwise


Shape = tuple[int, ...]


class UnknownCostError(Exception):
    """The cost of a node cannot be told."""


def count(model: ir.Model, sizes: Mapping[str, int] | None = None) -> Flops:
    """Estimate what one run of a model costs. Reads no weights.

    Functions are counted at each call. Of the branches of an If the more expensive one counts.

    Args:
        model: The model; it is not changed.
        sizes: Sizes of dynamic axes of the inputs: by name, or as "input:index" for an axis without one. For
            others sizes are assumed, which the result states.
    """
    if model.functions:
        model = InlinePass()(model.clone()).model
    shapes = Shapes(model)
    assumed, symbols = _assume(model, shapes, sizes or {})
    bill = _Biller(shapes, symbols).graph(model.graph)
    return Flops(
        macs=sum(bill.macs.values()),
        elementwise=bill.elementwise,
        by_op=_ranked(bill.macs),
        assumed=tuple(assumed.items()),
        not_counted=_ranked(bill.missed),
        loops=bill.loops,
    )


def assumed_sizes(model: ir.Model, shapes: Shapes) -> Sizes:
    """Return the shapes of a model's values with the sizes of dynamic axes that `count` assumes."""
    return Sizes(shapes, _assume(model, shapes, {})[1])


def macs(node: ir.Node, sizes: Sizes) -> int:
    """Return the multiply-accumulates of a node; 0 for one that has none, or whose cost is unknown."""
    cost = _MACS.get(_name(node))
    if cost is None or has_references(node):
        return 0
    try:
        return cost(sizes, node)
    except (UnknownCostError, IndexError):
        return 0


def _name(node: ir.Node) -> str:
    return node.op_type if node.domain in STANDARD_DOMAINS else f"{node.domain}.{node.op_type}"


def _ranked(counts: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


_Symbols = dict[tuple[str, bool], int]
"""Sizes of symbols, which are told apart by their name and by whether the model itself names them."""


def _assume(model: ir.Model, shapes: Shapes, sizes: Mapping[str, int]) -> tuple[dict[str, int], _Symbols]:
    """Choose a size for each dynamic axis of the inputs; axes of one name have one size."""
    assumed: dict[str, int] = {}
    symbols: _Symbols = {}
    for value in model.graph.inputs:
        shape = () if value.is_initializer() else shapes.of(value) or ()
        for axis, dim in enumerate(shape):
            for symbol in dims.symbols(dim):
                if symbol in symbols:
                    continue
                name, nameless = symbol
                place = f"{value.name}:{axis}"
                guess = 1 if axis == 0 else IMAGE_SIDE if len(shape) == 4 else LENGTH
                key = place if nameless else name
                symbols[symbol] = assumed[key] = sizes.get(key, guess)
    return assumed, symbols


@dataclasses.dataclass(slots=True)
class _Bill:
    """What a graph costs so far."""

    macs: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    elementwise: int = 0
    missed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    loops: int = 0

    def add(self, other: _Bill, times: int = 1) -> None:
        for name, macs in other.macs.items():
            self.macs[name] += macs * times
        self.elementwise += other.elementwise * times
        self.missed += other.missed
        self.loops += other.loops

    @property
    def total(self) -> int:
        return 2 * sum(self.macs.values()) + self.elementwise


class Sizes:
    """The shapes of values as numbers."""

    def __init__(self, shapes: Shapes, symbols: _Symbols) -> None:
        """Take what is known about shapes, and the sizes of dynamic axes."""
        self._shapes = shapes
        self._symbols = symbols

    def shape(self, value: ir.Value | None) -> Shape:
        """Return a shape.

        Raises:
            UnknownCostError: If it is not known.
        """
        shape = None if value is None else self._shapes.of(value)
        if shape is None:
            raise UnknownCostError
        try:
            return tuple(dims.evaluate(dim, self._symbols) for dim in shape)
        except (KeyError, ZeroDivisionError):
            raise UnknownCostError from None

    def elements(self, value: ir.Value | None) -> int:
        """Return how many elements a value has.

        Raises:
            UnknownCostError: If its shape is not known.
        """
        return math.prod(self.shape(value))


class _Biller(Sizes):
    """Adds up the costs of nodes."""

    def graph(self, graph: ir.Graph) -> _Bill:
        bill = _Bill()
        for node in graph:
            inner = [self.graph(body) for _, body in bodies(node)]
            if inner:
                self._control(node, inner, bill)
            else:
                self._node(node, bill)
        return bill

    def _control(self, node: ir.Node, inner: list[_Bill], bill: _Bill) -> None:
        if node.op_type == "If":
            bill.add(max(inner, key=lambda each: each.total))
            return
        runs = self._runs(node)
        bill.loops += runs is None
        for each in inner:
            bill.add(each, 1 if runs is None else runs)

    def _runs(self, node: ir.Node) -> int | None:
        """Return how often the body of a Loop or Scan runs, or None where that is not known."""
        if node.op_type == "Loop":
            trips = constant_ints(node.inputs[0]) if node.inputs else None
            return max(0, trips[0]) if trips else None
        if node.op_type == "Scan" and not has_references(node):
            scanned = attribute(node, "num_scan_inputs", 0)
            axes = attribute(node, "scan_input_axes", (0,) * scanned)
            try:
                return self.shape(node.inputs[-scanned])[axes[0]] if scanned else None
            except UnknownCostError:
                return None
        return None

    def _node(self, node: ir.Node, bill: _Bill) -> None:
        name = _name(node)
        try:
            if has_references(node):
                raise UnknownCostError
            if name in _MACS:
                bill.macs[name] += _MACS[name](self, node)
            elif name in _PER_OUTPUT:
                bill.elementwise += self.elements(node.outputs[0])
            elif name in _PER_INPUT:
                bill.elementwise += self.elements(node.inputs[0])
            elif name in _POOLS:
                window = math.prod(attribute(node, "kernel_shape", ()))
                bill.elementwise += self.elements(node.outputs[0]) * window
            elif name not in _FREE:
                raise UnknownCostError
        except (UnknownCostError, IndexError):
            bill.missed[name] += 1


# Multiply-accumulates -------------------------------------------------------------------------------------

Cost = Callable[[Sizes, ir.Node], int]


def _convolution(weight: int) -> Cost:
    def cost(of: Sizes, node: ir.Node) -> int:
        return of.elements(node.outputs[0]) * math.prod(of.shape(node.inputs[weight])[1:])

    return cost


def _transposed_convolution(of: Sizes, node: ir.Node) -> int:
    return of.elements(node.inputs[0]) * math.prod(of.shape(node.inputs[1])[1:])


def _product(of: Sizes, node: ir.Node) -> int:
    left = of.shape(node.inputs[0])
    inner = left[-2] if attribute(node, "transA", 0) and len(left) > 1 else left[-1]
    return of.elements(node.outputs[0]) * inner


def _product_of_blocks(of: Sizes, node: ir.Node) -> int:
    return of.elements(node.outputs[0]) * int(attribute(node, "K", 0))


def _einsum(of: Sizes, node: ir.Node) -> int:
    """Every combination of indices is one multiply-accumulate."""
    equation = str(attribute(node, "equation", "")).replace(" ", "")
    terms = equation.partition("->")[0].split(",")
    if "." in equation or len(terms) != len(node.inputs) or len(terms) > 2:
        raise UnknownCostError
    sizes: dict[str, int] = {}
    for term, value in zip(terms, node.inputs, strict=True):
        sizes.update(zip(term, of.shape(value), strict=False))
    return math.prod(sizes.values())


def _recurrent(gates: int) -> Cost:
    def cost(of: Sizes, node: ir.Node) -> int:
        first, second, _ = of.shape(node.inputs[0])
        directions, rows, features = of.shape(node.inputs[1])
        hidden = rows // gates
        return first * second * directions * gates * hidden * (features + hidden)

    return cost


def _attention(query: Shape, key_length: int, value_width: int, heads: int) -> int:
    """Queries times keys, and the result times values; `value_width` counts all heads of the query together."""
    batch, length = query[0], query[-2]
    width = query[-1] * (heads if len(query) == 4 else 1)
    return batch * length * key_length * (width + value_width)


def _standard_attention(of: Sizes, node: ir.Node) -> int:
    query, key, value = (of.shape(v) for v in node.inputs[:3])
    heads = query[1] if len(query) == 4 else attribute(node, "q_num_heads", 1)
    shared = value[1] if len(value) == 4 else attribute(node, "kv_num_heads", 1)
    head = value[-1] if len(value) == 4 else value[-1] // shared
    past = of.shape(node.inputs[4])[2] if len(node.inputs) > 4 and node.inputs[4] is not None else 0
    return _attention(query, key[-2] + past, head * heads, heads)


def _fused_attention(of: Sizes, node: ir.Node) -> int:
    """The projections to query, key and value, and the attention itself."""
    data, weight = of.shape(node.inputs[0]), of.shape(node.inputs[1])
    hidden = weight[1] // 3
    project = math.prod(data) * weight[1]
    return project + _attention((data[0], data[1], hidden), data[1], hidden, 1)


def _multi_head_attention(of: Sizes, node: ir.Node) -> int:
    query, key, value = (of.shape(v) for v in node.inputs[:3])
    if len(query) != 3:
        raise UnknownCostError
    heads = attribute(node, "num_heads", 1)
    width = value[-1] if len(value) == 3 else value[1] * value[3]
    past = of.shape(node.inputs[6])[2] if len(node.inputs) > 6 and node.inputs[6] is not None else 0
    return _attention(query, key[-2] + past, width, heads)


def _group_query_attention(of: Sizes, node: ir.Node) -> int:
    query, key = of.shape(node.inputs[0]), of.shape(node.inputs[1])
    past = of.shape(node.inputs[3])[2] if len(node.inputs) > 3 and node.inputs[3] is not None else 0
    return _attention(query, key[1] + past, query[-1], attribute(node, "num_heads", 1))


def _microsoft(costs: Mapping[str, Cost]) -> dict[str, Cost]:
    return {f"com.microsoft.{name}": cost for name, cost in costs.items()}


_MACS: dict[str, Cost] = {
    "Conv": _convolution(1),
    "ConvInteger": _convolution(1),
    "QLinearConv": _convolution(3),
    "DeformConv": _convolution(1),
    "ConvTranspose": _transposed_convolution,
    "MatMul": _product,
    "MatMulInteger": _product,
    "QLinearMatMul": _product,
    "Gemm": _product,
    "Einsum": _einsum,
    "RNN": _recurrent(1),
    "GRU": _recurrent(3),
    "LSTM": _recurrent(4),
    "Attention": _standard_attention,
    **_microsoft(
        {
            "FusedConv": _convolution(1),
            "FusedMatMul": _product,
            "FusedGemm": _product,
            "DynamicQuantizeMatMul": _product,
            "MatMulIntegerToFloat": _product,
            "QGemm": _product,
            "MatMulNBits": _product_of_blocks,
            "MatMulBnb4": _product_of_blocks,
            "Attention": _fused_attention,
            "MultiHeadAttention": _multi_head_attention,
            "GroupQueryAttention": _group_query_attention,
        }
    ),
}


def _names(text: str, domain: str = "") -> frozenset[str]:
    return frozenset(f"{domain}{name}" for name in text.split())


_PER_OUTPUT = _names(
    """Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor
    Ceil Celu Clip Cos Cosh CumSum DequantizeLinear Div Elu Equal Erf Exp Floor Gelu Greater
    GreaterOrEqual HardSigmoid HardSwish ImageScaler IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean
    Min Mish Mod Mul Neg Not Or PRelu Pow QuantizeLinear Reciprocal Relu Resize RotaryEmbedding Round
    Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu
    Upsample Where Xor"""
) | _names(
    """BiasAdd BiasGelu BiasSplitGelu EmbedLayerNormalization FastGelu Gelu QLinearAdd QLinearLeakyRelu
    QLinearMul QLinearSigmoid QuickGelu RotaryEmbedding""",
    "com.microsoft.",
)

_PER_INPUT = _names(
    """ArgMax ArgMin BatchNormalization DynamicQuantizeLinear GlobalAveragePool GlobalLpPool GlobalMaxPool
    GroupNormalization Hardmax InstanceNormalization LRN LayerNormalization LogSoftmax LpNormalization
    MeanVarianceNormalization RMSNormalization ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax
    ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare SimplifiedLayerNormalization Softmax"""
) | _names(
    """BiasSoftmax DynamicQuantizeLinear GroupNorm SkipGroupNorm
    SkipLayerNormalization SkipSimplifiedLayerNormalization""",
    "com.microsoft.",
)

_POOLS = _names("AveragePool LpPool MaxPool") | _names("NhwcMaxPool", "com.microsoft.")

_FREE = _names(
    """Cast CastLike Compress Concat ConcatFromSequence Constant ConstantOfShape DepthToSpace Dropout
    Expand EyeLike Flatten Gather GatherElements GatherND Identity NonZero OneHot Optional
    OptionalGetElement OptionalHasElement Pad RandomNormal RandomNormalLike RandomUniform
    RandomUniformLike Range Reshape ReverseSequence Scatter ScatterElements ScatterND SequenceAt
    SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength Shape Size Slice
    SpaceToDepth Split SplitToSequence Squeeze StringNormalizer TensorScatter Tile TopK Transpose Trilu
    Unique Unsqueeze"""
) | _names("ReorderInput ReorderOutput GatherBlockQuantized", "com.microsoft.")
