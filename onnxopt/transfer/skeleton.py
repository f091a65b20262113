"""A model as its parametric layers and the ways between them: what two exports of a network have in common.

Exporters and optimizers disagree about masks, shapes, the spelling of GELU and of attention, but hardly about which
layer feeds which. So a skeleton has a node for each group of parameters (a linear layer with its bias and what scales
its channels, a normalization's scale and shift, an embedding table), and an edge for each kind of way between two,
labelled with what decides on the way: N a nonlinearity, S a softmax, M0 and M1 the operands of a product of two
activations, C with its offset a concatenation. Everything else on the way is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxopt.transfer.real import Real
from onnxopt.transfer.tensors import Array, Sliced, Store, Tensor

Operand = tuple[ir.Node, int]
"""Where a parameter enters the graph: a node and the index of its input."""

Place = frozenset[tuple[int, str]]
"""Where something stands between layers: the ways that lead to it, as (index of a node, label)."""


@dataclasses.dataclass(frozen=True)
class Edge:
    """A way from one node of the skeleton to another.

    Attributes:
        source: Index of the node it starts from.
        label: What decides on the way.
        gain: Product of the constants that scale the values on the way; None where it is not one number.
    """

    source: int
    label: str
    gain: float | None


@dataclasses.dataclass(frozen=True)
class Member:
    """What a linear layer or a normalization does to its channels after the product.

    Attributes:
        kind: "bias" and "scale" have one vector, "norm" has scale, shift, mean and variance (BatchNormalization).
        parts: The vectors, each of one element per channel.
        epsilon: Added to the variance of "norm".
    """

    kind: Literal["bias", "scale", "norm"]
    parts: tuple[Tensor, ...]
    epsilon: float = 0.0

    def narrowed(self, start: int, stop: int) -> Member:
        """Return the same for some neighbouring channels."""
        return dataclasses.replace(self, parts=tuple(Sliced(p, 0, start, stop) for p in self.parts))

    def affine(self, store: Store) -> tuple[Array, Array]:
        """Return scale and shift as float64."""
        vectors = [p.read(store).astype(np.float64) for p in self.parts]
        if self.kind == "bias":
            return np.ones(()), vectors[0]
        if self.kind == "scale":
            return vectors[0], np.zeros(())
        scale, shift, mean, variance = vectors
        factor = scale / np.sqrt(variance + self.epsilon)
        return factor, shift - mean * factor


@dataclasses.dataclass(eq=False)
class Group:
    """Parameters that belong together, as one node of the skeleton.

    Attributes:
        index: Its place in the skeleton.
        kind: "linear", "conv", "affine", "embedding", or the operator whose operand it is.
        key: What must be equal for two groups to correspond: kind, shape and attributes.
        name: Name of the value or parameter that it is reported under.
        weight: The matrix (contraction, channels), kernel or table; None for "affine".
        channels: The axis of the weight that has an index per channel.
        members: What follows, in order.
        edges: The ways that lead to it.
        onward: Scale and shift that the activation behind it begins with.
        operands: Where its parameters enter the graph.
        output: The value that it computes, where that is one.
    """

    index: int
    kind: str
    key: tuple[object, ...]
    name: str
    weight: Tensor | None = None
    channels: int = 0
    members: list[Member] = dataclasses.field(default_factory=list)
    edges: list[Edge] = dataclasses.field(default_factory=list)
    operands: list[Operand] = dataclasses.field(default_factory=list)
    onward: tuple[float, float] = (1.0, 0.0)
    output: ir.Value | None = None

    def tensors(self) -> Iterator[Tensor]:
        """Yield all parameters."""
        if self.weight is not None:
            yield self.weight
        for member in self.members:
            yield from member.parts

    def leaves(self) -> list[ir.Value]:
        """Return the stored tensors that its parameters come from, each once."""
        return list(dict.fromkeys(leaf for tensor in self.tensors() for leaf in tensor.leaves()))


@dataclasses.dataclass
class Skeleton:
    """The groups of a model, in topological order.

    Attributes:
        real: The model, and its real model, which the groups are of.
        groups: Its groups; inputs and outputs of the model are among them, as kinds "input" and "output".
        clips: Where Clip(x, 0, limit) stands -> the limit.
        grids: Name of integers that take the place of an activation -> where that would stand.
    """

    real: Real
    groups: list[Group]
    clips: dict[Place, float] = dataclasses.field(default_factory=dict)
    grids: dict[str, Place] = dataclasses.field(default_factory=dict)

    @property
    def model(self) -> ir.Model:
        """The real model."""
        return self.real.model

    @property
    def layers(self) -> list[Group]:
        """Those that have parameters."""
        return [g for g in self.groups if g.kind not in ("input", "output")]


def joined(label: str, more: str) -> str:
    """Return the label of a way that goes on; a nonlinearity right after another does not count."""
    if not more or label.endswith(more):
        return label
    return (label + more)[:24]
