"""Integers of 2, 4 or 8 bits for a matrix, with a scale for every block of neighbours in a row.

A matrix here has a row per output channel, and its columns are what products are summed over. Each row is divided
into blocks of so many columns; the last one is filled up with zeros. A code c of a block stands for

    real = (c - zero point) * scale,    0 <= c < 2 ** bits

as in DequantizeLinear with a block size and in MatMulNBits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FIRST = {8: 1.005, 4: 1.05, 2: 1.1}
LAST = {8: 0.98, 4: 0.6, 2: 0.3}
STEPS = {8: 6, 4: 20, 2: 28}
"""By bits: the ranges tried for a block, as parts of its true one, from the first to the last in so many steps. A range
wider than the true one can win because its levels lie elsewhere."""

CHUNK_ELEMENTS = 1 << 18
"""Elements worked on at a time: with the temporary copies they stay in the second-level cache of most CPUs."""


@dataclasses.dataclass(frozen=True, slots=True)
class BlockGrid:
    """The real numbers that the codes of a matrix stand for.

    Attributes:
        scale: Distance between two neighbours, of shape (rows, blocks). Negative where the code 0 stands for the
            largest value of a block.
        zero_point: The code that stands for 0.0. Same shape, uint8.
        bits: Bits of a code.
        block: Columns per block.
    """

    scale: Array
    zero_point: Array
    bits: int
    block: int

    def __post_init__(self) -> None:
        """Check that the parts fit.

        Raises:
            ValueError: If they do not.
        """
        if self.scale.ndim != 2 or self.scale.shape != self.zero_point.shape:
            raise ValueError(f"scale {self.scale.shape} and zero point {self.zero_point.shape} are not rows of blocks")
        if self.bits not in (2, 4, 8) or self.block < 1:
            raise ValueError(f"{self.bits} bits in blocks of {self.block} are not supported")

    def rows(self, which: slice) -> BlockGrid:
        """Return the grid of some of the rows."""
        return BlockGrid(self.scale[which], self.zero_point[which], self.bits, self.block)


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """What kind of grid is wanted.

    Attributes:
        bits: 2, 4 or 8.
        block: Columns per block.
        symmetric: Whether 0.0 is always the code in the middle, so that zero points need not be stored.
        clip: "none": the extremes of a block are within reach. "mse": the range with the smallest mean square error.
        signed_scale: Whether a scale may be negative. Of the symmetric grids those then also reach the value with the
            largest magnitude, whatever its sign, with all levels.
        scale_dtype: Type that the scales are rounded to.
    """

    bits: int
    block: int
    symmetric: bool = False
    clip: Literal["none", "mse"] = "none"
    signed_scale: bool = True
    scale_dtype: Any = np.float32


def blocked(matrix: Array, block: int) -> Array:
    """Return a float32 matrix as (rows, blocks, block), filled up with zeros."""
    rows, columns = matrix.shape
    missing = -columns % block
    matrix = matrix.astype(np.float32, copy=False)
    if missing:
        matrix = np.pad(matrix, ((0, 0), (0, missing)))
    return matrix.reshape(rows, -1, block)


def fit(matrix: Array, spec: Spec, importance: Array | None = None) -> BlockGrid:
    """Return a grid for a matrix.

    Args:
        matrix: Floating point, finite, (rows, columns). Read in small pieces.
        spec: What kind of grid.
        importance: How much a square error weighs, by column, for the search; all alike by default.
    """
    blocks = -(-matrix.shape[1] // spec.block)
    scale = np.empty((matrix.shape[0], blocks), spec.scale_dtype)
    zero_point = np.empty(scale.shape, np.uint8)
    weights = None if importance is None else blocked(importance[None], spec.block)
    for rows in _chunks(matrix.shape):
        piece = blocked(matrix[rows], spec.block)
        scale[rows], zero_point[rows] = _search(piece, spec, weights) if spec.clip == "mse" else _reach(piece, spec, 1)
    return BlockGrid(scale, zero_point, spec.bits, spec.block)


def _chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _reach(piece: Array, spec: Spec, factor: float) -> tuple[Array, Array]:
    """Return scales and zero points for a part of the range of each block."""
    low, high = piece.min(axis=2), piece.max(axis=2)
    half, top = 1 << (spec.bits - 1), (1 << spec.bits) - 1
    if spec.symmetric:
        if spec.signed_scale:
            scale = np.where(high > -low, high, low) * np.float32(-factor / half)
        else:
            scale = np.maximum(high / np.float32(half - 1), -low / np.float32(half - 1)) * np.float32(factor)
        return _stored(scale, spec), np.full(scale.shape, half, np.uint8)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = _stored((high - low) * np.float32(factor / top), spec)
    zero_point = np.clip(np.rint(-low * np.float32(factor) / scale.astype(np.float32)), 0, top)
    return scale, zero_point.astype(np.uint8)


def _stored(scale: Array, spec: Spec) -> Array:
    """Round a scale to the type it is stored in; one that is too small to divide by becomes 1."""
    rounded = scale.astype(spec.scale_dtype)
    small = np.abs(rounded.astype(np.float32)) < np.finfo(np.float32).tiny
    return np.where(small, np.ones((), spec.scale_dtype), rounded)


def _search(piece: Array, spec: Spec, importance: Array | None) -> tuple[Array, Array]:
    """Return the scales and zero points with the smallest square error among parts of each block's range."""
    best = np.full(piece.shape[:2], np.inf, np.float32)
    scale, zero_point = _reach(piece, spec, 1)
    for factor in (1.0, *np.linspace(FIRST[spec.bits], LAST[spec.bits], STEPS[spec.bits])):
        tried, offset = _reach(piece, spec, factor)
        real = _round(piece, tried, offset, spec.bits)
        real -= offset[:, :, None].astype(np.float32)
        real *= tried[:, :, None].astype(np.float32)
        real -= piece
        np.square(real, out=real)
        if importance is not None:
            real *= importance
        error = real.sum(axis=2)
        better = error < best
        best = np.where(better, error, best)
        scale, zero_point = np.where(better, tried, scale), np.where(better, offset, zero_point)
    return scale, zero_point


