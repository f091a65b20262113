"""Generated inputs: plausible, seeded, and such that models run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.errors import DataError, RuntimeFailure, UsageError
from onnxopt.feeds import Feed, generate, generate_runnable
from onnxopt.inputs.roles import valid_lengths, valid_mask
from onnxopt.runtime import open_session


def parse(text: str, opset: int = 18) -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {opset}, "own" : 1]> {text}')


def numbers(count: int) -> str:
    return "{" + ", ".join(["1"] * count) + "}"


def feeds(text: str, **options: Any) -> list[Feed]:
    return generate(parse(text), **options)


def runnable(model: ir.Model, **options: Any) -> list[Feed]:
    with open_session(model, optimized=False) as session:
        return generate_runnable(model, session.run, **options)


BERT = """
g (int64[batch, seq] input_ids, int64[batch, seq] attention_mask, int64[batch, seq] token_type_ids) => (float y)
<float[50, 4] words, float[2, 4] types> {
  w = Gather(words, input_ids)
  t = Gather(types, token_type_ids)
  s = Add(w, t)
  m = Cast<to = 1>(attention_mask)
  a = Constant<value_ints = [2]>()
  u = Unsqueeze(m, a)
  y = Mul(s, u)
}
"""


def test_a_language_model_gets_ids_masks_and_types() -> None:
    one, two, three = feeds(BERT)
    assert one["input_ids"].shape == (1, 16)
    assert two["input_ids"].shape == (2, 7)
    assert three["input_ids"].shape == (3, 33)
    for feed in (one, two, three):
        assert {a.dtype for a in feed.values()} == {np.dtype(np.int64)}
        assert feed["input_ids"].min() >= 0
        assert feed["input_ids"].max() < 50
        assert set(np.unique(feed["token_type_ids"])) <= {0, 1}
        mask = feed["attention_mask"]
        assert mask[0].all()
        assert (mask.sum(axis=1) > 0).all()
        assert (np.diff(mask, axis=1) <= 0).all(), "padding trails"
    assert len(np.unique(three["input_ids"])) > 10
    assert not three["attention_mask"].all()


def test_a_batch_of_one_is_padded_too() -> None:
    one, two, _ = feeds(BERT, shape={"batch": 1, "seq": 8})
    assert one["attention_mask"].tolist() == [[1] * 8]
    assert two["attention_mask"].tolist() == [[1] * 6 + [0] * 2]


def test_the_seed_decides() -> None:
    first, again, other = (feeds(BERT, seed=s)[1]["input_ids"] for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_inputs_do_not_depend_on_the_order_of_inputs() -> None:
    both = feeds("g (float[3] x, float[3] y) => (float[3] z) { z = Add(x, y) }")[0]
    swapped = feeds("g (float[3] y, float[3] x) => (float[3] z) { z = Add(x, y) }")[0]
    np.testing.assert_array_equal(both["x"], swapped["x"])
    assert (both["x"] != both["y"]).all()


def test_sets_and_shape() -> None:
    found = feeds(BERT, sets=5, shape={"seq": 3, "input_ids:0": 2})
    assert len(found) == 5
    assert {f["input_ids"].shape for f in found} == {(2, 3)}
    with pytest.raises(UsageError, match=r'"sequence"\. Did you mean "seq"\?'):
        feeds(BERT, shape={"sequence": 3})


def test_zero_sizes_are_allowed() -> None:
    assert feeds(BERT, shape={"batch": 2, "seq": 0}, sets=1)[0]["attention_mask"].shape == (2, 0)


@pytest.mark.parametrize(
    ("nodes", "low", "high"),
    [
        ("y = Gather(t, ids)", 0, 7),
        ("c = Cast<to = 6>(ids) s = Constant<value_ints = [-1]>() r = Reshape(c, s) y = Gather(t, r)", 0, 7),
        ("y = Gather(t, ids) z = Gather(u, ids)", 0, 3),
        ("k = Constant<value_int = 2>() p = Add(ids, k) y = Gather(t, p)", 0, 5),
        ("k = Constant<value_int = 2>() p = Sub(ids, k) y = Gather(t, p)", 2, 9),
        ("k = Constant<value_int = 3>() p = Mul(ids, k) y = Gather(t, p)", 0, 3),
        ("v = Transpose(t) y = Gather<axis = 1>(v, ids)", 0, 1),
        ("d = Constant<value_int = 4>() v = Constant<value_ints = [0, 1]>() y = OneHot(ids, d, v)", 0, 4),
        ("k = Constant<value_ints = [0, 1, 2, 3, 4]>() y = Equal(ids, k)", 0, 5),
        ("y = own.Look(t, ids)", 0, 7),
        (
            "c = Constant<value = bool {1}>() y = If(c) <then_branch = a () => (float p) { p = Gather(t, ids) }, "
            "else_branch = b () => (float q) { q = Identity(t) }>",
            0,
            7,
        ),
        ("y = Neg(ids)", 0, 10),
    ],
)
def test_integers_stay_within_the_table_they_index(nodes: str, low: int, high: int) -> None:
    model = parse(
        f"g (int64[40, 5] ids) => (float y) <float[7, 2] t = {numbers(14)}, float[3, 2] u = {numbers(6)}> {{ {nodes} }}"
        ' <domain: "own", opset_import: ["" : 18]> Look (table, i) => (r) { r = Gather(table, i) }'
    )
    drawn = np.concatenate([f["ids"] for f in generate(model)])
    assert drawn.min() >= low
    assert drawn.max() < high
    assert len(np.unique(drawn)) > (high - low) // 2


def test_integers_stay_within_a_table_of_dynamic_size() -> None:
    text = "g (float[rows, 2] t, int64[n] ids) => (float y) { y = Gather(t, ids) }"
    (feed,) = feeds(text, sets=1, shape={"rows": 2, "n": 100})
    assert set(np.unique(feed["ids"])) == {0, 1}


NAMED = [
    ("int64[1, 6] position_ids", [[0, 1, 2, 3, 4, 5]]),
    ("int64[2] lengths, float[2, 9, 4] x", [9, 6]),
    ("int32[2, 1] seq_lens, float[2, 9, 4] x", [[9], [6]]),
    ("float[1, 2] im_shape, float[1, 3, 32, 64] image", [[32, 64]]),
    ("int64[1, 2] orig_target_sizes, float[1, 32, 64, 3] image", [[32, 64]]),
    ("float[1, 2] scale_factor", [[1, 1]]),
    ("int64 sr", 16000),
    ("bool[1] use_cache_branch", [False]),
    ("bool[2, 6] mask", [[True] * 6, [True] * 4 + [False] * 2]),
    ("bool[2, 6] key_padding_mask", [[False] * 6, [False] * 4 + [True] * 2]),
    ("float[2, 6] attention_mask", [[1] * 6, [1] * 4 + [0] * 2]),
    ("float[2, 1, 1, 6] attention_mask", [[[[1] * 6]], [[[1] * 4 + [0] * 2]]]),
]


@pytest.mark.parametrize(("inputs", "expected"), NAMED, ids=[n[0].split(",")[0] for n in NAMED])
def test_names_say_what_an_input_is(inputs: str, expected: Any) -> None:
    (feed,) = feeds(f"g ({inputs}) => (float y) {{ y = Constant<value_float = 1.0>() }}", sets=1)
    assert next(iter(feed.values())).tolist() == expected


def test_timesteps_and_segments_are_small() -> None:
    (feed,) = feeds(
        "g (int64[90] timestep, int64[9, 9] segment_ids) => (float y) { y = Constant<value_float = 1.0>() }",
        sets=1,
    )
    assert 10 < feed["timestep"].max() < 1000
    assert feed["segment_ids"].max() == 1


def test_position_ids_stay_within_their_table() -> None:
    (feed,) = feeds("g (int64[1, 6] position_ids) => (float y) <float[4, 2] t> { y = Gather(t, position_ids) }", sets=1)
    assert feed["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1]]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float16", "float16"),
        ("double", "float64"),
        ("bfloat16", "bfloat16"),
        ("uint8", "uint8"),
        ("int8", "int8"),
        ("bool", "bool"),
        ("int4", "int4"),
        ("complex64", "complex64"),
        ("string", "object"),
        ("float8e4m3fn", "float8_e4m3fn"),
    ],
)
def test_every_element_type(dtype: str, expected: str) -> None:
    (feed,) = feeds(f"g ({dtype}[20, 30] x) => ({dtype}[20, 30] y) {{ y = Identity(x) }}", sets=1)
    assert feed["x"].dtype == getattr(ml_dtypes, expected, expected)
    assert feed["x"].shape == (20, 30)
    assert len(set(feed["x"].reshape(-1).tolist())) > 1


def test_bytes_use_their_whole_range() -> None:
    (feed,) = feeds("g (uint8[1, 64, 64, 3] image) => (float y) { y = Cast<to = 1>(image) }", sets=1)
    assert feed["image"].max() > 250


def test_strings_are_those_the_model_knows() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 3]> g (string[50] s) => (int64[50] y) '
        '{ y = ai.onnx.ml.LabelEncoder<keys_strings = ["red", "blue"], values_int64s = [0, 1]>(s) }'
    )
    assert set(generate(model)[0]["s"]) == {"red", "blue"}


def test_sequences_and_optionals() -> None:
    model = parse(
        "g (seq(float[n, 2]) s, optional(float[3]) o) => (bool h, float c) "
        "{ h = OptionalHasElement(o) c = ConcatFromSequence<axis = 0>(s) }"
    )
    one, two, _ = runnable(model)
    assert [a.shape for a in one["s"]] == [(4, 2), (4, 2)] or len({a.shape for a in one["s"]}) == 1
    assert one["o"].shape == (3,)
    assert two["o"] is None


def test_an_optional_that_is_always_read_has_a_value() -> None:
    model = parse("g (optional(float[3]) o) => (float[3] y) { y = OptionalGetElement(o) }")
    assert all(f["o"] is not None for f in generate(model))


def test_a_type_that_cannot_be_generated() -> None:
    model = parse("g (float[3] x) => (float[3] y) { y = Neg(x) }")
    model.graph.inputs[0].type = ir.SparseTensorType(ir.DataType.FLOAT)
    with pytest.raises(DataError, match=r"input x is of the type .*--data module:function"):
        generate(model)


def test_an_input_without_type() -> None:
    model = parse("g (float[3] x) => (float[3] y) { y = Neg(x) }")
    model.graph.inputs[0].type = None
    with pytest.raises(DataError, match="type unknown"):
        generate(model)


def test_overridable_initializers_keep_their_value() -> None:
    model = parse("g (float[3] x, float[3] w = {1, 2, 3}) => (float[3] y) { y = Add(x, w) }")
    assert list(generate(model)[0]) == ["x"]


def test_a_model_without_inputs() -> None:
    model = parse("g () => (float[1] y) { y = Constant<value_floats = [1.0]>() }")
    assert runnable(model, sets=2) == [{}, {}]


DOMAINS = [
    ("y = Log(x)", "float[30] x"),
    ("y = Sqrt(x)", "float[30] x"),
    ("y = Acos(x)", "float[30] x"),
    ("y = Acosh(x)", "float[30] x"),
    ("y = Pow(x, z)", "float[30] x, float[30] z"),
    ("c = Identity(x) y = Log(c)", "float[30] x"),
    ("y = BatchNormalization(x, s, b, m, v)", "float[2, 3] x, float[3] s, float[3] b, float[3] m, float[3] v"),
]


@pytest.mark.parametrize(("nodes", "inputs"), DOMAINS)
def test_numbers_lie_where_the_operator_is_defined(nodes: str, inputs: str) -> None:
    model = parse(f"g ({inputs}) => (float y) {{ {nodes} }}")
    with open_session(model, optimized=False) as session:
        for feed in generate(model):
            assert np.isfinite(session.run(feed)["y"]).all()


STEERED = [
    "g (float[2, 6] x, int64[2] s) => (float[3, 4] y) { y = Reshape(x, s) }",
    "g (float[2, 6] x, int64[3] s) => (float y) { y = Reshape(x, s) }",
    "g (float[2, 1] x, int64[2] s) => (float[2, 5] y) { y = Expand(x, s) }",
    "g (float[2, 3] x, int64[2] r) => (float[4, 3] y) { y = Tile(x, r) }",
    "g (int64[2] s) => (float[4, 3] y) { y = ConstantOfShape(s) }",
    "g (float[4, 6] x, int64[2] a, int64[2] b) => (float[2, 3] y) { y = Slice(x, a, b) }",
    "g (float[4, 6] x, int64[1] a, int64[1] b, int64[1] c, int64[1] d) => (float[4, 6] y) { y = Slice(x, a, b, c, d) }",
    "g (float[4, 6] x, int64[4] p) => (float[5, 8] y) { y = Pad(x, p) }",
    "g (float[1, 1, 2, 2] x, float[4] s) => (float[1, 1, 4, 6] y) { y = Resize(x, , s) }",
    "g (float[1, 1, 2, 2] x, int64[4] s) => (float[1, 1, 4, 6] y) { y = Resize(x, , , s) }",
    "g (float[4, 6] x, int64[1] k) => (float[4, 3] y, int64[4, 3] i) { y, i = TopK(x, k) }",
    "g (float[1, 4, 1] x, int64[1] a) => (float[1, 4] y) { y = Squeeze(x, a) }",
    "g (float[4] x, int64[2] a) => (float[1, 4, 1] y) { y = Unsqueeze(x, a) }",
    "g (float[2, 4] x, int64[1] a) => (float[2, 1] y) { y = ReduceMean(x, a) }",
    "g (float[2, 4] x, int64[1] a) => (float[2] y) { y = ReduceSum<keepdims = 0>(x, a) }",
    "g (float[6] x, int64[2] s) => (float[2] a, float[4] b) { a, b = Split(x, s) }",
    "g (int64[3] i, int64 d, float[2] v) => (float[3, 5] y) { y = OneHot(i, d, v) }",
    "g (int64 a, int64 b, int64 c) => (int64[4] y) { y = Range(a, b, c) }",
    "g (float[2, 3] x, int64 a) => (float[2, 3] y) { y = CumSum(x, a) }",
    "g (float[2, 3] x, int64 k) => (float[2, 3] y) { y = Trilu(x, k) }",
    "g (float[2, 3] x, int64[2, 2] i) => (float[2] y) { y = GatherND(x, i) }",
    "g (float[2, 3] x, int64[2, 3] i) => (float[2, 3] y) { y = GatherElements(x, i) }",
    "g (float[1, 4, 4] b, float[1, 1, 4] s, int64 m, float t, float u) => (int64 y) { y = NonMaxSuppression(b, s, m, t, u) }",
    "g (float[4, 2] x, int64[2] l) => (float[4, 2] y) { y = ReverseSequence(x, l) }",
    "g (float[2, 3] x, float r, bool t) => (float[2, 3] y) { y = Dropout(x, r, t) }",
    f"g (float[4, 1, 2] x, int32[1] l) => (float y) <float[1, 12, 2] w = {numbers(24)}, float[1, 12, 3] r = {numbers(36)}> "
    "{ y = LSTM<hidden_size = 3>(x, w, r, , l) }",
    "g (int64 m, bool c, float[2] x) => (float[2] y) { y = Loop(m, c, x) <body = b (int64 i, bool d, float[2] v) => "
    "(bool e, float[2] w) { e = Identity(d) w = Neg(v) }> }",
    "g (float[1, 2, 3] theta, int64[4] s) => (float[1, 4, 5, 2] y) { y = AffineGrid(theta, s) }",
]


@pytest.mark.parametrize("text", STEERED, ids=[s.split("{")[1].split("(")[0].strip() for s in STEERED])
def test_inputs_that_steer_an_operator_let_it_run(text: str) -> None:
    calls = []
    model = parse(text, 20)
    with open_session(model, optimized=False) as session:

        def run(feed: Feed) -> object:
            calls.append(feed)
            return session.run(feed)

        assert len(generate_runnable(model, run)) == 3
    assert len(calls) == 3, "the first choice runs"


def test_an_unsqueeze_axis_that_nothing_tells() -> None:
    assert runnable(parse("g (float[N] x, int64[1] a) => (float y) { y = Unsqueeze(x, a) }"))


# ------------------------------------------------------------------------------------------------ runnable


def fails_unless(accepts: Callable[[Feed], bool], message: str = "no.") -> Callable[[Feed], object]:
    def run(feed: Feed) -> object:
        if not accepts(feed):
            raise RuntimeFailure(message)
        return {}

    return run


IMAGE = parse("g (float[N, 3, H, W] x) => (float y) { [conv] y = Neg(x) }")


def test_other_sizes_are_tried() -> None:
    found = generate_runnable(IMAGE, fails_unless(lambda f: f["x"].shape[2:] == (640, 640)))
    # the other axes vary as they usually do
    assert [f["x"].shape for f in found] == [(1, 3, 640, 640), (2, 3, 640, 640), (3, 3, 640, 640)]


def test_other_sizes_stand_for_all_sets_where_nothing_else_runs() -> None:
    found = generate_runnable(IMAGE, fails_unless(lambda f: f["x"].shape == (1, 3, 640, 640)))
    assert [f["x"].shape for f in found] == [(1, 3, 640, 640)] * 3
    assert (found[0]["x"] != found[1]["x"]).any()


def test_a_size_that_the_failure_mentions_is_tried() -> None:
    model = parse("g (int64[b, s] ids, bool[b, s] mask) => (float y) { y = Neg(ids) }")
    said = 'Reshape (node "r_11") failed: Input shape:{16,1,64}, requested shape:{9,4,16}, 0.25 and 1e9.'
    found = generate_runnable(model, fails_unless(lambda f: f["ids"].shape[1] == 9, said))
    assert [f["ids"].shape for f in found] == [(1, 9), (2, 9), (3, 9)]
    with pytest.raises(DataError, match=r"--shape b=N,s=N"):
        generate_runnable(model, fails_unless(lambda f: f["ids"].shape[1] == 9, said), shape={"s": 7})


def test_a_model_of_sound_says_so_by_its_sampling_rate() -> None:
    model = parse("g (float[?, ?] input, float[2, ?, 128] state, int64 sr) => (float y) { y = Neg(input) }")
    one, two, _ = generate(model)
    assert one["input"].shape == (1, 16000)
    assert two["input"].shape[0] == two["state"].shape[1] == 2
    found = generate_runnable(model, fails_unless(lambda f: f["input"].shape[1] == 512))
    assert [f["input"].shape for f in found] == [(1, 512), (2, 512), (3, 512)]


def test_sizes_of_two_kinds_of_axes_that_are_both_likely_come_early() -> None:
    model = parse("g (float[?, ?] x, float[4, ?, 8] y) => (float z) { z = Neg(x) }")
    assert generate_runnable(model, fails_unless(lambda f: f["x"].shape[1] == 3 and f["y"].shape[1] == 1))


def test_sizes_that_run_replace_those_that_do_not() -> None:
    found = generate_runnable(IMAGE, fails_unless(lambda f: f["x"].shape[0] == 2))
    assert [f["x"].shape[0] for f in found] == [2, 2, 2]
    assert (found[0]["x"] != found[1]["x"]).any()


def test_fewer_sets_when_some_values_do_not_run() -> None:
    text = "g (int64[3] i) => (int64[3] y) { y = Neg(i) }"
    first = feeds(text)[0]["i"].sum()
    found = generate_runnable(parse(text), fails_unless(lambda f: f["i"].sum() == first))
    assert len(found) == 1


def test_small_integers_are_tried() -> None:
    found = generate_runnable(
        parse("g (int64[30] i) => (int64[30] y) { y = Neg(i) }"), fails_unless(lambda f: f["i"].max() < 2)
    )
    assert len(found) == 3


def test_two_kinds_of_axes_are_changed_together() -> None:
    model = parse(
        "g (float[batch, 2, past_length, 4] past, int64[batch, seq] ids) => (int64[batch, seq] y) { y = Neg(ids) }"
    )
    found = generate_runnable(model, fails_unless(lambda f: f["past"].shape[2] == 0 and f["ids"].shape[1] == 1))
    assert len(found) == 3


def test_the_users_sizes_stand() -> None:
    with pytest.raises(DataError):
        generate_runnable(IMAGE, fails_unless(lambda f: f["x"].shape[2] == 640), shape={"H": 32})
    tried = []
    generate_runnable(IMAGE, fails_unless(lambda f: not tried.append(f["x"].shape[2])), shape={"H": 32})
    assert set(tried) == {32}


def test_giving_up_says_which_input_and_what_to_pass() -> None:
    with pytest.raises(DataError) as caught:
        generate_runnable(IMAGE, fails_unless(lambda f: False, 'Neg (node "conv") failed: too small.'))
    assert str(caught.value) == (
        'Generated inputs do not run the model. Neg (node "conv") failed: too small. It depends on x [N, 3, H, W]; pass '
        "sizes that fit with --shape N=N,H=N, or real inputs with --data."
    )


def test_giving_up_names_only_the_inputs_that_are_involved() -> None:
    model = parse(
        "g (float[2] a, float[n] b, int64[2] c) => (float[2] y, int64[2] z) { [sum] y = Add(a, b) z = Neg(c) }"
    )
    with pytest.raises(DataError) as caught:
        generate_runnable(model, fails_unless(lambda f: False, 'Add (node "sum") failed: sizes.'))
    assert "It depends on a [2], b [n]; pass sizes that fit with --shape n=N, or" in str(caught.value)
    with pytest.raises(DataError, match=r"It depends on c \[2\]; pass real inputs with --data"):
        generate_runnable(model, fails_unless(lambda f: False, 'input "c" is odd.'))


def test_giving_up_looks_into_nested_graphs() -> None:
    model = parse(
        "g (bool c, float[n] x, float[n] z) => (float[n] y) { [if] y = If(c) <"
        "then_branch = t () => (float[n] a) { b = Neg(x) [inner] a = Abs(b) }, "
        "else_branch = e () => (float[n] d) { d = Exp(z) }> }"
    )
    with pytest.raises(DataError, match=r"It depends on x \[n\]; pass sizes that fit with --shape n=N"):
        generate_runnable(model, fails_unless(lambda f: False, 'If (node "if") failed: Abs (node "inner") failed: no.'))
    with pytest.raises(DataError, match=r"It depends on c \[\], x \[n\], z \[n\]; "):
        generate_runnable(model, fails_unless(lambda f: False, 'If (node "if") failed: no.'))
    loop = parse(
        "g (int64 m, bool c, float[n] x) => (float[n] y) { y = Loop(m, c, x) <body = b (int64 i, bool d, float[n] v) "
        "=> (bool e, float[n] w) { e = Identity(d) [inner] w = Neg(v) }> }"
    )
    with pytest.raises(DataError, match=r"It depends on .*x \[n\]"):
        generate_runnable(loop, fails_unless(lambda f: False, 'Neg (node "inner") failed: no.'))


def test_only_failures_of_the_runtime_are_caught() -> None:
    def run(feed: Feed) -> object:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        generate_runnable(IMAGE, run)


# ------------------------------------------------------------------------------------------------ masks


@settings(deadline=None)
@given(rows=st.integers(1, 9), length=st.integers(1, 40), index=st.integers(0, 5))
def test_rows_are_never_empty(rows: int, length: int, index: int) -> None:
    lengths = valid_lengths(rows, length, index)
    assert len(lengths) == rows
    assert all(1 <= n <= length for n in lengths)
    assert lengths[0] == length or (rows == 1 and index > 0)
    np.testing.assert_array_equal(valid_mask((rows, length), index).sum(axis=1), lengths)


@pytest.mark.parametrize(("shape", "expected"), [((), True), ((0,), []), ((4,), [True, True, True, False])])
def test_masks_of_few_axes(shape: tuple[int, ...], expected: Any) -> None:
    assert valid_mask(shape, 1).tolist() == expected


@settings(deadline=None)
@given(
    dims=st.lists(st.one_of(st.integers(0, 4), st.sampled_from(["batch", "seq", "h", "w", "?", "a+b"])), max_size=5),
    dtype=st.sampled_from(["FLOAT", "INT64", "BOOL", "STRING", "FLOAT16", "UINT8", "BFLOAT16"]),
    name=st.sampled_from(["x", "mask", "input_ids", "lengths", "image_shape", "past.0.key", "position_ids"]),
)
def test_any_input_can_be_generated_and_run(dims: list[int | str], dtype: str, name: str) -> None:
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType[dtype]), shape=ir.Shape(dims))
    node = ir.node("Identity", [value])
    node.outputs[0].name = "y"
    node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
    model = ir.Model(ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 21}, name="g"), ir_version=10)
    with open_session(model, optimized=False) as session:
        for feed in generate(model):
            array = session.run(feed)["y"]
            assert array.shape == feed[name].shape
            assert all(want == got for want, got in zip(dims, array.shape, strict=True) if isinstance(want, int))


def test_giving_up_on_constants_alone_advises_no_other_inputs() -> None:
    model = parse("g (float[2] a) => (float[2] y) <int64[1] s = {-5}> { [fill] f = ConstantOfShape(s) y = Add(a, f) }")
    with pytest.raises(DataError) as caught:
        generate_runnable(model, fails_unless(lambda f: False, 'ConstantOfShape (node "fill") failed: negative.'))
    assert str(caught.value).endswith("It depends on no input, so that no others help; correct the model.")


def test_giving_up_without_a_name_does_not_claim_that_inputs_are_to_blame() -> None:
    with pytest.raises(DataError, match=r"failed: out of memory\. Its inputs are x \[N, 3, H, W\]; pass sizes"):
        generate_runnable(IMAGE, fails_unless(lambda f: False, "Neg failed: out of memory."))
