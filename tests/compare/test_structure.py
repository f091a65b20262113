"""Well-formedness without weights, and signatures that must stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxopt.compare import structure

BASE = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x, float[4] bias) => (float[N, 4] y, float[N, 4] z) <float[4] bias = {1, 2, 3, 4}, float[4] w = {1, 1, 1, 1}> {
  a = Mul(x, w)  y = Add(a, bias)  z = Relu(a)
}"""


def model(text: str = BASE) -> ir.Model:
    return ir.from_onnx_text(text)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("float[N, 4] x", "float[N, 4] x2", 'the input "x" is missing'),
        ("float[N, 4] x,", "float[N, 4] x, float[1] extra,", 'there is a new input, "extra"'),
        (
            "(float[N, 4] y, float[N, 4] z)",
            "(float[N, 4] z, float[N, 4] y)",
            "the outputs are in another order: z, y",
        ),
        (", float[N, 4] z)", ")", 'the output "z" is missing'),
        ("=> (float[N, 4] y", "=> (float16[N, 4] y", 'the output "y" is declared as float16 instead of float'),
        (
            "=> (float[N, 4] y",
            "=> (float[M, 4] y",
            'the output "y" is declared with the shape [M, 4] instead of [N, 4]',
        ),
        ("=> (float[N, 4] y", "=> (float[2, 4] y", "with the shape [2, 4] instead of [N, 4]"),
        ("float[4] bias = {1, 2, 3, 4}, ", "", 'the input "bias" has lost its default value'),
    ],
)
def test_a_changed_signature_is_named(old: str, new: str, words: str) -> None:
    changed = BASE.replace(old, new, 1).replace("Mul(x,", "Mul(x2," if "x2" in new else "Mul(x,")
    assert old in BASE
    assert words in structure.signature_change(model(), model(changed))


def test_a_new_default_value_is_named() -> None:
    without = model(BASE.replace("float[4] bias = {1, 2, 3, 4}, ", "", 1))
    assert structure.signature_change(without, model()) == 'the input "bias" has become optional'


def test_an_unchanged_signature_and_other_insides_are_fine() -> None:
    assert structure.signature_change(model(), model(BASE.replace("Relu", "Abs"))) == ""
    assert structure.same_inputs(model(), model(BASE.replace(", float[N, 4] z)", ")")))


def test_a_lost_shape_is_named() -> None:
    other = model()
    other.graph.outputs[0].shape = None
    assert "(none) instead of [N, 4]" in structure.signature_change(model(), other)


def test_a_sound_model_has_no_complaint() -> None:
    assert structure.checker_level(model()) == "full"
    assert structure.checker_complaint(model()) == ""


def test_an_unsound_model_has_one() -> None:
    broken = model()
    node = next(iter(broken.graph))
    node.attributes["no_such_attribute"] = ir.AttrInt64("no_such_attribute", 1)
    assert "no_such_attribute" in structure.checker_complaint(broken)
    assert "\n" not in structure.checker_complaint(broken)
    assert structure.checker_level(broken) == "none"
    assert structure.checker_complaint(broken, "none") == ""


def test_shapes_that_contradict_each_other_fail_the_full_check_alone() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[2, 3] x) => (float[5, 5] y) { y = Relu(x) }"""
    assert structure.checker_level(model(text)) == "basic"
    assert structure.checker_complaint(model(text), "basic") == ""
    assert structure.checker_complaint(model(text), "full")


def test_operators_of_unknown_domains_pass() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "some.domain" : 1]>
    g (float[2] x) => (float[2] y) { a = some.domain.Strange(x) y = Relu(a) }"""
    assert structure.checker_complaint(model(text)) == ""


def test_no_weight_is_read_and_all_are_put_back(tmp_path: Path) -> None:
    """The weights lie in a file that is not there: reading one would fail."""
    weight = ir.ExternalTensor("gone", 0, 4 << 30, ir.DataType.FLOAT, shape=ir.Shape([1024, 1 << 20]), name="w")
    inner = ir.ExternalTensor("gone", 0, 1 << 20, ir.DataType.FLOAT, shape=ir.Shape([1 << 18]), name="k")
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 1024]))
    w = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=weight.shape, const_value=weight)
    constant = ir.node("Constant", [], {"value": inner}, name="constant")
    product = ir.node("MatMul", [x, w], name="product")
    constant.outputs[0].name = "k"
    product.outputs[0].name = "y"
    product.outputs[0].type, product.outputs[0].shape = x.type, ir.Shape([1, 1 << 20])
    graph = ir.Graph(
        [x], product.outputs, nodes=[constant, product], initializers=[w], opset_imports={"": 17}, name="g"
    )
    large = ir.Model(graph, ir_version=8)
    proto = structure.weightless(large)
    assert proto.ByteSize() < 2000
    assert structure.checker_complaint(large) == ""
    assert w.const_value is weight
    assert constant.attributes["value"].as_tensor() is inner


def test_small_tensors_stay_because_they_decide_shapes() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[2, 3] x) => (float[3, 2] y)
    <int64[2] shape = {3, 2}> { y = Reshape(x, shape) }"""
    proto = structure.weightless(model(text))
    assert onnx.numpy_helper.to_array(proto.graph.initializer[0]).tolist() == [3, 2]
    wrong = model(text.replace("{3, 2}>", "{6, 1}>"))
    assert structure.checker_complaint(wrong)
    assert np.array_equal(wrong.graph.initializers["shape"].const_value.numpy(), [6, 1])  # type: ignore[union-attr]


def test_models_of_the_oldest_ir_version_pass() -> None:
    text = BASE.replace("ir_version: 8", "ir_version: 3")
    old = model(text.replace('"" : 17', '"" : 9'))
    assert structure.checker_complaint(old) == ""
