"""The wheel and the sdist hold what the tree holds, and the wheel alone does the main job."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build (wheel, sdist) from a copy of the tree, without touching it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, tracked.split("\0")):
        if name.startswith(("models/", "tests/")) or not (ROOT / name).is_file():
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def modules() -> set[str]:
    found = {str(p.relative_to(ROOT)) for p in (ROOT / "onnxopt").rglob("*.py")}
    return found | {f"onnxopt/{p.relative_to(ROOT)}" for p in (ROOT / "passes").rglob("*.py")}


def test_the_wheel_holds_every_module_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        names = {n for n in wheel.namelist() if ".dist-info/" not in n}
    assert names == modules() | {"onnxopt/py.typed"}


def test_the_sdist_holds_what_the_wheel_is_built_from(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as sdist:
        names = {n.partition("/")[2] for n in sdist.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "onnxopt/optimize.py", "passes/fuse/conv_bn.py"} <= names


def test_the_wheel_alone_does_the_main_job_without_torch(built: tuple[Path, Path], tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(site)
    code = """
import sys
import onnxopt
assert onnxopt.__file__.startswith(sys.argv[1]), onnxopt.__file__
from onnxopt.cli import main
sys.argv = ["onnxopt", "optimize", sys.argv[2], "-o", sys.argv[3], "--no-measure"]
try:
    main()
finally:
    assert "torch" not in sys.modules
"""
    model, out = ROOT / "models" / "mnist_cnn_bn.onnx", tmp_path / "out.onnx"
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(site), str(model), str(out)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout
    assert out.exists()
