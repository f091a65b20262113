"""Rotary position embedding in a graph, whatever operators an exporter spelled it with.

Pairs (x1, x2) of features are rotated by an angle that depends on the position:

    (x1 * cos - x2 * sin,  x2 * cos + x1 * sin)

The pairs are the two halves of a head's features, or neighbours. It is read from the sum or the concatenation it ends
in; which features are which follows from views (`analysis/views.py`). Su et al. 2021,
https://arxiv.org/abs/2104.09864.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.algebra import summands
from onnxopt.analysis.dims import Dim
from onnxopt.analysis.shapes import Shapes
from onnxopt.analysis.views import Axis, Leaf, View, view
from onnxopt.graph import attribute, constant_array, is_op, only_use

_MAX_CLIMB = 4
_MAX_DEPTH = 12
_MAX_CONSTANT = 1 << 24


@dataclasses.dataclass(frozen=True, slots=True)
class Rotation:
    """A rotary embedding.

    Attributes:
        result: What comes out, of the shape of `x`.
        x: What is rotated; its last axis is the features.
        cos: Cosines, one per feature or one per pair.
        sin: Sines; with a minus for the first half where `signed`.
        per_pair: Whether cosines and sines are one per pair.
        signed: Whether the minus is in the sines, so that nothing is negated.
        interleaved: Whether pairs are neighbours, not halves.
        paired: Whether the result has an axis of its own for the two features of a pair, the last one.
    """

    result: ir.Value
    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    per_pair: bool
    signed: bool
    interleaved: bool
    paired: bool = False


def rotation(node: ir.Node, shapes: Shapes) -> Rotation | None:
    """Read the rotary embedding that ends in an Add or a Concat, or return None."""
    return _of_sum(node, shapes) if is_op(node, "Add") else _of_pairs(node, shapes)


# x * cos + rotated(x) * sin ----------------------------------------------------------------------------


def _of_sum(node: ir.Node, shapes: Shapes) -> Rotation | None:
    total = summands(node.outputs[0], shapes)
    if len(total.terms) != 2 or total.constant or any(t.sign != 1 for t in total.terms):
        return None
    products = [_factors(t.value) for t in total.terms]
    if None in products:
        return None
    for plain, turned in itertools.permutations(p for p in products if p is not None):
        for (x, cos), (other, sin) in itertools.product(_swaps(plain), _swaps(turned)):
            pairs = _turned(other, shapes)
            if pairs is None:
                continue
            first, second, interleaved, signed = pairs
            if _is_pair(first, second, x, interleaved, shapes):
                return Rotation(node.outputs[0], x, cos, sin, False, signed, interleaved)
    return None


def _factors(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    node = value.producer()
    if node is None or not is_op(node, "Mul") or node.inputs[0] is None or node.inputs[1] is None:
        return None
    return node.inputs[0], node.inputs[1]


def _swaps(pair: tuple[ir.Value, ir.Value]) -> Iterator[tuple[ir.Value, ir.Value]]:
    yield pair
    yield pair[1], pair[0]


def _turned(value: ir.Value, shapes: Shapes) -> tuple[ir.Value, ir.Value, bool, bool] | None:
    """Read (-x2, x1), side by side or interleaved: return x1, x2, whether interleaved, whether the minus is missing."""
    parts = _joined(value, shapes)
    if parts is None:
        return None
    (second, first), interleaved = parts
    negative = second.producer()
    if negative is not None and is_op(negative, "Neg") and negative.inputs[0] is not None:
        return first, negative.inputs[0], interleaved, False
    return first, second, interleaved, True


def _joined(value: ir.Value, shapes: Shapes) -> tuple[tuple[ir.Value, ir.Value], bool] | None:
    """Return the two values that are put side by side along the last axis, and whether element by element."""
    node = value.producer()
    if node is None or is_op(node, "Concat"):
        parts = None if node is None else _parts(node, shapes)
        return None if parts is None else (parts, False)
    source = node.inputs[0] if is_op(node, "Reshape", "Flatten") else None
    inner, outer = shapes.of(source) if source is not None else None, shapes.of(value)
    if source is None or inner is None or outer is None or inner[:-2] != outer[:-1] or len(inner) < 2:
        return None
    merged = source.producer()
    parts = None if merged is None else _interleaved_parts(merged, shapes)
    return None if parts is None else (parts, True)


def _parts(node: ir.Node, shapes: Shapes) -> tuple[ir.Value, ir.Value] | None:
    """Return what a Concat of two puts side by side along the last axis."""
    rank = shapes.rank(node.outputs[0])
    parts = [v for v in node.inputs if v is not None]
    if not is_op(node, "Concat") or rank is None or len(parts) != 2 or attribute(node, "axis") not in (-1, rank - 1):
        return None
    return parts[0], parts[1]


def _interleaved_parts(node: ir.Node, shapes: Shapes) -> tuple[ir.Value, ir.Value] | None:
    """Return a and b of Concat(Unsqueeze(a), Unsqueeze(b)) along a new last axis."""
    parts = _parts(node, shapes)
    if parts is None:
        return None
    first, second = (_squeezed(v, shapes) for v in parts)
    return None if first is None or second is None else (first, second)


def _squeezed(value: ir.Value, shapes: Shapes) -> ir.Value | None:
    """Return what a value adds a last axis of size 1 to."""
    node = value.producer()
    source = node.inputs[0] if node is not None and is_op(node, "Unsqueeze", "Reshape") else None
    inner, outer = shapes.of(source) if source is not None else None, shapes.of(value)
    return source if inner is not None and outer == (*inner, 1) else None


def _is_pair(first: ir.Value, second: ir.Value, x: ir.Value, interleaved: bool, shapes: Shapes) -> bool:
    """Whether the values are the first and the second features of the pairs of x."""
    whole = view(x, shapes, factors=False, repeats=False)
    parts = [view(v, shapes, factors=False, repeats=False) for v in (first, second)]
    if whole is None:
        return False
    wanted = _halves(whole, interleaved)
    return wanted is not None and all(p is not None and _same(p, w) for p, w in zip(parts, wanted, strict=True))


def _halves(whole: View, interleaved: bool) -> tuple[View, View] | None:
    """Return the views of the first and the second features of each pair."""
    if not whole.axes or len(whole.axes[-1]) != 1:
        return None
    leaf = whole.axes[-1][0]
    if leaf.axis is None or not isinstance(leaf.size, int) or leaf.size % 2 or not isinstance(leaf.stride, int):
        return None
    half = leaf.size // 2
    stride, offset = (2 * leaf.stride, leaf.stride) if interleaved else (leaf.stride, half * leaf.stride)
    last: Axis = () if half == 1 else (Leaf(leaf.axis, stride, half),)
    axes = (*whole.axes[:-1], last)
    starts = tuple(s + offset if k == leaf.axis else s for k, s in enumerate(whole.starts))
    return dataclasses.replace(whole, axes=axes), dataclasses.replace(whole, axes=axes, starts=starts)


def _same(a: View, b: View) -> bool:
    return a.source is b.source and a.axes == b.axes and a.starts == b.starts


# (x1 * cos - x2 * sin, x2 * cos + x1 * sin) ------------------------------------------------------------


def _of_pairs(node: ir.Node, shapes: Shapes) -> Rotation | None:
    interleaved = _interleaved_parts(node, shapes)
    parts = interleaved or _parts(node, shapes)
    if parts is None:
        return None
    first, second = _products(parts[0], shapes), _products(parts[1], shapes)
    if first is None or second is None or [s for s, _ in second] != [1, 1]:
        return None
    if sorted(s for s, _ in first) != [-1, 1]:
        return None
    positive, negative = (p for _, p in sorted(first, key=lambda t: -t[0]))
    for (x1, cos), (x2, sin) in itertools.product(_swaps(positive), _swaps(negative)):
        if _matches([p for _, p in second], (x2, cos), (x1, sin), shapes):
            x = _whole_of(x1, x2, interleaved is not None, shapes)
            if x is not None:
                return _ending(node.outputs[0], x, cos, sin, interleaved is not None, shapes)
    return None


def _ending(value: ir.Value, x: ir.Value, cos: ir.Value, sin: ir.Value, interleaved: bool, shapes: Shapes) -> Rotation:
    """Return the rotation, of the shape of x where pairs are merged right behind it."""
    user = only_use(value) if interleaved else None
    if user is not None and is_op(user, "Reshape", "Flatten") and shapes.same_shape(user.outputs[0], x):
        return Rotation(user.outputs[0], x, cos, sin, True, False, interleaved)
    return Rotation(value, x, cos, sin, True, False, interleaved, paired=interleaved)


def _products(value: ir.Value, shapes: Shapes) -> list[tuple[int, tuple[ir.Value, ir.Value]]] | None:
    total = summands(value, shapes)
    found = [(t.sign, _factors(t.value)) for t in total.terms]
    known = [(sign, factors) for sign, factors in found if factors is not None]
    return known if len(known) == 2 and len(found) == 2 and not total.constant else None


def _matches(
    products: list[tuple[ir.Value, ir.Value]],
    one: tuple[ir.Value, ir.Value],
    two: tuple[ir.Value, ir.Value],
    shapes: Shapes,
) -> bool:
    """Whether two products are these, in any order."""
    return any(
        any(_equal(p, one, shapes) for p in _swaps(a)) and any(_equal(p, two, shapes) for p in _swaps(b))
        for a, b in itertools.permutations(products)
    )


def _equal(a: tuple[ir.Value, ir.Value], b: tuple[ir.Value, ir.Value], shapes: Shapes) -> bool:
    return all(x is y or _shows_same(x, y, shapes) for x, y in zip(a, b, strict=True))


def _shows_same(a: ir.Value, b: ir.Value, shapes: Shapes) -> bool:
    first, second = (view(v, shapes, factors=False, repeats=False) for v in (a, b))
    return first is not None and second is not None and _same(first, second)


def _whole_of(first: ir.Value, second: ir.Value, interleaved: bool, shapes: Shapes) -> ir.Value | None:
    """Return the value of which these are the first and the second features of the pairs."""
    value = first
    for _ in range(_MAX_CLIMB):
        node = value.producer()
        if node is None or node.inputs[0] is None:
            return None
        value = node.inputs[0]
        if shapes.rank(value) == shapes.rank(first) and _is_pair(first, second, value, interleaved, shapes):
            return value
    return None


# Cosines and sines -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """Cosines or sines, one per pair.

    Attributes:
        shape: Their shape; the last axis counts pairs.
        negated: What is built holds them for the second half; the first half has the opposite sign.
        make: Given a function that adds an operator, returns the value.
    """

    shape: tuple[Dim, ...]
    negated: bool
    make: Callable[[Op], ir.Value]


Op = Callable[..., ir.Value]
"""Adds an operator: (op, inputs, attributes) -> value; with op "constant": (name, array)."""


def table(value: ir.Value, shapes: Shapes, *, interleaved: bool, depth: int = _MAX_DEPTH) -> Table | None:
    """Return one cosine or sine per pair of a value that has one per feature, or None when pairs may differ."""
    shape = shapes.of(value)
    if shape is None or not shape or depth == 0 or not isinstance(shape[-1], int) or shape[-1] % 2:
        return None
    half = (*shape[:-1], shape[-1] // 2)
    array = constant_array(value, max_bytes=_MAX_CONSTANT)
    if array is not None:
        return _constant_table(array, half, interleaved)
    node = value.producer()
    if node is None:
        return None
    repeated = _repeated(value, interleaved, shapes)
    if repeated is not None:
        return Table(half, False, lambda op: repeated)
    if is_op(node, "Concat") and not interleaved:
        return _side_by_side(node, half, shapes)
    return _through(node, half, shapes, interleaved, depth - 1)


def _constant_table(array: np.ndarray, half: tuple[Dim, ...], interleaved: bool) -> Table | None:
    size = array.shape[-1] // 2
    first, second = (array[..., ::2], array[..., 1::2]) if interleaved else (array[..., :size], array[..., size:])
    kept = np.ascontiguousarray(second)
    negated = not np.array_equal(first, second)
    if negated and not np.array_equal(-first, second):
        return None
    return Table(half, negated, lambda op: op("constant", "angles", kept))


def _repeated(value: ir.Value, interleaved: bool, shapes: Shapes) -> ir.Value | None:
    """Return the value whose last axis is repeated to make a pair of each element."""
    read = view(value, shapes, selections=False, factors=False)
    if read is None or any(read.starts) or len(read.axes[-1]) != 2:
        return None
    outer, inner = read.axes[-1]
    kept, copies = (outer, inner) if interleaved else (inner, outer)
    if copies.axis is not None or copies.size != 2 or kept != Leaf(len(read.shape) - 1, 1, read.shape[-1]):
        return None
    plain = [() if d == 1 else (Leaf(k, 1, d),) for k, d in enumerate(read.shape)]
    return read.source if list(read.axes[:-1]) == plain[:-1] else None


def _side_by_side(node: ir.Node, half: tuple[Dim, ...], shapes: Shapes) -> Table | None:
    """Read Concat(a, a) and Concat(-a, a)."""
    parts = [v for v in node.inputs if v is not None]
    if len(parts) != 2 or attribute(node, "axis") not in (-1, len(half) - 1) or shapes.of(parts[1]) != half:
        return None
    first, second = parts
    if first is second:
        return Table(half, False, lambda op: second)
    negative = first.producer()
    if negative is not None and is_op(negative, "Neg") and negative.inputs[0] is second:
        return Table(half, True, lambda op: second)
    return None


_UNARY = ("Cast", "Cos", "Identity", "Neg", "Sin")


def _through(node: ir.Node, half: tuple[Dim, ...], shapes: Shapes, interleaved: bool, depth: int) -> Table | None:
    """Take the pairs of what a node is computed from."""
    source = node.inputs[0]
    if is_op(node, "Mul", "Div"):
        return _scaled(node, shapes, interleaved, depth)
    inner = table(source, shapes, interleaved=interleaved, depth=depth) if source is not None else None
    if inner is None:
        return None
    indices = node.inputs[1] if is_op(node, "Gather") and attribute(node, "axis", 0) == 0 else None
    if indices is not None and len(inner.shape) == 2:
        return Table(half, inner.negated, lambda op: op("Gather", [inner.make(op), indices], {}))
    if is_op(node, *_UNARY) and not (inner.negated and is_op(node, "Cos")):
        given = dict(node.attributes.items())
        return dataclasses.replace(inner, make=lambda op: op(node.op_type, [inner.make(op)], given))
    if is_op(node, "Unsqueeze", "Squeeze", "Reshape"):  # the table keeps its own axes of size 1
        before, after = [d for d in inner.shape if d != 1], [d for d in half if d != 1]
        return inner if before == after and inner.shape[-1] == half[-1] else None
    return None


def _scaled(node: ir.Node, shapes: Shapes, interleaved: bool, depth: int) -> Table | None:
    """Go through a product of one per feature with what is the same for all features."""
    first, second = node.inputs
    pairs = [(first, second, False)] if is_op(node, "Div") else [(first, second, False), (second, first, True)]
    for value, other, swapped in pairs:
        shape = shapes.of(other) if other is not None else None
        if value is not None and other is not None and shape is not None and all(d == 1 for d in shape):
            inner = table(value, shapes, interleaved=interleaved, depth=depth)
            if inner is None or len(inner.shape) < len(shape):
                return None
            return dataclasses.replace(inner, make=_product(node, inner, other, swapped))
        signs = _signs(other, interleaved)
        if value is not None and signs is not None:
            inner = table(value, shapes, interleaved=interleaved, depth=depth)
            return None if inner is None else dataclasses.replace(inner, negated=inner.negated is not signs)
    return None


def _signs(value: ir.Value | None, interleaved: bool) -> bool | None:
    """Return whether a constant of ones has a minus for the first feature of each pair; None for others."""
    array = constant_array(value, max_bytes=_MAX_CONSTANT)
    if array is None or array.ndim != 1 or len(array) % 2 or array.dtype.kind != "f":
        return None
    first, second = (array[::2], array[1::2]) if interleaved else np.split(array, 2)
    if not (second == 1).all() or not (abs(first) == 1).all() or len(set(first.tolist())) != 1:
        return None
    return bool(first[0] < 0)


def _product(node: ir.Node, inner: Table, other: ir.Value, swapped: bool) -> Callable[[Op], ir.Value]:
    def make(op: Op) -> ir.Value:
        made = inner.make(op)
        return op(node.op_type, [other, made] if swapped else [made, other], {})

    return make
