"""Integer tensors that count along their axes, and truth values that follow from comparing them.

Exporters spell masks with Range, Unsqueeze, Expand and comparisons. Such a tensor of integers is read as a grid

    base + step0 * i0 + step1 * i1 + ...

over the indices of its axes, all symbolic; what a comparison of two grids gives is then a matter of bounds.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.dims import Dim, provably_nonneg, provably_positive
from onnxopt.analysis.shape_view import INTEGER_TYPES
from onnxopt.analysis.shapes import Shapes
from onnxopt.graph import attribute, constant_array, constant_tensor, has_references, is_op

_MAX_DEPTH = 16
"""Expressions are followed this deep; masks are shallow."""
_MAX_CONSTANT = 1 << 21
"""Bytes of a constant that are looked at: a causal mask of 1024 x 1024 has 1 MB."""


@dataclasses.dataclass(frozen=True, slots=True)
class Grid:
    """A tensor of integers with elements base + sum of step[k] * index[k].

    Attributes:
        shape: Its shape.
        base: The first element.
        steps: Per axis; 0 where the axis has one element.
    """

    shape: tuple[Dim, ...]
    base: Dim
    steps: tuple[Dim, ...]

    def lowest(self) -> Dim | None:
        """Return the smallest element of a grid that is not empty, or None when a step has no known sign."""
        total = self.base
        for size, step in zip(self.shape, self.steps, strict=True):
            if provably_nonneg(step):
                continue
            if not provably_nonneg(-step):
                return None
            total = total + step * (size - 1)
        return total


def grid(value: ir.Value, shapes: Shapes, depth: int = _MAX_DEPTH) -> Grid | None:
    """Read a tensor of integers as a grid, or return None."""
    dtype = shapes.dtype(value)
    shape = shapes.of(value)
    if dtype not in INTEGER_TYPES or dtype == ir.DataType.BOOL or shape is None or depth == 0:
        return None
    single = _single(value, shapes)
    if single is not None:
        return Grid(shape, single, (0,) * len(shape))
    node = value.producer()
    if node is None or is_op(node, "Constant"):
        return _constant(value)
    rule = _RULES.get(node.op_type)
    if rule is None or not is_op(node, node.op_type) or has_references(node):
        return None
    return rule(node, shape, shapes, depth - 1)


def _single(value: ir.Value, shapes: Shapes) -> Dim | None:
    """Return the element of a tensor that has one."""
    content = shapes.content(value)
    if isinstance(content, tuple):
        return content[0] if len(content) == 1 else None
    return content


def _constant(value: ir.Value) -> Grid | None:
    array = constant_array(value, max_bytes=_MAX_CONSTANT)
    if array is None or array.size == 0 or array.dtype.kind not in "iu":
        return None
    array = array.astype(np.int64)
    base = int(array.reshape(-1)[0])
    steps = tuple(
        int(array[tuple(int(k == axis) for k in range(array.ndim))]) - base if size > 1 else 0
        for axis, size in enumerate(array.shape)
    )
    made = np.full(array.shape, base)
    for axis, (size, step) in enumerate(zip(array.shape, steps, strict=True)):
        made = made + (step * np.arange(size)).reshape([-1 if k == axis else 1 for k in range(array.ndim)])
    return Grid(array.shape, base, steps) if (made == array).all() else None


_Rule = Callable[[ir.Node, tuple[Dim, ...], Shapes, int], Grid | None]


def _input(node: ir.Node, index: int, shapes: Shapes, depth: int) -> Grid | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else grid(value, shapes, depth)


def _range(node: ir.Node, shape: tuple[Dim, ...], shapes: Shapes, depth: int) -> Grid | None:
    start, _, delta = node.inputs
    assert start is not None and delta is not None
    base, step = _single(start, shapes), _single(delta, shapes)
    return None if base is None or step is None else Grid(shape, base, (step,))


def _reshaped(node: ir.Node, shape: tuple[Dim, ...], shapes: Shapes, depth: int) -> Grid | None:
    """Axes of size 1 come and go; the others stay."""
    source = _input(node, 0, shapes, depth)
    if source is None or [d for d in source.shape if d != 1] != [d for d in shape if d != 1]:
        return None
    rest = iter([s for d, s in zip(source.shape, source.steps, strict=True) if d != 1])
    return Grid(shape, source.base, tuple(0 if d == 1 else next(rest) for d in shape))


def _same(node: ir.Node, shape: tuple[Dim, ...], shapes: Shapes, depth: int) -> Grid | None:
    return _input(node, 0, shapes, depth)


def _transposed(node: ir.Node, shape: tuple[Dim, ...], shapes: Shapes, depth: int) -> Grid | None:
    source = _input(node, 0, shapes, depth)
    if source is None:
        return None
    perm = attribute(node, "perm", tuple(reversed(range(len(shape)))))
    return Grid(shape, source.base, tuple(source.steps[i] for i in perm))


def _expanded(node: ir.Node, shape: tuple[Dim, ...], shapes: Shapes, depth: int) -> Grid | None:
    source = _input(node, 0, shapes, depth)
    return None if source is None else _stretched(source, shape)


def _stretched(source: Grid, shape: tuple[Dim, ...]) -> Grid | None:
    """Return the grid broadcast to a shape, or None when it cannot be told which of its axes are stretched."""
    missing = len(shape) - len(source.shape)
    steps: list[Dim] = [0] * missing
    for size, step, target in zip(source.shape, source.steps, shape[missing:], strict=True):
        if size != 1 and size != target:
            return None
        steps.append(0 if size == 1 else step)
    return Grid(shape, source.base, tuple(steps))


def _pair(node: ir.Node, shape: tuple[Dim, ...], shapes: Shapes, depth: int) -> tuple[Grid, Grid] | None:
    """Return both operands, broadcast to the result's shape."""
    first, second = _input(node, 0, shapes, depth), _input(node, 1, shapes, depth)
    if first is None or second is None:
        return None
    first, second = _stretched(first, shape), _stretched(second, shape)
    return None if first is None or second is None else (first, second)


