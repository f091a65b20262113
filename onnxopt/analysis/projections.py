"""Which columns of which matrix Q, K and V are computed with, for those who compute them together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.attention import Heads, Operand
from onnxopt.analysis.dims import Dim
from onnxopt.analysis.layout import Step, is_layout, plan
from onnxopt.analysis.shapes import Shapes
from onnxopt.analysis.views import Axis, Leaf, View, size_of, view
from onnxopt.graph import attribute, constant_tensor, has_references, is_op, use_count


@dataclasses.dataclass(frozen=True, slots=True)
class Projection:
    """x W + b, of which some columns are used.

    Attributes:
        x: What is projected.
        steps: Layout nodes that make x batch x length x features.
        weight: W, features x columns; columns x features when transposed.
        transposed: Whether it is.
        bias: b, or None.
        columns: Which columns are used, in order.
        node: The node that multiplies.
    """

    x: ir.Value
    steps: tuple[Step, ...]
    weight: ir.Value
    transposed: bool
    bias: ir.Value | None
    columns: np.ndarray
    node: ir.Node


def projection(operand: Operand, shapes: Shapes) -> Projection | str:
    """Find the projection that an operand comes from, or return why there is none."""
    heads = operand.root
    source = heads.view.source
    columns = heads.view.columns((*heads.heads, *heads.size))
    product, bias = _product(source, shapes)
    if product is None or columns is None or any(heads.view.starts[:-1]):
        return "Q, K or V is not computed by a matrix product with a constant"
    x, weight = product.inputs[0], product.inputs[1]
    tensor = constant_tensor(weight)
    if x is None or weight is None or tensor is None or len(tensor.shape) != 2:
        return "the weight of Q, K or V is not a constant matrix"
    placed = _placed(x, heads, shapes)
    if placed is None:
        return "what Q, K or V is computed from cannot be arranged as batch x length x features"
    transposed = is_op(product, "Gemm") and bool(attribute(product, "transB", 0))
    return Projection(*placed, weight, transposed, bias, columns, product)


def _product(source: ir.Value, shapes: Shapes) -> tuple[ir.Node | None, ir.Value | None]:
    """Return the MatMul or Gemm that computes a value, and the bias that is added to it."""
    node, bias = source.producer(), None
    if node is not None and is_op(node, "Add"):
        for value, other in (node.inputs, tuple(reversed(node.inputs))):
            if constant_tensor(other) is not None and value is not None:
                node, bias = value.producer(), other
                break
        else:
            return None, None
        if not is_op(node, "MatMul"):
            return None, None
    if node is None or has_references(node) or not is_op(node, "MatMul", "Gemm"):
        return None, None
    if is_op(node, "Gemm"):
        if attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1:
            return None, None
        bias = node.inputs[2] if len(node.inputs) > 2 else None
    shape = shapes.of(source)
    tensor = constant_tensor(bias)
    if bias is not None and (tensor is None or shape is None or tuple(tensor.shape.numpy()) != shape[-1:]):
        return None, None
    return node, bias


def _placed(x: ir.Value, heads: Heads, shapes: Shapes) -> tuple[ir.Value, tuple[Step, ...]] | None:
    """Return a value and the layout nodes that make it batch x length x features."""
    shape = shapes.of(x)
    if shape is None:
        return None
    features: Axis = () if shape[-1] == 1 else (Leaf(len(shape) - 1, 1, shape[-1]),)
    seen = View(x, shape, (heads.batch, heads.length, features), (0,) * len(shape), 1.0, ())
    wanted = seen.rearrangement(seen.axes)
    if wanted is None:
        return None
    steps = plan(wanted)
    if steps == () or not is_layout(x.producer()):
        return None if steps is None else (x, steps)
    through = _through_layout(x, heads, shapes)
    return through if through is not None else None if steps is None else (x, steps)


def _through_layout(x: ir.Value, heads: Heads, shapes: Shapes) -> tuple[ir.Value, tuple[Step, ...]] | None:
    """Do the same from before a reshape of x to two axes."""
    read = view(x, shapes, selections=False, repeats=False, factors=False)
    if read is None or len(read.axes) != 2:
        return None
    rows, features = read.axes
    sizes = (size_of(heads.batch), size_of(heads.length))
    if (heads.batch, heads.length) != (_leaf(0, sizes[1], sizes[0]), _leaf(0, 1, sizes[1])):
        return None
    if tuple(leaf.size for leaf in rows) != tuple(size for size in sizes if size != 1):
        return None
    parts = iter(rows)
    batch, length = (() if size == 1 else (next(parts),) for size in sizes)
    wanted = read.rearrangement((batch, length, features))
    steps = None if wanted is None else plan(wanted)
    return None if steps is None else (read.source, steps)


def _leaf(axis: int, stride: Dim, size: Dim) -> Axis:
    return () if size == 1 else (Leaf(axis, stride, size),)


@dataclasses.dataclass(frozen=True, slots=True)
class Packed:
    """Several projections of one input as a single one.

    Attributes:
        x: The input.
        steps: Layout nodes that make it batch x length x features.
        weight: One of the model's values that holds just the columns, or None.
        bias: The same of the bias.
        parts: The projections.
    """

    x: ir.Value
    steps: tuple[Step, ...]
    weight: ir.Value | None
    bias: ir.Value | None
    parts: tuple[Projection, ...]

    @property
    def has_bias(self) -> bool:
        """Whether any part has a bias."""
        return any(p.bias is not None for p in self.parts)

    def weight_tensor(self) -> ir.LazyTensor:
        """Return the columns of all parts side by side, put together when they are needed."""
        tensors = [constant_tensor(p.weight) for p in self.parts]
        known = [t for t in tensors if t is not None]
        features = known[0].shape.numpy()[1 if self.parts[0].transposed else 0]
        shape = ir.Shape([features, sum(len(p.columns) for p in self.parts)])
        return ir.LazyTensor(functools.partial(_weights, self.parts, known), known[0].dtype, shape)

    def bias_array(self) -> np.ndarray:
        """Return the biases one after the other, zeros for a part that has none."""
        return np.concatenate([_bias(p) for p in self.parts])


def _weights(parts: Sequence[Projection], tensors: Sequence[ir.TensorProtocol]) -> ir.Tensor[np.ndarray]:
    found = []
    for part, tensor in zip(parts, tensors, strict=True):
        array = tensor.numpy()
        found.append((array.T if part.transposed else array)[:, part.columns])
    return ir.Tensor(np.ascontiguousarray(np.concatenate(found, axis=1)))


def _bias(part: Projection) -> np.ndarray:
    tensor = constant_tensor(part.bias)
    if tensor is None:
        weight = constant_tensor(part.weight)
        assert weight is not None
        return np.zeros(len(part.columns), weight.dtype.numpy())
    array: np.ndarray = tensor.numpy()[part.columns]
    return array


def packed(operands: Sequence[Operand], dead: set[ir.Node], shapes: Shapes) -> Packed | str:
    """Pack the projections that Q, K and V come from, or return why they cannot be.

    Args:
        operands: Q, K and V.
        dead: Nodes that go when the attention is replaced; a weight that another node uses is not copied.
        shapes: What is known about shapes.
    """
    found = [projection(o, shapes) for o in operands]
    parts = tuple(p for p in found if isinstance(p, Projection))
    if len(parts) < len(found):
        return next(p for p in found if isinstance(p, str))
    first = parts[0]
    if any(p.x is not first.x or p.steps != first.steps for p in parts):
        return "Q, K and V are not computed from the same input"
    columns = np.concatenate([p.columns for p in parts])
    one = all(p.weight is first.weight and p.bias is first.bias for p in parts) and not first.transposed
    tensor = constant_tensor(first.weight)
    if one and tensor is not None and np.array_equal(columns, np.arange(tensor.shape.numpy()[1])):
        return Packed(first.x, first.steps, first.weight, first.bias, parts)
    if any(p.node not in dead or use_count(p.weight) != _uses_in(p.weight, dead) for p in parts):
        return "a weight of Q, K or V is used elsewhere too, and would be stored twice"
    return Packed(first.x, first.steps, None, None, parts)


def _uses_in(weight: ir.Value, dead: set[ir.Node]) -> int:
    return sum(use.node in dead for use in weight.uses())
