"""Loading and saving: the only model file I/O of onnxopt.

Weights never enter memory as a whole: they stay in the file they came from, are mapped when somebody looks at
them, and are copied from file to file on saving.
"""

from __future__ import annotations

import contextlib
import filecmp
import io
import itertools
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from onnxopt.errors import ModelError, OutputError
from onnxopt.external import Piece, Weights, data_name, piece_bytes, remove_unused, replaced_data, write_piece
from onnxopt.fix_shape import fix_shape
from onnxopt.opset import convert_opset
from onnxopt.proto.collector import garbage_collection_paused
from onnxopt.proto.datafile import DataFile
from onnxopt.proto.decode import Source, decode
from onnxopt.proto.encode import encode
from onnxopt.proto.folder import Folder
from onnxopt.proto.formats import MAX_PROTOBUF, format_of, parse, parse_text, to_text
from onnxopt.proto.keys import HAD_EXTERNAL_DATA
from onnxopt.proto.tensors import EmbeddedTensor, ExternalTensor, Region
from onnxopt.proto.wire import Markers

__all__ = ["check_output", "convert_opset", "fix_shape", "load", "model_bytes", "save"]

ORIGINAL = "onnxopt.original"
"""Key in `graph.meta` of the file a model was loaded from."""


def load(source: str | os.PathLike[str] | onnx.ModelProto | ir.Model) -> ir.Model:
    """Load a model and check all that can be checked without running it.

    Weights stay where they are, in the file or its external data. Nodes that are out of order are sorted. In
    models of IR version 3 and older, which must list initializers as graph inputs, they are taken out of the
    inputs, and `save` puts them back.

    Args:
        source: Path of an .onnx file, or of one of onnx's text formats (.onnxtxt, .textproto, .json and so on); an
            `onnx.ModelProto`, to whose tensors the model then refers; or an `onnx_ir.Model`, which is returned as
            it is.

    Raises:
        ModelError: If it cannot be read, is malformed, reaches outside its folder, or is newer than the installed
            onnx.
    """
    if isinstance(source, ir.Model):
        return source
    if isinstance(source, onnx.ModelProto):
        try:
            return decode(source, Source(Folder(None)))
        except ModelError as error:
            raise ModelError(f"The model cannot be used: {error}") from error
    path = Path(source)
    try:
        return _load_file(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error


def _load_file(path: Path) -> ir.Model:
    if not path.exists():
        raise ModelError(f"{path} does not exist.")
    file = DataFile(path)
    if not file.size:
        raise ModelError(f"{path} is empty.")
    form = format_of(path.suffix)
    try:
        if form is not None:
            return decode(parse_text(file, form), Source(Folder(path)))
        markers = Markers()
        model = decode(parse(file, markers), Source(Folder(path), file, markers))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    model.graph.meta[ORIGINAL] = file
    return model


def check_output(path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
    """Check that a model could be written there, without writing anything.

    Raises:
        OutputError: If it could not.
    """
    target = Path(path)
    try:
        status = target.lstat()
    except (FileNotFoundError, NotADirectoryError):
        status = None
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}.") from error
    if not target.parent.is_dir():
        raise OutputError(f"{target} cannot be written: there is no folder {target.parent}; create it first.")
    if target.is_dir():
        raise OutputError(f"{target} is a folder; give the name of a file in it.")
    if status is not None and not stat.S_ISREG(status.st_mode) and not stat.S_ISLNK(status.st_mode):
        raise OutputError(f"{target} is not a regular file, so it cannot be replaced by a model.")
    if status is not None and not overwrite:
        raise OutputError(f"{target} exists already.")
    if status is not None and target.exists() and not os.access(target, os.W_OK):
        raise OutputError(f"{target} is write-protected.")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{target} cannot be written: the folder {target.parent} is write-protected.")


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    external_data: bool | None = None,
    overwrite: bool = True,
) -> None:
    """Write a model, whole or not at all.

    The file appears under its name only when it is complete. External data is written before, under a name that
    carries a digest of it; data that onnxopt wrote for the file that is replaced is removed afterwards, unless
    another model in the folder refers to it. So a model can be saved over the file it was loaded from. A symbolic
    link is replaced, not what it points to. A model that was not edited, in one file, comes out as the same bytes.

    Args:
        model: The model; it is not changed.
        path: Where to. The suffixes of onnx's text formats give text.
        external_data: True writes initializers of 1 KiB and more to a data file, False embeds everything. By
            default the form of the input is kept, except that what exceeds 2 GB goes to a data file.
        overwrite: Whether an existing file may be replaced.

    Raises:
        OutputError: If it cannot be written; nothing is left behind.
        ModelError: If ONNX cannot express the model, or a file it was loaded from has been written to.
    """
    check_output(path, overwrite=overwrite)
    target = Path(path)
    try:
        with garbage_collection_paused():
            _write(_Plan(model, target.name, external_data), target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}.") from error


def model_bytes(model: ir.Model) -> int:
    """Return how many bytes `save` would write, the .onnx file and its external data together.

    The file is taken to be called model.onnx: a data file has the name of the model, once per tensor.
    """
    with garbage_collection_paused():
        return _Plan(model, "model.onnx", None).size


