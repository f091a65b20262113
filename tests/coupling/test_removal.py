"""Every test prunes and compares with the original whose consumers hold zeros (see `Pruned`)."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt import feeds
from onnxopt.coupling.analysis import analyse
from onnxopt.coupling.removal import Removal
from onnxopt.verify import Verifier

CONV = "(float[1,3,9,9] x) => (float[1,5,5,5] y)"


def test_convolutions(prune):
    done = prune(f"{CONV} {{ a = Conv(x, w, b) r = Relu(a) y = Conv(r, v) }}", w=(8, 3, 3, 3), b=(8,), v=(5, 8, 3, 3))
    assert done.groups == {"w": 8}
    assert [done.shape(name) for name in "wbv"] == [[4, 3, 3, 3], [4], [5, 4, 3, 3]]
    assert done.removal.remaining["a"][1].tolist() == [4, 5, 6, 7]
    assert done.why("x", 1) == "it is an input of the model"
    assert done.why("w", 2) == "Conv a moves a window along it"
    assert done.why("v", 0) == "it is an output of the model"
    assert done.why("w", 0) is None


def test_residuals_go_together(prune):
    done = prune(
        """(float[1,3,5,5] x) => (float[1,2,5,5] y) {
        a = Conv(x, w) b = Relu(a) c = Conv(b, v) d = Add(a, c) e = Sigmoid(d) f = Conv(x, u)
        g = Mul(e, f) y = Conv(g, t) }""",
        w=(6, 3, 1, 1), v=(6, 6, 1, 1), u=(6, 3, 1, 1), t=(2, 6, 1, 1),
    )  # fmt: skip
    assert done.groups == {"w": 6}
    assert done.shape("v") == [3, 3, 1, 1]


def test_normalization_and_slopes_per_channel(prune):
    done = prune(
        f"""{CONV} {{ a = Conv(x, w) b = BatchNormalization(a, s, t, m, q) c = InstanceNormalization(b, i, j)
        d = PRelu(c, p) e = Add(d, k) y = Conv(e, v) }}""",
        {"q": np.full(8, 2, np.float32)},
        w=(8, 3, 3, 3), s=(8,), t=(8,), m=(8,), i=(8,), j=(8,), p=(8, 1, 1), k=(1, 8, 1, 1), v=(5, 8, 3, 3),
    )  # fmt: skip
    assert done.groups == {"w": 8}
    assert [done.shape(n) for n in ("s", "q", "i", "p", "k")] == [[4], [4], [4], [4, 1, 1], [1, 4, 1, 1]]


def test_depthwise_convolutions_lose_groups(prune):
    done = prune(
        f"{CONV} {{ a = Conv(x, w) b = Conv <group = 4> (a, u, c) y = Conv(b, v) }}",
        w=(4, 3, 3, 3), u=(8, 1, 1, 1), c=(8,), v=(5, 8, 3, 3),
    )  # fmt: skip
    assert done.groups == {"w": 4}
    assert done.shape("u") == [4, 1, 1, 1]
    assert done.node("Conv").graph[1].attributes["group"].value == 2


def test_groups_of_a_convolution_keep_equal_sizes(prune):
    done = prune(
        f"{CONV} {{ a = Conv(x, w) b = Conv <group = 2> (a, u) y = Conv(b, v) }}",
        w=(8, 3, 3, 3), u=(12, 4, 1, 1), v=(5, 12, 3, 3),
    )  # fmt: skip
    assert done.groups == {"w": 4, "u": 6}
    assert done.shape("u") == [6, 2, 1, 1]


@pytest.mark.parametrize(
    ("group", "weight", "rest", "left"),
    [(1, (8, 6, 1, 1), 6, 3), (8, (8, 1, 1, 1), 8, 4), (2, (8, 3, 1, 1), 6, 4)],
)
def test_transposed_convolutions(prune, group, weight, rest, left):
    done = prune(
        f"{CONV} {{ a = Conv(x, w) b = ConvTranspose <group = {group}> (a, u) y = Conv(b, v) }}",
        w=(8, 3, 3, 3), u=weight, v=(5, rest, 3, 3),
    )  # fmt: skip
    assert done.shape("w") == [4, 3, 3, 3]
    assert done.shape("v")[1] == left


def test_shuffled_channels(prune):
    done = prune(
        """(float[1,3,4,4] x) => (float[1,5,4,4] y) {
        a = Conv(x, w) b = Conv <group = 3> (a, u) c = Reshape(b, s) d = Transpose <perm = [0, 2, 1, 3, 4]> (c)
        e = Reshape(d, t) f = Conv <group = 12> (e, p) y = Conv(f, v) }""",
        {"s": np.array([1, 3, 4, 4, 4]), "t": np.array([1, 12, 4, 4])},
        w=(6, 3, 1, 1), u=(12, 2, 1, 1), p=(12, 1, 1, 1), v=(5, 12, 1, 1),
    )  # fmt: skip
    assert done.groups == {"w": 2, "u": 4}
    assert done.shape("p") == [6, 1, 1, 1]


def test_concat_split_slice_and_gather(prune):
    done = prune(
        """(float[1,3,4,4] x) => (float[1,5,4,4] y) {
        a = Conv(x, w) b = Conv(x, u) c = Concat <axis = 1> (a, b) d, e = Split <axis = 1> (c)
        f = Add(d, e) g = Slice(f, one, nine, one) h = Gather <axis = 1> (g, order) y = Conv(h, v) }""",
        {"one": np.array([1]), "nine": np.array([9]), "order": np.array([3, 0, -2, 1, 4])},
        w=(8, 3, 1, 1), u=(16, 3, 1, 1), v=(5, 5, 1, 1),
    )  # fmt: skip
    assert done.groups == {"w": 5}
    assert [done.shape(n) for n in "wuv"] == [[5, 3, 1, 1], [13, 3, 1, 1], [5, 2, 1, 1]]


def test_unequal_parts_get_sizes(prune):
    done = prune(
        """(float[2,3] x) => (float[2,5] y) {
        a = MatMul(x, w) b, c, d = Split <axis = 1> (a, sizes) e = MatMul(b, u) f = MatMul(c, v) g = MatMul(d, t)
        h = Add(e, f) y = Add(g, h) }""",
        {"sizes": np.array([2, 4, 6])}, w=(3, 12), u=(2, 5), v=(4, 5), t=(6, 5),
    )  # fmt: skip
    assert done.groups == {"w": 2, "w[2]": 4, "w[6]": 6}
    assert done.node("Split").inputs[1].const_value.numpy().tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("sizes", "left"), [(np.array([4, 2, 6]), [2, 1, 3]), (np.array(4), [2, 2, 2]), (np.array(5), [2, 2, 1])]
)
def test_a_sequence_of_parts(prune, sizes, left):
    first, second, third = np.split(np.ones(12), np.cumsum(sizes if sizes.ndim else [sizes] * (12 // sizes))[:2])
    done = prune(
        """(float[2,3] x) => (float[2,5] y) {
        a = MatMul(x, w) s = SplitToSequence <axis = 1> (a, sizes) b = SequenceAt(s, first) c = SequenceAt(s, second)
        d = SequenceAt(s, last) e = MatMul(b, u) f = MatMul(c, v) g = MatMul(d, t) h = Add(e, f) y = Add(g, h) }""",
        {"sizes": sizes, "first": np.array(0), "second": np.array(1), "last": np.array(-1)},
        w=(3, 12), u=(len(first), 5), v=(len(second), 5), t=(len(third), 5),
    )  # fmt: skip
    assert list(done.groups.values()) == [len(first), len(second), len(third)]
    assert done.node("SplitToSequence").inputs[1].const_value.numpy().tolist() == left


@pytest.mark.parametrize("more", ["z = SequenceLength(s)", "z = SequenceAt(s, place)"])
def test_a_sequence_of_which_more_is_asked_keeps_its_parts(build, more):
    text = """(float[2,3] x, int64 place) => (float[2,5] y, z) {
        a = MatMul(x, w) s = SplitToSequence <axis = 1> (a, four) b = SequenceAt(s, one) MORE y = MatMul(b, u) }"""
    model = build(
        text.replace("MORE", more).replace(", z)", ", int64 z)" if "Length" in more else ", float[2,4] z)"),
        {"four": np.array(4), "one": np.array(1)}, w=(3, 12), u=(4, 5),
    )  # fmt: skip
    coupling = analyse(model)
    assert coupling.groups == ()
    why = coupling.frozen(model.graph.initializers["w"], 1)
    assert why == "SplitToSequence s is not followed: more is done with the sequence than to take its parts"


def test_split_of_old_opsets(prune):
    done = prune(
        """(float[2,3] x) => (float[2,5] y) {
        a = MatMul(x, w) b, c = Split <axis = 1, split = [2, 4]> (a) e = MatMul(b, u) f = MatMul(c, v) y = Add(e, f) }""",
        opset=11, w=(3, 6), u=(2, 5), v=(4, 5),
    )  # fmt: skip
    assert list(done.node("Split").attributes["split"].value) == [1, 2]


ATTENTION = """(float[batch,seq,16] x) => (float[batch,seq,16] y) {
    q0 = MatMul(x, wq) q1 = Add(q0, bq) k0 = MatMul(x, wk) v0 = MatMul(x, wv)
    q2 = Reshape(q1, s) q = Transpose <perm = [0, 2, 1, 3]> (q2)
    k2 = Reshape(k0, s) k = Transpose <perm = [0, 2, 3, 1]> (k2)
    v2 = Reshape(v0, s) v = Transpose <perm = [0, 2, 1, 3]> (v2)
    a = MatMul(q, k) p = Softmax <axis = -1> (a) c = MatMul(p, v) t = Transpose <perm = [0, 2, 1, 3]> (c)
    r = Reshape(t, z) y = MatMul(r, wo) }"""


@pytest.mark.parametrize("sizes", [([0, 0, 4, 8], [0, 0, 32]), ([0, 0, -1, 8], [0, 0, -1])])
def test_heads_go_out_whole(prune, sizes):
    done = prune(
        ATTENTION, {"s": np.array(sizes[0]), "z": np.array(sizes[1])},
        wq=(16, 32), bq=(32,), wk=(16, 32), wv=(16, 32), wo=(32, 16),
    )  # fmt: skip
    assert done.groups == {"wq": 4}
    assert done.coupling.groups[0].span == 8
    assert [done.shape(n) for n in ("wq", "bq", "wo")] == [[16, 16], [16], [16, 16]]


def test_heads_that_are_merged_with_the_batch_on_the_way(prune):
    done = prune(
        """(float[batch,6,16] x) => (float[batch,6,16] y) {
        q0 = MatMul(x, wq) q2 = Reshape(q0, s) q = Transpose <perm = [0, 2, 1, 3]> (q2)
        k0 = MatMul(x, wk) k2 = Reshape(k0, s) k3 = Transpose <perm = [0, 2, 1, 3]> (k2)
        k4 = Reshape(k3, one) k5 = Transpose <perm = [0, 2, 1]> (k4) n = Shape <start = 0, end = 2> (k3)
        two = Concat <axis = 0> (n, rest) k = Reshape(k5, two)
        v0 = MatMul(x, wv) v2 = Reshape(v0, s) v = Transpose <perm = [0, 2, 1, 3]> (v2)
        a = MatMul(q, k) p = Softmax <axis = -1> (a) c = MatMul(p, v) t = Transpose <perm = [0, 2, 1, 3]> (c)
        r = Reshape(t, z) y = MatMul(r, wo) }""",
        {"s": np.array([0, 0, 4, 8]), "one": np.array([-1, 6, 8]), "rest": np.array([8, 6]),
         "z": np.array([0, 0, 32])},
        wq=(16, 32), wk=(16, 32), wv=(16, 32), wo=(32, 16),
    )  # fmt: skip
    assert done.groups == {"wq": 4}
    assert done.coupling.groups[0].span == 8


def test_sizes_that_are_joined_and_computed(prune):
    done = prune(
        """(float[batch,seq,16] x) => (float[batch,seq,5] y) {
        a = MatMul(x, w) n = Shape <start = 0, end = 2> (x) s = Concat <axis = 0> (n, heads) s32 = Cast <to = 6> (s)
        s64 = Cast <to = 7> (s32) b = Reshape(a, s64) c = Transpose <perm = [0, 2, 1, 3]> (b)
        d = Softmax <axis = -1> (c) e = Transpose <perm = [0, 2, 1, 3]> (d) t = Concat <axis = 0> (n, rest)
        f = Reshape(e, t) y = MatMul(f, v) }""",
        {"heads": np.array([4, 8]), "rest": np.array([32])}, w=(16, 32), v=(32, 5),
    )  # fmt: skip
    assert done.groups == {"w": 4}
    assert done.shape("v") == [16, 5]


def test_a_size_that_is_computed_with_stays(prune):
    done = prune(
        """(float[2,16] x) => (float[2,5] y) {
        a = MatMul(x, w) n = Shape <start = 1, end = 2> (a) f = Cast <to = 1> (n) r = Sqrt(f) b = Div(a, r)
        y = MatMul(b, v) }""",
        w=(16, 32), v=(32, 5),
    )  # fmt: skip
    assert done.groups == {}
    assert done.why("w", 1) == "Shape n reads its size"


def test_weights_that_are_filled_in(prune):
    done = prune(
        """(float[1,3,4,4] x) => (float[1,5,4,4] y) {
        w = ConstantOfShape <value = float[1] {0.5}> (s) a = Conv(x, w, b) u = ConstantOfShape <value = float[1] {0.25}> (t)
        y = Conv(a, u) }""",
        {"s": np.array([8, 3, 1, 1]), "t": np.array([5, 8, 1, 1])}, b=(8,),
    )  # fmt: skip
    assert list(done.groups.values()) == [8]
    assert done.node("ConstantOfShape").inputs[0].const_value.numpy().tolist() == [4, 3, 1, 1]
    assert done.shape("b") == [4]


def test_biases_stretched_to_the_size_of_a_weight(prune):
    done = prune(
        """(float[1,3,4,4] x) => (float[1,5,4,4] y) {
        n = Shape <start = 0, end = 1> (w) e = Expand(n, one) b = Expand(zero, e) a = Conv(x, w, b) y = Conv(a, v) }""",
        {"one": np.array([1]), "zero": np.float32(0.5)}, w=(8, 3, 1, 1), v=(5, 8, 1, 1),
    )  # fmt: skip
    assert done.groups == {"w": 8}


def test_keys_shared_by_query_heads(prune):
    done = prune(
        """(float[2,3,16] x) => (float[2,3,16] y) {
        q0 = MatMul(x, wq) q2 = Reshape(q0, s) q = Transpose <perm = [0, 2, 1, 3]> (q2)
        k0 = MatMul(x, wk) k2 = Reshape(k0, t) k3 = Transpose <perm = [0, 2, 3, 1]> (k2)
        k4 = Unsqueeze(k3, two) k5 = Expand(k4, wide) k = Reshape(k5, joined)
        a = MatMul(q, k) c = Transpose <perm = [0, 2, 1, 3]> (a) r = Reshape(c, z) y = MatMul(r, wo) }""",
        {"s": np.array([2, 3, 4, 8]), "t": np.array([2, 3, 2, 8]), "two": np.array([2]), "z": np.array([2, 3, 12]),
         "wide": np.array([2, 2, 2, 8, 3]), "joined": np.array([2, 4, 8, 3])},
        wq=(16, 32), wk=(16, 16), wo=(12, 16),
    )  # fmt: skip
    assert done.groups == {"wq": 2}
    assert done.shape("wk") == [16, 8]


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_hidden_units(prune, op, direction):
    gates, ways = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], 2 if direction == "bidirectional" else 1
    done = prune(
        f"""(float[5,2,3] x) => (float[5,2,4] y) {{
        h, last = {op} <hidden_size = 6, direction = "{direction}"> (x, w, r, b)
        t = Transpose <perm = [0, 2, 1, 3]> (h) f = Reshape(t, s) y = MatMul(f, v) }}""",
        {"s": np.array([0, 0, -1])},
        w=(ways, 6 * gates, 3), r=(ways, 6 * gates, 6), b=(ways, 12 * gates), v=(6 * ways, 4),
    )  # fmt: skip
    assert done.groups == {"w": 6}
    assert done.shape("r") == [ways, 3 * gates, 3]
    assert done.node(op).attributes["hidden_size"].value == 3


def test_branches_of_an_if(prune):
    done = prune(
        """(float[2,3] x, bool c) => (float[2,5] y) {
        a = MatMul(x, w)
        b = If(c) <then_branch = t () => (p) { p = Relu(a) }, else_branch = e () => (q) { q = MatMul(x, u) }>
        y = MatMul(b, v) }""",
        w=(3, 8), u=(3, 8), v=(8, 5),
    )  # fmt: skip
    assert done.groups == {"w": 8}
    assert done.shape("u") == [3, 4]


def test_unknown_operators_freeze(prune):
    done = prune(
        "(float[4,4] x) => (float[2] d, float[4,3] y) { a = MatMul(x, w) n = MatMul(a, u) d = Unknown(n) y = MatMul(a, v) }".replace(
            "Unknown", "Det"
        ).replace("float[2] d", "float d"),
        w=(4, 6),
        u=(6, 4),
        v=(6, 3),
    )
    assert done.groups == {"w": 6}
    assert done.why("u", 1) == "Det d is not known to the analysis"


def test_what_a_caller_can_override_stays(build):
    model = build("(float[2,3] x) => (float[2,4] y) { a = MatMul(x, w) y = MatMul(a, v) }", w=(3, 6), v=(6, 4))
    assert [group.units for group in analyse(model).groups] == [6]
    model.graph.inputs.append(model.graph.initializers["w"])
    assert analyse(model).groups == ()


def test_shared_weights_stay_consistent(prune):
    done = prune(
        "(float[2,8] x) => (float[2,8] y) { a = MatMul(x, w) b = Relu(a) c = MatMul(b, u) d = MatMul(c, w) y = MatMul(d, u) }",
        w=(8, 6), u=(6, 8),
    )  # fmt: skip
    assert done.groups == {"w": 6}


@pytest.mark.parametrize(
    ("text", "axis", "reason"),
    [
        ("s = Softmax <axis = 1> (a) y = MatMul(s, v)", 1, "Softmax s mixes the elements along it"),
        ("s = ReduceMean <axes = [1], keepdims = 1> (a) d = Sub(a, s) y = MatMul(d, v)", 1, "ReduceMean s reduces it"),
        ("s = LayerNormalization(a, g) y = MatMul(s, v)", 1, "LayerNormalization s normalizes along it"),
        ("s = CumSum(a, one) y = MatMul(s, v)", 1, "CumSum s mixes the elements along it"),
        ("s = Slice(a, zero, seven, one, two) t = Tile(s, twice) y = MatMul(t, v)", 1, None),
    ],
)
def test_axes_that_are_mixed_stay(prune, text, axis, reason):
    done = prune(
        f"(float[2,3] x) => (float[2,5] y) {{ a = MatMul(x, w) {text} }}",
        {"one": np.array([1]), "zero": np.array([0]), "two": np.array([2]), "seven": np.array([8]),
         "twice": np.array([1, 2])},
        w=(3, 8), g=(8,), v=(8, 5),
    )  # fmt: skip
    assert done.groups == {}
    assert done.why("w", axis) == reason if reason else done.why("w", axis) is not None


def test_group_normalization_loses_whole_groups(prune):
    done = prune(
        f"""{CONV} {{ a = Conv(x, w) b = Reshape(a, s) c = InstanceNormalization(b, g, h) d = Reshape(c, t)
        e = Mul(d, k) y = Conv(e, v) }}""",
        {"s": np.array([1, 4, -1]), "t": np.array([1, 8, 7, 7])},
        w=(8, 3, 3, 3), g=(4,), h=(4,), k=(8, 1, 1), v=(5, 8, 3, 3),
    )  # fmt: skip
    assert done.groups == {"w": 4}
    assert done.shape("k") == [4, 1, 1]


def test_fused_operators(prune):
    done = prune(
        """(float[2,3,16] x) => (float[2,3,16] y) {
        q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
        a = com.microsoft.MultiHeadAttention <num_heads = 4> (q, k, v) o = MatMul(a, wo)
        s, m, i, t = com.microsoft.SkipLayerNormalization(o, x, g, h)
        f = MatMul(s, w1) r = com.microsoft.BiasGelu(f, b1) y = MatMul(r, w2) }""",
        wq=(16, 32), wk=(16, 32), wv=(16, 32), wo=(32, 16), g=(16,), h=(16,), w1=(16, 24), b1=(24,), w2=(24, 16),
    )  # fmt: skip
    assert done.groups == {"wq": 4, "w1": 24}
    assert done.node("MultiHeadAttention").attributes["num_heads"].value == 2


def test_fused_attention_with_its_projections(prune):
    done = prune(
        """(float[2,3,16] x) => (float[2,3,16] y) {
        a = com.microsoft.Attention <num_heads = 4> (x, w, b) y = MatMul(a, wo) }""",
        w=(16, 96), b=(96,), wo=(32, 16),
    )  # fmt: skip
    assert done.groups == {"w": 4}
    assert done.shape("w") == [16, 48]
    assert list(done.node("Attention").attributes["qkv_hidden_sizes"].value) == [16, 16, 16]


def test_attention_of_opset_23(prune):
    done = prune(
        """(float[2,3,16] x) => (float[2,3,16] y) {
        q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
        a = Attention <q_num_heads = 4, kv_num_heads = 2> (q, k, v) y = MatMul(a, wo) }""",
        opset=23, wq=(16, 32), wk=(16, 16), wv=(16, 16), wo=(32, 16),
    )  # fmt: skip
    assert done.groups == {"wq": 2}
    attributes = done.node("Attention").attributes
    assert (attributes["q_num_heads"].value, attributes["kv_num_heads"].value) == (2, 1)


def test_products_of_two_results_are_masked_in_the_reference(prune):
    done = prune(
        """(float[2,3,16] x) => (float[2,3,3] y) {
        q = MatMul(x, wq) k = MatMul(x, wk) t = Transpose <perm = [0, 2, 1]> (k) a = MatMul(q, t)
        y = Softmax <axis = -1> (a) }""",
        wq=(16, 32), wk=(16, 32),
    )  # fmt: skip
    assert done.groups == {"wq": 32}
    assert done.shape("wk") == [16, 16]


def test_einsum(prune):
    done = prune(
        """(float[2,3,16] x) => (float[2,3,5] y) {
        a = Einsum <equation = "bsi,ih->bsh"> (x, w) y = Einsum <equation = "bsh,ho->bso"> (a, v) }""",
        w=(16, 8), v=(8, 5),
    )  # fmt: skip
    assert done.groups == {"w": 8}


def test_nothing_is_left_of_no_axis(prune):
    done = prune("(float[2,3] x) => (float[2,5] y) { a = MatMul(x, w) y = MatMul(a, v) }", w=(3, 8), v=(8, 5))
    with pytest.raises(ValueError, match="nothing would be left of axis 1 of"):
        done.removal.remove(done.coupling.groups[0].roots)


def test_tensors_of_the_original_are_not_written_into(prune):
    first = prune("(float[2,3] x) => (float[2,5] y) { a = MatMul(x, w) y = MatMul(a, v) }", w=(3, 8), v=(8, 5))
    member = first.coupling.groups[0].members[0]
    assert list(member.tensor.shape) == [3, 8]


LAYERS = st.lists(
    st.tuples(st.sampled_from(["conv", "depthwise", "grouped", "add", "concat", "split", "norm", "relu", "reshape"]),
              st.integers(1, 3)),
    min_size=1, max_size=8,
)  # fmt: skip


def net(layers):
    """Write a random convolutional net as text, and the shapes of its weights."""
    lines, shapes, width, value, count = ["a0 = Conv(x, w0)"], {"w0": (8, 3, 1, 1)}, 8, "a0", itertools.count(1)
    constants = {}
    for kind, size in layers:
        i = next(count)
        new = f"a{i}"
        if kind == "conv":
            lines.append(f"{new} = Conv({value}, w{i})")
            shapes[f"w{i}"] = (4 * size, width, 1, 1)
            width = 4 * size
        elif kind == "depthwise":
            lines.append(f"{new} = Conv <group = {width}> ({value}, w{i})")
            shapes[f"w{i}"] = (width * size, 1, 1, 1)
            width *= size
        elif kind == "grouped":
            lines.append(f"{new} = Conv <group = 2> ({value}, w{i})")
            shapes[f"w{i}"] = (4 * size, width // 2, 1, 1)
            width = 4 * size
        elif kind == "add":
            lines.append(f"b{i} = Conv({value}, w{i}) {new} = Add(b{i}, {value})")
            shapes[f"w{i}"] = (width, width, 1, 1)
        elif kind == "concat":
            lines.append(f"b{i} = Conv(x, w{i}) {new} = Concat <axis = 1> (b{i}, {value})")
            shapes[f"w{i}"] = (2 * size, 3, 1, 1)
            width += 2 * size
        elif kind == "split":
            lines.append(f"b{i}, c{i} = Split <axis = 1> ({value}) d{i} = Sigmoid(c{i}) {new} = Mul(b{i}, d{i})")
            width //= 2
            if width % 2:
                lines.append(f"e{i} = Concat <axis = 1> ({new}, {new})")
                new, width = f"e{i}", 2 * width
        elif kind == "norm":
            lines.append(f"{new} = InstanceNormalization({value}, s{i}, t{i})")
            shapes |= {f"s{i}": (width,), f"t{i}": (width,)}
        elif kind == "reshape":
            constants |= {f"r{i}": np.array([1, 2, width // 2, 3, 3]), f"q{i}": np.array([1, width, 3, 3])}
            lines.append(f"b{i} = Reshape({value}, r{i}) c{i} = Transpose <perm = [0, 2, 1, 3, 4]> (b{i})")
            lines.append(f"{new} = Reshape(c{i}, q{i})")
        else:
            lines.append(f"{new} = Relu({value})")
        value = new
    lines.append(f"y = Conv({value}, v)")
    shapes["v"] = (5, width, 1, 1)
    return f"(float[1,3,3,3] x) => (float[1,5,3,3] y) {{ {' '.join(lines)} }}", constants, shapes


@settings(max_examples=40, deadline=None)
@given(LAYERS, st.integers(0, 5), st.data())
def test_any_units_of_any_net(build, layers, seed, data):
    text, constants, shapes = net(layers)
    model = build(text, constants, **shapes)
    coupling = analyse(model)
    removal = Removal(model, coupling)
    for group in coupling.groups:
        gone = data.draw(st.lists(st.sampled_from(group.roots.tolist()), max_size=group.units - 1, unique=True))
        removal.remove(np.array(gone, np.int64))
    zeroed = removal.zeroed()
    verification = Verifier(zeroed, feeds.generate(zeroed, sets=1, seed=seed)).check(model)
    assert verification.ok, verification.reason
