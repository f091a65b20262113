"""Resize and Upsample, axis by axis, as a weighted sum of elements of the input."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from onnxopt.training.call import Call, Operator
from onnxopt.training.values import NoCounterpart, ints, normal_axis, on_device


def resize(
    call: Call, x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    """Resize axes by scales or to sizes."""
    if call.opset < 11:
        roi, scales = None, roi
    axes = [normal_axis(a, x.ndim) for a in call.get("axes") or range(x.ndim)]
    if call.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise NoCounterpart("keeps the aspect ratio")
    if call.get("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        raise NoCounterpart("crops")
    if sizes is not None and sizes.numel():
        targets = ints(sizes)
        factors = [t / x.shape[a] for t, a in zip(targets, axes, strict=True)]
    else:
        assert scales is not None
        factors = scales.cpu().tolist()
        targets = [int(np.floor(np.float32(x.shape[a]) * np.float32(f))) for a, f in zip(axes, factors, strict=True)]
    for axis, target, factor in zip(axes, targets, factors, strict=True):
        if target != x.shape[axis] or factor != 1:
            x = _along(call, x, axis, target, factor)
    return x


def upsample(call: Call, x: Tensor, scales: Tensor | None = None) -> Tensor:
    """Resize as opset 7 to 9 did."""
    factors = list(call.get("scales")) if scales is None else scales.cpu().tolist()
    for axis, factor in enumerate(factors):
        if factor != 1:
            x = _along(call, x, axis, int(np.floor(x.shape[axis] * factor)), factor)
    return x


def _along(call: Call, x: Tensor, axis: int, target: int, factor: float) -> Tensor:
    places = _coordinates(call, x.shape[axis], target, factor)
    mode = call.get("mode", "nearest")
    if mode == "nearest":
        return x.index_select(axis, on_device(_nearest(call, places, x.shape[axis])))
    if mode not in ("linear", "cubic"):
        raise NoCounterpart(f'has the mode "{mode}"')
    if call.get("antialias", 0) and factor < 1:
        raise NoCounterpart("averages against aliasing")
    matrix = _linear(places, x.shape[axis]) if mode == "linear" else _cubic(call, places, x.shape[axis])
    return torch.tensordot(x, on_device(matrix).to(x.dtype), dims=([axis], [1])).movedim(-1, axis)


def _coordinates(call: Call, size: int, target: int, factor: float) -> np.ndarray:
    """Return where in the input each element of the output lies."""
    old = call.node.op_type == "Upsample" or call.opset < 11
    mode = "asymmetric" if old else call.get("coordinate_transformation_mode", "half_pixel")
    at: np.ndarray = np.arange(target, dtype=np.float64)
    if mode == "asymmetric":
        return at / factor
    if mode == "align_corners":
        return at * ((size - 1) / max(target - 1, 1))
    if mode == "pytorch_half_pixel":
        return (at + 0.5) / factor - 0.5 if target > 1 else at * 0
    if mode == "half_pixel":
        return (at + 0.5) / factor - 0.5
    if mode == "half_pixel_symmetric":
        adjustment = target / (factor * size)
        return size / 2 * (1 - adjustment) + (at + 0.5) / factor - 0.5
    raise NoCounterpart(f'has coordinates "{mode}"')


def _nearest(call: Call, places: np.ndarray, size: int) -> np.ndarray:
    old = call.node.op_type == "Upsample" or call.opset < 11
    mode = "floor" if old else call.get("nearest_mode", "round_prefer_floor")
    rounded: np.ndarray = {
        "floor": np.floor(places),
        "ceil": np.ceil(places),
        "round_prefer_floor": np.ceil(places - 0.5),
        "round_prefer_ceil": np.floor(places + 0.5),
    }[mode]
    at: np.ndarray = np.clip(rounded, 0, size - 1).astype(np.int64)
    return at


def _linear(places: np.ndarray, size: int) -> np.ndarray:
    places = np.clip(places, 0, size - 1)
    low = np.floor(places).astype(np.int64)
    high = np.minimum(low + 1, size - 1)
    matrix = np.zeros((len(places), size))
    rows = np.arange(len(places))
    np.add.at(matrix, (rows, low), 1 - (places - low))
    np.add.at(matrix, (rows, high), places - low)
    return matrix


def _cubic(call: Call, places: np.ndarray, size: int) -> np.ndarray:
    a = call.get("cubic_coeff_a", -0.75)
    low = np.floor(places).astype(np.int64)
    matrix = np.zeros((len(places), size))
    rows = np.arange(len(places))
    for offset in (-1, 0, 1, 2):
        d = np.abs(places - low - offset)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        weight = np.where(d <= 1, near, far)
        at = low + offset
        if call.get("exclude_outside", 0):
            weight = np.where((at < 0) | (at >= size), 0, weight)
        np.add.at(matrix, (rows, np.clip(at, 0, size - 1)), weight)
    if call.get("exclude_outside", 0):
        matrix /= matrix.sum(axis=1, keepdims=True)
    return matrix


_GRID_MODES = {
    "linear": "bilinear",
    "bilinear": "bilinear",
    "nearest": "nearest",
    "cubic": "bicubic",
    "bicubic": "bicubic",
}


def grid_sample(call: Call, x: Tensor, grid: Tensor) -> Tensor:
    """Read an image at given places."""
    mode, padding = _GRID_MODES[call.get("mode", "linear")], call.get("padding_mode", "zeros")
    if mode == "bicubic":
        raise NoCounterpart("samples by cubic curves")
    return functional.grid_sample(
        x, grid, mode=mode, padding_mode=padding, align_corners=bool(call.get("align_corners", 0))
    )


OPS: dict[str, Operator] = {"GridSample": grid_sample, "Resize": resize, "Upsample": upsample}
