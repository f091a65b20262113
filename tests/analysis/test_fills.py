import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxopt.analysis.fills import constant_or_fill, fill, filled_elements, is_uniform, store
from onnxopt.graph import Names, root_scopes
from onnxopt.rewrite import Builder


def model(body, opset=17):
    return ir.from_proto(
        onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        g (float[2] x, int64[1] given) => (float[k] y)
        <int64[2] shape = {{300, 4}}, int64[1] axis = {{1}}, int64[1] negative = {{-1}}, float[2] c = {{1, 2}}>
        {{ {body} }}
        """)
    )


def value(made, name="y"):
    return next(v for node in made.graph for v in node.outputs if v.name == name)


@pytest.mark.parametrize(
    ("body", "opset", "shape", "number"),
    [
        ("y = ConstantOfShape(shape)", 17, (300, 4), 0),
        ("y = ConstantOfShape <value = float[1] {2.5}> (shape)", 17, (300, 4), 2.5),
        ("y = ConstantOfShape <value = int64[1] {7}> (shape)", 17, (300, 4), 7),
        ("a = ConstantOfShape(shape) y = Unsqueeze(a, axis)", 17, (300, 1, 4), 0),
        ("a = ConstantOfShape(shape) y = Unsqueeze <axes = [0, 3]> (a)", 11, (1, 300, 4, 1), 0),
    ],
)
def test_what_is_filled_in(body, opset, shape, number):
    found = fill(value(model(body, opset)))
    assert found.shape == shape
    assert (found == number).all()
    assert not any(found.strides), "one element stands for all"


@pytest.mark.parametrize("body", ["y = ConstantOfShape(given)", "y = ConstantOfShape(negative)", "y = Exp(x)"])
def test_what_is_not(body):
    assert fill(value(model(body))) is None
    assert constant_or_fill(value(model(body))) is None


def test_constants_are_read_as_they_are():
    made = model("y = Add(x, c)")
    assert constant_or_fill(made.graph.initializers["c"]).tolist() == [1, 2]
    assert fill(made.graph.initializers["c"]) is None
    assert not is_uniform(np.array([1, 2]))
    assert is_uniform(np.ones(3))
    assert not is_uniform(np.ones(0))


@pytest.mark.parametrize(
    ("array", "is_filled"),
    [(np.ones(8), False), (np.ones(4096), True), (np.arange(4096.0), False), (np.ones((2, 4096)), True)],
)
def test_only_large_uniform_tensors_are_filled_in(array, is_filled):
    made = model("y = Exp(x)")
    builder = Builder(next(root_scopes(made)), Names(made), value(made).producer(), "y")
    stored = store(builder, "w", array.astype(np.float32))
    assert (fill(stored) is not None) == is_filled
    assert np.array_equal(constant_or_fill(stored), array)


def test_a_shape_beyond_what_numpy_addresses_is_no_fill():
    """NumPy raises for it, even where the tensor is a view of one element."""
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1] x) => (float y) <int64[2] s = {%d, %d}> { f = ConstantOfShape(s) y = ReduceSum(f) }
    """
    large, absurd = (ir.from_proto(onnx.parser.parse_model(text % (2**n, 2**20))) for n in (30, 40))
    assert filled_elements(large) == 2**50
    assert filled_elements(absurd) == 0
