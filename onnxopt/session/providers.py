"""Execution providers: what users call them, and what to install for those that are not here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from onnxopt.errors import UsageError
from onnxopt.registry import nearest

CPU = "CPUExecutionProvider"

DEVICES = {
    "CUDAExecutionProvider": "cuda",
    "TensorrtExecutionProvider": "cuda",
    "NvTensorRTRTXExecutionProvider": "cuda",
    "DmlExecutionProvider": "dml",
    "CANNExecutionProvider": "cann",
    "WebGpuExecutionProvider": "webgpu",
}
"""Where a provider keeps inputs and outputs when that is not the host's memory."""

_SUFFIX = "ExecutionProvider"
_NICKNAMES = {"trt": "Tensorrt", "tensorrt-rtx": "NvTensorRTRTX", "directml": "Dml"}

_PACKAGES = {
    "cuda": "onnxruntime-gpu (onnxopt[gpu] brings it)",
    "tensorrt": "onnxruntime-gpu (onnxopt[gpu] brings it)",
    "dml": "onnxruntime-directml",
    "openvino": "onnxruntime-openvino",
    "qnn": "onnxruntime-qnn",
    "migraphx": "onnxruntime-migraphx",
    "cann": "onnxruntime-cann",
}
"""The package with a provider; each stands in the place of onnxruntime, over which it installs."""


def short(provider: str) -> str:
    """Return what users call a provider, e.g. "cuda"."""
    return provider.removesuffix(_SUFFIX).lower()


def find(name: str, known: Iterable[str], available: Sequence[str]) -> str:
    """Return ONNX Runtime's name of a provider.

    Args:
        name: Its name in any form.
        known: All providers that ONNX Runtime knows, by its own names.
        available: Those of this installation.

    Raises:
        UsageError: If nothing is called so, or this installation does not have it.
    """
    names = {short(p): p for p in (*known, *DEVICES, *available)}
    here = ", ".join(short(p) for p in available)
    word = _NICKNAMES.get(name.lower(), name).lower().removesuffix(_SUFFIX.lower())
    if word not in names:
        raise UsageError(
            f'There is no execution provider "{name}".{nearest(word, list(names))} Available here: {here}.'
        )
    if names[word] not in available:
        package = _PACKAGES.get(word, f"a build of ONNX Runtime that has {word}")
        raise UsageError(
            f"The installed ONNX Runtime has no provider {word}, only {here}; install {package} in the place of "
            "onnxruntime, or choose another provider."
        )
    return names[word]
