"""Who may import whom: dependencies point one way, and passes stay pure."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"errors"},
    {"removed"},
    {"contract"},
    {"textfile", "graph", "registry", "numeric", "probe", "proto"},
    {"rewrite", "instantiate", "analysis", "pipeline"},
    {"coupling", "repair", "integers"},
    {"allocation"},
    {"passes", "session", "runtime"},
    {"model", "external", "opset", "fix_shape", "unite", "inputs", "feeds"},
    {"calibrate", "compare", "patch", "timing", "verify", "measure", "metrics"},
    {"trial", "manager", "heads"},
    {"judge", "report", "preview"},
    {"slowness", "ground", "graft", "training"},
    {"search", "transfer", "advice"},
    {"optimize"},
    {"quantize", "merge_trunk", "head", "advise"},
    {"cli"},
    {"__main__", "__init__"},
]
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
PASSES_MAY = {
    "contract",
    "removed",
    "errors",
    "graph",
    "instantiate",
    "rewrite",
    "analysis",
    "numeric",
    "coupling",
    "repair",
    "allocation",
    "integers",
}


def modules() -> list[tuple[str, Path]]:
    found = [
        (p.relative_to(ROOT / "onnxopt").parts[0].removesuffix(".py"), p) for p in (ROOT / "onnxopt").rglob("*.py")
    ]
    return found + [("passes", p) for p in (ROOT / "passes").rglob("*.py")]


def rooms_imported(path: Path) -> set[str]:
    """Return the rooms of onnxopt a module imports when it is loaded or run; TYPE_CHECKING blocks do not count."""
    rooms = set()
    for node in _runtime_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            rooms.update(a.name.split(".")[1] for a in node.names if a.name.startswith("onnxopt."))
        elif isinstance(node, ast.ImportFrom) and node.module == "onnxopt":
            rooms.update(a.name for a in node.names if a.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("onnxopt."):
            rooms.add((node.module or "").split(".")[1])
    return rooms


def _runtime_nodes(tree: ast.AST) -> list[ast.AST]:
    found: list[ast.AST] = []
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        found += [child, *_runtime_nodes(child)]
    return found


@pytest.mark.parametrize(("room", "path"), modules(), ids=lambda v: v if isinstance(v, str) else v.name)
def test_imports_point_down(room: str, path: Path) -> None:
    assert room in RANK, f"{path} is in a room that no layer names"
    for other in rooms_imported(path) - {room}:
        assert RANK[other] <= RANK[room], f"{path.relative_to(ROOT)} imports onnxopt.{other}, which is above it"


@pytest.mark.parametrize("path", [p for r, p in modules() if r == "passes"], ids=lambda p: p.name)
def test_passes_are_pure(path: Path) -> None:
    """They import no other pass, open no file and no session."""
    tree = ast.parse(path.read_text())
    assert rooms_imported(path) <= PASSES_MAY, path
    imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not imported & {"onnxruntime", "os", "pathlib", "io", "subprocess", "torch"}, path
    calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert not calls & {"open", "exec", "eval", "print"}, path


def test_passes_have_one_name_only() -> None:
    """`import passes` would work from the repository root and load every pass a second time."""
    for _, path in [*modules(), *(("tests", p) for p in (ROOT / "tests").rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(a.name.split(".")[0] == "passes" for a in node.names), path
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").split(".")[0] != "passes", path


def test_one_module_imports_onnxruntime() -> None:
    for _, path in modules():
        if path == ROOT / "onnxopt" / "session" / "ort.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] == "onnxruntime" for n in names), path
