"""Where the bytes of a saved model come from: embedded in the .onnx file, or in a data file beside it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from onnxopt.errors import ModelError
from onnxopt.proto.datafile import DataFile, write_all
from onnxopt.proto.encode import tensors as tensors_of
from onnxopt.proto.tensors import EmbeddedTensor, ExternalTensor, Region
from onnxopt.proto.wire import THRESHOLD, Markers, Slot, WireError, expand, strip

_PAGE = 4096
_LINE = 64
_DATA_FIELDS = (
    "raw_data",
    "float_data",
    "int32_data",
    "int64_data",
    "double_data",
    "uint64_data",
)
_NO_HASH = "0" * 16
_SAMPLE = 1 << 14
_STRIDE = 1 << 20


def data_name(model_name: str, digest: str = _NO_HASH) -> str:
    """Return the name of a model's data file; it has the same length for every digest."""
    return f"{model_name}.{digest}.data"


Piece = bytes | Region | ir.TensorProtocol
"""Something to be written to a file: bytes, or what they are to be taken from."""


class Weights:
    """Collects the large tensors of a model while it is encoded, and puts them where they belong afterwards.

    Attributes:
        markers: Make the stand-ins.
        tensors: The tensors that markers stand for, by the number in the marker.
        any_external: Whether any tensor, of whatever size, is in a data file now.
    """

    def __init__(self, markers: Markers | None = None) -> None:
        self.markers = markers or Markers()
        self.tensors: list[ir.TensorProtocol] = []
        self.any_external = False
        self._movable: list[tuple[onnx.TensorProto, ir.TensorProtocol]] = []
        self._marked: list[onnx.TensorProto] = []

    def place(self, target: onnx.TensorProto, tensor: ir.TensorProtocol, initializer: bool) -> bool:
        """Put a marker in place of large data (an `encode.Place`)."""
        external = isinstance(tensor, ir.ExternalTensor)
        self.any_external |= external
        if tensor.nbytes < THRESHOLD:
            return False
        # Runtimes look for initializers in data files; tensors in attributes stay where they are.
        if initializer or external:
            self._movable.append((target, tensor))
        if isinstance(tensor, ir.serde.TensorProtoTensor) and not tensor.raw.HasField("raw_data"):
            # Typed fields are embedded as they are.
            return False
        target.raw_data = self.markers.make(len(self.tensors), 0)
        self.tensors.append(tensor)
        self._marked.append(target)
        return True

    def move_out(self, model_name: str) -> Layout | None:
        """Make the collected initializers external; return the layout of their file, None when there are none."""
        layout = Layout(model_name)
        for target, tensor in self._movable:
            layout.add(target, tensor)
        return layout if layout.size else None

    def fill_in(self) -> None:
        """Replace the markers by the data itself."""
        for target, tensor in zip(self._marked, self.tensors, strict=True):
            if target.HasField("raw_data"):
                target.raw_data = tensor.tobytes()

    def pieces(self, proto: onnx.ModelProto) -> list[Piece]:
        """Return what the .onnx file consists of, in order."""
        found = expand(proto.SerializeToString(), self.markers, [t.nbytes for t in self.tensors])
        return [self.tensors[p.index] if isinstance(p, Slot) else p for p in found]

    def same_as(self, other: Weights) -> bool:
        """Whether the same data was collected, without reading it."""
        return list(map(identity, self.tensors)) == list(map(identity, other.tensors))


def piece_bytes(piece: Piece) -> int:
    """Return how many bytes a piece writes."""
    if isinstance(piece, bytes):
        return len(piece)
    return piece.length if isinstance(piece, Region) else piece.nbytes


def write_piece(piece: Piece, target: int) -> None:
    """Write a piece to a descriptor."""
    if isinstance(piece, bytes):
        write_all(target, piece)
    elif isinstance(piece, Region):
        write_region(piece, target)
    else:
        write_tensor(piece, target)


