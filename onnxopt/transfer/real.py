"""A model as it computes in real numbers: without the rounding of activations, with weights as integers stand for them.

Quantized forms differ in how they spell a layer (MatMulInteger with what scales its sums, QLinearConv, pairs of
QuantizeLinear and DequantizeLinear) and agree in what it computes but for rounding. Here they become one form, that of
the model they were made from, in which layers are found, matched and compared. Parameters are written into the
integers of the model itself.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnxopt.transfer.quantized import Product
from onnxopt.transfer.tensors import Tensor


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where activations are rounded.

    Attributes:
        name: Of the integers.
        value: What is rounded, in the real model.
        scale: Of the integers, in the real model too.
        zero: Their zero point; None for 0.
        dtype: Their type.
        clips: Whether the lowest level, 0, stands in for an activation that was left out.
    """

    name: str
    value: ir.Value
    scale: ir.Value
    zero: ir.Value | None
    dtype: ir.DataType
    clips: bool


@dataclasses.dataclass(frozen=True)
class Sums:
    """A stored scale of a bias: the product of those of a layer's input and weight.

    Attributes:
        scale: The stored one, in the model itself.
        product: What it has to be, by tensors of the real model.
    """

    scale: ir.Value
    product: Product


@dataclasses.dataclass(frozen=True)
class Multiple:
    """A second scale of the same integers, which then stand for a multiple of what was rounded.

    Attributes:
        scale: The second one, in the real model.
        base: That of rounding, in the real model too.
        factor: By how much the second one is larger.
    """

    scale: ir.Value
    base: ir.Value
    factor: float


@dataclasses.dataclass
class Real:
    """The real model of a model.

    Attributes:
        original: The model.
        model: The same in real numbers; the model itself where nothing is computed with integers.
        values: Value of the real model -> the same value of the model; those that are missing are no copies.
        operands: Operand of a node that was made here -> that of the model it stands for.
        tensors: Value of the real model -> how it comes from stored tensors, where integers were restored here.
        grids: Where activations are rounded.
        sums: Scales of biases that follow from others.
        multiples: Scales of activations that follow from others.
        limits: Of activations that grids take the place of, by the name of their integers.
    """

    original: ir.Model
    model: ir.Model
    values: dict[ir.Value, ir.Value] = dataclasses.field(default_factory=dict)
    operands: dict[tuple[ir.Node, int], tuple[ir.Node, int]] = dataclasses.field(default_factory=dict)
    tensors: dict[ir.Value, Tensor] = dataclasses.field(default_factory=dict)
    grids: list[Grid] = dataclasses.field(default_factory=list)
    sums: list[Sums] = dataclasses.field(default_factory=list)
    multiples: list[Multiple] = dataclasses.field(default_factory=list)
    limits: dict[str, float] = dataclasses.field(default_factory=dict)

    def value(self, value: ir.Value) -> ir.Value:
        """Return the model's value of a value of the real model.

        Raises:
            KeyError: If there is none.
        """
        return value if self.model is self.original else self.values[value]

    def operand(self, node: ir.Node, index: int) -> tuple[ir.Node, int] | None:
        """Return where in the model an operand of the real model is; None where it is not as it is stored."""
        if self.model is self.original:
            return node, index
        if (node, index) in self.operands:
            return self.operands[node, index]
        own = next((self.values[o].producer() for o in node.outputs if o in self.values), None)
        return (own, index) if own is not None and own.op_type == node.op_type else None