def _added(node: ir.Node, shape: tuple[Dim, ...], shapes: Shapes, depth: int) -> Grid | None:
    pair = _pair(node, shape, shapes, depth)
    return None if pair is None else _difference(*pair, sign=1 if node.op_type == "Add" else -1)


def _difference(a: Grid, b: Grid, sign: int = -1) -> Grid:
    steps = tuple(x + sign * y for x, y in zip(a.steps, b.steps, strict=True))
    return Grid(a.shape, a.base + sign * b.base, steps)


def _multiplied(node: ir.Node, shape: tuple[Dim, ...], shapes: Shapes, depth: int) -> Grid | None:
    pair = _pair(node, shape, shapes, depth)
    if pair is None:
        return None
    for one, other in (pair, pair[::-1]):
        if not any(one.steps):
            return Grid(shape, one.base * other.base, tuple(one.base * s for s in other.steps))
    return None


def _cast(node: ir.Node, shape: tuple[Dim, ...], shapes: Shapes, depth: int) -> Grid | None:
    return _same(node, shape, shapes, depth) if attribute(node, "to") in _WIDE else None


_WIDE = (ir.DataType.INT32, ir.DataType.INT64)
_RULES: dict[str, _Rule] = {
    "Add": _added,
    "Cast": _cast,
    "Expand": _expanded,
    "Flatten": _reshaped,
    "Identity": _same,
    "Mul": _multiplied,
    "Range": _range,
    "Reshape": _reshaped,
    "Squeeze": _reshaped,
    "Sub": _added,
    "Transpose": _transposed,
    "Unsqueeze": _reshaped,
}


# Truth -------------------------------------------------------------------------------------------------


