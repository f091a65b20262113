"""Products of an activation with a constant matrix, whichever operator computes them.

MatMul, Gemm, FusedMatMul, and the projections within ONNX Runtime's Attention are read into one form:
y = alpha * x @ W + bias, with W of K rows and N columns, stored as it is or transposed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.shapes import Shapes
from onnxopt.analysis.weights import FLOATS, dtype_name
from onnxopt.graph import (
    Scope,
    attribute,
    constant_array,
    constant_tensor,
    has_references,
    is_op,
    only_use,
    scopes,
)

CONTRIB = "com.microsoft"
LEAST_ROWS, LEAST_COLUMNS = 64, 32
"""Smaller weights gain nothing as integers. Measured on one core with AVX-512 VNNI for 1, 16, 128 and 1024 rows of
activations: from 64 x 32 on 1.03 to 1.25 times as fast as float32; 16 columns .82 to 1.10, 32 rows .87 to 1.2."""
_MOST_BIAS_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True, slots=True)
class Bias:
    """What is added to each row of a product.

    Attributes:
        value: The constant: its last axis counts the columns, the other axes have size 1.
        factor: What it is multiplied by.
        adder: The Add or Sum that adds it; None where the operator of the product does.
    """

    value: ir.Value
    factor: float
    adder: ir.Node | None

    def array(self, columns: int) -> np.ndarray:
        """Return one number per column."""
        tensor = constant_tensor(self.value)
        assert tensor is not None, "a bias is constant"
        row = tensor.numpy().reshape(-1)
        if self.factor != 1.0:
            row = (row.astype(np.float64) * self.factor).astype(row.dtype)
        return np.broadcast_to(row, (columns,))


@dataclasses.dataclass(frozen=True, slots=True)
class Product:
    """y = alpha * x @ W + bias.

    Attributes:
        scope: The graph the product is in.
        node: The node that computes it.
        x: The activation; its last axis has K elements.
        weight: The constant as it is stored: an initializer or the output of a Constant node.
        tensor: Its data, of rank 2.
        transposed: Whether it is stored as N x K.
        views: The Transpose and Identity nodes between the constant and the node.
        alpha: Factor of the product.
        bias: What is added, None without.
    """

    scope: Scope
    node: ir.Node
    x: ir.Value
    weight: ir.Value
    tensor: ir.TensorProtocol
    transposed: bool
    views: tuple[ir.Node, ...]
    alpha: float
    bias: Bias | None

    @property
    def rows(self) -> int:
        """K, the length of the sums."""
        return int(self.tensor.shape.numpy()[1 if self.transposed else 0])

    @property
    def columns(self) -> int:
        """N, the number of output channels."""
        return int(self.tensor.shape.numpy()[0 if self.transposed else 1])

    @property
    def channel_axis(self) -> int:
        """The axis of the stored weight that counts output channels."""
        return 0 if self.transposed else 1

    @property
    def size(self) -> str:
        """Its type and size, e.g. `float32 384 x 1536`."""
        return f"{dtype_name(self.tensor.dtype)} {self.rows} x {self.columns}"

    @property
    def result(self) -> ir.Value:
        """What the product with its bias computes, or the product alone where more is added at once."""
        adder = None if self.bias is None else self.bias.adder
        return adder.outputs[0] if adder is not None and len(adder.inputs) == 2 else self.node.outputs[0]

    @property
    def in_attention(self) -> bool:
        """Whether the node goes on to compute attention from the product."""
        return self.node.op_type == "Attention"


@dataclasses.dataclass(frozen=True, slots=True)
class NoProduct:
    """A node that multiplies by a constant, but not in the form above."""

    scope: Scope
    node: ir.Node
    reason: str


def products(model: ir.Model, shapes: Shapes) -> Iterator[Product | NoProduct]:
    """Yield the products of the whole model, nested graphs and functions included."""
    for scope in scopes(model):
        for node in scope.graph:
            found = product(node, scope, shapes)
            if found is not None:
                yield found


def product(node: ir.Node, scope: Scope, shapes: Shapes) -> Product | NoProduct | None:
    """Read a node.

    Returns:
        The product; why it cannot be read as one although it multiplies by a constant matrix; or None.
    """
    if not (is_op(node, "MatMul", "Gemm") or is_op(node, "FusedMatMul", "Attention", domain=CONTRIB)):
        return None
    if has_references(node):
        return NoProduct(scope, node, "an attribute refers to the function's caller")
    if len(node.inputs) < 2 or node.inputs[0] is None or node.inputs[1] is None:
        return None
    x, operand = node.inputs[0], node.inputs[1]
    if is_op(node, "MatMul") and root(operand) is None and root(x) is not None:
        return NoProduct(scope, node, "the constant is on the left, where rows would need a scale each")
    origin = root(operand)
    if origin is None:
        return None
    tensor = constant_tensor(origin.value)
    if tensor is None:
        return NoProduct(scope, node, "the caller can override its weight, which is also an input of the graph")
    reason = _unfit(node, x, tensor, shapes)
    if reason:
        return NoProduct(scope, node, reason)
    transposed = origin.transposed ^ bool(attribute(node, "transB", 0))
    alpha = 1.0 if node.op_type == "Attention" else float(attribute(node, "alpha", 1.0))
    if not math.isfinite(alpha):
        return NoProduct(scope, node, "its factor alpha is not finite")
    columns = int(tensor.shape.numpy()[0 if transposed else 1])
    bias = _bias(node, columns, shapes)
    if isinstance(bias, str):
        return NoProduct(scope, node, bias)
    return Product(scope, node, x, origin.value, tensor, transposed, origin.views, alpha, bias)


@dataclasses.dataclass(frozen=True, slots=True)
class Root:
    """The stored floating-point tensor that a value is a view of.

    Attributes:
        value: An initializer, which the caller may be able to override, or the output of a Constant node.
        tensor: Its data.
        transposed: Whether the value is its transpose.
        views: The Transpose and Identity nodes in between, from the value backwards.
    """

    value: ir.Value
    tensor: ir.TensorProtocol
    transposed: bool
    views: tuple[ir.Node, ...]


def root(value: ir.Value) -> Root | None:
    """Return the tensor behind a value and nodes that only show it in another way, or None."""
    transposed = False
    views: list[ir.Node] = []
    while True:
        tensor = value.const_value if value.is_initializer() else constant_tensor(value)
        if tensor is not None:
            return Root(value, tensor, transposed, tuple(views)) if tensor.dtype in FLOATS else None
        node = value.producer()
        if node is None or not is_view(node) or node.inputs[0] is None:
            return None
        transposed ^= is_op(node, "Transpose")
        views.append(node)
        value = node.inputs[0]


def is_view(node: ir.Node) -> bool:
    """Whether a node only shows a matrix in another way: Identity, or Transpose of two axes."""
    if has_references(node):
        return False
    return is_op(node, "Identity") or (is_op(node, "Transpose") and tuple(attribute(node, "perm", (1, 0))) == (1, 0))


def _unfit(node: ir.Node, x: ir.Value, tensor: ir.TensorProtocol, shapes: Shapes) -> str | None:
    if len(tensor.shape) != 2:
        return "its weight has not two axes"
    if any(attribute(node, name, 0) for name in ("transA", "transBatchA", "transBatchB")):
        return "it transposes its activation"
    if shapes.rank(x) == 1:
        return "its activation is a vector"
    return None


def _bias(node: ir.Node, columns: int, shapes: Shapes) -> Bias | str | None:
    if node.op_type == "Attention":
        value = node.inputs[2] if len(node.inputs) > 2 else None
        if value is None:
            return None
        return Bias(value, 1.0, None) if _per_column(value, columns, 1) else "its bias is not constant"
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        beta = float(attribute(node, "beta", 1.0))
        if _per_column(node.inputs[2], columns, 2):
            return Bias(node.inputs[2], beta, None)
        return "its bias is not one constant per column"
    return _added(node, columns, shapes)


def _added(node: ir.Node, columns: int, shapes: Shapes) -> Bias | None:
    """Return the bias that the one node behind a product adds."""
    result = node.outputs[0]
    adder = only_use(result)
    if adder is None or not is_op(adder, "Add", "Sum") or len(adder.inputs) < 2 or adder.graph is not node.graph:
        return None
    rank = shapes.rank(result) or 1
    for value in adder.inputs:
        if value is not None and value is not result and _per_column(value, columns, rank):
            return Bias(value, 1.0, adder)
    return None


def _per_column(value: ir.Value, columns: int, rank: int) -> bool:
    """Whether a value is constant and, added to something of this many axes, adds one number to each column."""
    array = constant_array(value, _MOST_BIAS_BYTES)
    if array is None or array.ndim > rank or array.size not in (1, columns):
        return False
    return array.size == 1 or array.shape[-1] == columns


def too_small(item: Product) -> str | None:
    """Return that a product gains nothing from being computed with integers, or None."""
    if item.rows < LEAST_ROWS or item.columns < LEAST_COLUMNS:
        return f"its weight is too small to gain: less than {LEAST_ROWS} x {LEAST_COLUMNS}"
    return None
