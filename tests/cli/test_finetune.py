from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import Result

import onnxopt
from onnxopt.training.reinitialize import reinitialize

MODELS = Path(__file__).parent.parent.parent / "models"
Invoke = Callable[..., Result]


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Return images and labels in one file."""
    images = np.load(MODELS / "mnist_calibration.npz")["image"][:120]
    labels = np.load(MODELS / "mnist_calibration_labels.npy")[:120]
    np.savez(tmp_path / "digits.npz", image=images, labels=labels)
    return tmp_path / "digits.npz"


def test_a_new_last_layer_is_learnt(tmp_path: Path, digits: Path, invoke: Invoke) -> None:
    model = reinitialize(onnxopt.load(MODELS / "mnist_cnn.onnx"), 0, train=["dense2*"])
    onnxopt.save(model, tmp_path / "new.onnx")
    out = tmp_path / "out.onnx"
    options = ("--train", "dense2*", "--lr", 0.02, "--epochs", 3)
    result = invoke("finetune", tmp_path / "new.onnx", "--data", digits, "-o", out, *options)
    assert result.exit_code == 0, result.output
    assert "Accuracy on samples not learnt from: before" in result.stdout and "Verified: " in result.stdout
    result = invoke(
        "finetune", out, "--data", digits, "-o", tmp_path / "b.onnx", "--train", "dense2*", "--epochs", 1, "--json"
    )
    told = json.loads(result.stdout)
    assert told["before"]["value"] > 0.5 and told["trained"] == ["dense2.weight", "dense2.bias"]


def test_batchnorm_stands_behind_layers_while_they_learn(tmp_path: Path, digits: Path, invoke: Invoke) -> None:
    model, out = tmp_path / "new.onnx", tmp_path / "out.onnx"
    onnxopt.save(reinitialize(onnxopt.load(MODELS / "mnist_cnn.onnx"), 0), model)
    options = ("--batchnorm", "restored", "--lr", 0.005, "--epochs", 4, "--json")
    result = invoke("finetune", model, "--data", digits, "-o", out, *options)
    told = json.loads(result.stdout)
    assert told["restored"] and told["after"]["value"] > told["before"]["value"] + 0.2
    before, after = onnx.load(model), onnx.load(out)
    assert before.graph.node == after.graph.node
    options = ("--batchnorm", "restored", "--batchnorm-behind", "nothing*")
    result = invoke("finetune", model, "--data", digits, "-o", tmp_path / "b.onnx", *options)
    assert result.exit_code == 2 and '--batchnorm-behind "nothing*" fits no weights' in result.stderr


def test_nothing_is_written_that_is_no_better(tmp_path: Path, digits: Path, invoke: Invoke) -> None:
    out = tmp_path / "out.onnx"
    labels = np.argmax(_scores(digits), axis=1)
    np.save(tmp_path / "own.npy", labels)
    options = ("--labels", tmp_path / "own.npy", "--lr", 10, "--epochs", 1, "--train", "dense2*")
    np.savez(tmp_path / "images.npz", image=np.load(digits)["image"])
    result = invoke("finetune", MODELS / "mnist_cnn.onnx", "--data", tmp_path / "images.npz", "-o", out, *options)
    assert result.exit_code == 1 and "No epoch did better" in result.stderr
    assert not out.exists()


def _scores(digits: Path) -> np.ndarray:
    from onnxopt.runtime import open_session

    with open_session(onnxopt.load(MODELS / "mnist_cnn.onnx"), optimized=True) as session:
        (scores,) = session.run({"image": np.load(digits)["image"]}).values()
    return np.asarray(scores)


def test_folds_judge(tmp_path: Path, digits: Path, invoke: Invoke) -> None:
    model = reinitialize(onnxopt.load(MODELS / "mnist_cnn.onnx"), 0, train=["dense2*"])
    onnxopt.save(model, tmp_path / "new.onnx")
    options = ("--train", "dense2*", "--lr", 0.02, "--epochs", 2, "--judging-folds", 2)
    result = invoke("finetune", tmp_path / "new.onnx", "--data", digits, "-o", tmp_path / "out.onnx", *options)
    assert result.exit_code == 0, result.output
    assert "120 samples" in result.stdout and "figures of 2 folds" in result.stdout


def test_a_gpu_that_is_not_there_is_refused(
    tmp_path: Path, digits: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = tmp_path / "out.onnx"
    result = invoke("finetune", MODELS / "mnist_cnn.onnx", "--data", digits, "-o", out, "--device", "cuda")
    assert result.exit_code == 2 and "--device cuda cannot be used: torch " in result.stderr
    assert not out.exists()


def test_bad_input(tmp_path: Path, digits: Path, invoke: Invoke) -> None:
    model = MODELS / "mnist_cnn.onnx"
    out = ("-o", tmp_path / "out.onnx")
    for args, message in (
        ((model, "--data", digits, "-o", model), "is the input itself"),
        ((model, "--data", tmp_path / "none.npz", *out), "There is no data"),
        ((model, "--data", digits, *out, "--labels", "classes"), '--labels "classes" is neither a file nor a key'),
        ((model, "--data", digits, *out, "--freeze", "nothing*"), '--freeze "nothing*" fits no parameter'),
        ((model, "--data", digits, *out, "--lr", "0"), "--learning-rate cannot be 0.0"),
    ):
        result = invoke("finetune", *args)
        assert result.exit_code == 2 and message in result.stderr, result.stderr
        assert not (tmp_path / "out.onnx").exists()
