"""Group normalization as exporters write it and as an operator."""

import pytest

SPEC = "fuse-group-norm"
PORTABLE = "ONNX Runtime expands GroupNormalization into 29 nodes on CPU; --target cpu writes 4 or 5"
CONSTANTS = (
    "int64[3] groups = {0, 2, -1}, int64[4] back = {0, 4, 3, 5}, float[2] ones = {1, 1}, float[2] zeros = {0, 0}, "
    "float[4, 1, 1] w = {1, 2, 3, 4}, float[4, 1, 1] b = {4, 3, 2, 1}, float[4] gain = {1, 2, 3, 4}, "
    "float[4] offset = {4, 3, 2, 1}, float[4] unit = {1, 1, 1, 1}, float[4] none = {0, 0, 0, 0}, float[2] per_group = {2, 3}"
)
BODY = (
    "r = Reshape(x, groups) i = InstanceNormalization(r, ones, zeros) q = Reshape(i, back) g = Mul(q, w) y = Add(g, b)"
)
WRITTEN = ["Reshape", "InstanceNormalization", "Reshape", "BatchNormalization"]


def model(body, opset=18, shape="n, 4, 3, 5", extra=""):
    return f"""<ir_version: 10, opset_import: ["" : {opset}]> g (float[{shape}] x{extra}) => (float[{shape}] y)
    <{CONSTANTS}> {{ {body} }}"""


@pytest.mark.parametrize("target", ["portable", "cpu"])
@pytest.mark.parametrize("opset", [11, 18])
def test_scale_and_shift_become_one_node(rewritten, opset, target):
    done = rewritten(model(BODY, opset), SPEC, target=target)
    assert [n.op_type for n in done.nodes] == WRITTEN
    scale, shift, mean, variance = (v.const_value.numpy() for v in done.nodes[-1].inputs[1:])
    assert scale.tolist() == [1, 2, 3, 4]
    assert shift.tolist() == [4, 3, 2, 1]
    assert not mean.any()
    assert (variance + variance.dtype.type(done.nodes[-1].attributes["epsilon"].value) == 1).all()


def test_dynamic_positions(rewritten):
    body = BODY.replace("q = Reshape(i, back)", "t = Shape(x) q = Reshape(i, t)")
    done = rewritten(model(body, shape="n, 4, h, w"), SPEC)
    assert done.ops == {"Shape": 1, "Reshape": 2, "InstanceNormalization": 1, "BatchNormalization": 1}


def test_a_scale_alone_stays(rewritten):
    body = BODY.replace("g = Mul(q, w) y = Add(g, b)", "y = Mul(q, w)")
    assert rewritten(model(body), SPEC).edits == 0


def test_a_value_used_elsewhere_stays(rewritten):
    body = BODY.replace("y = Add(g, b)", "a = Add(g, b) y = Add(a, q)")
    assert rewritten(model(body), SPEC).edits == 0


def test_for_cuda_nothing_was_measured(rewritten):
    done = rewritten(model(BODY), SPEC, target="cuda", verify=False)
    assert done.refusals == {"whether BatchNormalization is faster than Mul and Add on CUDA was not measured"}


def test_old_opsets_have_no_batch_normalization_per_channel(rewritten):
    done = rewritten(model(BODY, 8), SPEC)
    assert done.refusals == {"a BatchNormalization per channel needs opset 9; raise it with --opset"}


def test_the_operator_is_not_written(rewritten):
    done = rewritten(model(BODY, 21), SPEC)
    assert done.refusals == {
        "GroupNormalization would be one node, but ONNX Runtime takes 2.6 times as long for it on CPU"
    }


def test_instance_normalization_of_flattened_positions_is_left_to_its_own_pass(rewritten):
    body = BODY.replace("groups", "channels").replace("ones", "unit").replace("zeros", "none")
    source = model(body).replace("int64[3] groups", "int64[3] channels = {0, 4, -1}, int64[3] groups")
    assert rewritten(source, SPEC).edits == 0


@pytest.mark.parametrize("shape", ["2, 4, 3, 5", "n, 4, h, w", "n, 4, k"])
def test_the_operator_is_replaced_for_cpu(rewritten, shape):
    done = rewritten(
        model("y = GroupNormalization<num_groups=2, epsilon=0.001>(x, gain, offset)", 21, shape), SPEC, target="cpu"
    )
    assert [n.op_type for n in done.nodes if n.op_type != "Shape"] == WRITTEN
    norm = next(n for n in done.nodes if n.op_type == "InstanceNormalization")
    assert norm.attributes["epsilon"].value == pytest.approx(1e-3)
    assert len(done.nodes) == (5 if "h" in shape else 4)


def test_without_scale_and_bias_there_is_nothing_to_add(rewritten):
    done = rewritten(model("y = GroupNormalization<num_groups=2>(x, unit, none)", 21), SPEC, target="cpu")
    assert [n.op_type for n in done.nodes] == WRITTEN[:3]


def test_before_opset_21_scale_and_bias_are_per_group(rewritten):
    done = rewritten(model("y = GroupNormalization<num_groups=2>(x, per_group, zeros)", 18), SPEC, target="cpu")
    assert [n.op_type for n in done.nodes] == WRITTEN[:3]
    assert done.nodes[1].inputs[1].const_value.numpy().tolist() == [2, 3]


@pytest.mark.parametrize(
    ("body", "shape", "target", "reason"),
    [
        ("y = GroupNormalization<num_groups=2>(x, gain, offset)", "n, 4, 3, 5", "portable", PORTABLE),
        ("y = GroupNormalization<num_groups=2>(x, given, offset)", "n, 4, 3, 5", "cpu", "its scale or bias is computed"),
        ("y = GroupNormalization<num_groups=2, stash_type=10>(x, gain, offset)", "n, 4, 3, 5", "cpu", "the numbers are not float32"),
        ("y = GroupNormalization<num_groups=2>(x, gain, offset)", "n, c, 3, 5", "cpu", "the number of axes or of channels is not known"),
    ],
)  # fmt: skip
def test_the_operator_is_left_with_the_reason(rewritten, body, shape, target, reason):
    source = model(body, 21, shape, ", float[4] given")
    done = rewritten(source, SPEC, target=target, verify="stash" not in body and "c" not in shape)
    assert done.edits == 0
    assert done.refusals == {reason}
