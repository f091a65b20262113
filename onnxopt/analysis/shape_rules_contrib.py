"""Shape rules for operators of ONNX Runtime's com.microsoft domain."""

from __future__ import annotations

from onnxopt.analysis import dims
from onnxopt.analysis.dims import Dim
from onnxopt.analysis.shape_rules_nn import conv, gemm, layer_normalization, matmul_shape, pooled
from onnxopt.analysis.shape_view import PartialShape, Rule, Shape, Unknown, View, broadcast_shapes, sum_of


def _like_input(view: View) -> list[PartialShape]:
    return [view.shape(0)]


def _swapped(shape: Shape) -> Shape:
    return (*shape[:-2], shape[-1], shape[-2]) if len(shape) > 1 else shape


def _fused_matmul(view: View) -> list[PartialShape]:
    if view.attribute("transBatchA", 0) or view.attribute("transBatchB", 0):
        raise Unknown
    a, b = view.shape(0), view.shape(1)
    a = _swapped(a) if view.attribute("transA", 0) else a
    b = _swapped(b) if view.attribute("transB", 0) else b
    return [matmul_shape(a, b)]


def _matmul(view: View) -> list[PartialShape]:
    return [matmul_shape(view.shape(0), view.shape(1))]


def _matmul_bits(view: View) -> list[PartialShape]:
    return [(*view.shape(0)[:-1], view.attribute("N"))]


def _skip_normalization(view: View) -> list[PartialShape]:
    # The second operand may be stretched to the first, never the other way round.
    return [view.shape(0), None, None, view.shape(0)]


def _embed_normalization(view: View) -> list[PartialShape]:
    ids, words = view.shape(0), view.shape(2)
    embedded = (*ids, words[-1])
    return [embedded, ids[:1], embedded]


def _attention(view: View) -> list[PartialShape]:
    data, weights = view.shape(0), view.shape(1)
    if len(data) != 3 or len(weights) != 2:
        raise Unknown
    parts = view.attribute("qkv_hidden_sizes")
    width: Dim = parts[2] if parts else dims.floordiv(weights[1], 3)
    return [(data[0], data[1], width), _fused_cache(view, data, width, parts)]


def _fused_cache(view: View, data: Shape, width: Dim, parts: object) -> PartialShape:
    """Return the shape of keys and values stacked: 2, batch, heads, steps, head size."""
    heads = view.attribute("num_heads")
    if view.has(4) or not heads or parts or view.attribute("past_present_share_buffer", 0):
        return [2, data[0], heads, None, None]
    return [2, data[0], heads, data[1], dims.floordiv(width, heads)]


def _multi_head_attention(view: View) -> list[PartialShape]:
    query = view.shape(0)
    heads = view.attribute("num_heads")
    if len(query) == 5:  # query, key and value packed: batch, steps, heads, 3, head size
        batch, steps, count, _, head = query
        return [(batch, steps, count * head), None, None]
    key, value = view.shape_or_none(1), view.shape_or_none(2)
    if len(query) != 3 or key is None or not heads:
        raise Unknown
    if len(key) == 5:  # key and value packed
        return [(query[0], query[1], key[2] * key[4]), None, None]
    if value is None:
        raise Unknown
    width = value[1] * value[3] if len(value) == 4 else value[2]
    steps = key[2] if len(key) == 4 else key[1]
    total: Dim | None = steps
    if view.has(6):
        past = view.shape_or_none(6)
        total = sum_of((past[2], steps)) if past is not None and len(key) == 3 and not view.has(8) else None
    sizes = dims.floordiv(query[2], heads), dims.floordiv(width, heads)
    return [(query[0], query[1], width), *((query[0], heads, total, size) for size in sizes)]


def _group_query_attention(view: View) -> list[PartialShape]:
    query = view.shape(0)
    heads, key_heads = view.attribute("num_heads"), view.attribute("kv_num_heads")
    if len(query) != 3 or not heads or not key_heads:
        raise Unknown
    head = dims.floordiv(query[2], heads if view.has(1) else heads + 2 * key_heads)
    cache = (query[0], key_heads, None, head)
    return [(query[0], query[1], head * heads), cache, cache]


def _pool_last(view: View) -> list[PartialShape]:
    data = view.shape(0)
    return [(data[0], *pooled(view, data[1:-1]), data[-1])]


def _quantized_attention(view: View) -> list[PartialShape]:
    data, weights = view.shape(0), view.shape(1)
    return [(data[0], data[1], dims.floordiv(weights[1], 3)), None]


def _quantized_binary(view: View) -> list[PartialShape]:
    return [broadcast_shapes(view.shape(0), view.shape(3))]


def _quantized_gemm(view: View) -> list[PartialShape]:
    a, b = view.shape(0), view.shape(3)
    a = _swapped(a) if view.attribute("transA", 0) else a
    return [matmul_shape(a, _swapped(b) if view.attribute("transB", 0) else b)]


_LIKE_INPUT = Rule(_like_input)
_MATMUL = Rule(_matmul)
_SKIP_NORMALIZATION = Rule(_skip_normalization)
_LAYER_NORMALIZATION = Rule(layer_normalization)

_UNCHANGED = """
BiasAdd BiasDropout BiasGelu BiasSoftmax BitmaskDropout DequantizeLinear FastGelu Gelu GroupNorm MoE
QLinearLeakyRelu QLinearSigmoid QLinearSoftmax QMoE QuantizeLinear QuickGelu RotaryEmbedding SkipGroupNorm Trilu
"""

RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNCHANGED.split(), _LIKE_INPUT),
    "Attention": Rule(_attention),
    "DynamicQuantizeMatMul": _MATMUL,
    "EmbedLayerNormalization": Rule(_embed_normalization),
    "FusedConv": Rule(conv(1)),
    "FusedGemm": Rule(gemm),
    "FusedMatMul": Rule(_fused_matmul),
    "GroupQueryAttention": Rule(_group_query_attention),
    "LayerNormalization": _LAYER_NORMALIZATION,
    "MatMulInteger16": _MATMUL,
    "MatMulIntegerToFloat": _MATMUL,
    "MatMulNBits": Rule(_matmul_bits),
    "MultiHeadAttention": Rule(_multi_head_attention),
    "NhwcMaxPool": Rule(_pool_last),
    "QAttention": Rule(_quantized_attention),
    "QGemm": Rule(_quantized_gemm),
    "QLinearAdd": Rule(_quantized_binary),
    "QLinearMul": Rule(_quantized_binary),
    "SimplifiedLayerNormalization": _LAYER_NORMALIZATION,
    "SkipLayerNormalization": _SKIP_NORMALIZATION,
    "SkipSimplifiedLayerNormalization": _SKIP_NORMALIZATION,
    "TransposeMatMul": Rule(_fused_matmul),
}
