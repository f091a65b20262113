"""The registry, and a pass that another package brings."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from onnxopt import registry
from onnxopt.contract import GraphPass
from onnxopt.errors import UsageError

PLUGIN = Path(__file__).parent.parent / "docs" / "example-plugin"


@pytest.mark.parametrize("name", registry.BUILTIN)
def test_every_built_in_pass_is_what_it_says(name: str) -> None:
    cls = registry.load(name)
    assert issubclass(cls, GraphPass)
    assert cls.name == name
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    assert (cls.__doc__ and "Attributes:" in cls.__doc__) or not fields
    assert all(f.default is not dataclasses.MISSING for f in fields)
    assert registry.BUILTIN[name].summary.endswith(".")


def test_listing_imports_nothing_heavy() -> None:
    code = (
        "import sys, onnxopt.registry as r; r.entries(); print(sorted({'numpy', 'onnx', 'onnx_ir'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def install(site: Path, entry: str) -> None:
    """Lay a distribution with one entry point into a folder, as an installer would."""
    info = site / "example_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[onnxopt.passes]\n{entry}\n")


def run(site: Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r})\n{textwrap.dedent(code)}"],
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


def test_the_example_plugin_runs_in_a_pipeline(tmp_path: Path) -> None:
    (tmp_path / "example_plugin.py").write_text((PLUGIN / "example_plugin.py").read_text())
    install(tmp_path, "negate-twice = example_plugin:NegateTwice")
    output = run(
        tmp_path,
        """
        import onnx_ir as ir, onnxopt
        model = ir.from_onnx_text('<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) {a = Neg(x) b = Neg(a) y = Relu(b)}')
        result = onnxopt.optimize(model, passes="negate-twice")
        print([n.op_type for n in result.model.graph], result.report.verification.ok)
        """,
    )
    assert output.strip() == "['Relu'] True"


def test_a_plugin_cannot_take_a_built_in_name_over(tmp_path: Path) -> None:
    install(tmp_path, "fuse-conv-bn = example_plugin:Mine")
    output = run(tmp_path, "import onnxopt.registry as r; print(r.entries()['fuse-conv-bn'].location)")
    assert output.strip() == registry.BUILTIN["fuse-conv-bn"].location


def test_a_broken_plugin_is_named_when_it_is_used(tmp_path: Path) -> None:
    install(tmp_path, "broken = no_such_module:Pass\nwrong = collections:OrderedDict")
    output = run(
        tmp_path,
        """
        import onnxopt.registry as r
        for name in ("broken", "wrong"):
            try: r.load(name)
            except Exception as error: print(type(error).__name__, error)
        """,
    )
    assert 'UsageError The pass "broken" of the package example-plugin cannot be imported' in output
    assert "is not a dataclass derived from onnxopt.GraphPass" in output


def test_an_unknown_pass_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match='Did you mean "prune-weights"'):
        registry.load("prune-weight")