def _round(piece: Array, scale: Array, zero_point: Array, bits: int) -> Array:
    """Return the nearest codes, as float32."""
    codes = piece / scale[:, :, None].astype(np.float32)
    np.rint(codes, out=codes)
    codes += zero_point[:, :, None].astype(np.float32)
    return np.clip(codes, 0, (1 << bits) - 1, out=codes)


def encode(matrix: Array, grid: BlockGrid) -> Array:
    """Return the codes nearest to the elements of a matrix.

    Args:
        matrix: Floating point, finite, (rows, columns).
        grid: Where to go.

    Returns:
        uint8 of shape (rows, blocks * block). What fills up the last block are codes for 0.0.
    """
    rows, blocks = grid.scale.shape
    codes = np.empty((rows, blocks, grid.block), np.uint8)
    for part in _chunks(matrix.shape):
        piece = blocked(matrix[part], grid.block)
        codes[part] = _round(piece, grid.scale[part], grid.zero_point[part], grid.bits)
    return codes.reshape(rows, -1)


def decode(codes: Array, grid: BlockGrid, columns: int) -> Array:
    """Return the real numbers that codes stand for, float32, (rows, columns)."""
    rows, blocks = grid.scale.shape
    whole = codes.reshape(rows, blocks, grid.block).astype(np.float32)
    whole -= grid.zero_point[:, :, None].astype(np.float32)
    whole *= grid.scale[:, :, None].astype(np.float32)
    return whole.reshape(rows, -1)[:, :columns]


def pack(codes: Array, bits: int) -> Array:
    """Put codes of fewer than 8 bits into bytes along the last axis, the first one into the lowest bits.

    Args:
        codes: uint8, below 2 ** bits.
        bits: 2, 4 or 8.

    Returns:
        uint8; the last axis has ceil(size * bits / 8) elements. What is left of the last byte is zero.
    """
    share = 8 // bits
    if share == 1:
        return codes
    missing = -codes.shape[-1] % share
    if missing:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)])
    apart = codes.reshape(*codes.shape[:-1], -1, share)
    packed = apart[..., 0].copy()
    for i in range(1, share):
        packed |= apart[..., i] << np.uint8(i * bits)
    return packed


def unpack(packed: Array, bits: int, size: int) -> Array:
    """Return the first `size` codes along the last axis that `pack` put into bytes."""
    share = 8 // bits
    shifts = np.arange(share, dtype=np.uint8) * np.uint8(bits)
    apart = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    codes: Array = apart.reshape(*packed.shape[:-1], -1)[..., :size]
    return codes
