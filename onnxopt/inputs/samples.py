"""The user's own inputs and labels, read sample by sample.

Three forms: an .npz with one array per input and the samples along the first axis; an .npz with keys such as
`0000/input`, one group per sample; a folder of such files. Or a function of the user's that yields dicts. Pickles
are never loaded. Arrays are read from the archive as they are needed, row by row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import math
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxopt.errors import DataError
from onnxopt.inputs.axes import Axes, Axis, Kind
from onnxopt.registry import nearest

Feed = dict[str, Any]
"""Input name -> array; a list of arrays for a sequence, None for an optional input without a value."""

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_GROUPED = re.compile(r"(\d+)/(.+)")
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, NotImplementedError)
"""What reading a truncated or corrupted archive raises."""


class Data:
    """Real inputs: can be iterated again and again, knows its length, holds one sample in memory at a time.

    Attributes:
        name: Where the samples come from, for reports.
        notes: What was done to make them fit, each in a sentence.
    """

    def __init__(
        self,
        name: str,
        samples: Callable[[], Iterator[Feed]],
        length: int | Callable[[], int],
        notes: Sequence[str] = (),
    ) -> None:
        """Describe where samples come from.

        Args:
            name: Where from, for reports.
            samples: Starts a new pass over them.
            length: How many there are, or how to find out.
            notes: What was done to make them fit.
        """
        self.name = name
        self.notes = tuple(notes)
        self._samples = samples
        self._length = length

    def __iter__(self) -> Iterator[Feed]:
        """Start a new pass over the samples."""
        return self._samples()

    def __len__(self) -> int:
        """Return the number of samples; the first time this may take a pass over them."""
        if callable(self._length):
            self._length = self._length()
        return self._length

    def select(self, chosen: Collection[int]) -> Data:
        """Return the samples of these numbers, counted from 0, in their own order."""
        wanted = frozenset(chosen)
        last = max(wanted, default=-1)
        return Data(
            self.name,
            lambda: (s for i, s in enumerate(itertools.islice(self._samples(), last + 1)) if i in wanted),
            len(wanted),
            self.notes,
        )

    def take(self, count: int) -> Data:
        """Return the first `count` samples, or all of them when there are fewer."""
        return Data(
            self.name,
            lambda: itertools.islice(self._samples(), count),
            lambda: min(count, len(self)),
            self.notes,
        )


def load_data(source: str | os.PathLike[str], model: ir.Model, *, ignore: Collection[str] = ()) -> Data:
    """Open the user's inputs and check that they fit the model.

    Args:
        source: An .npz, a folder of .npz, or "module:function" where the function yields one dict per sample. The
            module is looked for in the current folder too.
        model: The model they are for.
        ignore: Keys of an .npz that are no inputs, such as labels.

    Raises:
        DataError: If there is nothing there, or it does not fit. The message names file, key and what is expected.
    """
    slots = _slots(model)
    text = os.fspath(source)
    path = Path(text)
    if path.is_dir():
        files = sorted((f for f in path.iterdir() if f.suffix == ".npz"), key=lambda f: _natural(f.name))
        if not files:
            raise DataError(f"The folder {path} holds no .npz files.")
        return _joined(str(path), [_open_archive(f, slots, ignore) for f in files])
    if path.is_file():
        return _joined(str(path), [_open_archive(path, slots, ignore)])
    if _FUNCTION.fullmatch(text):
        return _from_function(text, slots)
    raise DataError(
        f"There is no data {text}; give an .npz, a folder of .npz, or module:function for a function that yields dicts."
    )


def load_labels(path: str | os.PathLike[str]) -> np.ndarray:
    """Read labels, one per sample along the first axis, from an .npy or from an .npz with a single array.

    Raises:
        DataError: If the file cannot be read, or holds another number of arrays.
    """
    path = Path(path)
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            labels = loaded
        else:
            with loaded:
                if len(loaded.files) != 1:
                    raise DataError(f"{path} holds {len(loaded.files)} arrays; labels are an .npy or an .npz of one.")
                labels = loaded[loaded.files[0]]
    except FileNotFoundError as error:
        raise DataError(f"There is no file of labels {path}.") from error
    except _DAMAGED as error:
        raise DataError(f"{path} cannot be read as an .npy or .npz of labels without pickles: {error}") from error
    if labels.ndim == 0:
        raise DataError(f"{path} holds a single number; labels need one entry per sample.")
    return labels


@dataclasses.dataclass(frozen=True, slots=True)
class _Slot:
    """An input that data has to fill.

    Attributes:
        name: Its name.
        dtype: Element type.
        shape: A size or an axis per axis; None when the rank is not known.
        kind: "tensor", "sequence" or "other".
        required: Whether every sample needs a value for it.
    """

    name: str
    dtype: ir.DataType
    shape: tuple[int | Axis, ...] | None
    kind: str
    required: bool

    @property
    def text(self) -> str:
        """Its element type and shape, for messages."""
        dims = ["..."] if self.shape is None else [str(axis) for axis in self.shape]
        return f"{self.dtype.name.lower()} [{', '.join(dims)}]"

    @property
    def rows(self) -> int | None:
        """How many rows one sample takes along the first axis; None when that axis does not count samples."""
        if not self.shape:
            return None
        first = self.shape[0]
        if isinstance(first, int):
            return first
        counts = first.kind is Kind.BATCH or (first.kind is Kind.COUNT and len(self.shape) > 1)
        return 1 if counts else None


def _slots(model: ir.Model) -> dict[str, _Slot]:
    axes = Axes(list(model.graph.inputs))
    slots = {}
    for value in model.graph.inputs:
        name = value.name or ""
        kind: Any = value.type
        optional = isinstance(kind, ir.OptionalType)
        kind = kind.elem_type if isinstance(kind, ir.OptionalType) else kind
        form = (
            "tensor"
            if isinstance(kind, ir.TensorType)
            else "sequence"
            if isinstance(kind, ir.SequenceType)
            else "other"
        )
        slots[name] = _Slot(
            name,
            value.dtype or ir.DataType.UNDEFINED,
            axes.shapes[name] if value.shape is not None else None,
            form,
            not optional and not value.is_initializer(),
        )
    return slots


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which 2.npz comes before 10.npz."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def _joined(name: str, parts: list[Data]) -> Data:
    notes = dict.fromkeys(note for part in parts for note in part.notes)
    return Data(name, lambda: itertools.chain.from_iterable(parts), sum(len(p) for p in parts), tuple(notes))


# ---------------------------------------------------------------------------------------------------- archives


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
    slot: _Slot
    rows: int | None
    samples: int | None


def _open_archive(path: Path, slots: Mapping[str, _Slot], ignore: Collection[str]) -> Data:
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


def _from_groups(path: Path, groups: list[dict[str, _Member]], slots: Mapping[str, _Slot]) -> Data:
    """Read `0000/input` keys: one group per sample, of its own shape."""
    notes: dict[str, None] = {}
    for group in groups:
        _check_keys(f"{path}, sample {next(iter(group.values())).key.partition('/')[0]}", group, slots)
        for name, member in group.items():
            notes.update(_check_dtype(member, slots[name]))
            if not _fits(member.shape, slots[name].shape):
                raise DataError(f"{member}: an array of shape {list(member.shape)} does not fit {slots[name].text}.")

    def samples() -> Iterator[Feed]:
        with _archive(path) as archive:
            for group in groups:
                yield {name: _whole(archive, member, slots[name]) for name, member in group.items()}

    return Data(str(path), samples, len(groups), tuple(notes))


def _from_columns(path: Path, members: Mapping[str, _Member], slots: Mapping[str, _Slot]) -> Data:
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


def _column(member: _Member, slot: _Slot) -> _Column:
    """Find out how an array fills an input.

    Raises:
        DataError: If it does not.
    """
    shape, expected = member.shape, slot.shape
    if expected is None or (len(shape) == len(expected) and slot.rows is None and _fits(shape, expected)):
        return _Column(member, slot, None, None)
    rows = slot.rows
    if rows and len(shape) == len(expected) and shape[0] == 0:
        raise DataError(f"{member}: an array of shape {list(shape)} holds no samples.")
    if rows and len(shape) == len(expected) and _fits(shape[1:], expected[1:]) and shape[0] >= rows:
        return _Column(member, slot, rows, shape[0] // rows)
    if len(shape) == len(expected) + 1 and _fits(shape[1:], expected):
        return _Column(member, slot, 0, shape[0])
    if _fits(shape, expected):
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


def _check_keys(where: str, members: Mapping[str, _Member], slots: Mapping[str, _Slot]) -> None:
    """Raise where a key is no input, or an input has no key."""
    _check_names(where, members, slots)
    for key in members:
        if slots[key].kind != "tensor":
            raise DataError(f'{where}: the input "{key}" is no tensor; give such inputs with module:function.')
    missing = [slot for slot in slots.values() if slot.required and slot.name not in members]
    if missing:
        raise DataError(f'{where}: there is no array for the input "{missing[0].name}" ({missing[0].text}).')


def _check_names(where: str, names: Iterable[Any], slots: Mapping[str, _Slot]) -> None:
    """Raise where a name is no input of the model."""
    for name in names:
        if name not in slots:
            raise DataError(
                f'{where}: the model has no input "{name}".{nearest(str(name), list(slots))} Its inputs are '
                f"{', '.join(slots) or 'none'}."
            )


def _check_dtype(member: _Member, slot: _Slot) -> dict[str, None]:
    """Return a note when the array has to be converted; raise where that would not be safe."""
    stored = _stored_dtype(member.dtype, slot)
    if stored is None:
        raise DataError(f"{member}: {member.dtype} cannot be converted to {slot.dtype.name.lower()} safely.")
    if stored == _target(slot) or slot.dtype == ir.DataType.STRING:
        return {}
    return {f"{slot.name}: {stored} converted to {slot.dtype.name.lower()}.": None}


def _target(slot: _Slot) -> np.dtype[Any]:
    return slot.dtype.numpy()


def _stored_dtype(dtype: np.dtype[Any], slot: _Slot) -> np.dtype[Any] | None:
    """Return what the elements of an array are, None when they cannot become the input's.

    Floats may lose precision; integers may get narrower when their values allow it, which reading checks.
    """
    if slot.dtype == ir.DataType.STRING:
        return dtype if dtype.kind in "US" else None
    target = _target(slot)
    if dtype.kind == "V" and not dtype.names and dtype.itemsize == target.itemsize and target.kind == "V":
        # numpy stores the types of ml_dtypes as raw bytes.
        return target
    floats = _is_float(dtype) and slot.dtype.is_floating_point()
    integers = dtype.kind in "iu" and slot.dtype.is_integer()
    return dtype if floats or integers or np.can_cast(dtype, target, "safe") else None


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)


def _converted(array: np.ndarray, slot: _Slot, where: object) -> np.ndarray:
    """Return an array with the element type of its input.

    Raises:
        DataError: If an integer does not fit the type.
    """
    if slot.dtype == ir.DataType.STRING:
        return np.char.decode(array, "utf-8").astype(object) if array.dtype.kind == "S" else array.astype(object)
    target = _target(slot)
    if array.dtype == target:
        return array
    if array.dtype.kind == "V":
        return array.view(target)
    if array.dtype.kind in "iu" and slot.dtype.is_integer() and array.size:
        low, high = int(slot.dtype.min), int(slot.dtype.max)
        if int(array.min()) < low or int(array.max()) > high:
            raise DataError(f"{where}: values outside {low} to {high} do not fit {slot.text}.")
    # Too large a number becomes infinite; numpy would warn.
    with np.errstate(over="ignore"):
        return array.astype(target)


def _fits(shape: Sequence[int], expected: Sequence[int | Axis] | None) -> bool:
    if expected is None:
        return True
    return len(shape) == len(expected) and all(
        isinstance(want, Axis) or want == got for got, want in zip(shape, expected, strict=True)
    )


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive; what goes wrong while it is read becomes a `DataError`."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _DAMAGED as error:
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


def _whole(archive: zipfile.ZipFile, member: _Member, slot: _Slot) -> np.ndarray:
    with archive.open(_entry(archive, member)) as stream:
        array = np.lib.format.read_array(stream, allow_pickle=False)
    return _converted(array, slot, member)


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
        yield _converted(array, column.slot, member)


# ---------------------------------------------------------------------------------------------------- functions


def _from_function(text: str, slots: Mapping[str, _Slot]) -> Data:
    """Take samples from a function of the user's.

    Raises:
        DataError: If it cannot be imported, or its first sample does not fit.
    """
    module_name, _, name = text.partition(":")
    with _current_folder_importable(), _users_errors(f"{text}: importing the module"):
        module = importlib.import_module(module_name)
    function = getattr(module, name, None)
    if not callable(function):
        raise DataError(f"{text}: the module {module_name} has no function {name}.")

    def samples() -> Iterator[Feed]:
        found = _called(text, function)
        for number in itertools.count():
            sample = _next(text, found)
            if sample is None:
                return
            yield _checked(f"{text}, sample {number}", sample, slots)

    if next(samples(), None) is None:
        raise DataError(f"{text} yields no samples.")
    return Data(text, samples, lambda: sum(1 for _ in samples()))


@contextlib.contextmanager
def _current_folder_importable() -> Iterator[None]:
    """Let imports find modules of the current folder, as `python -m` does."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _called(text: str, function: Callable[[], Any]) -> Iterator[Any]:
    with _current_folder_importable(), _users_errors(text):
        return iter(function())


