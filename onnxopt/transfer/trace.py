"""Reading the chain from stored tensors to an operand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.shapes import Shapes
from onnxopt.graph import RANDOM_OPS, attribute, bodies, constant_scalar, constant_tensor, is_op
from onnxopt.transfer.quantized import Dequantized, along
from onnxopt.transfer.tensors import (
    FLOATS,
    Filled,
    Joined,
    Leaf,
    Sliced,
    Tensor,
    constant_slice,
    constant_split,
    fixed_shape,
    is_same,
    leaf,
    permuted,
    reshaped,
)

_DEPTH = 24
_MOST_SIGNS = 1024
_RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_SCALARS: dict[str, Callable[..., float]] = {
    "Sqrt": lambda a: float(np.sqrt(a)),
    "Reciprocal": lambda a: 1 / a,
    "Neg": lambda a: -a,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: a / b,
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Pow": lambda a, b: float(a**b),
}


class Tracer:
    """Traces operands of one model; every value once."""

    def __init__(self, shapes: Shapes, known: Mapping[ir.Value, Tensor] | None = None) -> None:
        """Take what is known about shapes, and values whose tensors are known."""
        self.shapes = shapes
        self._found: dict[ir.Value, Tensor | None] = dict(known or {})
        self._numbers: dict[ir.Value, float | None] = {}

    def tensor(self, value: ir.Value | None, depth: int = _DEPTH) -> Tensor | None:
        """Return how a value comes from stored tensors, or None when it does not, or in a way that is not known."""
        if value is None or depth == 0:
            return None
        if value not in self._found:
            self._found[value] = leaf(value) or self._computed(value, depth)
        return self._found[value]

    def parameter(self, value: ir.Value | None) -> Tensor | None:
        """Return a traced operand of more than one floating-point number, else None."""
        found = self.tensor(value)
        if found is None or int(np.prod(found.shape)) < 2:
            return None
        if isinstance(found, Leaf):
            tensor = constant_tensor(found.value)
            return found if tensor is not None and tensor.dtype in FLOATS and not _is_signs(tensor) else None
        return found if value is not None and self.shapes.dtype(value) in FLOATS else None

    def is_constant(self, value: ir.Value | None, depth: int = _DEPTH) -> bool:
        """Whether a value is computed from constants alone."""
        if value is None or constant_tensor(value) is not None:
            return True
        node = value.producer()
        if node is None or not node.inputs or depth == 0 or node.op_type in RANDOM_OPS or any(bodies(node)):
            return False
        return all(self.is_constant(v, depth - 1) for v in node.inputs)

    def number(self, value: ir.Value | None, depth: int = _DEPTH) -> float | None:
        """Return the one number that a constant value of one element is, computed where it must be."""
        if value is None or depth == 0:
            return None
        if value not in self._numbers:
            self._numbers[value] = self._number(value, depth)
        return self._numbers[value]

    def _number(self, value: ir.Value, depth: int) -> float | None:
        found = constant_scalar(value)
        node = value.producer()
        if found is not None or node is None:
            return found
        if is_same(node) or is_op(node, *_RESHAPES, "Expand"):
            return self.number(node.inputs[0], depth - 1) if self._is_single(value) else None
        if is_op(node, "DequantizeLinear"):
            code, step, zero = [*(self.number(v, depth - 1) for v in node.inputs), 0.0][:3]
            return None if code is None or step is None or zero is None else (code - zero) * step
        if is_op(node, *_SCALARS):
            operands = [self.number(v, depth - 1) for v in node.inputs]
            if None in operands:
                return None
            try:
                return _SCALARS[node.op_type](*operands)
            except (ArithmeticError, ValueError):
                return None
        content = self.shapes.content(value) if self._is_single(value) else None
        single = content[0] if isinstance(content, tuple) and len(content) == 1 else content
        return float(single) if isinstance(single, int) else None

    def _is_single(self, value: ir.Value) -> bool:
        shape = fixed_shape(value, self.shapes)
        return shape is not None and int(np.prod(shape)) == 1

    def _computed(self, value: ir.Value, depth: int) -> Tensor | None:
        node = value.producer()
        if node is None or not node.inputs:
            return None
        if is_op(node, "Expand"):
            return self._filled(value, node, depth)
        if is_op(node, "DequantizeLinear"):
            return self._dequantized(node, depth)
        if is_op(node, "Mul"):
            return self._scaled(node, depth)
        if is_op(node, "Concat"):
            parts = [self.tensor(v, depth - 1) for v in node.inputs]
            known = [p for p in parts if p is not None]
            if len(known) < len(parts) or not known[0].shape:
                return None
            return Joined(tuple(known), attribute(node, "axis", 0) % len(known[0].shape))
        source = self.tensor(node.inputs[0], depth - 1)
        if source is None:
            return None
        if is_same(node):
            return source
        if is_op(node, "Transpose"):
            return permuted(source, attribute(node, "perm", tuple(reversed(range(len(source.shape))))))
        if is_op(node, *_RESHAPES):
            shape = fixed_shape(value, self.shapes)
            return None if shape is None else reshaped(source, shape)
        if is_op(node, "Split", "Slice"):
            return _part(node, value, source)
        return None

    def _filled(self, value: ir.Value, node: ir.Node, depth: int) -> Tensor | None:
        source, shape = self.tensor(node.inputs[0], depth - 1), fixed_shape(value, self.shapes)
        if shape is None:
            return None
        if source is not None and int(np.prod(source.shape)) == int(np.prod(shape)):
            return reshaped(source, shape)
        number = self.number(node.inputs[0], depth - 1)
        return None if number is None else Filled(number, shape)

    def _dequantized(self, node: ir.Node, depth: int) -> Tensor | None:
        integers, scale = (self.tensor(v, depth - 1) for v in node.inputs[:2])
        given = node.inputs[2] if len(node.inputs) > 2 else None
        zero = self.tensor(given, depth - 1)
        dtype = self._stored_type(node.inputs[0])
        if integers is None or scale is None or dtype is None or (given is not None and zero is None):
            return None
        rank = len(integers.shape)
        axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
        if block:
            return Dequantized(integers, dtype, scale, zero, axis % rank, block)
        if not rank:
            return None
        scale, zero = along(scale, rank, axis), along(zero, rank, axis)
        assert scale is not None
        return Dequantized(integers, dtype, scale, zero)

    def _scaled(self, node: ir.Node, depth: int) -> Tensor | None:
        """Read Mul(Sub(Cast(integers), zero point), scale)."""
        for first, second in (node.inputs, reversed(node.inputs)):
            scale = self.tensor(second, depth - 1)
            cast = None if first is None else first.producer()
            zero = None
            if cast is not None and is_op(cast, "Sub"):
                zero = self.tensor(cast.inputs[1], depth - 1)
                cast = None if cast.inputs[0] is None else cast.inputs[0].producer()
                if zero is None:
                    continue
            if scale is None or cast is None or not is_op(cast, "Cast"):
                continue
            integers, dtype = self.tensor(cast.inputs[0], depth - 1), self._stored_type(cast.inputs[0])
            if integers is not None and dtype is not None and dtype.is_integer():
                return Dequantized(integers, dtype, scale, zero)
        return None

    def _stored_type(self, value: ir.Value | None) -> ir.DataType | None:
        tensor = constant_tensor(value)
        if tensor is not None:
            return tensor.dtype
        return None if value is None else self.shapes.dtype(value)


def _is_signs(tensor: ir.TensorProtocol) -> bool:
    """Whether a short vector consists of both 1 and -1, as what rotary embeddings change signs with."""
    if tensor.size > _MOST_SIGNS:
        return False
    array = tensor.numpy().astype(np.float32)
    return bool((np.abs(array) == 1).all() and (array == 1).any() and (array == -1).any())


def _part(node: ir.Node, value: ir.Value, source: Tensor) -> Tensor | None:
    rank = len(source.shape)
    if not rank:
        return None
    if is_op(node, "Slice"):
        found = constant_slice(node, rank)
        if found is None:
            return None
        axis, start, stop = found
        size = source.shape[axis]
        start, stop = (max(0, min(n + size if n < 0 else n, size)) for n in (start, stop))
        return Sliced(source, axis, start, stop) if start < stop else None
    axis = attribute(node, "axis", 0) % rank
    sizes = constant_split(node, source.shape[axis], len(node.outputs))
    if sizes is None:
        return None
    index = next(i for i, o in enumerate(node.outputs) if o is value)
    return Sliced(source, axis, sum(sizes[:index]), sum(sizes[: index + 1]))
