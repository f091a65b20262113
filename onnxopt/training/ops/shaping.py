"""Operators that move elements or make them from shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from onnxopt.training.call import Call, Operator
from onnxopt.training.values import NoCounterpart, ints, normal_axis, on_device, tensor_to_torch, to_torch, torch_dtype


def reshape(call: Call, x: Tensor, shape: Tensor | None = None) -> Tensor:
    """Reshape; 0 keeps the size of that axis unless `allowzero`."""
    sizes = list(call.get("shape")) if shape is None else ints(shape)
    if not call.get("allowzero", 0):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


def transpose(call: Call, x: Tensor) -> Tensor:
    """Permute axes; reverse them by default."""
    return x.permute(tuple(call.get("perm") or reversed(range(x.ndim))))


def _given_axes(call: Call, axes: Tensor | None) -> list[int] | None:
    if axes is not None:
        return ints(axes)
    given = call.get("axes")
    return None if given is None else list(given)


def squeeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Remove axes of size one."""
    given = _given_axes(call, axes)
    if given is None:
        return x.squeeze()
    gone = {normal_axis(a, x.ndim) for a in given}
    return x.reshape([size for i, size in enumerate(x.shape) if i not in gone])


def unsqueeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Insert axes of size one."""
    given = _given_axes(call, axes) or []
    rank = x.ndim + len(given)
    for axis in sorted(normal_axis(a, rank) for a in given):
        x = x.unsqueeze(axis)
    return x


def flatten(call: Call, x: Tensor) -> Tensor:
    """Make a matrix of what is before and from `axis` on."""
    axis = normal_axis(call.get("axis", 1), x.ndim)
    rows = int(np.prod(x.shape[:axis], dtype=np.int64))
    return x.reshape(rows, int(np.prod(x.shape[axis:], dtype=np.int64)))


def expand(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    """Broadcast, both ways."""
    return x.expand(torch.broadcast_shapes(x.shape, tuple(ints(shape))))


def tile(call: Call, x: Tensor, repeats: Tensor) -> Tensor:
    """Repeat along each axis."""
    return x.repeat(ints(repeats))


def concat(call: Call, *inputs: Tensor) -> Tensor:
    """Join along an axis."""
    return torch.cat(inputs, dim=call.get("axis", 1))


def split(call: Call, x: Tensor, sizes: Tensor | None = None) -> Any:
    """Divide along an axis, in equal parts where no sizes are given."""
    axis = normal_axis(call.get("axis", 0), x.ndim)
    parts = ints(sizes) if sizes is not None else list(call.get("split") or ())
    if not parts:
        count = call.get("num_outputs") or len(call.node.outputs)
        each = -(-x.shape[axis] // count)
        parts = [min(each, x.shape[axis] - i * each) for i in range(count)]
    return tuple(torch.split(x, parts, dim=axis))


def slice_(
    call: Call,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """Take ranges, with bounds clipped and steps of any sign."""
    begin = list(call.get("starts")) if starts is None else ints(starts)
    end = list(call.get("ends")) if ends is None else ints(ends)
    along = _given_axes(call, axes) or list(range(len(begin)))
    step = ints(steps) if steps is not None else [1] * len(begin)
    for a, first, last, by in zip(along, begin, end, step, strict=True):
        axis = normal_axis(a, x.ndim)
        chosen = range(x.shape[axis])[slice(first, None if by < 0 and last < -x.shape[axis] else last, by)]
        if by == 1:
            x = x.narrow(axis, chosen.start if len(chosen) else 0, len(chosen))
        else:
            x = x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64))
    return x


def pad(
    call: Call, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    """Add a border, or cut one off."""
    amounts = list(call.get("pads") or call.get("paddings")) if pads is None else ints(pads)
    along = [normal_axis(a, x.ndim) for a in ints(axes)] if axes is not None else list(range(x.ndim))
    before, after = amounts[: len(along)], amounts[len(along) :]
    mode = call.get("mode", "constant")
    fill = call.get("value", 0.0) if value is None else value.item()
    if mode == "constant":
        ends = {a: (b, c) for a, b, c in zip(along, before, after, strict=True)}
        flat = [n for axis in reversed(range(x.ndim)) for n in ends.get(axis, (0, 0))]
        return functional.pad(x, flat, value=fill)
    for axis, first, last in zip(along, before, after, strict=True):
        size = x.shape[axis]
        places = np.arange(-first, size + last)
        x = x.index_select(axis, on_device(_beyond(places, size, mode)))
    return x


def _beyond(places: np.ndarray, size: int, mode: str) -> np.ndarray:
    """Return which element stands at places outside of an axis."""
    if mode == "edge":
        clipped: np.ndarray = np.clip(places, 0, size - 1)
        return clipped
    if mode == "wrap":
        wrapped: np.ndarray = places % size
        return wrapped
    if mode != "reflect":
        raise NoCounterpart(f'has the mode "{mode}"')
    if size == 1:
        return np.zeros_like(places)
    turned: np.ndarray = np.abs((places + size - 1) % (2 * size - 2) - (size - 1))
    return turned


def shape(call: Call, x: Tensor) -> Tensor:
    """Return the shape, or a part of it."""
    return torch.tensor(list(x.shape)[slice(call.get("start", 0), call.get("end"))], dtype=torch.int64)


def constant_of_shape(call: Call, sizes: Tensor) -> Tensor:
    """Fill a shape with one value."""
    given = call.get("value")
    value = torch.zeros(1) if given is None else tensor_to_torch(given)
    return value.reshape(()).expand(ints(sizes)).clone()


def constant(call: Call) -> Tensor:
    """Return what an attribute holds."""
    for name, dtype in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        if call.get(name) is not None:
            return to_torch(np.asarray(call.get(name), dtype=dtype))
    if call.get("value") is None:
        raise NoCounterpart("holds strings or a sparse tensor")
    return tensor_to_torch(call.get("value"))


def range_(call: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """Count from start to limit."""
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def depth_to_space(call: Call, x: Tensor) -> Tensor:
    """Move channels into the plane."""
    n, c, h, w = x.shape
    b = call.get("blocksize")
    if call.get("mode", "DCR") == "DCR":
        return x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // b**2, h * b, w * b)
    return x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // b**2, h * b, w * b)


def space_to_depth(call: Call, x: Tensor) -> Tensor:
    """Move blocks of the plane into channels."""
    n, c, h, w = x.shape
    b = call.get("blocksize")
    order = (0, 3, 5, 1, 2, 4) if call.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    return x.reshape(n, c, h // b, b, w // b, b).permute(order).reshape(n, c * b * b, h // b, w // b)


def trilu(call: Call, x: Tensor, k: Tensor | None = None) -> Tensor:
    """Keep the upper or lower triangle."""
    diagonal = 0 if k is None else int(k)
    return torch.triu(x, diagonal) if call.get("upper", 1) else torch.tril(x, diagonal)


def eye_like(call: Call, x: Tensor) -> Tensor:
    """Return ones on a diagonal."""
    dtype = x.dtype if call.get("dtype") is None else torch_dtype(call.get("dtype"))
    k = call.get("k", 0)
    return torch.ones(tuple(x.shape), dtype=torch.float32).tril(k).triu(k).to(dtype)


def one_hot(call: Call, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    """Set one element per index."""
    size = ints(depth)[0]
    axis = normal_axis(call.get("axis", -1), indices.ndim + 1)
    chosen = torch.remainder(indices.to(torch.int64), size).unsqueeze(axis)
    outside = ((indices < -size) | (indices >= size)).unsqueeze(axis)
    where = torch.arange(size).reshape([size if i == axis else 1 for i in range(indices.ndim + 1)])
    return torch.where((where == chosen) & ~outside, values[1], values[0])


OPS: dict[str, Operator] = {
    "Reshape": reshape,
    "Transpose": transpose,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Flatten": flatten,
    "Expand": expand,
    "Tile": tile,
    "Concat": concat,
    "Split": split,
    "Slice": slice_,
    "Pad": pad,
    "Shape": shape,
    "Size": lambda call, x: torch.tensor(x.numel(), dtype=torch.int64),
    "ConstantOfShape": constant_of_shape,
    "Constant": constant,
    "Range": range_,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
    "Trilu": trilu,
    "EyeLike": eye_like,
    "OneHot": one_hot,
}
