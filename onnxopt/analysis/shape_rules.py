"""How output shapes follow from inputs, operator by operator: elementwise, reductions and data movement.

`RULES` is the whole table, the rules of the neighbouring modules included: domain -> operator -> rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.analysis import dims, shape_rules_contrib, shape_rules_control, shape_rules_nn
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
    tensor_shape,
)
from onnxopt.graph import OPEN_END, constant_array, constant_ints, is_op


def _same(view: View) -> list[PartialShape]:
    return [view.shape(0)] * view.outputs


def _elementwise(view: View) -> list[PartialShape]:
    if view.attribute("broadcast"):  # before opset 7 the second operand was stretched to the first
        return [view.shape(0)]
    return [broadcast_shapes(*(view.shape_or_none(i) for i in range(len(view.inputs))))]


def _scalar(_: View) -> list[PartialShape]:
    return [()]


# Reductions --------------------------------------------------------------------------------------------


def _reduce(view: View) -> list[PartialShape]:
    shape = view.shape(0)
    keep = view.attribute("keepdims", 1)
    try:
        axes = view.axes(1)
    except Unknown:
        return [_reduced_somewhere(view, len(shape), keep)]
    if not axes:
        if view.attribute("noop_with_empty_axes", 0):
            return [shape]
        axes = tuple(range(len(shape)))
    return [_reduced(shape, normalized_axes(axes, len(shape)), keep)]


def _reduced(shape: Shape, axes: Iterable[int], keep: int) -> PartialShape:
    gone = set(axes)
    if keep:
        return [1 if axis in gone else dim for axis, dim in enumerate(shape)]
    return [dim for axis, dim in enumerate(shape) if axis not in gone]


def _reduced_somewhere(view: View, rank: int, keep: int) -> PartialShape:
    """Return the shape of a reduction over axes that are computed."""
    count = view.shape(1)[0] if len(view.shape(1)) == 1 else None
    if keep:
        return [None] * rank
    # Without any axis all of them go.
    return [None] * (rank - count) if isinstance(count, int) and 0 < count <= rank else None


def _arg_reduce(view: View) -> list[PartialShape]:
    shape = view.shape(0)
    axis = normalized_axis(view.attribute("axis", 0), len(shape))
    return [_reduced(shape, (axis,), view.attribute("keepdims", 1))]


# Shapes as data ----------------------------------------------------------------------------------------


def _shape(view: View) -> list[PartialShape]:
    rank = len(view.shape(0))
    return [(len(range(rank)[slice(view.attribute("start", 0), view.attribute("end"))]),)]


def _reshape(view: View) -> list[PartialShape]:
    fixed = view.attribute("shape")  # opset 1
    source = view.shape_or_none(0)
    targets: Sequence[Dim | None] = fixed if fixed is not None else _wanted_sizes(view, 1)
    copies = fixed is not None or not view.attribute("allowzero", 0)
    result: list[Dim | None] = []
    open_axes: list[int] = []
    inferred = False
    for axis, target in enumerate(targets):
        size = target
        if target == 0 and copies:
            size = source[axis] if source is not None and axis < len(source) else None
        elif target == -1:
            size, inferred = None, True
        elif target is not None and not view.knowledge.nonneg(target):
            size = None
        if size is None:
            open_axes.append(axis)
        result.append(size)
    if source is not None and len(open_axes) == 1:
        others = dims.product(d for d in result if d is not None)
        # With a -1 the others are not 0, or the model would not run. A size that is only unknown may be anything.
        if (inferred and others != 0) or dims.provably_positive(others):
            result[open_axes[0]] = dims.floordiv(dims.product(source), others)
    return [result]


def _wanted_sizes(view: View, index: int) -> tuple[Dim | None, ...]:
    """Return a shape given as an input: at least its rank, if that is known."""
    content = view.content_or_none(index)
    if content is not None:
        return content.items
    length = view.shape(index)
    if len(length) != 1 or not isinstance(length[0], int):
        raise Unknown
    return (None,) * length[0]


def _expand(view: View) -> list[PartialShape]:
    return [broadcast_shapes(view.shape_or_none(0), _wanted_sizes(view, 1))]


def _constant_of_shape(view: View) -> list[PartialShape]:
    return [_wanted_sizes(view, 0)]


def _range(view: View) -> list[PartialShape]:
    try:
        start, limit, step = (view.item(i) for i in range(3))
    except Unknown:
        return [(_float_range(view),)]
    if not isinstance(step, int) or step == 0:
        return [(None,)]
    return [(dims.positive_part(dims.ceildiv(limit - start, step)),)]


def _float_range(view: View) -> int | None:
    arrays = [constant_array(view.input(i), max_bytes=16) for i in range(3)]
    if any(a is None or a.dtype not in (np.float32, np.float64) for a in arrays):
        return None
    start, limit, step = (a.reshape(()) for a in arrays if a is not None)
    if step == 0 or not np.isfinite([start, limit, step]).all():
        return None
    return max(math.ceil(float(limit - start) / float(step)), 0)


def _nonzero(view: View) -> list[PartialShape]:
    shape = view.shape(0)
    if not shape:
        return [(None, None)]
    return [(len(shape), dims.product(shape) if _all_nonzero(view.input(0)) else None)]


def _all_nonzero(value: ir.Value) -> bool:
    """Whether the value is filled with one number other than 0, as exporters write a range."""
    node = value.producer()
    if node is None or not is_op(node, "ConstantOfShape"):
        return False
    fill = node.attributes.get("value")
    if fill is None or fill.is_ref():
        return False
    array = fill.as_tensor().numpy()
    return array.dtype.kind in "iufb" and bool((array != 0).all())


# Moving data -------------------------------------------------------------------------------------------


def _flatten(view: View) -> list[PartialShape]:
    shape = view.shape(0)
    axis = view.attribute("axis", 1)
    if not -len(shape) <= axis <= len(shape):
        raise Unknown
    axis = axis + len(shape) if axis < 0 else axis
    return [(dims.product(shape[:axis]), dims.product(shape[axis:]))]


def _squeeze(view: View) -> list[PartialShape]:
    shape = view.shape(0)
    if not view.has(1) and view.attribute("axes") is None:
        if not all(d == 1 or dims.provably_different(d, 1) for d in shape):
            raise Unknown
        return [[d for d in shape if d != 1]]
    try:
        axes = view.axes(1)
    except Unknown:
        return [[None] * (len(shape) - _count(view, 1))]
    gone = set(normalized_axes(axes or (), len(shape)))
    return [[d for axis, d in enumerate(shape) if axis not in gone]]


def _unsqueeze(view: View) -> list[PartialShape]:
    shape = view.shape(0)
    try:
        axes = view.axes(1)
    except Unknown:
        return [[None] * (len(shape) + _count(view, 1))]
    rank = len(shape) + len(axes or ())
    new = set(normalized_axes(axes or (), rank))
    if len(new) + len(shape) != rank:
        raise Unknown
    rest = iter(shape)
    return [[1 if axis in new else next(rest) for axis in range(rank)]]


def _count(view: View, index: int) -> int:
    """Return how many elements a computed list of axes has."""
    shape = view.shape(index)
    if not shape:
        return 1
    if len(shape) != 1 or not isinstance(shape[0], int):
        raise Unknown
    return shape[0]


def _transpose(view: View) -> list[PartialShape]:
    shape = view.shape(0)
    order = view.attribute("perm") or tuple(reversed(range(len(shape))))
    if sorted(order) != list(range(len(shape))):
        raise Unknown
    return [[shape[axis] for axis in order]]


def _concat(view: View) -> list[PartialShape]:
    shapes = [view.shape_or_none(i) for i in range(len(view.inputs)) if view.has(i)]
    known = [s for s in shapes if s is not None]
    if not known or len({len(s) for s in known}) != 1:
        raise Unknown
    axis = normalized_axis(view.attribute("axis", 1), len(known[0]))
    result: list[Dim | None] = [unified(sizes) for sizes in zip(*known, strict=True)]
    result[axis] = sum_of(s[axis] for s in known) if len(known) == len(shapes) else None
    return [result]


def unified(sizes: Iterable[Dim]) -> Dim:
    """Return the plainest of sizes that must be equal for the model to run."""
    return min(sizes, key=lambda d: (not isinstance(d, int), dims.is_opaque(d), dims.size(d)))


def _split(view: View) -> list[PartialShape]:
    shape = view.shape(0)
    axis = normalized_axis(view.attribute("axis", 0), len(shape))
    parts: Sequence[Dim | None] | None = view.attribute("split")
    if parts is None and view.has(1):
        content = view.content_or_none(1)
        parts = content.items if content is not None else (None,) * view.outputs
    if parts is None:
        parts = _equal_parts(shape[axis], view.attribute("num_outputs", view.outputs))
    return [(*shape[:axis], part, *shape[axis + 1 :]) for part in parts]


def _equal_parts(size: Dim, count: int) -> list[Dim]:
    part = dims.ceildiv(size, count)
    return [part] * (count - 1) + [size - part * (count - 1)]


def _slice(view: View) -> list[PartialShape]:
    shape = view.shape(0)
    steps: Sequence[Dim | None] | None = None
    if view.attribute("starts") is not None:  # opset 1
        starts, ends, given = (view.attribute(name) for name in ("starts", "ends", "axes"))
    else:
        try:
            given = view.numbers(3) if view.has(3) else None
        except Unknown:
            return [[None] * len(shape)]
        starts, ends = _sliced(view, 1), _sliced(view, 2)
        steps = _sliced(view, 4) if view.has(4) else None
    axes = normalized_axes(range(len(starts)) if given is None else given, len(shape))
    steps = [1] * len(axes) if steps is None else steps
    if not len(starts) == len(ends) == len(axes) == len(steps):
        raise Unknown
    result: list[Dim | None] = list(shape)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        result[axis] = _slice_length(view, shape[axis], start, end, step)
    return [result]


def _sliced(view: View, index: int) -> tuple[Dim | None, ...]:
    content = view.content_or_none(index)
    if content is not None:
        return content.items
    if view.has(3):  # which axes are cut is still known
        return (None,) * _count(view, 3)
    return (None,) * _count(view, index)


def _slice_length(view: View, size: Dim, start: Dim | None, end: Dim | None, step: Dim | None) -> Dim | None:
    if start is None or end is None or not isinstance(step, int) or step == 0:
        return None
    if step < 0 and isinstance(end, int) and end >= OPEN_END:
        return None  # nothing by the standard, all that is left in ONNX Runtime
    high = size if step > 0 else size - 1
    first = _clamped(view, start, size, dims.minimum(0, high), high)
    last = _clamped(view, end, size, 0 if step > 0 else -1, high)
    if first is None or last is None:
        return None
    if step > 0:
        return dims.positive_part(dims.ceildiv(last - first, step))
    return dims.positive_part(dims.ceildiv(first - last, -step))


def _clamped(view: View, position: Dim, size: Dim, low: Dim, high: Dim) -> Dim | None:
    """Return where a slice starts or ends, negative positions counted from the end."""
    if isinstance(position, int) and abs(position) >= OPEN_END:
        return high if position > 0 else low
    if view.knowledge.nonneg(position):
        return dims.minimum(position, high)
    if dims.provably_positive(-position):
        return dims.maximum(size + position, low)
    return None


def _gather(view: View) -> list[PartialShape]:
    data, indices = view.shape(0), view.shape(1)
    axis = normalized_axis(view.attribute("axis", 0), len(data))
    return [(*data[:axis], *indices, *data[axis + 1 :])]


def _like_indices(view: View) -> list[PartialShape]:
    return [view.shape(1)]


def _gather_nd(view: View) -> list[PartialShape]:
    data, indices = view.shape(0), view.shape(1)
    if not indices or not isinstance(indices[-1], int):
        raise Unknown
    return [(*indices[:-1], *data[view.attribute("batch_dims", 0) + indices[-1] :])]


def _tile(view: View) -> list[PartialShape]:
    shape = view.shape(0)
    if view.has(2):  # opset 1
        raise Unknown
    content = view.content_or_none(1)
    if content is None:
        return [[0 if d == 0 else None for d in shape]]
    if len(content.items) != len(shape):
        raise Unknown
    return [[product_of(pair) for pair in zip(shape, content.items, strict=True)]]


def _pad(view: View) -> list[PartialShape]:
    shape = view.shape(0)
    given = view.attribute("pads", view.attribute("paddings"))
    content = view.content_or_none(1) if given is None else None
    axes = normalized_axes(view.axes(3) or range(len(shape)), len(shape))
    if given is None and content is None:
        return [[None if axis in axes else d for axis, d in enumerate(shape)]]
    pads: Sequence[Dim | None] = given if content is None else content.items
    if len(pads) != 2 * len(axes):
        raise Unknown
    result: list[Dim | None] = list(shape)
    for position, axis in enumerate(axes):
        result[axis] = sum_of((shape[axis], pads[position], pads[len(axes) + position]))
    return [result]


def _center_crop_pad(view: View) -> list[PartialShape]:
    shape = view.shape(0)
    axes = normalized_axes(view.attribute("axes") or range(len(shape)), len(shape))
    wanted = _wanted_sizes(view, 1)
    if len(wanted) != len(axes):
        raise Unknown
    result: list[Dim | None] = list(shape)
    for axis, size in zip(axes, wanted, strict=True):
        result[axis] = size
    return [result]


def _image(view: View) -> Shape:
    shape = view.shape(0)
    if len(shape) != 4:
        raise Unknown
    return shape


def _depth_to_space(view: View) -> list[PartialShape]:
    batch, channels, *spatial = _image(view)
    block = view.attribute("blocksize")
    return [(batch, channels // block ** len(spatial), *(d * block for d in spatial))]


def _space_to_depth(view: View) -> list[PartialShape]:
    batch, channels, *spatial = _image(view)
    block = view.attribute("blocksize")
    return [(batch, channels * block ** len(spatial), *(d // block for d in spatial))]


# Selecting ---------------------------------------------------------------------------------------------


def _top_k(view: View) -> list[PartialShape]:
    shape = view.shape(0)
    axis = normalized_axis(view.attribute("axis", -1), len(shape))
    count = view.attribute("k")
    if count is None:
        content = view.content_or_none(1)
        count = content.items[0] if content is not None and content.items else None
    return [(*shape[:axis], count, *shape[axis + 1 :])] * 2


def _one_hot(view: View) -> list[PartialShape]:
    indices = view.shape(0)
    axis = normalized_axis(view.attribute("axis", -1), len(indices) + 1)
    depth = view.content_or_none(1)
    size = depth.items[0] if depth is not None and len(depth.items) == 1 else None
    return [(*indices[:axis], size, *indices[axis:])]


def _compress(view: View) -> list[PartialShape]:
    axis = view.attribute("axis")
    if axis is None:
        return [(None,)]
    shape = view.shape(0)
    axis = normalized_axis(axis, len(shape))
    return [(*shape[:axis], None, *shape[axis + 1 :])]


def _unique(view: View) -> list[PartialShape]:
    return [_compress(view)[0], (None,), (None,), (None,)]


def _non_max_suppression(_: View) -> list[PartialShape]:
    return [(None, 3)]


def _extracted_features(view: View) -> list[PartialShape]:
    shape = view.shape(0)
    return [(*(shape[:-1] or (1,)), dims.product(view.shape(1)))]


# Sequences ---------------------------------------------------------------------------------------------


def _sequence_at(view: View) -> list[PartialShape]:
    """Return the shape of one tensor of a sequence, where what made the sequence is in sight."""
    maker, position = view.input(0).producer(), view.item(1)
    if maker is None or not isinstance(position, int):
        raise Unknown
    made = View(maker, view.knowledge)
    if is_op(maker, "SequenceConstruct"):
        if not -len(made.inputs) <= position < len(made.inputs):
            raise Unknown
        return [made.shape(position % len(made.inputs))]
    if is_op(maker, "SplitToSequence"):
        return [_split_part(made, position)]
    raise Unknown


def _split_part(made: View, position: int) -> PartialShape:
    shape = made.shape(0)
    axis = normalized_axis(made.attribute("axis", 0), len(shape))
    if not made.has(1):  # one tensor per element, the axis itself kept or not
        kept = (1,) if made.attribute("keepdims", 1) else ()
        return (*shape[:axis], *kept, *shape[axis + 1 :])
    lengths = constant_ints(made.inputs[1])
    if lengths is None or len(made.shape(1)) > 1:
        raise Unknown
    if made.shape(1):
        if not -len(lengths) <= position < len(lengths):
            raise Unknown
        return (*shape[:axis], lengths[position], *shape[axis + 1 :])
    length, whole = lengths[0], shape[axis]
    if position < 0 and isinstance(whole, int) and length > 0:
        position += -(-whole // length)
    if position < 0 or length <= 0:
        raise Unknown
    return (*shape[:axis], dims.minimum(length, shape[axis] - position * length), *shape[axis + 1 :])


def _sequence_sources(node: ir.Node) -> list[ir.Value]:
    maker = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    return [] if maker is None else [v for v in maker.inputs if v is not None]


# Making data -------------------------------------------------------------------------------------------


def _constant(view: View) -> list[PartialShape]:
    tensor = view.attribute("value")
    if tensor is not None:
        return [tensor_shape(tensor)]
    for name in ("value_floats", "value_ints", "value_strings"):
        items = view.attribute(name)
        if items is not None:
            return [(len(items),)]
    return [None if "sparse_value" in view.node.attributes else ()]


def _random(view: View) -> list[PartialShape]:
    return [view.attribute("shape")]


def _multinomial(view: View) -> list[PartialShape]:
    return [(view.shape(0)[0], view.attribute("sample_size", 1))]


def _window(view: View) -> list[PartialShape]:
    return [(view.item(0),)]


def _einsum(view: View) -> list[PartialShape]:
    equation = view.attribute("equation").replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    shapes = [view.shape(i) for i in range(len(view.inputs))]
    if len(terms) != len(shapes):
        raise Unknown
    sizes: dict[str, list[Dim]] = {}
    stretched: list[Shape] = []
    for term, shape in zip(terms, shapes, strict=True):
        stretched.append(_bind_letters(term, shape, sizes))
    ellipsis = broadcast_shapes(*stretched) or ()
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    before, dots, after = right.partition("...")
    if not set(before + after) <= set(sizes):
        raise Unknown
    middle = ellipsis if dots else ()
    return [[*(_letter(sizes[c]) for c in before), *middle, *(_letter(sizes[c]) for c in after)]]


def _bind_letters(term: str, shape: Shape, sizes: dict[str, list[Dim]]) -> Shape:
    """Note the size behind each letter of one operand and return those behind its ellipsis."""
    before, dots, after = term.partition("...")
    spare = len(shape) - len(before) - len(after)
    if spare < 0 or (spare and not dots):
        raise Unknown
    for letter, dim in zip(before, shape, strict=False):
        sizes.setdefault(letter, []).append(dim)
    for letter, dim in zip(after, shape[len(before) + spare :], strict=True):
        sizes.setdefault(letter, []).append(dim)
    return shape[len(before) : len(before) + spare]


def _letter(sizes: list[Dim]) -> Dim | None:
    return dims.broadcast(*sizes)


# The table ---------------------------------------------------------------------------------------------

_SAME = Rule(_same)
_ELEMENTWISE = Rule(_elementwise)
_REDUCE = Rule(_reduce, (1,))
_ARG_REDUCE = Rule(_arg_reduce)
_SCALAR = Rule(_scalar)
_RANDOM = Rule(_random)
_WINDOW = Rule(_window, (0,))

_UNCHANGED = """
Abs Acos Acosh Asin Asinh Atan Atanh Bernoulli BitCast BitwiseNot Cast CastLike Ceil Celu Clip Cos Cosh CumProd
CumSum DequantizeLinear Dropout Elu Erf Exp EyeLike Floor Gelu GroupNormalization HardSigmoid HardSwish Hardmax
Identity InstanceNormalization IsInf IsNaN LRN LeakyRelu Log LogSoftmax LpNormalization
MeanVarianceNormalization Mish Neg Not PRelu QuantizeLinear RandomNormalLike RandomUniformLike Reciprocal
RegexFullMatch Relu ReverseSequence RotaryEmbedding Round Scatter ScatterElements ScatterND Selu Shrink Sigmoid
Sign Sin Sinh Softmax Softplus Softsign Sqrt SwiGLU Swish Tan Tanh TensorScatter ThresholdedRelu Trilu
"""

_BROADCAST = """
Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min
Mod Mul Or Pow StringConcat Sub Sum Where Xor
"""

_REDUCTIONS = """
ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare
"""

_STANDARD: dict[str, Rule] = {
    **dict.fromkeys(_UNCHANGED.split(), _SAME),
    **dict.fromkeys(_BROADCAST.split(), _ELEMENTWISE),
    **dict.fromkeys(_REDUCTIONS.split(), _REDUCE),
    "ArgMax": _ARG_REDUCE,
    "ArgMin": _ARG_REDUCE,
    "BlackmanWindow": _WINDOW,
    "CenterCropPad": Rule(_center_crop_pad, (1,)),
    "Compress": Rule(_compress),
    "Concat": Rule(_concat),
    "Constant": Rule(_constant),
    "ConstantOfShape": Rule(_constant_of_shape, (0,)),
    "DepthToSpace": Rule(_depth_to_space),
    "Einsum": Rule(_einsum),
    "Expand": Rule(_expand, (1,)),
    "Flatten": Rule(_flatten),
    "Gather": Rule(_gather),
    "GatherElements": Rule(_like_indices),
    "GatherND": Rule(_gather_nd),
    "HammingWindow": _WINDOW,
    "HannWindow": _WINDOW,
    "Multinomial": Rule(_multinomial),
    "NonMaxSuppression": Rule(_non_max_suppression),
    "NonZero": Rule(_nonzero),
    "OneHot": Rule(_one_hot, (1,)),
    "OptionalHasElement": _SCALAR,
    "Pad": Rule(_pad, (1, 3)),
    "RandomNormal": _RANDOM,
    "RandomUniform": _RANDOM,
    "Range": Rule(_range, (0, 1, 2)),
    "Reshape": Rule(_reshape, (1,)),
    "SequenceAt": Rule(_sequence_at, (1,), also=_sequence_sources),
    "SequenceLength": _SCALAR,
    "Shape": Rule(_shape),
    "Size": _SCALAR,
    "Slice": Rule(_slice, (1, 2, 3, 4)),
    "SpaceToDepth": Rule(_space_to_depth),
    "Split": Rule(_split, (1,)),
    "Squeeze": Rule(_squeeze, (1,)),
    "Tile": Rule(_tile, (1,)),
    "TopK": Rule(_top_k, (1,)),
    "Transpose": Rule(_transpose),
    "Unique": Rule(_unique),
    "Unsqueeze": Rule(_unsqueeze, (1,)),
}

_CLASSICAL_UNCHANGED = "Binarizer CategoryMapper Imputer LabelEncoder Normalizer Scaler"

RULES: dict[str, dict[str, Rule]] = {
    "": {**_STANDARD, **shape_rules_nn.RULES, **shape_rules_control.RULES},
    "ai.onnx.ml": {
        **dict.fromkeys(_CLASSICAL_UNCHANGED.split(), _SAME),
        "ArrayFeatureExtractor": Rule(_extracted_features),
    },
    "com.microsoft": shape_rules_contrib.RULES,
}
