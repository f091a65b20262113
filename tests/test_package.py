"""What is installed is what is in the tree."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import onnxopt
from onnxopt import errors

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_is_packaged() -> None:
    """Package lists are explicit; a new folder works in an editable install and is missing from the wheel."""
    folders = {p.parent for p in [*(ROOT / "onnxopt").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]}
    names = {".".join(f.relative_to(ROOT).parts) for f in folders}
    names = {n if n.startswith("onnxopt") else f"onnxopt.{n}" for n in names}
    assert names == set(PROJECT["tool"]["setuptools"]["packages"])


def test_the_version_is_told_once() -> None:
    assert onnxopt.__version__ == PROJECT["project"]["version"]


def test_public_names_resolve() -> None:
    for name in onnxopt.__all__:
        assert getattr(onnxopt, name) is not None
    assert set(onnxopt.__all__) <= set(dir(onnxopt))


def test_the_runtime_is_not_forced_on_anybody() -> None:
    """onnxruntime and onnxruntime-gpu install over each other; torch is an extra."""
    required = " ".join(PROJECT["project"]["dependencies"])
    assert "onnxruntime" not in required
    assert "torch" not in required
    assert set(PROJECT["project"]["optional-dependencies"]) >= {"cpu", "gpu", "torch"}


def test_exit_codes() -> None:
    codes = {
        cls.__name__: cls.exit_code
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, errors.OnnxOptError)
    }
    assert codes.pop("VerificationError") == codes.pop("NothingDoneError") == 1
    assert set(codes.values()) == {2}


def test_public_functions_stay_functions_when_their_modules_are_imported() -> None:
    code = (
        "import onnxopt.optimize, onnxopt.measure, onnxopt.verify, onnxopt\n"
        "from onnxopt.verify import Verifier\n"
        "assert all(callable(getattr(onnxopt, n)) for n in ('optimize', 'measure', 'verify'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
