from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import Result

MODEL = Path(__file__).parent.parent.parent / "models" / "mnist_cnn.onnx"
Invoke = Callable[..., Result]


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Return the digit classifier with another last layer."""
    proto = onnx.load(MODEL)
    last = [n for n in proto.graph.node if n.op_type == "Gemm"][-1]
    (weight,) = [t for t in proto.graph.initializer if t.name == last.input[1]]
    weight.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(proto, tmp_path / "other.onnx")
    return tmp_path / "other.onnx"


def test_a_real_model_with_two_heads(tmp_path: Path, other: Path, invoke: Invoke) -> None:
    out = tmp_path / "both.onnx"
    result = invoke("merge-trunk", MODEL, other, "-o", out, "--report", tmp_path / "r.html")
    assert result.exit_code == 0, result.output
    assert "outputs are equal" in result.output
    assert "mnist_cnn goes on with Gemm" in result.output
    assert out.stat().st_size < 1.1 * MODEL.stat().st_size
    assert [o.name for o in onnx.load(out).graph.output] == ["logits", "other.logits"]
    assert "mnist_cnn + other" in (tmp_path / "r.html").read_text()


def test_nothing_shared_is_one_sentence(tmp_path: Path, other: Path, invoke: Invoke) -> None:
    proto = onnx.load(other)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(tensor) + 1, tensor.name))
    onnx.save(proto, other)
    result = invoke("merge-trunk", MODEL, other, "-o", tmp_path / "both.onnx")
    assert result.exit_code == 1
    assert "share no layer" in result.output
    assert not (tmp_path / "both.onnx").exists()


def test_an_input_is_not_overwritten(other: Path, invoke: Invoke) -> None:
    before = other.read_bytes()
    result = invoke("merge-trunk", MODEL, other, "-o", other)
    assert result.exit_code == 2
    assert "is the input itself" in result.output
    assert other.read_bytes() == before


def test_one_model_is_refused(tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("merge-trunk", MODEL, "-o", tmp_path / "o.onnx")
    assert result.exit_code == 2
    assert "two or more" in result.output


def test_data_is_used(tmp_path: Path, other: Path, invoke: Invoke) -> None:
    data = tmp_path / "d.npz"
    np.savez(data, image=np.zeros((3, 1, 28, 28), np.float32))
    result = invoke("merge-trunk", MODEL, other, "-o", tmp_path / "b.onnx", "--data", data, "--no-measure")
    assert result.exit_code == 0, result.output
    assert "3 of 3 samples" in result.output
