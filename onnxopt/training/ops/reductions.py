"""Operators that reduce or compare along axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onnxopt.training.call import Call, Operator
from onnxopt.training.values import ints, normal_axis

_Reduction = Callable[[Tensor, list[int], bool], Tensor]


def _axes(call: Call, x: Tensor, axes: Tensor | None) -> list[int] | None:
    """Return the axes to reduce, from input or attribute; None when nothing is to be done."""
    given = ints(axes) if axes is not None else list(call.get("axes") or ())
    if given:
        return [normal_axis(a, x.ndim) for a in given]
    return None if call.get("noop_with_empty_axes", 0) else list(range(x.ndim))


def _reduced(function: _Reduction, each: Callable[[Tensor], Tensor] = lambda x: x) -> Operator:
    """Return an operator that reduces.

    Args:
        function: Reduces axes.
        each: What happens to each element where there is nothing to reduce.
    """

    def run(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
        wanted = _axes(call, x, axes)
        if wanted is None or not wanted:
            return each(x)
        return function(x, wanted, bool(call.get("keepdims", 1)))

    return run


def _extreme(function: Callable[..., Tensor], of_nothing: float) -> _Reduction:
    def run(x: Tensor, axes: list[int], keep: bool) -> Tensor:
        if x.numel() == 0 and x.is_floating_point():
            sizes = [1 if i in axes else size for i, size in enumerate(x.shape) if keep or i not in axes]
            return torch.full(sizes, of_nothing, dtype=x.dtype)
        if x.dtype is torch.bool:
            return function(x.to(torch.uint8), dim=axes, keepdim=keep).to(torch.bool)
        return function(x, dim=axes, keepdim=keep)

    return run


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(dim=axes, keepdim=keep, dtype=x.dtype)


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(dim=axes, keepdim=keep)
    return x.to(torch.float64).mean(dim=axes, keepdim=keep).to(x.dtype)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(dim=axis, keepdim=keep, dtype=x.dtype)
    return x


def _log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.logsumexp(x, dim=axes, keepdim=keep)


def _l2(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _sum(x * x, axes, keep).sqrt()


def softmax_like(function: Callable[..., Tensor]) -> Operator:
    """Return Softmax or LogSoftmax; before opset 13 all axes from `axis` on count as one."""

    def run(call: Call, x: Tensor) -> Tensor:
        if call.opset >= 13:
            return function(x, dim=call.get("axis", -1))
        axis = normal_axis(call.get("axis", 1), x.ndim)
        if axis == x.ndim - 1:
            return function(x, dim=-1)
        return function(x.flatten(axis), dim=-1).reshape(x.shape)

    return run


def hardmax(call: Call, x: Tensor) -> Tensor:
    """Return one where the first largest element is."""
    axis = normal_axis(call.get("axis", -1 if call.opset >= 13 else 1), x.ndim)
    flat = x if call.opset >= 13 else x.flatten(axis)
    axis = axis if call.opset >= 13 else flat.ndim - 1
    chosen = flat.argmax(dim=axis, keepdim=True)
    return torch.zeros_like(flat).scatter(axis, chosen, 1).reshape(x.shape)


def _index(function: Callable[..., Tensor]) -> Operator:
    def run(call: Call, x: Tensor) -> Tensor:
        axis, keep = call.get("axis", 0), bool(call.get("keepdims", 1))
        if not call.get("select_last_index", 0):
            return function(x, dim=axis, keepdim=keep)
        return x.shape[axis] - 1 - function(x.flip(axis), dim=axis, keepdim=keep)

    return run


def top_k(call: Call, x: Tensor, k: Tensor | None = None) -> Any:
    """Return the largest or smallest elements and where they are."""
    count = call.get("k") if k is None else ints(k)[0]
    axis = normal_axis(call.get("axis", -1), x.ndim)
    order = torch.argsort(x, dim=axis, descending=bool(call.get("largest", 1)), stable=True)
    chosen = order.narrow(axis, 0, count)
    return x.gather(axis, chosen), chosen


def cumulative_sum(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    """Sum up along an axis."""
    along = ints(axis)[0]
    x = x.flip(along) if call.get("reverse", 0) else x
    total = x.cumsum(along, dtype=x.dtype)
    total = total - x if call.get("exclusive", 0) else total
    return total.flip(along) if call.get("reverse", 0) else total


OPS: dict[str, Operator] = {
    "ReduceSum": _reduced(_sum),
    "ReduceMean": _reduced(_mean),
    "ReduceMax": _reduced(_extreme(torch.amax, -math.inf)),
    "ReduceMin": _reduced(_extreme(torch.amin, math.inf)),
    "ReduceProd": _reduced(_product),
    "ReduceL1": _reduced(lambda x, axes, keep: _sum(x.abs(), axes, keep), torch.abs),
    "ReduceL2": _reduced(_l2, torch.abs),
    "ReduceLogSum": _reduced(lambda x, axes, keep: _sum(x, axes, keep).log(), torch.log),
    "ReduceLogSumExp": _reduced(_log_sum_exp),
    "ReduceSumSquare": _reduced(lambda x, axes, keep: _sum(x * x, axes, keep), torch.square),
    "Softmax": softmax_like(torch.softmax),
    "LogSoftmax": softmax_like(torch.log_softmax),
    "Hardmax": hardmax,
    "ArgMax": _index(torch.argmax),
    "ArgMin": _index(torch.argmin),
    "TopK": top_k,
    "CumSum": cumulative_sum,
}
