"""Computing single nodes: numpy first, then the runtime, never more than asked for."""

import numpy as np
import onnx_ir as ir
import pytest

from onnxopt.analysis import evaluation
from onnxopt.numeric.kernels import TooLargeError
from onnxopt.runtime import evaluate_node


def node(op_type, inputs, attributes=None, outputs=1):
    values = []
    for index, array in enumerate(inputs):
        value = None
        if array is not None:
            tensor = ir.tensor(array, name=f"i{index}")
            value = ir.Value(name=f"i{index}", type=ir.TensorType(tensor.dtype), const_value=tensor)
        values.append(value)
    made = ir.node(op_type, values, attributes or {}, num_outputs=outputs)
    for index, output in enumerate(made.outputs):
        output.name = f"o{index}"
    ir.Graph([], [], nodes=[made], initializers=[v for v in values if v is not None])
    return made


def compute(*args, max_bytes=1 << 20, evaluate=evaluate_node, opset=17, **options):
    return evaluation.compute(node(*args), opset, evaluate, max_bytes, **options)


def never(*_):
    pytest.fail("the runtime was asked")


X = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_what_numpy_can_the_runtime_is_not_asked():
    (found,) = compute("Add", [X, X], evaluate=never)
    np.testing.assert_array_equal(found, X + X)


def test_the_rest_comes_from_the_runtime():
    (found,) = compute("Softmax", [X])
    np.testing.assert_allclose(found.sum(axis=-1), 1, rtol=1e-6)


def test_optional_inputs_may_be_left_out():
    (found,) = compute("Clip", [X, None, np.float32(2)])
    assert found.max() == 2


@pytest.mark.parametrize("args", [("Pad", [X, np.array([0, 0, 0, 1 << 40])]), ("HannWindow", [np.array(1 << 40)])])
def test_the_size_is_known_before_the_runtime_is_asked(args):
    with pytest.raises(TooLargeError):
        compute(*args, evaluate=never)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("NoSuchOperator", [X]), "size"),
        (("SequenceConstruct", [X]), "not a tensor"),
    ],
)
def test_what_cannot_be_judged_is_not_computed(args, reason):
    with pytest.raises(evaluation.NotComputableError, match=reason):
        compute(*args, evaluate=never)


def test_sizes_that_depend_on_values_are_bounded_by_the_inputs():
    (found,) = compute("NonZero", [X])
    np.testing.assert_array_equal(found, np.nonzero(X))
    with pytest.raises(evaluation.NotComputableError, match="size"):
        compute("NonZero", [np.zeros(1 << 20, np.float32)], evaluate=never)


@pytest.mark.parametrize("answer", [None, [X.astype(np.float64)], [[X]]], ids=["none", "wrong type", "sequence"])
def test_answers_that_do_not_fit_are_refused(answer):
    with pytest.raises(evaluation.NotComputableError, match="can compute"):
        compute("Softmax", [X], evaluate=lambda *_: answer)


def test_cast_like_casts_to_the_type_given():
    (found,) = compute("CastLike", [X, None], evaluate=never, cast_to=ir.DataType.INT64)
    assert found.dtype == np.int64
    with pytest.raises(evaluation.NotComputableError):
        compute("CastLike", [X, None], evaluate=never, cast_to=ir.DataType.BFLOAT16)
