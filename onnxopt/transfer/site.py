"""One node on integers, and what is put in its place so that a model computes in real numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.shapes import Shapes
from onnxopt.graph import (
    Names,
    Scope,
    cannot_replace,
    constant_array,
    first_output,
    is_op,
    make_node,
    replace_value,
)
from onnxopt.rewrite import Builder
from onnxopt.transfer.quantized import LEVELS, Dequantized, Product
from onnxopt.transfer.real import Grid, Multiple, Real
from onnxopt.transfer.signs import is_signed
from onnxopt.transfer.tensors import Tensor, reshaped
from onnxopt.transfer.trace import Tracer

CLIP_LIMITS_AS_INPUT = 11


class Conversion:
    """What is known while a copy of a model is turned into real numbers, node by node.

    Attributes:
        real: What is known of it.
        tracer: Reads constants.
        floats: Value of integers -> the value in real numbers that they stand for.
        scales: Value of integers -> their scale.
        zeros: Value of integers -> their zero point; None for 0.
        rows: (Rows of a table of integers, their scale) -> the rows in real numbers.
    """

    def __init__(self, real: Real) -> None:
        """Prepare."""
        self.real = real
        self.tracer = Tracer(Shapes(real.model))
        self.floats: dict[ir.Value, ir.Value] = {}
        self.scales: dict[ir.Value, ir.Value] = {}
        self.zeros: dict[ir.Value, ir.Value | None] = {}
        self.rows: dict[tuple[ir.Value, ir.Value | None], ir.Value] = {}
        self._names = Names(real.model)

    def known(self, value: ir.Value | None) -> Tensor | None:
        """Return how a value of the real model comes from stored tensors; None where it does not."""
        found = None if value is None else self.real.tensors.get(value)
        return self.tracer.tensor(value) if found is None else found

    def fresh(self, like: ir.Value, op_type: str, inputs: list[ir.Value | None]) -> ir.Node:
        """Return a new node, in no graph yet."""
        return make_node(self._names, op_type, inputs, like=like)

    def builder(self, node: ir.Node, scope: Scope) -> Builder:
        """Return what makes nodes in front of another."""
        return Builder(scope, self._names, node, first_output(node))


class At:
    """One node of the copy, and what can be put in its place."""

    def __init__(self, conversion: Conversion, node: ir.Node, scope: Scope) -> None:
        """Look at a node."""
        self.conversion, self.node, self.scope = conversion, node, scope
        self.builder = conversion.builder(node, scope)

    def input(self, index: int) -> ir.Value | None:
        """Return an input, None where it is left out."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def activation(self, value: ir.Value | None) -> ir.Value | None:
        """Return what integers computed before stand for; None where that is not known."""
        return None if value is None else self.conversion.floats.get(value)

    def restored(self, integers: ir.Value | None, scale: ir.Value | None, zero: ir.Value | None) -> ir.Value | None:
        """Return what integers computed before stand for with this scale: perhaps a multiple of what was rounded.

        Args:
            integers: The integers.
            scale: What they are scaled by here.
            zero: The zero point here; None for 0.
        """
        known = self.activation(integers)
        if known is None or integers is None or scale is None:
            return known
        conversion = self.conversion
        base = conversion.scales[integers]
        zeros = [np.zeros(()) if z is None else constant_array(z) for z in (conversion.zeros.get(integers), zero)]
        steps = [constant_array(s) for s in (base, scale)]
        if scale is base or steps[0] is None or steps[1] is None or zeros[0] is None or zeros[1] is None:
            return known
        factors = steps[1].astype(np.float64) / steps[0]
        if not np.all(zeros[0] == zeros[1]) or factors.size != 1:
            same = bool(np.all(zeros[0] == zeros[1])) and np.array_equal(steps[0], steps[1])
            return known if same else None
        factor = float(factors.reshape(()))
        if factor == 1:
            return known
        conversion.real.multiples.append(Multiple(scale, base, factor))
        return self.op("Mul", [known, self.builder.constant("factor", np.float32(factor))])

    def operand(self, first: int) -> ir.Value | None:
        """Return an operand given by integers, scale and zero point, from this input on, in real numbers."""
        integers = self.input(first)
        scale, zero = self.input(first + 1), self.input(first + 2)
        if integers is None or self.activation(integers) is not None:
            return self.restored(integers, scale, zero)
        return self.rows(integers, scale, zero) or self.weight(integers, scale, zero, ())

    def rows(self, integers: ir.Value, scale: ir.Value | None, zero: ir.Value | None) -> ir.Value | None:
        """Return rows that are taken from a table of integers in real numbers; None where they are something else."""
        node = integers.producer()
        if node is None or not is_op(node, "Gather", "Reshape", "Squeeze", "Transpose", "Unsqueeze"):
            return None
        known = self.conversion.rows
        if (integers, scale) in known and node.graph is self.node.graph:
            return known[integers, scale]
        source = node.inputs[0]
        inner = self.weight(source, scale, zero, ()) if is_op(node, "Gather") else None
        if inner is None:
            inner = None if source is None else self.rows(source, scale, zero)
        attributes = {n: a.value for n, a in node.attributes.items()}
        if inner is None:
            return None
        known[integers, scale] = self.op(node.op_type, [inner, *node.inputs[1:]], attributes)
        return known[integers, scale]

    def weight(
        self,
        integers: ir.Value | None,
        scale: ir.Value | Product | None,
        zero: ir.Value | None,
        shape: Sequence[int],
    ) -> ir.Value | None:
        """Return constant integers in real numbers.

        Args:
            integers: The integers.
            scale: One number, or as many as `shape` has places.
            zero: The same for zero points; None for 0.
            shape: What scale and zero point have to be reshaped to; one -1 stands for all of their numbers.

        Returns:
            The new value, or None when not all of these are constants.
        """
        tracer = self.conversion.tracer
        stored = tracer.tensor(integers)
        step = scale if isinstance(scale, Product) else tracer.tensor(scale)
        offset = tracer.tensor(zero)
        dtype = None if integers is None else tracer.shapes.dtype(integers)
        if stored is None or step is None or dtype is None or (zero is not None and offset is None):
            return None
        found = Dequantized(stored, dtype, _spread(step, shape), None if offset is None else _spread(offset, shape))
        made = self.op("Cast", [integers], {"to": ir.DataType.FLOAT.value})
        if zero is not None:
            made = self.op("Sub", [made, self._shaped(self.op("Cast", [zero], {"to": 1}), shape, offset)])
        made = self.op("Mul", [made, self._factor(scale, shape, step)])
        made.type, made.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(stored.shape)
        self.conversion.real.tensors[made] = found
        return made

    def _factor(self, scale: ir.Value | Product | None, shape: Sequence[int], step: Tensor) -> ir.Value:
        if not isinstance(scale, Product):
            return self._shaped(scale, shape, step)
        first, second = (self._shaped(next(t.leaves()), shape if t.shape else (), t) for t in scale.factors)
        made = self.op("Mul", [first, second])
        times = np.float32(scale.times)
        return made if times == 1 else self.op("Mul", [made, self.builder.constant("alpha", times)])

    def _shaped(self, value: ir.Value | None, shape: Sequence[int], tensor: Tensor | None) -> ir.Value:
        assert value is not None
        assert tensor is not None
        wanted = _sizes(tensor, shape)
        return value if tensor.shape == wanted else self.op("Reshape", [value, self.builder.ints("shape", wanted)])

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """Add a node in front and return its first output."""
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        return self.builder.op(op_type, given, attributes, domain=domain)

    def attributes(self, *left_out: str) -> dict[str, Any]:
        """Return the attributes of the node but for some."""
        return {n: a.value for n, a in self.node.attributes.items() if n not in left_out}

    def stands_for(self, made: ir.Value, places: dict[int, int]) -> None:
        """Note that operands of a node that was made are operands of this one: its index -> index here."""
        real, new = self.conversion.real, made.producer()
        assert new is not None
        own = next(real.values[o].producer() for o in self.node.outputs if o in real.values)
        assert own is not None
        for index, place in places.items():
            real.operands[new, index] = own, place

    def rounded(self, value: ir.Value, scale: ir.Value | None, zero: ir.Value | None, out: ir.Value) -> None:
        """Let integers with this scale and zero point stand for a value.

        Where their lowest is 0 and the value may be less, that takes the place of a Relu.
        """
        conversion = self.conversion
        offset = constant_array(zero)
        step = constant_array(scale)
        if scale is None or step is None or (zero is not None and offset is None):
            return
        dtype = None if zero is None else conversion.tracer.shapes.dtype(zero)
        dtype = dtype or ir.DataType.UINT8
        if dtype not in LEVELS:
            return
        clips = bool(np.all((0 if offset is None else offset) == LEVELS[dtype][0])) and is_signed(value)
        real = conversion.real
        real.grids.append(Grid(out.name or "", value, scale, zero, dtype, clips))
        if clips:
            value = self._activated(value, real.limits.get(out.name or ""))
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), out.shape
        conversion.floats[out], conversion.scales[out], conversion.zeros[out] = value, scale, zero

    def _activated(self, value: ir.Value, limit: float | None) -> ir.Value:
        if limit is None:
            return self.op("Relu", [value])
        if self.scope.opset < CLIP_LIMITS_AS_INPUT:
            return self.op("Clip", [value], {"min": 0.0, "max": limit})
        ends = [self.builder.constant(n, np.float32(v)) for n, v in (("min", 0.0), ("max", limit))]
        return self.op("Clip", [value, *ends])

    def become(self, old: ir.Value, new: ir.Value) -> None:
        """Put a new value in the place of one of real numbers."""
        real = self.conversion.real
        if cannot_replace(old, new):
            node = self.conversion.fresh(old, "Identity", [new])
            producer = old.producer()
            assert producer is not None
            self.scope.graph.insert_after(producer, node)
            new = node.outputs[0]
        real.values.setdefault(new, real.values[old])
        replace_value(old, new)

    def pass_on(self) -> None:
        """Let the node do to real numbers what it does to integers."""
        floats = self.conversion.floats
        inputs = [v if v is None else floats.get(v, v) for v in self.node.inputs]
        first = self.builder.op(self.node.op_type, inputs, self.attributes(), outputs=len(self.node.outputs))
        producer = first.producer()
        assert producer is not None
        for old, new in zip(self.node.outputs, producer.outputs, strict=True):
            self.hand_on(old, new)

    def hand_on(self, integers: ir.Value, value: ir.Value) -> None:
        """Let integers, on the grid of the first input, stand for a value."""
        source = self.node.inputs[0]
        assert source is not None
        conversion = self.conversion
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), integers.shape
        conversion.floats[integers], conversion.scales[integers] = value, conversion.scales[source]
        conversion.zeros[integers] = conversion.zeros.get(source)


def _sizes(tensor: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    size = int(np.prod(tensor.shape))
    return () if size == 1 else tuple(size if n == -1 else n for n in shape)


def _spread(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    return reshaped(tensor, _sizes(tensor, shape))
