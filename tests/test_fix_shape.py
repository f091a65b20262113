"""Writing sizes of dynamic axes into a model."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, parser

from onnxopt.errors import UsageError
from onnxopt.model import fix_shape, load
from onnxopt.proto.encode import encode


def model() -> ir.Model:
    return load(
        parser.parse_model(
            """<ir_version: 8, opset_import: ["": 17]>
            g (float[batch, seq, 4] x, int64[batch, seq] ids, float[unnamed, 2] z)
                => (float[batch, seq, 4] y, float[other, 2] w)
            <float[batch, seq, 4] t, float[rows, 4] flat, int64[2] shape = {-1, 4}> {
                t = Relu(x) flat = Reshape(t, shape) y = Abs(t) w = Relu(z) }"""
        )
    )


def anonymous() -> ir.Model:
    proto = encode(model())
    for info in (proto.graph.input[2], proto.graph.output[1]):
        info.type.tensor_type.shape.dim[0].ClearField("dim_param")
    return load(proto)


def shapes(model: ir.Model) -> dict[str | None, str]:
    found = {v.name: str(v.shape) for v in model.graph.inputs}
    return found | {v.name: str(v.shape) for node in model.graph for v in node.outputs}


def test_named_axes_everywhere() -> None:
    original = model()
    before = encode(original).SerializeToString()
    found = shapes(fix_shape(original, {"batch": 2, "seq": 3}))
    assert found["x"] == found["t"] == found["y"] == "[2,3,4]"
    assert found["ids"] == "[2,3]"
    # What follows from it is worked out.
    assert found["flat"] == "[6,4]"
    assert found["z"] == "[unnamed,2]"
    assert encode(original).SerializeToString() == before


def test_one_of_two_axes() -> None:
    found = shapes(fix_shape(model(), {"seq": 3}))
    assert (found["x"], found["y"], found["flat"]) == ("[batch,3,4]", "[batch,3,4]", "[rows,4]")


def test_by_input_and_position() -> None:
    assert shapes(fix_shape(model(), {"ids:1": 5}))["x"] == "[batch,5,4]"
    found = shapes(fix_shape(anonymous(), {"z:0": 7}))
    assert (found["z"], found["w"]) == ("[7,2]", "[7,2]")
    assert shapes(fix_shape(anonymous(), {"z:-2": 7}))["z"] == "[7,2]"
    # A size that is there already may be stated.
    assert shapes(fix_shape(model(), {"x:2": 4})) == shapes(model())


def test_names_of_inputs_may_hold_colons() -> None:
    proto = parser.parse_model('<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[N] y) { y = Relu(x) }')
    proto.graph.input[0].name = proto.graph.node[0].input[0] = "x:0"
    assert shapes(fix_shape(load(proto), {"x:0:0": 5}))["x:0"] == "[5]"


def test_expressions_follow() -> None:
    proto = encode(model())
    proto.graph.value_info.append(
        helper.make_tensor_value_info("y2", TensorProto.FLOAT, ["2*batch", "batch + seq", "my batch!"])
    )
    proto.graph.node.append(helper.make_node("Unknown", ["x"], ["y2"], domain="custom"))
    found = shapes(fix_shape(load(proto), {"batch": 3}))
    assert found["y2"].startswith("[6,seq + 3,")
    assert shapes(fix_shape(load(proto), {"batch": 3, "seq": 2}))["y2"].startswith("[6,5,")


def test_stale_shapes_are_replaced() -> None:
    """The exporter wrote the sizes of its example: an intermediate value and an output claim a batch of 1."""
    proto = encode(model())
    for info in (proto.graph.value_info[0], proto.graph.output[0]):
        info.type.tensor_type.shape.dim[0].dim_value = 1
    found = shapes(fix_shape(load(proto), {"batch": 2, "seq": 3}))
    assert found["t"] == found["y"] == "[2,3,4]"
    onnx.checker.check_model(encode(fix_shape(load(proto), {"batch": 2, "seq": 3})), full_check=True)


@pytest.mark.parametrize("dim", [{"dim_value": -1}, {"dim_param": "?"}])
def test_what_exporters_write_for_unknown(dim: dict[str, object]) -> None:
    """Not a name that all these axes share."""
    proto = encode(model())
    for info in (proto.graph.input[0], proto.graph.input[2]):
        info.type.tensor_type.shape.dim[0].CopyFrom(onnx.TensorShapeProto.Dimension(**dim))
    found = shapes(fix_shape(load(proto), {"z:0": 7}))
    assert found["z"] == "[7,2]"
    assert not found["x"].startswith("[7")


def test_axes_in_bodies() -> None:
    proto = parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> g (float[N] x, bool c) => (float[N] y) {
            y = If(c) <then_branch = t () => (float[N] a) { a = Relu(x) }, else_branch = e () => (float[N] b) { b = Abs(x) }> }"""
    )
    fixed = fix_shape(load(proto), {"N": 4})
    for name in ("then_branch", "else_branch"):
        body = next(iter(fixed.graph)).attributes[name].as_graph()
        assert str(body.outputs[0].shape) == "[4]"


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"bach": 1}, r'no dynamic axis "bach"\. Did you mean "batch"\? The model has: batch \(x:0, ids:0\), seq'),
        ({"q:0": 1}, 'no dynamic axis "q:0"'),
        ({"x:9": 1}, 'no dynamic axis "x:9"'),
        ({"x:2": 5}, 'axis "x:2" has the size 4 already and cannot have 5'),
        ({"batch": 2, "x:0": 3}, 'axis "batch" is given two sizes, 2 and 3'),
        ({"batch": 0}, "at least 1, not 0"),
        ({"batch": -3}, "at least 1, not -3"),
        ({"batch": True}, "whole number"),
        ({"batch": 1.5}, "whole number"),
    ],
)
def test_bad_sizes(sizes: dict[str, int], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        fix_shape(model(), sizes)


def test_axes_without_a_name_are_listed() -> None:
    with pytest.raises(UsageError, match=r"The model has: batch \(x:0, ids:0\), seq \(x:1, ids:1\), z:0\."):
        fix_shape(anonymous(), {"nothing": 1})


def test_a_model_without_dynamic_axes() -> None:
    proto = parser.parse_model('<ir_version: 8, opset_import: ["": 17]> g (float[3] x) => (float[3] y) { y = Relu(x) }')
    with pytest.raises(UsageError, match="all inputs have a fixed shape"):
        fix_shape(load(proto), {"batch": 1})
