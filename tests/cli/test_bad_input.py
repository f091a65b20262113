"""What cannot be used ends in one sentence and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import importlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import Result

Invoke = Callable[..., Result]
FAST = "--no-measure"


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def truncated(proto: onnx.ModelProto, path: Path) -> None:
    content = proto.SerializeToString()
    path.write_bytes(content[: len(content) // 2])


def wrong_magic(proto: onnx.ModelProto, path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + proto.SerializeToString())


def empty(proto: onnx.ModelProto, path: Path) -> None:
    path.touch()


def external(location: str, dims: tuple[int, ...] = (64, 64)) -> Callable[[onnx.ModelProto, Path], None]:
    """Return a maker of a model whose weight lies in another file."""

    def write(proto: onnx.ModelProto, path: Path) -> None:
        weight = proto.graph.initializer[0]
        weight.ClearField("raw_data")
        weight.dims[:] = dims
        weight.data_location = onnx.TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)
        path.write_bytes(proto.SerializeToString())

    return write


def absurd_dimensions(proto: onnx.ModelProto, path: Path) -> None:
    proto.graph.initializer[0].dims[:] = [1 << 40, 1 << 40]
    path.write_bytes(proto.SerializeToString())


def future_opset(proto: onnx.ModelProto, path: Path) -> None:
    proto.opset_import[0].version = 999
    path.write_bytes(proto.SerializeToString())


def no_outputs(proto: onnx.ModelProto, path: Path) -> None:
    del proto.graph.output[:]
    path.write_bytes(proto.SerializeToString())


def folder(proto: onnx.ModelProto, path: Path) -> None:
    path.mkdir()


def absent(proto: onnx.ModelProto, path: Path) -> None:
    pass


BAD = {
    "truncated": (truncated, "truncated"),
    "wrong magic": (wrong_magic, "PNG"),
    "empty": (empty, "empty"),
    "missing external data": (external("absent.data"), "absent.data"),
    "external data outside": (external("../outside.data"), "outside.data"),
    "absolute external data": (external("/etc/passwd"), "/etc/passwd"),
    "absurd external size": (external("absent.data", (1 << 40, 1 << 40)), "1099511627776"),
    "absurd dimensions": (absurd_dimensions, "1099511627776"),
    "future opset": (future_opset, "999"),
    "no outputs": (no_outputs, "no outputs"),
    "folder": (folder, "folder"),
    "absent": (absent, "does not exist"),
}
COMMANDS = {
    "optimize": ["-o", "OUT", "--report", "R.json", FAST],
    "quantize": ["--mode", "weights", "-o", "OUT", "--report", "R.json", FAST],
    "inspect": [],
    "explain": ["-p", "fold-constants"],
    "bench": [],
}


def check(done: Result, complaint: str, code: int = 2) -> None:
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ") and done.stderr.endswith(".\n") and done.stderr.count("\n") == 1
    assert complaint in done.stderr
    assert "Internal error" not in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", BAD)
def test_bad_models(
    invoke: Invoke,
    model_proto: onnx.ModelProto,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    command: str,
) -> None:
    make, complaint = BAD[kind]
    (tmp_path / "outside.data").write_bytes(b"\0" * 64 * 64 * 4)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    make(model_proto, work / "bad.onnx")
    before = names_in(work)
    check(invoke(command, "bad.onnx", *COMMANDS[command]), complaint)
    assert names_in(work) == before


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("first", [True, False])
def test_bad_models_in_verify(
    invoke: Invoke, model: Path, model_proto: onnx.ModelProto, tmp_path: Path, kind: str, first: bool
) -> None:
    make, complaint = BAD[kind]
    bad = tmp_path / "bad.onnx"
    make(model_proto, bad)
    check(invoke("verify", *((bad, model) if first else (model, bad))), complaint)


def test_an_unknown_operator_is_optimized_and_said_not_to_be_verified(
    invoke: Invoke, model: Path, model_proto: onnx.ModelProto, tmp_path: Path
) -> None:
    model_proto.graph.node[1].op_type = "Frobnicate"
    model.write_bytes(model_proto.SerializeToString())
    done = invoke("optimize", model, "-o", tmp_path / "o.onnx")
    assert done.exit_code == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "NOT VERIFIED and NOT MEASURED: ONNX Runtime cannot load the model: " in text
    assert text.count("cannot load the model") == 1
    assert [n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node] == ["Frobnicate"]
    check(invoke("verify", model, model), "Frobnicate")
    check(invoke("bench", model), "Frobnicate")
    assert "Frobnicate  1" in invoke("inspect", model).stdout


def test_zero_size_dimensions_are_fine(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "zero.onnx"
    onnx.save(
        onnx.parser.parse_model("""
            <ir_version: 8, opset_import: ["" : 17]>
            g (float[0, 8] x) => (float[0, 8] y) { a = Identity(x)  y = Relu(a) }
        """),
        path,
    )
    done = invoke("optimize", path, "-o", tmp_path / "o.onnx", FAST)
    assert done.exit_code == 0, done.stderr
    assert "verified" in done.stdout


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("absent/out.onnx", "absent"),
        (".", "folder"),
        ("/dev/full", "not a regular file"),
        ("model.onnx/out.onnx", "model.onnx"),
    ],
)
@pytest.mark.parametrize("option", ["-o", "--report"])
def test_targets_that_cannot_be_written_are_refused_before_the_run(
    invoke: Invoke, model: Path, monkeypatch: pytest.MonkeyPatch, target: str, complaint: str, option: str
) -> None:
    monkeypatch.chdir(model.parent)
    monkeypatch.setattr("onnxopt.model.load", lambda source: pytest.fail("the run began"))
    if option == "--report":
        target = target.replace("out.onnx", "out.json")
        complaint = complaint if target.endswith(".json") else "must end in .json or .html"
    check(invoke("optimize", "model.onnx", option, target, FAST), complaint)
    assert names_in(model.parent) == ["model.onnx"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_write_protected_folder_is_refused(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "protected"
    folder.mkdir(mode=0o555)
    check(invoke("optimize", model, "-o", folder / "o.onnx", FAST), "write-protected")


@pytest.mark.parametrize("what", ["model", "report"])
def test_a_full_disk_leaves_no_partial_file(tmp_path: Path, what: str) -> None:
    """The limit on the size of files stands for the disk that is full."""
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 128] x) => (float[1, 128] y) { a = Identity(x)  y = MatMul(a, w) }
    """)
    weight = np.random.default_rng(0).standard_normal((128, 128), np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(proto, tmp_path / "m.onnx")
    (tmp_path / "old.onnx").write_bytes(b"old")
    (tmp_path / "old.json").write_bytes(b"old")
    arguments = ["-o", "old.onnx"] if what == "model" else ["--report", "old.json"]
    limit = 20_000 if what == "model" else 500
    done = subprocess.run(
        [sys.executable, "-m", "onnxopt", "optimize", "m.onnx", FAST, "--no-verify", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == f"Error: {arguments[1]} cannot be written: File too large."
    assert names_in(tmp_path) == ["m.onnx", "old.json", "old.onnx"]
    assert (tmp_path / arguments[1]).read_bytes() == b"old"


@pytest.mark.parametrize("option", ["-o", "--patch"])
@pytest.mark.parametrize("name", ["data.npz", "weights.data"])
def test_what_is_no_model_is_not_overwritten_by_one(
    invoke: Invoke, model: Path, tmp_path: Path, option: str, name: str
) -> None:
    """Data given as the output by mistake would be lost."""
    precious = tmp_path / name
    precious.write_bytes(b"PK\x03\x04 samples" if name == "data.npz" else np.ones(4, np.float32).tobytes())
    content = precious.read_bytes()
    check(
        invoke("optimize", model, option, precious, FAST),
        "exists and is no ONNX model; give another name, or remove it",
    )
    assert precious.read_bytes() == content


def test_a_model_without_the_usual_suffix_may_be_overwritten(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    for _ in range(2):
        done = invoke("optimize", model, "-o", tmp_path / "model.bin", FAST, "--no-verify")
        assert done.exit_code == 0, done.stderr


def test_too_long_names_are_one_sentence(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    name = "a" * 300 + ".onnx"
    check(invoke("optimize", model, "-o", tmp_path / name, FAST), "cannot be written: File name too long.")
    check(invoke("optimize", tmp_path / name, "-o", tmp_path / "o.onnx", FAST), "cannot be read: File name too long.")


@pytest.mark.parametrize(
    "command",
    [
        ("extract", "--block", "0"),
        ("merge-trunk", "MODEL"),
        ("graft", "MODEL", "--replace", "block:0", "--with", "block:0"),
        ("transfer", "MODEL"),
    ],
)
def test_commands_without_in_place_do_not_advise_it(invoke: Invoke, model: Path, command: tuple[str, ...]) -> None:
    name, *rest = command
    arguments = [model if a == "MODEL" else a for a in rest]
    check(invoke(name, model, *arguments, "-o", model), "is the input itself; give another name.")


def test_where_the_state_goes_is_checked_before_the_search(
    invoke: Invoke, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importlib.import_module("onnxopt.optimize")
    monkeypatch.setattr(sys.modules["onnxopt.optimize"], "optimize", lambda *_, **__: pytest.fail("the search began"))
    state = tmp_path / "nowhere" / "state.json"
    check(invoke("optimize", model, "--max-error", "1%", "--state", state), "there is no folder")


def test_a_missing_custom_op_library_is_refused(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    done = invoke("optimize", model, "--custom-ops", tmp_path / "no.so", FAST)
    assert done.exit_code == 2
    assert "no.so' does not exist." in done.stderr


def test_an_input_without_data_is_named_with_what_to_add(
    invoke: Invoke, model: Path, model_proto: onnx.ModelProto, tmp_path: Path
) -> None:
    model_proto.graph.input.append(onnx.helper.make_tensor_value_info("rate", onnx.TensorProto.INT64, []))
    onnx.save(model_proto, model)
    data = tmp_path / "d.npz"
    np.savez(data, x=np.zeros((3, 64), np.float32))
    complaint = 'no array for the input "rate" (int64 []); add one under the key "rate"'
    check(invoke("verify", model, model, "--data", data), complaint)
    np.savez(data, x=np.zeros((3, 64), np.float32), rate=np.int64(16000))
    assert invoke("verify", model, model, "--data", data).exit_code == 0
