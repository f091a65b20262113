"""Fourier transforms."""

from __future__ import annotations

import torch
from torch import Tensor

from onnxopt.training.call import Call, Operator
from onnxopt.training.values import NoCounterpart, ints, normal_axis


def short_time_fourier(
    call: Call, signal: Tensor, step: Tensor, window: Tensor | None = None, length: Tensor | None = None
) -> Tensor:
    """Return the spectra of windows of real signals: samples by windows by frequencies by real and imaginary part."""
    if signal.ndim == 3 and signal.shape[2] != 1:
        raise NoCounterpart("has complex signals")
    size = len(window) if window is not None else ints(length)[0]
    frames = signal.reshape(len(signal), -1).unfold(1, size, ints(step)[0])
    frames = frames if window is None else frames * window
    spectra = torch.fft.rfft(frames) if call.get("onesided", 1) else torch.fft.fft(frames)
    return torch.view_as_real(spectra)


def fourier(call: Call, x: Tensor, length: Tensor | None = None, axis: Tensor | None = None) -> Tensor:
    """Return the spectra along an axis; the last one holds real parts, or real and imaginary ones.

    The axis is an input since opset 20, and an attribute before.
    """
    along = ints(axis)[0] if axis is not None else call.get("axis", 1 if call.opset < 20 else -2)
    along = normal_axis(along, x.ndim)
    size = ints(length)[0] if length is not None else None
    whole = torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else x.squeeze(-1)
    inverse, onesided = call.get("inverse", 0), call.get("onesided", 0)
    if onesided and (inverse or whole.is_complex()):
        raise NoCounterpart("takes or gives one side of a spectrum of complex signals")
    transform = torch.fft.rfft if onesided else torch.fft.ifft if inverse else torch.fft.fft
    return torch.view_as_real(transform(whole, n=size, dim=along).resolve_conj())


OPS: dict[str, Operator] = {"DFT": fourier, "STFT": short_time_fourier}