class Layout:
    """What goes where in a data file. Tensors that share their data share it in the file.

    Attributes:
        size: Bytes of the file.
    """

    def __init__(self, model_name: str) -> None:
        """Start with an empty file.

        Args:
            model_name: Name of the .onnx file, from which the name of the data file is made.
        """
        self.size = 0
        self._model_name = model_name
        self._offsets: dict[object, int] = {}
        self._tensors: list[tuple[int, ir.TensorProtocol]] = []
        self._locations: list[onnx.StringStringEntryProto] = []

    def add(self, target: onnx.TensorProto, tensor: ir.TensorProtocol) -> None:
        """Refer from a TensorProto to the tensor's place in the file."""
        key = identity(tensor)
        offset = self._offsets.get(key)
        if offset is None:
            # Page by page for those worth mapping, as the ONNX specification suggests.
            unit = _PAGE if tensor.nbytes >= _PAGE else _LINE
            offset = -(-self.size // unit) * unit
            self._offsets[key] = offset
            self._tensors.append((offset, tensor))
            self.size = offset + tensor.nbytes
        for field in _DATA_FIELDS:
            target.ClearField(field)
        target.data_location = onnx.TensorProto.EXTERNAL
        self._locations.append(target.external_data.add(key="location", value=data_name(self._model_name)))
        target.external_data.add(key="offset", value=str(offset))
        target.external_data.add(key="length", value=str(tensor.nbytes))

    def write(self, target: int) -> str:
        """Write the file to a descriptor and return its digest, 16 hexadecimal digits.

        The digest is over the layout and samples of the data: hashing gigabytes would take longer than copying
        them.
        """
        digest = hashlib.sha256()
        position = 0
        for offset, tensor in self._tensors:
            write_all(target, bytes(offset - position))
            digest.update(f"{offset} {tensor.nbytes} ".encode())
            write_tensor(tensor, target, digest)
            position = offset + tensor.nbytes
        return digest.hexdigest()[: len(_NO_HASH)]

    def set_location(self, name: str) -> None:
        """Say how the file is called."""
        for entry in self._locations:
            entry.value = name


def identity(tensor: ir.TensorProtocol) -> object:
    """Return something equal for tensors that hold the same bytes of the same file, or are the same object."""
    if isinstance(tensor, (EmbeddedTensor, ExternalTensor)):
        return tensor.region.key
    if isinstance(tensor, ir.ExternalTensor):
        return str(tensor.path), tensor.offset, tensor.nbytes
    return id(tensor)


class _Sink:
    """A file to write one tensor to; takes samples of what passes."""

    def __init__(self, target: int, digest: hashlib._Hash) -> None:
        self._target = target
        self._digest = digest
        self._position = 0

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        write_all(self._target, view)
        begin, end = self._position, self._position + len(view)
        for sample in range(begin // _STRIDE * _STRIDE, end, _STRIDE):
            self._digest.update(view[max(sample, begin) - begin : max(min(sample + _SAMPLE, end), begin) - begin])
        self._position = end


def write_tensor(tensor: ir.TensorProtocol, target: int, digest: hashlib._Hash | None = None) -> None:
    """Write the data of a tensor to a descriptor, from file to file where it lies in one.

    Args:
        tensor: The tensor.
        target: Open for writing.
        digest: Updated with samples of the data: its first 16 KiB and as much after every MiB.
    """
    if isinstance(tensor, (EmbeddedTensor, ExternalTensor)):
        write_region(tensor.region, target, digest)
        return
    sink = _Sink(target, digest or hashlib.sha256())
    if hasattr(tensor, "tofile"):
        tensor.tofile(sink)
    else:
        sink.write(tensor.tobytes())


def write_region(region: Region, target: int, digest: hashlib._Hash | None = None) -> None:
    """Write a part of a file to a descriptor (see `write_tensor`)."""
    region.file.copy_to(target, region.offset, region.length)
    if digest is not None:
        for sample in range(0, region.length, _STRIDE):
            digest.update(region.file.read(region.offset + sample, min(_SAMPLE, region.length - sample)))


def replaced_data(model: Path) -> list[Path]:
    """Return the data files of the model that is to be replaced, as far as onnxopt wrote them for it."""
    names = _locations(model) or ()
    ours = re.compile(re.escape(model.name) + r"\.[0-9a-f]{16}(-\d+)?\.data")
    return [model.parent / name for name in names if ours.fullmatch(name)]


def remove_unused(data: Iterable[Path]) -> None:
    """Remove data files that no model in their folder refers to."""
    for path in data:
        others = (m for m in path.parent.glob("*.onnx") if m.is_file())
        # A model that cannot be read might refer to the file.
        if not any(_may_refer(m, path.name) for m in others):
            path.unlink(missing_ok=True)


def _may_refer(model: Path, name: str) -> bool:
    names = _locations(model)
    return names is None or name in names


def _locations(model: Path) -> set[str] | None:
    """Return the external data files a model refers to, None where it cannot be read."""
    try:
        file = DataFile(model)
        if not file.size:
            return set()
        proto = onnx.ModelProto.FromString(strip(file.mapped(), Markers()))
    except (OSError, ModelError, WireError, DecodeError):
        return None
    return {e.value for t in tensors_of(proto) for e in t.external_data if e.key == "location"}
