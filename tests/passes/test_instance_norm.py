"""Instance normalization, spelled out and as an operator."""

import onnx
import pytest
from onnx import numpy_helper

SPEC = "fuse-instance-norm"
CONSTANTS = (
    "float two = {2}, float three = {3}, float eps = {0.00001}, float minus = {-0.5}, int64[2] hw = {2, 3}, int64[2] hc = {1, 2}, "
    "int64[1] last = {-1}, int64[1] wide = {3}, int64[3] flat = {0, 3, -1}, int64[2] nc = {0, 3}, "
    "int64[4] nc11 = {0, 3, 1, 1}, int64[4] back = {2, 3, 4, 5}, float[3, 1, 1] w = {1, 2, 3}, "
    "float[1, 3, 1, 1] b = {4, 3, 2}, float[3] gain = {1, 2, 3}, float[3] offset = {4, 3, 2}, float[5] row = {1, 2, 3, 4, 5}, "
    "float[3, 1, 1] gap = {1, 0, 3}, float[3] ones = {1, 1, 1}, float[3] zeros = {0, 0, 0}, float unbiased = {1.0526316}"
)


def model(body, opset=18, shape="n, 3, 4, 5", constants=CONSTANTS, kind="float"):
    return f"""<ir_version: 10, opset_import: ["" : {opset}]> g ({kind}[{shape}] x, {kind}[{shape}] u, {kind} e1, {kind}[n, 3, 1, 1] style)
    => ({kind}[{shape}] y) <{constants}> {{ {body} }}"""


CENTRED = "m = ReduceMean(x, hw) d = Sub(x, m) "
VARIANCE = "s = Pow(d, two) v = ReduceMean(s, hw) e = Add(v, eps) r = Sqrt(e) "
SPELLED = {
    "pow, div": CENTRED + VARIANCE + "z = Div(d, r) g = Mul(z, w) y = Add(g, b)",
    "mul, reciprocal": CENTRED
    + "s = Mul(d, d) v = ReduceMean(s, hw) e = Add(eps, v) r = Sqrt(e) i = Reciprocal(r) z = Mul(i, d) g = Mul(w, z) y = Add(b, g)",
    "scale first": CENTRED + VARIANCE + "g = Mul(w, d) z = Div(g, r) y = Add(z, b)",
    "the mean twice": CENTRED
    + VARIANCE
    + "m2 = ReduceMean(x, hw) d2 = Sub(x, m2) z = Div(d2, r) g = Mul(z, w) y = Add(g, b)",
    "axes lost and found": CENTRED
    + "s = Pow(d, two) v0 = ReduceMean<keepdims=0>(s, hw) v = Reshape(v0, nc11) e = Add(v, eps) r = Sqrt(e) z = Div(d, r) g = Mul(z, w) y = Add(g, b)",
    "positions in one": "f = Reshape(x, flat) m0 = ReduceMean<keepdims=0>(f, last) m = Reshape(m0, nc11) fm = ReduceMean(f, last) "
    "fd = Sub(f, fm) s = Mul(fd, fd) v0 = ReduceMean<keepdims=0>(s, last) e = Add(v0, eps) r0 = Sqrt(e) r = Reshape(r0, nc11) "
    "d = Sub(x, m) z = Div(d, r) g = Mul(z, w) y = Add(g, b)",
}


@pytest.mark.parametrize("body", SPELLED.values(), ids=SPELLED)
def test_instance_normalization_is_one_node(rewritten, body):
    done = rewritten(model(body), SPEC)
    assert done.ops == {"InstanceNormalization": 1}
    assert [v.const_value.numpy().tolist() for v in done.nodes[0].inputs[1:]] == [[1, 2, 3], [4, 3, 2]]
    assert done.nodes[0].attributes["epsilon"].value == pytest.approx(1e-5)


