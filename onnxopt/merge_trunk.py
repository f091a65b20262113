"""Models that share their first layers become one: the trunk is computed once, and each keeps its head."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxopt import feeds as feeding
from onnxopt.contract import Progress, Silent
from onnxopt.errors import NothingDoneError, UsageError, VerificationError
from onnxopt.feeds import Data, Feed
from onnxopt.ground import FEEDS_TO_VERIFY, Source
from onnxopt.model import load
from onnxopt.optimize import Result, optimize
from onnxopt.runtime import RunOptions, open_session, run_options
from onnxopt.unite import Part, unite

PASSES = "deduplicate-initializers,merge-common-subexpressions,remove-dead-code"
"""What merges the trunk once the models lie side by side: equal weights, then equal nodes on equal inputs."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fork:
    """A place where models part.

    Attributes:
        value: The last value that is computed for several models.
        heads: (model, operator, name of its first output) of each node that goes on from there for one model alone.
    """

    value: str
    heads: tuple[tuple[str, str, str], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Trunk:
    """What several models of a merged one share.

    Attributes:
        nodes: Nodes that serve more than one model.
        of: All nodes.
        parameters: Elements of the constants that such nodes use.
        forks: Where the models part.
    """

    nodes: int
    of: int
    parameters: int
    forks: tuple[Fork, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Merged:
    """What `merge_trunk` returns.

    Attributes:
        result: The merged model, and the report that compares it with the models side by side.
        parts: What of it each model is.
        trunk: What they share.
    """

    result: Result
    parts: tuple[Part, ...]
    trunk: Trunk


def merge_trunk(
    models: Sequence[Source],
    *,
    data: str | os.PathLike[str] | Data | None = None,
    shape: Mapping[str, int] | None = None,
    provider: str | None = None,
    threads: int = 1,
    custom_ops: Sequence[str] = (),
    allow_fallback: bool = False,
    seed: int = 0,
    measure: bool = True,
    progress: Progress | None = None,
) -> Merged:
    """Merge models that begin with the same layers, with the same weights, into one with several heads.

    Every output is compared with that of its own model, and must be equal to the bit with the runtime's optimizations
    off. Latency is that of the merged model against all of them in one session, one after the other.

    Args:
        models: Two or more, as `optimize` takes them. They are not changed.
        data: Real inputs of the merged model instead of generated ones.
        shape: Sizes of dynamic axes to run with, by axis name.
        provider: Execution provider.
        threads: Intra-op threads per session.
        custom_ops: Libraries with custom operators to register with ONNX Runtime.
        allow_fallback: Accept that the runtime runs nodes on another provider.
        seed: Seeds generated inputs.
        measure: Whether to compare latencies.
        progress: Told what is being done.

    Raises:
        NothingDoneError: If the models share no node.
        UsageError: If there are fewer than two models.
        ModelError: If they cannot be in one model.
        VerificationError: If an output is not what its model computes.
    """
    if len(models) < 2:
        raise UsageError("Give two or more models to merge.")
    progress = progress or Silent()
    options = run_options(provider, threads, custom_ops, allow_fallback)
    loaded = [load(m) for m in models]
    names = _names(models)
    whole, parts = unite(loaded, names)
    quick = optimize(whole, passes=PASSES, verify=False, measure=False)
    if not _trunk(quick.model, parts).nodes:
        raise NothingDoneError(f"{' and '.join(names)} share no layer: {_beginnings(loaded, names)}.")
    result = optimize(
        whole,
        passes=PASSES,
        data=data,
        shape=shape,
        provider=provider,
        threads=threads,
        custom_ops=custom_ops,
        allow_fallback=allow_fallback,
        seed=seed,
        measure=measure,
        progress=progress,
    )
    trunk = _trunk(result.model, parts)
    progress.stage("comparing each output with its own model")
    _require_equal(loaded, parts, result.model, _feeds(whole, data, shape, seed, options), options)
    title = " + ".join(names)
    notes = (*_notes(parts, trunk), *result.report.notes)
    report = dataclasses.replace(result.report, model=title, recipe="merge-trunk", notes=notes)
    return Merged(Result(result.model, report), parts, trunk)


def _names(models: Sequence[Source]) -> list[str]:
    """Call each model by its file, with a number behind where that is not enough."""
    found: list[str] = []
    for number, model in enumerate(models, 1):
        base = Path(model).stem if isinstance(model, (str, os.PathLike)) else f"model{number}"
        found.append(base if base not in found else f"{base}_{number}")
    return found


def _feeds(
    whole: ir.Model,
    data: str | os.PathLike[str] | Data | None,
    shape: Mapping[str, int] | None,
    seed: int,
    options: RunOptions,
) -> list[Feed]:
    if data is not None:
        samples = data if isinstance(data, Data) else feeding.load_data(os.fspath(data), whole)
        return list(samples.take(FEEDS_TO_VERIFY))
    with open_session(whole, options, optimized=False) as session:
        return feeding.generate_runnable(whole, session.run, seed=seed, shape=shape)


def _require_equal(
    models: Sequence[ir.Model], parts: Sequence[Part], merged: ir.Model, feeds: Sequence[Feed], options: RunOptions
) -> None:
    """Compare every output of the merged model with that of its own model, bit by bit.

    Raises:
        VerificationError: If one differs.
    """
    with open_session(merged, options, optimized=False) as session:
        found = [session.run(feed) for feed in feeds]
    for model, part in zip(models, parts, strict=True):
        with open_session(model, options, optimized=False) as session:
            for feed, outputs in zip(feeds, found, strict=True):
                own = session.run({theirs: feed[ours] for theirs, ours in part.inputs if ours in feed})
                for theirs, ours in part.outputs:
                    if not _same(own[theirs], outputs[ours]):
                        raise VerificationError(
                            f'The output "{theirs}" of {part.name} is not the same to the bit in the merged model. '
                            "Models of different opsets may round differently; export them with the same one."
                        )


def _same(first: object, second: object) -> bool:
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(_same, first, second))
    return type(first) is type(second) and first == second


def _trunk(merged: ir.Model, parts: Sequence[Part]) -> Trunk:
    """Find the nodes that several models need, and where these part."""
    outputs = {v.name: v for v in merged.graph.outputs}
    serves: dict[ir.Node, list[str]] = {}
    for part in parts:
        for node in _needed(outputs[name] for _, name in part.outputs):
            serves.setdefault(node, []).append(part.name)
    # a Constant is a weight, not a layer
    shared = [n for n in merged.graph if len(serves.get(n, ())) > 1 and n.op_type != "Constant"]
    members = set(shared)
    forks = []
    for node in shared:
        for value in node.outputs:
            own = [u for u in dict.fromkeys(use.node for use in value.uses()) if u not in members and u in serves]
            if own:
                heads = tuple((", ".join(serves[u]), u.op_type, u.outputs[0].name or "") for u in own)
                forks.append(Fork(value.name or "", heads))
    constants = {
        v: v.const_value.size
        for n in shared
        for v in n.inputs
        if v is not None and v.is_initializer() and v.const_value is not None
    }
    return Trunk(len(shared), sum(1 for _ in merged.graph), sum(constants.values()), tuple(forks))


def _needed(values: Iterable[ir.Value]) -> set[ir.Node]:
    """Return the nodes of the main graph that values are computed by."""
    found: set[ir.Node] = set()
    waiting = [v.producer() for v in values]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found.add(node)
        waiting += [v.producer() for v in _read(node)]
    return found


def _read(node: ir.Node) -> list[ir.Value]:
    """Return what a node reads, what its nested graphs capture included."""
    read = [v for v in node.inputs if v is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            read += [v for inner in attribute.as_graph().all_nodes() for v in inner.inputs if v is not None]
    return read


def _beginnings(models: Sequence[ir.Model], names: Sequence[str]) -> str:
    """Say what models begin with that share no node."""
    first = [next((n.op_type for n in m.graph if n.op_type != "Constant"), "nothing") for m in models]
    if len(set(first)) == 1:
        return f"each begins with {first[0]}, but on other inputs or with other weights or attributes"
    return ", ".join(f"{name} begins with {op}" for name, op in zip(names, first, strict=True))


def _notes(parts: Sequence[Part], trunk: Trunk) -> list[str]:
    """Tell in sentences what the merged model is."""
    notes = [
        f"{trunk.nodes:,} of {trunk.of:,} nodes, with {trunk.parameters:,} parameters, serve more than one model. "
        "Every output equals that of its own model to the bit. The original here is the models side by side."
    ]
    for fork in trunk.forks[:5]:
        heads = "; ".join(f"{model} goes on with {op} {output}" for model, op, output in fork.heads[:6])
        notes.append(f"After {fork.value}: {heads}.")
    for part in parts:
        renamed = [f"{theirs} is {ours}" for theirs, ours in (*part.inputs, *part.outputs) if theirs != ours]
        if renamed:
            notes.append(f"Of {part.name}, {', '.join(renamed)}.")
    return notes
