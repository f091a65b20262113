"""Operators that pick elements by index, or put them there."""

from __future__ import annotations

import torch
from torch import Tensor

from onnxopt.training.call import Call, Operator
from onnxopt.training.values import NoCounterpart, normal_axis


def _wrapped(indices: Tensor, size: int) -> Tensor:
    """Return indices counted from the front."""
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + size, indices)


def gather(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    """Pick slices of an axis."""
    axis = normal_axis(call.get("axis", 0), x.ndim)
    flat = x.index_select(axis, _wrapped(indices.reshape(-1), x.shape[axis]))
    return flat.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def gather_elements(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    """Pick single elements along an axis."""
    axis = normal_axis(call.get("axis", 0), x.ndim)
    return x.gather(axis, _wrapped(indices, x.shape[axis]))


def gather_nd(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    """Pick slices by several indices at once."""
    batch = call.get("batch_dims", 0)
    depth = indices.shape[-1]
    lead = [
        torch.arange(x.shape[i]).reshape([-1 if j == i else 1 for j in range(indices.ndim - 1)]) for i in range(batch)
    ]
    picks = [_wrapped(indices[..., i], x.shape[batch + i]) for i in range(depth)]
    return x[(*lead, *picks)]


def scatter_elements(call: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Put or add single elements along an axis."""
    axis = normal_axis(call.get("axis", 0), x.ndim)
    at = _wrapped(indices, x.shape[axis])
    how = call.get("reduction", "none")
    if how == "none":
        return x.scatter(axis, at, updates)
    return x.scatter_reduce(axis, at, updates, _reduction(how), include_self=True)


def scatter_nd(call: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Put or add slices by several indices at once."""
    depth = indices.shape[-1]
    inner = x.shape[depth:]
    strides = [1] * depth
    for i in reversed(range(depth - 1)):
        strides[i] = strides[i + 1] * x.shape[i + 1]
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for i in range(depth):
        flat = flat + _wrapped(indices[..., i], x.shape[i]) * strides[i]
    rows = x.reshape(-1, *inner)
    values = updates.reshape(-1, *inner)
    how = call.get("reduction", "none")
    if how == "none":
        return rows.index_copy(0, flat.reshape(-1), values).reshape(x.shape)
    at = flat.reshape(-1, *([1] * len(inner))).expand_as(values)
    return rows.scatter_reduce(0, at, values, _reduction(how), include_self=True).reshape(x.shape)


def _reduction(how: str) -> str:
    known = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    if how not in known:
        raise NoCounterpart(f'reduces by "{how}"')
    return known[how]


def compress(call: Call, x: Tensor, condition: Tensor) -> Tensor:
    """Keep the slices where a condition holds."""
    chosen = torch.nonzero(condition).reshape(-1)
    if call.get("axis") is None:
        return x.reshape(-1).index_select(0, chosen)
    return x.index_select(call.get("axis"), chosen)


def reverse_sequence(call: Call, x: Tensor, lengths: Tensor) -> Tensor:
    """Turn around the beginning of each sequence."""
    time, batch = call.get("time_axis", 0), call.get("batch_axis", 1)
    moved = x.movedim((batch, time), (0, 1))
    steps = torch.arange(moved.shape[1])
    many = lengths.reshape(-1, 1)
    order = torch.where(steps < many, many - 1 - steps, steps)
    return moved[torch.arange(moved.shape[0]).reshape(-1, 1), order].movedim((0, 1), (batch, time))


OPS: dict[str, Operator] = {
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "ScatterElements": scatter_elements,
    "Scatter": scatter_elements,
    "ScatterND": scatter_nd,
    "NonZero": lambda call, x: torch.nonzero(x).transpose(0, 1),
    "Compress": compress,
    "ReverseSequence": reverse_sequence,
}
