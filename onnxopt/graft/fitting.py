"""Adapters fitted by least squares between the activations of both sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.graft.certificate import Fitted
from onnxopt.graft.reasons import RefusedError
from onnxopt.graft.splice import Fit
from onnxopt.graph import named

_RIDGE = 1e-4
"""Regularization, relative to the mean square of the inputs."""

_HOLD_OUT = 4
"""Every fourth sample judges the fit, where there are as many."""


def fit(adapter: Fit, inputs: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> Fitted:
    """Find the weights of an adapter, and put them in.

    Ridge regression of the targets on the inputs, both centred, over all samples and positions.

    Args:
        adapter: The adapter.
        inputs: What it reads, for each sample: channels along axis 1 for a convolution, along the last axis else.
        targets: What it should give, for each sample.

    Raises:
        RefusedError: If the positions of both sides do not agree.
    """
    axis = 1 if adapter.adapter.kind == "Conv" else -1
    xs = [_rows(x, axis) for x in inputs]
    ys = [_rows(y, axis) for y in targets]
    for x, y in zip(xs, ys, strict=True):
        if len(x) != len(y):
            raise RefusedError(
                "data",
                f"The {adapter.adapter} cannot be fitted: on the same sample the host has {len(x)} positions there and "
                f"the donor {len(y)}.",
            )
    judges = range(0, len(xs), _HOLD_OUT) if len(xs) >= _HOLD_OUT else range(0)
    learnt = [i for i in range(len(xs)) if i not in judges]
    weight, bias = _solve(np.concatenate([xs[i] for i in learnt]), np.concatenate([ys[i] for i in learnt]))
    asked = list(judges) or learnt
    explained = _explained(np.concatenate([xs[i] for i in asked]), np.concatenate([ys[i] for i in asked]), weight, bias)
    kernel = weight.T[:, :, None, None] if adapter.adapter.kind == "Conv" else weight
    _store(adapter.weight, kernel)
    _store(adapter.bias, bias)
    return Fitted(str(adapter.adapter), explained, len(learnt), len(judges))


def _rows(array: np.ndarray, axis: int) -> np.ndarray:
    moved = np.moveaxis(np.asarray(array), axis, -1)
    return moved.reshape(-1, moved.shape[-1]).astype(np.float64)


def _solve(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    centre, target = x.mean(axis=0), y.mean(axis=0)
    x, y = x - centre, y - target
    gram = x.T @ x
    gram[np.diag_indices_from(gram)] += _RIDGE * max(float(np.trace(gram)) / len(gram), np.finfo(np.float64).tiny)
    weight = np.linalg.solve(gram, x.T @ y)
    return weight, target - centre @ weight


def _explained(x: np.ndarray, y: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> float:
    left = float(np.square(x @ weight + bias - y).sum())
    total = float(np.square(y - y.mean(axis=0)).sum())
    return 1.0 - left / total if total else float(left == 0.0)


def _store(value: ir.Value, array: np.ndarray) -> None:
    held = value.const_value
    assert held is not None and value.name is not None, "adapters have weights with names"
    value.const_value = named(ir.tensor(np.ascontiguousarray(array).astype(held.dtype.numpy())), value.name)
