"""Numpy kernels of the operators that shape arithmetic is made of, exact to the bit.

They spare a session of the runtime for each of thousands of tiny nodes. Floating-point operators are here only
where IEEE 754 fixes the result (+ - * / and the square root, copies and comparisons).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

Array = np.ndarray[Any, Any]


_NUMPY_TYPES = {
    int(onnx.TensorProto.BOOL): np.dtype(np.bool_),
    int(onnx.TensorProto.FLOAT16): np.dtype(np.float16),
    int(onnx.TensorProto.FLOAT): np.dtype(np.float32),
    int(onnx.TensorProto.DOUBLE): np.dtype(np.float64),
    int(onnx.TensorProto.INT8): np.dtype(np.int8),
    int(onnx.TensorProto.INT16): np.dtype(np.int16),
    int(onnx.TensorProto.INT32): np.dtype(np.int32),
    int(onnx.TensorProto.INT64): np.dtype(np.int64),
    int(onnx.TensorProto.UINT8): np.dtype(np.uint8),
    int(onnx.TensorProto.UINT16): np.dtype(np.uint16),
    int(onnx.TensorProto.UINT32): np.dtype(np.uint32),
    int(onnx.TensorProto.UINT64): np.dtype(np.uint64),
}
_NATIVE = frozenset(_NUMPY_TYPES.values())
"""The element types that numpy itself computes in; others come from an extension."""


class TooLargeError(Exception):
    """A result was not computed because of its size."""


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One node to compute.

    Attributes:
        inputs: Its inputs; None for one that is left out.
        attributes: Its attributes as plain values, tensors as arrays.
        outputs: How many outputs it has.
        opset: Version of the standard operator set.
        max_bytes: Results larger than this are not computed.
    """

    inputs: Sequence[Array | None]
    attributes: Mapping[str, Any]
    outputs: int
    opset: int
    max_bytes: int

    def array(self, index: int) -> Array:
        """Return a required input.

        Raises:
            Unsupported: If it is absent.
        """
        found = self.optional(index)
        if found is None:
            raise Unsupported
        return found

    def optional(self, index: int) -> Array | None:
        """Return an input, or None when it is absent."""
        return self.inputs[index] if index < len(self.inputs) else None

    def integers(self, index: int) -> list[int]:
        """Return a required input of integers as a list."""
        found = self.array(index)
        if found.dtype.kind not in "iu":
            raise Unsupported
        return [int(x) for x in found.reshape(-1)]

    def axes(self, since: int, index: int = 1) -> list[int] | None:
        """Return `axes`, an input since that opset and an attribute before; None when absent."""
        if self.opset >= since:
            return None if self.optional(index) is None else self.integers(index)
        axes = self.attributes.get("axes")
        return None if axes is None else list(axes)

    def check(self, shape: Sequence[int], itemsize: int) -> None:
        """Refuse a result of this shape when it is too large."""
        if math.prod(shape) * itemsize > self.max_bytes:
            raise TooLargeError


class Unsupported(Exception):  # noqa: N818 - not an error: it hands the node on
    """This call is left to the runtime."""


Kernel = Callable[[Call], list[Array]]


def compute(op_type: str, call: Call) -> list[Array] | None:
    """Compute a node of the standard domain.

    Returns:
        One array per output, or None where there is no kernel or the operands do not fit the operator.

    Raises:
        TooLargeError: If a result would be larger than `call.max_bytes`.
    """
    kernel = _KERNELS.get(op_type)
    if kernel is None:
        return None
    try:
        with np.errstate(all="ignore"):
            return kernel(call)
    except (Unsupported, ValueError, IndexError):
        # numpy rejects what the runtime would reject, too: wrong ranks, indices out of range.
        return None


# --- moving elements -------------------------------------------------------------------------------------------


def _axis(call: Call, data: Array, default: int = 0) -> int:
    """Return the attribute `axis`, counted from the front."""
    axis: int = call.attributes.get("axis", default)
    if not -data.ndim <= axis < data.ndim:
        raise Unsupported
    return axis % data.ndim


def _gather(call: Call) -> list[Array]:
    data, indices = call.array(0), call.array(1)
    axis = _axis(call, data)
    call.check((*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]), data.dtype.itemsize)
    return [np.asarray(np.take(data, indices, axis=axis))]


