"""What a shape rule sees of a node, and the small vocabulary the rules share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import onnx_ir as ir

from onnxopt.analysis import dims
from onnxopt.analysis.dims import Dim

Shape: TypeAlias = tuple[Dim, ...]
PartialShape: TypeAlias = Sequence[Dim | None] | None
"""What a rule answers for one output: None for an unknown rank, None in it for an unknown size."""

MAX_ELEMENTS = 64
"""Larger tensors hold no shapes: their content is not followed."""

INTEGER_TYPES = frozenset(
    {
        ir.DataType.BOOL,
        ir.DataType.INT8,
        ir.DataType.INT16,
        ir.DataType.INT32,
        ir.DataType.INT64,
        ir.DataType.UINT8,
        ir.DataType.UINT16,
        ir.DataType.UINT32,
        ir.DataType.UINT64,
    }
)


class Unknown(Exception):  # noqa: N818 - not an error: the rule cannot tell
    """Raised by a rule that cannot tell anything about the node, the malformed one included."""


class Content(NamedTuple):
    """The elements of a small tensor of integers or truth values (as 0 and 1), in row-major order.

    Attributes:
        shape: Its shape.
        items: Its elements; None for one that is unknown.
    """

    shape: tuple[int, ...]
    items: tuple[Dim | None, ...]


class Knowledge(Protocol):
    """What rules may ask about other values. Only what the engine was told to prepare is there."""

    def known_shape(self, value: ir.Value) -> Shape | None:
        """Return the shape, or None when its rank is unknown."""

    def known_content(self, value: ir.Value) -> Content | None:
        """Return the elements, or None when the value is no small tensor of integers."""

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """Return the element type, or None when it is unknown."""

    def nonneg(self, dim: Dim) -> bool:
        """Whether the number is at least 0, provably or because it is the size of an axis."""

    def note_sizes(self, node: ir.Node, sizes: Iterable[Dim]) -> None:
        """Remember that the numbers are sizes of axes, hence at least 0, where the node always runs."""

    def outside(self, dim: Dim, body: ir.Graph) -> bool:
        """Whether the number means the same outside of the body of a node."""


class View:
    """A node as its rule sees it: inputs by position, attributes by name."""

    __slots__ = ("inputs", "knowledge", "node")

    def __init__(self, node: ir.Node, knowledge: Knowledge) -> None:
        """Bind the node to what is known about its inputs."""
        self.node = node
        self.inputs = node.inputs
        self.knowledge = knowledge

    @property
    def outputs(self) -> int:
        """How many outputs the node has."""
        return len(self.node.outputs)

    def has(self, index: int) -> bool:
        """Whether the input is given."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def input(self, index: int) -> ir.Value:
        """Return an input.

        Raises:
            Unknown: If it is not given.
        """
        value = self.inputs[index] if index < len(self.inputs) else None
        if value is None:
            raise Unknown
        return value

    def shape_or_none(self, index: int) -> Shape | None:
        """Return the shape of an input, or None when it is unknown or the input is not given."""
        value = self.inputs[index] if index < len(self.inputs) else None
        return None if value is None else self.knowledge.known_shape(value)

    def shape(self, index: int) -> Shape:
        """Return the shape of an input.

        Raises:
            Unknown: If its rank is unknown or the input is not given.
        """
        shape = self.shape_or_none(index)
        if shape is None:
            raise Unknown
        return shape

    def content_or_none(self, index: int) -> Content | None:
        """Return the elements of an input, or None."""
        value = self.inputs[index] if index < len(self.inputs) else None
        return None if value is None else self.knowledge.known_content(value)

    def content(self, index: int) -> Content:
        """Return the elements of an input.

        Raises:
            Unknown: If they are not followed or the input is not given.
        """
        content = self.content_or_none(index)
        if content is None:
            raise Unknown
        return content

    def items(self, index: int) -> tuple[Dim | None, ...]:
        """Return the elements of an input, flattened.

        Raises:
            Unknown: If they are not followed or the input is not given.
        """
        return self.content(index).items

    def item(self, index: int) -> Dim:
        """Return the only element of an input.

        Raises:
            Unknown: If there are several or it is not known.
        """
        items = self.items(index)
        if len(items) != 1 or items[0] is None:
            raise Unknown
        return items[0]

    def numbers(self, index: int) -> tuple[int, ...]:
        """Return the elements of an input that are all fixed numbers.

        Raises:
            Unknown: If one is not.
        """
        items = self.items(index)
        if not all(isinstance(item, int) for item in items):
            raise Unknown
        return items  # type: ignore[return-value] # narrowed just above

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return the value of an attribute, or the default when it is absent.

        Raises:
            Unknown: If it refers to an attribute of the function's caller.
        """
        found = self.node.attributes.get(name)
        if found is None:
            return default
        if found.is_ref():
            raise Unknown
        return found.value

    def axes(self, index: int, name: str = "axes") -> tuple[int, ...] | None:
        """Return axes that are an attribute in old operator sets and an input in new ones; None when not given.

        Raises:
            Unknown: If they are an input that is not constant.
        """
        given = self.attribute(name)
        if given is not None:
            return tuple(given)
        return self.numbers(index) if self.has(index) else None


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """How an operator's output shapes follow from its inputs.

    Attributes:
        shapes: Returns one shape per output; outputs beyond the list are unknown.
        contents: Positions of the inputs whose elements matter.
        also: Further values whose shapes must be known first: outputs of the node's bodies.
    """

    shapes: Callable[[View], Sequence[PartialShape]]
    contents: tuple[int, ...] = ()
    also: Callable[[ir.Node], list[ir.Value]] | None = None


def normalized_axis(axis: int, rank: int) -> int:
    """Return the axis counted from the front.

    Raises:
        Unknown: If there is no such axis.
    """
    if not -rank <= axis < rank:
        raise Unknown
    return axis + rank if axis < 0 else axis


def normalized_axes(axes: Iterable[int], rank: int) -> tuple[int, ...]:
    """Return the axes counted from the front.

    Raises:
        Unknown: If one does not exist.
    """
    return tuple(normalized_axis(a, rank) for a in axes)


def broadcast_shapes(*shapes: PartialShape) -> PartialShape:
    """Return the shape that operands of these shapes broadcast to."""
    if any(s is None for s in shapes):
        return None
    present = [s for s in shapes if s is not None]
    rank = max((len(s) for s in present), default=0)
    result: list[Dim | None] = []
    for axis in range(-rank, 0):
        sizes = [s[axis] for s in present if len(s) >= -axis]
        known = [s for s in sizes if s is not None]
        number = next((s for s in known if isinstance(s, int) and s != 1), None)
        if number is not None:
            result.append(number)
        elif len(known) < len(sizes):
            result.append(None)
        else:
            result.append(known[0] if all(s == known[0] for s in known) else dims.broadcast(*known))
    return result


def sum_of(sizes: Iterable[Dim | None]) -> Dim | None:
    """Return the sum, or None when a size is unknown."""
    total: Dim = 0
    for dim in sizes:
        if dim is None:
            return None
        total = total + dim
    return total


def product_of(sizes: Iterable[Dim | None]) -> Dim | None:
    """Return the product, or None when a size is unknown and none is 0."""
    known = list(sizes)
    if 0 in known:
        return 0
    return None if None in known else dims.product(d for d in known if d is not None)


def tensor_shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """Return the shape of a tensor, which has nothing but numbers."""
    return tuple(d for d in tensor.shape if isinstance(d, int))
