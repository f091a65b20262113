import itertools

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, Guarantee
from onnxopt.errors import UsageError
from onnxopt.numeric import magnitude
from onnxopt.passes.prune.prune_weights import PruneWeights


def context(model):
    return Context(target="portable", seed=0, evaluate=lambda node, inputs, opset: None, shapes=Shapes(model))


HEAD = '<ir_version: 10, opset_import: ["" : 17]>'
MATMULS = f"{HEAD} agraph (float[5,64] x) => (float[5,32] y) {{ h = MatMul(x, w) y = MatMul(h, v) }}"
CONV = f"{HEAD} agraph (float[1,8,9,9] x) => (float[1,16,7,7] y) {{ y = Conv(x, w) }}"


def declare(text, **arrays):
    """Build a model from ONNX text and give it initializers of this content."""
    proto = onnx.parser.parse_model(text)
    for name, array in arrays.items():
        dtype = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        data = np.ascontiguousarray(array).tobytes()
        proto.graph.initializer.append(onnx.helper.make_tensor(name, dtype, array.shape, data, raw=True))
    return ir.from_proto(proto)


def apply(model, **options):
    edits, refusals = {}, {}
    for found in PruneWeights(**options).run(model, context(model)):
        if isinstance(found, Edit):
            found.apply()
            edits[str(found.site)] = found.summary
        else:
            refusals[found.site.output] = found.reason
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return edits, refusals


def array_of(model, name):
    return model.graph.initializers[name].const_value.numpy()


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_says_that_zeros_bring_no_speed():
    assert PruneWeights.guarantee is Guarantee.APPROXIMATE
    assert "zeros alone bring no speed in ONNX Runtime" in PruneWeights(ratio=0.5).caveat()


def test_threshold():
    w = random(64, 48)
    model = declare(MATMULS, w=w, v=random(48, 32, seed=1) + 9)
    edits, _ = apply(model, threshold=0.7)
    assert list(edits) == ["prune-weights at w"]
    np.testing.assert_array_equal(array_of(model, "w"), np.where(np.abs(w) < 0.7, 0, w))
    zeros = np.count_nonzero(np.abs(w) < 0.7)
    assert edits["prune-weights at w"] == f"float32[64,48], 0 to {zeros:,} of 3,072 weights zero ({zeros / 3072:.1%})"


def test_the_threshold_itself_stays():
    model = declare(MATMULS, w=np.full((64, 48), 0.5, np.float32), v=random(48, 32))
    assert "prune-weights at w" not in apply(model, threshold=0.5)[0]


def test_a_threshold_between_two_floats_takes_the_smaller_one():
    below = np.float32(0.7)
    assert float(below) < 0.7 < float(np.nextafter(below, np.float32(1)))
    w = np.full((64, 48), below)
    w[0] = np.nextafter(below, np.float32(1))
    model = declare(MATMULS, w=w, v=random(48, 32))
    apply(model, threshold=0.7)
    assert array_of(model, "w")[0].all()
    assert not array_of(model, "w")[1:].any()


@pytest.mark.parametrize("ratio", [0.001, 0.25, 0.5, 0.9, 1.0])
def test_ratio_per_tensor(ratio):
    arrays = {"w": random(64, 48), "v": random(48, 32, seed=1) * 100}
    model = declare(MATMULS, **arrays)
    assert len(apply(model, ratio=ratio)[0]) == 2
    for name, before in arrays.items():
        after = array_of(model, name)
        kept = after != 0
        assert np.count_nonzero(~kept) == round(ratio * before.size)
        np.testing.assert_array_equal(after[kept], before[kept])
        if kept.any():
            assert np.abs(before[~kept]).max() <= np.abs(before[kept]).min()


def test_ratio_over_all_tensors_takes_more_of_the_small_ones():
    arrays = {"w": random(64, 48), "v": random(48, 32, seed=1) * 3}
    model = declare(MATMULS, **arrays)
    assert len(apply(model, ratio=0.4, scope="global")[0]) == 2
    after = np.concatenate([array_of(model, n).ravel() for n in arrays])
    before = np.concatenate([a.ravel() for a in arrays.values()])
    assert np.count_nonzero(after == 0) == round(0.4 * before.size)
    assert np.abs(before[after == 0]).max() <= np.abs(before[after != 0]).min()
    shares = {n: np.mean(array_of(model, n) == 0) for n in arrays}
    assert shares["w"] > 2 * shares["v"] > 0


