"""Sequences that are only taken apart again."""

import pytest

SPEC = "unpack-sequences"
CONSTANTS = (
    "int64 zero = {0}, int64 one = {1}, int64 last = {-1}, int64 far = {9}, int64 two = {2}, int64[2] sizes = {1, 5}, "
    "int64[1] four = {4}"
)


def model(body, opset=18, inputs="float[n, 6] x", outputs="float[a, b] y"):
    return f"""<ir_version: 10, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) <{CONSTANTS}> {{ {body} }}"""


TAKEN = "a = SequenceAt(s, zero) b = SequenceAt(s, one) c = SequenceAt(s, last) y = Sum(a, b, c)"


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_equal_parts(rewritten, opset):
    done = rewritten(model(f"s = SplitToSequence<axis=1>(x, two) {TAKEN}", opset), SPEC)
    assert done.ops == {"Split": 1, "Sum": 1}
    assert [v.producer().op_type for v in done.nodes[-1].inputs] == ["Split"] * 3


@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("split", ["sizes", "last_smaller"])
def test_parts_of_different_sizes(rewritten, split, opset):
    body = f"s = SplitToSequence<axis=-1>(x, {split}) a = SequenceAt(s, zero) b = SequenceAt(s, one) y = Concat<axis=1>(b, a)"
    source = model(body, opset).replace("int64 zero", "int64 last_smaller = {4}, int64 zero", 1)
    assert rewritten(source, SPEC).ops == {"Split": 1, "Concat": 1}


@pytest.mark.parametrize("opset", [11, 18])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_parts_of_one(rewritten, opset, keepdims):
    body = f"s = SplitToSequence<axis=1, keepdims={keepdims}>(x) {TAKEN}"
    done = rewritten(model(body, opset, "float[n, 3] x", "float[a, b] y" if keepdims else "float[a] y"), SPEC)
    assert done.ops == {"Split": 1, "Sum": 1} | ({} if keepdims else {"Squeeze": 3})


@pytest.mark.parametrize(
    ("split", "op"), [("<axis=1, keepdims=0>(x)", "Gather"), ("<axis=1>(x)", "Slice"), ("<axis=1>(x, two)", "Slice")]
)
def test_few_parts_of_many_are_cut_out(rewritten, split, op):
    body = f"s = SplitToSequence{split} y = SequenceAt(s, last)"
    done = rewritten(model(body, outputs="float[a] y" if op == "Gather" else "float[a, b] y"), SPEC)
    assert done.ops == {op: 1}


def test_one_member_can_be_taken_twice(rewritten):
    body = "s = SplitToSequence<axis=1>(x, sizes) a = SequenceAt(s, one) b = SequenceAt(s, last) y = Add(a, b)"
    assert rewritten(model(body), SPEC).ops == {"Split": 1, "Add": 1}


def test_a_sequence_that_is_put_together_is_its_inputs(rewritten):
    body = "e = Exp(x) n = Neg(x) s = SequenceConstruct(e, n, x) a = SequenceAt(s, last) b = SequenceAt(s, one) y = Sub(a, b)"
    done = rewritten(model(body), f"{SPEC},remove-dead-code")
    assert done.ops == {"Neg": 1, "Sub": 1}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"t = Identity(two) s = SplitToSequence<axis=1>(x, t) {TAKEN}", "the sizes of the parts are computed"),
        (f"s = SplitToSequence<axis=1, keepdims=0>(x, two) {TAKEN}", "keepdims=0 beside given sizes: the specification ignores it, ONNX Runtime does not"),
        ("s = SplitToSequence<axis=0>(x, two) y = SequenceAt(s, zero)", "the size of the axis that is split is not known"),
        ("s = SplitToSequence<axis=1>(x, two) l = SequenceLength(s) a = SequenceAt(s, zero) f = CastLike(l, a) y = Add(f, a)", "the sequence is used by more than SequenceAt"),
        ("s = SplitToSequence<axis=1>(x, two) k = Identity(one) y = SequenceAt(s, k)", "the index into the sequence is computed"),
        ("s = SequenceConstruct(x, x) y = SequenceAt(s, one)", "a graph input or initializer cannot take the name of a graph output"),
    ],
)  # fmt: skip
def test_what_stays_has_a_reason(rewritten, body, reason):
    done = rewritten(model(body), SPEC, verify="keepdims=0" not in body)
    assert done.edits == 0
    assert done.refusals == {reason}


def test_an_index_outside_is_left_to_the_runtime(rewritten):
    done = rewritten(model("s = SplitToSequence<axis=1>(x, two) y = SequenceAt(s, far)"), SPEC, verify=False)
    assert done.refusals == {"the index lies outside of the sequence"}


def test_a_sequence_that_is_an_output_stays(rewritten):
    body = "s = SplitToSequence<axis=1>(x, two) y = SequenceAt(s, one)"
    done = rewritten(model(body, outputs="float[a, b] y, seq(float[n, 2]) s"), SPEC, verify=False)
    assert done.refusals == {"the sequence is an output"}
