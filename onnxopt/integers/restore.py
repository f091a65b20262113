"""A weight stored as integers, and the nodes that give it back in floating point."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.weights import Weight
from onnxopt.graph import Names, add_constant, drop_unused_initializers, insert_before, make_node, remove_node
from onnxopt.numeric import grids
from onnxopt.numeric.blocks import along
from onnxopt.numeric.grids import Array
from onnxopt.numeric.layouts import Layout
from onnxopt.numeric.nbits import BlockGrid


@dataclasses.dataclass(frozen=True, slots=True)
class Codes:
    """A weight in codes.

    Attributes:
        layout: Which elements share a scale.
        codes: Of the weight's shape, from 0 on.
        grid: What they stand for.
        dtype: The type to store the codes in; a signed one counts from the middle.
    """

    layout: Layout
    codes: Array
    grid: BlockGrid
    dtype: ir.DataType

    @property
    def signed(self) -> bool:
        """Whether 0.0 is integer 0, so that no zero points are stored."""
        return self.dtype.name.startswith("INT")

    def integers(self, codes: Array) -> Array:
        """Return codes in the type that is stored."""
        middle = 1 << (self.grid.bits - 1)
        shifted = codes.astype(np.int16) - middle if self.signed else codes
        return np.ascontiguousarray(shifted.astype(self.dtype.numpy()))


@dataclasses.dataclass(frozen=True, slots=True)
class Maker:
    """Makes constants and nodes in the place of a weight.

    Attributes:
        weight: The weight.
        names: Where new names come from.
        first: The node that all of them come before.
    """

    weight: Weight
    names: Names
    first: ir.Node

    def constant(self, ending: str, array: Array) -> ir.Value:
        """Add a constant to the weight's graph, its name made of the weight's and an ending."""
        return add_constant(self.weight.scope, self.names, f"{self.weight.value.name}_{ending}", array, self.first)

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        dtype: ir.DataType,
        attributes: Mapping[str, int] | None = None,
    ) -> ir.Node:
        """Make a node whose output has the weight's shape."""
        node = make_node(self.names, op_type, list(inputs), attributes, like=self.weight.value)
        node.outputs[0].type = ir.TensorType(dtype)
        node.outputs[0].shape = ir.Shape(self.weight.tensor.shape.numpy())
        return node


def put(weight: Weight, names: Names, make: Callable[[Maker], Sequence[ir.Node]]) -> None:
    """Let nodes restore a weight, and remove it.

    Args:
        weight: The weight.
        names: Where new names come from.
        make: Makes the nodes; the last one gives the weight.
    """
    value, constant = weight.value, weight.value.producer()
    first = constant if constant is not None else next(iter(weight.scope.graph))
    nodes = make(Maker(weight, names, first))
    for node in nodes:
        insert_before(first, node)
    restored = nodes[-1].outputs[0]
    restored.doc_string = value.doc_string
    restored.metadata_props.update(value.metadata_props)
    value.replace_all_uses_with(restored)
    if constant is not None:
        remove_node(constant)
    else:
        drop_unused_initializers(weight.scope.graph, [value])


def folded(grid: grids.Grid, here: Maker) -> list[ir.Node]:
    """Make the nodes that restore a weight with operators that ONNX Runtime folds when it loads the model.

    They compute in float32 for the narrower types: the CPU has no float16 Mul, so that one would not be folded.
    """
    tensor = here.weight.tensor
    rank, dtype = len(tensor.shape), tensor.dtype
    working = ir.DataType.from_numpy(grid.scale.dtype)
    integers = here.constant(grid.dtype.name, grids.quantize(tensor.numpy(), grid))
    nodes = [here.node("Cast", [integers], working, {"to": working.value})]
    if grid.dtype == np.uint8:
        offset = grid.zero_point.astype(grid.scale.dtype)
        zero_point = here.constant("zero_point", along(offset, grid.axis, rank))
        nodes.append(here.node("Sub", [nodes[-1].outputs[0], zero_point], working))
    scale = here.constant("scale", along(grid.scale, grid.axis, rank))
    nodes.append(here.node("Mul", [nodes[-1].outputs[0], scale], working))
    if working != dtype:
        nodes.append(here.node("Cast", [nodes[-1].outputs[0]], dtype, {"to": dtype.value}))
    return nodes


def dequantized(grid: grids.Grid, here: Maker) -> list[ir.Node]:
    """Make the DequantizeLinear that restores a weight."""
    tensor = here.weight.tensor
    inputs = [
        here.constant(grid.dtype.name, grids.quantize(tensor.numpy(), grid)),
        here.constant("scale", grid.scale),
    ]
    if grid.dtype == np.uint8:
        inputs.append(here.constant("zero_point", grid.zero_point))
    axis = {} if grid.axis is None else {"axis": grid.axis}
    return [here.node("DequantizeLinear", inputs, tensor.dtype, axis)]


def folded_blocks(codes: Codes, here: Maker) -> list[ir.Node]:
    """Like `folded`, with a Reshape before and behind where scales belong to blocks."""
    layout, working, dtype = codes.layout, ir.DataType.FLOAT, here.weight.tensor.dtype
    stored = here.constant(codes.dtype.name.lower(), codes.integers(codes.codes))
    nodes = [here.node("Cast", [stored], working, {"to": working.value})]

    def append(op_type: str, ending: str, array: Array, split: bool) -> None:
        nodes.append(here.node(op_type, [nodes[-1].outputs[0], here.constant(ending, array)], working))
        if split and layout.block:
            nodes[-1].outputs[0].shape = None

    if layout.block:
        append("Reshape", "blocks", np.array(layout.split, np.int64), True)
    if not codes.signed:
        append("Sub", "zero_point", layout.broadcast(codes.grid.zero_point).astype(np.float32), True)
    append("Mul", "scale", layout.broadcast(codes.grid.scale), True)
    if layout.block:
        append("Reshape", "shape", np.array(layout.shape, np.int64), False)
    if working != dtype:
        nodes.append(here.node("Cast", [nodes[-1].outputs[0]], dtype, {"to": dtype.value}))
    return nodes


def dequantized_blocks(codes: Codes, here: Maker) -> list[ir.Node]:
    """Like `dequantized`, with a scale per block."""
    layout = codes.layout
    stored = here.constant(codes.dtype.name.lower(), codes.integers(codes.codes))
    inputs = [stored, here.constant("scale", np.ascontiguousarray(layout.shared(codes.grid.scale)))]
    if not codes.signed:
        inputs.append(here.constant("zero_point", codes.integers(layout.shared(codes.grid.zero_point))))
    attributes = {} if layout.axis is None else {"axis": layout.axis}
    if layout.block:
        attributes["block_size"] = layout.block
    return [here.node("DequantizeLinear", inputs, here.weight.tensor.dtype, attributes)]
