"""Branches that no input ran are named."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import onnxopt
from onnxopt.compare import branches
from onnxopt.runtime import RunOptions


def model(condition: str = "c = Greater(r, zero)", extra: str = "") -> ir.Model:
    text = f"""<ir_version: 8, opset_import: ["" : 17]> g (float[2] x, bool given) => (float[2] y)
    <float zero = {{0}}, bool known = {{1}}> {{
      r = ReduceSum<keepdims=0>(x) {condition}
      [pick] z = If(c)<then_branch = t () => (float[2] a) {{ a = Exp(x) }}, else_branch = e () => (float[2] b) {{ b = Neg(x) }}>
      {extra}
      y = Identity(z)
    }}"""
    return ir.from_onnx_text(text)


def feeds(*signs: int, given: bool = True) -> list[dict[str, np.ndarray]]:
    return [{"x": np.full(2, sign, np.float32), "given": np.array(given)} for sign in signs]


@pytest.mark.parametrize(
    ("signs", "expected"),
    [
        ((1, 2), 'No input ran the else branch of "pick", which was therefore not verified; give inputs that do with --data.'),
        ((-1,), 'No input ran the then branch of "pick", which was therefore not verified; give inputs that do with --data.'),
        ((1, -1), ""),
        ((), ""),
    ],
)  # fmt: skip
def test_a_branch_that_no_input_ran_is_named(signs: tuple[int, ...], expected: str) -> None:
    assert branches.never_run(model(), feeds(*signs), RunOptions()) == expected


def test_a_condition_that_is_an_input() -> None:
    found = branches.never_run(model("c = Identity(given)"), feeds(1, given=False), RunOptions())
    assert "the then branch" in found
    direct = model("")
    direct.graph.node("pick").replace_input_with(0, direct.graph.inputs[1])
    assert "the then branch" in branches.never_run(direct, feeds(1, given=False), RunOptions())


def test_a_constant_condition_says_nothing() -> None:
    fixed = model("c = Constant<value = bool {1}>()")
    assert branches.never_run(fixed, feeds(1), RunOptions()) == ""


def test_many_branches_are_counted() -> None:
    body = "{ %s = Exp(x) }"
    extra = " ".join(
        f"[if{i}] o{i} = If(c)<then_branch = t{i} () => (float[2] a{i}) {body % f'a{i}'}, "
        f"else_branch = e{i} () => (float[2] b{i}) {body % f'b{i}'}>"
        for i in range(5)
    )
    found = branches.never_run(model(extra=extra), feeds(1), RunOptions())
    assert '"pick", the else branch of "if0"' in found
    assert "and 2 more, which were therefore not verified" in found


def test_a_model_that_does_not_run_says_nothing() -> None:
    wrong = [{"x": np.ones(3, np.float32), "given": np.array(True)}]
    assert branches.never_run(model(), wrong, RunOptions()) == ""


def test_the_report_has_the_note() -> None:
    # the sum of squares is never negative
    condition = "s = Mul(r, r) c = Less(s, zero)"
    result = onnxopt.optimize(model(condition), measure=False)
    assert [n for n in result.report.notes if 'the then branch of "pick"' in n]
    unverified = onnxopt.optimize(model(condition), measure=False, verify=False)
    assert not unverified.report.notes