def test_of_equal_magnitudes_the_first_go_first():
    w = np.ones((64, 48), np.float32)
    w[::2] = -1
    model = declare(MATMULS, w=w, v=np.ones((48, 32), np.float32))
    apply(model, ratio=0.8, scope="global")
    zeros = round(0.8 * (w.size + 48 * 32))
    flat = np.concatenate([array_of(model, "w").ravel(), array_of(model, "v").ravel()])
    assert not flat[:zeros].any()
    assert flat[zeros:].all()


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_zeros_that_are_there_count(scope):
    w = random(64, 48)
    w[np.abs(w) < 0.3] = 0
    model = declare(MATMULS, w=w, v=random(48, 32, seed=1))
    edits, _ = apply(model, ratio=0.5, scope=scope)
    assert f"{np.count_nonzero(w == 0):,} to " in edits["prune-weights at w"]
    zeros = [np.count_nonzero(array_of(model, n) == 0) for n in ("w", "v")]
    assert sum(zeros) == (64 * 48 + 48 * 32) // 2


ALL = [
    {"threshold": 0.7},
    {"ratio": 0.5},
    {"ratio": 1.0},
    {"ratio": 0.5, "scope": "global"},
    {"pattern": "2:4"},
    {"pattern": "1:8"},
]


@pytest.mark.parametrize("options", ALL)
def test_a_second_run_changes_nothing(options):
    model = declare(MATMULS, w=random(64, 48).round(1), v=random(48, 32, seed=1).round(1))
    assert apply(model, **options)[0]
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert apply(model, **options) == ({}, {})
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("options", ALL)
def test_finding_is_repeatable_and_clones_are_not_touched(options):
    model = declare(MATMULS, w=random(64, 48), v=random(48, 32, seed=1))
    once = [(e.site, e.summary) for e in PruneWeights(**options).run(model, context(model))]
    twice = [(e.site, e.summary) for e in PruneWeights(**options).run(model, context(model))]
    assert once == twice
    clone = model.clone()
    before = ir.to_proto(clone).SerializeToString(deterministic=True)
    apply(model, **options)
    assert ir.to_proto(clone).SerializeToString(deterministic=True) == before


def test_an_edit_that_is_left_out_does_not_change_the_others():
    def pruned(skip):
        model = declare(MATMULS, w=random(64, 48), v=random(48, 32, seed=1))
        for edit in PruneWeights(ratio=0.5, scope="global").run(model, context(model)):
            if edit.site.output != skip:
                edit.apply()
        return model

    np.testing.assert_array_equal(array_of(pruned(None), "v"), array_of(pruned("w"), "v"))
    assert array_of(pruned("w"), "w").all()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8"])
def test_pattern_along_the_rows_of_matmul(pattern):
    keep, group = map(int, pattern.split(":"))
    w = random(64, 48)
    model = declare(MATMULS, w=w, v=random(48, 32, seed=1))
    assert len(apply(model, pattern=pattern)[0]) == 2
    after = array_of(model, "w")
    for column in range(48):
        for start in range(0, 64, group):
            old, new = w[start : start + group, column], after[start : start + group, column]
            expected = set(np.argsort(-np.abs(old))[:keep])
            assert set(np.flatnonzero(new)) == expected
            assert all(new[i] == old[i] for i in expected)


def test_pattern_along_the_input_channels_of_a_convolution():
    w = random(16, 8, 3, 3)
    model = declare(CONV, w=w)
    edits, _ = apply(model, pattern="2:4")
    after = array_of(model, "w")
    groups = after.reshape(16, 2, 4, 3, 3)
    assert np.all(np.count_nonzero(groups, axis=2) == 2)
    assert edits["prune-weights at w"] == "float32[16,8,3,3], 0 to 576 of 1,152 weights zero (50.0%)"


@pytest.mark.parametrize(("attributes", "axis"), [("", 0), ("<transB = 1>", 1)])
def test_pattern_follows_the_layout_of_gemm(attributes, axis):
    w = random(64, 64)
    text = f"{HEAD} agraph (float[5,64] x) => (float[5,64] y) {{ y = Gemm{attributes}(x, w) }}"
    model = declare(text, w=w)
    apply(model, pattern="2:4")
    after = np.moveaxis(array_of(model, "w"), axis, 1).reshape(64, 16, 4)
    assert np.all(np.count_nonzero(after, axis=2) == 2)


