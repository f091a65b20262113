from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

import onnxopt
from onnxopt.errors import UsageError
from onnxopt.transfer.result import Transfer

from .conftest import build, outputs

Agree = Callable[..., None]

MATMUL = """
g (float[batch, 8] x) => (float[batch, 4] y) {
    a = MatMul(x, first_weight)  b = Add(a, first_bias)  c = Relu(b)  d = MatMul(c, second_weight)  y = Add(second_bias, d)
}
"""
MATMUL_WEIGHTS = {"first_weight": (8, 16), "first_bias": (16,), "second_weight": (16, 4), "second_bias": (4,)}
GEMM = """
g (float[n, 8] input) => (float[n, 4] output) {
    h1 = Gemm<transB = 1>(input, w_0, b_0)  h2 = Relu(h1)  output = Gemm<transB = 1>(h2, w_1, b_1)
}
"""
GEMM_WEIGHTS = {"w_0": (16, 8), "b_0": (16,), "w_1": (4, 16), "b_1": (4,)}

ATTENTION = """
g (float[batch, 5, 8] x) => (float[batch, 5, 8] y) {
    q0 = MatMul(x, wq)  q1 = Add(q0, bq)  k0 = MatMul(x, wk)  k1 = Add(k0, bk)  v0 = MatMul(x, wv)  v1 = Add(v0, bv)
    q2 = Reshape(q1, heads)  k2 = Reshape(k1, heads)  v2 = Reshape(v1, heads)
    q3 = Transpose<perm = [0, 2, 1, 3]>(q2)  k3 = Transpose<perm = [0, 2, 3, 1]>(k2)
    v3 = Transpose<perm = [0, 2, 1, 3]>(v2)
    s0 = MatMul(q3, k3)  s1 = Div(s0, root)  s2 = Softmax<axis = -1>(s1)  o0 = MatMul(s2, v3)
    o1 = Transpose<perm = [0, 2, 1, 3]>(o0)  o2 = Reshape(o1, flat)  y = MatMul(o2, wo)
}
"""
ATTENTION_WEIGHTS = {
    **{f"w{n}": (8, 8) for n in "qkvo"},
    **{f"b{n}": (8,) for n in "qkv"},
    "root": np.array(2.0, np.float32),
    "heads": np.array([0, 0, 2, 4]),
    "flat": np.array([0, 0, 8]),
}
MERGED = """
g (float[batch, 5, 8] x) => (float[batch, 5, 8] y) {
    p0 = MatMul(x, qkv)  p1 = Add(p0, bias)  p2 = Reshape(p1, heads)  p3 = Transpose<perm = [0, 2, 1, 3]>(p2)
    q3, k3, v3 = Split<axis = 1>(p3, sizes)
    k4 = Transpose<perm = [0, 1, 3, 2]>(k3)
    s0 = MatMul(q3, k4)  s2 = Softmax<axis = -1>(s0)  o0 = MatMul(s2, v3)
    o1 = Transpose<perm = [0, 2, 1, 3]>(o0)  o2 = Reshape(o1, flat)  y = MatMul(o2, wo)
}
"""
MERGED_WEIGHTS = {
    "qkv": (8, 24),
    "bias": (24,),
    "wo": (8, 8),
    "heads": np.array([0, 0, 6, 4]),
    "sizes": np.array([2, 2, 2]),
    "flat": np.array([0, 0, 8]),
}
PACKED = """
g (float[batch, 5, 8] x) => (float[batch, 5, 8] y) {
    a = com.microsoft.Attention<num_heads = 2>(x, qkv, bias)  y = MatMul(a, wo)
}
"""
PACKED_WEIGHTS = {"qkv": (8, 24), "bias": (24,), "wo": (8, 8)}