def at_least(value: ir.Value, shapes: Shapes) -> tuple[Grid, bool] | None:
    """Read a tensor of truth values as `grid >= 0`, or as its opposite.

    Returns:
        The grid, and whether the truth value is `grid >= 0` (True) or `grid < 0` (False); None when it is neither.
    """
    node = value.producer()
    if node is None or has_references(node):
        return None
    if is_op(node, "Not") and node.inputs[0] is not None:
        inner = at_least(node.inputs[0], shapes)
        return None if inner is None else (inner[0], not inner[1])
    shape = shapes.of(value)
    if shape is None or not is_op(node, "GreaterOrEqual", "Greater", "LessOrEqual", "Less"):
        return None
    pair = _pair(node, shape, shapes, _MAX_DEPTH)
    if pair is None:
        return None
    difference = _difference(*pair)
    if node.op_type in ("GreaterOrEqual", "Less"):
        return difference, node.op_type == "GreaterOrEqual"
    opposite = _difference(pair[1], pair[0])
    return opposite, node.op_type == "LessOrEqual"


def truth(value: ir.Value, shapes: Shapes, depth: int = _MAX_DEPTH) -> bool | None:
    """Return True when every element of a tensor of truth values is true, False when every one is false."""
    if depth == 0:
        return None
    node = value.producer()
    if node is None or is_op(node, "Constant"):
        return _constant_truth(value)
    inputs = list(node.inputs)
    ask = functools.partial(truth, shapes=shapes, depth=depth - 1)
    if is_op(node, *_MOVING) and inputs[0] is not None and not has_references(node):
        return ask(inputs[0]) if shapes.dtype(inputs[0]) == ir.DataType.BOOL else None
    if is_op(node, "And", "Or") and inputs[0] is not None and inputs[1] is not None:
        known = (ask(inputs[0]), ask(inputs[1]))
        deciding = is_op(node, "Or")
        if deciding in known:
            return deciding
        return not deciding if known == (not deciding, not deciding) else None
    if is_op(node, "Not") and inputs[0] is not None:
        inner = ask(inputs[0])
        return None if inner is None else not inner
    return _compared(value, shapes)


_MOVING = ("Expand", "Flatten", "Gather", "GatherND", "Identity", "Reshape", "Slice", "Squeeze", "Tile",
           "Transpose", "Unsqueeze")  # fmt: skip


def _compared(value: ir.Value, shapes: Shapes) -> bool | None:
    read = at_least(value, shapes)
    if read is None:
        return None
    difference, positive = read
    low = difference.lowest()
    if low is not None and provably_nonneg(low):
        return positive
    opposite = Grid(difference.shape, -difference.base, tuple(-s for s in difference.steps)).lowest()
    return not positive if opposite is not None and provably_positive(opposite) else None


def _constant_truth(value: ir.Value) -> bool | None:
    tensor = constant_tensor(value)
    if tensor is None or tensor.dtype != ir.DataType.BOOL or tensor.nbytes > _MAX_CONSTANT or tensor.size == 0:
        return None
    array = tensor.numpy()
    return True if array.all() else None if array.any() else False


def some_true_in_row(value: ir.Value, shapes: Shapes) -> bool:
    """Whether each row, that is along the last axis, of a tensor of truth values holds a true one."""
    if truth(value, shapes) is True:
        return True
    read = at_least(value, shapes)
    if read is None or not read[0].shape:
        return _constant_row(value)
    difference, positive = read
    if not positive:  # grid < 0 is -grid - 1 >= 0
        difference = Grid(difference.shape, -difference.base - 1, tuple(-s for s in difference.steps))
    last, step = difference.shape[-1], difference.steps[-1]
    first = Grid(difference.shape[:-1], difference.base, difference.steps[:-1]).lowest()
    if first is None:
        return False
    return provably_nonneg(first) or provably_nonneg(first + step * (last - 1))


def _constant_row(value: ir.Value) -> bool:
    array = constant_array(value, max_bytes=_MAX_CONSTANT)
    return array is not None and array.dtype == bool and array.ndim > 0 and bool(array.any(axis=-1).all())
