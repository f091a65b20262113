"""A crash of native code ends with one sentence and an exit code, not with silence."""

from __future__ import annotations

import subprocess
import sys
from types import FrameType

import pytest

from onnxopt.cli.crash import explain

CRASH = """
import os, signal
from onnxopt.cli import crash
crash.install()
os.kill(os.getpid(), signal.{signal})
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no POSIX signals")


@pytest.mark.parametrize("signal", ["SIGFPE", "SIGSEGV", "SIGBUS", "SIGILL", "SIGABRT"])
def test_a_crash_is_one_sentence(signal: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CRASH.format(signal=signal)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 70
    assert done.stderr.startswith("\nError: A native library ")
    assert f"({signal})" in done.stderr
    assert done.stderr.count("\n") == 2


def frame(function: str, file: str) -> FrameType:
    """Return the frame of a function of this name in a file of this name, called from here."""
    scope: dict[str, object] = {"sys": sys}
    exec(compile(f"import sys\ndef {function}(): return sys._getframe()\nframe = {function}()", file, "exec"), scope)
    found = scope["frame"]
    assert isinstance(found, FrameType)
    return found


def test_generated_inputs_can_be_replaced() -> None:
    assert explain("SIGFPE", frame("generate_runnable", "onnxruntime/session.py")) == (
        "ONNX Runtime divided by zero (SIGFPE) running the model on inputs that were generated; nothing was written. "
        "Their sizes may not suit it: name some with --shape, or give real inputs with --data."
    )


def test_given_inputs_are_not_called_generated() -> None:
    said = explain("SIGSEGV", frame("run", "onnxruntime/session.py"))
    assert said.startswith("ONNX Runtime used memory that is not its own (SIGSEGV) running the model,")
    assert "generated" not in said
