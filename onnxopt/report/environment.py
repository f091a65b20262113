"""Where a run takes place: versions, processor, provider and threads.

Nothing is imported to find out; versions come from the installed packages' metadata.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from onnxopt.report.data import Environment
from onnxopt.report.words import count

_PACKAGES = ("onnxopt", "onnx", "onnx-ir", "numpy")

_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-qnn")
"""Distributions that install the runtime; whichever is there is named."""

_CPUINFO = Path("/proc/cpuinfo")


def environment(provider: str, threads: int) -> Environment:
    """Describe the place this process runs in.

    Args:
        provider: Execution provider by its short name, such as "cpu".
        threads: Threads the runtime uses per session.
    """
    versions = [(name, _version(name)) for name in (*_PACKAGES, *_RUNTIMES)]
    return Environment(
        versions=tuple((name, version) for name, version in versions if version),
        python=platform.python_version(),
        machine=_machine(),
        provider=provider,
        threads=threads,
    )


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _machine() -> str:
    """Return e.g. "AMD EPYC 9R14, 8 cores, Linux 6.1 on x86_64"."""
    release = ".".join(platform.release().split(".")[:2])
    system = f"{platform.system()} {release} on {platform.machine()}".strip()
    cores = _cores()
    return ", ".join(filter(None, (_processor(), count(cores, "core") if cores else "", system)))


def _processor() -> str:
    """Return the processor's name, or an empty string where the system does not tell."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        name = platform.processor()
        return "" if name == platform.machine() else name
    names = (line.partition(":")[2] for line in lines if line.lower().startswith(("model name", "hardware")))
    return " ".join(next(names, "").split())


def _cores() -> int:
    """Return how many cores this process may use; 0 when unknown."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 0
