from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import Result

import onnxopt

MODELS = Path(__file__).parent.parent.parent / "models"
Invoke = Callable[..., Result]


@pytest.fixture
def renamed(tmp_path: Path) -> Path:
    """Return mnist_cnn_bn.onnx with other names and other numbers."""
    proto = onnx.load(MODELS / "mnist_cnn_bn.onnx")
    random = np.random.default_rng(0)
    new = {i.name: f"p{number}" for number, i in enumerate(proto.graph.initializer)}
    for initializer in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(initializer)
        if array.dtype == np.float32:
            array = (array * random.uniform(0.5, 1.5, array.shape)).astype(np.float32)
        initializer.CopyFrom(onnx.numpy_helper.from_array(array, new[initializer.name]))
    for node in proto.graph.node:
        node.name = ""
        node.input[:] = [new.get(n, n) for n in node.input]
    path = tmp_path / "renamed.onnx"
    onnx.save(proto, path)
    return path


def test_a_trained_network_into_its_folded_form(invoke: Invoke, renamed: Path, tmp_path: Path) -> None:
    """From BatchNormalization to a model in which it is folded, and with a manifest that says so."""
    out, manifest = tmp_path / "out.onnx", tmp_path / "map.json"
    result = invoke("transfer", renamed, MODELS / "mnist_cnn.onnx", "-o", out, "--manifest", manifest)
    assert result.exit_code == 0, result.output
    assert "Certified: DST with SRC's parameters computes what SRC computes." in result.output
    assert "100.0% of the numbers" in result.output
    assert onnxopt.verify(renamed, out).ok
    assert not onnxopt.verify(MODELS / "mnist_cnn.onnx", out).ok
    content = json.loads(manifest.read_text())
    assert content["certificate"]["verdict"] == "equal"
    assert {p["status"] for p in content["parameters"]} == {"exact"}
    assert any("BatchNormalization folded" in p["how"] for p in content["parameters"])


def test_nothing_is_written_without_output(invoke: Invoke, renamed: Path, tmp_path: Path) -> None:
    result = invoke("transfer", MODELS / "mnist_cnn_bn.onnx", renamed, "--verbose")
    assert result.exit_code == 0, result.output
    assert "from " in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["renamed.onnx"]


def test_structure(invoke: Invoke, tmp_path: Path) -> None:
    out = tmp_path / "fresh.onnx"
    result = invoke("transfer", MODELS / "mnist_cnn.onnx", "--kind", "structure", "--seed", 5, "-o", out)
    assert result.exit_code == 0, result.output
    assert "drawn anew" in result.output
    assert out.exists()


def relu(path: Path, other: str = "Relu", width: int = 16) -> Path:
    text = f"""
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[n, 8] x) => (float[n, 4] y) {{ a = MatMul(x, w)  b = {other}(a)  y = MatMul(b, v) }}
    """
    proto = onnx.parser.parse_model(text)
    for name, shape in (("w", (8, width)), ("v", (width, 4))):
        array = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, path)
    return path


def test_a_network_that_computes_something_else_is_not_written(invoke: Invoke, tmp_path: Path) -> None:
    first, second = relu(tmp_path / "relu.onnx"), relu(tmp_path / "tanh.onnx", "Tanh")
    out = tmp_path / "out.onnx"
    result = invoke("transfer", first, second, "-o", out)
    assert result.exit_code == 1
    assert "--allow-difference" in result.output
    assert not out.exists()
    assert invoke("transfer", first, second, "-o", out, "--allow-difference").exit_code == 0
    assert out.exists()


def test_nothing_in_common(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("transfer", relu(tmp_path / "a.onnx"), relu(tmp_path / "b.onnx", width=24))
    assert result.exit_code == 1
    assert "nothing was moved" in result.output


def test_bad_options(invoke: Invoke, tmp_path: Path) -> None:
    path = relu(tmp_path / "a.onnx")
    assert "is the input itself" in invoke("transfer", path, path, "-o", path).output
    assert "needs two models" in invoke("transfer", path).output
    assert "no parameter of the target" in invoke("transfer", path, path, "--freeze", "nothing").output
    assert "would overwrite a model" in invoke("transfer", path, path, "--manifest", path).output
