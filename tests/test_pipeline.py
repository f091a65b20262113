"""Pipeline strings, options, recipes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt import pipeline, registry
from onnxopt.contract import GraphPass, Guarantee
from onnxopt.errors import UsageError
from onnxopt.pipeline import Pipeline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(GraphPass):
    """A pass with an option of every type."""

    name = "sample"
    guarantee = Guarantee.EXACT

    ratio: float = 0.5
    bits: int = 8
    mode: Literal["symmetric", "minmax"] = "symmetric"
    strict: bool = False
    limit: int | None = None
    pattern: str = ""


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = registry.Entry("sample", f"{__name__}:Sample", "A sample.")
    known = dict(registry.BUILTIN) | {"sample": entry}
    monkeypatch.setattr(registry, "entries", lambda: known)
    monkeypatch.setattr(registry, "load", lambda name: Sample if name == "sample" else _load(name))


_load = registry.load


def test_options_are_converted_to_their_types() -> None:
    (made,) = Pipeline.parse("sample{ratio=0.25, bits=4,mode=minmax,strict=yes,limit=3,pattern=2:4}").passes
    assert made == Sample(ratio=0.25, bits=4, mode="minmax", strict=True, limit=3, pattern="2:4")


def test_options_may_be_written_with_dashes_and_none() -> None:
    assert Pipeline.parse("sample{limit=none}").passes == (Sample(),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("sample{bits=4", "not closed"),
        ("sample}", 'expected "," or "{"'),
        ("sample{bits}", 'Option "bits" of the pass "sample" has no value'),
        ("sample{bits=four}", '"bits" of the pass "sample" must be a whole number, not "four"'),
        ("sample{bits=4.5}", "must be a whole number"),
        ("sample{mode=minmaks}", "must be symmetric or minmax"),
        ("sample{strict=maybe}", "must be true or false"),
        ("sample{ration=1}", 'no option "ration". Did you mean "ratio"?'),
        ("fuse-conv-nb", 'no pass "fuse-conv-nb". Did you mean "fuse-conv-bn"?'),
        ("a b", 'after "a"'),
        ("{x=1}", "expected a pass name"),
    ],
)
def test_what_cannot_be_read_is_said_in_words(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("{", r"\{").replace("?", r"\?").replace("}", r"\}")):
        Pipeline.parse(text)


@settings(deadline=None)
@given(
    st.builds(
        Sample,
        ratio=st.floats(0, 1),
        bits=st.integers(1, 16),
        mode=st.sampled_from(["symmetric", "minmax"]),
        strict=st.booleans(),
        limit=st.none() | st.integers(),
        pattern=st.text("0123456789:", max_size=5).filter(bool),
    )
)
def test_a_pipeline_string_says_it_all(made: Sample) -> None:
    again = Pipeline.parse(pipeline.spec(made) + ", sample").passes
    assert again == (made, Sample())


def test_recipes_are_built_in_or_toml(tmp_path: Path) -> None:
    assert Pipeline.recipe("lossless").name == "lossless"
    file = tmp_path / "edge.toml"
    file.write_text('name = "edge"\npasses = ["sample{bits=4}", "sample"]\n')
    assert Pipeline.recipe(str(file)) == Pipeline((Sample(bits=4), Sample()), "edge")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("passes = ", "not valid TOML"),
        ("passes = []", "needs passes"),
        ('passes = "sample"', "needs passes"),
        ('passes = ["sample"]\npases = 1', 'unknown key "pases"'),
    ],
)
def test_a_bad_recipe_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(content)
    with pytest.raises(UsageError, match=message) as raised:
        Pipeline.recipe(str(file))
    assert str(file) in str(raised.value)


def test_an_unknown_recipe_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='no recipe "losless". Did you mean "lossless"'):
        Pipeline.recipe("losless")
    with pytest.raises(UsageError, match="Cannot read the recipe"):
        Pipeline.recipe(str(tmp_path / "none.toml"))


@pytest.mark.parametrize("name", pipeline.RECIPES)
def test_every_recipe_parses_and_lossless_is_exact(name: str) -> None:
    parsed = Pipeline.recipe(name)
    assert Pipeline.parse(str(parsed)).passes == parsed.passes
    if name == "lossless":
        assert all(p.guarantee is Guarantee.EXACT for p in parsed.passes)
