from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import Result

MODELS = Path(__file__).parent.parent.parent / "models"
Invoke = Callable[..., Result]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return 120 images labelled by whether the digit is even, and a further 80 under more.npz."""
    images = np.load(MODELS / "mnist_test.npz")["image"][:200]
    labels = np.array(["even", "odd"])[np.load(MODELS / "mnist_test_labels.npy")[:200] % 2]
    np.savez(tmp_path / "data.npz", image=images[:120], labels=labels[:120])
    np.savez(tmp_path / "more.npz", image=images[120:], labels=labels[120:])
    return tmp_path / "data.npz"


def test_a_digit_classifier_tells_even_from_odd(tmp_path: Path, data: Path, invoke: Invoke) -> None:
    out, page, table = tmp_path / "even.onnx", tmp_path / "r.html", tmp_path / "r.json"
    done = invoke(
        "head", MODELS / "mnist_cnn.onnx", "--classes", 2, "--data", data, "--test", tmp_path / "more.npz",
        "--method", "ridge", "-o", out, "--report", page, "--report", table,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    for part in ("2 classes, ", "in the place of Gemm", "even (60), odd (60)", "per class", f"Written to {out}."):
        assert part in done.output
    report = json.loads(table.read_text())
    assert report["test_accuracy"]["right"] > 70
    assert report["output"] == str(out)
    html = page.read_text()
    assert "<svg" in html
    assert "labelled samples per class" in html
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    with np.load(tmp_path / "more.npz") as more:
        scores = session.run(["logits"], {"image": more["image"]})[0]
        right = np.array(["even", "odd"])[scores.argmax(axis=1)] == more["labels"]
    assert right.sum() == report["test_accuracy"]["right"]
    onnx.checker.check_model(onnx.load(out), full_check=True)
    assert {p.key: p.value for p in onnx.load(out).metadata_props}["onnxopt.classes"] == '["even", "odd"]'


def test_moved_images_are_one_more_way_to_fit(tmp_path: Path, data: Path, invoke: Invoke) -> None:
    out, few = tmp_path / "even.onnx", tmp_path / "few.npz"
    with np.load(data) as full:
        np.savez(few, image=full["image"][:30], labels=full["labels"][:30])
    done = invoke(
        "head", MODELS / "mnist_cnn.onnx", "--data", few, "--method", "ridge", "--shift", 2, "--no-curve", "-o", out
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "ridge with moved images" in done.output
    assert out.exists()


def test_errors_are_one_sentence(tmp_path: Path, data: Path, invoke: Invoke) -> None:
    model = MODELS / "mnist_cnn.onnx"
    done = invoke("head", model, "--data", data, "--classes", 7, "-o", tmp_path / "o.onnx")
    assert done.exit_code == 2
    assert done.output.splitlines()[-1] == (
        f'Error: The key "labels" of {data} holds 2 classes (even, odd), but --classes is 7.'
    )
    assert not (tmp_path / "o.onnx").exists()
    done = invoke("head", model, "--data", data, "-o", model)
    assert done.exit_code == 2
    assert "use --in-place" in done.output
    done = invoke("head", model, "--data", data, "--labels", tmp_path / "none.npy")
    assert done.exit_code == 2
    assert "There is no file of labels" in done.output
