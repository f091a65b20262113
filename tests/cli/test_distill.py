from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

import onnxopt

MODELS = Path(__file__).parent.parent.parent / "models"
MODEL = MODELS / "mnist_cnn.onnx"
Invoke = Callable[..., Result]


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    passes = "prune-channels{ratio=0.3}"
    result = onnxopt.optimize(MODEL, passes=passes, max_error=math.inf, measure=False, verify=False)
    onnxopt.save(result.model, tmp_path / "pruned.onnx")
    return tmp_path / "pruned.onnx"


def test_a_pruned_model_learns_from_the_original(tmp_path: Path, pruned: Path, invoke: Invoke) -> None:
    np.savez(tmp_path / "images.npz", image=np.load(MODELS / "mnist_calibration.npz")["image"][:96])
    out = tmp_path / "out.onnx"
    args = (MODEL, pruned, "--data", tmp_path / "images.npz", "-o", out, "--epochs", 4, "--batch", 8)
    result = invoke("distill", *args, "--validation", 0.25)
    assert result.exit_code == 0, result.output
    assert "Same class as the teacher on samples not learnt from: before" in result.stdout
    images, labels = np.load(MODELS / "mnist_test.npz")["image"][:300], np.load(MODELS / "mnist_test_labels.npy")[:300]
    before, after = (_accuracy(m, images, labels) for m in (pruned, out))
    assert after > before + 0.05
    result = invoke("distill", MODEL, pruned, "--data", tmp_path / "images.npz", "-o", out, "--lr", 100, "--epochs", 1)
    assert result.exit_code == 1 and "No epoch did better on the samples that judge" in result.stderr


def _accuracy(path: Path, images: np.ndarray, labels: np.ndarray) -> float:
    from onnxopt.runtime import open_session

    with open_session(onnxopt.load(path), optimized=True) as session:
        (scores,) = session.run({"image": images}).values()
    return float((scores.argmax(axis=1) == labels).mean())


def test_no_model_is_overwritten(pruned: Path, invoke: Invoke) -> None:
    for out in (MODEL, pruned):
        result = invoke("distill", MODEL, pruned, "--data", MODELS / "mnist_calibration.npz", "-o", out)
        assert result.exit_code == 2 and "is the input itself" in result.stderr
