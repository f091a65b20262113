"""Normalizations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from onnxopt.training.call import Call, Operator
from onnxopt.training.values import NoCounterpart, normal_axis


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(1, -1, *([1] * (x.ndim - 2)))


def batch_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Any:
    """Normalize channels by fixed statistics."""
    if call.get("training_mode", 0) or call.get("is_test", 1) == 0:
        raise NoCounterpart("is in training form; export the model for inference")
    factor = scale * torch.rsqrt(variance + call.get("epsilon", 1e-5))
    return x * _per_channel(factor, x) + _per_channel(bias - mean * factor, x)


def layer_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
    """Normalize all axes from one on."""
    axis = normal_axis(call.get("axis", -1), x.ndim)
    axes = list(range(axis, x.ndim))
    mean = x.mean(dim=axes, keepdim=True)
    centred = x - mean
    inverse = torch.rsqrt((centred * centred).mean(dim=axes, keepdim=True) + call.get("epsilon", 1e-5))
    y = centred * inverse * scale
    y = y if bias is None else y + bias
    return (y, mean, inverse) if call.wants(1) or call.wants(2) else y


def rms_norm(call: Call, x: Tensor, scale: Tensor, *rest: Any) -> Any:
    """Divide by the root mean square of all axes from one on."""
    axes = list(range(normal_axis(call.get("axis", -1), x.ndim), x.ndim))
    inverse = torch.rsqrt((x * x).mean(dim=axes, keepdim=True) + call.get("epsilon", 1e-5))
    y = x * inverse * scale
    return (y, inverse) if call.wants(1) else y


def instance_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Normalize each channel of each sample."""
    return group_normalized(x, x.shape[1], call.get("epsilon", 1e-5)) * _per_channel(scale, x) + _per_channel(bias, x)


def group_normalized(x: Tensor, groups: int, epsilon: float) -> Tensor:
    """Normalize groups of channels of each sample."""
    flat = x.reshape(x.shape[0], groups, -1)
    centred = flat - flat.mean(dim=2, keepdim=True)
    return (centred * torch.rsqrt((centred * centred).mean(dim=2, keepdim=True) + epsilon)).reshape(x.shape)


def group_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Normalize groups of channels; scale and bias were one per group before opset 21."""
    groups = call.get("num_groups")
    if call.opset < 21:
        each = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    return group_normalized(x, groups, call.get("epsilon", 1e-5)) * _per_channel(scale, x) + _per_channel(bias, x)


def lp_norm(call: Call, x: Tensor) -> Tensor:
    """Divide by the norm along an axis."""
    p, axis = call.get("p", 2), call.get("axis", -1)
    size = x.abs().sum(dim=axis, keepdim=True) if p == 1 else (x * x).sum(dim=axis, keepdim=True).sqrt()
    return torch.where(size == 0, torch.zeros_like(x), x / torch.where(size == 0, torch.ones_like(size), size))


def local_response_norm(call: Call, x: Tensor) -> Tensor:
    """Divide by what neighbouring channels hold."""
    size = call.get("size")
    squares = functional.pad((x * x).movedim(1, -1), ((size - 1) // 2, size - 1 - (size - 1) // 2))
    around = squares.unfold(-1, size, 1).sum(dim=-1).movedim(-1, 1)
    return x / (call.get("bias", 1.0) + call.get("alpha", 1e-4) / size * around) ** call.get("beta", 0.75)


def mean_variance_norm(call: Call, x: Tensor) -> Tensor:
    """Subtract the mean and divide by the deviation."""
    axes = list(call.get("axes") or (0, 2, 3))
    centred = x - x.mean(dim=axes, keepdim=True)
    return centred / ((centred * centred).mean(dim=axes, keepdim=True).sqrt() + 1e-9)


OPS: dict[str, Operator] = {
    "BatchNormalization": batch_norm,
    "LayerNormalization": layer_norm,
    "RMSNormalization": rms_norm,
    "SimplifiedLayerNormalization": rms_norm,
    "InstanceNormalization": instance_norm,
    "GroupNormalization": group_norm,
    "LpNormalization": lp_norm,
    "LRN": local_response_norm,
    "MeanVarianceNormalization": mean_variance_norm,
}
