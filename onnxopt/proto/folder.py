"""Where external data may lie: in the model's folder, and nowhere else."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
import onnx_ir as ir

from onnxopt.errors import ModelError
from onnxopt.proto.checks import byte_count, string_map
from onnxopt.proto.datafile import DataFile
from onnxopt.proto.tensors import ExternalTensor, Region


class Folder:
    """Opens the external data files of one model, each once.

    Attributes:
        path: The folder that locations are relative to.
    """

    def __init__(self, model_path: Path | None) -> None:
        """Remember where the model is; without a path, locations are relative to the current folder."""
        self.path = model_path.parent if model_path is not None else Path()
        # Caches keep a model and its data as links into one folder of blobs: beside the file itself is inside.
        own = model_path.resolve().parent if model_path is not None else Path.cwd()
        self._allowed = {self.path.resolve(), own}
        self._has_path = model_path is not None
        self._files: dict[str, DataFile] = {}

    @property
    def is_used(self) -> bool:
        """Whether any external data was opened."""
        return bool(self._files)

    def tensor(self, proto: onnx.TensorProto, dtype: ir.DataType, label: str) -> ExternalTensor:
        """Return the tensor whose data is in a file of this folder.

        Args:
            proto: A tensor with external data.
            dtype: Its element type.
            label: What messages call it.

        Raises:
            ModelError: If the file is missing, elsewhere, or too short.
        """
        location, offset, length = _entries(proto, label)
        size = byte_count(dtype, proto.dims, label)
        if dtype == ir.DataType.STRING:
            raise ModelError(f"{label} is of strings, which cannot be stored as external data.")
        if length not in (None, size):
            raise ModelError(
                f"{label} has the shape {list(proto.dims)} of {dtype.name}, which takes {size} bytes, but its "
                f"external data is {length} bytes long."
            )
        file = self._files.get(location) or self._open(location, label)
        if offset + size > file.size:
            raise ModelError(
                f"{label} is at bytes {offset} to {offset + size} of {location}, which has only {file.size}: "
                "it is truncated or belongs to another model."
            )
        region = Region(file, offset, size, dtype)
        return ExternalTensor(region, location, self.path, ir.Shape(proto.dims, frozen=True), proto)

    def _open(self, location: str, label: str) -> DataFile:
        if _is_absolute(location) or ".." in PureWindowsPath(location).parts:
            raise ModelError(f"{label} has its data at {location}; only files in the model's folder are read.")
        path = self.path / location
        try:
            # A loop of links is an error of its own here, and has no place that it leads to.
            real = path.resolve(strict=True)
            if not any(real.is_relative_to(folder) for folder in self._allowed):
                raise ModelError(
                    f"{label} has its data in {location}, a link to {real}, which is outside the model's folder; "
                    "copy the file there instead."
                )
            file = DataFile(real)
        except FileNotFoundError:
            hint = "put it there" if self._has_path else "load the model by its path"
            raise ModelError(f"{label} has its data in {path}, which does not exist; {hint}.") from None
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ModelError(f"{label} has its data in {path}, which cannot be read: {reason}.") from error
        self._files[location] = file
        return file


def _is_absolute(location: str) -> bool:
    return PurePosixPath(location).is_absolute() or bool(PureWindowsPath(location).anchor)


def _entries(proto: onnx.TensorProto, label: str) -> tuple[str, int, int | None]:
    """Return location, offset and length (None where it is not given) of external data."""
    entries = string_map(proto.external_data) or {}
    location = entries.get("location", "")
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries["length"]) if entries.get("length") else None
    except ValueError:
        raise ModelError(f"{label} has an offset or length of external data that is no number.") from None
    if not location or "\0" in location:
        raise ModelError(f"{label} is stored as external data, but no file is named.")
    if offset < 0:
        raise ModelError(f"{label} has external data at the negative offset {offset}.")
    return location, offset, length