BATCH_NORM = """
g (float[batch, 3, 6, 6] x) => (float[batch, 4] y) {
    a = Conv<kernel_shape = [3, 3]>(x, conv)  b = BatchNormalization<epsilon = 0.001>(a, gamma, beta, mean, var)
    c = Relu(b)  d = GlobalAveragePool(c)  e = Flatten(d)  y = Gemm(e, w)
}
"""
BATCH_NORM_WEIGHTS = {
    "conv": (5, 3, 3, 3),
    "gamma": (5,),
    "beta": (5,),
    "mean": (5,),
    "var": np.linspace(0.5, 2, 5, dtype=np.float32),
    "w": (5, 4),
}
FOLDED = """
g (float[batch, 3, 6, 6] x) => (float[batch, 4] y) {
    a = Conv<kernel_shape = [3, 3]>(x, k, kb)  c = Relu(a)  d = ReduceMean<keepdims = 0>(c, axes)  y = MatMul(d, w)
}
"""
FOLDED_WEIGHTS = {"k": (5, 3, 3, 3), "kb": (5,), "w": (5, 4), "axes": np.array([2, 3])}

FORMS = {
    "gemm and matmul": (MATMUL, MATMUL_WEIGHTS, GEMM, GEMM_WEIGHTS),
    "merged projections": (ATTENTION, ATTENTION_WEIGHTS, MERGED, MERGED_WEIGHTS),
    "fused attention": (ATTENTION, ATTENTION_WEIGHTS, PACKED, PACKED_WEIGHTS),
    "merged and fused": (MERGED, MERGED_WEIGHTS, PACKED, PACKED_WEIGHTS),
    "batch normalization": (BATCH_NORM, BATCH_NORM_WEIGHTS, FOLDED, FOLDED_WEIGHTS),
}


def statuses(result: Transfer) -> dict[str, str]:
    return {p.name: p.status for p in result.parameters}


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_two_forms_of_a_network(form: str, backwards: bool, agree: Agree) -> None:
    """Whatever the forms, the target ends up computing what the source computes, and nothing is left behind."""
    first, second = (build(*FORMS[form][:2], seed=1), build(*FORMS[form][2:], seed=2))
    source, target = (second, first) if backwards else (first, second)
    result = onnxopt.transfer(source, target)
    assert result.coverage == 1
    assert set(statuses(result).values()) == {"exact"}
    assert not result.unused
    assert result.certificate is not None
    assert result.certificate.verdict == "equal"
    agree(source, result.model)
    assert not np.allclose(outputs(source)[0], outputs(target)[0], atol=1e-3)


def test_the_target_itself_is_not_changed() -> None:
    source, target = build(MATMUL, MATMUL_WEIGHTS, 1), onnxopt.load(build(GEMM, GEMM_WEIGHTS, 2))
    before = outputs(target)
    onnxopt.transfer(source, target)
    np.testing.assert_array_equal(before[0], outputs(target)[0])


@pytest.mark.parametrize(
    "passes",
    [
        "quantize-weights{min_elements=8}",
        "quantize-weights{min_elements=8,mode=minmax}",
        "quantize-weights{min_elements=8,form=dequantize}",
        "quantize-weights{min_elements=8,granularity=tensor}",
        "quantize-dynamic{min_elements=8}",
        "quantize-matmul{block=16,min_elements=8}",
        "store-float16",
    ],
)
def test_into_integers_and_back(passes: str) -> None:
    """The target's grids are made anew for the source's numbers."""
    text = MATMUL.replace("batch, 8", "batch, 64").replace("batch, 4", "batch, 32")
    sizes = {"first_weight": (64, 128), "first_bias": (128,), "second_weight": (128, 32), "second_bias": (32,)}
    source, other = build(text, sizes, 1), build(text, sizes, 2)
    small = onnxopt.optimize(other, passes=passes, target="cpu", verify=False, measure=False).model
    assert [n.op_type for n in small.graph] != ["MatMul", "Add", "Relu", "MatMul", "Add"]
    result = onnxopt.transfer(source, small)
    assert result.coverage == 1
    assert result.certificate is not None
    assert result.certificate.verdict in ("close", "equal")
    expected, found = outputs(source)[0], outputs(result.model)[0]
    assert np.abs(found - expected).max() < 0.15 * np.abs(expected).max()
    back = onnxopt.transfer(result.model, other)
    assert back.coverage == 1
    assert np.abs(outputs(back.model)[0] - expected).max() < 0.15 * np.abs(expected).max()


