"""Rounding that makes up for its errors: GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization", 2022).

A matrix W, a row per output channel, is rounded column by column. What a column loses is taken out of the columns that
are still to come, in the proportion that keeps the layer's outputs X W^T closest to what they were. Only the Gram
matrix H = X^T X of the inputs is needed: the loss of a row with error e is e H e^T. Grids are settled before, so that
columns can be rounded in the order of their inputs' size ("act order" with static groups).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.numeric import nbits
from onnxopt.numeric.nbits import BlockGrid, Spec

Array = npt.NDArray[Any]

DAMPING = 0.1
"""Added to the diagonal, as a part of its mean: inputs that hardly occurred must not be trusted. On held-out
sentences the losses of MiniLM's layers were lowest between 0.05 and 0.3, and up to 40% higher at the 0.01 of the
paper."""

STEP = 32
"""Columns rounded before their errors are taken out of all later columns at once."""

LEAF = 128
"""Triangular matrices up to this size are inverted like any other."""

ROWS = 2048
"""Rows worked on at a time, which bounds the memory; they are independent."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rounded:
    """A matrix in codes.

    Attributes:
        codes: uint8, (rows, blocks * block).
        grid: What they stand for.
        loss: Square error of the outputs, summed over the inputs behind the Gram matrix.
        plain_loss: What it would be with every weight rounded to its nearest level.
    """

    codes: Array
    grid: BlockGrid
    loss: float
    plain_loss: float


def quantize(matrix: Array, gram: Array, spec: Spec, grid: BlockGrid | None = None) -> Rounded:
    """Round a matrix so that its products with the inputs behind a Gram matrix change little.

    A row that comes out worse than with every weight rounded to the nearest level is rounded that way instead.

    Args:
        matrix: Floating point, finite, (rows, columns).
        gram: X^T X of the inputs, (columns, columns).
        spec: What kind of grid. Its search weighs each column by the mean square of its input.
        grid: A grid that is settled already.
    """
    rows, columns = matrix.shape
    hessian = gram.astype(np.float64)
    if grid is None:
        grid = nbits.fit(matrix, spec, np.diagonal(hessian).astype(np.float32))
    # Columns with the largest inputs come first, while all others can still make up for them.
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    spread = _spread(hessian[np.ix_(order, order)])
    narrow = hessian.astype(np.float32)
    codes = np.empty((rows, grid.scale.shape[1] * grid.block), np.uint8)
    loss = plain_loss = 0.0
    for start in range(0, rows, ROWS):
        part = slice(start, min(start + ROWS, rows))
        here, original = grid.rows(part), matrix[part].astype(np.float32)
        nearest = nbits.encode(original, here)
        made = nearest.copy()
        made[:, order] = _compensate(original, order, spread, here)
        plain_losses = losses(original - nbits.decode(nearest, here, columns), narrow)
        made_losses = losses(original - nbits.decode(made, here, columns), narrow)
        codes[part] = np.where((made_losses < plain_losses)[:, None], made, nearest)
        loss += float(np.minimum(made_losses, plain_losses).sum())
        plain_loss += float(plain_losses.sum())
    return Rounded(codes, grid, loss, plain_loss)


def losses(error: Array, gram: Array) -> Array:
    """Return e H e^T for each row e of an error of shape (rows, columns), in float64."""
    products: Array = np.multiply(error @ gram.astype(error.dtype, copy=False), error, dtype=np.float64)
    # A sum of squares cannot be negative; its rounding errors can.
    return np.asarray(np.maximum(products.sum(axis=1), 0.0))


def _spread(hessian: Array) -> Array:
    """Return the upper triangular U with U^T U = inverse of the damped H, in float32.

    Row k of U says how the error of column k is spread over the later ones.
    """
    size = len(hessian)
    diagonal = np.diagonal(hessian)
    damped = hessian.copy()
    mean = float(diagonal.mean()) if size else 0.0
    # An input that is always zero says nothing about its column, which is then rounded by itself.
    damped[np.diag_indices(size)] += np.where(diagonal > 0, DAMPING * mean, max(mean, 1.0))
    # H = R R^T with R upper triangular is the Cholesky decomposition in reverse order, and U = R^-1.
    reverse = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return _triangular_inverse(reverse).astype(np.float32)


def _triangular_inverse(upper: Array) -> Array:
    """Invert an upper triangular matrix, half by half: a sixth of the work of inverting any matrix."""
    size = len(upper)
    if size <= LEAF:
        return np.triu(np.linalg.inv(upper))
    half = size // 2
    first, last = _triangular_inverse(upper[:half, :half]), _triangular_inverse(upper[half:, half:])
    result = np.zeros_like(upper)
    result[:half, :half], result[half:, half:] = first, last
    result[:half, half:] = -(first @ upper[:half, half:]) @ last
    return result


def _compensate(matrix: Array, order: Array, spread: Array, grid: BlockGrid) -> Array:
    """Round the columns of some rows one by one; return their codes in this order, (rows, columns)."""
    rows, columns = matrix.shape
    work = np.ascontiguousarray(matrix[:, order].T)
    scale, zero_point = grid.scale.T.astype(np.float32), grid.zero_point.T.astype(np.float32)
    codes = np.empty((columns, rows), np.uint8)
    errors = np.empty((STEP, rows), np.float32)
    top = np.float32((1 << grid.bits) - 1)
    for start in range(0, columns, STEP):
        end = min(start + STEP, columns)
        for k in range(start, end):
            factor, offset = scale[order[k] // grid.block], zero_point[order[k] // grid.block]
            code = np.clip(np.rint(work[k] / factor) + offset, 0, top)
            codes[k] = code
            error = (work[k] - (code - offset) * factor) / spread[k, k]
            errors[k - start] = error
            work[k + 1 : end] -= spread[k, k + 1 : end, None] * error
        work[end:] -= spread[start:end, end:].T @ errors[: end - start]
    return codes.T
