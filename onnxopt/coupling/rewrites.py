"""What else must change in a node whose axes became shorter: counts in attributes, sizes, bounds and indexes."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxopt.graph import constant_array

Mask = npt.NDArray[np.bool_]


class Edit(Protocol):
    """What a rewrite may ask and do while indexes are being removed."""

    def kept(self, value: ir.Value, axis: int) -> Mask:
        """Return which of the original indexes of an axis are still there."""

    def constant(self, base: str, array: npt.NDArray[Any]) -> ir.Value:
        """Add a constant that every node can see."""

    def set_input(self, node: ir.Node, index: int, value: ir.Value) -> None:
        """Replace an input of a node."""

    def set_sizes(self, node: ir.Node, index: int, changes: dict[int, int]) -> None:
        """Give an input of a node that is a list of sizes other numbers at some places."""

    def opset(self) -> int:
        """Return the version of the standard operators."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rewrite:
    """A change to a node that follows from what is kept of some axes.

    Attributes:
        node: The node.
        watch: The values whose axes it depends on.
    """

    node: ir.Node
    watch: tuple[ir.Value, ...]

    def apply(self, edit: Edit) -> None:
        """Bring the node up to date. May be called again after further removals."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, slots=True)
class SetCount(Rewrite):
    """An integer attribute that counts the indexes of an axis (or blocks of them): group, num_heads, hidden_size."""

    attribute: str
    axis: int
    per: int = 1

    def apply(self, edit: Edit) -> None:
        """Count again."""
        count = int(edit.kept(self.watch[0], self.axis).sum()) // self.per
        self.node.attributes[self.attribute] = ir.AttrInt64(self.attribute, count)


@dataclasses.dataclass(frozen=True, slots=True)
class SetCounts(Rewrite):
    """An attribute that lists the sizes of parts of an axis, such as qkv_hidden_sizes of an Attention."""

    attribute: str
    axis: int
    parts: tuple[int, ...]

    def apply(self, edit: Edit) -> None:
        """Count again, part by part."""
        parts = np.split(edit.kept(self.watch[0], self.axis), np.cumsum(self.parts)[:-1])
        self.node.attributes[self.attribute] = ir.AttrInt64s(self.attribute, [int(part.sum()) for part in parts])


@dataclasses.dataclass(frozen=True, slots=True)
class SetSizes(Rewrite):
    """The shape that Reshape and Expand, and the sizes that Resize, are given for their output.

    Attributes:
        index: The input that lists them.
        places: Places in the list.
        axes: The axes of the value whose sizes belong there.
    """

    index: int
    places: tuple[int, ...]
    axes: tuple[int, ...]

    def apply(self, edit: Edit) -> None:
        """Write the sizes."""
        (value,) = self.watch
        sizes = [int(edit.kept(value, axis).sum()) for axis in self.axes]
        edit.set_sizes(self.node, self.index, dict(zip(self.places, sizes, strict=True)))


@dataclasses.dataclass(frozen=True, slots=True)
class SetSplit(Rewrite):
    """The sizes of the parts of a Split."""

    axis: int

    def apply(self, edit: Edit) -> None:
        """Write the sizes of all outputs, also where they were equal shares that nothing named."""
        sizes = [int(edit.kept(output, self.axis).sum()) for output in self.watch]
        if edit.opset() < 13:
            self.node.attributes["split"] = ir.AttrInt64s("split", sizes)
            return
        self.node.attributes.pop("num_outputs", None)
        value = edit.constant(f"{self.node.outputs[0].name}_split", np.array(sizes, np.int64))
        edit.set_input(self.node, 1, value)


@dataclasses.dataclass(frozen=True, slots=True)
class SetParts(Rewrite):
    """The sizes of the parts of a SplitToSequence.

    Attributes:
        axis: The axis that is split.
        bounds: Where the parts began, and where the last one ended.
    """

    axis: int
    bounds: tuple[int, ...]

    def apply(self, edit: Edit) -> None:
        """Count again, also where they were equal shares."""
        parts = np.split(edit.kept(self.watch[0], self.axis), self.bounds[1:-1])
        sizes = np.array([part.sum() for part in parts], np.int64)
        edit.set_input(self.node, 1, edit.constant(f"{self.node.outputs[0].name}_split", sizes))


@dataclasses.dataclass(frozen=True, slots=True)
class SetBounds(Rewrite):
    """Where a Slice begins and ends on an axis.

    Attributes:
        axis: The axis.
        place: Where it stands in the lists of the Slice.
        start: The first index.
        end: One behind the last.
        starts: The whole list, for where it is computed.
        ends: Likewise.
    """

    axis: int
    place: int
    start: int
    end: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]

    def apply(self, edit: Edit) -> None:
        """Count what is kept in front of the old bounds."""
        kept = edit.kept(self.watch[0], self.axis)
        for name, index, bound in (("starts", 1, self.start), ("ends", 2, self.end)):
            count = int(kept[:bound].sum())
            old = self.node.attributes.get(name)
            if old is not None:
                numbers = list(old.as_ints())
                numbers[self.place] = count
                self.node.attributes[name] = ir.AttrInt64s(name, numbers)
                continue
            given = self.node.inputs[index]
            assert given is not None, "bounds of a Slice are constant when its axis is followed"
            before = constant_array(given)
            array = np.array(self.starts if index == 1 else self.ends) if before is None else np.array(before)
            array[self.place] = count
            edit.set_input(self.node, index, edit.constant(given.name or name, array))


@dataclasses.dataclass(frozen=True, slots=True)
class SetIndexes(Rewrite):
    """The constant list of indexes of a Gather."""

    axis: int
    indexes: tuple[int, ...]
    out_axis: int

    def apply(self, edit: Edit) -> None:
        """Write where the kept ones are now."""
        data, output = self.watch
        moved = np.cumsum(edit.kept(data, self.axis)) - 1
        left = np.array(self.indexes, np.int64)[edit.kept(output, self.out_axis)]
        name = self.node.inputs[1].name if self.node.inputs[1] is not None else None
        edit.set_input(self.node, 1, edit.constant(name or "indexes", moved[left]))
