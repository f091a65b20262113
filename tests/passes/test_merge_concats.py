import numpy as np
import onnx
import pytest

import onnxopt

SPEC = "merge-concats"


def graph(body, *, inputs="float[n,3] x, float[m,3] z", outputs="float[a,b] y", opset=17, constants=""):
    return f"""
    <ir_version: 8, opset_import: ["" : {opset}]>
    g ({inputs}) => ({outputs})
    <{constants}>
    {{ {body} }}
    """


CUTS = """int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] four = {4}, int64[1] last = {-1},
          int64[1] end = {9223372036854775807}"""


def test_a_concat_of_concats_is_one(rewritten):
    body = """a = Concat <axis = 0> (x, z) b = Concat <axis = -2> (z, z) c = Concat <axis = 0> (b, x)
              y = Concat <axis = 0> (a, x, c)"""
    found = rewritten(graph(body), SPEC)
    assert [n.op_type for n in found.nodes] == ["Concat"]
    assert [v.name for v in found.nodes[0].inputs] == ["x", "z", "x", "z", "z", "x"]


@pytest.mark.parametrize(
    "body",
    [
        "a = Concat <axis = 1> (x, x) b = Concat <axis = 1> (z, z) y = Concat <axis = 0> (a, b)",
        "a = Concat <axis = 0> (x, z) b = Exp(a) y = Concat <axis = 0> (a, b)",
        "a = Concat <axis = 0> (x, z) y = Concat <axis = 0> (a, a)",
    ],
    ids=["other axis", "other use", "used twice"],
)
def test_concats_that_stay(rewritten, body):
    assert not rewritten(graph(body), SPEC).edits


def test_empty_parts_are_left_out(rewritten):
    inputs = "float[n,3] x, float[0,3] e, float[n,0] f"
    found = rewritten(graph("a = Concat <axis = 0> (e, x, e) y = Exp(a)", inputs=inputs), SPEC)
    assert found.ops == {"Exp": 1}
    body = "y = Concat <axis = 0> (x, e, x)"
    assert [v.name for v in rewritten(graph(body, inputs=inputs), SPEC).nodes[0].inputs] == ["x", "x"]
    stays = rewritten(graph("y = Concat <axis = 0> (x, e)", inputs=inputs), SPEC)
    assert stays.ops == {"Concat": 1}
    assert stays.refusals == {"a graph input or initializer cannot take the name of a graph output"}


@pytest.mark.parametrize(
    ("split", "opset"),
    [
        ("a, b = Split <axis = 1, split = [1, 2]> (x)", 12),
        ("a, b = Split <axis = 1> (x, sizes)", 17),
        ("a, b = Split <axis = -1> (x, sizes)", 17),
    ],
)
def test_all_parts_of_a_split_are_the_whole(rewritten, split, opset):
    body = f"{split} c = Concat <axis = 1> (a, b) y = Exp(c)"
    assert rewritten(graph(body, opset=opset, constants="int64[2] sizes = {1, 2}"), SPEC).ops == {"Exp": 1}


def test_a_split_among_other_parts(rewritten):
    body = "a, b, c = Split <axis = 1> (x) y = Concat <axis = 1> (x, a, b, c)"
    found = rewritten(graph(body), SPEC)
    assert [v.name for v in found.nodes[0].inputs] == ["x", "x"]


@pytest.mark.parametrize(
    "body",
    [
        "a, b = Split <axis = 1> (x, sizes) y = Concat <axis = 1> (b, a)",
        "a, b, c = Split <axis = 1> (x) y = Concat <axis = 1> (a, b)",
        "a, b, c = Split <axis = 1> (x) y = Concat <axis = 0> (a, b, c)",
        "a, b, c = Split <axis = 1> (x) d = Exp(a) y = Concat <axis = 1> (a, b, c, d)",
    ],
    ids=["swapped", "one missing", "other axis", "other use"],
)
def test_splits_that_stay(rewritten, body):
    assert not rewritten(graph(body, constants="int64[2] sizes = {1, 2}"), SPEC).edits


FEEDS = [
    {"x": np.arange(n * 3, dtype=np.float32).reshape(n, 3), "z": np.ones((2, 3), np.float32)} for n in (1, 2, 3, 5, 8)
]


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("a = Slice(x, zero, two, zero) b = Slice(x, two, end, zero) c = Concat <axis = 0> (a, b)", {"Exp": 1}),
        (
            "a = Slice(x, zero, two, zero) b = Slice(x, two, four, zero) c = Concat <axis = 0> (a, b)",
            {"Slice": 1, "Exp": 1},
        ),
        (
            "a = Slice(x, one, two, zero) b = Slice(x, two, four, zero) c = Concat <axis = 0> (z, a, b)",
            {"Slice": 1, "Concat": 1, "Exp": 1},
        ),
        (
            """a = Slice(x, one, two, zero) b = Slice(x, two, four, zero) d = Slice(x, one, two, zero)
               c = Concat <axis = 0> (a, b, d)""",
            {"Slice": 2, "Concat": 1, "Exp": 1},
        ),
    ],
)
def test_neighbouring_slices_are_joined(rewritten, body, left):
    text = graph(f"{body} y = Exp(c)", constants=CUTS)
    found = rewritten(text, SPEC)
    assert found.ops == left
    verification = onnxopt.verify(onnx.parser.parse_model(text), found.model, feeds=FEEDS)
    assert verification.ok, verification.reason