def test_numbers_that_a_type_cannot_hold_stay_out() -> None:
    """float16 ends at 65,504."""
    sizes = {"w_0": (16, 8), "b_0": (16,), "w_1": (4, 16), "b_1": (4,)}
    source = build(GEMM, {**sizes, "b_0": np.full(16, 1e6, np.float32)}, 1)
    text = GEMM.replace("h1 = Gemm", "b_0 = Cast<to = 1>(half)  h1 = Gemm")
    small = build(text, {**{n: s for n, s in sizes.items() if n != "b_0"}, "half": np.ones(16, np.float16)}, 2)
    result = onnxopt.transfer(source, small)
    left = {p.reason for p in result.parameters if not p.moved}
    assert left == {"float16 does not reach as far as the source's numbers"}


def test_shared_numbers_are_stored_apart_where_the_source_has_different_ones(agree: Agree) -> None:
    text = """
    g (float[n, 8] x) => (float[n, 8] y) {
        a = MatMul(x, w)  b = LayerNormalization(a, FIRST, shift)  c = MatMul(b, v)  y = LayerNormalization(c, LAST, shift)
    }
    """
    shapes = {"w": (8, 8), "v": (8, 8), "shift": (8,)}
    source = build(text.replace("FIRST", "one").replace("LAST", "two"), {**shapes, "one": (8,), "two": (8,)}, 1)
    target = build(text.replace("FIRST", "both").replace("LAST", "both"), {**shapes, "both": (8,)}, 2)
    result = onnxopt.transfer(source, target)
    agree(source, result.model)
    assert any("stored apart" in note for note in result.notes)
    agree(result.model, onnxopt.transfer(result.model, source).model)


def test_a_bias_that_the_target_lacks_is_added_unless_it_is_zero(agree: Agree) -> None:
    bare = "g (float[n, 8] x) => (float[n, 4] y) { a = MatMul(x, w)  b = Relu(a)  y = Gemm(b, v) }"
    weights = {"w": (8, 16), "v": (16, 4)}
    source = build(MATMUL, MATMUL_WEIGHTS, 1)
    result = onnxopt.transfer(source, build(bare, weights, 2))
    agree(source, result.model)
    assert [n.op_type for n in result.model.graph] == ["MatMul", "Add", "Relu", "Gemm"]
    assert any("no bias" in note for note in result.notes)
    zeros = {**MATMUL_WEIGHTS, "first_bias": np.zeros(16, np.float32), "second_bias": np.zeros(4, np.float32)}
    source = build(MATMUL, zeros, 1)
    result = onnxopt.transfer(source, build(bare, weights, 2))
    agree(source, result.model)
    assert [n.op_type for n in result.model.graph] == ["MatMul", "Relu", "Gemm"]


def test_another_head_keeps_its_own(agree: Agree) -> None:
    other = GEMM.replace("float[n, 4]", "float[n, 7]")
    result = onnxopt.transfer(
        build(MATMUL, MATMUL_WEIGHTS, 1), build(other, {**GEMM_WEIGHTS, "w_1": (7, 16), "b_1": (7,)})
    )
    assert statuses(result) == {"w_0": "aligned", "b_0": "aligned", "w_1": "unmatched", "b_1": "unmatched"}
    assert result.certificate is not None
    assert (result.certificate.verdict, result.certificate.layers_equal) == ("trunk", 1)
    assert set(result.unused) == {"second_weight", "second_bias"}


def test_kind_feature_leaves_the_head_out() -> None:
    source, target = build(MATMUL, MATMUL_WEIGHTS, 1), build(GEMM, GEMM_WEIGHTS, 2)
    result = onnxopt.transfer(source, target, kind="feature")
    assert statuses(result) == {"w_0": "exact", "b_0": "exact", "w_1": "left out", "b_1": "left out"}
    head = next(i for i in onnxopt.load(target).graph.initializers.values() if i.name == "w_1")
    np.testing.assert_array_equal(result.model.graph.initializers["w_1"].const_value.numpy(), head.const_value.numpy())
    assert result.coverage == 1


