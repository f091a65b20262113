from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner, Result

from onnxopt.cli import cli
from onnxopt.registry import entries


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Return a way to call the command line in this process."""
    monkeypatch.delenv("ONNXOPT_DEBUG", raising=False)

    def call(*args: object) -> Result:
        entries.cache_clear()
        runner = CliRunner(env={"COLUMNS": "100"})
        return runner.invoke(cli, [os.fspath(a) if isinstance(a, Path) else str(a) for a in args], prog_name="onnxopt")

    return call


def proto() -> onnx.ModelProto:
    """Return y = MatMul(Identity(x), w), in which one edit can be made."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[batch, 64] x) => (float[batch, 64] y) { a = Identity(x)  y = MatMul(a, w) }
    """)
    weights = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    return model


@pytest.fixture
def model_proto() -> onnx.ModelProto:
    return proto()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return the path of a small model, alone in its folder."""
    folder = tmp_path / "models"
    folder.mkdir()
    path = folder / "model.onnx"
    onnx.save(proto(), path)
    return path
