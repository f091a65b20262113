"""ONNX Runtime itself: the only module that imports it.

Whatever it has to say when it fails becomes a `RuntimeFailure` with one sentence.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from onnxopt.errors import RuntimeFailure
from onnxopt.graph import all_nodes
from onnxopt.session import diagnosis, providers
from onnxopt.session.providers import CPU


def library() -> Any:
    """Import ONNX Runtime.

    Raises:
        RuntimeFailure: If it is not installed or its libraries do not load.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise RuntimeFailure(
            'ONNX Runtime is not installed; pip install "onnxopt[cpu]" (or "onnxopt[gpu]").'
        ) from error
    except ImportError as error:
        raise RuntimeFailure(f"ONNX Runtime is installed but cannot be imported: {error}") from error
    # Official builds may collect events, which they keep in files in the temporary folder.
    if hasattr(onnxruntime, "disable_telemetry_events"):
        onnxruntime.disable_telemetry_events()
    return onnxruntime


@functools.cache
def _failures() -> tuple[type[Exception], ...]:
    """Return the exceptions that ONNX Runtime raises; its own have no common base."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [c for c in vars(state).values() if isinstance(c, type) and issubclass(c, Exception)]
    return (*own, RuntimeError, ValueError)


@contextlib.contextmanager
def failing(what: str, model: ir.Model | None = None, provider: str = CPU) -> Iterator[None]:
    """Turn an error of ONNX Runtime into a `RuntimeFailure` that begins with `what`."""
    try:
        yield
    except _failures() as error:
        said = _kernel_failure(str(error), model, provider) or diagnosis.sentence(str(error))
        raise RuntimeFailure(f"{what}: {said}") from error


def _kernel_failure(message: str, model: ir.Model | None, provider: str) -> str | None:
    """Return the sentence for an operator without a kernel, with what the model knows about its node."""
    found = diagnosis.missing_kernel(message)
    if found is None:
        return None
    op, version, name = found
    node = None
    if model is not None:
        nodes = [n for n in all_nodes(model) if n.op_type == op.rpartition(".")[2].rpartition(":")[2]]
        named = [n for n in nodes if n.name == name] if name else nodes
        node = named[0] if len(named) == 1 else None
    domain = f" of the domain {node.domain}" if node is not None and node.domain else ""
    types = sorted({v.dtype.name.lower() for v in node.inputs if v is not None and v.dtype}) if node else []
    given = f", inputs {' and '.join(types)}" if types else ""
    where = f' of the node "{name}"' if name else ""
    on = f"on the provider {providers.short(provider)}"
    return f"there is no kernel {on} for {op}{domain} (version {version}{given}){where}."
