"""Operators that compute each element by itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from onnxopt.training.call import Call, Operator
from onnxopt.training.values import WIDENED, NoCounterpart, torch_dtype


def _plain(function: Callable[..., Any]) -> Operator:
    """Return an operator without attributes."""
    return lambda call, *inputs: function(*inputs)


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """Return an operator of any number of inputs from one of two."""
    return lambda call, *inputs: functools.reduce(function, inputs)


def _legacy_broadcast(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """Return b with the axes that `axis` of opset 6 and older asks for behind it."""
    if call.opset >= 7 or not call.get("broadcast", 0) or call.get("axis") is None:
        return b
    behind = a.ndim - call.get("axis") % a.ndim - b.ndim
    return b.reshape(*b.shape, *([1] * behind))


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda call, a, b: function(a, _legacy_broadcast(call, a, b))


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Divide; integers are cut off towards zero."""
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _power(a: Tensor, b: Tensor) -> Tensor:
    if not a.is_floating_point() and b.is_floating_point():
        return torch.pow(a.to(torch.float64), b).to(a.dtype)
    if b.numel() == 1 and b.ndim <= a.ndim and not b.requires_grad:
        return torch.pow(a, b.item()).to(a.dtype)  # a plain exponent has a gradient at zero
    return torch.pow(a, b).to(a.dtype)


def modulo(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """Remainder with the divisor's sign, or the dividend's with `fmod`."""
    return torch.fmod(a, b) if call.get("fmod", 0) else torch.remainder(a, b)


def hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    """Clip alpha x + beta to 0..1."""
    return torch.clamp(call.get("alpha", 0.2) * x + call.get("beta", 0.5), 0, 1)


def prelu(call: Call, x: Tensor, slope: Tensor) -> Tensor:
    """Scale what is negative by a learnt slope."""
    if slope.ndim == 1 and x.ndim > 2 and call.opset < 7:
        slope = slope.reshape(-1, *([1] * (x.ndim - 2)))
    return torch.where(x < 0, x * slope, x)


def elu(call: Call, x: Tensor) -> Tensor:
    """Scaled exp(x) - 1 below zero."""
    return torch.where(x < 0, call.get("alpha", 1.0) * torch.expm1(torch.clamp(x, max=0)), x)


def selu(call: Call, x: Tensor) -> Tensor:
    """Self-normalizing ELU."""
    alpha, gamma = call.get("alpha", 1.67326319217681884765625), call.get("gamma", 1.05070102214813232421875)
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(torch.clamp(x, max=0)))


def celu(call: Call, x: Tensor) -> Tensor:
    """Continuously differentiable ELU."""
    alpha = call.get("alpha", 1.0)
    return torch.clamp(x, min=0) + torch.clamp(alpha * torch.expm1(torch.clamp(x, max=0) / alpha), max=0)


def shrink(call: Call, x: Tensor) -> Tensor:
    """Move what is outside of -lambd..lambd towards zero, set the rest to zero."""
    lambd, bias = call.get("lambd", 0.5), call.get("bias", 0.0)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, torch.zeros_like(x)))


def gelu(call: Call, x: Tensor) -> Tensor:
    """Gaussian error linear unit."""
    return functional.gelu(x, approximate="tanh" if call.get("approximate", "none") == "tanh" else "none")


