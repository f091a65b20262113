"""Nodes without an 8-bit kernel that do what several nodes with one do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from onnxopt.analysis.int8 import Layer, between, layer
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Target
from onnxopt.graph import Scope, attribute, constant_tensor, has_references, is_op

ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "Relu": (),
    "Sigmoid": (),
    "Tanh": (),
    "LeakyRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "Clip": ("min", "max"),
}
"""What FusedConv may end in -> what its activation_params are."""
CONV_ATTRIBUTES = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")

HARD = {"HardSigmoid": (0.2, 0.5), "HardSwish": (1 / 6, 0.5)}
"""Activations without an 8-bit kernel that consist of nodes with one -> slope and offset by default."""


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One of the nodes that do together what another one does; each but the first is applied to the one before.

    Attributes:
        op: The operator.
        inputs: Its inputs, without what the step before makes.
        attributes: Its attributes.
        numbers: What a Clip bounds by, or the constant factor or term of a Mul or Add.
    """

    op: str
    inputs: tuple[ir.Value | None, ...] = ()
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    numbers: tuple[float, ...] = ()

    @classmethod
    def activation(cls, op: str, parameters: Sequence[float]) -> Step | None:
        """Return an activation that FusedConv has, or None where it is not known."""
        names = ACTIVATIONS.get(op)
        if names is None or len(names) != len(parameters):
            return None
        return (
            cls(op, numbers=tuple(parameters))
            if op == "Clip"
            else cls(op, (), dict(zip(names, parameters, strict=True)))
        )


def apart(node: ir.Node, scope: Scope) -> list[Step] | None:
    """Return the nodes that a FusedConv of the main graph stands for, or None for any other node."""
    if scope.path or node.domain != "com.microsoft" or node.op_type != "FusedConv" or has_references(node):
        return None
    if constant_tensor(node.inputs[1]) is None:
        return None
    steps = [
        Step("Conv", tuple(node.inputs[:3]), {a: attribute(node, a) for a in CONV_ATTRIBUTES if a in node.attributes})
    ]
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        steps.append(Step("Add", (node.inputs[3],)))
    if "activation" in node.attributes:
        found = Step.activation(attribute(node, "activation"), attribute(node, "activation_params", ()))
        if found is None:
            return None
        steps.append(found)
    return steps


def hard_steps(node: ir.Node) -> list[Step] | None:
    """Return the nodes that a HardSigmoid or HardSwish stands for, or None for any other node.

    Rounding to a grid from 0 to 1 includes their Clip, so that three cheap kernels remain. In floating point they would
    take longer than the one.
    """
    if not is_op(node, *HARD) or has_references(node) or node.inputs[0] is None:
        return None
    alpha, beta = HARD[node.op_type]
    if node.op_type == "HardSigmoid":
        alpha, beta = attribute(node, "alpha", alpha), attribute(node, "beta", beta)
    steps = [
        Step("Mul", (node.inputs[0],), numbers=(alpha,)),
        Step("Add", numbers=(beta,)),
        Step("Clip", numbers=(0.0, 1.0)),
    ]
    return steps if node.op_type == "HardSigmoid" else [*steps, Step("Mul", (node.inputs[0],))]


def is_integer(node: ir.Node | None, main: Scope, shapes: Shapes, target: Target) -> bool:
    """Return whether a node of the main graph is one that can be computed with integers, itself or taken apart."""
    if node is None or node.graph is not main.graph:
        return False
    return (
        isinstance(layer(node, main, shapes), Layer)
        or is_op(node, *HARD)
        or between(node, main, shapes, target) is not None
    )


def hard_activations(main: Scope, shapes: Shapes, target: Target) -> list[tuple[ir.Node, list[Step]]]:
    """Return the HardSigmoids and HardSwishes between what is computed with integers, and what they consist of."""
    found = []
    for node in main.graph:
        steps = hard_steps(node)
        if steps is None or shapes.dtype(node.outputs[0]) != ir.DataType.FLOAT or node.outputs[0].is_graph_output():
            continue
        before = node.inputs[0].producer() if node.inputs[0] is not None else None
        if is_op(before, "Gemm") or not is_integer(before, main, shapes, target):
            continue  # a Gemm hands on floating-point numbers
        if all(is_integer(user, main, shapes, target) for user in node.outputs[0].consumers()):
            found.append((node, steps))
    return found
