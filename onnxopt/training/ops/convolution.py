"""Convolutions, pooling and other windows, with the paddings of ONNX."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from onnxopt.training.call import Call, Operator
from onnxopt.training.values import NoCounterpart, ints

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
_MAX_POOL = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}


def _of_rank(table: dict[int, Any], rank: int) -> Any:
    if rank not in table:
        raise NoCounterpart(f"has {rank} spatial axes")
    return table[rank]


def paddings(
    call: Call, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[tuple[int, int]]:
    """Return how many elements are added before and after each spatial axis."""
    auto = call.get("auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        pads = list(call.get("pads") or [0] * (2 * len(kernel)))
        return list(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True))
    if auto == "VALID":
        return [(0, 0)] * len(kernel)
    found = []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        less = total // 2
        found.append((less, total - less) if auto == "SAME_UPPER" else (total - less, less))
    return found


def _padded(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    flat = [n for pair in reversed(pads) for n in pair]
    return functional.pad(x, flat, value=value) if any(flat) else x


def convolve(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve, with padding of both sides that may differ."""
    rank = x.ndim - 2
    kernel = list(weight.shape[2:])
    strides = list(call.get("strides") or [1] * rank)
    dilations = list(call.get("dilations") or [1] * rank)
    pads = paddings(call, x.shape[2:], kernel, strides, dilations)
    even = all(first == last for first, last in pads)
    x = x if even else _padded(x, pads)
    return _of_rank(_CONV, rank)(
        x,
        weight,
        bias,
        stride=strides,
        padding=[first for first, _ in pads] if even else 0,
        dilation=dilations,
        groups=call.get("group", 1),
    )


def convolve_transposed(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve the other way round, and cut the padding off."""
    rank = x.ndim - 2
    kernel = list(weight.shape[2:])
    strides = list(call.get("strides") or [1] * rank)
    dilations = list(call.get("dilations") or [1] * rank)
    extra = list(call.get("output_padding") or [0] * rank)
    whole = [
        (size - 1) * s + (k - 1) * d + 1 + e
        for size, s, k, d, e in zip(x.shape[2:], strides, kernel, dilations, extra, strict=True)
    ]
    pads = _transposed_pads(call, list(x.shape[2:]), whole, strides)
    y = _of_rank(_TRANSPOSED, rank)(x, weight, None, stride=strides, dilation=dilations, groups=call.get("group", 1))
    # what the padding of the output adds lies behind, and a kernel may not reach there
    y = _padded(y, [(-first, e - last) for (first, last), e in zip(pads, extra, strict=True)])
    return y if bias is None else y + bias.reshape(-1, *([1] * rank))


def _transposed_pads(
    call: Call, sizes: Sequence[int], whole: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Return what is cut off each axis of the whole result."""
    auto = call.get("auto_pad", "NOTSET")
    wanted = call.get("output_shape")
    if wanted is not None:
        wanted = list(wanted)[-len(sizes) :]
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [size * stride for size, stride in zip(sizes, strides, strict=True)]
    elif auto == "VALID":
        return [(0, 0)] * len(sizes)
    else:
        pads = list(call.get("pads") or [0] * (2 * len(sizes)))
        return list(zip(pads[: len(sizes)], pads[len(sizes) :], strict=True))
    found = []
    for size, target in zip(whole, wanted, strict=True):
        total = size - target
        if total < 0:
            found.append((0, total))
            continue
        less, more = total // 2, total - total // 2
        found.append((less, more) if auto == "SAME_UPPER" else (more, less))
    return found


def _window(call: Call, x: Tensor) -> tuple[list[int], list[int], list[int], list[tuple[int, int]], list[int]]:
    """Return kernel, strides, dilations, paddings, and what is added behind for a window that reaches out there."""
    rank = x.ndim - 2
    kernel = list(call.get("kernel_shape"))
    strides = list(call.get("strides") or [1] * rank)
    dilations = list(call.get("dilations") or [1] * rank)
    pads = paddings(call, x.shape[2:], kernel, strides, dilations)
    more = [0] * rank
    for i, (size, k, s, d) in enumerate(zip(x.shape[2:], kernel, strides, dilations, strict=True)):
        span = size + sum(pads[i]) - ((k - 1) * d + 1)
        if -s < span < 0:
            more[i] = -span  # the runtime rounds towards zero, so that a window that is too large is one all the same
        elif call.get("ceil_mode", 0):
            count = math.ceil(span / s)
            # a window that would begin behind the padding is none
            count -= count * s >= size + pads[i][0]
            more[i] = max(count * s - span, 0)
    return kernel, strides, dilations, pads, more


def max_pool(call: Call, x: Tensor) -> Any:
    """Return the largest element of each window."""
    if call.wants(1) and call.get("storage_order", 0):
        raise NoCounterpart("counts its indices column by column")
    dtype = x.dtype
    kernel, strides, dilations, pads, more = _window(call, x)
    x = x if x.is_floating_point() else x.to(torch.float32)
    wide = [(first, last + m) for (first, last), m in zip(pads, more, strict=True)]
    padded = _padded(x, wide, -math.inf)
    pool = _of_rank(_MAX_POOL, x.ndim - 2)
    sizes = _window_counts(padded, kernel, strides, dilations)
    if 0 in sizes:
        empty = x.new_zeros((*x.shape[:2], *sizes)).to(dtype)
        return (empty, empty.to(torch.int64)) if call.wants(1) else empty
    if not call.wants(1):
        return pool(padded, kernel, strides, 0, dilations).to(dtype)
    y, at = pool(padded, kernel, strides, 0, dilations, return_indices=True)
    return y.to(dtype), _unpadded(at, x, padded, wide)


def _unpadded(at: Tensor, x: Tensor, padded: Tensor, pads: Sequence[tuple[int, int]]) -> Tensor:
    """Return indices into all of x, from those into each padded plane."""
    flat = torch.zeros_like(at)
    rest, stride = at, 1
    for axis in reversed(range(2, x.ndim)):
        place = rest % padded.shape[axis] - pads[axis - 2][0]
        rest = rest // padded.shape[axis]
        flat = flat + place * stride
        stride *= x.shape[axis]
    planes = torch.arange(x.shape[0] * x.shape[1]).reshape(x.shape[0], x.shape[1], *([1] * (x.ndim - 2)))
    return flat + planes * stride


def average_pool(call: Call, x: Tensor) -> Tensor:
    """Return the mean of each window, padding counted or not."""
    kernel, strides, dilations, pads, more = _window(call, x)
    total = _window_sum(
        _padded(x, [(a, b + m) for (a, b), m in zip(pads, more, strict=True)]), kernel, strides, dilations
    )
    counted = pads if call.get("count_include_pad", 0) else [(0, 0)] * len(pads)
    ones = _padded(torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype), counted, 1.0)
    around = [(a - c, b - d + m) for (a, b), (c, d), m in zip(pads, counted, more, strict=True)]
    return total / _window_sum(_padded(ones, around), kernel, strides, dilations)


