"""Ctrl-C in the middle of a run: exit code 130, a sentence, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


def interrupt(
    work: Path, plugin: Path, arguments: list[str], setup: str = "", number: int = signal.SIGINT
) -> subprocess.CompletedProcess[str]:
    """Start onnxopt, wait until the file `started` is there, and send it a signal."""
    temporary = work / "temporary"
    temporary.mkdir()
    path = os.pathsep.join(filter(None, (str(plugin), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-c", setup + START, *arguments],
        cwd=work,
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (work / "started").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        out, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert set(names_in(temporary)) <= {".ses"}  # ONNX Runtime's own
    shutil.rmtree(temporary)
    (work / "started").unlink()
    return subprocess.CompletedProcess(arguments, process.returncode, out, error)


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


def test_a_pass_of_another_package_is_listed(plugin: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "onnxopt", "passes"],
        env={**os.environ, "PYTHONPATH": str(plugin)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "From other packages\n  sleep " in done.stdout
