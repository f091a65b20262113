"""Matrices that something is multiplied with: each with all that uses it, and what data tell about its inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from onnxopt.analysis.products import NoProduct, Product, is_view, product, root
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Calibration
from onnxopt.graph import Scope, attribute, has_references, is_op, scopes
from onnxopt.numeric.gram import Gram

GRAM_BYTES = 1 << 30
"""Gram matrices held at the same time; for larger models the data runs through the model several times."""


@dataclasses.dataclass(frozen=True, slots=True)
class Lookup:
    """A Gather of rows of a constant matrix."""

    scope: Scope
    node: ir.Node


@dataclasses.dataclass(frozen=True, slots=True)
class Matrix:
    """A constant matrix and all that uses it.

    Attributes:
        scope: The graph that holds it.
        value: The initializer, or the output of a Constant node.
        tensor: Its data.
        products: The products with it.
        unread: Nodes that multiply with it in a form that is not read.
        lookups: The nodes that look rows up in it.
        others: Uses of another kind.
    """

    scope: Scope
    value: ir.Value
    tensor: ir.TensorProtocol
    products: tuple[Product, ...]
    unread: tuple[NoProduct, ...]
    lookups: tuple[Lookup, ...]
    others: int

    @property
    def locked(self) -> str:
        """Why its data must stay as it is; empty when it may change."""
        if self.value.is_graph_input():
            return "the weight is also an input of the graph, so the caller can override it"
        if self.value.is_graph_output():
            return "the weight is an output of the graph"
        return ""

    @property
    def user(self) -> Product | NoProduct:
        """The first that multiplies with it, as far as it is read."""
        return self.products[0] if self.products else self.unread[0]

    @property
    def inputs(self) -> int:
        """How many numbers a product sums up."""
        return self.products[0].rows

    @property
    def outputs(self) -> int:
        """How many sums a product makes of a row."""
        return self.products[0].columns


@dataclasses.dataclass(slots=True)
class _Found:
    products: list[Product] = dataclasses.field(default_factory=list)
    unread: list[NoProduct] = dataclasses.field(default_factory=list)
    lookups: list[Lookup] = dataclasses.field(default_factory=list)
    others: int = 0


def matrices(model: ir.Model, shapes: Shapes) -> Iterator[Matrix]:
    """Yield the floating-point matrices that something is multiplied with, in the order of their first use.

    A matrix is followed through Identity and Transpose. Reads no data. Nested graphs and functions are included.
    """
    owners: dict[ir.Graph, Scope] = {}
    found: dict[ir.Value, _Found] = {}
    for scope in scopes(model):
        owners[scope.graph] = scope
        for node in scope.graph:
            for index, value in enumerate(node.inputs):
                origin = root(value) if value is not None else None
                if origin is not None and len(origin.tensor.shape) == 2:
                    _note(found.setdefault(origin.value, _Found()), scope, node, index, shapes)
    for value, uses in found.items():
        tensor = root(value)
        if (uses.products or uses.unread) and tensor is not None and value.graph in owners:
            parts = tuple(uses.products), tuple(uses.unread), tuple(uses.lookups), uses.others
            yield Matrix(owners[value.graph], value, tensor.tensor, *parts)


def _note(uses: _Found, scope: Scope, node: ir.Node, index: int, shapes: Shapes) -> None:
    read = product(node, scope, shapes) if index == 1 else None
    if is_view(node):
        # What lies behind is noted by itself; but nobody else may see the matrix there.
        uses.others += node.outputs[0].is_graph_output()
    elif isinstance(read, Product):
        uses.products.append(read)
    elif isinstance(read, NoProduct):
        uses.unread.append(read)
    elif is_op(node, "Gather") and index == 0 and not has_references(node) and _looks_rows_up(node):
        uses.lookups.append(Lookup(scope, node))
    else:
        uses.others += 1


def _looks_rows_up(node: ir.Node) -> bool:
    origin = root(node.inputs[0]) if node.inputs[0] is not None else None
    return origin is not None and not origin.transposed and attribute(node, "axis", 0) in (0, -2)


def portions(found: Sequence[Matrix]) -> Iterator[list[Matrix]]:
    """Divide matrices so that the Gram matrices of each portion's inputs fit into memory."""
    portion: list[Matrix] = []
    room = GRAM_BYTES
    for matrix in found:
        size = matrix.inputs**2 * 4
        if portion and size > room:
            yield portion
            portion, room = [], GRAM_BYTES
        portion.append(matrix)
        room -= size
    if portion:
        yield portion


def grams(found: Sequence[Matrix], model: ir.Model, calibration: Calibration) -> dict[ir.Value, Gram]:
    """Run data through the model and return X^T X of what each matrix is first multiplied with.

    Left out are matrices whose input calibration cannot see, because it lies in a nested graph or a function, and those
    whose input took on NaN or infinity.
    """
    names = {matrix.value: name for matrix in found if (name := _observed(matrix))}
    seen = {names[m.value]: Gram(m.inputs) for m in found if m.value in names}
    calibration.observe(model, {name: [gram] for name, gram in seen.items()})
    return {value: seen[name] for value, name in names.items() if seen[name].usable}


def _observed(matrix: Matrix) -> str:
    first = matrix.products[0]
    source = first.node.inputs[0]  # an edit may have moved it since the product was read
    if first.scope.path or source is None or not (source.producer() or source.is_graph_input()):
        return ""
    return source.name or ""
