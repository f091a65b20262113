"""Runs a model on calibration data and shows the values inside to observers, one sample at a time.

Memory is that of the model, of one run, and of the observers: it does not grow with the number of samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.calibrate.beside import Beside
from onnxopt.calibrate.walk import Walk
from onnxopt.calibrate.watched import revealing
from onnxopt.contract import Calibration, JointObserver, Observer, Progress, Silent, Stop
from onnxopt.feeds import Data, Feed
from onnxopt.runtime import RunOptions, open_session
from onnxopt.session.loaded import Session

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
        names = [name for observer in observers for name in observer.reference]
        Beside(reference, names, data, options, progress, room=0)(changed, observers, range(len(data))[:most])

    def beside(reference: ir.Model, names: Sequence[str]) -> Beside:
        return Beside(reference, names, data, options, progress)

    def walk_both(reference: ir.Model, changed: ir.Model, stops: Sequence[Stop]) -> Walk:
        return Walk(reference, changed, stops, data, options, progress)

    return Calibration(run, run_both, beside, walk_both, len(data), real)


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
    progress.stage(f"observing {len(observers)} value{'s' if len(observers) > 1 else ''}", total=len(data))
    with open_session(revealing(model, inner), options, optimized=True) as session:
        sizes: dict[str, int] = {}
        for feed in data:
            for name in inputs & observers.keys():
                _show(feed[name], observers[name])
            for names in _portions(inner, sizes):
                _fetch(session, feed, names, observers, sizes)
            progress.advance()


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