def lp_pool(call: Call, x: Tensor) -> Tensor:
    """Return the p-norm of each window."""
    p = call.get("p", 2)
    kernel, strides, dilations, pads, more = _window(call, x)
    powers = _padded(x.abs() ** p, [(a, b + m) for (a, b), m in zip(pads, more, strict=True)])
    return _window_sum(powers, kernel, strides, dilations) ** (1 / p)


def _window_counts(x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """Return how many windows fit on each spatial axis of what is padded already."""
    return [
        max((size - ((k - 1) * d + 1)) // s + 1, 0)
        for size, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True)
    ]


def _window_sum(x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Tensor:
    sizes = _window_counts(x, kernel, strides, dilations)
    if 0 in sizes:
        return x.new_zeros((*x.shape[:2], *sizes))
    if len(kernel) == 2 and set(dilations) == {1}:
        return functional.avg_pool2d(x, list(kernel), list(strides), divisor_override=1)
    total = None
    for offsets in itertools.product(*map(range, kernel)):
        part = x
        for axis, (o, d, s, n) in enumerate(zip(offsets, dilations, strides, sizes, strict=True), 2):
            part = part[(slice(None),) * axis + (slice(o * d, o * d + (n - 1) * s + 1, s),)]
        total = part if total is None else total + part
    return total


def columns_to_image(call: Call, x: Tensor, image: Tensor, block: Tensor) -> Tensor:
    """Add blocks up where they lie in an image."""
    sizes, kernel = ints(image), ints(block)
    pads = call.get("pads", [0] * 2 * len(sizes))
    if len(sizes) != 2:
        raise NoCounterpart(f"has {len(sizes)} spatial axes")
    # padded on all sides in torch, and then cut to what is left between the pads
    padded = [sizes[i] + pads[i] + pads[i + 2] for i in range(2)]
    whole = functional.fold(
        x, padded, kernel, dilation=call.get("dilations", [1, 1]), stride=call.get("strides", [1, 1])
    )
    return whole[..., pads[0] : pads[0] + sizes[0], pads[1] : pads[1] + sizes[1]]


def _spatial(x: Tensor) -> list[int]:
    return list(range(2, x.ndim))


def global_lp_pool(call: Call, x: Tensor) -> Tensor:
    """Return the p-norm of each channel."""
    p = call.get("p", 2)
    return (x.abs() ** p).sum(dim=_spatial(x), keepdim=True) ** (1 / p)


OPS: dict[str, Operator] = {
    "Conv": convolve,
    "ConvTranspose": convolve_transposed,
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "LpPool": lp_pool,
    "GlobalAveragePool": lambda call, x: x.mean(dim=_spatial(x), keepdim=True),
    "GlobalMaxPool": lambda call, x: x.amax(dim=_spatial(x), keepdim=True),
    "GlobalLpPool": global_lp_pool,
    "Col2Im": columns_to_image,
}
