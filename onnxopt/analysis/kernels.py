"""How fast ONNX Runtime's fused operators are: measured by benchmarks/contrib_ops.py, which writes this file."""

from __future__ import annotations

RATIOS: dict[tuple[str, str], float] = {
    ("Attention", "CPUExecutionProvider"): 0.95,
    ("com.microsoft.Attention", "CPUExecutionProvider"): 0.98,
    ("com.microsoft.GroupQueryAttention", "CPUExecutionProvider"): 1.02,
    ("com.microsoft.MultiHeadAttention", "CPUExecutionProvider"): 1.03,
    ("RotaryEmbedding", "CPUExecutionProvider"): 0.5,
    ("com.microsoft.RotaryEmbedding", "CPUExecutionProvider"): 0.5,
    ("com.microsoft.SkipLayerNormalization", "CPUExecutionProvider"): 4.0,
}
"""(operator, execution provider) -> its time by that of the best plain operators for the same thing."""

NOT_SLOWER = 1.03
"""Up to this ratio an operator counts as not slower: it then still saves nodes."""


def ratio(operator: str, provider: str) -> float | None:
    """Return how long an operator takes compared with plain ones, or None where that was not measured."""
    return RATIOS.get((operator, provider))
