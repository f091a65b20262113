"""Operators of com.microsoft that the targets of onnxopt write, or that ONNX Runtime leaves in saved models."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from onnxopt.training.call import Call, Operator
from onnxopt.training.ops.attention import additive, causal, join_heads, rotate, split_heads
from onnxopt.training.ops.convolution import convolve, max_pool
from onnxopt.training.ops.linear import gemm
from onnxopt.training.ops.normalization import layer_norm, rms_norm
from onnxopt.training.ops.quantized import dequantize, quantize
from onnxopt.training.values import NoCounterpart

_HIDDEN = -10000.0
"""What these attentions add to the scores of keys that are hidden, unless an attribute says otherwise."""


def _activation(call: Call, y: Tensor) -> Tensor:
    """Apply the activation that a fused node carries."""
    name, parameters = call.get("activation", ""), list(call.get("activation_params") or ())
    alpha = parameters[0] if parameters else call.get("activation_alpha")
    if name in ("", "Identity"):
        return y
    if name in ("Relu", "Tanh", "Sigmoid"):
        return {"Relu": torch.relu, "Tanh": torch.tanh, "Sigmoid": torch.sigmoid}[name](y)
    if name == "LeakyRelu":
        return functional.leaky_relu(y, 0.01 if alpha is None else alpha)
    if name == "Clip" and len(parameters) == 2:
        return y.clamp(parameters[0], parameters[1])
    if name == "HardSigmoid" and len(parameters) == 2:
        return torch.clamp(parameters[0] * y + parameters[1], 0, 1)
    raise NoCounterpart(f'has the activation "{name}"')


def fused_conv(call: Call, x: Tensor, w: Tensor, b: Tensor | None = None, z: Tensor | None = None) -> Tensor:
    """Convolve, add, apply an activation."""
    y = convolve(call, x, w, b)
    return _activation(call, y if z is None else y + z)


def fused_gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """Gemm with an activation."""
    return _activation(call, gemm(call, a, b, c))


def fused_matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices, transposed and scaled if wanted."""
    if call.get("transBatchA", 0) or call.get("transBatchB", 0):
        raise NoCounterpart("transposes the batch")
    a = a.transpose(-1, -2) if call.get("transA", 0) and a.ndim > 1 else a
    b = b.transpose(-1, -2) if call.get("transB", 0) and b.ndim > 1 else b
    return (a @ b) * call.get("alpha", 1.0)


def bias_gelu(call: Call, x: Tensor, bias: Tensor) -> Tensor:
    """GELU of x + bias."""
    return functional.gelu(x + bias)


