"""Samples out of .npz archives, read row by row as they are needed. Pickles are never loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import re
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx_ir as ir

from onnxopt.errors import DataError
from onnxopt.inputs.data import Data, Feed
from onnxopt.inputs.slots import Slot, check_names, converted, fits, stored_dtype

DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, NotImplementedError)
"""What reading a truncated or corrupted archive raises."""

_GROUPED = re.compile(r"(\d+)/(.+)")


@dataclasses.dataclass(frozen=True, slots=True)
class _Member:
    """An array in an .npz.

    Attributes:
        path: The archive.
        key: Its key.
        dtype: Element type in the archive.
        shape: Its shape.
        fortran: Whether it is stored column by column.
    """

    path: Path
    key: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool

    def __str__(self) -> str:
        return f"{self.path}, key {self.key}"


@dataclasses.dataclass(frozen=True, slots=True)
class _Column:
    """How an array fills an input over the samples.

    Attributes:
        member: The array.
        slot: The input.
        rows: Rows per sample, where samples lie along its first axis; 0 for one row that leaves that axis behind;
            None when the whole array goes into every sample.
        samples: How many samples it has; None when it goes into every sample.
    """

    member: _Member
    slot: Slot
    rows: int | None
    samples: int | None


def open_archive(path: Path, slots: Mapping[str, Slot], ignore: Collection[str]) -> Data:
    """Open an .npz of any of the forms.

    Raises:
        DataError: If it is damaged or does not fit the model.
    """
    members = {key: member for key, member in _members(path).items() if key not in ignore}
    if not members:
        raise DataError(f"{path} holds no arrays.")
    groups: dict[int, dict[str, _Member]] = {}
    for key, member in members.items():
        match = None if key in slots else _GROUPED.fullmatch(key)
        if match is None:
            return _from_columns(path, members, slots)
        groups.setdefault(int(match[1]), {})[match[2]] = member
    return _from_groups(path, [groups[number] for number in sorted(groups)], slots)


def _from_groups(path: Path, groups: list[dict[str, _Member]], slots: Mapping[str, Slot]) -> Data:
    """Read `0000/input` keys: one group per sample, of its own shape."""
    notes: dict[str, None] = {}
    for group in groups:
        _check_keys(f"{path}, sample {next(iter(group.values())).key.partition('/')[0]}", group, slots)
        for name, member in group.items():
            notes.update(_check_dtype(member, slots[name]))
            if not fits(member.shape, slots[name].shape):
                raise DataError(f"{member}: an array of shape {list(member.shape)} does not fit {slots[name].text}.")

    def samples() -> Iterator[Feed]:
        with _archive(path) as archive:
            for group in groups:
                yield {name: _whole(archive, member, slots[name]) for name, member in group.items()}

    return Data(str(path), samples, len(groups), tuple(notes))


def _from_columns(path: Path, members: Mapping[str, _Member], slots: Mapping[str, Slot]) -> Data:
    """Read one array per input, with the samples along the first axis."""
    _check_keys(str(path), members, slots)
    notes: dict[str, None] = {}
    columns = []
    for name, member in members.items():
        notes.update(_check_dtype(member, slots[name]))
        columns.append(_column(member, slots[name]))
    count, columns = _agreed(columns)
    for column in columns:
        if column.rows and column.samples is not None and column.member.shape[0] % column.rows:
            left = column.member.shape[0] % column.rows
            notes[f"{column.member}: the last {left} rows are left out; the model takes {column.rows} at a time."] = (
                None
            )

    def samples() -> Iterator[Feed]:
        with _archive(path) as archive, contextlib.ExitStack() as stack:
            readers = {c.slot.name: _reader(archive, c, stack) for c in columns}
            for _ in range(count):
                yield {name: next(reader) for name, reader in readers.items()}

    return Data(str(path), samples, count, tuple(notes))


def _column(member: _Member, slot: Slot) -> _Column:
    """Find out how an array fills an input.

    Raises:
        DataError: If it does not.
    """
    shape, expected = member.shape, slot.shape
    if expected is None or (len(shape) == len(expected) and slot.rows is None and fits(shape, expected)):
        return _Column(member, slot, None, None)
    rows = slot.rows
    if rows and len(shape) == len(expected) and shape[0] == 0:
        raise DataError(f"{member}: an array of shape {list(shape)} holds no samples.")
    if rows and len(shape) == len(expected) and fits(shape[1:], expected[1:]) and shape[0] >= rows:
        return _Column(member, slot, rows, shape[0] // rows)
    if len(shape) == len(expected) + 1 and fits(shape[1:], expected):
        return _Column(member, slot, 0, shape[0])
    if fits(shape, expected):
        return _Column(member, slot, None, None)
    raise DataError(
        f"{member}: an array of shape {list(shape)} does not fit {slot.text}; samples lie along the first axis."
    )


def _agreed(columns: list[_Column]) -> tuple[int, list[_Column]]:
    """Return the number of samples and the columns; an array that fits one sample serves all of them.

    Raises:
        DataError: If arrays have different numbers of samples.
    """
    counts = {c.samples for c in columns if c.samples is not None}
    count = max(counts, default=1)
    agreed = []
    for column in columns:
        if column.samples == 1 and count > 1 and column.rows:
            column = dataclasses.replace(column, rows=None, samples=None)
        if column.samples not in (None, count):
            longest = next(c for c in columns if c.samples == count)
            raise DataError(
                f"{column.member} has {column.samples} samples, but {longest.member.key} has {count}; every array "
                "needs as many."
            )
        agreed.append(column)
    return count, agreed


def _check_keys(where: str, members: Mapping[str, _Member], slots: Mapping[str, Slot]) -> None:
    """Raise where a key is no input, or an input has no key."""
    check_names(where, members, slots)
    for key in members:
        if slots[key].kind != "tensor":
            raise DataError(f'{where}: the input "{key}" is no tensor; give such inputs with module:function.')
    missing = [slot for slot in slots.values() if slot.required and slot.name not in members]
    if missing:
        name = missing[0].name
        raise DataError(
            f'{where}: there is no array for the input "{name}" ({missing[0].text}); add one under the key "{name}", '
            "with a value per sample or one for all of them."
        )


def _check_dtype(member: _Member, slot: Slot) -> dict[str, None]:
    """Return a note when the array has to be converted; raise where that would not be safe."""
    stored = stored_dtype(member.dtype, slot)
    if stored is None:
        raise DataError(f"{member}: {member.dtype} cannot be converted to {slot.dtype.name.lower()} safely.")
    if stored == slot.dtype.numpy() or slot.dtype == ir.DataType.STRING:
        return {}
    return {f"{slot.name}: {stored} converted to {slot.dtype.name.lower()}.": None}


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive; what goes wrong while it is read becomes a `DataError`."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except DAMAGED as error:
        raise DataError(f"{path} cannot be read; it is damaged or no .npz: {error}") from error


def _members(path: Path) -> dict[str, _Member]:
    """Read the headers of all arrays of an .npz.

    Raises:
        DataError: If the archive is damaged, or an array holds Python objects.
    """
    members = {}
    with _archive(path) as archive:
        for entry in archive.infolist():
            if entry.is_dir():
                continue
            key = entry.filename.removesuffix(".npy")
            with archive.open(entry) as stream:
                shape, fortran, dtype = _header(stream, f"{path}, key {key}")
                expected = stream.tell() + math.prod(shape) * dtype.itemsize
            if entry.file_size != expected:
                raise DataError(f"{path}, key {key}: the array is truncated.")
            members[key] = _Member(path, key, dtype, shape, fortran)
    return members


def _header(stream: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of an .npy.

    Raises:
        DataError: If the array holds Python objects, which are pickles.
    """
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise DataError(f"{where}: an array of Python objects is a pickle, which is never loaded; save plain numbers.")
    return shape, fortran, dtype


