"""Weights of 8 bits whose products with 8-bit activations can be added up by pairs in 16 bits.

x86-64 processors without VNNI multiply uint8 activations by int8 weights and add neighbouring products, two at a time,
in 16 bits (the instruction PMADDUBSW), where 255 * 127 + 255 * 127 saturates. The usual way out is to halve all
weights. But a sum is too large only where two neighbours have the same sign and both are large, and most weights of a
channel are far smaller than its largest. So those few pairs are made smaller, and all others keep the finer grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from onnxopt.numeric import grids
from onnxopt.numeric.blocks import BLOCK_ELEMENTS
from onnxopt.numeric.grids import Array, Grid

MOST = 128
"""What the magnitudes of two neighbours of the same sign may add up to: 255 * 128 is within 16 bits."""
EQUAL = MOST // 2
"""What all weights may be at once."""
CHANNELS = 2
"""What has more axes than these has places too."""
LEVELS = (127, 112, 96, 80, EQUAL)
"""Integers that the largest weight of a channel may become. With the last one, no pair is too large."""

Order = tuple[int, ...]
"""Axes of a weight that are summed over, from the slowest to the fastest."""


def orders_of_convolution(shape: Sequence[int], groups: int) -> tuple[Order, ...]:
    """Return in which order ONNX Runtime sums over the weight of a Conv: channels last.

    Args:
        shape: Of the weight.
        groups: Of the Conv. There is no order where each makes one channel of one, which is added up in 32 bits.
    """
    if shape[1] == 1 and groups == shape[0]:
        return ()
    return ((*range(2, len(shape)), 1),)


def orders_of_matrix(channel_axis: int) -> tuple[Order, ...]:
    """Return the order in which ONNX Runtime sums over a matrix whose output channels lie along axis 0 or 1."""
    return ((1 - channel_axis,),)


def fitting_grid(weight: Array, axis: int | None, orders: Sequence[Order]) -> Grid:
    """Return the int8 grid to which `fitting_integers` rounds a weight with the least square error.

    Args:
        weight: Floating point, finite, with at least one element.
        axis: The axis of output channels, each of which gets a scale; None for one scale in all.
        orders: In which orders products may be added up.
    """
    low, high = grids.value_range(weight, axis)
    found = [grids.symmetric(low, high, axis, levels=levels) for levels in LEVELS]
    errors = np.stack([_square_errors(weight, each, orders) for each in found])
    best = errors.argmin(axis=0)
    scales = np.stack([each.scale for each in found])
    scale = np.take_along_axis(scales, np.expand_dims(best, 0), 0)[0]
    return dataclasses.replace(found[0], scale=np.asarray(scale, low.dtype))


def fitting_integers(weight: Array, grid: Grid, orders: Sequence[Order]) -> Array:
    """Round a weight to a grid, pairs that would be too large to less.

    Args:
        weight: Floating point, finite.
        grid: A grid of int8 whose zero point is 0.
        orders: In which orders products may be added up.

    Returns:
        int8, shaped like the weight.
    """
    result = grids.quantize(weight, grid)
    for order in orders:
        _fit_pairs(result, order)
    return result


def held_orders(integers: Array) -> list[Order]:
    """Return in which orders the sums of all neighbours fit into 16 bits: along one axis, and channels last.

    Args:
        integers: Weights of 8 bits with zero point 0.
    """
    rank = integers.ndim
    orders: list[Order] = [(axis,) for axis in range(rank)]
    if rank > CHANNELS:
        orders.append((*range(2, rank), 1))
    return [order for order in orders if not too_large(integers, [order]).any()]


def too_large(integers: Array, orders: Sequence[Order]) -> Array:
    """Return which weights are one of two neighbours whose sums do not fit into 16 bits.

    Args:
        integers: Whole numbers, any shape.
        orders: In which orders products may be added up.

    Returns:
        Booleans, shaped like the weights.
    """
    result = np.zeros(integers.shape, bool)
    for order in orders:
        kept = tuple(i for i in range(integers.ndim) if i not in order)
        view, found = integers.transpose(*kept, *order), result.transpose(*kept, *order)
        rows = np.ascontiguousarray(view).reshape(*view.shape[: len(kept)], -1)
        first, second = _neighbours(rows)
        wide = _are_too_large(first, second)
        marked = np.zeros(rows.shape, bool)
        for part in _neighbours(marked):
            part[...] = wide
        found |= marked.reshape(view.shape)
    return result


def _neighbours(rows: Array) -> tuple[Array, Array]:
    """Return the first and the second of each pair along the last axis, as views."""
    end = rows.shape[-1] // 2 * 2
    return rows[..., 0:end:2], rows[..., 1:end:2]


def _are_too_large(first: Array, second: Array) -> Array:
    together = np.abs(first.astype(np.int16)) + np.abs(second.astype(np.int16))
    return np.asarray((together > MOST) & ((first > 0) == (second > 0)))


def _square_errors(weight: Array, grid: Grid, orders: Sequence[Order]) -> Array:
    """Return the sum of square errors, one per scale of the grid; works on some channels at a time."""
    if grid.axis is None:
        return np.asarray(np.square(_lost(weight, grid, orders)).sum())
    channels = weight.shape[grid.axis]
    step = max(1, BLOCK_ELEMENTS * channels // weight.size)
    others = tuple(i for i in range(weight.ndim) if i != grid.axis)
    sums = []
    for start in range(0, channels, step):
        piece = slice(start, start + step)
        some = Grid(grid.scale[piece], grid.zero_point[piece], grid.axis)
        index = (*[slice(None)] * grid.axis, piece)
        sums.append(np.square(_lost(weight[index], some, orders)).sum(axis=others))
    return np.concatenate(sums)


def _lost(weight: Array, grid: Grid, orders: Sequence[Order]) -> Array:
    return grids.dequantize(fitting_integers(weight, grid, orders), grid) - weight


def _fit_pairs(weight: Array, order: Order) -> None:
    """Lower neighbours of the same sign, in place, until no pair of them adds up to more than `MOST`."""
    kept = tuple(i for i in range(weight.ndim) if i not in order)
    view = weight.transpose(*kept, *order)
    rows = view.reshape(*(view.shape[: len(kept)]), -1)
    first, second = _neighbours(rows)
    at = np.nonzero(_are_too_large(first, second))
    if not len(at[0]):
        return
    a, b = np.abs(first[at].astype(np.int16)), np.abs(second[at].astype(np.int16))
    excess = a + b - MOST
    # The larger one gives the odd unit.
    more = excess // 2 + excess % 2 * (a >= b)
    first[at] = np.sign(first[at]) * (a - more)
    second[at] = np.sign(second[at]) * (b - (excess - more))
    view[...] = rows.reshape(view.shape)
