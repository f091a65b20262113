from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from onnxopt.report import environment as module
from onnxopt.report.environment import environment


def test_versions_are_those_installed() -> None:
    versions = dict(environment("cpu", 2).versions)
    assert versions["onnx"] == importlib.metadata.version("onnx")
    assert "onnxopt" in versions and "onnx-ir" in versions
    assert all(versions.values())


def test_provider_and_threads_are_passed_on() -> None:
    found = environment("cuda", 3)
    assert (found.provider, found.threads, found.python) == ("cuda", 3, platform.python_version())


def test_the_processor_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Example  CPU  9000\nmodel name\t: other\n", encoding="utf-8")
    monkeypatch.setattr(module, "_CPUINFO", cpuinfo)
    monkeypatch.setattr(module, "_cores", lambda: 1)
    assert environment("cpu", 1).machine.startswith("Example CPU 9000, 1 core, ")


def test_a_machine_without_cpuinfo_is_described_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CPUINFO", tmp_path / "absent")
    monkeypatch.setattr(platform, "processor", lambda: platform.machine())
    monkeypatch.setattr(module, "_cores", lambda: 0)
    assert environment("cpu", 1).machine.endswith(f" on {platform.machine()}")


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from onnxopt.report.environment import environment; environment('cpu', 1);"
        "print([m for m in ('numpy', 'onnx', 'onnxruntime', 'rich') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
