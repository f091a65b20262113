from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from onnxopt.errors import DataError, OutputError
from onnxopt.training import safetensors


def test_arrays_and_strings_come_back(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b/c": np.array(5.0),
        "none": np.zeros((0, 2), np.int64),
        "yes": np.array([True, False]),
    }
    path = tmp_path / "x.safetensors"
    safetensors.write(path, arrays, {"who": "me"})
    found, strings = safetensors.read(path)
    assert strings == {"who": "me"} and list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def entry(**changes: object) -> bytes:
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no safetensors file"),
        (b"\xff" * 20, "no safetensors file"),
        ((20).to_bytes(8, "little") + b"{" * 20, "damaged"),
        ((2).to_bytes(8, "little") + b"[]", "damaged"),
        (entry(data_offsets=[0, 80]), "outside of the file"),
        (entry(data_offsets=[-8, 0]), "outside of the file"),
        (entry(shape=[3]), "another size"),
        (entry(shape=[-2]), "outside"),
        (entry(dtype="pickle"), "damaged"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError, match=message):
        safetensors.read(tmp_path / "x")


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        safetensors.read(tmp_path / "x")
    with pytest.raises(OutputError, match="cannot be written"):
        safetensors.write(tmp_path / "no" / "x", {}, {})
