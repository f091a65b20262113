"""Index outputs may differ where what they rank ties."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxopt.compare import ties


def model(body: str, output: str = "int64[N] y") -> ir.Model:
    return ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[2, 3] x) => ({output}) <int64[1] k = {{2}}> {{ {body} }}'
    )


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("s = Relu(x) y = ArgMax <axis = 1> (s)", ties.Ranking("s", 1, True)),
        ("s = Relu(x) y = ArgMin <axis = -1, keepdims = 0> (s)", ties.Ranking("s", -1, False)),
        ("s = Relu(x) v, i = TopK(s, k) c = Cast <to = 6> (i) y = Identity(c)", ties.Ranking("s", -1, True)),
        ("s = Relu(x) y, i = TopK(s, k)", None),
        ("s = Relu(x) i = ArgMax(s) y = Add(i, i)", None),
        ("y = Shape(x)", None),
    ],
)
def test_what_an_output_ranks(body: str, expected: ties.Ranking | None) -> None:
    assert ties.ranking(model(body), "y") == expected


def test_an_input_that_is_returned_ranks_nothing() -> None:
    assert ties.ranking(model("y = Relu(x)"), "nothing") is None


def test_the_scores_become_an_output_of_a_copy() -> None:
    original = model("s = Relu(x) y = ArgMax <axis = 1> (s)")
    found = ties.ranking(original, "y")
    assert found is not None
    assert [v.name for v in ties.with_scores(original, found).graph.outputs] == ["y", "s"]
    assert [v.name for v in original.graph.outputs] == ["y"]


SCORES = np.array([[1, 1, 0], [2, 0, 2.001]], np.float32)


@pytest.mark.parametrize(
    ("indices", "allowed", "tie"),
    [
        ([1, 2], 1e-6, True),
        ([0, 0], 1e-6, False),
        ([0, 0], 0.01, True),
        ([2, 2], 0.01, False),
        ([0, 7], 9.0, False),
    ],
)
def test_argmax_ties_within_what_is_allowed(indices: list[int], allowed: float, tie: bool) -> None:
    reference = np.array([0, 2])
    for keeps, shape in ((False, (2,)), (True, (2, 1))):
        found = ties.Ranking("s", 1, keeps)
        other = np.array(indices).reshape(shape)
        assert ties.all_tie(SCORES, found, reference.reshape(shape), other, allowed) is tie


def test_topk_ties_position_by_position() -> None:
    found = ties.Ranking("s", -1, True)
    reference = np.array([[0, 1], [2, 0]])
    assert ties.all_tie(SCORES, found, reference, np.array([[1, 0], [2, 0]]), 0.0)
    assert ties.all_tie(SCORES, found, reference, np.array([[1, 0], [0, 2]]), 0.01)
    assert not ties.all_tie(SCORES, found, reference, np.array([[0, 2], [2, 0]]), 0.01)


def test_indices_without_the_scores_shape_do_not_tie() -> None:
    assert not ties.all_tie(SCORES, ties.Ranking("s", 1, False), np.zeros(5, np.int64), np.zeros(5, np.int64), 1.0)
