"""Which function computes which operator."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from onnxopt.graph import STANDARD_DOMAINS
from onnxopt.training.call import Operator
from onnxopt.training.ops import (
    attention,
    contrib,
    control,
    convolution,
    elementwise,
    indexing,
    linear,
    normalization,
    quantized,
    recurrent,
    reductions,
    resize,
    sequences,
    shaping,
    spectra,
)

OPERATORS: Mapping[tuple[str, str], Operator] = MappingProxyType(
    {
        ("", name): function
        for theme in (
            attention,
            control,
            convolution,
            elementwise,
            indexing,
            linear,
            normalization,
            quantized,
            recurrent,
            reductions,
            resize,
            sequences,
            shaping,
            spectra,
        )
        for name, function in theme.OPS.items()
    }
    | {("com.microsoft", name): function for name, function in contrib.OPS.items()}
)
"""(domain, operator) -> function."""


def operator(domain: str, op_type: str) -> Operator | None:
    """Return what computes an operator, or None."""
    return OPERATORS.get(("" if domain in STANDARD_DOMAINS else domain, op_type))
