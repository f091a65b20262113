from __future__ import annotations

import dataclasses

import pytest
from click.testing import CliRunner, Result

from onnxopt import registry
from onnxopt.cli import cli
from onnxopt.cli.passes import docstring
from onnxopt.contract import GraphPass, Guarantee
from onnxopt.pipeline import RECIPES, Pipeline, option_types


def invoke(*args: str) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(cli, ["passes", *args], prog_name="onnxopt")


def test_every_pass_and_recipe_is_listed() -> None:
    output = invoke().output
    for name in (*registry.entries(), *RECIPES):
        assert f"  {name} " in output


@pytest.mark.parametrize("name", registry.BUILTIN)
def test_every_option_of_a_pass_is_described(name: str) -> None:
    done = invoke(name)
    assert done.exit_code == 0, done.stderr
    cls = registry.load(name)
    meanings = docstring(cls)[2]
    assert f"Guarantee: {cls.guarantee.value}." in done.output
    for option in option_types(cls):
        assert f"  {option}: " in done.output
        assert meanings.get(option), f"{name} does not document {option}"


def test_an_unknown_pass_suggests_the_nearest() -> None:
    done = invoke("fuse-conv")
    assert done.exit_code == 2
    assert 'There is no pass "fuse-conv". Did you mean "fuse-conv-bn"?' in done.stderr


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(GraphPass):
    """Do a thing.

    And `say` so,
    over lines.

    Attributes:
        amount: How much, in bytes:
            a lot.
        other: Else.

    Raises:
        Nothing: ever.
    """

    name = "sample"
    guarantee = Guarantee.EXACT
    amount: int = 3
    other: bool = True


def test_docstrings_are_taken_apart() -> None:
    assert docstring(Sample) == (
        "Do a thing.",
        ["And say so, over lines."],
        {"amount": "How much, in bytes: a lot.", "other": "Else."},
    )


def test_the_example_is_a_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = registry.Entry("sample", "tests.cli:Sample", "From the package other.", "other")
    monkeypatch.setattr(registry, "entries", lambda: {"sample": entry})
    monkeypatch.setattr(registry, "load", lambda name: Sample)
    done = invoke("sample")
    assert "Package: other" in done.output
    text = done.output.rsplit('--passes "', 1)[1].split('"')[0]
    assert text == "sample{amount=3}"
    assert Pipeline.parse(text).passes == (Sample(),)
