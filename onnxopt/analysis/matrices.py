"""Products with a constant matrix, found by the matrix: what the matrix is used for, and what is added behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from onnxopt.analysis.shapes import Shapes
from onnxopt.analysis.weights import FLOATS
from onnxopt.contract import Calibration
from onnxopt.graph import Scope, attribute, constant_tensor, has_references, is_op, only_use, scopes, use_count
from onnxopt.numeric.gram import Gram

GRAM_BYTES = 1 << 30
"""Gram matrices held at the same time; for larger models the data runs through the model several times."""


@dataclasses.dataclass(frozen=True, slots=True)
class Product:
    """A node that multiplies with a constant matrix.

    Attributes:
        scope: The graph of the node.
        node: MatMul, Gemm or com.microsoft.Attention, which projects its input to query, key and value.
        transposed: Whether the matrix is stored as (outputs, inputs) instead of (inputs, outputs).
        bias: A constant vector with a number per output channel that is added; None without.
        result: The value that is the product plus bias.
        refusal: Why it cannot be computed in another way; empty when it can.
    """

    scope: Scope
    node: ir.Node
    transposed: bool
    bias: ir.Value | None
    result: ir.Value
    refusal: str = ""


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
        products: The nodes that multiply with it.
        lookups: The nodes that look rows up in it.
        others: Uses of another kind.
    """

    scope: Scope
    value: ir.Value
    tensor: ir.TensorProtocol
    products: tuple[Product, ...]
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

    def sizes(self, product: Product) -> tuple[int, int]:
        """Return how many outputs and inputs a product has."""
        rows, columns = self.tensor.shape.numpy()
        return (rows, columns) if product.transposed else (columns, rows)


@dataclasses.dataclass(slots=True)
class _Found:
    products: list[Product] = dataclasses.field(default_factory=list)
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
                root = _root(value)
                if root is not None:
                    _note(found.setdefault(root[0], _Found()), scope, node, index, root[1], shapes)
    for value, uses in found.items():
        tensor = _tensor(value)
        if uses.products and tensor is not None and value.graph in owners:
            yield Matrix(owners[value.graph], value, tensor, tuple(uses.products), tuple(uses.lookups), uses.others)


def _tensor(value: ir.Value) -> ir.TensorProtocol | None:
    tensor = value.const_value if value.is_initializer() else constant_tensor(value)
    return tensor if tensor is not None and tensor.dtype in FLOATS and len(tensor.shape) == 2 else None


