"""Models of which one leaves axes open that the other has fixed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxopt import measure, verify
from onnxopt.compare.narrowing import narrowed
from onnxopt.model import fix_shape

HEADER = '<ir_version: 8, opset_import: ["" : 17]> '


def parse(text: str) -> ir.Model:
    return ir.from_onnx_text(HEADER + text)


def added(x: str, z: str, y: str) -> ir.Model:
    return parse(f"g (float{x} x, float{z} z) => (float{y} y) {{ y = Add(x, z) }}")


def shapes(model: ir.Model) -> list[str]:
    return [str(v.shape).replace("'", "") for v in (*model.graph.inputs, *model.graph.outputs)]


def test_a_model_is_compared_with_its_own_fixed_form_in_both_directions() -> None:
    whole = added("[batch, seq]", "[batch, seq]", "[batch, seq]")
    fixed = fix_shape(whole, {"batch": 2, "seq": 5})
    for one, two, which in ((whole, fixed, "first"), (fixed, whole, "second")):
        found = verify(one, two)
        assert found.ok and found.feeds == 3 and found.shapes == ()
        assert f'the input "x" of the {which} is [batch, seq] and was fixed to [2, 5]' in found.notes[0]
    assert shapes(whole) == ["[batch,seq]"] * 3, "neither is changed"


def test_what_the_one_fixes_may_be_open_in_the_other_axis_by_axis() -> None:
    pair = narrowed(added("[b, 5]", "[b, 5]", "[b, 5]"), added("[2, s]", "[n, s]", "[n, s]"))
    assert shapes(pair.reference) == shapes(pair.candidate) == ["[2,5]"] * 3
    assert verify(pair.reference, pair.candidate).ok


def test_a_difference_within_the_shapes_that_both_take_is_found() -> None:
    other = parse("g (float[2, 5] x, float[2, 5] z) => (float[2, 5] y) { y = Sub(x, z) }")
    found = verify(added("[b, 5]", "[b, 5]", "[b, 5]"), other)
    assert not found.ok and found.outputs[0].relative > 0.01


@pytest.mark.parametrize(
    ("x", "z", "told"),
    [("[2, 5]", "[3, 5]", "[2, 5] instead of [b, 5]"), ("[2, 6]", "[2, 6]", "[2, 6] instead of [2, 5]")],
    ids=["two sizes of one axis", "another size"],
)
def test_shapes_that_cannot_be_brought_together_are_a_difference(x: str, z: str, told: str) -> None:
    found = verify(added("[b, 5]", "[b, 5]", "[b, 5]"), added(x, z, "[p, q]"))
    assert not found.ok and told in found.reason


def test_models_with_the_same_axes_come_back_as_they_are() -> None:
    model, other = added("[b, 5]", "[b, 5]", "[b, 5]"), added("[n, 5]", "[n, 5]", "[n, 5]")
    pair = narrowed(model, other)
    assert pair.reference is model and pair.candidate is other and not pair.note


def test_both_are_timed_with_inputs_that_both_take() -> None:
    whole = added("[b, 5]", "[b, 5]", "[b, 5]")
    found = measure(whole, fix_shape(whole, {"b": 7}), budget_seconds=0.01, memory=False)
    assert found.rounds and np.isfinite(found.ratio)
