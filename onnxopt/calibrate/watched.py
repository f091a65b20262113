"""Models of which some inner values are computed, and shown as outputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.calibrate.walk import reads
from onnxopt.feeds import Feed
from onnxopt.graph import copied
from onnxopt.runtime import RunOptions, open_session
from onnxopt.session.loaded import Session


class Watched:
    """A model of which some values are computed, and nothing else; its session is open within a `with`.

    Attributes:
        names: The values, each once.
    """

    def __init__(self, model: ir.Model, names: Sequence[str], options: RunOptions) -> None:
        """Run nothing yet.

        Args:
            model: It is not changed.
            names: The values.
            options: How to run the model; the runtime's optimizations are on.
        """
        self.names = list(dict.fromkeys(names))
        inputs = {v.name for v in model.graph.inputs}
        self._inner = [name for name in self.names if name not in inputs]
        self._model, self._options = model, options
        self._session: Session | None = None

    def __enter__(self) -> Watched:
        """Open the session.

        Raises:
            ValueError: If the main graph has no such value.
            RuntimeFailure: If the model cannot be loaded.
        """
        if self._inner:
            self._session = open_session(only(self._model, self._inner), self._options, optimized=True)
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        if self._session is not None:
            self._session.close()

    def values(self, feed: Feed) -> dict[str, np.ndarray]:
        """Return the values of a sample, by name."""
        given = {name: feed[name] for name in self.names if name in feed}
        if self._session is None:
            return given
        return given | self._session.run(feed, self._inner)


def revealing(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """Return a copy whose outputs are the named values and those it had.

    Raises:
        ValueError: If there is no such value.
    """
    copy = copied(model)
    values = {v.name: v for node in copy.graph for v in node.outputs}
    present = {v.name for v in copy.graph.outputs}
    # Inputs and initializers may be outputs too.
    for name in (n for n in dict.fromkeys(names) if n not in present):
        if name not in values:
            raise ValueError(f'the main graph computes no value "{name}"')
        copy.graph.outputs.append(values[name])
    return copy


def only(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """Return a copy that computes the named values of the main graph and nothing else.

    Raises:
        ValueError: If there is no such value.
    """
    copy = revealing(model, names)
    outputs = {v.name: v for v in copy.graph.outputs}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(outputs[name] for name in dict.fromkeys(names))
    needed: set[ir.Value] = set(copy.graph.outputs)
    for node in reversed(copy.graph):
        if needed.isdisjoint(node.outputs):
            copy.graph.remove(node)
        else:
            needed.update(reads(node))
    for value in list(copy.graph.initializers.values()):
        if value not in needed and not value.is_graph_input():
            del copy.graph.initializers[value.name or ""]
    return copy
