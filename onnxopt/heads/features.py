"""Runs a model on data up to a value, and collects that value for every sample."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.contract import Progress
from onnxopt.errors import DataError, RuntimeFailure
from onnxopt.feeds import Data, Feed
from onnxopt.graph import Names, all_nodes, copied
from onnxopt.probe.classifier import Array
from onnxopt.runtime import RunOptions, open_session
from onnxopt.session.loaded import Session

BATCH = 64
"""Samples that are run at once where the model takes any number."""

MOST_BYTES = 8 << 30
"""Features of all samples together may take up this much."""

_WHOLE_BATCH = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeMatMul"})


def run_up_to(model: ir.Model, name: str, data: Data, options: RunOptions, progress: Progress) -> Array:
    """Return what a value is for every sample, samples along the first axis.

    Args:
        model: It is not changed.
        name: An input of the main graph, or what a node of it computes.
        data: The samples, read as they are needed.
        options: How to run the model; the runtime's optimizations are on.
        progress: Told how far it is.

    Raises:
        DataError: If a feature is no number, or there are more of them than memory should hold.
        RuntimeFailure: If the model does not run.
    """
    progress.stage(f"features of {len(data)} samples", total=len(data))
    found: list[Array] = []
    held = 0
    shown, output = showing(model, name)
    with open_session(shown, options, optimized=True) as session:
        for feeds in _batches(data, BATCH if _takes_batches(model) else 1):
            for array in _run(session, feeds, output):
                wide = np.asarray(array).astype(np.float32)
                if not np.isfinite(wide).all():
                    raise DataError(
                        f'"{name}" is not a finite number for sample {len(found)}; check that sample, or choose other '
                        "features with --at."
                    )
                found.append(wide)
                held += wide.nbytes
            if held > MOST_BYTES:
                raise DataError(
                    f"The features of the samples take up more than {MOST_BYTES >> 30} GB; give fewer samples, or "
                    "choose smaller features with --at."
                )
            progress.advance(len(feeds))
    return np.concatenate(found)


def first_of(model: ir.Model, name: str, data: Data, options: RunOptions) -> np.ndarray[Any, Any]:
    """Return what a value is for the first sample, as it comes.

    Raises:
        RuntimeFailure: If the model does not run.
    """
    shown, output = showing(model, name)
    with open_session(shown, options, optimized=True) as session:
        return np.asarray(session.run(next(iter(data)))[output])


def showing(model: ir.Model, name: str) -> tuple[ir.Model, str]:
    """Return a copy with a value as its only output, and what that is called."""
    copy = copied(model)
    value = value_named(copy, name)
    if value.producer() is None:
        node = ir.node("Identity", [value], name=Names(copy).fresh("shown"))
        node.outputs[0].name, node.outputs[0].type = Names(copy).fresh(f"{name}/shown"), value.type
        copy.graph.append(node)
        value = node.outputs[0]
    copy.graph.outputs.clear()
    copy.graph.outputs.append(value)
    return copy, value.name or name


def value_named(model: ir.Model, name: str) -> ir.Value:
    """Return the value of the main graph that has a name: an input or a node's output."""
    return next(v for v in values_of(model) if v.name == name)


def values_of(model: ir.Model) -> Iterator[ir.Value]:
    """Yield the values of the main graph that depend on its inputs or may."""
    yield from (v for v in model.graph.inputs if not v.is_initializer())
    yield from (v for node in model.graph for v in node.outputs if v.name)


def _run(session: Session, feeds: list[Feed], name: str) -> list[Array]:
    """Return the value of each sample; one after the other where the model does not run on them together."""
    if len(feeds) > 1:
        joined = {key: np.concatenate([feed[key] for feed in feeds]) for key in feeds[0]}
        try:
            array = session.run(joined)[name]
        except RuntimeFailure:
            array = None
        if array is not None and len(array) == len(feeds):
            return list(np.split(array, len(feeds)))
    return [session.run(feed)[name] for feed in feeds]


def _takes_batches(model: ir.Model) -> bool:
    """Return whether the first axis of all inputs counts samples, of which one does not influence another."""
    inputs = [v for v in model.graph.inputs if not v.is_initializer()]
    counts = all(v.shape is not None and len(v.shape) > 0 and not isinstance(v.shape[0], int) for v in inputs)
    # These scale what they quantize by the largest number in the whole batch.
    return counts and not any(n.op_type in _WHOLE_BATCH for n in all_nodes(model))


def _batches(data: Data, size: int) -> Iterator[list[Feed]]:
    """Yield samples in groups of the same shapes, each of one row."""
    group: list[Feed] = []
    for feed in data:
        if group and (len(group) >= size or not _alike(group[0], feed)):
            yield group
            group = []
        group.append(feed)
    if group:
        yield group


def _alike(one: Feed, two: Feed) -> bool:
    return one.keys() == two.keys() and all(
        isinstance(a, np.ndarray)
        and isinstance(two[k], np.ndarray)
        and a.shape == two[k].shape
        and a.ndim
        and a.shape[0] == 1
        for k, a in one.items()
    )
