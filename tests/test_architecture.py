"""docs/architecture.md names what is there, and every room of the code is named in it, in the rank that tests hold."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()
CODE = [*(ROOT / "onnxopt").rglob("*"), *(ROOT / "passes").rglob("*"), *(ROOT / "tests").rglob("*"), ROOT / "passes"]


def test_what_the_page_names_is_there() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in CODE if path.suffix == ".py"}
    folders = {path.relative_to(ROOT).as_posix() for path in CODE if path.is_dir()}
    for name in re.findall(r"`([\w/]+\.py)`", PAGE):
        assert any(f"/{file}".endswith(f"/{name}") for file in files), f"there is no file {name}"
    for name in re.findall(r"`([\w/]+)/`", PAGE):
        assert any(f"/{folder}".endswith(f"/{name}") for folder in folders), f"there is no folder {name}"


def test_every_room_is_named_on_the_page() -> None:
    for path in (ROOT / "onnxopt").iterdir():
        if path.is_dir() and (path / "__init__.py").is_file():
            assert f"`{path.name}/`" in PAGE, f"the page does not name the room {path.name}/"
        elif path.suffix == ".py" and not path.name.startswith("__"):
            assert f"`{path.name}`" in PAGE, f"the page does not name {path.name}"


def test_the_ranks_on_the_page_are_those_that_are_held() -> None:
    tree = ast.parse((ROOT / "tests" / "test_layering.py").read_text())
    held = next(ast.unparse(n.value) for n in tree.body if isinstance(n, ast.Assign) and "LAYERS" in ast.unparse(n))
    section = PAGE.partition("## Who may import whom\n\n")[2]
    block = section.partition("\n\n")[0]
    told = [set(re.findall(r"\w+", rank)) for rank in block.split("<")]
    assert told == ast.literal_eval(held)
