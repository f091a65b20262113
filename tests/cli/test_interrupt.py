"""Ctrl-C in the middle of a run: exit code 130, a sentence, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxopt

PASS = '''
import dataclasses, pathlib, time
from onnxopt import Edit, GraphPass, Guarantee, Site

@dataclasses.dataclass(frozen=True, kw_only=True)
class Sleep(GraphPass):
    """Sleep instead of working."""
    name = "sleep"
    guarantee = Guarantee.EXACT

    def run(self, model, ctx):
        pathlib.Path("started").touch()
        time.sleep(60)
        yield Edit(Site("sleep", "", "y"), "slept", lambda: None)
'''

# A shell starts background jobs with SIGINT ignored, and children inherit that.
START = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from onnxopt.cli import main
main()
"""

SLOW_REPORT = """
import pathlib, time
import onnxopt.report.json
def slow(report):
    pathlib.Path("started").touch()
    time.sleep(60)
onnxopt.report.json.to_json = slow
"""


SLOW_WRITE = """
import pathlib, time
import onnxopt.model as models
def slow(piece, target):
    import os
    os.write(target, b"half")
    pathlib.Path("started").touch()
    time.sleep(60)
models.write_piece = slow
"""

# Renamed is the data alone, so that the model does not refer to it yet.
SLOW_RENAME = """
import pathlib, time
rename = pathlib.Path.replace
def slow(self, target):
    found = rename(self, target)
    pathlib.Path("started").touch()
    time.sleep(SECONDS)
    return found
pathlib.Path.replace = slow
"""