def _next(text: str, samples: Iterator[Any]) -> Any:
    with _current_folder_importable(), _users_errors(text):
        return next(samples, None)


@contextlib.contextmanager
def _users_errors(text: str) -> Iterator[None]:
    """Name the user's function when it raises; the cause keeps the traceback."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{text} raised {type(error).__name__}: {error}") from error


def _checked(where: str, sample: Any, slots: Mapping[str, _Slot]) -> Feed:
    """Return a sample of the user's function as a feed.

    Raises:
        DataError: If it is no dict, lacks an input, has an unknown one, or a value does not fit.
    """
    if not isinstance(sample, Mapping):
        raise DataError(f"{where}: a dict of input names and arrays is expected, not {type(sample).__name__}.")
    _check_names(where, sample, slots)
    missing = [s for s in slots.values() if s.required and sample.get(s.name) is None]
    if missing:
        raise DataError(f'{where}: there is no value for the input "{missing[0].name}" ({missing[0].text}).')
    return {key: _checked_value(f'{where}, input "{key}"', value, slots[key]) for key, value in sample.items()}


def _checked_value(where: str, value: Any, slot: _Slot) -> Any:
    if value is None or slot.kind == "other":
        return value
    if slot.kind == "sequence":
        if not isinstance(value, (list, tuple)):
            raise DataError(f"{where}: a list of arrays is expected.")
        return [_checked_array(where, np.asarray(element), slot) for element in value]
    return _checked_array(where, np.asarray(value), slot)


def _checked_array(where: str, array: np.ndarray, slot: _Slot) -> np.ndarray:
    if array.dtype == object and slot.dtype == ir.DataType.STRING:
        return array
    if _stored_dtype(array.dtype, slot) is None:
        raise DataError(f"{where}: {array.dtype} cannot be converted to {slot.dtype.name.lower()} safely.")
    if not _fits(array.shape, slot.shape):
        raise DataError(f"{where}: an array of shape {list(array.shape)} does not fit {slot.text}.")
    return _converted(array, slot, where)
