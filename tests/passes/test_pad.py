import numpy as np
import onnx
import pytest

SPEC = "fuse-pad"


def model(body, *, pads=(0, 0, 1, 0, 0, 0, 1, 2), inputs="float[1,2,7,7] x", outputs="float y", opset=17, **arrays):
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    for output in proto.graph.output:
        if not output.type.tensor_type.shape.dim:
            output.type.tensor_type.ClearField("shape")
    rng = np.random.default_rng(0)
    given = {"w": rng.standard_normal((3, 2, 3, 3), np.float32), "p": np.array(pads)} | arrays
    for name, array in given.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return proto


def pads(found, index=0):
    return list(found.nodes[index].attributes["pads"].value)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("q = Pad(x, p) y = Conv(q, w)", [1, 0, 1, 2]),
        ("q = Pad(x, p, z) y = Conv <pads = [0, 1, 2, 3], strides = [2, 1]> (q, w)", [1, 1, 3, 5]),
        ('q = Pad(x, p) y = Conv <auto_pad = "VALID", dilations = [2, 1]> (q, w)', [1, 0, 1, 2]),
        ("q = Pad(x, p) y = AveragePool <kernel_shape = [3, 3], strides = [2, 2]> (q)", [1, 0, 1, 2]),
        (
            "q = Pad(x, p) y = AveragePool <kernel_shape = [3, 4], pads = [1, 1, 1, 1], count_include_pad = 1> (q)",
            [2, 1, 2, 3],
        ),
    ],
)
def test_zeros_become_padding(rewritten, body, expected):
    found = rewritten(model(body, z=np.float32(0)), SPEC)
    assert len(found.nodes) == 1
    assert pads(found) == expected
    assert "auto_pad" not in found.nodes[0].attributes


def test_amounts_as_attribute(rewritten):
    found = rewritten(model("q = Pad <pads = [0, 0, 1, 0, 0, 0, 1, 2]> (x) y = Conv(q, w)", opset=10), SPEC)
    assert pads(found) == [1, 0, 1, 2]


def test_all_users_take_it(rewritten):
    found = rewritten(model("q = Pad(x, p) a = Conv(q, w) b = Conv <strides = [1, 1]> (q, w) y = Add(a, b)"), SPEC)
    assert found.ops == {"Conv": 2, "Add": 1}


@pytest.mark.parametrize(
    ("body", "given", "reason"),
    [
        ("q = Pad(x, p) y = MaxPool <kernel_shape = [3, 3]> (q)", {}, "pads with minus infinity"),
        ("q = Pad(x, p) a = Conv(q, w) b = MaxPool <kernel_shape = [3, 3]> (q) y = Concat <axis = 1> (a, b)", {},
         "pads with minus infinity"),
        ("q = Pad(x, p) a = Conv(q, w) b = Relu(q) y = Concat <axis = 1> (a, b)", {"w": np.ones((3, 2, 1, 1), "f")},
         "something else uses it"),
        ("q = Pad(x, p, z) y = Conv(q, w)", {"z": np.float32(1)}, "constant number of zeros"),
        ('q = Pad <mode = "reflect"> (x, p) y = Conv(q, w)', {}, "constant number of zeros"),
        ("q = Pad(x, p) y = Conv(q, w)", {"pads": (0, 1, 0, 0, 0, 0, 0, 0), "w": np.ones((3, 3, 3, 3), "f")},
         "batch or the channels"),
        ("q = Pad(x, p) y = Conv(q, w)", {"pads": (0, 0, -1, 0, 0, 0, 0, 0)}, "cuts something off"),
        ('q = Pad(x, p) y = Conv <auto_pad = "SAME_UPPER"> (q, w)', {}, "depends on the size"),
        ("q = Pad(x, p) y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (q)", {}, "leaves its own"),
        ("q = Pad(x, p) y = AveragePool <kernel_shape = [3, 2]> (q)", {}, "in the padding as a whole"),
        ("q = Pad(x, p) y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (q)", {}, "beyond"),
    ],
)  # fmt: skip
def test_what_stays(rewritten, body, given, reason):
    found = rewritten(model(body, **given), SPEC)
    assert found.edits == 0
    assert any(reason in r for r in found.refusals), found.refusals


def test_amounts_that_are_computed_stay(rewritten):
    proto = model("q = Pad(x, n) y = Conv(q, w)", inputs="float[1,2,7,7] x, int64[8] n")
    assert rewritten(proto, SPEC, verify=False).refusals == {"it does not pad with a constant number of zeros"}


def test_a_padded_output_stays(rewritten):
    assert rewritten(model("q = Pad(x, p) y = Conv(q, w)", outputs="float y, float q"), SPEC).edits == 0


def test_a_padded_weight_is_no_padded_image(rewritten):
    """ONNX Runtime 1.32 takes it for one, and then cannot load the model."""
    proto = model("q = Pad(v, p) y = Conv(x, q)", v=np.ones((3, 2, 2, 2), np.float32), pads=(0, 0, 1, 0, 0, 0, 0, 1))
    assert rewritten(proto, SPEC, verify=False).edits == 0


def test_nested_graphs(rewritten):
    body = """q = Pad(x, p) y = If (c) <then_branch = t () => (float[1,3,a,b] a) { a = Conv(q, w) },
        else_branch = e () => (float[1,3,c,d] b) { r = Pad(x, p) b = Conv(r, w) }>"""
    found = rewritten(model(body, inputs="float[1,2,7,7] x, bool c"), SPEC)
    assert found.ops == {"If": 1, "Pad": 1, "Conv": 2}
    assert "what uses it is in another graph, or an attribute refers to the function's caller" in found.refusals
