"""Peak memory, from a child process."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxopt.runtime import RunOptions
from onnxopt.timing import memory
from onnxopt.timing.memory import peak_mb

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its peak")


def weighty(megabytes: int) -> ir.Model:
    """Return a model with one weight of this size."""
    data = np.zeros((megabytes * 250, 1000), np.float32)
    w = ir.Value(
        name="w",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(data.shape),
        const_value=ir.tensor(data, name="w"),
    )
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, data.shape[0]]))
    node = ir.node("MatMul", [x, w], name="n")
    node.outputs[0].name = "y"
    node.outputs[0].type, node.outputs[0].shape = x.type, ir.Shape([1, 1000])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 17}, name="g")
    return ir.Model(graph, ir_version=8)


def feed(model: ir.Model) -> dict[str, np.ndarray]:
    return {"x": np.zeros(model.graph.inputs[0].shape.numpy(), np.float32)}  # type: ignore[union-attr]


@linux
def test_weights_count_and_the_interpreter_does_not(tmp_path: Path) -> None:
    small, large = weighty(1), weighty(64)
    little = peak_mb(small, feed(small), RunOptions())
    much = peak_mb(large, feed(large), RunOptions())
    assert little is not None
    assert much is not None
    assert 1 <= little < 30
    assert much > 64
    path = tmp_path / "model.onnx"
    ir.save(large, path)
    assert peak_mb(path, feed(large), RunOptions()) == pytest.approx(much, rel=0.3)


def test_what_cannot_be_found_out_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = weighty(1)
    assert peak_mb(tmp_path / "missing.onnx", feed(model), RunOptions()) is None
    monkeypatch.setattr(memory, "LARGEST_COPY", 1000)
    assert peak_mb(model, feed(model), RunOptions()) is None
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "no status")
    assert peak_mb(tmp_path, feed(model), RunOptions()) is None