def _whole(archive: zipfile.ZipFile, member: _Member, slot: Slot) -> np.ndarray:
    with archive.open(_entry(archive, member)) as stream:
        array = np.lib.format.read_array(stream, allow_pickle=False)
    return converted(array, slot, member)


def _entry(archive: zipfile.ZipFile, member: _Member) -> str:
    name = f"{member.key}.npy"
    return name if name in archive.NameToInfo else member.key


def _reader(archive: zipfile.ZipFile, column: _Column, stack: contextlib.ExitStack) -> Iterator[np.ndarray]:
    """Return an iterator over what a column gives to each sample."""
    member, slot = column.member, column.slot
    if column.rows is None:
        return itertools.repeat(_whole(archive, member, slot))
    if member.fortran:
        return _rows_of(_whole(archive, member, slot), column.rows)
    stream = stack.enter_context(archive.open(_entry(archive, member)))
    _header(stream, str(member))
    return _rows_in(stream, column)


def _rows_of(array: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    """Yield samples of an array in memory."""
    for start in range(0, array.shape[0], max(rows, 1)):
        yield np.ascontiguousarray(array[start : start + rows]) if rows else np.array(array[start])


def _rows_in(stream: IO[bytes], column: _Column) -> Iterator[np.ndarray]:
    """Yield samples of an array as its bytes are read."""
    member, rows = column.member, column.rows or 1
    shape = (rows, *member.shape[1:]) if column.rows else member.shape[1:]
    size = math.prod((rows, *member.shape[1:])) * member.dtype.itemsize
    while True:
        data = stream.read(size)
        if len(data) < size:
            raise EOFError(f"the array {member.key} ends early")
        array = np.frombuffer(bytearray(data), member.dtype).reshape(shape)
        yield converted(array, column.slot, member)
