"""Values rounded to grids: the pairs of QuantizeLinear and DequantizeLinear that say what to compute with integers.

ONNX Runtime merges the pairs around a node into an 8-bit kernel. Files stay small: zero points are shared, those of
weights are left out, and inner values carry no annotations.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.int8 import leaves_float_weight
from onnxopt.contract import Target
from onnxopt.graph import (
    Names,
    Scope,
    add_constant,
    constant_array,
    constant_tensor,
    insert_before,
    remove_unused,
    replace_value,
)
from onnxopt.numeric import grids
from onnxopt.numeric.grids import Array, Grid

CONTRIB = "com.microsoft"
PER_CHANNEL = 13
"""From this opset on, the standard DequantizeLinear takes a scale per channel."""


class Pairs:
    """Puts pairs into the main graph, one for each value."""

    def __init__(
        self,
        scope: Scope,
        names: Names,
        target: Target,
        grid: Callable[[ir.Value], Grid],
        root: Callable[[ir.Value], ir.Value],
    ) -> None:
        """Prepare; nothing is changed yet.

        Args:
            scope: The main graph.
            names: Where new names come from.
            target: For "cpu", old opsets get scales per channel too, by the runtime's own DequantizeLinear. In newer
                ones biases of convolutions stay in float32, which the runtime rounds when it loads the model: for old
                opsets it would write operators that they lack.
            grid: Returns the grid of a value.
            root: Returns what stands for all values with the same grid.
        """
        self._scope, self._names, self._grid, self._root = scope, names, grid, root
        self._contrib = target == "cpu"
        self._made: dict[ir.Value, ir.Value] = {}
        self._integers: dict[ir.Value, ir.Value] = {}
        self._parameters: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self._zero_points: dict[tuple[str, bytes], ir.Value] = {}
        self._weights: dict[tuple[ir.Value, int, bytes, bool], ir.Value] = {}

    @property
    def per_channel(self) -> bool:
        """Whether weights may have a scale per channel."""
        return self._contrib or self._scope.opset >= PER_CHANNEL

    def is_rounded(self, value: ir.Value) -> bool:
        """Whether the value is rounded to 8 bits."""
        return value in self._made

    def is_restored(self, value: ir.Value) -> bool:
        """Whether the value is what came of rounding another."""
        return any(v is value for v in self._made.values())

    def range(self, value: ir.Value) -> tuple[float, float]:
        """Return the real numbers that the lowest and the highest level of a value stand for."""
        grid = self._grid(value)
        low, high = ((level - int(grid.zero_point)) * float(grid.scale) for level in (0, 255))
        return low, high

    def round(self, value: ir.Value) -> ir.Value:
        """Return a value rounded to its grid, in floating point; everything that uses the value then uses that."""
        known = self._made.get(value)
        if known is not None and _is_made(known):
            return known
        if value in self._integers:
            return self._restore(value)
        if constant_tensor(value) is not None:
            return self._constant(value)
        scale, zero_point = self._parameter(value)
        rounded = self._node("QuantizeLinear", value, f"{value.name}_q", [value, scale, zero_point])
        restored = self._node("DequantizeLinear", value, f"{value.name}_dq", [rounded.outputs[0], scale, zero_point])
        nodes = [rounded, restored]
        if leaves_float_weight(value):
            # ONNX Runtime does not look through it, nor take it out.
            nodes.insert(0, self._node("Max", value, f"{value.name}/Max_output", [value]))
        producer = value.producer()
        if producer is None:
            self._scope.graph.insert_before(self.first, nodes)
        else:
            self._scope.graph.insert_after(producer, nodes)
        replace_value(value, restored.outputs[0])
        for node in nodes:
            _drop_annotations(node.outputs[0])
        nodes[0].replace_input_with(0, value)
        if len(nodes) > 2:
            rounded.replace_input_with(0, nodes[0].outputs[0])
        self._made[value], self._integers[value] = restored.outputs[0], rounded.outputs[0]
        return restored.outputs[0]

    def _restore(self, value: ir.Value) -> ir.Value:
        """Make integers a value again, after nothing used it for a while."""
        integers = self._integers[value]
        node = self._node("DequantizeLinear", value, f"{value.name}_dq", [integers, *self._parameter(value)])
        maker = integers.producer()
        assert maker is not None, "a node computes them"
        self._scope.graph.insert_after(maker, node)
        _drop_annotations(node.outputs[0])
        self._made[value] = node.outputs[0]
        return node.outputs[0]

    def integers(self, value: ir.Value) -> ir.Value:
        """Return the integers that a value is rounded to."""
        if value not in self._integers:
            self.round(value)
        return self._integers[value]

    def adopt(self, value: ir.Value, integers: ir.Value) -> None:
        """Let integers that are computed, on the grid of a value, stand in the place of rounding it.

        Args:
            value: The value; nothing uses it any more.
            integers: The integers.
        """
        rounded = self.integers(value)
        self._integers[value] = integers
        replace_value(rounded, integers)
        maker = rounded.producer()
        assert maker is not None, "QuantizeLinear makes it"
        remove_unused(maker)

    def weight(self, value: ir.Value, integers: Array, grid: Grid, *, plain: bool) -> ir.Value:
        """Return a weight as integers that are restored; layers with the same weight and grid share them.

        Args:
            value: The weight as it is stored.
            integers: What its elements are rounded to.
            grid: What the integers stand for.
            plain: Whether its zero point, 0, may be left out: the rule that makes a kernel of Gemm wants it.
        """
        key = (value, -1 if grid.axis is None else grid.axis, grid.scale.tobytes(), plain)
        if key not in self._weights:
            zero_point = None if plain else grid.zero_point
            self._weights[key] = self.restored(value, integers, grid.scale, zero_point, grid.axis)
        return self._weights[key]

    def bias(self, value: ir.Value, bias: Array, scale: Array, *, of_convolution: bool) -> ir.Value:
        """Return a bias that the 8-bit kernel of a layer adds.

        Args:
            value: What its name is derived from.
            bias: One float64 per output channel.
            scale: The distance between two levels of the sums it is added to: one, or one per channel.
            of_convolution: Whether the layer is a Conv.
        """
        if self._contrib and of_convolution and self._scope.opset >= PER_CHANNEL:
            return self._add(f"{value.name}_float", bias.astype(np.float32))
        integers = np.rint(bias / scale).astype(np.int32)
        return self.restored(value, integers, scale, None, 0 if scale.ndim else None)

    def restored(
        self, value: ir.Value, integers: Array, scale: Array, zero_point: Array | None, axis: int | None
    ) -> ir.Value:
        """Return stored integers in floating point.

        Args:
            value: What names are derived from.
            integers: What is stored.
            scale: One, or one per index of the axis.
            zero_point: Likewise; None for 0.
            axis: The axis; None for one scale.
        """
        inputs: list[ir.Value | None] = [self._add(f"{value.name}_{integers.dtype}", integers)]
        inputs.append(self._add(f"{value.name}_scale", scale))
        if zero_point is not None:
            inputs.append(self._zero_point(zero_point))
        node = self._node("DequantizeLinear", value, f"{value.name}_dq", inputs, axis)
        _drop_annotations(node.outputs[0])
        insert_before(self.first, node)
        return node.outputs[0]

    @property
    def first(self) -> ir.Node:
        """The first node of the graph."""
        return next(iter(self._scope.graph))

    def _constant(self, value: ir.Value) -> ir.Value:
        array, grid = constant_array(value), self._grid(value)
        assert array is not None, "only constants come here"
        made = self.restored(value, grids.quantize(array, grid), grid.scale, grid.zero_point, None)
        self._made[value] = made
        return made

    def _parameter(self, value: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return the scale and the zero point of a value as constants."""
        key = self._root(value)
        if key not in self._parameters:
            grid = self._grid(value)
            self._parameters[key] = (
                self._add(f"{value.name}_scale", grid.scale),
                self._zero_point(grid.zero_point),
            )
        return self._parameters[key]

    def _zero_point(self, integers: Array) -> ir.Value:
        """Return a constant zero point; equal ones are the same."""
        key = (f"{integers.dtype}{integers.shape}", integers.tobytes())
        if key not in self._zero_points:
            self._zero_points[key] = self._add("zero_point", integers)
        return self._zero_points[key]

    def _node(
        self, op_type: str, like: ir.Value, name: str, inputs: list[ir.Value | None], axis: int | None = None
    ) -> ir.Node:
        """Make a node without a name of its own, which nobody would refer to."""
        standard = axis is None or self._scope.opset >= PER_CHANNEL
        if not standard:
            self._scope.opsets.setdefault(CONTRIB, 1)
        attributes = {} if axis is None else {"axis": axis}
        node = ir.node(op_type, inputs, attributes, domain="" if standard else CONTRIB)
        output = node.outputs[0]
        output.name, output.type = self._names.fresh(name), like.type
        output.shape = like.shape.copy() if like.shape is not None else None
        return node

    def _add(self, name: str, array: Array) -> ir.Value:
        return add_constant(self._scope, self._names, name, array, self.first)


def _drop_annotations(value: ir.Value) -> None:
    """Do without the type and shape of an inner value, which follow from its node: files grow by 2% with them."""
    if not value.is_graph_output():
        value.type = value.shape = None


def _is_made(value: ir.Value) -> bool:
    """Whether the node that makes a value is still in a graph."""
    maker = value.producer()
    return maker is not None and maker.graph is not None