def _root(value: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """Return the constant matrix behind a value, and whether the value is its transpose."""
    transposed = False
    while value is not None and _tensor(value) is None:
        node = value.producer()
        if node is None or not _is_view(node):
            return None
        transposed ^= is_op(node, "Transpose")
        value = node.inputs[0]
    return None if value is None else (value, transposed)


def _is_view(node: ir.Node) -> bool:
    if has_references(node):
        return False
    return is_op(node, "Identity") or (is_op(node, "Transpose") and attribute(node, "perm", (1, 0)) == (1, 0))


def _note(uses: _Found, scope: Scope, node: ir.Node, index: int, flipped: bool, shapes: Shapes) -> None:
    if _is_view(node):
        # What lies behind is noted by itself; but nobody else may see the matrix there.
        uses.others += node.outputs[0].is_graph_output()
    elif is_op(node, "Gather") and index == 0 and not flipped and not has_references(node):
        if attribute(node, "axis", 0) in (0, -2):
            uses.lookups.append(Lookup(scope, node))
        else:
            uses.others += 1
    elif is_op(node, "MatMul") and index == 1:
        uses.products.append(_matmul(scope, node, flipped, shapes))
    elif is_op(node, "Gemm") and index == 1:
        uses.products.append(_gemm(scope, node, flipped))
    elif is_op(node, "Attention", domain="com.microsoft") and index == 1:
        uses.products.append(_attention(scope, node, flipped))
    else:
        uses.others += 1


def _matmul(scope: Scope, node: ir.Node, transposed: bool, shapes: Shapes) -> Product:
    output, source = node.outputs[0], node.inputs[0]
    rank = None if source is None else shapes.rank(source)
    if rank is None or rank < 2:
        reason = "the number of axes of the input is not known" if rank is None else "the input is a vector"
        return Product(scope, node, transposed, None, output, reason)
    bias = _added(output, _channels(node.inputs[1], 1), rank)
    if bias is None:
        return Product(scope, node, transposed, None, output)
    return Product(scope, node, transposed, bias[0], bias[1].outputs[0])


def _channels(value: ir.Value | None, axis: int) -> int:
    """Return the size of an axis of the constant matrix that a node is given."""
    root = _root(value)
    tensor = None if root is None else _tensor(root[0])
    assert root is not None and tensor is not None, "only asked for constant matrices"
    return int(tensor.shape.numpy()[axis ^ root[1]])


def _added(output: ir.Value, channels: int, rank: int) -> tuple[ir.Value, ir.Node] | None:
    """Return the bias that the only user of a product adds, and that Add."""
    user = only_use(output)
    if user is None or not is_op(user, "Add") or user.graph is not output.graph:
        return None
    other = user.inputs[1] if user.inputs[0] is output else user.inputs[0]
    if other is None or not _is_bias(other, channels, rank):
        return None
    return other, user


def _is_bias(value: ir.Value, channels: int, rank: int) -> bool:
    tensor = constant_tensor(value)
    if tensor is None:
        return False
    shape = tensor.shape.numpy()
    return tensor.size == channels and shape[-1:] == (channels,) and len(shape) <= rank


def _gemm(scope: Scope, node: ir.Node, flipped: bool) -> Product:
    output = node.outputs[0]
    if has_references(node):
        return Product(scope, node, flipped, None, output, "an attribute refers to the function's caller")
    reads_transposed = bool(attribute(node, "transB", 0))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if attribute(node, "transA", 0):
        reason = "the Gemm transposes its input"
    elif attribute(node, "alpha", 1.0) != 1 or (bias is not None and attribute(node, "beta", 1.0) != 1):
        reason = "the Gemm scales its result"
    elif bias is not None and not _is_bias(bias, _channels(node.inputs[1], 0 if reads_transposed else 1), 2):
        reason = "the bias of the Gemm is not a constant with a number per output channel"
    else:
        reason = ""
    return Product(scope, node, flipped ^ reads_transposed, bias, output, reason)


def _attention(scope: Scope, node: ir.Node, transposed: bool) -> Product:
    output = node.outputs[0]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    used = [v for v in node.outputs[1:] if use_count(v) or v.is_graph_output()]
    if has_references(node):
        reason = "an attribute refers to the function's caller"
    elif used or any(v is not None for v in (*node.inputs[4:5], *node.inputs[6:])):
        reason = "the Attention keeps past keys and values"
    elif attribute(node, "do_rotary", 0):
        reason = "the Attention rotates its queries and keys"
    elif bias is not None and constant_tensor(bias) is None:
        reason = "the bias of the Attention is not constant"
    else:
        reason = ""
    return Product(scope, node, transposed, bias, output, reason)


def portions(found: Sequence[Matrix]) -> Iterator[list[Matrix]]:
    """Divide matrices so that the Gram matrices of each portion's inputs fit into memory."""
    portion: list[Matrix] = []
    room = GRAM_BYTES
    for matrix in found:
        size = matrix.sizes(matrix.products[0])[1] ** 2 * 4
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
    seen = {names[m.value]: Gram(m.sizes(m.products[0])[1]) for m in found if m.value in names}
    calibration.observe(model, {name: [gram] for name, gram in seen.items()})
    return {value: seen[name] for value, name in names.items() if seen[name].usable}


def _observed(matrix: Matrix) -> str:
    product = matrix.products[0]
    source = product.node.inputs[0]
    if product.scope.path or source is None or not (source.producer() or source.is_graph_input()):
        return ""
    return source.name or ""
