"""Which elements of large arrays are the smallest in magnitude: exactly, repeatably and without a copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.numeric.blocks import BLOCK_ELEMENTS, as_working, blocks

Array = npt.NDArray[Any]

_DIGIT_BITS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """Where the small elements end.

    Attributes:
        magnitude: Everything smaller is cut.
        ties: Of the elements of exactly this magnitude, so many are cut, the first ones in memory order.
    """

    magnitude: float
    ties: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Count:
    """How the elements of an array compare with a magnitude.

    Attributes:
        zero: Elements that are zero.
        below: Elements of a smaller magnitude, the zeros among them.
        equal: Elements of this magnitude.
    """

    zero: int
    below: int
    equal: int


def smallest(arrays: Callable[[], Iterable[Array]], count: int) -> Cut:
    """Return the cut that takes the `count` elements of least magnitude out of several arrays taken together.

    The arrays are read two times (four with a float64 one among them), in small pieces: a radix selection on the
    bits of the magnitudes, which for floating-point numbers are ordered like the numbers.

    Args:
        arrays: Returns the arrays anew each time it is called: floating point, finite, any shapes.
        count: How many elements, from 1 up to as many as there are.

    Returns:
        The cut. Its ties are counted over all arrays, in their order.
    """
    double = any(array.dtype == np.float64 for array in arrays())
    number, bits = (np.float64, np.uint64) if double else (np.float32, np.uint32)
    width = 64 if double else 32
    prefix, rest = 0, count
    for shift in range(width - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = np.zeros(1 << _DIGIT_BITS, np.int64)
        for array in arrays():
            for index in blocks(array.shape):
                words = np.abs(array[index].astype(number)).reshape(-1).view(bits)
                # With the digits found so far in front; at first all of them, because the sign bit is clear.
                if shift + _DIGIT_BITS < width:
                    words = words[words >> (shift + _DIGIT_BITS) == prefix]
                digits = (words >> shift) & ((1 << _DIGIT_BITS) - 1)
                counts += np.bincount(digits.astype(np.int64), minlength=counts.size)
        reached = np.cumsum(counts)
        digit = int(np.searchsorted(reached, rest))
        rest -= int(reached[digit] - counts[digit])
        prefix = prefix << _DIGIT_BITS | digit
    return Cut(float(np.asarray(prefix, bits).view(number)), rest)


def count(array: Array, magnitude: float) -> Count:
    """Compare the magnitudes of an array's elements with one."""
    zero = below = equal = 0
    bound, exact = _bound(magnitude, array.dtype)
    for index in blocks(array.shape):
        piece = np.abs(as_working(array[index]))
        zero += piece.size - int(np.count_nonzero(piece))
        below += int(np.count_nonzero(piece < bound))
        equal += int(np.count_nonzero(piece == bound)) if exact else 0
    return Count(zero, below, equal)


def without(array: Array, cut: Cut) -> Array:
    """Return a copy of an array in which what the cut takes is zero."""
    result = np.array(array, order="C")
    bound, exact = _bound(cut.magnitude, array.dtype)
    ties = cut.ties if exact else 0
    for index in blocks(result.shape):
        piece = result[index]
        magnitudes = np.abs(as_working(piece))
        taken = magnitudes < bound
        if ties:
            equal = np.flatnonzero(magnitudes == bound)[:ties]
            taken.reshape(-1)[equal] = True
            ties -= equal.size
        np.copyto(piece, 0, where=taken)
    return result


def _bound(magnitude: float, dtype: np.dtype[Any]) -> tuple[Any, bool]:
    """Return the least number that is not below a magnitude, in the type computed in, and whether it equals it."""
    working = np.float64 if dtype == np.float64 else np.float32
    bound = working(magnitude)
    if float(bound) < magnitude:
        bound = np.nextafter(bound, working(np.inf))
    return bound, float(bound) == magnitude


def surplus(array: Array, keep: int, group: int, axis: int) -> int:
    """Return how many non-zero elements `without_surplus` would set to zero."""
    total = 0
    for members in _member_blocks(array, group, axis):
        for member, rank in zip(members, _ranks(members), strict=True):
            total += int(np.count_nonzero((rank >= keep) & (member != 0)))
    return total


def without_surplus(array: Array, keep: int, group: int, axis: int) -> Array:
    """Return a copy of an array in which only the largest of every few neighbours along an axis are left.

    Args:
        array: Floating point, finite.
        keep: How many of each group stay. Of equal magnitudes the first stays.
        group: How many neighbours make a group; divides the size of the axis.
        axis: Counted from the front.
    """
    result = np.array(array, order="C")
    for members in _member_blocks(result, group, axis):
        for member, rank in zip(members, _ranks(members), strict=True):
            np.copyto(member, 0, where=rank >= keep)
    return result


def _member_blocks(array: Array, group: int, axis: int) -> Iterator[list[Array]]:
    """Yield views of the first, the second, ... members of all groups, block by block."""
    split = (*array.shape[:axis], array.shape[axis] // group, group, *array.shape[axis + 1 :])
    groups = np.moveaxis(np.ascontiguousarray(array).reshape(split), axis + 1, 0)
    for index in blocks(groups.shape[1:], max(1, BLOCK_ELEMENTS // group)):
        yield [groups[i][index] for i in range(group)]


def _ranks(members: list[Array]) -> list[Array]:
    """Return each element's rank in its group: 0 for the largest magnitude; of equals the first ranks first."""
    magnitudes = [np.abs(as_working(member)) for member in members]
    ranks = [np.zeros(member.shape, np.uint8 if len(members) < 256 else np.uint16) for member in members]
    for later in range(len(members)):
        for earlier in range(later):
            wins = magnitudes[earlier] >= magnitudes[later]
            ranks[later] += wins
            ranks[earlier] += ~wins
    return ranks
