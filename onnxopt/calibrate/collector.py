"""Runs a model on calibration data and shows the values inside to observers, one sample at a time.

Memory is that of the model, of one run, and of the observers: it does not grow with the number of samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.calibrate.walk import Walk, reads
from onnxopt.contract import Calibration, JointObserver, Observer, Progress, Silent, Stop
from onnxopt.feeds import Data, Feed
from onnxopt.runtime import RunOptions, Session, open_session

FETCH_BYTES = 256 << 20
"""Values that are fetched in one run may take up this much; the rest is fetched in further runs of the sample."""

FIRST_FETCH = 16
"""Values fetched in one run as long as their sizes are not known."""


def calibration(
    data: Data | Sequence[Feed],
    options: RunOptions | None = None,
    *,
    real: bool,
    progress: Progress | None = None,
) -> Calibration:
    """Return what passes learn from data.

    Args:
        data: The samples.
        options: How to run the model; one thread on the CPU by default.
        real: Whether the samples are the user's own.
        progress: Told which sample is being run.
    """
    options, progress = options or RunOptions(), progress or Silent()

    def run(model: ir.Model, observers: Mapping[str, Sequence[Observer]]) -> None:
        observe(model, observers, data, options, progress)

    def run_both(
        reference: ir.Model, changed: ir.Model, observers: Sequence[JointObserver], most: int | None = None
    ) -> None:
        count = len(data) if most is None else min(most, len(data))
        observe_both(reference, changed, observers, itertools.islice(data, count), count, options, progress)

    def walk_both(reference: ir.Model, changed: ir.Model, stops: Sequence[Stop]) -> Walk:
        return Walk(reference, changed, stops, data, options, progress)

    return Calibration(run, run_both, walk_both, len(data), real)


def observe(
    model: ir.Model,
    observers: Mapping[str, Sequence[Observer]],
    data: Data | Sequence[Feed],
    options: RunOptions,
    progress: Progress,
) -> None:
    """Run a model on data and show values of its main graph to observers.

    Args:
        model: It is not changed.
        observers: Name of a value (a graph input or a node's output) -> who looks at it.
        data: The samples, run one at a time.
        options: How to run the model; the runtime's optimizations are on.
        progress: Told which sample is being run.

    Raises:
        ValueError: If the main graph has no such value.
        RuntimeFailure: If the model does not run.
    """
    if not observers:
        return
    inputs = {v.name or "" for v in model.graph.inputs}
    inner = [name for name in observers if name not in inputs]
    progress.stage(f"observing {len(observers)} values", total=len(data))
    with open_session(_revealing(model, inner), options, optimized=True) as session:
        sizes: dict[str, int] = {}
        for feed in data:
            for name in inputs & observers.keys():
                _show(feed[name], observers[name])
            for names in _portions(inner, sizes):
                _fetch(session, feed, names, observers, sizes)
            progress.advance()


def observe_both(
    reference: ir.Model,
    changed: ir.Model,
    observers: Sequence[JointObserver],
    data: Iterable[Feed],
    count: int,
    options: RunOptions,
    progress: Progress,
) -> None:
    """Run two models in step and show values of both main graphs to observers.

    Of each model only what leads to these values is computed. All of them are in memory together, for one sample.

    Args:
        reference: It is not changed.
        changed: Likewise.
        observers: Who looks at which values.
        data: The samples, run one at a time.
        count: How many there are.
        options: How to run the models; the runtime's optimizations are on.
        progress: Told which sample is being run.

    Raises:
        ValueError: If a main graph has no such value.
        RuntimeFailure: If a model does not run.
    """
    if not observers:
        return
    first = _Watched(reference, [name for o in observers for name in o.reference], options)
    second = _Watched(changed, [name for o in observers for name in o.changed], options)
    progress.stage(f"observing {len(first.names) + len(second.names)} values of two models", total=count)
    with first as before, second as after:
        for feed in data:
            left, right = before.values(feed), after.values(feed)
            for observer in observers:
                observer.add([left[name] for name in observer.reference], [right[name] for name in observer.changed])
            progress.advance()


class _Watched:
    """A model of which some values are computed, and nothing else; its session is open within a `with`.

    Attributes:
        names: The values, each once.
    """

    def __init__(self, model: ir.Model, names: Sequence[str], options: RunOptions) -> None:
        self.names = list(dict.fromkeys(names))
        inputs = {v.name for v in model.graph.inputs}
        self._inner = [name for name in self.names if name not in inputs]
        self._model, self._options = model, options
        self._session: Session | None = None

    def __enter__(self) -> _Watched:
        if self._inner:
            self._session = open_session(_only(self._model, self._inner), self._options, optimized=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._session is not None:
            self._session.close()

    def values(self, feed: Feed) -> dict[str, np.ndarray]:
        """Return the values of a sample, by name."""
        given = {name: feed[name] for name in self.names if name in feed}
        if self._session is None:
            return given
        return given | self._session.run(feed, self._inner)


def _fetch(
    session: Session, feed: Feed, names: list[str], observers: Mapping[str, Sequence[Observer]], sizes: dict[str, int]
) -> None:
    for name, array in session.run(feed, names).items():
        sizes[name] = max(sizes.get(name, 0), array.nbytes)
        _show(array, observers[name])


def _show(array: np.ndarray, observers: Sequence[Observer]) -> None:
    for observer in observers:
        observer.add(array)


def _portions(names: list[str], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Divide names into lists that are fetched together."""
    portion: list[str] = []
    room = FETCH_BYTES
    for name in names:
        size = sizes.get(name, FETCH_BYTES // FIRST_FETCH)
        if portion and size > room:
            yield portion
            portion, room = [], FETCH_BYTES
        portion.append(name)
        room -= size
    if portion:
        yield portion


def _revealing(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """Return a copy whose outputs are the named values and those it had.

    Raises:
        ValueError: If there is no such value.
    """
    copy = model.clone()
    copy.meta.update(model.meta)
    values = {v.name: v for node in copy.graph for v in node.outputs}
    present = {v.name for v in copy.graph.outputs}
    for name in dict.fromkeys(names):
        if name not in values:
            raise ValueError(f'the main graph computes no value "{name}"')
        if name not in present:
            copy.graph.outputs.append(values[name])
    return copy


def _only(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """Return a copy that computes the named values of the main graph and nothing else.

    Raises:
        ValueError: If there is no such value.
    """
    copy = _revealing(model, names)
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
