"""One sentence when a native library crashes: a kernel of ONNX Runtime that divides by zero ends the whole process.

Python cannot catch that: its handlers run between two instructions of the interpreter, and the kernel never returns
to it. So the handler is a C function that ctypes makes, which says what happened and ends the process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType

EXIT_CRASHED = 70

_SIGNALS = {
    "SIGFPE": "divided by zero",
    "SIGSEGV": "used memory that is not its own",
    "SIGBUS": "used memory that is not there",
    "SIGILL": "met an instruction that this processor lacks",
    "SIGABRT": "gave up",
}
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


def _say_and_end(number: int) -> None:
    name = signal.Signals(number).name
    os.write(2, f"\nError: {explain(name, sys._getframe())}\n".encode())
    os._exit(EXIT_CRASHED)


_SAY_AND_END = _HANDLER(_say_and_end)
"""Kept here, because C does not keep it alive."""


def explain(name: str, frame: FrameType | None) -> str:
    """Say in a sentence what crashed, and what to try.

    Args:
        name: Name of the signal.
        frame: Where the interpreter was.
    """
    files, functions = _callers(frame)
    did = f"{_SIGNALS[name]} ({name})"
    if not any("onnxruntime" in file for file in files):
        return f"A native library {did}, which ended the run; nothing was written. Please report it."
    if "generate_runnable" in functions:
        return (
            f"ONNX Runtime {did} running the model on inputs that were generated; nothing was written. Their sizes may "
            "not suit it: name some with --shape, or give real inputs with --data."
        )
    return (
        f"ONNX Runtime {did} running the model, which is a defect of its kernels; nothing was written. Try other "
        "inputs (--data, --shape) or another version of onnxruntime."
    )


def _callers(frame: FrameType | None) -> tuple[set[str], set[str]]:
    """Return the files and functions that are being executed."""
    files, functions = set(), set()
    while frame is not None:
        files.add(frame.f_code.co_filename)
        functions.add(frame.f_code.co_name)
        frame = frame.f_back
    return files, functions


def install() -> None:
    """Say one sentence and end with 70 when native code crashes; where there are no POSIX signals, do nothing."""
    if os.name != "posix":
        return
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, _HANDLER], ctypes.c_void_p
    for name in _SIGNALS:
        libc.signal(getattr(signal, name), _SAY_AND_END)
