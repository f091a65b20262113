"""What torch computes on."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

from onnxopt.errors import UsageError
from onnxopt.training.options import DEVICES, Device


def require_device(device: str) -> None:
    """Check that torch can compute on a device.

    Raises:
        UsageError: If it cannot, with what is missing.
    """
    if device not in DEVICES:
        raise UsageError(f'device must be {" or ".join(DEVICES)}, not "{device}".', "device")
    if device == "cuda" and not torch.cuda.is_available():
        missing = (
            f"torch {torch.__version__} was built without CUDA; install a build with it (https://pytorch.org)"
            if torch.version.cuda is None
            else "torch finds no GPU that it can use"
        )
        raise UsageError(f"device cuda cannot be used: {missing}, or train on the cpu.", "device")


@contextlib.contextmanager
def computing(device: Device, threads: int) -> Iterator[None]:
    """Let torch compute on a device, and with so many threads on the processor; afterwards as before.

    On a GPU, what gives the same each time is preferred, and nothing is rounded to fewer bits than float32 has, which
    would not agree with the runtime.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if device == "cpu":
            yield
        else:
            with torch.device(device), _deterministic():
                yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Prefer kernels that give the same each time; where there are none, go on with those that are there."""
    before, only_warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with (
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", message=".*deterministic", category=UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)
