"""How fast ONNX Runtime's fused operators are: measured by benchmarks/contrib_ops.py, which writes the table.

Measured with ONNX Runtime 1.32 on one core of an x86-64 machine with AVX-512, for the CPU provider. Other
providers are not in the table, and what is not in it is not used.
"""

from __future__ import annotations

RATIOS: dict[tuple[str, str], float] = {
    ("Attention", "CPUExecutionProvider"): 0.93,
    ("GroupNormalization", "CPUExecutionProvider"): 2.6,
    ("RotaryEmbedding", "CPUExecutionProvider"): 0.34,
    ("com.microsoft.Attention", "CPUExecutionProvider"): 0.99,
    ("com.microsoft.GroupQueryAttention", "CPUExecutionProvider"): 0.94,
    ("com.microsoft.MultiHeadAttention", "CPUExecutionProvider"): 1.02,
    ("com.microsoft.RotaryEmbedding", "CPUExecutionProvider"): 0.34,
    ("com.microsoft.SkipLayerNormalization", "CPUExecutionProvider"): 6.64,
}
"""(operator, execution provider) -> its time by that of the best plain operators for the same thing."""

NOT_SLOWER = 1.03
"""Up to this ratio an operator counts as not slower: it then still saves nodes."""


def ratio(operator: str, provider: str) -> float | None:
    """Return how long an operator takes compared with plain ones, or None where that was not measured."""
    return RATIOS.get((operator, provider))