def test_before_opset_18_the_axes_are_an_attribute(rewritten):
    body = SPELLED["pow, div"].replace("ReduceMean(x, hw)", "ReduceMean<axes=[2, 3]>(x)")
    done = rewritten(model(body.replace("ReduceMean(s, hw)", "ReduceMean<axes=[-1, -2]>(s)"), 11), SPEC)
    assert done.ops == {"InstanceNormalization": 1}


def test_without_scale_the_scale_is_one(rewritten):
    done = rewritten(model(CENTRED + VARIANCE + "y = Div(d, r)"), SPEC)
    assert done.ops == {"InstanceNormalization": 1}
    assert done.nodes[0].inputs[1].const_value.numpy().tolist() == [1, 1, 1]


def test_a_scale_that_is_computed_is_multiplied_afterwards(rewritten):
    body = CENTRED + VARIANCE + "z = Div(d, r) g = Mul(z, style) y = Add(g, b)"
    assert rewritten(model(body), SPEC).ops == {"InstanceNormalization": 1, "Mul": 1, "Add": 1}


def test_a_divisor_with_zeros_stays(rewritten):
    body = CENTRED + VARIANCE + "z = Div(d, r) y = Div(z, gap)"
    assert rewritten(model(body), SPEC).ops == {"InstanceNormalization": 1, "Div": 1}


def test_a_constant_factor_of_the_variance_goes_into_epsilon_and_scale(rewritten):
    body = CENTRED + VARIANCE.replace("e = Add(v, eps)", "c = Mul(v, unbiased) e = Add(c, eps)") + "y = Div(d, r)"
    done = rewritten(model(body), SPEC)
    assert done.ops == {"InstanceNormalization": 1}
    assert done.nodes[0].attributes["epsilon"].value == pytest.approx(1e-5 / 1.0526316)


def test_a_scale_of_the_normalized_shape_makes_it_layer_normalization(rewritten):
    body = "m = ReduceMean(x, last) d = Sub(x, m) s = Pow(d, two) v = ReduceMean(s, last) e = Add(v, eps) r = Sqrt(e) z = Div(d, r) y = Mul(z, row)"
    done = rewritten(model(body, shape="n, 3, 5").replace("style", "unused"), f"{SPEC},fuse-normalization")
    assert done.ops == {"LayerNormalization": 1}


def test_one_axis_without_a_scale_is_a_layer_normalization(rewritten):
    body = "m = ReduceMean(x, last) d = Sub(x, m) s = Pow(d, two) v = ReduceMean(s, last) e = Add(v, eps) r = Sqrt(e) y = Div(d, r)"
    assert rewritten(model(body, shape="n, 3, 5"), f"{SPEC},fuse-normalization").ops == {"LayerNormalization": 1}


def test_one_axis_between_reshapes_is_an_instance_normalization(rewritten):
    body = (
        "f = Reshape(x, flat) m = ReduceMean(f, last) d = Sub(f, m) s = Pow(d, two) v = ReduceMean(s, last) "
        "e = Add(v, eps) r = Sqrt(e) z = Div(d, r) y = Reshape(z, back)"
    )
    done = rewritten(model(body, shape="2, 3, 4, 5"), f"{SPEC},fuse-normalization")
    assert done.ops == {"InstanceNormalization": 1}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (SPELLED["pow, div"].replace("Pow(d, two)", "Pow(d, three)"), "the mean is not one of squares"),
        (SPELLED["pow, div"].replace("Add(v, eps)", "Add(v, e1)"), "what is added to the variance is no"),
        (SPELLED["pow, div"].replace("Div(d, r)", "Div(u, r)"), "what is normalized is not a plain factor"),
        (CENTRED + VARIANCE.replace("Add(v, eps)", "Identity(v)") + "y = Div(d, r)", "what is added to the variance is no"),
        (SPELLED["pow, div"].replace("hw", "hc"), "the mean is not over the last axes"),
        (CENTRED + VARIANCE.replace("e = Add(v, eps)", "c = Mul(v, style) e = Add(c, eps)") + "y = Div(d, r)", "the variance is multiplied"),
        (SPELLED["pow, div"].replace("Mul(z, w)", "Mul(z, w2)").replace("z =", "w2 = Pow(style, two) z ="), "another factor is raised"),
    ],
)  # fmt: skip
def test_near_misses_are_refused_with_the_reason(rewritten, body, reason):
    done = rewritten(model(body), f"{SPEC},fuse-normalization")
    assert not {"InstanceNormalization", "LayerNormalization"} & set(done.ops)
    assert any(r.startswith(reason) for r in done.refusals)


