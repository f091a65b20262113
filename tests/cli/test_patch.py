from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from click.testing import Result

MODELS = Path(__file__).parent.parent.parent / "models"
Invoke = Callable[..., Result]


def test_the_command_line_writes_and_replays(tmp_path: Path, invoke: Invoke) -> None:
    model = str(MODELS / "mnist_cnn_bn.onnx")
    out, patch, again = (str(tmp_path / n) for n in ("out.onnx", "out.patch", "again.onnx"))
    first = invoke("optimize", model, "-o", out, "--patch", patch, "--no-measure")
    assert first.exit_code == 0, first.output
    assert f"Patch in {patch}" in first.output
    second = invoke("optimize", model, "-o", again, "--replay", patch, "--no-measure")
    assert second.exit_code == 0, second.output
    assert "37 -> 12 nodes" in second.output and "nothing to change" not in second.output
    assert "which holds the result of the recipe lossless." in " ".join(second.output.split())
    assert "verified" in second.output
    assert Path(out).read_bytes() == Path(again).read_bytes()


def test_a_replay_says_why_it_lists_no_removed_groups(tmp_path: Path, invoke: Invoke) -> None:
    model, patch = str(MODELS / "mnist_cnn.onnx"), str(tmp_path / "p")
    passes = ("--passes", "prune-channels{ratio=0.5,repair=false}", "--max-error", "inf")
    assert invoke("optimize", model, *passes, "--patch", patch, "--no-measure").exit_code == 0
    result = invoke("optimize", model, "--replay", patch, "--no-measure", "--max-error", "inf")
    assert result.exit_code == 0, result.output
    told = "which groups were removed stands in the report of that run."
    assert told in " ".join(result.output.split())
    assert invoke("optimize", model, "--patch", patch, "--no-measure").exit_code == 0
    lossless = invoke("optimize", model, "--replay", patch, "--no-measure")
    assert lossless.exit_code == 0, lossless.output
    assert told not in " ".join(lossless.output.split())


def test_the_command_line_refuses_a_replay_with_passes(tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("optimize", str(MODELS / "mnist_cnn.onnx"), "--replay", "x", "--passes", "fuse-gelu")
    assert result.exit_code == 2
    assert "--replay makes what the patch holds; leave out --passes." in result.output


def test_a_patch_does_not_overwrite_the_model(invoke: Invoke) -> None:
    model = str(MODELS / "mnist_cnn.onnx")
    result = invoke("optimize", model, "--patch", model)
    assert result.exit_code == 2
    assert "would overwrite the model" in result.output


def test_a_replay_with_another_model_is_one_sentence(tmp_path: Path, invoke: Invoke) -> None:
    patch = str(tmp_path / "p")
    assert invoke("optimize", str(MODELS / "mnist_cnn.onnx"), "--patch", patch, "--no-measure").exit_code == 0
    result = invoke("optimize", str(MODELS / "mnist_cnn_bn.onnx"), "--replay", patch, "--no-measure")
    assert result.exit_code == 2
    assert "was made for another model" in result.output
