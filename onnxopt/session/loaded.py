"""A model that ONNX Runtime has loaded: what it takes and returns, running it, and where its nodes run."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from types import TracebackType
from typing import Any

from onnxopt.errors import RuntimeFailure
from onnxopt.registry import nearest
from onnxopt.session import ort, ortvalues, providers


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
        values = ortvalues.to_ort_values(ort.library(), inputs) if raw else {}
        results: dict[str, Any] = {}
        with ort.failing("ONNX Runtime cannot run the model"):
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
        onnxruntime, session = ort.library(), self._opened()
        inputs = self._converted(feed)
        kinds = [*(v.type for v in self.inputs), *(v.type for v in self.outputs)]
        if any(not kind.startswith("tensor(") or kind == "tensor(string)" for kind in kinds):
            return Binding(session, inputs, None, ())
        binding = session.io_binding()
        device = providers.DEVICES.get(self.provider, "cpu") if self.started else "cpu"
        with ort.failing("ONNX Runtime cannot take the inputs"):
            for name, value in inputs.items():
                binding.bind_ortvalue_input(name, ortvalues.on_device(onnxruntime, value, device))
            for output in self.outputs:
                binding.bind_output(output.name, device)
        return Binding(session, inputs, binding, self.outputs, device)

    def placement(self) -> dict[str, tuple[str, ...]]:
        """Return which nodes run where: provider -> the operator and name of each node it runs.

        The nodes are those left after ONNX Runtime's own optimizations. Nodes of nested graphs are not listed.
        """
        with ort.failing("ONNX Runtime does not tell where nodes run"):
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
        onnxruntime = ort.library()
        return optional | {
            name: ortvalues.to_input(onnxruntime, name, self._accepted[name].type, value)
            for name, value in feed.items()
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
        with ort.failing("ONNX Runtime cannot run the model"):
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
