from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

import onnxopt
from onnxopt import model as models
from onnxopt import runtime
from onnxopt.errors import DataError, NothingDoneError, UsageError
from onnxopt.training.distill import distill
from onnxopt.training.finetune import finetune
from onnxopt.training.parameters import find_parameters, with_parameters

Blobs = tuple[dict[str, np.ndarray], np.ndarray]

SMALL = """<ir_version: 8, opset_import: ["" : 17]> g (float[batch, 4] x) => (float[batch, 3] y)
{ h = Gemm (x, w1, b1)  r = Relu (h)  s = Gemm (r, w2, b2)  y = Softmax (s) }"""


def small(width: int = 6, text: str = SMALL) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(5)
    for name, shape in {"w1": (4, width), "b1": (width,), "w2": (width, 3), "b2": (3,)}.items():
        array = 0.4 * rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


@pytest.fixture
def teacher(network: onnx.ModelProto, blobs: Blobs) -> Any:
    return finetune(network, *blobs, epochs=15, learning_rate=0.02).model


def classes(model: Any, x: np.ndarray) -> np.ndarray:
    with runtime.open_session(models.load(model), optimized=True) as session:
        return np.argmax(session.run({"x": x})["y"], axis=1)


def test_a_smaller_student_learns_the_classes_of_its_teacher_without_labels(teacher: Any, blobs: Blobs) -> None:
    student = small()
    found = onnxopt.distill(teacher, student, blobs[0], epochs=40, learning_rate=0.03)
    assert found.before is not None and found.after is not None and not found.is_worse
    x = blobs[0]["x"] + np.random.default_rng(9).standard_normal(blobs[0]["x"].shape).astype(np.float32)
    wanted = classes(teacher, x)
    before, after = ((classes(m, x) == wanted).mean() for m in (student, found.model))
    assert after > 0.85 and after > before + 0.2, (before, after)
    assert found.targets == ("the scores s at temperature 4",)
    again = distill(teacher, student, blobs[0], epochs=40, learning_rate=0.03)
    assert np.array_equal(*(find_parameters(m.model)["w1"].tensor.numpy() for m in (found, again)))
    assert any("Same class as the teacher" in sentence for sentence in found.sentences())


def test_a_student_learns_with_batchnorm_and_is_judged_by_folds(teacher: Any, blobs: Blobs) -> None:
    found = distill(
        teacher, small(), blobs[0], epochs=20, learning_rate=0.03, batchnorm="restored", judging_folds=3, patience=1
    )
    assert found.restored == ("w1",) and found.folds == 3 and found.best == 20
    assert found.before is not None and found.after is not None and found.after.samples == 180
    assert found.after.value > found.before.value + 0.2


def test_a_teacher_of_the_same_widths_is_reached_through_its_values(teacher: Any, blobs: Blobs) -> None:
    start = {n: p.tensor.numpy() + np.float32(0.1) for n, p in find_parameters(teacher).items()}
    student = with_parameters(teacher, start)
    found = distill(teacher, student, blobs[0], hidden=["[hr]"], epochs=60, learning_rate=0.02, mix=0, batch=16)
    assert found.targets[1:] == ("the values of h", "the values of r")
    first, best = (-found.epochs[number].key[0] for number in (0, found.best))
    assert best < 0.2 * first


def test_values_that_are_no_scores_are_compared_in_units_of_their_variance(blobs: Blobs) -> None:
    text = SMALL.replace("y = Softmax (s)", "y = Tanh (s)")
    teacher, student = small(6, text), small(4, text)
    found = distill(teacher, student, blobs[0], epochs=40, learning_rate=0.03, mix=0)
    assert found.targets == ("the values of y",)
    assert found.before is not None and found.after is not None
    assert found.before.name == "squared error to the teacher" and found.after.value < 0.3 * found.before.value


def test_probabilities_that_are_spelled_out(teacher: Any, blobs: Blobs) -> None:
    text = SMALL.replace("y = Softmax (s)", "e = Exp (s)  t = ReduceSum (e, axes)  y = Div (e, t)")
    student = small(6, text.replace("(float[batch, 3] y)", "(float[batch, 3] y) <int64[1] axes = {1}>"))
    found = distill(teacher, student, blobs[0], epochs=20, learning_rate=0.03)
    assert found.targets == ("the scores y at temperature 4",)
    assert not found.is_worse and found.best > 0


def test_refusals(teacher: Any, blobs: Blobs) -> None:
    student, data = small(), blobs[0]
    with pytest.raises(UsageError, match="temperature must be above 0"):
        distill(teacher, student, data, temperature=0.0)
    with pytest.raises(UsageError, match='hidden "h" fits no value that both models have in the same shape'):
        distill(teacher, student, data, hidden=["h"])
    other = small()
    other.graph.input[0].name = other.graph.node[0].input[0] = "z"
    with pytest.raises(DataError, match=r"must take the same inputs: the one takes x \(float\), the other z \(float\)"):
        distill(teacher, other, {"z": data["x"]})
    renamed = small()
    renamed.graph.output[0].name = renamed.graph.node[-1].output[0] = "z"
    with pytest.raises(DataError, match="no floating-point output of the same name and shape"):
        distill(teacher, renamed, data)
    plain = '<ir_version: 8, opset_import: ["" : 17]> g (float[batch, 4] x) => (float[batch, 4] y) { y = Relu (x) }'
    with pytest.raises(NothingDoneError, match="no floating-point parameters"):
        distill(onnx.parser.parse_model(plain), onnx.parser.parse_model(plain), data)
