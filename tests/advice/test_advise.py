from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import onnxopt
from onnxopt.cli import cli
from onnxopt.errors import DataError
from onnxopt.report.advice import to_html

RANDOM = np.random.default_rng(0)
HALF = RANDOM.normal(size=(12, 4)).astype(np.float32)
FEATURES = np.concatenate([HALF, -HALF], axis=1)
LOST = (np.outer(RANDOM.normal(size=12), RANDOM.normal(size=8)) / 3).astype(np.float32)


def network(first: np.ndarray) -> onnx.ModelProto:
    """Return a classifier of 4 classes with a hidden layer of 8 units."""
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 12] x) => (float[N, 4] y) { s = Gemm(x, w, b)  h = Relu(s)  y = Gemm(h, v) }
    """)
    arrays = {"w": first, "b": np.zeros(8, np.float32), "v": RANDOM.normal(size=(8, 4)).astype(np.float32)}
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


INPUTS = np.random.default_rng(1).normal(size=(150, 12)).astype(np.float32)
PLAIN = {"x": INPUTS, "labels": INPUTS[:, :3].argmax(axis=1)}
"""Classes that the inputs tell."""

HIDDEN = {"x": INPUTS, "labels": np.abs(INPUTS @ HALF)[:, :3].argmax(axis=1)}
"""Classes that are a linear function of the units of a layer with the weight `FEATURES`, not of the inputs."""


@pytest.fixture
def samples() -> dict[str, np.ndarray]:
    return dict(PLAIN)


def test_without_training_a_head_is_compared_with_the_inputs(samples: dict[str, np.ndarray]) -> None:
    advice = onnxopt.advise(network(LOST), data=samples, source={"x": samples["x"] + 3}, train=False)
    assert [w.name for w in advice.ways] == ["inputs", "head"]
    assert (advice.verdict.kind, advice.verdict.recommended) == ("transfer hurts", "inputs")
    assert advice.shift is not None
    assert advice.shift.shown
    assert "left out, as asked" in advice.notes[0]
    assert [c.name for c in advice.curves] == ["head", "inputs"]
    page = to_html(advice)
    assert "<svg" in page
    assert advice.verdict.sentence.split(".")[0] in page
    assert str(advice).startswith("Transfer hurts here")


def test_torch_may_be_missing(samples: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> object:
        return None if name == "torch" else known(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    advice = onnxopt.advise(network(FEATURES), data=samples)
    assert [w.name for w in advice.ways] == ["inputs", "head"]
    assert "torch is not installed" in advice.notes[0]
    tokens = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (int64[N, 12] x) => (float[N, 4] y) { c = Cast<to = 1>(x)  s = MatMul(c, w)  h = Relu(s)  y = MatMul(h, v) }
    """)
    for name, array in {"w": FEATURES, "v": FEATURES[:8, :4]}.items():
        tokens.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
    with pytest.raises(DataError, match="nothing to compare a new head with"):
        onnxopt.advise(tokens, data=samples | {"x": (10 * samples["x"]).astype(np.int64)})


@pytest.fixture
def path(tmp_path: Path) -> Callable[[np.ndarray, dict[str, np.ndarray]], tuple[Path, Path]]:
    def save(first: np.ndarray, data: dict[str, np.ndarray]) -> tuple[Path, Path]:
        onnx.save(network(first), tmp_path / "m.onnx")
        np.savez(tmp_path / "d.npz", **data)  # type: ignore[arg-type]
        return tmp_path / "m.onnx", tmp_path / "d.npz"

    return save


@pytest.mark.parametrize(
    ("first", "samples", "kind", "recommended"),
    [
        (FEATURES, HIDDEN, "transfer helps", {"head", "fine-tuning"}),
        (LOST, PLAIN, "transfer hurts", {"inputs", "scratch"}),
    ],
    ids=["helps", "hurts"],
)
def test_the_verdict_is_right(
    first: np.ndarray,
    samples: dict[str, np.ndarray],
    kind: str,
    recommended: set[str],
    path: Callable[..., tuple[Path, Path]],
) -> None:
    model, data = path(first, samples)
    report = model.with_suffix(".json")
    done = CliRunner(env={"COLUMNS": "120"}).invoke(
        cli, ["advise", str(model), "--data", str(data), "--folds", "3", "--report", str(report)]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(report.read_text())
    assert [w["name"] for w in found["ways"]] == ["inputs", "head", "fine-tuning", "scratch"]
    assert found["verdict"]["kind"] == kind, done.output
    assert found["verdict"]["recommended"] in recommended
    assert "fine-tuning" in done.output