class _Plan:
    """What is to be written for a model.

    Attributes:
        layout: The data file; None when there is none.
        size: Bytes of all files together.
    """

    def __init__(self, model: ir.Model, name: str, external_data: bool | None) -> None:
        """Encode the model and decide on its form.

        Raises:
            OutputError: If what is to be embedded exceeds what protobuf can hold.
        """
        self._format = format_of(Path(name).suffix)
        self._weights = Weights()
        self._proto = encode(model, self._weights.place)
        embedded = self._proto.ByteSize() + sum(t.nbytes for t in self._weights.tensors)
        if external_data is None:
            had = self._weights.any_external or HAD_EXTERNAL_DATA in model.graph.meta
            external_data = had or embedded > MAX_PROTOBUF
        self.layout = self._weights.move_out(name) if external_data else None
        if self.layout is None and embedded > MAX_PROTOBUF:
            raise OutputError(f"{name} would exceed the 2 GB that protobuf can hold; write it with external data.")
        self._original: DataFile | None = None
        if self.layout is None and self._format is None:
            self._original = self._file_it_still_is(model.graph.meta.get(ORIGINAL))
        own = sum(map(piece_bytes, self.pieces()))
        if own > MAX_PROTOBUF:
            raise OutputError(f"{name} would exceed the 2 GB that protobuf can hold, even without its initializers.")
        self.size = own + (self.layout.size if self.layout is not None else 0)

    def pieces(self) -> list[Piece]:
        """Return what the .onnx file consists of."""
        if self._original is not None:
            return [Region(self._original, 0, self._original.size, ir.DataType.UINT8)]
        if self._format is not None:
            self._weights.fill_in()
            return [to_text(self._proto, self._format)]
        return self._weights.pieces(self._proto)

    def require_sources_unchanged(self) -> None:
        """Raise a ModelError when a file that data was taken from has been written to meanwhile."""
        files = {t.region.file for t in self._weights.tensors if isinstance(t, (EmbeddedTensor, ExternalTensor))}
        if self._original is not None:
            files.add(self._original)
        for file in files:
            file.require_unchanged()

    def _file_it_still_is(self, file: DataFile | None) -> DataFile | None:
        """Return the file the model was loaded from, when loading and encoding it again gives the same."""
        if file is None:
            return None
        markers = self._weights.markers
        try:
            proto = parse(file, markers)
            for field in ("node", "initializer"):
                # Most edits show here, before anything is decoded.
                if len(getattr(proto.graph, field)) != len(getattr(self._proto.graph, field)):
                    return None
            weights = Weights(markers)
            again = encode(decode(proto, Source(Folder(file.path), file, markers)), weights.place)
        except ModelError:
            # Somebody has written into the file. Where data is still needed from it, the last check tells.
            return None
        same = weights.same_as(self._weights) and again.SerializeToString() == self._proto.SerializeToString()
        return file if same else None


def _write(plan: _Plan, target: Path) -> None:
    """Write the files of a plan under temporary names, then rename them."""
    with contextlib.ExitStack() as stack:
        renames: list[tuple[Path, Path]] = []
        data = None
        if plan.layout is not None:
            file = stack.enter_context(_temporary(target))
            digest = plan.layout.write(file.fileno())
        # from here on it matters which data is there, and which model refers to it
        stack.enter_context(_alone_in(target.parent))
        replaced = replaced_data(target) if target.is_file() else []
        if plan.layout is not None:
            data, is_new = _data_path(target, digest, Path(file.name))
            if is_new:
                renames.append((Path(file.name), data))
            plan.layout.set_location(data.name)
        file = stack.enter_context(_temporary(target))
        for piece in plan.pieces():
            write_piece(piece, file.fileno())
        plan.require_sources_unchanged()
        if target.is_file():
            Path(file.name).chmod(stat.S_IMODE(target.stat().st_mode))
        renames.append((Path(file.name), target))
        _rename(renames)
        remove_unused(path for path in replaced if path != data)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes from saving into a folder meanwhile; nobody is kept out where folders cannot be locked."""
    descriptor = None
    try:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _rename(renames: list[tuple[Path, Path]]) -> None:
    """Rename files, the model last; when that does not succeed, remove what came before."""
    try:
        for temporary, path in renames:
            temporary.replace(path)
    except BaseException:
        # Whatever interrupted us, the model is in place when its temporary is gone.
        if renames[-1][0].exists():
            for _, path in renames[:-1]:
                path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[io.FileIO]:
    """Open a new file in the folder of another; it is gone afterwards unless it was renamed."""
    path = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with path.open("xb", buffering=0) as file:
            yield file
    finally:
        path.unlink(missing_ok=True)


def _data_path(target: Path, digest: str, written: Path) -> tuple[Path, bool]:
    """Return where the data goes, and whether it is not there already."""
    for number in itertools.count(1):
        path = target.with_name(data_name(target.name, digest if number == 1 else f"{digest}-{number}"))
        if not path.exists():
            return path, True
        # The digest is of samples, so the same name does not mean the same content.
        if path.is_file() and filecmp.cmp(path, written, shallow=False):
            return path, False
    raise AssertionError("unreachable")
