"""Matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from onnxopt.training.call import Call, Operator


def gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """Return alpha A B + beta C, either matrix transposed if wanted."""
    a = a.T if call.get("transA", 0) else a
    b = b.T if call.get("transB", 0) else b
    y = a @ b
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    y = y if alpha == 1 else (y * alpha).to(y.dtype)
    if c is None or beta == 0:
        return y
    return y + (c if beta == 1 else (c * beta).to(c.dtype))


def matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices, as numpy does."""
    return torch.matmul(a, b)


def einsum(call: Call, *inputs: Tensor) -> Tensor:
    """Sum products as an equation says."""
    return torch.einsum(call.get("equation"), *inputs)


OPS: dict[str, Operator] = {
    "Gemm": gemm,
    "MatMul": matmul,
    "Einsum": einsum,
    "Det": lambda call, x: torch.linalg.det(x),
}