def test_of_equals_in_a_group_the_first_stay():
    model = declare(MATMULS, w=np.ones((64, 48), np.float32), v=random(48, 32))
    apply(model, pattern="2:4")
    assert array_of(model, "w")[:8, 0].tolist() == [1, 1, 0, 0, 1, 1, 0, 0]


def test_pattern_needs_whole_groups():
    text = f"{HEAD} agraph (float[1,3,9,9] x) => (float[1,64,7,7] y) {{ y = Conv(x, w) }}"
    model = declare(text, w=random(64, 3, 3, 3))
    assert apply(model, pattern="2:4") == (
        {},
        {"w": "its contraction axis is not a multiple of 4 long, which 2:4 needs"},
    )


def test_tables_that_are_only_looked_up_stay():
    text = f"{HEAD} agraph (int64[6] x) => (float[6,32] y) {{ y = Gather(w, x) }}"
    model = declare(text, w=random(64, 32))
    assert apply(model, ratio=0.5) == ({}, {"w": "it is a table that is looked up and not multiplied with"})


def test_tables_that_are_also_multiplied_with_are_pruned_along_that_axis():
    text = f"""{HEAD} agraph (int64[6] x) => (float[6,64] y) {{
        h = Gather(w, x) t = Transpose(w) y = MatMul(h, t) }}"""
    model = declare(text, w=random(64, 32))
    assert len(apply(model, pattern="2:4")[0]) == 1
    assert np.all(np.count_nonzero(array_of(model, "w").reshape(64, 8, 4), axis=2) == 2)


def test_what_must_stay_stays():
    text = f"""{HEAD} agraph (float[5,64] x, float[64,48] over) => (float[5,48] y, float[64,48] out) {{
        a = MatMul(x, over) b = MatMul(x, out) c = MatMul(x, bad) d = Add(a, b) e = Add(c, d)
        y = Add(e, table) }}"""
    bad = random(64, 48)
    bad[0, 0] = np.nan
    model = declare(text, over=random(64, 48), out=random(64, 48), bad=bad, table=random(5, 48))
    edits, refusals = apply(model, ratio=0.5, min_elements=1)
    assert not edits
    assert refusals == {
        "over": "it is also an input of the graph, so the caller can override it",
        "out": "it is an output of the graph",
        "bad": "it holds NaN or infinity",
    }


def test_small_weights_stay():
    model = declare(MATMULS, w=random(64, 48), v=random(48, 32))
    assert list(apply(model, ratio=0.5, min_elements=64 * 48)[0]) == ["prune-weights at w"]


