"""How much memory does it take to load and run a model? Asked of a process that does only that.

The child is this module itself; what to run comes pickled through its standard input, from its parent alone.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx_ir as ir

from onnxopt import model as models
from onnxopt.feeds import Feed
from onnxopt.runtime import RunOptions, open_session

LARGEST_COPY = 1 << 30
"""Up to this many bytes a model without a file of its own is written to one; what is larger is not measured."""

_STATUS = Path("/proc/self/status")
_TIMEOUT_SECONDS = 300


def peak_mb(model: Path | ir.Model, feed: Feed, options: RunOptions) -> float | None:
    """Return how many megabytes (10**6 bytes) loading a model and running it once take at their peak.

    That is resident memory beyond what the interpreter and the runtime's library take, weights included.

    Args:
        model: A file, or a model, which is written to a temporary one.
        feed: What it is run on.
        options: Provider, threads and custom operators to run with.

    Returns:
        The figure; None where the system does not tell (all but Linux), the model is too large to be written, or
        the child failed.
    """
    if not _STATUS.exists():
        return None
    if isinstance(model, ir.Model):
        if models.model_bytes(model) > LARGEST_COPY:
            return None
        with tempfile.TemporaryDirectory(prefix="onnxopt-") as folder:
            path = Path(folder) / "model.onnx"
            models.save(model, path)
            return _ask_child(path, feed, options)
    return _ask_child(model, feed, options)


def _ask_child(path: Path, feed: Feed, options: RunOptions) -> float | None:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "onnxopt.timing.memory"],
            input=pickle.dumps((path.absolute(), feed, options)),
            capture_output=True,
            timeout=_TIMEOUT_SECONDS,
            check=True,
        )
        return float(done.stdout)
    except (subprocess.SubprocessError, OSError, ValueError):
        return None


def _kilobytes(field: str) -> int:
    """Return a field of the process's status: VmRSS is what it takes now, VmHWM what it took at most."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise ValueError(f"{_STATUS} has no {field}")


def _main() -> None:
    path, feed, options = pickle.load(sys.stdin.buffer)
    open_session(_smallest(), options, optimized=False).close()  # so that the runtime's library is loaded
    before = _kilobytes("VmRSS")
    with open_session(path, options, optimized=True) as session:
        session.run(feed)
    print((_kilobytes("VmHWM") - before) * 1024 / 1e6)


def _smallest() -> ir.Model:
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    node = ir.node("Identity", [value], name="identity")
    node.outputs[0].name = "y"
    node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
    return ir.Model(ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 17}), ir_version=8)


if __name__ == "__main__":
    _main()