def clip(call: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Clip to bounds, which were attributes before opset 11."""
    if call.opset < 11:
        return torch.clamp(x, call.get("min", -math.inf), call.get("max", math.inf))
    if low is not None:
        x = torch.maximum(x, low.to(x.dtype))
    return x if high is None else torch.minimum(x, high.to(x.dtype))


def softsign(x: Tensor) -> Tensor:
    """Return x / (1 + |x|)."""
    return x / (1 + x.abs())


def is_infinite(call: Call, x: Tensor) -> Tensor:
    """Find infinities of the wanted signs."""
    up = torch.isposinf(x) if call.get("detect_positive", 1) else torch.zeros_like(x, dtype=torch.bool)
    down = torch.isneginf(x) if call.get("detect_negative", 1) else torch.zeros_like(x, dtype=torch.bool)
    return up | down


def bitwise_not(call: Call, x: Tensor) -> Tensor:
    """Turn all bits over."""
    if call.node.inputs[0] is not None and call.node.inputs[0].dtype in WIDENED:
        raise NoCounterpart("has unsigned elements that are held in a wider type")
    return torch.bitwise_not(x)


def bit_shift(call: Call, x: Tensor, by: Tensor) -> Tensor:
    """Shift bits of unsigned integers."""
    return x << by if call.get("direction") == "LEFT" else x >> by


def cast(call: Call, x: Tensor) -> Tensor:
    """Convert to another type."""
    to = call.get("to")
    if isinstance(to, str):
        raise NoCounterpart("names its type in words")
    return convert(x, torch_dtype(to))


def convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert; floating point becomes integers towards zero, as in C."""
    if dtype is torch.uint8 and x.is_floating_point():
        x = x.to(torch.int64)
    return x.to(dtype)


def mean(call: Call, *inputs: Tensor) -> Tensor:
    """Average of the inputs."""
    return functools.reduce(torch.add, inputs) / len(inputs)


def dropout(call: Call, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> Any:
    """Pass on: a model in inference form drops nothing."""
    if training is not None and bool(training) and (ratio is None or float(ratio) > 0):
        raise NoCounterpart("drops at random")
    return (x, torch.ones_like(x, dtype=torch.bool)) if call.wants(1) else x


def where(call: Call, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Choose between two."""
    return torch.where(condition, x, y)


OPS: dict[str, Operator] = {
    "Abs": _plain(torch.abs),
    "Neg": _plain(torch.neg),
    "Exp": _plain(torch.exp),
    "Log": _plain(torch.log),
    "Sqrt": _plain(torch.sqrt),
    "Reciprocal": _plain(torch.reciprocal),
    "Floor": _plain(torch.floor),
    "Ceil": _plain(torch.ceil),
    "Round": _plain(torch.round),
    "Sign": _plain(torch.sign),
    "Sin": _plain(torch.sin),
    "Cos": _plain(torch.cos),
    "Tan": _plain(torch.tan),
    "Asin": _plain(torch.asin),
    "Acos": _plain(torch.acos),
    "Atan": _plain(torch.atan),
    "Sinh": _plain(torch.sinh),
    "Cosh": _plain(torch.cosh),
    "Tanh": _plain(torch.tanh),
    "Asinh": _plain(torch.asinh),
    "Acosh": _plain(torch.acosh),
    "Atanh": _plain(torch.atanh),
    "Erf": _plain(torch.erf),
    "Relu": _plain(torch.relu),
    "Sigmoid": _plain(torch.sigmoid),
    "HardSigmoid": hard_sigmoid,
    "HardSwish": lambda call, x: x * torch.clamp(x / 6 + 0.5, 0, 1),
    "LeakyRelu": lambda call, x: functional.leaky_relu(x, call.get("alpha", 0.01)),
    "PRelu": prelu,
    "Elu": elu,
    "Selu": selu,
    "Celu": celu,
    "Softplus": _plain(functional.softplus),
    "Softsign": _plain(softsign),
    "ThresholdedRelu": lambda call, x: torch.where(x > call.get("alpha", 1.0), x, torch.zeros_like(x)),
    "Mish": _plain(functional.mish),
    "Swish": lambda call, x: x * torch.sigmoid(call.get("alpha", 1.0) * x),
    "Gelu": gelu,
    "Shrink": shrink,
    "Add": _binary(torch.add),
    "Sub": _binary(torch.sub),
    "Mul": _binary(torch.mul),
    "Div": _binary(divide),
    "Pow": _binary(_power),
    "Mod": modulo,
    "Max": _folded(torch.maximum),
    "Min": _folded(torch.minimum),
    "Sum": _folded(torch.add),
    "Mean": mean,
    "Equal": _binary(torch.eq),
    "Greater": _binary(torch.gt),
    "Less": _binary(torch.lt),
    "GreaterOrEqual": _plain(torch.ge),
    "LessOrEqual": _plain(torch.le),
    "And": _binary(torch.logical_and),
    "Or": _binary(torch.logical_or),
    "Xor": _binary(torch.logical_xor),
    "Not": _plain(torch.logical_not),
    "BitwiseAnd": _plain(torch.bitwise_and),
    "BitwiseOr": _plain(torch.bitwise_or),
    "BitwiseXor": _plain(torch.bitwise_xor),
    "BitwiseNot": bitwise_not,
    "BitShift": bit_shift,
    "Where": where,
    "Clip": clip,
    "IsNaN": _plain(torch.isnan),
    "IsInf": is_infinite,
    "Cast": cast,
    "CastLike": lambda call, x, like: convert(x, like.dtype),
    "Identity": lambda call, x: x,
    "Dropout": dropout,
}
