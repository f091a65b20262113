"""The file formats of ONNX models, and what else people take for one."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf import json_format, text_format
from google.protobuf.message import DecodeError

from onnxopt.errors import ModelError
from onnxopt.proto.datafile import DataFile
from onnxopt.proto.wire import Markers, WireError, strip

MAX_PROTOBUF = (1 << 31) - 1
"""What protobuf can read and write, in bytes."""

_PARSERS = {"textproto": text_format.Parse, "json": json_format.Parse}
_PARSE_ERRORS = (
    UnicodeDecodeError,
    onnx.parser.ParseError,
    text_format.ParseError,
    json_format.ParseError,
)

# Offset, first bytes, and what the file is then.
_OTHER_FORMATS = (
    (0, b"version https://git-lfs", "a Git LFS pointer; fetch the model itself with `git lfs pull`"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"%PDF", "a PDF document"),
    (0, b"PK\x03\x04", "a ZIP archive, as PyTorch checkpoints and .npz files are; unpack it or export it to ONNX"),
    (0, b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it first"),
    (0, b"BZh", "compressed with bzip2; unpack it first"),
    (0, b"\xfd7zXZ", "compressed with xz; unpack it first"),
    (0, b"7z\xbc\xaf", "a 7-Zip archive; unpack it first"),
    (0, b"\x80\x02", "a Python pickle, as old PyTorch checkpoints are; export the model to ONNX"),
    (0, b"\x80\x04", "a Python pickle; export the model to ONNX"),
    (0, b"\x89HDF", "an HDF5 file, as Keras writes; convert it with tf2onnx"),
    (0, b"GGUF", "a GGUF file, as llama.cpp reads"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (4, b"TFL3", "a TensorFlow Lite model; convert it with tf2onnx"),
    (4, b"ORTM", "in the ORT format, which cannot be changed; take the .onnx file it was made from"),
    (8, b'{"', "a safetensors file, which holds weights without a graph"),
)
_WEB_PAGES = (b"<!doctype", b"<html", b"<?xml")


def format_of(suffix: str) -> str | None:
    """Return the text format that onnx knows by a file name's suffix, None for a binary model."""
    name = onnx.serialization.registry.get_format_from_file_extension(suffix.lower())
    return None if name == "protobuf" else name


def parse_text(file: DataFile, form: str) -> onnx.ModelProto:
    """Parse a model in one of onnx's text formats.

    Raises:
        ModelError: If it is not in that format.
    """
    try:
        text = file.read(0, file.size).decode()
        if form == "onnxtxt":
            return onnx.parser.parse_model(text)
        proto = onnx.ModelProto()
        _PARSERS[form](text, proto)
        return proto
    except _PARSE_ERRORS as error:
        raise ModelError(f"it cannot be parsed as {form}: {' '.join(str(error).split())}.") from error


def to_text(proto: onnx.ModelProto, form: str) -> bytes:
    """Return a complete model in one of onnx's text formats."""
    text: bytes = onnx.serialization.registry.get(form).serialize_proto(proto)
    return text


def parse(file: DataFile, markers: Markers) -> onnx.ModelProto:
    """Parse a binary model without its large weights, which markers (offset, length) stand for.

    Raises:
        ModelError: If the file is something else, too large or damaged.
    """
    head = file.read(0, min(file.size, 512))
    for offset, magic, what in _OTHER_FORMATS:
        if head[offset:].startswith(magic):
            raise ModelError(f"this is not an ONNX model but {what}.")
    if head.lstrip().lower().startswith(_WEB_PAGES):
        raise ModelError("this is not an ONNX model but a web page or XML; the download went wrong.")
    if file.size > MAX_PROTOBUF:
        raise ModelError("it is larger than 2 GB, which protobuf cannot read; export it with external data.")
    try:
        proto = onnx.ModelProto()
        proto.ParseFromString(strip(file.mapped(), markers))
    except (WireError, DecodeError) as error:
        raise ModelError(f"{_guess(head)} ({error}).") from error
    return proto


def may_be_a_model(path: Path) -> bool:
    """Whether an existing file is called like a model, begins like one, or is empty.

    The first field of a model is its IR version, a small number.
    """
    if path.suffix.lower() == ".onnx" or format_of(path.suffix) is not None:
        return True
    with path.open("rb") as file:
        head = file.read(2)
    return not head or (head[0] == 0x08 and len(head) == 2 and 0 < head[1] < 0x80)


def _guess(head: bytes) -> str:
    """Say what bytes that are no protobuf may be."""
    # The first field is the IR version, a small number.
    if len(head) > 1 and head[0] == 0x08 and head[1] <= onnx.IR_VERSION:
        return "it begins like an ONNX model, but is truncated or damaged"
    if all(byte >= 0x20 or byte in b"\t\n\r\f" for byte in head):
        return "this is not an ONNX model but text"
    return "this is not an ONNX model, or it is damaged"
