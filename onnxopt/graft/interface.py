"""What fits where: types of boundary values, and the smallest adapter between two that do not agree."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import onnx_ir as ir

from onnxopt.graft.certificate import type_text
from onnxopt.graft.layout import channel_axis
from onnxopt.graft.slicing import Types

Dims = tuple[int | str | None, ...]
Kind = Literal["Cast", "Transpose", "Reshape", "Resize", "Conv", "Gemm"]
"""Adapters: the last two are a convolution with a kernel of one element and a linear layer, fitted to data."""

FITTED: tuple[Kind, ...] = ("Conv", "Gemm")

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_INTEGERS = frozenset({ir.DataType.INT32, ir.DataType.INT64})
_LAYOUTS: dict[int, tuple[tuple[int, ...], ...]] = {3: ((0, 2, 1),), 4: ((0, 2, 3, 1), (0, 3, 1, 2))}
"""Where channels may move, by rank: to the end, or to the front."""


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """A boundary value: what it is called, and what can be put there.

    Attributes:
        name: Name of the value.
        type: Its type.
        dims: Its axes: a size, a name, or None; None as a whole when not even their number is known.
        channels: The axis of channels, where operators around the value tell it.
    """

    name: str
    type: ir.TypeProtocol
    dims: Dims | None
    channels: int | None = None

    @property
    def dtype(self) -> ir.DataType | None:
        """Element type of a tensor; None for sequences and optional values."""
        return self.type.dtype if isinstance(self.type, ir.TensorType) else None

    def __str__(self) -> str:
        shape = None if self.dims is None else ir.Shape(self.dims)
        return type_text(self.type, shape)


@dataclasses.dataclass(frozen=True, slots=True)
class Adapter:
    """A node between a value and the place it is put in.

    Attributes:
        kind: What it is.
        dtype: Cast: the element type it gives.
        perm: Transpose: the order of the axes.
        shape: Reshape: the shape it gives, 0 for an axis that stays; Resize: height and width.
        channels: Conv and Gemm: from how many channels to how many.
        rank: Number of axes of what it takes.
    """

    kind: Kind
    dtype: ir.DataType | None = None
    perm: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    channels: tuple[int, int] = (0, 0)
    rank: int = 0

    def __str__(self) -> str:
        if self.kind == "Cast":
            assert self.dtype is not None
            return f"Cast to {type_text(ir.TensorType(self.dtype), ir.Shape(())).partition(' ')[0]}"
        if self.kind == "Transpose":
            return f"Transpose {list(self.perm)}"
        if self.kind in ("Reshape", "Resize"):
            return f"{self.kind} to {list(self.shape)}"
        name = "1x1 Conv" if self.kind == "Conv" else "Gemm"
        return f"fitted {name} from {self.channels[0]} to {self.channels[1]} channels"


def slot(value: ir.Value, types: Types) -> Slot:
    """Return the slot of a value.

    Raises:
        RefusedError: If nothing tells its type.
    """
    shape = types.shape(value)
    dims = None if shape is None else tuple(d if isinstance(d, int) else d.value for d in shape)
    channels = channel_axis(value, len(dims)) if dims is not None and len(dims) in _LAYOUTS else None
    return Slot(value.name or "", types.type(value), dims, channels)


def adapters(have: Slot, want: Slot) -> tuple[Adapter, ...] | None:
    """Return the fewest adapters that make one value fit into the place of another; None when there are none."""
    if have.dtype is None or want.dtype is None:
        return () if have.type == want.type else None
    cast: tuple[Adapter, ...] = ()
    if have.dtype != want.dtype:
        if not any(have.dtype in kinds and want.dtype in kinds for kinds in (_FLOATS, _INTEGERS)):
            return None
        cast = (Adapter("Cast", dtype=want.dtype),)
    if have.dims is None or want.dims is None:
        return cast
    shaping = _reordered(have, want) or _shaping(have.dims, want.dims)
    if shaping is None or (have.dtype not in _FLOATS and any(a.kind in ("Resize", *FITTED) for a in shaping)):
        return None
    return (*cast, *shaping)


def _reordered(have: Slot, want: Slot) -> tuple[Adapter, ...] | None:
    """Return the Transpose between two layouts that shapes alone do not tell apart; None where it is not that."""
    if have.channels is None or want.channels is None or have.channels == want.channels:
        return None
    assert have.dims is not None and want.dims is not None
    if len(have.dims) != len(want.dims) or have.dims[1:] != want.dims[1:]:
        return None
    for perm in _LAYOUTS[len(have.dims)]:
        if perm[want.channels] == have.channels and tuple(have.dims[i] for i in perm[1:]) == want.dims[1:]:
            return (Adapter("Transpose", perm=perm, rank=len(perm)),)
    return None


def _shaping(have: Dims, want: Dims) -> tuple[Adapter, ...] | None:
    """Return the fewest adapters between shapes; of equally many those that leave fewest sizes to luck."""
    found = sorted(_ways(have, want), key=lambda way: (len(way[0]), way[1]))
    exact = [way for way in found if not way[1] and len(way[0]) <= 1]
    if found and not found[0][0] and found[0][1] and exact:
        # As it is, it would fit only if an axis of unknown size happened to fit.
        return exact[0][0]
    return found[0][0] if found else None


def _ways(have: Dims, want: Dims) -> Iterator[tuple[tuple[Adapter, ...], int]]:
    """Yield ways from a shape to another, each with the number of axes whose sizes need not agree."""
    if len(have) == len(want):
        orders = (tuple(range(len(have))), *_LAYOUTS.get(len(have), ()))
        for perm in orders:
            moved = tuple(have[i] for i in perm)
            first = () if perm == orders[0] else (Adapter("Transpose", perm=perm, rank=len(have)),)
            for rest, loose in _resized(moved, want):
                yield (*first, *rest), loose
    elif have and want and all(isinstance(d, int) for d in (*have[1:], *want[1:])) and _fit(have[0], want[0]):
        inner = tuple(d for d in want[1:] if isinstance(d, int))
        if math.prod(d for d in have[1:] if isinstance(d, int)) == math.prod(inner):
            yield (Adapter("Reshape", shape=(0, *inner), rank=len(have)),), 0


def _resized(have: Dims, want: Dims) -> Iterator[tuple[tuple[Adapter, ...], int]]:
    """Yield ways from a shape to another of the same rank and layout."""
    rank = len(have)
    loose = sum(isinstance(a, int) != isinstance(b, int) for a, b in zip(have[1:], want[1:], strict=True))
    unlike = [i for i, (a, b) in enumerate(zip(have, want, strict=True)) if not _fit(a, b)]
    if not unlike:
        yield (), loose
        return
    channel = 1 if rank == 4 else rank - 1
    chain: list[Adapter] = []
    if rank == 4 and any(i in (2, 3) for i in unlike):
        height, width = want[2], want[3]
        if not isinstance(height, int) or not isinstance(width, int):
            return
        chain.append(Adapter("Resize", shape=(height, width), rank=4))
        unlike = [i for i in unlike if i not in (2, 3)]
    if unlike == [channel] and rank >= 2 and channel > 0:
        before, after = have[channel], want[channel]
        assert isinstance(before, int) and isinstance(after, int), "sizes that do not fit are known"
        chain.append(Adapter("Conv" if rank == 4 else "Gemm", channels=(before, after), rank=rank))
        unlike = []
    if not unlike and chain:
        yield tuple(chain), loose


def _fit(one: int | str | None, other: int | str | None) -> bool:
    return not isinstance(one, int) or not isinstance(other, int) or one == other


def described(chain: Sequence[Adapter]) -> str:
    """Return adapters in words."""
    return ", then ".join(map(str, chain))
