"""inspect, explain, verify and bench on models that are fine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import Result

from onnxopt.registry import BUILTIN

Invoke = Callable[..., Result]


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def doubled(model: Path, model_proto: onnx.ModelProto) -> Path:
    """Return a model that computes twice as much."""
    weight = model_proto.graph.initializer[0]
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 2, "w"))
    path = model.with_name("doubled.onnx")
    onnx.save(model_proto, path)
    return path


def test_inspect(invoke: Invoke, model: Path) -> None:
    done = invoke("inspect", model, "--shape", "batch=3")
    assert done.exit_code == 0, done.stderr
    text = flat(done.stdout)
    for expected in (
        "model.onnx size 2 nodes, 4,096 parameters,",
        "opsets ai.onnx 17",
        "Inputs x float32[batch, 64]",
        "Dynamic axes batch x:0, y:0",
        "Operators Identity 1, MatMul 1",
        "float32 16.4 kB in 1 constant, 4,096 elements",
        "multiply-accumulates 12.3 thousand (MatMul 100%)",
        "with batch=3",
        "remove-identities 1 edit",
        "nothing to do fold-constants, ",
        "prune-weights needs exactly one of",
    ):
        assert expected in text


def test_inspect_names_every_pass(invoke: Invoke, model: Path) -> None:
    content = json.loads(invoke("inspect", model, "--json").stdout)
    assert [p["name"] for p in content["passes"]][: len(BUILTIN)] == list(BUILTIN)
    assert next(p for p in content["passes"] if p["name"] == "remove-identities")["edits"] == 1


def test_inspect_without_passes(invoke: Invoke, model: Path) -> None:
    assert "passes would do" not in invoke("inspect", model, "--no-passes").stdout
    assert json.loads(invoke("inspect", model, "--no-passes", "--json").stdout)["passes"] == []


def test_inspect_does_not_trust_names(invoke: Invoke, model: Path, model_proto: onnx.ModelProto) -> None:
    evil = "[bold]\x1b[2J\n"
    model_proto.graph.input[0].name = evil
    model_proto.graph.node[0].input[0] = evil
    model_proto.metadata_props.add(key=evil, value=evil)
    model_proto.producer_name = evil
    onnx.save(model_proto, model)
    text = invoke("inspect", model).stdout
    assert "\x1b" not in text
    assert r"[bold]\x1b[2J\n" in text


def test_explain_lists_edits_and_near_misses(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(
        onnx.parser.parse_model("""
            <ir_version: 8, opset_import: ["" : 17]>
            g (float[2] x) => (float[2] y, float[2] z) { a = Identity(x)  y = Relu(a)  z = Identity(x) }
        """),
        path,
    )
    done = invoke("explain", path, "-p", "remove-identities,quantize-weights")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["remove-identities", "  1 edit", "    a"]
    assert "in a recipe, passes before them may leave them more to do." in flat(done.stdout)
    assert "  1 near miss" in lines and lines[lines.index("  1 near miss") + 1] == "    z"
    content = json.loads(invoke("explain", path, "-p", "remove-identities", "--json").stdout)
    (only,) = content["passes"]
    assert only["edits"][0]["site"] == {"pass_name": "remove-identities", "graph": "", "output": "a"}
    assert only["refusals"][0]["site"]["output"] == "z"
    assert only["refusals"][0]["reason"]


def test_explain_needs_passes(invoke: Invoke, model: Path) -> None:
    done = invoke("explain", model)
    assert done.exit_code == 2
    assert "--passes" in done.stderr


def test_verify_equal_models(invoke: Invoke, model: Path) -> None:
    done = invoke("verify", model, model)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("Verified: outputs are equal.\n")
    assert "over 3 sets of generated inputs (seed 0)" in flat(done.stdout)


def test_verify_different_models(invoke: Invoke, model: Path, doubled: Path) -> None:
    done = invoke("verify", model, doubled)
    assert done.exit_code == 1
    assert done.stdout.startswith("Differs: ")
    assert "y: first difference at [" in done.stdout
    assert done.stderr == ""


def test_verify_with_a_budget(invoke: Invoke, model: Path, doubled: Path) -> None:
    assert invoke("verify", model, doubled, "--max-error", "inf").exit_code == 0
    assert invoke("verify", model, doubled, "--max-error", "1%").exit_code == 1


def test_verify_as_json(invoke: Invoke, model: Path, doubled: Path) -> None:
    done = invoke("verify", model, doubled, "--json")
    content = json.loads(done.stdout)
    assert done.exit_code == 1
    assert content["ok"] is False and content["outputs"][0]["name"] == "y"


def test_verify_on_given_data(invoke: Invoke, model: Path, doubled: Path, tmp_path: Path) -> None:
    """On zeros the two models compute the same."""
    np.savez(tmp_path / "zeros.npz", x=np.zeros((2, 64), np.float32))
    done = invoke("verify", model, doubled, "--data", tmp_path / "zeros.npz")
    assert done.exit_code == 0, done.output
    assert "zeros.npz" in done.stdout


def test_verify_a_model_and_its_form_with_fixed_axes(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    """Samples are taken in the size that both take."""
    fixed = tmp_path / "fixed.onnx"
    invoke("optimize", model, "--fix-shape", "batch=2", "--no-measure", "-o", fixed)
    np.savez(tmp_path / "samples.npz", x=np.ones((6, 64), np.float32))
    for given in ([], ["--data", tmp_path / "samples.npz"]):
        done = invoke("verify", model, fixed, *given)
        assert done.exit_code == 0, done.output
        assert done.stdout.startswith("Verified for the shapes that both take: ")
        assert 'the input "x" of the first is [batch, 64] and was fixed to [2, 64].' in flat(done.stdout)
        assert invoke("bench", model, fixed, "--seconds", "0.05", *given).exit_code == 0


def test_verify_models_of_different_interface(invoke: Invoke, model: Path, model_proto: onnx.ModelProto) -> None:
    model_proto.graph.output[0].name = "other"
    model_proto.graph.node[1].output[0] = "other"
    other = model.with_name("other.onnx")
    onnx.save(model_proto, other)
    done = invoke("verify", model, other)
    assert done.exit_code == 1
    assert done.stdout.startswith("Differs: ") and done.stdout.endswith(".\n")


def test_bench_one_model(invoke: Invoke, model: Path) -> None:
    done = invoke("bench", model, "--seconds", "0.05", "--threads", 2)
    assert done.exit_code == 0, done.stderr
    assert "ms per run" in done.stdout
    assert "cpu, 2 threads on " in done.stdout


def test_bench_two_models(invoke: Invoke, model: Path, doubled: Path) -> None:
    done = invoke("bench", model, doubled, "--seconds", "0.1", "--json")
    assert done.exit_code == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["low"] <= content["ratio"] <= content["high"]
    assert content["placement"]


def test_bench_two_models_in_words(invoke: Invoke, model: Path, doubled: Path) -> None:
    done = invoke("bench", model, doubled, "--seconds", "0.1")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("B against A: ")
    assert "Latency" in done.stdout and "Load time" in done.stdout


def test_bench_on_given_data(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "wrong.npz", nonesuch=np.zeros((2, 64), np.float32))
    done = invoke("bench", model, "--data", tmp_path / "wrong.npz")
    assert done.exit_code == 2
    assert "nonesuch" in done.stderr or '"x"' in done.stderr


def test_inspect_refuses_sizes_of_unknown_axes(invoke: Invoke, model: Path) -> None:
    done = invoke("inspect", model, "--shape", "bach=3", "--no-passes")
    assert done.exit_code == 2
    assert 'no dynamic axis "bach". Did you mean "batch"? It has batch.' in done.stderr


def test_sizes_of_nameless_axes_can_be_given_as_inspect_shows_them(
    invoke: Invoke, tmp_path: Path, model_proto: onnx.ModelProto
) -> None:
    model_proto.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    onnx.save(model_proto, tmp_path / "m.onnx")
    assert "with x:0=1" in flat(invoke("inspect", tmp_path / "m.onnx", "--no-passes").stdout)
    assert "with x:0=7" in flat(invoke("inspect", tmp_path / "m.onnx", "--no-passes", "--shape", "x:0=7").stdout)


@pytest.mark.parametrize(("command", "shown"), [("bench", "A [B]"), ("transfer", "SRC [DST]"), ("verify", "A B")])
def test_usage_shows_which_models_may_be_left_out(invoke: Invoke, command: str, shown: str) -> None:
    assert f"{command} [OPTIONS] {shown}\n" in invoke(command, "--help").stdout
