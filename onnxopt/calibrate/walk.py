"""Runs two models in step on the same samples, stop by stop: of each only the part since the last stop.

What crosses from one part to the next is kept for every sample, and is the input of the next part. A layer of the
changed model that is still to be replaced, and everything behind it, lies in a later part than its own stop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.contract import JointObserver, Progress, Stop
from onnxopt.feeds import Data, Feed
from onnxopt.graph import bodies
from onnxopt.proto.collector import garbage_collection_paused
from onnxopt.runtime import RunOptions, open_session
from onnxopt.session.loaded import Session

CUT_BYTES = 512 << 20
"""What is kept of one model between two stops. Beyond it the next part begins where the last one that fitted did."""


class Walk:
    """Shows the values of both models at one stop after the other. A callable of `onnxopt.contract.WalkBoth`."""

    def __init__(
        self,
        reference: ir.Model,
        changed: ir.Model,
        stops: Sequence[Stop],
        data: Data | Sequence[Feed],
        options: RunOptions,
        progress: Progress,
    ) -> None:
        """Run nothing yet.

        Args:
            reference: It is not changed.
            changed: Nodes named by a stop may get other constants once it was shown; nothing else may change.
            stops: What is looked at, in order.
            data: The samples, run one at a time.
            options: How to run the models; the runtime's optimizations are on.
            progress: Told which sample is being run.
        """
        self._first = _Strand(reference, [s.reference for s in stops], [() for _ in stops], options)
        self._second = _Strand(changed, [s.changed for s in stops], [s.replaced for s in stops], options)
        self._data, self._progress = data, progress

    def __call__(self, observers: Sequence[JointObserver]) -> None:
        """Run every sample up to the next stop and show it.

        Args:
            observers: Who looks at which of the stop's values.

        Raises:
            ValueError: If a main graph has no value that the stop names.
            RuntimeFailure: If a model does not run.
        """
        with self._first.part() as before, self._second.part() as after:
            count = len(before.shown) + len(after.shown)
            self._progress.stage(f"observing {count} values of two models", total=len(self._data))
            for index, feed in enumerate(self._data):
                left, right = before.run(index, feed), after.run(index, feed)
                for observer in observers:
                    observer.add(
                        [left[name] for name in observer.reference], [right[name] for name in observer.changed]
                    )
                self._progress.advance()
        self._first.keep(before)
        self._second.keep(after)


class _Strand:
    """One of the two models, and what is known of each sample at the last cut."""

    def __init__(
        self, model: ir.Model, shown: Sequence[Sequence[str]], replaced: Sequence[Sequence[str]], options: RunOptions
    ) -> None:
        self._model, self._shown, self._replaced, self._options = model, shown, replaced, options
        self._known: list[dict[str, Any]] = []
        self._next = 0

    def part(self) -> _Part:
        """Return the part of the model up to the next stop."""
        shown = list(dict.fromkeys(self._shown[self._next]))
        later = {name for names in self._shown[self._next + 1 :] for name in names}
        replaced = {name for names in self._replaced[self._next :] for name in names}
        known = {name: _shape([s[name].shape for s in self._known]) for name in (self._known or [{}])[0]}
        dtypes = {name: self._known[0][name].dtype for name in known}
        self._next += 1
        graph = _Graph(self._model)
        crossing = graph.crossing(shown, later, replaced)
        inputs = {v.name or "" for v in self._model.graph.inputs}
        wanted = [n for n in dict.fromkeys([*shown, *crossing]) if n not in known and n not in inputs]
        model = graph.between(known, dtypes, wanted) if wanted else None
        return _Part(model, self._options, shown, crossing, self._known)

    def keep(self, part: _Part) -> None:
        """Begin the next part where this one ended, if that fitted."""
        if part.kept is not None:
            self._known = part.kept


class _Part:
    """A part of a model that is being run; its session is open within a `with`.

    Attributes:
        shown: The values that observers look at.
        kept: For each sample so far what the next part needs; None when that was too much, or no tensor.
    """

    def __init__(
        self,
        model: ir.Model | None,
        options: RunOptions,
        shown: Sequence[str],
        crossing: Sequence[str],
        known: Sequence[Mapping[str, Any]],
    ) -> None:
        self.shown, self._crossing, self._known = shown, crossing, known
        self.kept: list[dict[str, Any]] | None = []
        self._room = CUT_BYTES
        self._model, self._options = model, options
        self._takes = set() if model is None else {v.name for v in model.graph.inputs}
        self._session: Session | None = None

    def __enter__(self) -> _Part:
        if self._model is not None:
            self._session = open_session(self._model, self._options, optimized=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._session is not None:
            self._session.close()

    def run(self, index: int, feed: Feed) -> Mapping[str, Any]:
        """Return the values that are shown, and those that cross, of a sample."""
        values = {**feed, **(self._known[index] if self._known else {})}
        if self._session is not None:
            values |= self._session.run({name: value for name, value in values.items() if name in self._takes})
        if self.kept is not None:
            self.kept.append({name: values[name] for name in self._crossing})
            arrays = self.kept[-1].values()
            self._room -= sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
            if self._room < 0 or not all(isinstance(array, np.ndarray) for array in arrays):
                self.kept = None
        return values


class _Graph:
    """The main graph of a model as it is now, to cut parts out of."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._reads = {node: list(dict.fromkeys(reads(node))) for node in model.graph}
        self._made = {value.name or "": (node, value) for node in model.graph for value in node.outputs}
        self._inputs = {v.name or "": v for v in model.graph.inputs}
        # What depends on no input is not kept sample by sample, but computed in every part that needs it.
        moving = set(self._inputs.values())
        for node, values in self._reads.items():
            if not moving.isdisjoint(values):
                moving.update(node.outputs)
        self._moving = moving

    def crossing(self, shown: Iterable[str], later: set[str], replaced: set[str]) -> list[str]:
        """Return the values that a next part begins with.

        Args:
            shown: What the part before it computes, with all that leads there.
            later: What is still to be shown after it.
            replaced: Outputs of nodes that are not yet what they will be.
        """
        behind: set[ir.Value] = set()
        for node, values in self._reads.items():
            if not behind.isdisjoint(values) or any(v.name in replaced for v in node.outputs):
                behind.update(node.outputs)
        final = {node for node in self._leading_to(shown) if behind.isdisjoint(node.outputs)}
        ahead = self._leading_to(later) - final
        made = {value for node in final for value in node.outputs}
        needed = {value for node in ahead for value in self._reads[node]}
        needed |= {self._value(name) for name in later}
        return [value.name or "" for value in made if value in needed and value in self._moving]

    def _value(self, name: str) -> ir.Value:
        if name in self._inputs:
            return self._inputs[name]
        if name not in self._made:
            raise ValueError(f'the main graph computes no value "{name}"')
        return self._made[name][1]

    def _leading_to(self, names: Iterable[str], known: Iterable[str] = ()) -> set[ir.Node]:
        """Return the nodes that compute values, from values that are known."""
        stop, needed = set(known), {self._value(name) for name in names}
        found = set()
        for node in reversed(list(self._reads)):
            if any(v in needed and v.name not in stop for v in node.outputs):
                found.add(node)
                needed.update(self._reads[node])
        return found

    def between(
        self, known: Mapping[str, Sequence[int | None]], dtypes: Mapping[str, Any], wanted: Sequence[str]
    ) -> ir.Model:
        """Return a model that computes values from known ones and inputs of the model.

        Args:
            known: Name -> shape, with None for what differs between samples.
            dtypes: Name -> numpy's type.
            wanted: What it computes.
        """
        needed = self._leading_to(wanted, known)
        nodes = [node for node in self._reads if node in needed]
        read = {value for node in nodes for value in self._reads[node]}
        entering = [self._made[name][1] for name in known if self._made[name][1] in read]
        # A node with several outputs may have to run although some of them are known.
        made = {value for node in nodes for value in node.outputs}
        given = [v for v in self._inputs.values() if v in read]
        held = [v for v in self._model.graph.initializers.values() if v in read]
        view = ir.GraphView(
            [*given, *(v for v in entering if v not in made)],
            [self._value(name) for name in wanted],
            nodes=nodes,
            initializers=tuple(held),
            opset_imports=self._model.graph.opset_imports,
            name="part",
        )
        with garbage_collection_paused():
            graph = view.clone()
        for value in graph.inputs:
            name = value.name or ""
            if name in known:
                value.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtypes[name])))
                value.shape = ir.Shape(known[name])
        functions = list(self._model.functions.values())
        model = ir.Model(graph, ir_version=self._model.ir_version, functions=functions)
        model.meta.update(self._model.meta)
        return model


def reads(node: ir.Node) -> Iterable[ir.Value]:
    """Yield the values that a node reads, with those that its bodies take from outside."""
    yield from (v for v in node.inputs if v is not None)
    for _, body in bodies(node):
        for inner in body:
            yield from reads(inner)
        yield from body.outputs


def _shape(shapes: Sequence[tuple[int, ...]]) -> list[int | None]:
    """Return the size of each axis where it is the same in all samples."""
    return [sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True)]
