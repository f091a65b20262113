from __future__ import annotations

import math

import click
import pytest
from click.shell_completion import ShellComplete

from onnxopt import cli
from onnxopt.cli.options import Fraction, Sizes


def test_sizes() -> None:
    assert Sizes().convert("batch=1, seq=128", None, None) == {"batch": 1, "seq": 128}
    assert Sizes().convert("a=b=3", None, None) == {"a=b": 3}
    assert Sizes().convert("batch=0", None, None) == {"batch": 0}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("batch", "AXIS=N"),
        ("=3", "AXIS=N"),
        ("batch=x", 'size of "batch" must be a whole number'),
        ("batch=-1", "whole number"),
        ("batch=1.5", "whole number"),
        ("batch=", "whole number"),
        ("batch=1,batch=2", "given twice"),
        ("", "empty"),
        (" , ", "empty"),
    ],
)
def test_bad_sizes_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(click.BadParameter, match=complaint):
        Sizes().convert(text, None, None)


@pytest.mark.parametrize(("text", "value"), [("0.005", 0.005), ("0.5%", 0.005), ("0", 0.0), ("100%", 1.0)])
def test_fraction(text: str, value: float) -> None:
    assert Fraction().convert(text, None, None) == pytest.approx(value)


def test_infinity_is_a_fraction_only_where_it_makes_sense() -> None:
    assert Fraction(infinite=True).convert("inf", None, None) == math.inf
    with pytest.raises(click.BadParameter, match="finite"):
        Fraction().convert("inf", None, None)


@pytest.mark.parametrize("text", ["nan", "-1", "-inf", "one", "", "%"])
def test_bad_fractions_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Fraction(infinite=True).convert(text, None, None)


def test_one_without_a_percent_sign_is_ambiguous() -> None:
    with pytest.raises(click.BadParameter, match="write 1% or a fraction below 1"):
        Fraction(below_one=True).convert("1", None, None)
    assert Fraction(below_one=True).convert("1%", None, None) == pytest.approx(0.01)


def completions(args: list[str], incomplete: str) -> list[str]:
    found = ShellComplete(cli.cli, {}, "onnxopt", "_ONNXOPT_COMPLETE").get_completions(args, incomplete)
    return [item.value for item in found]


def test_completion_offers_commands() -> None:
    assert completions([], "exp") == ["explain"]


def test_completion_offers_passes_after_each_comma() -> None:
    assert completions(["optimize", "m.onnx", "--passes"], "fold-constants,fuse-conv-b") == [
        "fold-constants,fuse-conv-bn"
    ]


def test_completion_offers_pass_names() -> None:
    assert "quantize-weights" in completions(["passes"], "quant")
    assert completions(["passes"], "quantize-w") == ["quantize-weights"]


def test_completion_offers_recipes_and_targets() -> None:
    assert "lossless" in completions(["optimize", "m.onnx", "--recipe"], "lo")
    assert completions(["optimize", "m.onnx", "--target"], "cu") == ["cuda"]
