"""Shape rules for layers: products, convolution, pooling, recurrence, attention, images, signals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from onnxopt.analysis import dims
from onnxopt.analysis.dims import Dim
from onnxopt.analysis.shape_view import (
    PartialShape,
    Rule,
    Shape,
    Unknown,
    View,
    broadcast_shapes,
    normalized_axes,
    normalized_axis,
    product_of,
    sum_of,
)
from onnxopt.graph import constant_array

# Products ----------------------------------------------------------------------------------------------


def matmul_shape(a: Shape, b: Shape) -> PartialShape:
    """Return the shape of a matrix product, vectors and stacks of matrices included.

    Raises:
        Unknown: If an operand is a scalar.
    """
    if not a or not b:
        raise Unknown
    stack = broadcast_shapes(a[:-2], b[:-2])
    rows = a[-2:-1] if len(a) > 1 else ()
    columns = b[-1:] if len(b) > 1 else ()
    return None if stack is None else [*stack, *rows, *columns]


def _matmul(view: View) -> list[PartialShape]:
    return [matmul_shape(view.shape(0), view.shape(1))]


def _quantized_matmul(view: View) -> list[PartialShape]:
    return [matmul_shape(view.shape(0), view.shape(3))]


def gemm(view: View) -> list[PartialShape]:
    """Return the shape of a product of two matrices, each maybe transposed."""
    a, b = view.shape(0), view.shape(1)
    if len(a) != 2 or len(b) != 2:
        raise Unknown
    return [(a[1] if view.attribute("transA", 0) else a[0], b[0] if view.attribute("transB", 0) else b[1])]


# Convolution and pooling -------------------------------------------------------------------------------


def conv(weight: int) -> Callable[[View], list[PartialShape]]:
    """Return the rule of a convolution whose weight is this input."""

    def rule(view: View) -> list[PartialShape]:
        data, kernel = view.shape(0), view.shape(weight)
        if len(data) < 3 or len(data) != len(kernel):
            raise Unknown
        windows = _windows(view, view.attribute("kernel_shape") or kernel[2:], len(data) - 2)
        return [(data[0], kernel[0], *(w.conv_size(d) for w, d in zip(windows, data[2:], strict=True)))]

    return rule


class _Window:
    """How a kernel moves along one axis."""

    def __init__(self, kernel: Dim, stride: int, dilation: int, before: int, after: int, auto: str) -> None:
        self.stride = stride
        self.reach = (kernel - 1) * dilation + 1
        self.before = before
        self.after = after
        self.auto = auto

    def conv_size(self, size: Dim) -> Dim:
        """Return how many positions the kernel has."""
        if self.auto.startswith("SAME"):
            return dims.ceildiv(size, self.stride)
        return dims.floordiv(size + self.before + self.after - self.reach, self.stride) + 1

    def ceil_size(self, size: Dim) -> Dim:
        """Return the same when a last, partial position counts too, unless it would start in the padding."""
        if self.auto.startswith("SAME"):
            return dims.ceildiv(size, self.stride)
        count = dims.ceildiv(size + self.before + self.after - self.reach, self.stride) + 1
        if isinstance(self.reach, int) and self.after <= self.reach - self.stride:
            return count
        return dims.minimum(count, dims.ceildiv(size + self.before, self.stride))

    def transposed_size(self, size: Dim, extra: int) -> Dim:
        """Return the size that a transposed convolution spreads to."""
        if self.auto.startswith("SAME"):
            return size * self.stride
        return (size - 1) * self.stride + extra + self.reach - self.before - self.after


def _windows(view: View, kernel: Sequence[Dim], rank: int) -> list[_Window]:
    strides = view.attribute("strides") or (1,) * rank
    dilations = view.attribute("dilations") or (1,) * rank
    auto = view.attribute("auto_pad", "NOTSET")
    pads = view.attribute("pads") if auto == "NOTSET" else None
    pads = pads or (0,) * (2 * rank)
    if not len(kernel) == len(strides) == len(dilations) == rank or len(pads) != 2 * rank:
        raise Unknown
    return [_Window(kernel[i], strides[i], dilations[i], pads[i], pads[rank + i], auto) for i in range(rank)]


def _conv_transpose(view: View) -> list[PartialShape]:
    data, kernel = view.shape(0), view.shape(1)
    rank = len(data) - 2
    if rank < 1 or len(data) != len(kernel):
        raise Unknown
    channels = kernel[1] * view.attribute("group", 1)
    wanted = view.attribute("output_shape")
    if wanted:
        return [(data[0], channels, *wanted[-rank:])]
    extra = view.attribute("output_padding") or (0,) * rank
    windows = _windows(view, view.attribute("kernel_shape") or kernel[2:], rank)
    spatial = [w.transposed_size(d, e) for w, d, e in zip(windows, data[2:], extra, strict=True)]
    return [(data[0], channels, *spatial)]


def _deform_conv(view: View) -> list[PartialShape]:
    data, kernel, offset = view.shape(0), view.shape(1), view.shape(2)
    return [(data[0], kernel[0], *offset[2:])]


def _pool(view: View) -> list[PartialShape]:
    data = view.shape(0)
    return [(*data[:2], *pooled(view, data[2:]))] * 2


def pooled(view: View, places: Shape) -> list[Dim]:
    """Return how many places a window of `kernel_shape` has along each axis that it moves along."""
    kernel = view.attribute("kernel_shape")
    if kernel is None or len(places) != len(kernel):
        raise Unknown
    windows = _windows(view, kernel, len(kernel))
    ceil = view.attribute("ceil_mode", 0)
    return [w.ceil_size(d) if ceil else w.conv_size(d) for w, d in zip(windows, places, strict=True)]


def _global_pool(view: View) -> list[PartialShape]:
    data = view.shape(0)
    return [(*data[:2], *(1,) * (len(data) - 2))]


def _max_unpool(view: View) -> list[PartialShape]:
    data = view.shape(0)
    if view.has(2):
        content = view.content_or_none(2)
        return [content.items if content is not None else [None] * len(data)]
    kernel = view.attribute("kernel_shape")
    windows = _windows(view, kernel, len(kernel))
    return [(*data[:2], *(w.transposed_size(d, 0) for w, d in zip(windows, data[2:], strict=True)))]


def _max_roi_pool(view: View) -> list[PartialShape]:
    return [(view.shape(1)[0], view.shape(0)[1], *view.attribute("pooled_shape"))]


def _roi_align(view: View) -> list[PartialShape]:
    height, width = view.attribute("output_height", 1), view.attribute("output_width", 1)
    return [(view.shape(1)[0], view.shape(0)[1], height, width)]


def _col2im(view: View) -> list[PartialShape]:
    data = view.shape(0)
    image = view.content_or_none(1)
    block = view.content_or_none(2)
    spatial: Sequence[Dim | None] = image.items if image is not None else [None] * (len(data) - 1)
    if len(data) != 3 or image is None:
        raise Unknown
    area = product_of(block.items) if block is not None else None
    return [(data[0], None if area is None else dims.floordiv(data[1], area), *spatial)]


# Normalization -----------------------------------------------------------------------------------------


def _batch_normalization(view: View) -> list[PartialShape]:
    data = view.shape(0)
    return [data, *[view.shape_or_none(3)] * (view.outputs - 1)]


def layer_normalization(view: View) -> list[PartialShape]:
    """Return the shape of the input and those of the statistics over its last axes."""
    data = view.shape(0)
    axis = normalized_axis(view.attribute("axis", -1), len(data))
    statistics = (*data[:axis], *(1,) * (len(data) - axis))
    return [data, statistics, statistics]


def _dynamic_quantize(view: View) -> list[PartialShape]:
    return [view.shape(0), (), ()]


# Recurrence --------------------------------------------------------------------------------------------


def _recurrent(view: View) -> list[PartialShape]:
    data = view.shape(0)
    weights = view.shape_or_none(2)
    directions = 2 if view.attribute("direction", "forward") == "bidirectional" else 1
    hidden: Dim | None = view.attribute("hidden_size")
    if hidden is None:
        hidden = weights[2] if weights is not None and len(weights) == 3 else None
    if len(data) != 3:
        raise Unknown
    if view.attribute("layout", 0):
        batch, steps = data[:2]
        return [(batch, steps, directions, hidden), *[(batch, directions, hidden)] * 2]
    steps, batch = data[:2]
    return [(steps, directions, batch, hidden), *[(directions, batch, hidden)] * 2]


# Attention ---------------------------------------------------------------------------------------------


def _attention(view: View) -> list[PartialShape]:
    query, key, value = view.shape(0), view.shape(1), view.shape(2)
    query_heads, key_heads = view.attribute("q_num_heads"), view.attribute("kv_num_heads")
    if len(query) == 3:
        if not query_heads or not key_heads:
            raise Unknown
        batch, steps, width = value[0], value[1], dims.floordiv(value[2], key_heads)
        result: PartialShape = (query[0], query[1], width * query_heads)
        head = dims.floordiv(key[2], key_heads)
        length = query[1]
    elif len(query) == 4 and len(key) == len(value) == 4:
        batch, key_heads, steps, width = value
        query_heads, length, head = query[1], query[2], key[3]
        result = (query[0], query[1], query[2], width)
    else:
        raise Unknown
    total: Dim | None = steps
    if view.has(4):
        past = view.shape_or_none(4)
        total = sum_of((past[2], key[-2])) if past is not None and len(past) == 4 else None
    return [
        result,
        (batch, key_heads, total, head),
        (batch, key_heads, total, width),
        (query[0], query_heads, length, total),
    ]


def _linear_attention(view: View) -> list[PartialShape]:
    query, key, value = view.shape(0), view.shape(1), view.shape(2)
    query_heads, key_heads = view.attribute("q_num_heads"), view.attribute("kv_num_heads")
    if not query_heads or not key_heads or not len(query) == len(key) == len(value) == 3:
        raise Unknown
    width = dims.floordiv(value[2], key_heads)
    state = (query[0], key_heads, dims.floordiv(key[2], key_heads), width)
    return [(query[0], query[1], width * query_heads), state]


def _causal_conv(view: View) -> list[PartialShape]:
    data, kernel = view.shape(0), view.shape(1)
    return [data, (*data[:2], kernel[-1] - 1)]


# Images ------------------------------------------------------------------------------------------------


def _resize(view: View) -> list[PartialShape]:
    data = view.shape(0)
    scales_at = 1 if len(view.inputs) == 2 else 2  # opset 10 had no region of interest
    axes = normalized_axes(view.attribute("axes") or range(len(data)), len(data))
    result: list[Dim | None] = list(data)
    if view.has(3):
        wanted = view.content_or_none(3)
        kept = view.attribute("keep_aspect_ratio_policy", "stretch") != "stretch"
        sizes: Sequence[Dim | None] = (None,) * len(axes) if wanted is None or kept else wanted.items
    else:
        cropped = view.attribute("coordinate_transformation_mode") == "tf_crop_and_resize"
        sizes = (None,) * len(axes) if cropped else list(_scaled(view, scales_at, [data[a] for a in axes]))
    if len(sizes) != len(axes):
        raise Unknown
    for axis, size in zip(axes, sizes, strict=True):
        result[axis] = size
    return [result]


def _upsample(view: View) -> list[PartialShape]:
    given = view.attribute("scales")
    if given is None and view.attribute("height_scale") is not None:
        given = (1.0, 1.0, view.attribute("height_scale"), view.attribute("width_scale"))
    data = view.shape(0)
    if given is None:
        return [list(_scaled(view, 1, data))]
    if len(given) != len(data):
        raise Unknown
    return [[_scaled_size(d, np.float32(s)) for d, s in zip(data, given, strict=True)]]


def _scaled(view: View, index: int, sizes: Sequence[Dim]) -> Iterator[Dim | None]:
    scales = constant_array(view.input(index), max_bytes=256)
    if scales is None or scales.size != len(sizes):
        yield from (None for _ in sizes)
        return
    for size, scale in zip(sizes, scales.reshape(-1), strict=True):
        yield _scaled_size(size, np.float32(scale))


def _scaled_size(size: Dim, scale: np.float32) -> Dim | None:
    """Return floor(size * scale) as 32-bit floats give it."""
    if scale == 1:
        return size
    if not np.isfinite(scale) or scale <= 0:
        return None
    if isinstance(size, int):
        return math.floor(np.float32(size) * scale)
    # Exact for sizes below 2**24, which axes of images are.
    if float(scale).is_integer():
        return size * int(scale)
    inverse = 1 / float(scale)
    return dims.floordiv(size, int(inverse)) if inverse.is_integer() and math.log2(inverse).is_integer() else None


def _grid_sample(view: View) -> list[PartialShape]:
    return [(*view.shape(0)[:2], *view.shape(1)[1:-1])]


def _affine_grid(view: View) -> list[PartialShape]:
    wanted = view.content_or_none(1)
    if wanted is None:
        raise Unknown
    batch, _, *spatial = wanted.items
    return [(batch, *spatial, len(spatial))]


def _image_decoder(view: View) -> list[PartialShape]:
    return [(None, None, 1 if view.attribute("pixel_format") == "Grayscale" else 3)]


def _determinant(view: View) -> list[PartialShape]:
    return [view.shape(0)[:-2]]


# Signals, losses and text ------------------------------------------------------------------------------


def _dft(view: View) -> list[PartialShape]:
    shape = view.shape(0)
    if view.attribute("inverse", 0) and view.attribute("onesided", 0):
        raise Unknown
    axis = view.attribute("axis")
    if axis is None and view.has(2):
        axis = view.numbers(2)[0]
    if axis is None and len(shape) == 3:
        axis = 1  # the first signal axis by default before opset 20, the last one since
    if axis is None:
        raise Unknown
    axis = normalized_axis(axis, len(shape))
    length: Dim = view.item(1) if view.has(1) else shape[axis]
    bins = dims.floordiv(length, 2) + 1 if view.attribute("onesided", 0) else length
    return [(*shape[:axis], bins, *shape[axis + 1 : -1], 2)]


def _stft(view: View) -> list[PartialShape]:
    signal = view.shape(0)
    step = view.item(1)
    if view.has(3):
        length = view.item(3)
    elif view.has(2):
        length = view.shape(2)[0]
    else:
        length = signal[1]
    bins = dims.floordiv(length, 2) + 1 if view.attribute("onesided", 1) else length
    return [(signal[0], dims.floordiv(signal[1] - length, step) + 1, bins, 2)]


def _mel_matrix(view: View) -> list[PartialShape]:
    return [(dims.floordiv(view.item(1), 2) + 1, view.item(0))]


def _loss(view: View) -> list[PartialShape]:
    unreduced = view.attribute("reduction", "mean") == "none"
    return [view.shape(1) if unreduced else (), view.shape_or_none(0)]


def _tf_idf(view: View) -> list[PartialShape]:
    shape = view.shape(0)
    return [(*shape[:-1], max(view.attribute("ngram_indexes")) + 1)]


def _string_split(view: View) -> list[PartialShape]:
    shape = view.shape(0)
    return [(*shape, None), shape]


_POOL = Rule(_pool)
_GLOBAL_POOL = Rule(_global_pool)
_RECURRENT = Rule(_recurrent)
_LOSS = Rule(_loss)
_LAYER_NORMALIZATION = Rule(layer_normalization)

RULES: dict[str, Rule] = {
    "AffineGrid": Rule(_affine_grid, (1,)),
    "Attention": Rule(_attention),
    "AveragePool": _POOL,
    "BatchNormalization": Rule(_batch_normalization),
    "CausalConvWithState": Rule(_causal_conv),
    "Col2Im": Rule(_col2im, (1, 2)),
    "Conv": Rule(conv(1)),
    "ConvInteger": Rule(conv(1)),
    "ConvTranspose": Rule(_conv_transpose),
    "DFT": Rule(_dft, (1, 2)),
    "DeformConv": Rule(_deform_conv),
    "Det": Rule(_determinant),
    "DynamicQuantizeLinear": Rule(_dynamic_quantize),
    "GRU": _RECURRENT,
    "Gemm": Rule(gemm),
    "GlobalAveragePool": _GLOBAL_POOL,
    "GlobalLpPool": _GLOBAL_POOL,
    "GlobalMaxPool": _GLOBAL_POOL,
    "GridSample": Rule(_grid_sample),
    "ImageDecoder": Rule(_image_decoder),
    "LSTM": _RECURRENT,
    "LayerNormalization": _LAYER_NORMALIZATION,
    "LinearAttention": Rule(_linear_attention),
    "LpPool": _POOL,
    "MatMul": Rule(_matmul),
    "MatMulInteger": Rule(_matmul),
    "MaxPool": _POOL,
    "MaxRoiPool": Rule(_max_roi_pool),
    "MaxUnpool": Rule(_max_unpool, (2,)),
    "MelWeightMatrix": Rule(_mel_matrix, (0, 1)),
    "NegativeLogLikelihoodLoss": _LOSS,
    "QLinearConv": Rule(conv(3)),
    "QLinearMatMul": Rule(_quantized_matmul),
    "RMSNormalization": _LAYER_NORMALIZATION,
    "RNN": _RECURRENT,
    "Resize": Rule(_resize, (3,)),
    "RoiAlign": Rule(_roi_align),
    "STFT": Rule(_stft, (1, 3)),
    "SimplifiedLayerNormalization": _LAYER_NORMALIZATION,
    "SoftmaxCrossEntropyLoss": _LOSS,
    "StringSplit": Rule(_string_split),
    "TfIdfVectorizer": Rule(_tf_idf),
    "Upsample": Rule(_upsample),
}
