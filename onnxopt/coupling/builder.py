"""What the rules of operators say: which indexes of which axes go together, and which must stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.dims import Dim
from onnxopt.coupling.partition import Ints, Partition, as_ints, components
from onnxopt.graph import attribute, constant_ints, constant_tensor, first_output

if TYPE_CHECKING:
    from onnxopt.analysis.shapes import Shapes
    from onnxopt.coupling.rewrites import Rewrite


LONGEST_AXIS = 1 << 20
"""Longer axes are not followed."""

MOST_INDEXES = 1 << 23
"""Axes are not followed beyond this many indexes in all; some hundred bytes are held in memory for each."""


class Opaque(Exception):  # noqa: N818 - not an error: the rule cannot tell
    """Raised by a rule that cannot follow its node; all axes of the node are frozen then, for this reason."""


@dataclasses.dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a value whose size is a number. Its index i has the identity `first + i`."""

    value: ir.Value
    axis: int
    first: int
    size: int


@dataclasses.dataclass(frozen=True, slots=True)
class Sink:
    """An input of a node along which products are summed up: an index that is gone there equals a zero.

    Attributes:
        node: The node.
        index: Which of its inputs: the weight where it has one.
        axis: The axis of this input.
        other: The input and its axis that it is multiplied by, where that is a value of the graph.
        later: The output and its axis that holds what it is multiplied by in the next step.
        zero: The input that holds what stands for zero, one for all or one for each index of an axis, and this axis;
            None where zero does.
    """

    node: ir.Node
    index: int
    axis: int
    other: tuple[int, int] | None = None
    later: tuple[int, int] | None = None
    zero: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Way:
    """One way to follow indexes through a node that leaves a choice.

    Attributes:
        left: Indexes that go together with those of `right`.
        right: See `left`.
        frozen: Indexes that must stay then.
        followed: The indexes that are followed.
    """

    left: Ints
    right: Ints
    frozen: Ints
    followed: Ints


