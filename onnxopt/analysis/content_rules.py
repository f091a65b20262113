"""How the elements of small integer tensors follow from their inputs: the arithmetic exporters do on shapes.

`CONTENT_RULES` maps standard operators to rules. A rule gets the node and the shape of its output, all numbers,
and returns the output's elements in row-major order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from onnxopt.analysis import dims
from onnxopt.analysis.dims import Dim
from onnxopt.analysis.shape_rules_control import branch_outputs, taken_branch
from onnxopt.analysis.shape_view import (
    MAX_ELEMENTS,
    Content,
    Knowledge,
    Unknown,
    View,
    normalized_axes,
    normalized_axis,
)
from onnxopt.graph import constant_array

Item: TypeAlias = Dim | None
Items: TypeAlias = Sequence[Item]
Sizes: TypeAlias = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class ContentRule:
    """How an operator's output elements follow from its inputs.

    Attributes:
        items: Returns the elements, given the node, the output's shape and the output's position.
        contents: Positions of the inputs whose elements matter; None for all.
        also: Further values whose elements must be known first: outputs of the node's bodies.
    """

    items: Callable[[View, Sizes, int], Items]
    contents: tuple[int, ...] | None = None
    also: Callable[[ir.Node], list[ir.Value]] | None = None


# Sources -----------------------------------------------------------------------------------------------


def _shape(view: View, sizes: Sizes, _: int) -> Items:
    shape = view.shape(0)[slice(view.attribute("start", 0), view.attribute("end"))]
    view.knowledge.note_sizes(view.node, shape)
    return shape


def _size(view: View, sizes: Sizes, _: int) -> Items:
    return [dims.product(view.shape(0))]


def _range(view: View, sizes: Sizes, _: int) -> Items:
    start, step = view.item(0), view.item(2)
    return [start + step * i for i in range(sizes[0])]


def _filled(view: View, sizes: Sizes, _: int) -> Items:
    fill = view.attribute("value")
    if fill is None:
        raise Unknown
    return [int(fill.numpy().reshape(-1)[0])] * math.prod(sizes)


# Moving elements ---------------------------------------------------------------------------------------


def _same_items(view: View, sizes: Sizes, _: int) -> Items:
    return view.items(0)


def _picked(content: Content, pick: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> Items:
    """Return the elements that `pick` keeps, in its order, of the tensor of their positions."""
    positions = np.arange(len(content.items)).reshape(content.shape)
    try:
        return [content.items[i] for i in pick(positions).reshape(-1).tolist()]
    except (IndexError, ValueError) as error:  # shapes or positions that do not fit: the model cannot run
        raise Unknown from error


def _gather(view: View, sizes: Sizes, _: int) -> Items:
    data = view.content(0)
    indices = view.content(1)
    axis = normalized_axis(view.attribute("axis", 0), len(data.shape))
    if len(data.shape) == 1:
        return [_element(data.items, i) for i in indices.items]
    where = np.array(view.numbers(1), dtype=np.int64).reshape(indices.shape)
    return _picked(data, lambda positions: positions.take(where, axis=axis))


def _element(items: Items, index: Item) -> Item:
    if not isinstance(index, int):
        return None
    if not -len(items) <= index < len(items):
        raise Unknown
    return items[index]


def _gather_elements(view: View, sizes: Sizes, _: int) -> Items:
    data, indices = view.content(0), np.array(view.numbers(1), dtype=np.int64).reshape(sizes)
    axis = normalized_axis(view.attribute("axis", 0), len(data.shape))
    return _picked(data, lambda positions: np.take_along_axis(positions, indices, axis))


def _concat(view: View, sizes: Sizes, _: int) -> Items:
    parts = [view.content(i) for i in range(len(view.inputs)) if view.has(i)]
    items = [item for part in parts for item in part.items]
    if len(sizes) == 1:
        return items
    axis = normalized_axis(view.attribute("axis", 1), len(sizes))
    offsets = np.cumsum([0] + [len(p.items) for p in parts])
    arrays = [np.arange(len(p.items)).reshape(p.shape) + o for p, o in zip(parts, offsets, strict=False)]
    return [items[i] for i in np.concatenate(arrays, axis=axis).reshape(-1).tolist()]


def _slice(view: View, sizes: Sizes, _: int) -> Items:
    data = view.content(0)
    if view.attribute("starts") is not None:  # opset 1
        starts, ends, given, steps = (view.attribute(n) for n in ("starts", "ends", "axes", "steps"))
    else:
        starts, ends = view.numbers(1), view.numbers(2)
        given = view.numbers(3) if view.has(3) else None
        steps = view.numbers(4) if view.has(4) else None
    axes = normalized_axes(range(len(starts)) if given is None else given, len(data.shape))
    steps = (1,) * len(starts) if steps is None else steps
    cut = [slice(None)] * len(data.shape)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        cut[axis] = slice(start, end, step)
    return _picked(data, lambda positions: positions[tuple(cut)])


def _transpose(view: View, sizes: Sizes, _: int) -> Items:
    return _picked(view.content(0), lambda positions: positions.transpose(view.attribute("perm")))


def _expand(view: View, sizes: Sizes, _: int) -> Items:
    return _picked(view.content(0), lambda positions: np.broadcast_to(positions, sizes))


def _tile(view: View, sizes: Sizes, _: int) -> Items:
    repeats = view.numbers(1)
    return _picked(view.content(0), lambda positions: np.tile(positions, repeats))


def _split(view: View, sizes: Sizes, output: int) -> Items:
    data = view.content(0)
    axis = normalized_axis(view.attribute("axis", 0), len(data.shape))
    known = view.knowledge.known_shape
    before = [known(value) for value in view.node.outputs[:output]]
    start = 0
    for shape in before:
        part = shape[axis] if shape is not None else None
        if not isinstance(part, int):
            raise Unknown
        start += part
    return _picked(data, lambda positions: positions.take(range(start, start + sizes[axis]), axis=axis))


def _if(view: View, sizes: Sizes, output: int) -> Items:
    taken = taken_branch(view)
    content = None if taken is None else view.knowledge.known_content(taken.outputs[output])
    if content is None:
        raise Unknown
    return content.items


# Arithmetic --------------------------------------------------------------------------------------------


def _operands(view: View, sizes: Sizes) -> list[Items]:
    """Return the elements of every input, stretched to the output's shape."""
    stretched: list[Items] = []
    for index in range(len(view.inputs)):
        content = view.content(index)
        if content.shape == sizes:
            stretched.append(content.items)
        elif len(content.items) == 1:
            stretched.append(content.items * math.prod(sizes))
        else:
            stretched.append(_picked(content, lambda positions: np.broadcast_to(positions, sizes)))
    return stretched


