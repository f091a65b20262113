"""Takes weights out of the bytes of a protobuf before it is parsed, and puts them back while it is written.

A protobuf can only be parsed as a whole, so the weights in it would all be copied into memory. `strip` walks the
wire format (https://protobuf.dev/programming-guides/encoding/) and leaves a small marker where the raw data of a
large tensor was; `expand` does the reverse.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import struct
from collections.abc import Sequence

THRESHOLD = 1024
"""Raw data of at least this many bytes is left in the file."""

Buffer = bytes | mmap.mmap

# Where tensors can be: message -> field number -> message.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
    "function": {7: "node", 11: "attribute"},
    "tensor": {9: "data"},
}
# protobuf itself stops at 100 nested messages.
_MAX_DEPTH = 100
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_NUMBERS = struct.Struct("<QQ")


class WireError(ValueError):
    """Bytes that are no protobuf, or end in the middle of one."""


class Markers:
    """Stand-ins for data that is elsewhere: a random token, then two numbers."""

    def __init__(self) -> None:
        self.token = os.urandom(16)

    def make(self, first: int, second: int) -> bytes:
        """Return the bytes that stand for two numbers below 2**64."""
        return self.token + _NUMBERS.pack(first, second)

    def read(self, raw: bytes) -> tuple[int, int] | None:
        """Return the two numbers, or None when the bytes are real data."""
        if len(raw) != len(self.token) + _NUMBERS.size or not raw.startswith(self.token):
            return None
        first, second = _NUMBERS.unpack_from(raw, len(self.token))
        return first, second


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """A place in a message where data is to be written: the number it was marked with."""

    index: int


def _read_varint(data: Buffer, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise WireError("a number is too long")
    raise WireError("the data ends in the middle of a number")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _skip(data: Buffer, wire_type: int, position: int, end: int) -> int:
    """Return where a field of a fixed or variable-length number ends."""
    if wire_type == _VARINT:
        return _read_varint(data, position, end)[1]
    if wire_type == _FIXED64:
        return position + 8
    if wire_type == _FIXED32:
        return position + 4
    raise WireError(f"{wire_type} is no wire type of ONNX")


def strip(data: Buffer, markers: Markers) -> bytes:
    """Return a serialized ModelProto with a marker (offset, length) in place of each large raw data.

    Args:
        data: The whole file.
        markers: Makes the markers.

    Raises:
        WireError: If the bytes are no protobuf or are truncated.
    """
    return b"".join(_stripped(data, 0, len(data), "model", markers, 0))


def _stripped(data: Buffer, begin: int, end: int, kind: str, markers: Markers, depth: int) -> list[bytes]:
    if depth > _MAX_DEPTH:
        raise WireError("messages are nested too deeply")
    fields = _FIELDS[kind]
    pieces: list[bytes] = []
    copied = position = begin
    while position < end:
        field = position
        tag, position = _read_varint(data, position, end)
        if tag & 7 != _LENGTH:
            position = _skip(data, tag & 7, position, end)
            continue
        length, position = _read_varint(data, position, end)
        start, position = position, position + length
        if position > end:
            raise WireError("the data ends in the middle of a message")
        if length < THRESHOLD or (inner := fields.get(tag >> 3)) is None:
            continue
        if inner == "data":
            short = markers.make(start, length)
        else:
            short = b"".join(_stripped(data, start, position, inner, markers, depth + 1))
        if len(short) < length:
            pieces += (data[copied:field], _varint(tag), _varint(len(short)), short)
            copied = position
    if position > end:
        raise WireError("the data ends in the middle of a number")
    pieces.append(data[copied:end])
    return pieces


def expand(data: bytes, markers: Markers, sizes: Sequence[int]) -> list[bytes | Slot]:
    """Return the pieces of a serialized ModelProto whose markers (index, 0) are replaced by data.

    Args:
        data: The message with markers.
        markers: What made them.
        sizes: Bytes of data per index; length prefixes are made to fit.
    """
    positions = []
    position = data.find(markers.token)
    while position >= 0:
        positions.append(position)
        position = data.find(markers.token, position + 1)
    return _Expansion(data, positions, markers, sizes).message(0, len(data), "model")[0]


class _Expansion:
    """One walk over a message with markers at known positions."""

    def __init__(self, data: bytes, positions: list[int], markers: Markers, sizes: Sequence[int]) -> None:
        self._data = data
        # In file order; the walk meets them in the same order, so the next one is always the last of this list.
        self._positions = positions[::-1]
        self._markers = markers
        self._sizes = sizes

    def message(self, begin: int, end: int, kind: str) -> tuple[list[bytes | Slot], int]:
        """Return the pieces of one message and their length in bytes."""
        data, fields = self._data, _FIELDS[kind]
        pieces: list[bytes | Slot] = []
        total, copied, position = 0, begin, begin
        while self._positions and self._positions[-1] < end:
            field = position
            tag, position = _read_varint(data, position, end)
            if tag & 7 != _LENGTH:
                position = _skip(data, tag & 7, position, end)
                continue
            length, position = _read_varint(data, position, end)
            start, position = position, position + length
            if position <= self._positions[-1]:
                continue
            inner, size = self._field(start, position, fields[tag >> 3])
            head = data[copied:field] + _varint(tag) + _varint(size)
            pieces += [head, *inner]
            total += len(head) + size
            copied = position
        pieces.append(data[copied:end])
        return pieces, total + end - copied

    def _field(self, begin: int, end: int, kind: str) -> tuple[list[bytes | Slot], int]:
        if kind != "data":
            return self.message(begin, end, kind)
        numbers = self._markers.read(self._data[begin:end])
        assert numbers is not None, "a marker is the whole content of its field"
        self._positions.pop()
        return [Slot(numbers[0])], self._sizes[numbers[0]]