def test_a_variance_over_other_axes_than_the_mean_is_no_instance_normalization(rewritten):
    body = CENTRED + VARIANCE.replace("ReduceMean(s, hw)", "ReduceMean(s, wide)") + "y = Div(d, r)"
    assert rewritten(model(body), SPEC).edits == 0


def test_the_number_of_channels_must_be_known(rewritten):
    body = CENTRED + VARIANCE + "y = Div(d, r)"
    done = rewritten(model(body, shape="n, c, 4, 5").replace("style", "unused"), SPEC)
    assert done.edits == 0
    assert done.refusals == {"the number of channels is not known"}


def test_double_has_no_kernel(rewritten):
    constants = "double two = {2}, double eps = {0.00001}, int64[2] hw = {2, 3}"
    done = rewritten(model(CENTRED + VARIANCE + "y = Div(d, r)", constants=constants, kind="double"), SPEC)
    assert done.refusals == {"ONNX Runtime has no InstanceNormalization of this element type"}


def test_scale_and_shift_behind_the_operator_go_into_it(rewritten):
    body = "i = InstanceNormalization(x, gain, offset) g = Div(i, w) h = Mul(g, three) y = Sub(b, h)"
    done = rewritten(model(body), SPEC)
    assert done.ops == {"InstanceNormalization": 1}
    assert done.nodes[0].inputs[1].const_value.numpy().tolist() == pytest.approx([-3, -3, -3])


def test_a_value_used_elsewhere_stays(rewritten):
    body = "i = InstanceNormalization(x, gain, offset) g = Mul(i, w) k = Neg(i) y = Add(g, k)"
    assert rewritten(model(body), SPEC).edits == 0


def test_a_factor_per_position_stays(rewritten):
    done = rewritten(model("i = InstanceNormalization(x, gain, offset) y = Mul(i, row)"), SPEC)
    assert done.edits == 0


def test_parameters_that_overflow_are_refused(rewritten):
    proto = onnx.parser.parse_model(model("i = InstanceNormalization(x, gain, offset) y = Mul(i, w)"))
    for tensor in proto.graph.initializer:
        if tensor.name in ("gain", "w"):
            array = numpy_helper.to_array(tensor) * 1e25
            tensor.CopyFrom(numpy_helper.from_array(array.astype("float32"), tensor.name))
    done = rewritten(proto, SPEC, verify=False)
    assert done.refusals == {"the fused scale or bias does not fit into the element type"}


def test_reshapes_that_only_flatten_positions_go(rewritten):
    body = "f = Reshape(x, flat) i = InstanceNormalization(f, ones, zeros) z = Reshape(i, back) g = Mul(z, w) y = Add(g, b)"
    done = rewritten(model(body, shape="2, 3, 4, 5"), SPEC)
    assert done.ops == {"InstanceNormalization": 1}


def test_reshapes_that_group_channels_stay(rewritten):
    body = "f = Reshape(x, flat) i = InstanceNormalization(f, ones, zeros) y = Reshape(i, back)"
    shape = "2, 6, 4, 5"
    done = rewritten(
        model(body.replace("back", "six"), shape=shape, constants=f"{CONSTANTS}, int64[4] six = {{2, 6, 4, 5}}"), SPEC
    )
    assert done.edits == 0