def test_globs_choose_layers() -> None:
    source, target = build(MATMUL, MATMUL_WEIGHTS, 1), build(GEMM, GEMM_WEIGHTS, 2)
    assert statuses(onnxopt.transfer(source, target, only=["w_1"])) == {
        "w_0": "left out", "b_0": "left out", "w_1": "exact", "b_1": "exact",
    }  # fmt: skip
    assert statuses(onnxopt.transfer(source, target, freeze=["*_1"]))["w_1"] == "left out"
    with pytest.raises(UsageError, match='freeze "nothing" fits no parameter'):
        onnxopt.transfer(source, target, freeze=["nothing"])


def test_a_difference_that_is_no_parameter_is_found() -> None:
    """Sigmoid instead of Relu: the layers correspond, the outputs do not, and the certificate names the place."""
    result = onnxopt.transfer(build(MATMUL, MATMUL_WEIGHTS, 1), build(GEMM.replace("Relu", "Sigmoid"), GEMM_WEIGHTS, 2))
    assert result.certificate is not None
    assert result.certificate.verification is not None
    assert not result.certificate.verification.ok
    assert result.certificate.layers_equal == 1
    assert result.certificate.first_difference == "output"
    assert set(statuses(result).values()) == {"exact"}


TWINS = """
g (float[n, 8] x) => (float[n, 8] y) {
    a0 = MatMul(x, a_first)  a1 = Relu(a0)  a2 = MatMul(a1, a_last)
    b0 = MatMul(x, b_first)  b1 = Relu(b0)  b2 = MatMul(b1, b_last)
    y = OP(a2, b2)
}
"""
TWIN_WEIGHTS = {f"{branch}_{layer}": (8, 8) for branch in "ab" for layer in ("first", "last")}


def test_twins_are_ambiguous_and_moved_once_outputs_confirm_them(agree: Agree) -> None:
    source = build(TWINS.replace("OP", "Add"), TWIN_WEIGHTS, 1)
    turned = TWINS.replace("OP", "Add").replace("a_", "c_").replace("b_", "a_").replace("c_", "b_")
    target = build(turned, TWIN_WEIGHTS, 2)
    result = onnxopt.transfer(source, target)
    assert set(statuses(result).values()) == {"ambiguous"}
    assert all(p.confirmed for p in result.parameters)
    agree(source, result.model)
    unverified = onnxopt.transfer(source, target, verify=False)
    assert not any(p.moved for p in unverified.parameters)
    agree(unverified.model, target)


def test_twins_in_the_wrong_order_are_turned(agree: Agree) -> None:
    """A difference tells its operands apart, which the skeleton does not; the outputs do."""
    source = build(TWINS.replace("OP", "Sub"), TWIN_WEIGHTS, 1)
    lines = TWINS.replace("OP", "Sub").splitlines()
    lines[2], lines[3] = lines[3], lines[2]
    result = onnxopt.transfer(source, build("\n".join(lines), TWIN_WEIGHTS, 2))
    agree(source, result.model)
    assert all(p.moved for p in result.parameters)


def test_kind_structure_draws_parameters_anew() -> None:
    source = build(BATCH_NORM, BATCH_NORM_WEIGHTS, 1)
    first, again, other = (onnxopt.transfer(source, kind="structure", seed=s) for s in (3, 3, 4))
    values = {n: v.const_value.numpy() for n, v in first.model.graph.initializers.items()}
    assert np.abs(values["conv"]).max() <= 1 / np.sqrt(27)
    np.testing.assert_array_equal(values["var"], np.ones(5))
    np.testing.assert_array_equal(values["beta"], np.zeros(5))
    np.testing.assert_array_equal(outputs(first.model)[0], outputs(again.model)[0])
    assert not np.array_equal(outputs(first.model)[0], outputs(other.model)[0])
    with pytest.raises(UsageError, match="takes one model"):
        onnxopt.transfer(source, source, kind="structure")
    with pytest.raises(UsageError, match="needs two models"):
        onnxopt.transfer(source)