def test_constants_of_branches_and_functions():
    array = random(8, 12)
    values = ",".join(str(v) for v in array.reshape(-1))
    text = f"""
        <ir_version: 10, opset_import: ["" : 17, "local" : 1]>
        agraph (float[5,8] x, bool c) => (float[5,12] y) {{
            h = local.layer(x)
            z = If (c) <
                then_branch = thens () => (float[5,12] a) {{
                    m = Constant<value = float[8,12] {{{values}}}>() a = MatMul(x, m) }},
                else_branch = elses () => (float[5,12] b) {{ b = MatMul(x, w) }}
            >
            y = Add(h, z)
        }}
        <domain: "local", opset_import: ["" : 17]>
        layer (x) => (y) {{ k = Constant<value = float[8,12] {{{values}}}>() y = MatMul(x, k) }}
    """
    model = declare(text, w=array)
    edits, _ = apply(model, ratio=0.5, min_elements=1)
    assert len(edits) == 3
    x = random(5, 8, seed=1)
    w = np.where(np.abs(array) <= np.sort(np.abs(array).ravel())[47], 0, array)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    for choice in (True, False):
        got = session.run(None, {"x": x, "c": np.array(choice)})[0]
        np.testing.assert_allclose(got, 2 * x @ w, rtol=1e-4, atol=1e-5)
    assert apply(model, ratio=0.5, min_elements=1) == ({}, {})


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize(
    "options", [{"threshold": 0.7}, {"ratio": 0.5}, {"ratio": 0.5, "scope": "global"}, {"pattern": "2:4"}]
)
def test_other_float_types_keep_their_type(dtype, options):
    w = random(64, 48).astype(dtype)
    name = {np.float16: "float16", np.float64: "double"}.get(dtype, "bfloat16")
    text = f"{HEAD} agraph ({name}[5,64] x) => ({name}[5,48] y) {{ y = MatMul(x, w) }}"
    model = declare(text, w=w)
    edits, _ = apply(model, **options)
    after = model.graph.initializers["w"].const_value
    assert len(edits) == 1
    assert after.numpy().dtype == w.dtype
    kept = after.numpy() != 0
    assert np.array_equal(after.numpy()[kept], w[kept])
    if "threshold" not in options:
        assert np.count_nonzero(kept) == w.size // 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "prune-weights needs exactly one of threshold, ratio and pattern, and none is given"),
        ({"ratio": 0.5, "threshold": 1.0}, "and threshold and ratio are given"),
        ({"threshold": 0.0}, "threshold is 0.0; use a number above 0"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": float("inf")}, "threshold is inf"),
        ({"ratio": 0.0}, "ratio is 0.0; use a number above 0 and up to 1"),
        ({"ratio": 1.5}, "ratio is 1.5"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"pattern": "4:2"}, 'pattern is "4:2"; write N:M with 0 < N < M'),
        ({"pattern": "2/4"}, 'pattern is "2/4"'),
        ({"pattern": ""}, 'pattern is ""'),
        ({"ratio": 0.5, "scope": "model"}, 'scope is "model"; use tensor or global'),
        ({"pattern": "2:4", "scope": "global"}, "scope=global needs ratio; with pattern leave it out"),
        ({"ratio": 0.5, "min_elements": 0}, "min_elements is 0; use 1 or more"),
    ],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(UsageError) as error:
        PruneWeights(**options)
    assert message in str(error.value)


NUMBERS = st.floats(-100, 100, width=16).map(lambda x: x + 0.0)


@settings(max_examples=80, deadline=None)
@given(
    arrays=st.lists(hnp.arrays(np.float32, st.integers(1, 30), elements=NUMBERS), min_size=1, max_size=3),
    double=st.booleans(),
    data=st.data(),
)
def test_smallest_takes_exactly_the_wanted_number(arrays, double, data):
    if double:
        arrays[0] = arrays[0].astype(np.float64)
    everything = np.sort(np.abs(np.concatenate(arrays).astype(np.float64)))
    count = data.draw(st.integers(1, everything.size))
    cut = magnitude.smallest(lambda: iter(arrays), count)
    assert cut.magnitude == everything[count - 1]
    assert np.count_nonzero(everything < cut.magnitude) + cut.ties == count


@settings(max_examples=80, deadline=None)
@given(
    array=hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.just(12), st.integers(1, 3)), elements=NUMBERS),
    group=st.sampled_from([2, 3, 4, 6, 12]),
    data=st.data(),
)
def test_surplus_keeps_the_largest_and_the_first_of_equals(array, group, data):
    keep = data.draw(st.integers(1, group - 1))
    pruned = magnitude.without_surplus(array, keep, group, 1)
    assert magnitude.surplus(array, keep, group, 1) == np.count_nonzero(array) - np.count_nonzero(pruned)
    for i, k, start in itertools.product(range(array.shape[0]), range(array.shape[2]), range(0, 12, group)):
        members = array[i, start : start + group, k]
        order = sorted(range(group), key=lambda j: (-abs(members[j]), j))
        expected = [members[j] if j in order[:keep] else 0 for j in range(group)]
        assert pruned[i, start : start + group, k].tolist() == expected


def test_small_blocks_give_the_same_result(monkeypatch):
    array = random(6, 40, 7).round(1)
    cut = magnitude.smallest(lambda: [array], 700)
    whole = [cut, magnitude.count(array, 0.5), magnitude.without(array, cut).tolist()]
    monkeypatch.setattr(magnitude, "blocks", lambda shape: magnitude_blocks(shape, 13))
    pieces = [
        magnitude.smallest(lambda: [array], 700),
        magnitude.count(array, 0.5),
        magnitude.without(array, cut).tolist(),
    ]
    assert whole == pieces


magnitude_blocks = magnitude.blocks