class Builder:
    """Collects what the rules say, array by array; `partition` works it out in one go."""

    def __init__(self, shapes: Shapes, opset: int) -> None:
        """Take what is known about shapes, and the version of the standard operators."""
        self.known = shapes
        self.opset = opset
        self._axes: dict[ir.Value, tuple[Axis | None, ...]] = {}
        self._links: list[tuple[Ints, Ints]] = []
        self._frozen: list[tuple[Ints, int]] = []
        self._choices: list[tuple[ir.Node, Sequence[Way]]] = []
        self.axes: list[Axis] = []
        self.size = 0
        self.reasons: list[str] = []
        self._reason_index: dict[str, int] = {}
        self.sinks: list[Sink] = []
        self.rewrites: list[Rewrite] = []
        self.followed: set[ir.Node] = set()

    # What rules ask ---------------------------------------------------------------------------------------

    def shape(self, value: ir.Value | None) -> tuple[Dim, ...]:
        """Return the shape of a value.

        Raises:
            Opaque: If it is absent, or not even its rank is known.
        """
        shape = None if value is None else self.known.of(value)
        if shape is None:
            raise Opaque(f"the rank of {value.name if value is not None else 'an input'} is not known")
        return shape

    def sizes(self, value: ir.Value, *axes: int) -> tuple[int, ...]:
        """Return the sizes of some axes.

        Raises:
            Opaque: If one is no number.
        """
        shape = self.shape(value)
        found = tuple(d for axis in axes if isinstance(d := shape[axis], int))
        if len(found) != len(axes):
            raise Opaque(f"the size of an axis of {value.name} is not known")
        return found

    def ints(self, node: ir.Node, name: str, index: int | None = None) -> tuple[int, ...] | None:
        """Return a list of integers that is an attribute or, in later opsets, an input; None when absent.

        Raises:
            Opaque: If it depends on the inputs of the model.
        """
        found = attribute(node, name)
        if found is not None:
            return tuple(found)
        value = node.inputs[index] if index is not None and index < len(node.inputs) else None
        if value is None:
            return None
        constant = constant_ints(value)
        if constant is not None:
            return constant
        # What is computed from sizes stays as it is: `Shape` freezes the axes whose sizes are used in this way.
        content = self.known.content(value)
        items = content if isinstance(content, tuple) else ()
        numbers = tuple(item for item in items if isinstance(item, int))
        if content is None or len(numbers) != len(items) or not items:
            raise Opaque(f"its {name} are computed")
        return numbers

    def ids(self, value: ir.Value, axis: int) -> Ints | None:
        """Return the identities of the indexes of an axis, or None when its size is no number, or too large."""
        found = self._of(value)[axis]
        return None if found is None else np.arange(found.first, found.first + found.size, dtype=np.int64)

    def known_ids(self, value: ir.Value, axis: int) -> Ints:
        """Return the identities of the indexes of an axis.

        Raises:
            Opaque: If its size is no number, or too large.
        """
        found = self.ids(value, axis)
        if found is None:
            raise Opaque(f"the size of axis {axis} of {value.name} is not known, or too large to follow")
        return found

    def _of(self, value: ir.Value) -> tuple[Axis | None, ...]:
        found = self._axes.get(value)
        if found is None:
            found = tuple(self._new(value, axis, dim) for axis, dim in enumerate(self.shape(value)))
            self._axes[value] = found
        return found

    def _new(self, value: ir.Value, axis: int, dim: Dim) -> Axis | None:
        if not isinstance(dim, int) or dim > LONGEST_AXIS or self.size + dim > MOST_INDEXES:
            return None
        found = Axis(value, axis, self.size, dim)
        self.size += dim
        self.axes.append(found)
        if dim == 1:
            self.freeze_ids(as_ints([found.first]), "it is the only index of an axis")
        return found

    # What rules say ---------------------------------------------------------------------------------------

    def link(self, left: Ints, right: Ints) -> None:
        """Indexes of both arrays go together, pair by pair; the arrays are broadcast."""
        a, b = np.broadcast_arrays(left, right)
        self._links.append((a.reshape(-1), b.reshape(-1)))

    def tie(self, a: ir.Value, i: int, b: ir.Value, j: int) -> None:
        """Equal indexes of two axes go together. An axis of unknown size freezes the other."""
        left, right = self.ids(a, i), self.ids(b, j)
        if left is not None and right is not None and len(left) == len(right):
            self.link(left, right)
        elif left is not None or right is not None:
            self.freeze(a, i, f"it goes with an axis of another or unknown size ({b.name})")
            self.freeze(b, j, f"it goes with an axis of another or unknown size ({a.name})")

    def same(self, a: ir.Value, b: ir.Value, but: Iterable[int] = ()) -> None:
        """Tie all axes of two values of equal rank, except some."""
        rank = len(self.shape(a))
        if rank != len(self.shape(b)):
            raise Opaque("its input and output have different ranks")
        left_out = {axis % rank for axis in but}
        for axis in set(range(rank)) - left_out:
            self.tie(a, axis, b, axis)

    def broadcast(self, value: ir.Value, output: ir.Value, last: int = 0) -> None:
        """Tie the axes of an operand to those of the result, from the right, except for the `last` ones."""
        small, large = self.shape(value), self.shape(output)
        shift = len(large) - len(small)
        if shift < 0:
            raise Opaque("its input has more axes than its output")
        for axis in range(len(small) - last):
            if small[axis] != 1 or large[axis + shift] == 1:
                self.tie(value, axis, output, axis + shift)

    def freeze(self, value: ir.Value, axis: int, reason: str) -> None:
        """All indexes of an axis must stay."""
        found = self.ids(value, axis)
        if found is not None:
            self._frozen.append((found, self._reason(reason)))

    def freeze_all(self, value: ir.Value, reason: str) -> None:
        """All indexes of all axes must stay."""
        for axis in range(len(self.shape(value))):
            self.freeze(value, axis, reason)

    def freeze_ids(self, ids: Ints, reason: str) -> None:
        """Some indexes must stay."""
        self._frozen.append((ids, self._reason(reason)))

    def sink(
        self,
        node: ir.Node,
        index: int,
        axis: int,
        other: tuple[int, int] | None = None,
        later: tuple[int, int] | None = None,
        zero: tuple[int, int] | None = None,
    ) -> None:
        """Products are summed up along an axis of an input and one of another input; see `Sink`."""
        self.sinks.append(Sink(node, index, axis, other, later, zero))

    def choose(self, node: ir.Node, ways: Sequence[Way]) -> None:
        """Follow the first of the ways that leaves two or more sets that can be removed."""
        self._choices.append((node, ways))

    def _reason(self, reason: str) -> int:
        if reason not in self._reason_index:
            self._reason_index[reason] = len(self.reasons)
            self.reasons.append(reason)
        return self._reason_index[reason]

    # What follows -----------------------------------------------------------------------------------------

    def partition(self) -> Partition:
        """Return the sets of indexes that go together."""
        left, right = (_joined([pair[side] for pair in self._links]) for side in (0, 1))
        reasons: Ints = np.full(self.size, -1, np.int64)
        for ids, reason in reversed(self._frozen):
            reasons[ids] = reason
        partition = Partition(components(self.size, left, right), reasons)
        for node, ways in self._choices:
            reason = self._reason(f"{label(node)} moves elements across it and follows another factor")
            way = next(
                (w for w in ways if partition.free_after(w.left, w.right, w.frozen, w.followed) > 1),
                None,
            )
            if way is None:
                everything = _joined([x for w in ways for x in (w.left, w.right, w.frozen)])
                partition.merge(as_ints([]), as_ints([]), everything, reason)
            else:
                partition.merge(way.left, way.right, way.frozen, reason)
        return partition


def _joined(arrays: list[Ints]) -> Ints:
    return np.concatenate(arrays) if arrays else as_ints([])


def label(node: ir.Node) -> str:
    """Return how messages name a node."""
    return f"{node.op_type} {node.name or first_output(node)}"


def is_constant(value: ir.Value | None) -> bool:
    """Whether the value is a tensor in the file that no caller can override."""
    return constant_tensor(value) is not None