def _gather_elements(call: Call) -> list[Array]:
    data, indices = call.array(0), call.array(1)
    axis = _axis(call, data)
    # Smaller indices are allowed, but numpy would broadcast them.
    if np.delete(indices.shape, axis).tolist() != np.delete(data.shape, axis).tolist():
        raise Unsupported
    call.check(indices.shape, data.dtype.itemsize)
    return [np.take_along_axis(data, indices.astype(np.int64), axis=axis)]


def _concat(call: Call) -> list[Array]:
    parts = [call.array(i) for i in range(len(call.inputs))]
    axis = call.attributes.get("axis", 1 if call.opset < 4 else None)
    if axis is None or any(p.dtype != parts[0].dtype for p in parts):
        raise Unsupported
    call.check([sum(p.size for p in parts)], parts[0].dtype.itemsize)
    return [np.concatenate(parts, axis=axis)]


def _copied(call: Call, view: Array) -> Array:
    call.check(view.shape, view.dtype.itemsize)
    return np.asarray(view, order="C")


def _slice(call: Call) -> list[Array]:
    data = call.array(0)
    if call.opset < 10:
        starts, ends = list(call.attributes["starts"]), list(call.attributes["ends"])
        axes, steps = call.attributes.get("axes"), None
    else:
        starts, ends = call.integers(1), call.integers(2)
        axes = None if call.optional(3) is None else call.integers(3)
        steps = None if call.optional(4) is None else call.integers(4)
    axes = list(range(len(starts))) if axes is None else list(axes)
    steps = [1] * len(starts) if steps is None else steps
    index = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[axis] = slice_of(start, end, step, data.shape[axis])
    return [_copied(call, data[tuple(index)])]


def slice_of(start: int, end: int, step: int, dim: int) -> slice:
    """Return what Slice takes along an axis of `dim` elements; bounds clamp as the operator says."""
    if step == 0:
        raise Unsupported
    start = start + dim if start < 0 else start
    end = end + dim if end < 0 else end
    if step > 0:
        return slice(min(max(start, 0), dim), min(max(end, 0), dim), step)
    first, last = min(max(start, 0), dim - 1), min(max(end, -1), dim - 1)
    return slice(first, None if last < 0 else last, step)