def _elementwise(function: Callable[[Dim, Dim, View], Item]) -> ContentRule:
    """Return the rule of an operator that combines elements pairwise, from the left."""

    def rule(view: View, sizes: Sizes, _: int) -> Items:
        first, *others = _operands(view, sizes)
        for other in others:
            first = [
                None if a is None or b is None else function(a, b, view) for a, b in zip(first, other, strict=True)
            ]
        return first

    return ContentRule(rule)


def _unary(function: Callable[[Dim, View], Item]) -> ContentRule:
    def rule(view: View, sizes: Sizes, _: int) -> Items:
        return [None if a is None else function(a, view) for a in view.items(0)]

    return ContentRule(rule)


def _divide(a: Dim, b: Dim, view: View) -> Item:
    if b == 0:
        return None
    exact = dims.exact_div(a, b)
    if exact is not None:
        return exact
    if isinstance(a, int) and isinstance(b, int):  # towards zero, unlike //
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return dims.floordiv(a, b) if view.knowledge.nonneg(a) and view.knowledge.nonneg(b) else None


def _remainder(a: Dim, b: Dim, view: View) -> Item:
    if b == 0:
        return None
    knowledge = view.knowledge
    if (not view.attribute("fmod", 0) and isinstance(b, int)) or (knowledge.nonneg(a) and knowledge.nonneg(b)):
        return dims.mod(a, b)
    return None


def _power(a: Dim, b: Dim, view: View) -> Item:
    return dims.product([a] * b) if isinstance(b, int) and 0 <= b <= 4 else None


def _equal(a: Dim, b: Dim, view: View) -> Item:
    if a == b:
        return 1
    if dims.provably_different(a, b) or _opposite(a, b, view.knowledge) or _opposite(b, a, view.knowledge):
        return 0
    return None


def _opposite(a: Dim, b: Dim, knowledge: Knowledge) -> bool:
    return isinstance(b, int) and b < 0 and knowledge.nonneg(a)


def _greater(a: Dim, b: Dim, view: View) -> Item:
    if dims.provably_positive(a - b) or _opposite(a, b, view.knowledge):
        return 1
    return 0 if dims.provably_nonneg(b - a) else None


def _greater_or_equal(a: Dim, b: Dim, view: View) -> Item:
    if dims.provably_nonneg(a - b) or (b == 0 and view.knowledge.nonneg(a)):
        return 1
    return 0 if dims.provably_positive(b - a) else None


def _truth(item: Item, knowledge: Knowledge) -> int | None:
    if isinstance(item, int):
        return int(item != 0)
    return 1 if item is not None and dims.provably_different(item, 0) else None


def _and(a: Dim, b: Dim, view: View) -> Item:
    return a * b


def _or(a: Dim, b: Dim, view: View) -> Item:
    return a + b - a * b


def _xor(a: Dim, b: Dim, view: View) -> Item:
    return a + b - 2 * a * b


def _where(view: View, sizes: Sizes, _: int) -> Items:
    condition, yes, no = _operands(view, sizes)
    return [
        a if c == 1 or (a is not None and a == b) else b if c == 0 else None
        for c, a, b in zip(condition, yes, no, strict=True)
    ]


def _cast(view: View, sizes: Sizes, _: int) -> Items:
    return _converted(view, view.attribute("to"))


