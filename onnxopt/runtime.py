"""The only place that opens ONNX Runtime sessions."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.errors import RuntimeFailure, UsageError
from onnxopt.session import fallback, handover, ort, ortvalues, providers
from onnxopt.session.loaded import Session
from onnxopt.session.providers import CPU


@dataclasses.dataclass(frozen=True, slots=True)
class RunOptions:
    """How models are run.

    Attributes:
        provider: Execution provider, by a short name such as "cpu" or "cuda", or by ONNX Runtime's own.
        threads: Threads within an operator; operators run one after the other.
        custom_ops: Shared libraries with custom operators.
        allow_fallback: Accept that ONNX Runtime runs the model, or some of its nodes, on another provider.
    """

    provider: str = "cpu"
    threads: int = 1
    custom_ops: tuple[str, ...] = ()
    allow_fallback: bool = False

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise UsageError(f"threads must be at least 1, not {self.threads}.")


def open_session(
    model: ir.Model | str | os.PathLike[str], options: RunOptions | None = None, *, optimized: bool
) -> Session:
    """Load a model into ONNX Runtime.

    Args:
        model: A model, which is not changed, or the path of one.
        options: How to run it; one thread on the CPU by default.
        optimized: Whether the runtime's own graph optimizations are all on or all off.

    Raises:
        UsageError: If there is no provider of that name.
        RuntimeFailure: If ONNX Runtime is missing, cannot load the model, or would run it on another provider.
    """
    options = options or RunOptions()
    onnxruntime = ort.library()
    provider = _provider(onnxruntime, options.provider)
    settings = _settings(onnxruntime, options, optimized=optimized)
    if not isinstance(model, ir.Model):
        path = Path(model)
        if not path.is_file():
            raise RuntimeFailure(f"There is no model file {path}.")
        return _start(onnxruntime, str(path), settings, provider, options, (), None)
    parts = handover.prepare(model)
    if parts.folder is not None:
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", parts.folder)
    values = [ortvalues.from_tensor(onnxruntime, tensor) for tensor in parts.injected.values()]
    if values:
        settings.add_external_initializers(list(parts.injected), values)
    return _start(onnxruntime, parts.proto, settings, provider, options, values, model)


def run_options(
    provider: str | None, threads: int = 1, custom_ops: Sequence[str] = (), allow_fallback: bool = False
) -> RunOptions:
    """Return the options that a user gave, once it is known, before long work, that the provider is there.

    Args:
        provider: Its name; None for the CPU.
        threads: Threads within an operator.
        custom_ops: Shared libraries with custom operators.
        allow_fallback: Accept that ONNX Runtime runs the model, or some of its nodes, on another provider.

    Raises:
        UsageError: If the provider is unknown, not installed, or does not start.
        RuntimeFailure: If ONNX Runtime is missing.
    """
    options = RunOptions(provider or "cpu", threads, tuple(custom_ops), allow_fallback)
    if provider is not None:
        require_provider(options)
    return options


def require_provider(options: RunOptions) -> None:
    """See that a provider is there, by a model of one node; which nodes of a model it takes is another question.

    Raises:
        UsageError: If it is unknown, not installed, or does not start and no other is accepted.
        RuntimeFailure: If ONNX Runtime is missing.
    """
    onnxruntime = ort.library()
    provider = _provider(onnxruntime, options.provider)
    if provider == CPU or options.allow_fallback:
        return
    proto, _ = handover.single_node(ir.node("Neg", [ir.val("x")], outputs=[ir.val("y")]), [np.zeros(1, np.float32)], 13)
    anywhere = RunOptions(options.provider, allow_fallback=True)
    settings = _settings(onnxruntime, anywhere, optimized=False)
    try:
        with _start(onnxruntime, proto.SerializeToString(), settings, provider, anywhere, (), None) as session:
            if not session.started:
                raise UsageError(f"{fallback.not_started(session)}.")
    except RuntimeFailure as error:
        raise UsageError(f"The provider {providers.short(provider)} cannot be used here: {error}") from error


def available_providers() -> list[str]:
    """Return the execution providers of the installed ONNX Runtime by their own names, fastest first.

    Raises:
        RuntimeFailure: If ONNX Runtime is missing.
    """
    return list(ort.library().get_available_providers())


def evaluate_node(node: ir.Node, inputs: Sequence[np.ndarray | None], opset: int) -> list[np.ndarray] | None:
    """Compute one node from constant inputs in ONNX Runtime, on the CPU, without graph optimizations.

    Args:
        node: Of the standard domain or com.microsoft. Bodies it carries must use nothing from outside.
        inputs: An array per input of the node, None for one that is left out.
        opset: Version of the standard operator set the node is written in.

    Returns:
        An array per output (empty for an output without a name), or None where the runtime has no kernel or
        rejects the node, where the result is random or no tensor, or where the node needs its surroundings.

    Raises:
        RuntimeFailure: If ONNX Runtime is missing.
    """
    onnxruntime = ort.library()
    missing = any(a is None for a, v in zip(inputs, node.inputs, strict=True) if v is not None)
    if missing or not handover.is_self_contained(node):
        return None
    try:
        proto, feed = handover.single_node(node, inputs, opset)
        settings = _settings(onnxruntime, RunOptions(), optimized=False)
        with _start(onnxruntime, proto.SerializeToString(), settings, CPU, RunOptions(), (), None) as session:
            results = session.run(feed)
    except (RuntimeFailure, ir.serde.SerdeError, TypeError):
        return None
    arrays = [results.get(f"out{i}", np.empty(0, np.float32)) for i in range(len(node.outputs))]
    return arrays if all(isinstance(a, np.ndarray) for a in arrays) else None


def _provider(onnxruntime: Any, name: str) -> str:
    """Return ONNX Runtime's name of a provider.

    Raises:
        UsageError: If nothing is called so, or this installation does not have it.
    """
    return providers.find(name, onnxruntime.get_all_providers(), onnxruntime.get_available_providers())


def _settings(onnxruntime: Any, options: RunOptions, *, optimized: bool) -> Any:
    """Return the session options.

    Raises:
        RuntimeFailure: If a custom-op library cannot be registered.
    """
    settings = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    settings.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    # Errors come as exceptions; ONNX Runtime would print them as well.
    settings.log_severity_level = 4
    # Several sessions take turns here: idle threads of one must not spin while another is timed.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for library in options.custom_ops:
        with ort.failing(f"The custom-op library {library} cannot be loaded"):
            if not Path(library).is_file():
                raise ValueError("there is no such file")
            settings.register_custom_ops_library(os.fspath(library))
    return settings


def _start(
    onnxruntime: Any,
    source: str | bytes,
    settings: Any,
    provider: str,
    options: RunOptions,
    kept_alive: Sequence[Any],
    model: ir.Model | None,
) -> Session:
    """Create the session and see to it that it runs where it was asked to.

    Raises:
        RuntimeFailure: If it cannot be created, or would run elsewhere.
    """
    if providers.DEVICES.get(provider) == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        # CUDA and cuDNN may come as wheels, which the dynamic linker does not search. It reports by printing.
        with contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()
    order = [provider] if provider == CPU else [provider, CPU]
    what = f"ONNX Runtime cannot load {source if isinstance(source, str) else 'the model'}"
    start = time.perf_counter()
    with ort.failing(what, model, provider):
        session = onnxruntime.InferenceSession(source, settings, providers=order, enable_fallback=0)
    opened = Session(session, provider, time.perf_counter() - start, kept_alive)
    if not options.allow_fallback:
        fallback.refuse_fallback(opened)
    return opened
