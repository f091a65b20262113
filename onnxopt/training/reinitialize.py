"""Structure transfer: the graph kept, its parameters as before any training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.graph import all_nodes, is_op
from onnxopt.training.requirement import require_torch

_RECURRENT = ("LSTM", "GRU", "RNN")
_NORMALIZATIONS = (
    "BatchNormalization",
    "LayerNormalization",
    "InstanceNormalization",
    "GroupNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
)


def reinitialize(model: ir.Model, seed: int, *, train: Sequence[str] = (), freeze: Sequence[str] = ()) -> ir.Model:
    """Return a copy of a model whose parameters are random again.

    Weights are normal with the variance that keeps the size of activations (He, arXiv:1502.01852: 2 / fan-in for
    convolutions and products, by the consumer's layout), embeddings normal with deviation 0.02, scales one, biases
    zero. Running statistics of a BatchNorm whose scale is made new become mean 0 and variance 1.

    Args:
        model: The model; it is not changed.
        seed: The same seed gives the same parameters.
        train: Patterns of the names of parameters that are made new; all by default.
        freeze: Patterns of those that stay.

    Raises:
        UsageError: If torch is missing, or a pattern fits nothing.
    """
    require_torch("Starting from new parameters")
    from onnxopt.training.parameters import choose, find_parameters, with_parameters

    parameters = find_parameters(model)
    rng = np.random.default_rng(seed)
    new = {}
    for name in choose(parameters, train, freeze):
        parameter = parameters[name]
        shape = tuple(parameter.tensor.shape.numpy())
        new[name] = _initial(parameter.value, shape, rng)
    for node in all_nodes(model):
        if is_op(node, "BatchNormalization") and node.inputs[1] is not None and node.inputs[1].name in new:
            for value, fresh in zip(node.inputs[3:5], (np.zeros, np.ones), strict=True):
                if value is not None and value.is_initializer() and value.const_value is not None:
                    new[value.name or ""] = fresh(value.const_value.shape.numpy(), np.float32)
    return with_parameters(model, new)


def _initial(value: ir.Value, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Return new contents of a constant, by what uses it."""
    use = next(use for use in value.uses() if use.node.op_type not in ("Shape", "Size"))
    node, index, order = use.node, use.idx, list(range(len(shape)))
    while node.op_type in ("Transpose", "Identity", "Cast", "Reshape") and node.outputs[0].uses():
        if node.op_type == "Transpose":
            perm = node.attributes.get_ints("perm", list(reversed(order)))
            order = [order[axis] for axis in perm] if len(perm) == len(order) else order
        use = next(iter(node.outputs[0].uses()))
        node, index = use.node, use.idx
    if node.op_type in _NORMALIZATIONS:
        scale = index == (2 if node.op_type == "SkipLayerNormalization" else 1)
        return np.ones(shape, np.float32) if scale else np.zeros(shape, np.float32)
    if len(shape) < 2:
        # a scale that was spelled out multiplies; everything else is a bias
        return np.ones(shape, np.float32) if node.op_type == "Mul" else np.zeros(shape, np.float32)
    if node.op_type in ("Gather", "GatherND", "Add", "Mul", "Sub", "Concat", "EmbedLayerNormalization"):
        if max(shape) == math.prod(shape):
            return np.ones(shape, np.float32) if node.op_type == "Mul" else np.zeros(shape, np.float32)
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)
    if node.op_type in _RECURRENT:
        if index == 3:
            return np.zeros(shape, np.float32)
        deviation = 1 / math.sqrt(max(shape[-1], 1))
    else:
        deviation = math.sqrt(2 / max(_fan_in(node, index, [shape[axis] for axis in order]), 1))
    return (deviation * rng.standard_normal(shape)).astype(np.float32)


def _fan_in(node: ir.Node, index: int, shape: Sequence[int]) -> int:
    """Return how many numbers each output is a sum of."""
    if node.op_type in ("Conv", "FusedConv"):
        return math.prod(shape[1:])
    if node.op_type == "ConvTranspose":
        return shape[0] * math.prod(shape[2:]) // max(node.attributes.get_int("group", 1), 1)
    transposed = bool(node.attributes.get_int("transB" if index == 1 else "transA", 0))
    rows = index == 1
    return shape[-2] if rows != transposed else shape[-1]
