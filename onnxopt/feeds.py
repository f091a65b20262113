"""Inputs for running a model: generated from its types and shapes, or the user's own.

feeds = generate_runnable(model, session.run)
data = load_data("samples.npz", model)
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from onnxopt.errors import DataError, RuntimeFailure
from onnxopt.graph import all_nodes, bodies, scopes
from onnxopt.inputs.axes import SIZES, Axes, Kind
from onnxopt.inputs.data import Data, Feed
from onnxopt.inputs.roles import Roles
from onnxopt.inputs.samples import load_data, load_labels

__all__ = ["Data", "Feed", "generate", "generate_runnable", "load_data", "load_labels"]

_ALTERNATIVES: Mapping[str, tuple[tuple[Kind, ...], tuple[int, ...]]] = {
    "images": ((Kind.HEIGHT, Kind.WIDTH), (224, 256, 320, 32, 384, 512, 640, 28, 48)),
    "sequences": ((Kind.SEQUENCE, Kind.TOTAL), (128, 4, 1, 512, 64, 8, 256, 2, 3000)),
    "caches": ((Kind.PAST,), (0, 16, 1)),
    "sounds": ((Kind.SAMPLES,), (512, 16000 * 5, 16000 * 30)),
    "widths": ((Kind.FEATURES, Kind.COUNT), (1, 2, 3, 16, 32, 64, 80, 128, 256, 512, 768)),
    "channels": ((Kind.CHANNELS,), (1, 4, 8, 12, 16)),
}
"""Sizes to try, one kind of axis after the other, when the first choice does not run."""

_MOST_TRIES = 40

_MOST_HINTS = 24

_LARGEST_HINT = 4096
"""Larger numbers in an error message are hardly the size of an axis that this model was exported with."""


def generate(model: ir.Model, *, seed: int = 0, sets: int = 3, shape: Mapping[str, int] | None = None) -> list[Feed]:
    """Make inputs from the types, shapes, names and consumers of a model's inputs.

    Axes of the same name get the same size; where nothing says otherwise sizes differ between the sets. Integers
    that index a table stay within it, masks have padding, lengths and positions fit their axis.

    Args:
        model: The model.
        seed: The same seed gives the same inputs.
        sets: How many sets to make.
        shape: Sizes of dynamic axes, by name or as "input:index".

    Raises:
        UsageError: If `shape` names an axis that is not there or is fixed.
        DataError: If an input is of a type that cannot be generated.
    """
    generator = _Generator(model, seed, shape)
    return [generator.feed(i) for i in range(sets)]


def generate_runnable(
    model: ir.Model,
    run: Callable[[Feed], object],
    *,
    seed: int = 0,
    sets: int = 3,
    shape: Mapping[str, int] | None = None,
) -> list[Feed]:
    """Make inputs like `generate`, but only such that the model runs with them.

    When the first choice of sizes does not run, others are tried. When only some sizes run, sets of the others are
    made anew with these.

    Args:
        model: The model.
        run: Runs it; raises `RuntimeFailure` when it cannot.
        seed: The same seed gives the same inputs.
        sets: How many sets to make.
        shape: Sizes of dynamic axes, by name or as "input:index".

    Returns:
        At least one feed, at most `sets`.

    Raises:
        UsageError: If `shape` names an axis that is not there or is fixed.
        DataError: If no inputs were found that run. The message names the inputs and what to pass.
    """
    generator = _Generator(model, seed, shape)
    failures: list[RuntimeFailure] = []
    feeds = [generator.feed(i) for i in range(sets)]
    runs = [_runs(run, feed, failures) for feed in feeds]
    if any(runs):
        sizes = generator.sizes(runs.index(True))
        for index in range(sets):
            if not runs[index]:
                feeds[index] = generator.feed(index, sizes)
                runs[index] = _runs(run, feeds[index], failures)
        return [feed for feed, ran in zip(feeds, runs, strict=True) if ran]
    modest = [_modest(feed) for feed in feeds]
    runs = [_runs(run, feed, failures) for feed in modest]
    if any(runs):
        return [feed for feed, ran in zip(modest, runs, strict=True) if ran]
    hinted = itertools.islice(generator.hinted(str(failures[0])), _MOST_HINTS)
    for sizes in itertools.chain(hinted, itertools.islice(generator.alternatives(), _MOST_TRIES)):
        feeds = [generator.feed(0, sizes)]
        if _runs(run, feeds[0], failures):
            for index in range(1, sets):
                candidates = (generator.feed(index, generator.like(sizes, index)), generator.feed(index, sizes))
                feeds += itertools.islice((feed for feed in candidates if _runs(run, feed, failures)), 1)
            return feeds
    raise DataError(_advice(model, generator.axes, failures[0]))


def _runs(run: Callable[[Feed], object], feed: Feed, failures: list[RuntimeFailure]) -> bool:
    try:
        run(feed)
    except RuntimeFailure as error:
        failures.append(error)
        return False
    return True


def _modest(feed: Feed) -> Feed:
    """Return a feed whose integers are at most 1, in case they index or count something unseen."""
    return {
        name: np.minimum(value, 1).astype(value.dtype)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu"
        else value
        for name, value in feed.items()
    }


class _Generator:
    """The inputs of one model, to be made in any number and size."""

    def __init__(self, model: ir.Model, seed: int, shape: Mapping[str, int] | None) -> None:
        # Initializers that are graph inputs too have a value already.
        self._inputs = [v for v in model.graph.inputs if not v.is_initializer()]
        self.axes = Axes(self._inputs)
        self._roles = Roles(model, self._inputs, self.axes)
        self._overrides = self.axes.overrides(shape or {})
        self._seed = seed

    def sizes(self, index: int, choice: Mapping[Kind, tuple[int, ...]] = SIZES) -> dict[str, int]:
        return self.axes.choose(index, self._overrides, choice)

    def like(self, sizes: Mapping[str, int], index: int) -> dict[str, int]:
        """Return the usual sizes of a set, but for those axes of `sizes` that differ from the usual ones."""
        usual = self.sizes(0)
        changed = {name: size for name, size in sizes.items() if size != usual[name]}
        return self.axes.choose(index, self._overrides | changed)

    def feed(self, index: int, sizes: Mapping[str, int] | None = None) -> Feed:
        chosen = self.sizes(index) if sizes is None else sizes
        return {v.name or "": self._roles.make(v, index, chosen, self._seed) for v in self._inputs}

    def alternatives(self) -> Iterator[dict[str, int]]:
        """Yield other sizes, the most likely first: every group of axes alone, then every pair of groups."""
        present = {axis.kind for axis in self.axes}
        groups = [
            [dict.fromkeys(kinds, (size,)) for size in sizes]
            for kinds, sizes in _ALTERNATIVES.values()
            if present & set(kinds)
        ]
        single = {kind: (sizes[0],) for kind, sizes in SIZES.items()}
        tried: list[dict[str, int]] = []
        for group in groups:
            for choice in group:
                yield from _new(self.sizes(0, single | choice), tried)
        for one, other in itertools.combinations(groups, 2):
            pairs = itertools.product(enumerate(one), enumerate(other))
            for (_, choice), (_, second) in sorted(pairs, key=lambda pair: pair[0][0] + pair[1][0]):
                yield from _new(self.sizes(0, single | choice | second), tried)

    def hinted(self, message: str) -> Iterator[dict[str, int]]:
        """Yield sizes of a single axis that a failure mentions, such as "Input shape:{16,64}, requested shape:{9,64}".

        An exporter may have written the length of its example into the nodes, under an axis it calls dynamic.
        """
        usual = self.sizes(0)
        numbers = dict.fromkeys(int(n) for n in re.findall(r"(?<![\w.])\d+(?![\w.])", re.sub(r'"[^"]*"', "", message)))
        for size in numbers:
            for name, standing in usual.items():
                if 0 < size <= _LARGEST_HINT and size != standing and name not in self._overrides:
                    yield self.axes.choose(0, self._overrides | {name: size})


def _new(sizes: dict[str, int], tried: list[dict[str, int]]) -> Iterator[dict[str, int]]:
    if sizes not in tried:
        tried.append(sizes)
        yield sizes


def _advice(model: ir.Model, axes: Axes, failure: RuntimeFailure) -> str:
    """Say which inputs are involved in a failure and what to pass instead."""
    involved = _involved(model, str(failure))
    said = f"Generated inputs do not run the model. {str(failure).rstrip('.')}."
    if involved is not None and not involved:
        return f"{said} It depends on no input, so that no others help; correct the model."
    named = list(axes.shapes) if involved is None else involved
    described = ", ".join(f"{name} {_described(axes, name)}" for name in named[:4])
    keys = [axis.key for axis in axes if axis.input in named]
    example = ",".join(f"{key}=N" for key in dict.fromkeys(keys[:2]))
    sizes = f"sizes that fit with --shape {example}, or " if example else ""
    depends = "Its inputs are" if involved is None else "It depends on"
    return f"{said} {depends} {described}; pass {sizes}real inputs with --data."


def _described(axes: Axes, name: str) -> str:
    return f"[{', '.join(str(d) for d in axes.shapes[name])}]"


def _involved(model: ir.Model, message: str) -> list[str] | None:
    """Return the graph inputs that the input or node named in a message depends on; None where none is named."""
    named = re.search(r'input "([^"]+)"', message)
    names = [v.name or "" for v in model.graph.inputs]
    if named and named[1] in names:
        return [named[1]]
    # A node that failed within a body is named after the node that carries the body.
    blamed = re.findall(r'node "([^"]+)"', message)
    if not blamed:
        return None
    for scope in scopes(model):
        for node in scope.graph:
            if node.name == blamed[-1]:
                needed = _ancestors(model, node)
                return [name for name in names if name in needed]
    return None


def _ancestors(model: ir.Model, node: ir.Node) -> set[str]:
    """Return the names of the graph inputs a node depends on, through the bodies of other nodes too."""
    carriers = {body: carrier for carrier in all_nodes(model) for _, body in bodies(carrier)}
    found: set[str] = set()
    pending = _read_by(node)
    seen: set[ir.Value] = set()
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        source = value.producer()
        if source is None and value.is_graph_input():
            source = carriers.get(value.graph) if value.graph is not None else None
            if source is None and value.name:
                found.add(value.name)
        if source is not None:
            pending += _read_by(source)
    return found


def _read_by(node: ir.Node) -> list[ir.Value]:
    """Return what a node and the nodes of its bodies take."""
    inner = itertools.chain.from_iterable(body.all_nodes() for _, body in bodies(node))
    return [v for n in (node, *inner) for v in n.inputs if v is not None]