def test_the_whole_may_be_known_by_its_size(rewritten):
    body = "a = Slice(x, zero, two, zero) b = Slice(x, two, four, zero) c = Concat <axis = 0> (a, b) y = Exp(c)"
    assert rewritten(graph(body, inputs="float[4,3] x", constants=CUTS), SPEC).ops == {"Exp": 1}
    assert rewritten(graph(body, inputs="float[5,3] x", constants=CUTS), SPEC).ops == {"Slice": 1, "Exp": 1}


@pytest.mark.parametrize(
    "body",
    [
        "a = Slice(x, zero, two, zero) b = Slice(x, one, four, zero) y = Concat <axis = 0> (a, b)",
        "a = Slice(x, two, four, zero) b = Slice(x, zero, two, zero) y = Concat <axis = 0> (a, b)",
        "a = Slice(x, zero, two, zero) b = Slice(z, two, four, zero) y = Concat <axis = 0> (a, b)",
        "a = Slice(x, zero, last, zero) b = Slice(x, last, end, zero) y = Concat <axis = 0> (a, b)",
        "a = Slice(x, zero, two, zero, two) b = Slice(x, two, four, zero) y = Concat <axis = 0> (a, b)",
        "a = Slice(x, zero, two, one) b = Slice(x, two, four, one) y = Concat <axis = 0> (a, b)",
    ],
    ids=["overlap", "swapped", "two tensors", "from the end", "step", "other axis"],
)
def test_slices_that_stay(rewritten, body):
    inputs = "float[n,5] x, float[n,5] z"
    assert not rewritten(graph(body, inputs=inputs, constants=CUTS), SPEC, verify=False).edits


@pytest.mark.parametrize(
    ("split", "opset"),
    [
        ("Split <axis = 1, split = [2, 3]> (c)", 12),
        ("Split <axis = 1> (c, sizes)", 17),
        ("Split <axis = -1> (c, sizes)", 17),
    ],
)
def test_a_split_of_a_concat_gives_its_inputs(rewritten, split, opset):
    text = graph(
        f"c = Concat <axis = 1> (x, z) p, q = {split} a = Exp(p) b = Neg(q)",
        inputs="float[n,2] x, float[n,3] z",
        outputs="float[n,2] a, float[n,3] b",
        constants="int64[2] sizes = {2, 3}",
        opset=opset,
    )
    found = rewritten(text, f"{SPEC},remove-dead-code")
    assert found.ops == {"Exp": 1, "Neg": 1}


def test_equal_parts_of_unknown_size(rewritten):
    text = graph(
        "c = Concat <axis = 0> (x, z) p, q = Split <axis = 0> (c) a = Exp(p) b = Neg(q)",
        inputs="float[n,2] x, float[n,2] z",
        outputs="float[n,2] a, float[n,2] b",
    )
    assert rewritten(text, f"{SPEC},remove-dead-code").ops == {"Exp": 1, "Neg": 1}


@pytest.mark.parametrize("inputs", ["float[n,1] x, float[n,3] z", "float[n,k] x, float[n,j] z"])
def test_a_split_at_other_places_stays(rewritten, inputs):
    text = graph(
        "c = Concat <axis = 1> (x, z) p, q = Split <axis = 1> (c, sizes) a = Exp(p) b = Neg(q)",
        inputs=inputs,
        outputs="float[n,i] a, float[n,l] b",
        constants="int64[2] sizes = {2, 2}",
    )
    assert rewritten(text, SPEC, verify=False).ops["Split"] == 1


def test_outputs_of_the_graph_keep_their_names(rewritten):
    text = graph(
        "c = Concat <axis = 1> (x, z) p, q = Split <axis = 1> (c, sizes)",
        inputs="float[n,2] x, float[n,3] z",
        outputs="float[n,2] p, float[n,3] q",
        constants="int64[2] sizes = {2, 3}",
    )
    found = rewritten(text, SPEC)
    assert found.ops == {"Concat": 1, "Split": 1}
    assert found.refusals == {"a graph input or initializer cannot take the name of a graph output"}
