"""Attention and rotary embeddings of opset 23."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from onnxopt.training.call import Call, Operator


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return [batch, heads, sequence, size] from [batch, sequence, heads * size]."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """Return [batch, sequence, heads * size] from [batch, heads, sequence, size]."""
    return x.transpose(1, 2).flatten(2)


def additive(mask: Tensor, dtype: torch.dtype, hidden: float = -math.inf) -> Tensor:
    """Return a mask as what is added to scores; a boolean one holds where to look."""
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, hidden)


def causal(queries: int, keys: int, offset: int, dtype: torch.dtype, hidden: float = -math.inf) -> Tensor:
    """Return what hides the keys behind each query, the first query standing at key `offset`."""
    seen = torch.arange(keys) <= torch.arange(queries).reshape(-1, 1) + offset
    return additive(seen, dtype, hidden)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Return keys or values with each head repeated for the group of queries that shares it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def attention(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Any:
    """Return softmax(scale Q K^T + mask) V, present keys and values, and the scores where they are wanted."""
    flat = q.ndim == 3
    if flat:
        q = split_heads(q, call.get("q_num_heads"))
        k, v = (split_heads(t, call.get("kv_num_heads")) for t in (k, v))
    past = 0
    if past_k is not None and past_v is not None:
        past = past_k.shape[2]
        k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
    present = k, v
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    bias = _bias(call, q, k, mask, past, lengths)
    scale = call.get("scale") or 1 / math.sqrt(q.shape[-1])
    scores, weights = _weights(call, (q * math.sqrt(scale)) @ (k * math.sqrt(scale)).transpose(-1, -2), bias)
    y = weights @ v
    return join_heads(y) if flat else y, *present, scores


def _bias(call: Call, q: Tensor, k: Tensor, mask: Tensor | None, past: int, lengths: Tensor | None) -> Tensor | None:
    """Return what is added to the scores; None when nothing is hidden."""
    keys = k.shape[2]
    parts = []
    if mask is not None:
        bias = additive(mask, q.dtype)
        if bias.shape[-1] < keys:
            bias = functional.pad(bias, (0, keys - bias.shape[-1]), value=-math.inf)
        parts.append(bias)
    offset: Any = past
    at = torch.arange(keys)
    if lengths is not None:
        lengths = lengths.reshape(-1, 1, 1, 1)
        offset = lengths - q.shape[2]
        parts.append(additive(at < lengths, q.dtype))
    position = torch.arange(q.shape[2]).reshape(-1, 1) + offset
    left, right = call.get("left_window_size", -1), call.get("right_window_size", -1)
    right = 0 if call.get("is_causal", 0) else right
    if right >= 0:
        parts.append(additive(at <= position + right, q.dtype))
    if left >= 0:
        parts.append(additive(at >= position - left, q.dtype))
    return functools.reduce(torch.add, parts) if parts else None


def _weights(call: Call, scores: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what `qk_matmul_output_mode` asks for, and the softmax of the scores."""
    mode, cap = call.get("qk_matmul_output_mode", 0), call.get("softcap", 0.0)
    capped = cap * torch.tanh(scores / cap) if cap else scores
    masked = capped if bias is None else capped + bias
    # a query that may look nowhere gives zeros
    hidden = torch.isneginf(masked).all(dim=-1, keepdim=True)
    weights = torch.softmax(masked.masked_fill(hidden, 0.0), dim=-1).masked_fill(hidden, 0.0)
    return (scores, capped, masked, weights)[mode], weights


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Turn pairs of elements of the last axis by angles.

    Args:
        x: [batch, heads, sequence, size].
        cos: Cosines, that broadcast to [batch, heads, sequence, size / 2].
        sin: Sines, likewise.
        interleaved: Whether neighbours are pairs, rather than halves.
    """
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def rotary_embedding(call: Call, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    """Turn queries or keys by angles that depend on their position (RoPE, arXiv:2104.09864)."""
    flat = x.ndim == 3
    x = split_heads(x, call.get("num_heads")) if flat else x
    size = call.get("rotary_embedding_dim", 0) or x.shape[-1]
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = (t[..., : size // 2].unsqueeze(1) for t in (cos, sin))
    turned = rotate(x[..., :size], cos, sin, interleaved=bool(call.get("interleaved", 0)))
    y = torch.cat([turned, x[..., size:]], dim=-1)
    return join_heads(y) if flat else y


OPS: dict[str, Operator] = {"Attention": attention, "RotaryEmbedding": rotary_embedding}
