from __future__ import annotations

import json
import typing
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import onnx
import pytest
from click.testing import Result

from onnxopt import cli
from onnxopt.quantize import MODES, Scheme

Invoke = Callable[..., Result]
FAST = "--no-measure"


def names_in(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return the path of a model with two weights, alone in its folder."""
    folder = tmp_path / "models"
    folder.mkdir()
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[batch, 64] x) => (float[batch, 64] y) { [first] a = MatMul(x, w)  b = Relu(a)  [last] y = MatMul(b, v) }
    """)
    rng = np.random.default_rng(0)
    for name in ("w", "v"):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal((64, 64), np.float32), name))
    path = folder / "model.onnx"
    onnx.save(proto, path)
    return path


def test_the_main_job(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out.onnx", tmp_path / "r.json"
    done = invoke("quantize", model, "-o", out, "--mode", "weights", "--report", data, FAST)
    assert done.exit_code == 0, done.stderr
    assert "verified (worst deviation" in done.stdout
    assert f"Written to {out}." in done.stdout.replace("\n", "")
    assert {i.name for i in onnx.load(out).graph.initializer} >= {"w_int8", "v_int8"}
    assert json.loads(data.read_text())["recipe"] == "quantize weights"


def test_exclude(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    done = invoke("quantize", model, "-o", out, "--mode", "weights", "--exclude", "first", FAST)
    assert done.exit_code == 0, done.stderr
    assert {"w", "v_int8"} <= {i.name for i in onnx.load(out).graph.initializer}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "--mode"),
        (["--mode", "int8"], "'weights'"),
        (["--mode", "weights", "--bits", "3"], "'4'"),
        (
            ["--mode", "float16", "--bits", "4"],
            "--bits is for --mode weights or matmul; leave it out with --mode float16.",
        ),
        (["--mode", "weights", "--smooth"], "--smooth is for --mode dynamic"),
        (["--mode", "weights", "--block", "0"], "x>=1"),
        (["--mode", "weights", "--exclude", "frist"], 'called "frist". Near it are: first, '),
        (["--mode", "weights", "--max-drop", "1%"], "needs real inputs"),
        (["--mode", "weights", "--in-place", "-o", "x.onnx"], "not both"),
    ],
)
def test_bad_options_are_told_in_a_sentence(
    invoke: Invoke,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("quantize", model, *arguments, FAST)
    assert done.exit_code == 2, done.output
    assert complaint in done.stderr
    assert "Traceback" not in done.output and "Internal error" not in done.output
    assert names_in(tmp_path) == {"models"}


def test_nothing_quantized_is_a_failure(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    done = invoke("quantize", model, "-o", out, "--mode", "weights", "--only", "b", FAST)
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: Nothing was quantized: quantize-weights: 2 near misses, because ")
    assert not out.exists()


def test_the_options_are_those_of_the_scheme() -> None:
    """Help must not import numpy, so the choices are written out a second time."""
    command = cli.cli.get_command(click.Context(cli.cli), "quantize")
    assert command is not None
    choices = {
        o.name: tuple(o.type.choices)
        for o in command.params
        if isinstance(o, click.Option) and isinstance(o.type, click.Choice)
    }
    assert choices["mode"] == MODES
    for name, wanted in typing.get_type_hints(Scheme).items():
        inner = [t for t in typing.get_args(wanted) if typing.get_origin(t) is typing.Literal]
        if name != "mode" and inner:
            assert choices[name] == typing.get_args(inner[0])


def test_what_keeps_a_mode_from_running_is_told_before_passes_run(
    model: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxopt.manager.run", lambda *_, **__: pytest.fail("passes were run"))
    done = invoke("quantize", model, "--mode", "static")
    assert done.exit_code == 1
    assert "Nothing was quantized: quantize-static: it needs real inputs" in done.stderr