def _cast_like(view: View, sizes: Sizes, _: int) -> Items:
    return _converted(view, view.knowledge.dtype(view.input(1)))


_WIDE = (ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT32, ir.DataType.UINT64)


def _converted(view: View, target: int | None) -> Items:
    content = view.content_or_none(0)
    items = _whole_numbers(view.input(0)) if content is None else content.items
    if target == ir.DataType.BOOL:
        return [_truth(item, view.knowledge) for item in items]
    # Sizes of axes fit into 32 bits, not into 8 or 16.
    return [item if target in _WIDE or isinstance(item, int) else None for item in items]


def _whole_numbers(value: ir.Value) -> Items:
    """Return the elements of a constant of floats that are all whole numbers."""
    array = constant_array(value, max_bytes=8 * MAX_ELEMENTS)
    if array is None or array.dtype.kind != "f" or not (np.isfinite(array) & (array == np.trunc(array))).all():
        raise Unknown
    return [int(x) for x in array.reshape(-1).tolist()]


def _reduce(combine: Callable[[Iterable[Dim]], Dim]) -> ContentRule:
    def rule(view: View, sizes: Sizes, _: int) -> Items:
        data = view.content(0)
        axes = view.axes(1)
        if not axes and view.attribute("noop_with_empty_axes", 0):
            return data.items
        rank = len(data.shape)
        gone = normalized_axes(axes or range(rank), rank)
        kept = [axis for axis in range(rank) if axis not in gone]
        positions = np.arange(len(data.items)).reshape(data.shape).transpose(*kept, *gone)
        groups = positions.reshape(math.prod(sizes), -1).tolist() if sizes != () else [positions.reshape(-1).tolist()]
        return [_combined(combine, [data.items[i] for i in group]) for group in groups]

    return ContentRule(rule)


def _combined(combine: Callable[[Iterable[Dim]], Dim], items: Items) -> Item:
    known = [item for item in items if item is not None]
    return combine(known) if len(known) == len(items) else None


def _total(items: Iterable[Dim]) -> Dim:
    total: Dim = 0
    for item in items:
        total = total + item
    return total


def _extreme(choose: Callable[[Dim, Dim], Dim]) -> Callable[[Iterable[Dim]], Dim]:
    def extreme(items: Iterable[Dim]) -> Dim:
        first, *others = items
        for item in others:
            first = choose(first, item)
        return first

    return extreme


_SAME_ITEMS = ContentRule(_same_items, (0,))

CONTENT_RULES: dict[str, ContentRule] = {
    "Abs": _unary(lambda a, view: abs(a) if isinstance(a, int) else a if view.knowledge.nonneg(a) else None),
    "Add": _elementwise(lambda a, b, _: a + b),
    "And": _elementwise(_and),
    "Cast": ContentRule(_cast, (0,)),
    "CastLike": ContentRule(_cast_like, (0,)),
    "Concat": ContentRule(_concat),
    "ConstantOfShape": ContentRule(_filled, ()),
    "Div": _elementwise(_divide),
    "Equal": _elementwise(_equal),
    "Expand": ContentRule(_expand, (0,)),
    "Flatten": _SAME_ITEMS,
    "Gather": ContentRule(_gather),
    "GatherElements": ContentRule(_gather_elements),
    "Greater": _elementwise(_greater),
    "GreaterOrEqual": _elementwise(_greater_or_equal),
    "Identity": _SAME_ITEMS,
    "If": ContentRule(_if, (0,), branch_outputs),
    "Less": _elementwise(lambda a, b, view: _greater(b, a, view)),
    "LessOrEqual": _elementwise(lambda a, b, view: _greater_or_equal(b, a, view)),
    "Max": _elementwise(lambda a, b, _: dims.maximum(a, b)),
    "Min": _elementwise(lambda a, b, _: dims.minimum(a, b)),
    "Mod": _elementwise(_remainder),
    "Mul": _elementwise(lambda a, b, _: a * b),
    "Neg": _unary(lambda a, _: -a),
    "Not": _unary(lambda a, _: 1 - a),
    "Or": _elementwise(_or),
    "Pow": _elementwise(_power),
    "Range": ContentRule(_range, (0, 2)),
    "ReduceMax": _reduce(_extreme(dims.maximum)),
    "ReduceMin": _reduce(_extreme(dims.minimum)),
    "ReduceProd": _reduce(dims.product),
    "ReduceSum": _reduce(_total),
    "Reshape": _SAME_ITEMS,
    "Shape": ContentRule(_shape, ()),
    "Size": ContentRule(_size, ()),
    "Slice": ContentRule(_slice),
    "Split": ContentRule(_split, (0,)),
    "Squeeze": _SAME_ITEMS,
    "Sub": _elementwise(lambda a, b, _: a - b),
    "Sum": _elementwise(lambda a, b, _: a + b),
    "Tile": ContentRule(_tile),
    "Transpose": ContentRule(_transpose, (0,)),
    "Unsqueeze": _SAME_ITEMS,
    "Where": ContentRule(_where),
    "Xor": _elementwise(_xor),
}
