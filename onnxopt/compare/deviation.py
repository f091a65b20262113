"""How far the values of one output lie from those of a reference.

Values are what ONNX Runtime returns: arrays of any ONNX type, lists (sequences), dicts (maps) and None (an absent
optional). Floating-point values of every width are compared in float64 arithmetic, in chunks, so that large
outputs cost no large copies.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

Kind = Literal["float", "integer", "boolean", "string", "empty"]

_CHUNK = 1 << 20
"""Elements compared at a time."""


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """The finite floating-point (or integer) values a reference output takes.

    Attributes:
        low: The smallest.
        high: The largest; below `low` when no finite value was seen.
    """

    low: float = math.inf
    high: float = -math.inf

    def __or__(self, other: Extent) -> Extent:
        """Return the extent of both together."""
        return Extent(min(self.low, other.low), max(self.high, other.high))

    @property
    def magnitude(self) -> float:
        """The largest absolute value; 0 when nothing was seen."""
        return max(abs(self.low), abs(self.high)) if self.high >= self.low else 0.0

    @property
    def scale(self) -> float:
        """What deviations are divided by: the range; the magnitude where that is zero; 1 where both are.

        A constant output, or one with a single element, has no range.
        """
        if self.high > self.low:
            return self.high - self.low
        return self.magnitude or 1.0

    @property
    def amplification(self) -> float:
        """How much larger the magnitude is than the scale, at least 1.

        Rounding goes with the magnitude: of values between 1000.0 and 1000.1 it takes up more of the range.
        """
        return max(1.0, self.magnitude / self.scale)


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """What is different between a reference value and another.

    Attributes:
        kind: What was compared; "empty" when there was nothing in it.
        max_abs: Largest absolute difference; infinite where only one side is NaN or infinite; 0 for strings.
        share: Share of the elements that differ at all.
        first: Index of the first element that differs by more than was allowed, else of the first that differs at
            all; in front of it the position in sequences and the key in maps.
        broken: In words, what makes the two incomparable (shape, type, length), or which NaN or infinity is new;
            empty otherwise. A predicate: "has shape [1, 3] instead of [1, 4]".
        exceeded: Whether any element differs by more than was allowed.
        dot: Sum of the products of all finite pairs.
        norms: Sums of the squares of the reference and the other side, over the same pairs.
        elements: How many elements were compared.
        nonfinite: How many of them are NaN or infinite on a side; only counted for floating-point elements.
    """

    kind: Kind
    max_abs: float = 0.0
    share: float = 0.0
    first: tuple[int | str, ...] | None = None
    broken: str = ""
    exceeded: bool = False
    dot: float = 0.0
    norms: tuple[float, float] = (0.0, 0.0)
    elements: int = 0
    nonfinite: int = 0

    @property
    def cosine(self) -> float | None:
        """Cosine between the two sides; None for what is no number, and when both are zero; 0 when one is."""
        reference, other = self.norms
        if reference == 0.0 or other == 0.0:
            return None if reference == other else 0.0
        return max(-1.0, min(1.0, self.dot / math.sqrt(reference) / math.sqrt(other)))

    @property
    def lost(self) -> float | None:
        """Norm of the difference by that of the reference; None for what is no number, and when that is zero."""
        reference, other = self.norms
        if reference == 0.0 or self.max_abs == 0.0:
            return None if reference == 0.0 else 0.0
        return math.sqrt(max(0.0, reference + other - 2 * self.dot) / reference)

    def __or__(self, later: Difference) -> Difference:
        """Return both together; what is first or broken in this one stays so."""
        elements = self.elements + later.elements
        share = (self.share * self.elements + later.share * later.elements) / elements if elements else 0.0
        leading = later if (later.broken or later.exceeded) and not (self.broken or self.exceeded) else self
        if leading.first is None and not leading.broken:
            leading = later if later.first is not None else leading
        return Difference(
            kind=later.kind if self.kind == "empty" else self.kind,
            max_abs=max(self.max_abs, later.max_abs),
            share=share,
            first=leading.first,
            broken=self.broken or later.broken,
            exceeded=self.exceeded or later.exceeded,
            dot=self.dot + later.dot,
            norms=(self.norms[0] + later.norms[0], self.norms[1] + later.norms[1]),
            elements=elements,
            nonfinite=self.nonfinite + later.nonfinite,
        )


def kind_of(dtype: np.dtype[Any]) -> Kind:
    """Return what kind of values an array type holds; the low-bit types of ml_dtypes included."""
    if dtype.kind == "b":
        return "boolean"
    if dtype.kind in "iu":
        return "integer"
    if dtype.kind in "fc" or dtype.name.startswith(("bfloat", "float")):
        return "float"
    if dtype.name.startswith(("int", "uint")):
        return "integer"
    return "string"


def leaves(value: Any) -> Iterator[np.ndarray]:
    """Yield the arrays of a value, in order."""
    if value is None:
        return
    if isinstance(value, Mapping):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    else:
        yield np.asarray(value)


def nbytes(value: Any) -> int:
    """Return the bytes the arrays of a value take; strings count 64 each."""
    return sum(a.size * 64 if kind_of(a.dtype) == "string" else a.nbytes for a in leaves(value))


def extent(value: Any) -> Extent:
    """Return the extent of all numbers in a value."""
    found = Extent()
    for array in leaves(value):
        if kind_of(array.dtype) not in ("float", "integer") or not array.size:
            continue
        if array.dtype.kind in "fiu":
            low, high = float(array.min()), float(array.max())
            if math.isfinite(low) and math.isfinite(high):
                found |= Extent(low, high)
                continue
        for part in _chunks(array):
            finite = part[np.isfinite(part)]
            if finite.size:
                found |= Extent(float(finite.min()), float(finite.max()))
    return found


def difference(reference: Any, other: Any, allowed: float = 0.0) -> Difference:
    """Compare a value with its reference.

    Args:
        reference: The value as it should be.
        other: The value to judge.
        allowed: Absolute difference up to which floating-point elements do not count as exceeded. Everything else
            must be equal.
    """
    if reference is None or other is None:
        if reference is other:
            return Difference("empty")
        word = "is empty where the original has a value"
        if reference is None:
            word = "has a value where the original is empty"
        return _broken("empty", word)
    if isinstance(reference, Mapping):
        return _maps(reference, other, allowed)
    if isinstance(reference, (list, tuple)):
        return _sequences(reference, other, allowed)
    if isinstance(other, (list, tuple, Mapping)):
        return _broken("empty", "is no tensor")
    return _arrays(np.asarray(reference), np.asarray(other), allowed)


def blank(value: Any) -> Any:
    """Return a value of the same types and shapes whose elements are all alike; it takes no memory."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {key: blank(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [blank(item) for item in value]
    array = np.asarray(value)
    return np.broadcast_to(np.zeros((), array.dtype), array.shape)


