"""Layers whose weight and bias can be fitted: Conv, ConvTranspose, Gemm and MatMul as one kind of problem.

Each computes, at every position of its output, W x + b, where x are the elements of the input that the position
sees. The layers differ in where x is, how the weight is stored, and what holds the bias.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.products import CONTRIB, NoProduct, Product, product
from onnxopt.analysis.shapes import Shapes
from onnxopt.graph import (
    Names,
    Scope,
    add_constant,
    attribute,
    constant_tensor,
    drop_unused_constants,
    has_references,
    is_op,
)
from onnxopt.numeric.least_squares import Change
from onnxopt.repair.windows import Scattered, Windows

Array = np.ndarray[Any, Any]

_SIZES = ("Shape", "Size")
_ACTIVATED = ("FusedConv", "FusedGemm")
MOST_INPUTS = 8192
"""Layers that see more inputs at once are not fitted: their Gram matrix alone would take more than 512 MB."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """A layer that can be fitted.

    Attributes:
        node: The node.
        scope: Its graph.
        x: Its input.
        axis: The axis of the output that counts its channels.
        groups: How many problems there are: the groups of a convolution, 1 otherwise.
        inputs: Elements of the input that one output of a group sees.
        outputs: Output channels of a group.
        takes_bias: Whether it has a bias or can be given one without another operator.
        rows: (input, output, positions) -> the inputs at some positions of the output, (rows, groups, inputs).
        weight: Returns what its inputs are multiplied by, (groups, outputs, inputs).
        replace: Adds a change to weight and bias.
    """

    node: ir.Node
    scope: Scope
    x: ir.Value
    axis: int
    groups: int
    inputs: int
    outputs: int
    takes_bias: bool
    rows: Callable[[Array, tuple[int, ...], Array], Array]
    weight: Callable[[], Array]
    replace: Callable[[Change, Names], None]

    @property
    def output(self) -> ir.Value:
        """What the node computes."""
        return self.node.outputs[0]

    @property
    def channels(self) -> int:
        """Output channels of all groups together."""
        return self.groups * self.outputs

    def at(self, values: Array, positions: Array) -> Array:
        """Return what a value shaped like the output holds at positions, (rows, groups, outputs)."""
        flat = np.moveaxis(values, self.axis, -1).reshape(-1, values.shape[self.axis])
        return flat[positions].reshape(len(positions), self.groups, self.outputs)


def read(node: ir.Node, scope: Scope, shapes: Shapes) -> Layer | str | None:
    """Read a node of the main graph.

    Returns:
        The layer; why it cannot be fitted; or None where the node has no constant weight to fit.
    """
    if is_op(node, *_ACTIVATED, domain=CONTRIB):
        return "an activation is fused into it, so that what it sums up is not seen"
    source = node.inputs[0] if node.inputs else None
    if source is None or (source.producer() is None and not source.is_graph_input()):
        return None
    if is_op(node, "Conv", "ConvTranspose"):
        return _convolution(node, scope)
    if not is_op(node, "MatMul", "Gemm") and not is_op(node, "FusedMatMul", domain=CONTRIB):
        return None
    found = product(node, scope, shapes)
    if isinstance(found, NoProduct):
        return found.reason
    return None if found is None else _matrix(found, shapes)


# Matrices ----------------------------------------------------------------------------------------------------


def _matrix(found: Product, shapes: Shapes) -> Layer | str:
    rank = shapes.rank(found.x)
    if rank is None:
        return "the number of axes of the input is not known"
    reason = _unfit(found.tensor, found.rows, _owned(found))
    if reason:
        return reason
    if found.alpha == 0:
        return "it multiplies its product by 0"

    def rows(x: Array, _: tuple[int, ...], positions: Array) -> Array:
        return x.reshape(-1, 1, x.shape[-1])[positions]

    def weight() -> Array:
        stored = found.tensor.numpy() * found.alpha
        return (stored if found.transposed else stored.T)[None]

    def replace(change: Change, names: Names) -> None:
        _replace_matrix(found, change, names)

    bias = found.bias
    takes_bias = is_op(found.node, "Gemm") if bias is None else bias.factor != 0
    size = (1, found.rows, found.columns)
    return Layer(found.node, found.scope, found.x, rank - 1, *size, takes_bias, rows, weight, replace)


def _unfit(tensor: ir.TensorProtocol, inputs: int, owned: bool) -> str:
    if tensor.dtype != ir.DataType.FLOAT:
        return "its weight is not float32"
    if not owned:
        return "something else uses its weight too"
    if inputs > MOST_INPUTS:
        return f"each of its outputs sees more than {MOST_INPUTS:,} inputs"
    return ""


def _owned(found: Product) -> bool:
    views = found.views[::-1]  # from the weight to the product
    chain = [found.weight, *(n.outputs[0] for n in views)]
    return all(_serves(v, user) for v, user in zip(chain, [*views, found.node], strict=True))


def _serves(value: ir.Value, user: ir.Node) -> bool:
    """Whether a weight is there for one node alone; its shape may be asked for elsewhere."""
    return not value.is_graph_output() and all(u.node is user or is_op(u.node, *_SIZES) for u in value.uses())


def _replace_matrix(found: Product, change: Change, names: Names) -> None:
    weight = change.weight[0] / found.alpha
    stored = found.tensor.numpy()
    made = (stored + (weight if found.transposed else weight.T)).astype(stored.dtype)
    user = found.views[-1] if found.views else found.node
    _replace(user, found.weight, made, found.scope, names)
    bias = found.bias
    if bias is not None and bias.factor != 0:
        array = (bias.array(found.columns).astype(np.float64) + change.bias[0]) / bias.factor
        holder = bias.adder if bias.adder is not None else found.node
        _replace(holder, bias.value, array.astype(stored.dtype), found.scope, names)
    elif bias is None and is_op(found.node, "Gemm"):
        found.node.attributes.pop("beta", None)  # it meant nothing so far
        _give_bias(found.node, change.bias[0].astype(stored.dtype), found.scope, names)


# Convolutions ------------------------------------------------------------------------------------------------


def _convolution(node: ir.Node, scope: Scope) -> Layer | str | None:
    x, weight = node.inputs[:2]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    tensor, added = constant_tensor(weight), constant_tensor(bias)
    if x is None or weight is None or tensor is None:
        return None
    if has_references(node):
        return "an attribute refers to the function's caller"
    first, second, *kernel = tensor.shape.numpy()
    groups, transposed = attribute(node, "group", 1), is_op(node, "ConvTranspose")
    depth, outputs = (first // groups, second) if transposed else (second, first // groups)
    inputs = depth * math.prod(kernel)
    reason = _unfit(tensor, inputs, _serves(weight, node))
    if reason:
        return reason
    if transposed and (
        attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID") or attribute(node, "output_shape")
    ):
        return "the size of its output is given in place of its pads"
    reader = Scattered if transposed else Windows
    rows = reader.of(node, tuple(kernel), groups).rows
    takes_bias = bias is None or added is not None

    def replace(change: Change, names: Names) -> None:
        stored = tensor.numpy()
        made = stored + _as_stored(change.weight, stored.shape, transposed)
        _replace(node, weight, made.astype(stored.dtype), scope, names)
        if bias is None:
            _give_bias(node, change.bias.reshape(-1).astype(stored.dtype), scope, names)
        elif added is not None:
            moved = added.numpy().astype(np.float64) + change.bias.reshape(-1)
            _replace(node, bias, moved.astype(stored.dtype), scope, names)

    def read_weight() -> Array:
        return _from_stored(tensor.numpy(), groups, transposed)

    return Layer(node, scope, x, 1, groups, inputs, outputs, takes_bias, rows, read_weight, replace)


def _from_stored(stored: Array, groups: int, transposed: bool) -> Array:
    """Return the weight of a Conv or a ConvTranspose in shape (groups, outputs, inputs)."""
    if not transposed:
        return stored.reshape(groups, len(stored) // groups, -1)
    depth, outputs = len(stored) // groups, stored.shape[1]
    return np.swapaxes(stored.reshape(groups, depth, outputs, -1), 1, 2).reshape(groups, outputs, -1)


def _as_stored(weight: Array, shape: tuple[int, ...], transposed: bool) -> Array:
    """Return a weight of shape (groups, outputs, inputs) as a Conv or a ConvTranspose stores it."""
    if not transposed:
        return weight.reshape(shape)
    groups, outputs, _ = weight.shape
    return np.swapaxes(weight.reshape(groups, outputs, shape[0] // groups, -1), 1, 2).reshape(shape)


# Constants ---------------------------------------------------------------------------------------------------


def _replace(user: ir.Node, value: ir.Value, array: Array, scope: Scope, names: Names) -> None:
    """Give a node another constant; the old one goes when nothing else uses it."""
    new = add_constant(scope, names, f"{value.name}/repaired", array, user)
    for use in value.uses():
        if use.node is user or is_op(use.node, *_SIZES):
            use.node.replace_input_with(use.idx, new)
    drop_unused_constants([value])


def _give_bias(node: ir.Node, bias: Array, scope: Scope, names: Names) -> None:
    """Give a Conv or a Gemm the bias that it lacks."""
    node.resize_inputs(3)
    output = node.outputs[0].name or node.op_type
    node.replace_input_with(2, add_constant(scope, names, f"{output}/bias", bias, node))