def test_overridable_initializers_are_no_parameters() -> None:
    proto = build(GEMM, GEMM_WEIGHTS, 2)
    proto.graph.input.append(onnx.helper.make_tensor_value_info("w_0", onnx.TensorProto.FLOAT, [16, 8]))
    result = onnxopt.transfer(build(MATMUL, MATMUL_WEIGHTS, 1), proto)
    assert "w_0" not in statuses(result)


def test_scales_in_front_of_a_clipping_activation(agree: Agree) -> None:
    """What 1 + HardSigmoid(x) scales and shifts is in the weights of its optimized form."""
    text = """
    g (float[n, 3, 4, 4] x) => (float[n, 3, 4, 4] y) {
        a = GlobalAveragePool(x)  b = Conv(a, w)  c = Add(b, bias)  d = HardSigmoid<alpha = 0.2, beta = 0.4>(c)
        e = Mul(x, d)  f = Add(x, e)  y = Conv(f, v)
    }
    """
    shapes = {"w": (3, 3, 1, 1), "bias": (1, 3, 1, 1), "v": (3, 3, 1, 1)}
    source = build(text, shapes, 1)
    small = onnxopt.optimize(build(text, shapes, 2), recipe="lossless", verify=False, measure=False).model
    assert "Clip" in {n.op_type for n in small.graph}
    result = onnxopt.transfer(source, small)
    agree(source, result.model)
    agree(source, onnxopt.transfer(result.model, build(text, shapes, 3)).model)


def test_a_product_of_two_layers_is_not_taken_for_one_of_them() -> None:
    """Where an optimizer multiplied two layers into one, neither of them is its counterpart."""
    two = """
    g (float[n, 8] x) => (float[n, 8] y) {
        a = MatMul(x, first)  b = Relu(a)  c = MatMul(b, low)  d = MatMul(c, high)  e = Relu(d)  y = MatMul(e, last)
    }
    """
    one = """
    g (float[n, 8] x) => (float[n, 8] y) {
        a = MatMul(x, first)  b = Relu(a)  d = MatMul(b, high)  e = Relu(d)  y = MatMul(e, last)
    }
    """
    source = build(two, {"first": (8, 16), "low": (16, 16), "high": (16, 32), "last": (32, 8)}, 1)
    target = build(one, {"first": (8, 16), "high": (16, 32), "last": (32, 8)}, 2)
    for verify in (True, False):
        found = statuses(onnxopt.transfer(source, target, verify=verify))
        assert (found["first"], found["high"]) == ("aligned", "unmatched")


def test_three_projections_reshaped_in_one(agree: Agree) -> None:
    """Channels that are reshaped into (3, heads, width) and taken one by one are three layers."""
    text = """
    g (float[batch, 5, 8] x) => (float[batch, 5, 8] y) {
        p0 = MatMul(x, qkv)  p1 = Add(p0, bias)  p2 = Reshape(p1, heads)  p3 = Transpose<perm = [2, 0, 3, 1, 4]>(p2)
        q = Gather<axis = 0>(p3, zero)  k0 = Gather<axis = 0>(p3, one)  v = Gather<axis = 0>(p3, two)
        k = Transpose<perm = [0, 1, 3, 2]>(k0)
        s0 = MatMul(q, k)  s2 = Softmax<axis = -1>(s0)  o0 = MatMul(s2, v)
        o1 = Transpose<perm = [0, 2, 1, 3]>(o0)  o2 = Reshape(o1, flat)  y = MatMul(o2, wo)
    }
    """
    numbers = {name: np.array(i) for i, name in enumerate(("zero", "one", "two"))}
    weights = {**MERGED_WEIGHTS, **numbers, "heads": np.array([0, 0, 3, 2, 4])}
    del weights["sizes"]
    first, second = build(text, weights, 1), build(ATTENTION, ATTENTION_WEIGHTS, 2)
    for source, target in ((first, second), (second, first)):
        result = onnxopt.transfer(source, target)
        assert set(statuses(result).values()) == {"exact"}
        agree(source, result.model)