SLOW_SEARCH = """
import pathlib, time
import onnxopt.ground
import onnxopt.search.lab as lab
from onnxopt.measure import measure
def short(*models, **options):
    return measure(*models, **(options | {"budget_seconds": 0.1, "memory": False}))
onnxopt.ground.measure_models = lab.measure = short
examine = lab.RuntimeLab.examine
def slow(self, proposal, spared):
    if pathlib.Path("known").exists():
        pathlib.Path("started").touch()
        time.sleep(60)
    pathlib.Path("known").touch()
    return examine(self, proposal, spared)
if WAITING:
    lab.RuntimeLab.examine = slow
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """Return a folder with an installed package that registers the pass `sleep`."""
    folder = tmp_path / "site"
    info = folder / "sleeper-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "sleeper.py").write_text(PASS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sleeper\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[onnxopt.passes]\nsleep = sleeper:Sleep\n")
    return folder


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def begin(work: Path, arguments: list[str], setup: str = "", **environment: str) -> subprocess.Popen[str]:
    """Start onnxopt in a process group of its own, as a shell does."""
    return subprocess.Popen(
        [sys.executable, "-c", setup + START, *arguments],
        cwd=work,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen[str], file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def interrupt(
    work: Path, plugin: Path, arguments: list[str], setup: str = "", number: int = signal.SIGINT
) -> subprocess.CompletedProcess[str]:
    """Start onnxopt, wait until the file `started` is there, and send it and its children a signal."""
    temporary = work / "temporary"
    temporary.mkdir()
    path = os.pathsep.join(filter(None, (str(plugin), os.environ.get("PYTHONPATH"))))
    process = begin(work, arguments, setup, PYTHONPATH=path, TMPDIR=str(temporary))
    try:
        wait_for(process, work / "started")
        os.killpg(process.pid, number)
        out, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert set(names_in(temporary)) <= {".ses"}  # ONNX Runtime's own
    shutil.rmtree(temporary)
    (work / "started").unlink()
    # a machine with much else to do is slow enough for lines of progress
    return subprocess.CompletedProcess(arguments, process.returncode, out, re.sub(r"(?m)^\[\d+ s\] .*\n", "", error))


def test_ctrl_c_in_a_pass(model: Path, plugin: Path) -> None:
    work = model.parent
    (work / "out.onnx").write_bytes(b"old")
    done = interrupt(work, plugin, ["optimize", "model.onnx", "-o", "out.onnx", "-p", "sleep", "--report", "r.json"])
    assert done.returncode == 130
    assert done.stdout == ""
    assert done.stderr == "\nInterrupted; nothing was written.\n"
    assert names_in(work) == ["model.onnx", "out.onnx"]
    assert (work / "out.onnx").read_bytes() == b"old"


def test_an_end_from_outside_leaves_nothing_behind(model: Path, plugin: Path) -> None:
    work = model.parent
    arguments = ["optimize", "model.onnx", "-o", "out.onnx", "-p", "sleep"]
    done = interrupt(work, plugin, arguments, number=signal.SIGTERM)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, "", "")
    assert names_in(work) == ["model.onnx"]


def test_ctrl_c_after_the_model_was_written_says_so(model: Path, plugin: Path) -> None:
    work = model.parent
    arguments = ["optimize", "model.onnx", "-o", "out.onnx", "--no-measure", "--report", "r.json"]
    done = interrupt(work, plugin, arguments, setup=SLOW_REPORT)
    assert done.returncode == 130
    assert done.stderr == "\nInterrupted; out.onnx had been written.\n"
    assert names_in(work) == ["model.onnx", "out.onnx"]


@pytest.mark.parametrize("setup", [SLOW_WRITE, SLOW_RENAME.replace("SECONDS", "60")], ids=["writing", "renaming"])
def test_ctrl_c_while_the_model_is_saved_leaves_what_was_there(
    model: Path, model_proto: onnx.ModelProto, plugin: Path, setup: str
) -> None:
    """Also where the weights lie in a file of their own, which is there before the model refers to it."""
    work = model.parent
    onnx.save(model_proto, model, save_as_external_data=True, location="weights", size_threshold=0)
    (work / "out.onnx").write_bytes(onnx.ModelProto(ir_version=8).SerializeToString())
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    done = interrupt(work, plugin, ["optimize", "model.onnx", "-o", "out.onnx", "--no-measure"], setup=setup)
    assert done.returncode == 130
    assert done.stderr == "\nInterrupted; nothing was written.\n"
    assert {path.name: path.read_bytes() for path in work.iterdir()} == before


def test_ctrl_c_in_a_search_keeps_what_it_has_found_out(model: Path, plugin: Path) -> None:
    work = model.parent
    arguments = ["optimize", "model.onnx", "-o", "out.onnx", "--max-error", "10%"]
    done = interrupt(work, plugin, arguments, setup=SLOW_SEARCH.replace("WAITING", "True"))
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == (
        "\nInterrupted; nothing was written. What the search has found out is kept in out.onnx.search.json; the same "
        "command goes on from there.\n"
    )
    assert names_in(work) == ["known", "model.onnx", "out.onnx.search.json"]
    assert len(json.loads((work / "out.onnx.search.json").read_text())["records"]) == 1
    process = begin(work, arguments, SLOW_SEARCH.replace("WAITING", "False"))
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "1 candidate known from before the interruption." in out
    assert names_in(work) == ["known", "model.onnx", "out.onnx"]


def test_two_runs_with_one_output_end_with_the_whole_result_of_one(
    model: Path, model_proto: onnx.ModelProto, tmp_path: Path
) -> None:
    """The first has put its data in place, but not yet its model, when the second comes to save."""
    work = model.parent
    for name, factor in (("model.onnx", 1.0), ("other.onnx", 2.0), ("out.onnx", 3.0)):
        (weight,) = model_proto.graph.initializer
        weight.CopyFrom(onnx.numpy_helper.from_array(np.full((64, 64), factor, np.float32), weight.name))
        onnx.save(onnx.ModelProto.FromString(model_proto.SerializeToString()), tmp_path / name)
        onnxopt.save(onnxopt.load(tmp_path / name), work / name, external_data=True)
    fast = ["-o", "out.onnx", "--no-measure", "--no-verify"]
    first = begin(work, ["optimize", "model.onnx", *fast], SLOW_RENAME.replace("SECONDS", "4"))
    wait_for(first, work / "started")
    second = begin(work, ["optimize", "other.onnx", *fast])
    for process in (first, second):
        _, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
    (weights,) = (t for t in onnx.load(work / "out.onnx").graph.initializer)
    assert (onnx.numpy_helper.to_array(weights) == 2).all()
    assert len([name for name in names_in(work) if name.startswith("out.onnx.")]) == 1
    assert not [name for name in names_in(work) if name.endswith(".tmp")]


def test_a_pass_of_another_package_is_listed(plugin: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "onnxopt", "passes"],
        env={**os.environ, "PYTHONPATH": str(plugin)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "From other packages\n  sleep " in done.stdout