def _split(call: Call) -> list[Array]:
    data = call.array(0)
    axis = _axis(call, data)
    dim = data.shape[axis]
    sizes = call.attributes.get("split") if call.opset < 13 else None
    if call.opset >= 13 and call.optional(1) is not None:
        sizes = call.integers(1)
    if sizes is None:
        if call.opset < 18 and dim % call.outputs:
            raise Unsupported
        chunk = -(-dim // call.outputs)
        sizes = [min(chunk, max(dim - chunk * i, 0)) for i in range(call.outputs)]
    if sum(sizes) != dim or len(sizes) != call.outputs:
        raise Unsupported
    return [_copied(call, p) for p in np.split(data, np.cumsum(sizes)[:-1], axis=axis)]


def _squeeze(call: Call) -> list[Array]:
    data, axes = call.array(0), call.axes(13)
    if axes == []:
        raise Unsupported
    return [np.squeeze(data, axis=None if axes is None else tuple(axes))]


def _unsqueeze(call: Call) -> list[Array]:
    axes = call.axes(13)
    if axes is None:
        raise Unsupported
    return [np.expand_dims(call.array(0), tuple(axes))]


def _reshape(call: Call) -> list[Array]:
    data = call.array(0)
    target = call.integers(1) if call.opset >= 5 else list(call.attributes["shape"])
    if not call.attributes.get("allowzero", 0):
        target = [data.shape[i] if d == 0 else d for i, d in enumerate(target)]
    elif 0 in target and -1 in target:
        raise Unsupported
    return [data.reshape(target)]


def _flatten(call: Call) -> list[Array]:
    data, axis = call.array(0), call.attributes.get("axis", 1)
    axis = axis + data.ndim if axis < 0 else axis
    return [data.reshape(math.prod(data.shape[:axis]), math.prod(data.shape[axis:]))]


def _transpose(call: Call) -> list[Array]:
    return [_copied(call, np.transpose(call.array(0), call.attributes.get("perm")))]


def _expand(call: Call) -> list[Array]:
    data, target = call.array(0), call.integers(1)
    shape = np.broadcast_shapes(data.shape, tuple(target))
    call.check(shape, data.dtype.itemsize)
    return [np.broadcast_to(data, shape).copy()]


def _tile(call: Call) -> list[Array]:
    data, repeats = call.array(0), call.integers(1)
    if call.opset < 6 or len(repeats) != data.ndim:
        raise Unsupported
    call.check([d * r for d, r in zip(data.shape, repeats, strict=True)], data.dtype.itemsize)
    return [np.tile(data, repeats)]


def _where(call: Call) -> list[Array]:
    condition, first, second = call.array(0), call.array(1), call.array(2)
    if first.dtype != second.dtype or condition.dtype != np.bool_:
        raise Unsupported
    shape = np.broadcast_shapes(condition.shape, first.shape, second.shape)
    call.check(shape, first.dtype.itemsize)
    return [np.where(condition, first, second)]


# --- making elements -------------------------------------------------------------------------------------------


def _constant_of_shape(call: Call) -> list[Array]:
    shape = call.integers(0)
    fill = call.attributes.get("value", np.zeros(1, np.float32))
    call.check(shape, fill.dtype.itemsize)
    return [np.full(shape, fill.reshape(-1)[0], dtype=fill.dtype)]


def _range(call: Call) -> list[Array]:
    bounds = [call.array(i) for i in range(3)]
    if any(b.dtype != bounds[0].dtype or b.dtype.kind not in "iu" or b.size != 1 for b in bounds):
        raise Unsupported
    start, limit, delta = (int(b.reshape(())) for b in bounds)
    if delta == 0:
        raise Unsupported
    call.check([len(range(start, limit, delta))], bounds[0].dtype.itemsize)
    return [np.arange(start, limit, delta, dtype=bounds[0].dtype)]


def _cast(call: Call) -> list[Array]:
    target = _NUMPY_TYPES.get(call.attributes.get("to", 0))
    if target is None:
        raise Unsupported
    data = call.array(0)
    call.check(data.shape, target.itemsize)
    return [cast(data, target)]


def _cast_like(call: Call) -> list[Array]:
    data, target = call.array(0), call.array(1).dtype
    call.check(data.shape, target.itemsize)
    return [cast(data, target)]


def cast(data: Array, target: np.dtype[Any]) -> Array:
    """Return the data in another type of numpy's own.

    Raises:
        Unsupported: If either type is not one of numpy's own, or a float does not fit into the integer type,
            where the result depends on the processor.
    """
    if data.dtype not in _NATIVE or target not in _NATIVE:
        raise Unsupported
    if data.dtype.kind == "f" and target.kind in "iu" and data.size:
        whole, limits = np.trunc(data.astype(np.float64)), np.iinfo(target)
        # The upper limit of 64-bit types is no float64; the next one is, and is out of range.
        if not (np.isfinite(whole).all() and whole.min() >= limits.min and whole.max() < limits.max + 1.0):
            raise Unsupported
    return data.astype(target)


# --- arithmetic ------------------------------------------------------------------------------------------------


def _operands(call: Call, kinds: str, count: int = 2, since: int = 7) -> list[Array]:
    """Return operands of one type, whose broadcast result is not too large."""
    operands = [call.array(i) for i in range(count)]
    first = operands[0].dtype
    if call.opset < since or first.kind not in kinds or first not in _NATIVE:
        raise Unsupported
    if any(o.dtype != first for o in operands):
        raise Unsupported
    call.check(np.broadcast_shapes(*(o.shape for o in operands)), first.itemsize)
    return operands


def _binary(call: Call, function: Callable[[Array, Array], Any], kinds: str) -> list[Array]:
    first, second = _operands(call, kinds)
    return [np.asarray(function(first, second))]


def _divide(call: Call) -> list[Array]:
    first, second = _operands(call, "iuf")
    if first.dtype.kind == "f":
        return [np.asarray(np.divide(first, second))]
    _check_divisor(first, second)
    quotient = np.asarray(np.floor_divide(first, second))
    remainder = first - quotient * second
    # Integers divide towards zero.
    return [np.asarray(quotient + ((remainder != 0) & ((first < 0) != (second < 0))).astype(first.dtype))]


def _check_divisor(first: Array, second: Array) -> None:
    if (second == 0).any():
        raise Unsupported
    if first.dtype.kind == "i" and (second == -1).any() and (first == np.iinfo(first.dtype).min).any():
        raise Unsupported


def _modulo(call: Call) -> list[Array]:
    first, second = _operands(call, "iuf")
    if first.dtype.kind != "f":
        _check_divisor(first, second)
    if call.attributes.get("fmod", 0):
        return [np.asarray(np.fmod(first, second))]
    if first.dtype.kind == "f":
        raise Unsupported
    return [np.asarray(np.mod(first, second))]


def _unary(call: Call, function: Callable[[Array], Any], kinds: str) -> list[Array]:
    (data,) = _operands(call, kinds, count=1, since=6)
    return [np.asarray(function(data), dtype=data.dtype)]


def _logical_not(call: Call) -> list[Array]:
    (data,) = _operands(call, "b", count=1, since=1)
    return [np.asarray(np.logical_not(data))]


def _extremum(call: Call, function: Callable[[Array, Array], Any]) -> list[Array]:
    operands = _operands(call, "iu", count=len(call.inputs), since=8)
    return [np.asarray(functools.reduce(function, operands))]


def _reduce(call: Call, function: Callable[..., Any], since: int) -> list[Array]:
    data = call.array(0)
    if data.dtype.kind not in "iu" or data.dtype not in _NATIVE:
        raise Unsupported
    axes = call.axes(since)
    if not axes:
        if call.attributes.get("noop_with_empty_axes", 0):
            return [data]
        axes = list(range(data.ndim))
    keep = bool(call.attributes.get("keepdims", 1))
    return [np.asarray(function(data, axis=tuple(axes), keepdims=keep), dtype=data.dtype)]


def _sum(data: Array, **options: Any) -> Any:
    return np.sum(data, dtype=data.dtype, **options)


def _product(data: Array, **options: Any) -> Any:
    return np.prod(data, dtype=data.dtype, **options)


_KERNELS: dict[str, Kernel] = {
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Concat": _concat,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Expand": _expand,
    "Tile": _tile,
    "Where": _where,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Add": functools.partial(_binary, function=np.add, kinds="iuf"),
    "Sub": functools.partial(_binary, function=np.subtract, kinds="iuf"),
    "Mul": functools.partial(_binary, function=np.multiply, kinds="iuf"),
    "Div": _divide,
    "Mod": _modulo,
    "Equal": functools.partial(_binary, function=np.equal, kinds="iufb"),
    "Greater": functools.partial(_binary, function=np.greater, kinds="iuf"),
    "GreaterOrEqual": functools.partial(_binary, function=np.greater_equal, kinds="iuf"),
    "Less": functools.partial(_binary, function=np.less, kinds="iuf"),
    "LessOrEqual": functools.partial(_binary, function=np.less_equal, kinds="iuf"),
    "And": functools.partial(_binary, function=np.logical_and, kinds="b"),
    "Or": functools.partial(_binary, function=np.logical_or, kinds="b"),
    "Xor": functools.partial(_binary, function=np.logical_xor, kinds="b"),
    "Not": _logical_not,
    "Neg": functools.partial(_unary, function=np.negative, kinds="if"),
    "Abs": functools.partial(_unary, function=np.abs, kinds="iuf"),
    "Sqrt": functools.partial(_unary, function=np.sqrt, kinds="f"),
    "Reciprocal": functools.partial(_unary, function=np.reciprocal, kinds="f"),
    "Floor": functools.partial(_unary, function=np.floor, kinds="f"),
    "Ceil": functools.partial(_unary, function=np.ceil, kinds="f"),
    "Max": functools.partial(_extremum, function=np.maximum),
    "Min": functools.partial(_extremum, function=np.minimum),
    "ReduceSum": functools.partial(_reduce, function=_sum, since=13),
    "ReduceProd": functools.partial(_reduce, function=_product, since=18),
    "ReduceMax": functools.partial(_reduce, function=np.max, since=18),
    "ReduceMin": functools.partial(_reduce, function=np.min, since=18),
}

OPERATORS = frozenset(_KERNELS)
"""The operators that have a kernel here."""
