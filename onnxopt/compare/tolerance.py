"""How much rounding may change the outputs of a model, derived from data types and depth.

Two graphs that compute the same function differ by rounding. A node rounds its result once, by up to half a unit
in the last place of the result's type; and where it sums many products, it does so in an accumulator (float32 for
types of up to 32 bits, float64 otherwise) in an order that another graph need not share. Such errors are
independent, so along a path of `depth` nodes they add up like a random walk:

    tolerance = SAFETY * sqrt(depth) * (eps(type) / 2 + sqrt(TERMS) / 2 * eps(accumulator))

`type` is the coarsest floating-point type computed in on the way to the output (a weight that is only stored in
float16 does not count). The result is relative to the magnitude of the output. It is a floor for judging, and what
the original itself differs by between the runtime's optimizations off and on is another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import onnx_ir as ir

from onnxopt import graph as graphs

SAFETY = 2.0
"""Rounding errors are not quite independent, and grow in badly conditioned nodes."""

TERMS = 64
"""Products summed one after the other, nominally: kernels sum long products in blocks and lanes.

With this the original models this was tried on differ between optimizations off and on by a tenth of the
tolerance or less, except for badly conditioned ones, which that very difference makes room for.
"""

ITERATIONS = 64
"""How often a Loop, Scan or recurrent layer is taken to repeat: the number is not known before it runs."""

EPSILON: Mapping[ir.DataType, float] = {
    ir.DataType.DOUBLE: 2.0**-52,
    ir.DataType.COMPLEX128: 2.0**-52,
    ir.DataType.FLOAT: 2.0**-23,
    ir.DataType.COMPLEX64: 2.0**-23,
    ir.DataType.FLOAT16: 2.0**-10,
    ir.DataType.BFLOAT16: 2.0**-7,
    ir.DataType.FLOAT8E4M3FN: 2.0**-3,
    ir.DataType.FLOAT8E4M3FNUZ: 2.0**-3,
    ir.DataType.FLOAT8E5M2: 2.0**-2,
    ir.DataType.FLOAT8E5M2FNUZ: 2.0**-2,
    ir.DataType.FLOAT8E8M0: 1.0,
    ir.DataType.FLOAT4E2M1: 2.0**-1,
}
"""Distance from 1 to the next number of a floating-point type."""

_RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
_REPEATING = frozenset({"GRU", "LSTM", "Loop", "RNN", "Scan"})
_SHAPE_ONLY = frozenset({"Shape", "Size"})
_MOVING = frozenset(
    {
        "Concat",
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators that copy elements and round nothing."""


class Rounding(NamedTuple):
    """What rounding may do to a value.

    Attributes:
        depth: Nodes on the longest path to it.
        epsilon: Of the coarsest floating-point type computed in on the way; 0 when none was.
        random: Whether a random operator has a say in it.
    """

    depth: int = 0
    epsilon: float = 0.0
    random: bool = False

    @property
    def tolerance(self) -> float:
        """Allowed deviation relative to the magnitude of the output."""
        epsilon = self.epsilon or EPSILON[ir.DataType.FLOAT]
        accumulator = EPSILON[ir.DataType.DOUBLE if epsilon < 1e-12 else ir.DataType.FLOAT]
        return SAFETY * math.sqrt(max(self.depth, 1)) * (epsilon / 2 + math.sqrt(TERMS) / 2 * accumulator)


def roundings(model: ir.Model) -> dict[str, Rounding]:
    """Return what rounding may do to each output of the model, by name. Costs one walk over the nodes."""
    walk = _Walk(model)
    walk.graph(model.graph)
    return {v.name or "": walk.known.get(v, Rounding()) for v in model.graph.outputs}


class _Walk:
    """Follows depth and types through a graph in topological order."""

    def __init__(self, model: ir.Model) -> None:
        self.known: dict[ir.Value, Rounding] = {}
        self._types: dict[ir.Value, ir.DataType] = {}
        self._functions = model.functions
        self._inside: dict[ir.OperatorIdentifier, Rounding] = {}

    def graph(self, graph: ir.Graph | ir.Function) -> Rounding:
        """Walk over a graph and return the worst of its nodes."""
        worst = Rounding()
        for node in graph:
            here = self._node(node)
            if here != worst:
                worst = _worse(worst, here)
            for value in node.outputs:
                self.known[value] = here
        return worst

    def _node(self, node: ir.Node) -> Rounding:
        before = Rounding()
        for value in node.inputs:
            known = self.known.get(value) if value is not None else None
            if known is not None:
                before = _worse(before, known)
        inside = self._within(node)
        repeats = ITERATIONS if node.op_type in _REPEATING else 1
        random = before.random or inside.random or self._is_random(node)
        return Rounding(
            depth=before.depth + max(1, inside.depth) * repeats,
            epsilon=max(before.epsilon, inside.epsilon, self._epsilon(node)),
            random=random and node.op_type not in _SHAPE_ONLY,
        )

    def _within(self, node: ir.Node) -> Rounding:
        """Return the worst of the bodies a node carries and the function it calls."""
        worst = Rounding()
        for _, body in graphs.bodies(node):
            worst = _worse(worst, self.graph(body))
        identifier = node.op_identifier()
        if identifier not in self._functions:
            return worst
        if identifier not in self._inside:
            self._inside[identifier] = Rounding()  # a function that calls itself is invalid, but must end here
            self._inside[identifier] = self.graph(self._functions[identifier])
        return _worse(worst, self._inside[identifier])

    def _is_random(self, node: ir.Node) -> bool:
        if node.op_type in _RANDOM:
            return True
        return node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None

    def _epsilon(self, node: ir.Node) -> float:
        """Epsilon of the type the node computes in; 0 where it computes nothing from the inputs."""
        dtype = self._dtype(node)
        if dtype is None:
            return 0.0
        for value in node.outputs:
            self._types[value] = dtype
        if node.op_type in _MOVING:
            return 0.0
        if all(v is None or graphs.constant_tensor(v) is not None for v in node.inputs):
            return 0.0
        return EPSILON.get(dtype, 0.0)

    def _dtype(self, node: ir.Node) -> ir.DataType | None:
        """Type of the first output: declared, said by the node, or the coarsest floating-point type going in."""
        if not node.outputs:
            return None
        if node.outputs[0].dtype is not None:
            return node.outputs[0].dtype
        for name in ("to", "dtype"):
            said = node.attributes.get(name)
            if said is not None and not said.is_ref() and said.type == ir.AttributeType.INT:
                return ir.DataType(said.as_int())
        going_in = (self._types.get(v, v.dtype) for v in node.inputs if v is not None)
        floating = [d for d in going_in if d is not None and d in EPSILON]
        return max(floating, key=lambda d: EPSILON[d]) if floating else None


def _worse(one: Rounding, other: Rounding) -> Rounding:
    return Rounding(max(one.depth, other.depth), max(one.epsilon, other.epsilon), one.random or other.random)
