"""Which layers of a model a BatchNormalization can be put behind, and which it has."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx_ir as ir

from onnxopt.errors import UsageError
from onnxopt.graph import attribute, is_op
from onnxopt.registry import nearest
from onnxopt.training.trainable import Trainable

_LAYERS = ("Conv", "ConvTranspose", "Gemm")

_NORMALIZES = ("BatchNormalization", "InstanceNormalization", "GroupNormalization", "LayerNormalization")


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """A layer whose output has channels along axis 1, and whose parameters can take up a factor and a term of each.

    Attributes:
        node: The node.
        output: Name of its output.
        weight: Name of its weights.
        bias: Name of its bias.
        channels: How many there are.
        axis: The axis of the weights that counts them.
        gain: What the node multiplies its bias by.
        depth: How many layers lie behind it.
    """

    node: ir.Node
    output: str
    weight: str
    bias: str
    channels: int
    axis: int
    gain: float
    depth: int


@dataclasses.dataclass(frozen=True, slots=True)
class Present:
    """A BatchNormalization of the graph.

    Attributes:
        output: Name of its output.
        mean: Name of the constant with its means.
        variance: Name of the constant with its variances.
    """

    output: str
    mean: str
    variance: str


def layers_without(model: ir.Model, trained: Mapping[str, Trainable]) -> Iterator[Layer]:
    """Yield the layers that a BatchNormalization can be put behind and folded into again.

    Weights and bias must be trained, both, and used by nothing else; none may be a codebook, whose values must stay
    equal; and no normalization may follow already.

    Args:
        model: The model; its main graph is looked at.
        trained: What is trained.
    """
    for node in model.graph:
        if not is_op(node, *_LAYERS) or len(node.inputs) < 3:
            continue
        weight, bias = node.inputs[1], node.inputs[2]
        if weight is None or bias is None or not all(_is_own(value, trained) for value in (weight, bias)):
            continue
        if any(is_op(use.node, *_NORMALIZES) for use in node.outputs[0].uses()):
            continue
        axis = _channel_axis(node)
        shapes = (trained[weight.name or ""].leaf.shape, trained[bias.name or ""].leaf.shape)
        gain = float(attribute(node, "beta", 1.0)) if is_op(node, "Gemm") else 1.0
        if axis is None or gain == 0 or shapes[1].numel() != shapes[0][axis] or shapes[1][-1] != shapes[0][axis]:
            continue
        name = weight.name or ""
        yield Layer(
            node, node.outputs[0].name or "", name, bias.name or "", shapes[0][axis], axis, gain, trained[name].depth
        )


def chosen(layers: Iterable[Layer], patterns: Sequence[str]) -> list[Layer]:
    """Return the layers whose weights fit a pattern; without patterns all but the last ones, whose outputs are scores.

    Raises:
        UsageError: If a pattern fits nothing, or there is no layer.
    """
    layers = list(layers)
    names = [layer.weight for layer in layers]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            plain = re.sub(r"[*?\[\]]", "", pattern)
            raise UsageError(
                f'batchnorm_behind "{pattern}" fits no weights of a Conv or Gemm that a BatchNormalization can be put '
                f"behind.{nearest(plain, names)}",
                "batchnorm_behind",
            )
    found = [
        layer
        for layer in layers
        if (any(fnmatch.fnmatchcase(layer.weight, p) for p in patterns) if patterns else layer.depth > 0)
    ]
    if not found:
        raise UsageError(
            "There is no layer that a BatchNormalization can be put behind: that takes a Conv or Gemm before the last "
            "one whose weights and bias are trained and used by nothing else, without a normalization behind it.",
            "batchnorm",
        )
    return found


def present(model: ir.Model) -> list[Present]:
    """Return the BatchNormalizations of the main graph whose statistics are constants of their own."""
    found = []
    for node in model.graph:
        if not is_op(node, "BatchNormalization") or len(node.inputs) < 5 or len(node.outputs) > 1:
            continue
        mean, variance = node.inputs[3], node.inputs[4]
        if all(v is not None and _is_constant(v) and len(v.uses()) == 1 for v in (mean, variance)):
            assert mean is not None and variance is not None
            found.append(Present(node.outputs[0].name or "", mean.name or "", variance.name or ""))
    return found


def _is_own(value: ir.Value, trained: Mapping[str, Trainable]) -> bool:
    """Whether a value is trained as it is, for one node alone."""
    found = trained.get(value.name or "")
    return found is not None and found.index is None and len(value.uses()) == 1


def _is_constant(value: ir.Value) -> bool:
    return value.is_initializer() and not value.is_graph_input() and not value.is_graph_output()


def _channel_axis(node: ir.Node) -> int | None:
    """Return the axis of a layer's weights that counts the channels of its output."""
    if is_op(node, "Gemm"):
        return 0 if attribute(node, "transB", 0) else 1
    if is_op(node, "Conv"):
        return 0
    return 1 if attribute(node, "group", 1) == 1 else None