def fast_gelu(call: Call, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU by tanh of x + bias."""
    return functional.gelu(x if bias is None else x + bias, approximate="tanh")


def quick_gelu(call: Call, x: Tensor) -> Tensor:
    """Return x sigmoid(alpha x)."""
    return x * torch.sigmoid(call.get("alpha", 1.702) * x)


def skip_layer_norm(
    call: Call, x: Tensor, skip: Tensor, gamma: Tensor, beta: Tensor | None = None, bias: Tensor | None = None
) -> Any:
    """Layer normalization of a sum; the sum is the fourth output."""
    total = x + skip if bias is None else x + skip + bias
    return _normalized(call, total, gamma, beta)


def _normalized(call: Call, total: Tensor, gamma: Tensor, beta: Tensor | None) -> tuple[Any, ...]:
    mean = total.mean(dim=-1, keepdim=True)
    inverse = torch.rsqrt(((total - mean) ** 2).mean(dim=-1, keepdim=True) + call.get("epsilon", 1e-12))
    y = (total - mean) * inverse * gamma
    return y if beta is None else y + beta, mean, inverse, total


def skip_rms_norm(call: Call, x: Tensor, skip: Tensor, gamma: Tensor, bias: Tensor | None = None) -> Any:
    """RMS normalization of a sum; the sum is the fourth output."""
    total = x + skip if bias is None else x + skip + bias
    inverse = torch.rsqrt((total * total).mean(dim=-1, keepdim=True) + call.get("epsilon", 1e-12))
    return total * inverse * gamma, None, inverse, total


def embed_layer_norm(
    call: Call,
    ids: Tensor,
    segments: Tensor | None,
    words: Tensor,
    positions: Tensor,
    segment_table: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Any:
    """Sum of word, position and segment embeddings, normalized; then how many tokens are no padding."""
    ids = ids.to(torch.int64)
    places = torch.arange(ids.shape[1]) if position_ids is None else position_ids.to(torch.int64)
    total = words[ids] + positions[places]
    if segments is not None and segment_table is not None:
        total = total + segment_table[segments.to(torch.int64)]
    y, _, _, total = _normalized(call, total, gamma, beta)
    if call.get("mask_index_type", 1 if mask is not None else 0) and mask is not None:
        lengths = mask.sum(dim=1).to(torch.int32)
    else:
        lengths = torch.zeros(ids.shape[0], dtype=torch.int32)
    return y, lengths, total


def _key_mask(call: Call, mask: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """Return what hides keys: [batch, 1, 1 or queries, keys]."""
    hidden = call.get("mask_filter_value", _HIDDEN)
    if mask.ndim == 1:
        return additive(torch.arange(keys) < mask.reshape(-1, 1, 1, 1), dtype, hidden)
    if mask.ndim == 2:
        return additive(mask[:, None, None, :] != 0, dtype, hidden)
    if mask.ndim == 3:
        return additive(mask[:, None, :, :] != 0, dtype, hidden)
    raise NoCounterpart(f"has a mask of {mask.ndim} axes")


def _attend(call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, past: int) -> Tensor:
    """Return softmax(scale Q K^T + masks) V with heads joined; all are [batch, heads, sequence, size]."""
    scale = call.get("scale") or 1 / math.sqrt(q.shape[-1])
    scores = (q * scale) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores + _key_mask(call, mask, k.shape[2], q.dtype)
    if call.get("unidirectional", 0):
        hidden = call.get("mask_filter_value", _HIDDEN)
        scores = scores + causal(q.shape[2], k.shape[2], past, q.dtype, min(hidden, _HIDDEN))
    return join_heads(torch.softmax(scores, dim=-1) @ v)


def attention(
    call: Call,
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    mask: Tensor | None = None,
    past: Tensor | None = None,
    bias: Tensor | None = None,
    length: Tensor | None = None,
) -> Any:
    """Self-attention with the projection of queries, keys and values inside."""
    if length is not None or call.get("do_rotary", 0) or call.get("past_present_share_buffer", 0):
        raise NoCounterpart("keeps its past in a shared buffer, or rotates")
    projected = x @ w if b is None else x @ w + b
    sizes = list(call.get("qkv_hidden_sizes") or [w.shape[1] // 3] * 3)
    q, k, v = (split_heads(t, call.get("num_heads")) for t in projected.split(sizes, dim=-1))
    before = 0
    if past is not None:
        before = past.shape[3]
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
    y = _attend(call, q, k, v, mask, bias, before)
    return (y, torch.stack([k, v])) if call.wants(1) else y


def multi_head_attention(
    call: Call,
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    b: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
    *rest: Tensor | None,
) -> Any:
    """Attention on projections that are there already."""
    heads = call.get("num_heads")
    if any(t is not None for t in rest):
        raise NoCounterpart("keeps its past in a shared buffer")
    if k is None or v is None or q.ndim != 3:
        raise NoCounterpart("takes its projections packed")
    if b is not None:
        width = q.shape[-1]
        q = q + b[:width]
        if k.ndim == 3:
            k, v = k + b[width : width + k.shape[-1]], v + b[width + k.shape[-1] :]
    q = split_heads(q, heads)
    k, v = (t if t.ndim == 4 else split_heads(t, heads) for t in (k, v))
    past = 0
    if past_k is not None and past_v is not None:
        past = past_k.shape[2]
        k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
    y = _attend(call, q, k, v, mask, bias, past)
    return (y, k, v) if call.wants(1) or call.wants(2) else y


def rotary_embedding(call: Call, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys by angles that depend on their position."""
    flat = x.ndim == 3
    size = call.get("rotary_embedding_dim", 0) or 2 * cos.shape[-1]
    heads = call.get("num_heads", 0) or (x.shape[-1] // size if flat else x.shape[1])
    x = split_heads(x, heads) if flat else x
    if positions.numel() == 1:
        positions = positions.reshape(1, 1) + torch.arange(x.shape[2])
    cos, sin = (t[positions.to(torch.int64)].unsqueeze(1) for t in (cos, sin))
    scale = call.get("scale", 1.0)
    turned = rotate(x[..., :size] * scale, cos, sin, interleaved=bool(call.get("interleaved", 0)))
    y = torch.cat([turned, x[..., size:]], dim=-1)
    return join_heads(y) if flat else y


def max_pool_last(call: Call, x: Tensor) -> Tensor:
    """Return the largest element of each window; channels come last."""
    y: Tensor = max_pool(call, x.movedim(-1, 1))
    return y.movedim(1, -1)


OPS: dict[str, Operator] = {
    "QuantizeLinear": quantize,
    "DequantizeLinear": dequantize,
    "NhwcMaxPool": max_pool_last,
    "FusedConv": fused_conv,
    "FusedGemm": fused_gemm,
    "FusedMatMul": fused_matmul,
    "Gelu": lambda call, x: functional.gelu(x),
    "BiasGelu": bias_gelu,
    "FastGelu": fast_gelu,
    "QuickGelu": quick_gelu,
    "LayerNormalization": layer_norm,
    "SimplifiedLayerNormalization": rms_norm,
    "SkipLayerNormalization": skip_layer_norm,
    "SkipSimplifiedLayerNormalization": skip_rms_norm,
    "EmbedLayerNormalization": embed_layer_norm,
    "Attention": attention,
    "MultiHeadAttention": multi_head_attention,
    "RotaryEmbedding": rotary_embedding,
}