def differing(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return flat positions at which two arrays of one shape, of integers, booleans or strings, are not equal."""
    return np.flatnonzero(np.asarray(reference).reshape(-1) != np.asarray(other).reshape(-1))


def _broken(kind: Kind, words: str, first: tuple[int | str, ...] | None = None) -> Difference:
    return Difference(kind, max_abs=math.inf, share=1.0, first=first, broken=words, exceeded=True, elements=1)


def _maps(reference: Mapping[Any, Any], other: Any, allowed: float) -> Difference:
    if not isinstance(other, Mapping):
        return _broken("empty", "is no map")
    if list(reference) != list(other):
        return _broken("empty", "has other keys than the original")
    found = Difference("empty")
    for key in reference:
        found |= _at(key if isinstance(key, str) else int(key), difference(reference[key], other[key], allowed))
    return found


def _sequences(reference: Sequence[Any], other: Any, allowed: float) -> Difference:
    if not isinstance(other, (list, tuple)):
        return _broken("empty", "is no sequence")
    if len(reference) != len(other):
        return _broken("empty", f"has {len(other)} elements instead of {len(reference)}")
    found = Difference("empty")
    for index, (one, two) in enumerate(zip(reference, other, strict=True)):
        found |= _at(index, difference(one, two, allowed))
    return found


def _at(position: int | str, found: Difference) -> Difference:
    """Put the position inside the enclosing sequence or map in front."""
    if found.first is None and not found.broken:
        return found
    return dataclasses.replace(found, first=(position, *(found.first or ())))


def _arrays(reference: np.ndarray, other: np.ndarray, allowed: float) -> Difference:
    kind = kind_of(reference.dtype)
    if kind != kind_of(other.dtype) or (kind != "string" and reference.dtype != other.dtype):
        return _broken(kind, f"has type {other.dtype.name} instead of {reference.dtype.name}")
    if reference.shape != other.shape:
        return _broken(kind, f"has shape {list(other.shape)} instead of {list(reference.shape)}")
    if kind == "float":
        return _floats(reference, other, allowed)
    return _discrete(reference, other, kind)


def _discrete(reference: np.ndarray, other: np.ndarray, kind: Kind) -> Difference:
    where = differing(reference, other)
    max_abs, dot, norms = 0.0, 0.0, (0.0, 0.0)
    if kind == "integer":
        for one, two in zip(_chunks(reference), _chunks(other), strict=True):
            max_abs = max(max_abs, float(np.abs(one - two).max(initial=0.0)))
            dot += float(one @ two)
            norms = (norms[0] + float(one @ one), norms[1] + float(two @ two))
        # float64 cannot tell apart neighbours beyond 2**53
        max_abs = max(max_abs, 1.0) if where.size else 0.0
    elif kind == "boolean":
        max_abs = 1.0 if where.size else 0.0
    return Difference(
        kind,
        max_abs=max_abs,
        share=where.size / max(reference.size, 1),
        first=_index(int(where[0]), reference.shape) if where.size else None,
        exceeded=bool(where.size),
        dot=dot,
        norms=norms,
        elements=reference.size,
    )


def _floats(reference: np.ndarray, other: np.ndarray, allowed: float) -> Difference:
    if reference.dtype in (np.float32, np.float64) and np.array_equal(reference, other):
        # most edits leave every bit as it is, and this is much faster
        square = float(np.vdot(reference, reference))
        if math.isfinite(square):
            return Difference("float", dot=square, norms=(square, square), elements=reference.size)
    found = Difference("float")
    start = 0
    for one, two in zip(_chunks(reference), _chunks(other), strict=True):
        part = _float_chunk(one, two, allowed)
        if part.first is not None:
            flat = start + int(part.first[0])
            if np.iscomplexobj(reference):
                flat //= 2
            part = dataclasses.replace(part, first=_index(flat, reference.shape))
        found |= part
        start += one.size
    return found


def _float_chunk(reference: np.ndarray, other: np.ndarray, allowed: float) -> Difference:
    """Compare two flat float64 arrays; `first` is a flat position."""
    same = (reference == other) | (np.isnan(reference) & np.isnan(other))
    size = reference.size
    finite = np.isfinite(reference) & np.isfinite(other)
    with np.errstate(over="ignore", under="ignore"):
        one, two = np.where(finite, reference, 0.0), np.where(finite, other, 0.0)
        distance = np.abs(one - two)
        dot, norms = float(one @ two), (float(one @ one), float(two @ two))
    misplaced = ~finite & ~same
    wrong = misplaced | (distance > allowed)
    broken = ""
    if misplaced.any():
        at = int(np.argmax(misplaced))
        broken = f"is {_number(other[at])} where the original has {_number(reference[at])}"
    where = wrong if wrong.any() else ~same
    return Difference(
        "float",
        max_abs=math.inf if broken else float(distance.max(initial=0.0)),
        share=float(np.count_nonzero(~same)) / size if size else 0.0,
        first=(int(np.argmax(misplaced if broken else where)),) if where.any() else None,
        broken=broken,
        exceeded=bool(wrong.any()),
        dot=dot,
        norms=norms,
        elements=size,
        nonfinite=size - int(np.count_nonzero(finite)),
    )


def _number(value: float) -> str:
    return "NaN" if math.isnan(value) else f"{value:.4g}"


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the elements in C order as flat float64 arrays; a complex number becomes two."""
    flat = array.reshape(-1)
    if np.iscomplexobj(flat):
        flat = flat.view(flat.real.dtype)
    for start in range(0, flat.size, _CHUNK):
        yield flat[start : start + _CHUNK].astype(np.float64)


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(flat, shape))
