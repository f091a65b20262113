"""The only place that opens ONNX Runtime sessions.

Whatever ONNX Runtime has to say when it fails becomes a `RuntimeFailure` with one sentence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.errors import RuntimeFailure, UsageError
from onnxopt.graph import all_nodes
from onnxopt.registry import nearest
from onnxopt.session import diagnosis, handover, ortvalues, providers
from onnxopt.session.providers import CPU

# fmt: off
_SHAPE_OPS = frozenset(
    {
        "Add", "And", "Cast", "Ceil", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand",
        "Floor", "Gather", "Greater", "GreaterOrEqual", "Identity", "If", "Less", "LessOrEqual", "Loop",
        "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Range", "ReduceMax", "ReduceMin", "ReduceProd",
        "ReduceSum", "Reshape", "Shape", "Size", "Slice", "Split", "Squeeze", "Sub", "Tile", "Unsqueeze",
        "Where",
    }
)
# fmt: on
"""Operators that compute with shapes; ONNX Runtime keeps these on the CPU on purpose."""


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


@dataclasses.dataclass(frozen=True, slots=True)
class ValueInfo:
    """An input or output of a session.

    Attributes:
        name: Its name.
        type: As ONNX Runtime writes it: "tensor(float)", "seq(tensor(int64))", "optional(tensor(float))".
        shape: A size, a name or None (unknown) per axis.
    """

    name: str
    type: str
    shape: tuple[int | str | None, ...]


class Session:
    """A loaded model. Use it as a context manager, or close it.

    Attributes:
        inputs: What `run` takes.
        outputs: What `run` returns.
        provider: The provider that was asked for, by ONNX Runtime's name.
        load_seconds: How long ONNX Runtime took to load and optimize the model.
    """

    def __init__(self, session: Any, provider: str, load_seconds: float, kept_alive: Sequence[Any]) -> None:
        """Wrap an `onnxruntime.InferenceSession`; use `open_session` to get one.

        Args:
            session: The session.
            provider: Provider that was asked for.
            load_seconds: How long loading took.
            kept_alive: Arrays whose memory the session uses.
        """
        self._session = session
        self._kept_alive = kept_alive
        self.provider = provider
        self.load_seconds = load_seconds
        self.inputs = tuple(_value_info(v) for v in session.get_inputs())
        self.outputs = tuple(_value_info(v) for v in session.get_outputs())
        self._accepted = {v.name: v for v in (*self.inputs, *map(_value_info, session.get_overridable_initializers()))}

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def registered(self) -> tuple[str, ...]:
        """The providers that ONNX Runtime has started for it."""
        return tuple(self._opened().get_providers())

    @property
    def started(self) -> bool:
        """Whether the provider that was asked for is among them."""
        return self.provider in self.registered

    def close(self) -> None:
        """Free the session and the memory it holds. Closing twice does nothing."""
        self._session = None
        self._kept_alive = ()

    def run(self, feed: Mapping[str, Any], only: Collection[str] | None = None) -> dict[str, Any]:
        """Compute the outputs.

        Args:
            feed: An array per input; a list of arrays for a sequence, None for an optional input without a value.
            only: Names of the outputs that are wanted; all by default.

        Returns:
            An array per output (of a type of ml_dtypes where numpy lacks it), a list for a sequence, None for an
            optional without a value.

        Raises:
            RuntimeFailure: If an input is missing or does not fit, or a node fails.
        """
        session = self._opened()
        inputs = self._converted(feed)
        wanted = [o for o in self.outputs if only is None or o.name in only]
        raw = [o.name for o in wanted if ortvalues.reinterpreted(o.type)]
        plain = [o.name for o in wanted if not ortvalues.reinterpreted(o.type)]
        values = ortvalues.to_ort_values(_onnxruntime(), inputs) if raw else {}
        results: dict[str, Any] = {}
        with _failing("ONNX Runtime cannot run the model"):
            if plain:
                results.update(zip(plain, session.run(plain, inputs), strict=True))
            if raw:
                arrays = map(ortvalues.to_array, session.run_with_ort_values(raw, values))
                results.update(zip(raw, arrays, strict=True))
        return {o.name: results[o.name] for o in wanted}

    def bind(self, feed: Mapping[str, Any]) -> Binding:
        """Put the inputs where the provider wants them, so that running copies nothing.

        Raises:
            RuntimeFailure: If an input is missing or does not fit.
        """
        ort, session = _onnxruntime(), self._opened()
        inputs = self._converted(feed)
        kinds = [*(v.type for v in self.inputs), *(v.type for v in self.outputs)]
        if any(not kind.startswith("tensor(") or kind == "tensor(string)" for kind in kinds):
            return Binding(session, inputs, None, ())
        binding = session.io_binding()
        device = providers.DEVICES.get(self.provider, "cpu") if self.started else "cpu"
        with _failing("ONNX Runtime cannot take the inputs"):
            for name, value in inputs.items():
                binding.bind_ortvalue_input(name, ortvalues.on_device(ort, value, device))
            for output in self.outputs:
                binding.bind_output(output.name, device)
        return Binding(session, inputs, binding, self.outputs, device)

    def placement(self) -> dict[str, tuple[str, ...]]:
        """Return which nodes run where: provider -> the operator and name of each node it runs.

        The nodes are those left after ONNX Runtime's own optimizations. Nodes of nested graphs are not listed.
        """
        with _failing("ONNX Runtime does not tell where nodes run"):
            placed = self._opened().get_provider_graph_assignment_info()
        nodes: dict[str, list[str]] = {}
        for part in placed:
            nodes.setdefault(part.ep_name, []).extend(
                f"{node.op_type} {node.name}".strip() for node in part.get_nodes()
            )
        return {provider: tuple(names) for provider, names in nodes.items()}

    def _opened(self) -> Any:
        if self._session is None:
            raise RuntimeFailure("The session is closed.")
        return self._session

    def _converted(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        """Return the feed as ONNX Runtime takes it.

        Raises:
            RuntimeFailure: If an input is missing, unknown or of a wrong type.
        """
        for info in self.inputs:
            if feed.get(info.name) is None and not info.type.startswith("optional("):
                raise RuntimeFailure(
                    f'The input "{info.name}" ({info.type}, shape {_shape(info)}) is missing; the feed has '
                    f"{', '.join(feed) or 'nothing'}."
                )
        unknown = [name for name in feed if name not in self._accepted]
        if unknown:
            raise RuntimeFailure(
                f'The model has no input "{unknown[0]}".{nearest(unknown[0], list(self._accepted))} It has '
                f"{', '.join(self._accepted) or 'none'}."
            )
        optional = {i.name: None for i in self.inputs if i.type.startswith("optional(")}
        ort = _onnxruntime()
        return optional | {
            name: ortvalues.to_input(ort, name, self._accepted[name].type, value) for name, value in feed.items()
        }


class Binding:
    """A feed bound to a session, to be run many times."""

    def __init__(
        self, session: Any, inputs: Mapping[str, Any], binding: Any, outputs: Sequence[ValueInfo], device: str = "cpu"
    ) -> None:
        """Wrap an I/O binding; use `Session.bind` to get one.

        Args:
            session: The `onnxruntime.InferenceSession`.
            inputs: The feed; also keeps its arrays alive.
            binding: The `onnxruntime.IOBinding`, or None where the types of the model allow none.
            outputs: The outputs that are bound.
            device: Where they are.
        """
        self._session = session
        self._inputs = dict(inputs)
        self._binding = binding
        self._outputs = outputs
        self._device = device
        self._misdeclared: list[str] | None = None

    def run(self) -> None:
        """Compute the outputs and leave them on the device.

        Raises:
            RuntimeFailure: If a node fails.
        """
        with _failing("ONNX Runtime cannot run the model"):
            if self._binding is None:
                self._session.run(None, self._inputs)
            else:
                for name in self._misdeclared or ():
                    self._binding.bind_output(name, self._device)
                self._session.run_with_iobinding(self._binding)
                # Without it a device may still be computing when this returns.
                self._binding.synchronize_outputs()
                if self._misdeclared is None:
                    self._misdeclared = self._found_misdeclared()

    def _found_misdeclared(self) -> list[str]:
        """Return the outputs whose shape is not the declared one.

        ONNX Runtime computes these all the same, but does not take what it computed back as the place for the next
        run's result, so they are to be bound anew for every run.
        """
        made = zip(self._outputs, self._binding.get_outputs(), strict=True)
        return [info.name for info, value in made if not _is_declared(info, value.shape())]


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
    ort = _onnxruntime()
    provider = _provider(ort, options.provider)
    settings = _settings(ort, options, optimized=optimized)
    if not isinstance(model, ir.Model):
        path = Path(model)
        if not path.is_file():
            raise RuntimeFailure(f"There is no model file {path}.")
        return _start(ort, str(path), settings, provider, options, (), None)
    parts = handover.prepare(model)
    if parts.folder is not None:
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", parts.folder)
    values = [ortvalues.from_tensor(ort, tensor) for tensor in parts.injected.values()]
    if values:
        settings.add_external_initializers(list(parts.injected), values)
    return _start(ort, parts.proto, settings, provider, options, values, model)


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
    ort = _onnxruntime()
    provider = _provider(ort, options.provider)
    if provider == CPU or options.allow_fallback:
        return
    proto, _ = handover.single_node(ir.node("Neg", [ir.val("x")], outputs=[ir.val("y")]), [np.zeros(1, np.float32)], 13)
    anywhere = RunOptions(options.provider, allow_fallback=True)
    settings = _settings(ort, anywhere, optimized=False)
    try:
        with _start(ort, proto.SerializeToString(), settings, provider, anywhere, (), None) as session:
            if not session.started:
                raise UsageError(f"{_not_started(session)}.")
    except RuntimeFailure as error:
        raise UsageError(f"The provider {providers.short(provider)} cannot be used here: {error}") from error


def available_providers() -> list[str]:
    """Return the execution providers of the installed ONNX Runtime by their own names, fastest first.

    Raises:
        RuntimeFailure: If ONNX Runtime is missing.
    """
    return list(_onnxruntime().get_available_providers())


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
    ort = _onnxruntime()
    missing = any(a is None for a, v in zip(inputs, node.inputs, strict=True) if v is not None)
    if missing or not handover.is_self_contained(node):
        return None
    try:
        proto, feed = handover.single_node(node, inputs, opset)
        settings = _settings(ort, RunOptions(), optimized=False)
        with _start(ort, proto.SerializeToString(), settings, CPU, RunOptions(), (), None) as session:
            results = session.run(feed)
    except (RuntimeFailure, ir.serde.SerdeError, TypeError):
        return None
    arrays = [results.get(f"out{i}", np.empty(0, np.float32)) for i in range(len(node.outputs))]
    return arrays if all(isinstance(a, np.ndarray) for a in arrays) else None


def _onnxruntime() -> Any:
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
def _failing(what: str, model: ir.Model | None = None, provider: str = CPU) -> Iterator[None]:
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


def _provider(ort: Any, name: str) -> str:
    """Return ONNX Runtime's name of a provider.

    Raises:
        UsageError: If nothing is called so, or this installation does not have it.
    """
    return providers.find(name, ort.get_all_providers(), ort.get_available_providers())


def _settings(ort: Any, options: RunOptions, *, optimized: bool) -> Any:
    """Return the session options.

    Raises:
        RuntimeFailure: If a custom-op library cannot be registered.
    """
    settings = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    settings.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    # Errors come as exceptions; ONNX Runtime would print them as well.
    settings.log_severity_level = 4
    # Several sessions take turns here: idle threads of one must not spin while another is timed.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for library in options.custom_ops:
        with _failing(f"The custom-op library {library} cannot be loaded"):
            if not Path(library).is_file():
                raise ValueError("there is no such file")
            settings.register_custom_ops_library(os.fspath(library))
    return settings


def _start(
    ort: Any,
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
    if providers.DEVICES.get(provider) == "cuda" and hasattr(ort, "preload_dlls"):
        # CUDA and cuDNN may come as wheels, which the dynamic linker does not search. It reports by printing.
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    order = [provider] if provider == CPU else [provider, CPU]
    what = f"ONNX Runtime cannot load {source if isinstance(source, str) else 'the model'}"
    start = time.perf_counter()
    with _failing(what, model, provider):
        session = ort.InferenceSession(source, settings, providers=order, enable_fallback=0)
    opened = Session(session, provider, time.perf_counter() - start, kept_alive)
    if not options.allow_fallback:
        _refuse_fallback(opened)
    return opened


def _not_started(session: Session) -> str:
    """Say that the provider that was asked for did not start."""
    return (
        f"ONNX Runtime could not start the provider {providers.short(session.provider)} and fell back to "
        f"{', '.join(map(providers.short, session.registered))}; its driver or libraries are missing or do not match"
    )


def _refuse_fallback(session: Session) -> None:
    """Raise when the session, or nodes that compute more than shapes, ended up on another provider."""
    if not session.started:
        raise RuntimeFailure(f"{_not_started(session)} (--allow-fallback accepts this).")
    if session.provider == CPU:
        return
    placed = session.placement()
    strays = [n for n in placed.get(CPU, ()) if n.partition(" ")[0] not in _SHAPE_OPS]
    if strays:
        total = sum(len(nodes) for nodes in placed.values())
        shown = ", ".join(strays[:5]) + (", ..." if len(strays) > 5 else "")
        raise RuntimeFailure(
            f"{len(strays)} of {total} nodes would run on the cpu instead of {providers.short(session.provider)}: "
            f"{shown} (--allow-fallback accepts this)."
        )


def _value_info(argument: Any) -> ValueInfo:
    return ValueInfo(argument.name, argument.type, tuple(argument.shape))


def _is_declared(info: ValueInfo, shape: Sequence[int]) -> bool:
    """Whether a shape is one that the session declares; of an output without a shape any is."""
    if not info.shape:
        return True
    return len(shape) == len(info.shape) and all(
        size == dim or not isinstance(dim, int) for size, dim in zip(shape, info.shape, strict=True)
    )


def _shape(info: ValueInfo) -> str:
    return "[" + ", ".join("?" if d is None else str(d) for d in info.shape) + "]"
