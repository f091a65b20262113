from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnxopt
from onnxopt.errors import DataError, ModelError, UsageError, VerificationError
from onnxopt.heads.attach import CLASSES
from onnxopt.probe.classifier import log_softmax
from onnxopt.runtime import RunOptions, open_session

MODELS = Path(__file__).parent.parent / "models"
HEADER = '<ir_version: 8, opset_import: ["" : {opset}]>'


def model(
    body: str, *, inputs: str = "float[N, 6] x", outputs: str = "float[N, 4] y", opset: int = 17, **arrays: np.ndarray
) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f"{HEADER.format(opset=opset)} g ({inputs}) => ({outputs}) {{ {body} }}")
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def samples(*shape: int, count: int = 30, kinds: int = 3) -> dict[str, np.ndarray]:
    """Return inputs that differ by class, and their labels."""
    random = np.random.default_rng(0)
    labels = np.arange(count) % kinds
    centres = random.normal(size=(kinds, *shape)) * 2
    return {"x": (centres[labels] + random.normal(size=(count, *shape))).astype(np.float32), "labels": labels}


def run(source: ir.Model, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with open_session(source, RunOptions(), optimized=False) as session:
        return session.run(feed)


def text(graph: ir.Graph) -> list[str]:
    return [
        f"{', '.join(str(v.name) for v in n.outputs)} = {n.op_type}({', '.join(v.name if v else '' for v in n.inputs)})"
        for n in graph
    ]


def new_head(proto: onnx.ModelProto, data: dict[str, np.ndarray], **options: object) -> onnxopt.HeadResult:
    return onnxopt.head(proto, data=data, folds=3, curve=False, **options)  # type: ignore[arg-type]


def shape(value: ir.Value) -> list[object]:
    assert value.shape is not None
    return [d if isinstance(d, int) else d.value for d in value.shape]


@pytest.mark.parametrize(
    ("body", "arrays", "after"),
    [
        ("h = Relu(x) y = Gemm(h, w, b)", {"w": weight(6, 4), "b": weight(4)}, "y = Gemm(h, head.weight, head.bias)"),
        (
            "h = Relu(x) y = Gemm<transB = 1, alpha = 0.5>(h, w)",
            {"w": weight(4, 6)},
            "y = Gemm(h, head.weight, head.bias)",
        ),
    ],
    ids=["gemm", "transposed"],
)
def test_a_gemm_keeps_its_form(body: str, arrays: dict[str, np.ndarray], after: str) -> None:
    data = samples(6)
    result = new_head(model(body, **arrays), data)
    assert text(result.model.graph) == ["h = Relu(x)", after]
    (output,) = result.model.graph.outputs
    assert shape(output) == ["N", 3]
    assert sorted(result.model.graph.initializers) == ["head.bias", "head.weight"]
    expected = result.classifier.scores(np.maximum(data["x"], 0))
    np.testing.assert_allclose(run(result.model, {"x": data["x"]})["y"], expected, atol=1e-4)
    assert (expected.argmax(axis=1) == data["labels"]).mean() > 0.9
    assert result.report.replaces == "Gemm"
    assert json.loads(result.model.metadata_props[CLASSES]) == ["0", "1", "2"]


def test_a_matmul_gets_its_bias_and_softmax_keeps_its_place() -> None:
    data = samples(6)
    result = new_head(model("h = Relu(x) s = MatMul(h, w) y = Softmax(s)", w=weight(6, 4)), data)
    assert text(result.model.graph) == [
        "h = Relu(x)",
        "head/MatMul_output = MatMul(h, head.weight)",
        "s = Add(head/MatMul_output, head.bias)",
        "y = Softmax(s)",
    ]
    found = run(result.model, {"x": data["x"]})["y"]
    expected = np.exp(log_softmax(result.classifier.scores(np.maximum(data["x"], 0))))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert result.report.activation == "Softmax"


def test_an_added_bias_is_part_of_the_head() -> None:
    proto = model("h = Relu(x) p = MatMul(h, w) s = Add(b, p) y = LogSoftmax(s)", w=weight(6, 4), b=weight(4))
    result = new_head(proto, samples(6))
    assert [n.op_type for n in result.model.graph] == ["Relu", "MatMul", "Add", "LogSoftmax"]
    assert "b" not in result.model.graph.initializers
    assert result.report.activation == "LogSoftmax"


def test_a_convolution_before_the_mean_over_positions() -> None:
    proto = model(
        "h = Relu(x) c = Conv(h, w, b) r = Relu(c) p = GlobalAveragePool(r) y = Flatten(p)",
        inputs="float[N, 5, 3, 3] x",
        w=weight(4, 5, 1, 1),
        b=weight(4),
    )
    data = samples(5, 3, 3)
    result = new_head(proto, data)
    assert [n.op_type for n in result.model.graph] == ["Relu", "Conv", "GlobalAveragePool", "Flatten"]
    expected = result.classifier.scores(np.maximum(data["x"], 0).mean(axis=(2, 3)))
    np.testing.assert_allclose(run(result.model, {"x": data["x"]})["y"], expected, atol=1e-4)
    assert any("Relu after the head was taken out" in note for note in result.report.notes)


def test_a_convolution_over_all_positions() -> None:
    proto = model("h = Relu(x) c = Conv(h, w) y = Flatten(c)", inputs="float[N, 5, 3, 3] x", w=weight(4, 5, 3, 3))
    result = new_head(proto, samples(5, 3, 3))
    assert [n.op_type for n in result.model.graph] == ["Relu", "Conv", "Flatten"]
    assert result.report.dimensions == 45
    assert result.model.graph.initializers["head.weight"].shape == ir.Shape([3, 5, 3, 3])


def test_a_softmax_spelled_out_and_a_target_of_a_reshape_follow_the_classes() -> None:
    body = """
        s = MatMul(x, w)  m = ReduceMax<axes = [1], keepdims = 1>(s)  d = Sub(s, m)  e = Exp(d)
        t = ReduceSum<keepdims = 1>(e, one)  q = Div(e, t)  y = Reshape(q, target)
    """
    proto = model(body, w=weight(6, 4), one=np.array([1]), target=np.array([-1, 4]), inputs="float[N, 6] x", opset=17)
    result = new_head(proto, samples(6))
    assert result.report.activation == "Softmax"
    assert result.model.graph.initializers["head.shape"].const_value.numpy().tolist() == [-1, 3]  # type: ignore[union-attr]


def test_sigmoid_becomes_softmax() -> None:
    result = new_head(model("s = Gemm(x, w) y = Sigmoid(s)", w=weight(6, 4)), samples(6))
    assert [n.op_type for n in result.model.graph] == ["Gemm", "Softmax"]
    assert result.model.graph.outputs[0].name == "y"
    np.testing.assert_allclose(run(result.model, {"x": samples(6)["x"]})["y"].sum(axis=1), 1, atol=1e-5)


def test_a_quantized_head_becomes_a_plain_one() -> None:
    body = "z = DequantizeLinear(w, scale) s = Gemm(x, z) q = QuantizeLinear(s, scale) y = DequantizeLinear(q, scale)"
    arrays = {"w": np.random.default_rng(0).integers(0, 9, (6, 4)).astype(np.uint8), "scale": np.array(0.1, np.float32)}
    result = new_head(model(body, **arrays), samples(6))
    assert text(result.model.graph) == ["y = Gemm(x, head.weight, head.bias)"]


def test_other_outputs_stay_the_same_and_those_of_the_head_follow() -> None:
    proto = model(
        "h = Relu(x) s = Gemm(h, w) p = Softmax(s)",
        outputs="float[N, 4] s, float[N, 6] h, float[N, 4] p",
        w=weight(6, 4),
    )
    data = samples(6)
    result = new_head(proto, data)
    assert [(v.name, shape(v)) for v in result.model.graph.outputs] == [
        ("s", ["N", 3]),
        ("h", ["N", 6]),
        ("p", ["N", 3]),
    ]
    assert (run(result.model, {"x": data["x"]})["h"] == np.maximum(data["x"], 0)).all()


def test_a_weight_that_others_use_stays() -> None:
    proto = model("h = MatMul(x, w) t = Transpose(w) y = MatMul(h, t)", w=weight(6, 6), outputs="float[N, 6] y")
    result = new_head(proto, samples(6))
    assert [n.op_type for n in result.model.graph] == ["MatMul", "MatMul", "Add"]
    assert "w" in result.model.graph.initializers


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_an_embedding_of_tokens_gets_a_head_over_their_masked_mean(opset: int) -> None:
    proto = model(
        "h = MatMul(x, w) y = Tanh(h)",
        inputs="float[N, T, 6] x, int64[N, T] attention_mask",
        outputs="float[N, T, 5] y",
        opset=opset,
        w=weight(6, 5),
    )
    data = samples(4, 6) | {"attention_mask": np.array([[1, 1, 1, 0]] * 15 + [[1, 0, 0, 0]] * 15)}
    result = new_head(proto, data)
    (output,) = result.model.graph.outputs
    assert (output.name, shape(output)) == ("logits", ["N", 3])
    hidden, mask = np.tanh(data["x"] @ weight(6, 5)), data["attention_mask"][..., None]
    expected = result.classifier.scores((hidden * mask).sum(axis=1) / mask.sum(axis=1))
    feed = {k: data[k] for k in ("x", "attention_mask")}
    np.testing.assert_allclose(run(result.model, feed)["logits"], expected, atol=1e-4)
    assert result.report.replaces == ""
    assert "attention_mask" in " ".join(result.report.notes)


def test_features_can_be_chosen() -> None:
    proto = model("h = Relu(x) s = Gemm(h, w) r = Relu(s) y = Gemm(r, v)", w=weight(6, 5), v=weight(5, 4))
    result = new_head(proto, samples(6), at="h")
    assert [n.op_type for n in result.model.graph] == ["Relu", "Gemm"]
    assert result.model.graph.outputs[0].name == "y"
    assert sorted(result.model.graph.initializers) == ["head.bias", "head.weight"]


def test_the_layer_that_tells_most_is_found() -> None:
    """The last layer has lost what tells the classes apart; the one before has it."""
    lost = weight(5, 5) * np.array([1, 0, 0, 0, 0], np.float32)
    proto = model(
        "h = Relu(x) s = Gemm(h, w) r = Relu(s) t = Gemm(r, l) q = Relu(t) y = Gemm(q, v)",
        w=weight(6, 5),
        l=lost,
        v=weight(5, 4),
    )
    result = new_head(proto, samples(6, count=60), at="auto")
    assert result.report.features in ("r", "h")
    assert "Features were chosen" in result.report.notes[0]
    assert (
        result.report.methods[0].accuracy.share > new_head(proto, samples(6, count=60)).report.methods[0].accuracy.share
    )


def dots(count: int) -> dict[str, np.ndarray]:
    """Return images of one dot, and whether it is in the left half or the right."""
    random = np.random.default_rng(0)
    rows, columns = random.integers(0, 8, (2, count))
    columns[0], columns[1] = 0, 7
    images = np.zeros((count, 1, 8, 8), np.float32)
    images[np.arange(count), 0, rows, columns] = 1
    return {"x": images, "labels": columns // 4}


DOTS = model("f = Flatten(x) h = Relu(f) y = Gemm(h, w)", inputs="float[N, 1, 8, 8] x", w=weight(64, 4))


def test_moved_images_are_learnt_from_where_that_helps() -> None:
    plain = new_head(DOTS, dots(30), method="ridge")
    found = new_head(DOTS, dots(30), method="ridge", shift=1)
    assert [m.method for m in found.report.methods] == ["ridge with moved images", "ridge"]
    assert found.report.methods[1].accuracy == plain.report.methods[0].accuracy
    assert found.report.methods[0].accuracy.right > plain.report.methods[0].accuracy.right
    more = dots(200)
    right = [
        (r.classifier.scores(more["x"].reshape(200, -1)).argmax(axis=1) == more["labels"]).mean()
        for r in (plain, found)
    ]
    assert right[1] > right[0]


def test_moved_images_are_left_out_where_they_hurt() -> None:
    """The class is whether the column is even, which a pixel changes."""
    data = dots(60)
    data["labels"] = data["x"].any(axis=(1, 2)).argmax(axis=1) % 2
    found = new_head(DOTS, data, method="ridge", shift=1)
    assert [m.method for m in found.report.methods] == ["ridge", "ridge with moved images"]
    assert (found.classifier.weight == new_head(DOTS, data, method="ridge").classifier.weight).all()


def test_what_cannot_be_moved() -> None:
    with pytest.raises(UsageError, match="the model takes none"):
        new_head(model("h = Relu(x) y = Gemm(h, w)", w=weight(6, 4)), samples(6), shift=1)
    with pytest.raises(UsageError, match="8 x 8 cannot be moved by 8 pixels"):
        new_head(DOTS, dots(12), shift=8)
    with pytest.raises(UsageError, match="cannot be -1"):
        new_head(DOTS, dots(12), shift=-1)


def test_labels_may_be_strings_and_come_from_a_file(tmp_path: Path) -> None:
    data = samples(6)
    names = np.array(["cat", "dog", "emu"])[data.pop("labels")]
    np.save(tmp_path / "labels.npy", names)
    np.savez(tmp_path / "x.npz", **data)  # type: ignore[arg-type]
    proto = model("y = Gemm(x, w)", w=weight(6, 4))
    result = onnxopt.head(proto, data=tmp_path / "x.npz", labels=tmp_path / "labels.npy", folds=3, curve=False)
    assert result.report.classes == ("cat", "dog", "emu")
    np.savez(tmp_path / "both.npz", labels=names, **data)  # type: ignore[arg-type]
    again = onnxopt.head(proto, data=tmp_path / "both.npz", folds=3, curve=False)
    assert (again.classifier.weight == result.classifier.weight).all()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"labels": np.arange(7) % 3}, {}, "holds 7 labels, but arrays has 30 samples"),
        ({"labels": np.zeros(30, int)}, {}, "are 0; a classifier needs two classes"),
        ({"labels": np.arange(30) % 3}, {"classes": 5}, "3 classes .* but --classes is 5; there is no sample of class 3"),
        ({"labels": np.arange(30) % 3}, {"classes": 2}, "holds 3 classes .* but --classes is 2"),
        ({"labels": np.array([0] * 28 + [1, 1])}, {}, "Class 1 has 2 of the samples, fewer than the 3 folds"),
        ({"labels": np.linspace(0, 1, 30)}, {}, "classes are whole numbers or strings"),
        ({"labels": np.zeros((30, 2), int)}, {}, "one class per sample"),
        ({"x": np.full((30, 6), np.nan, np.float32)}, {}, "not a finite number for sample 0"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used(change: dict[str, np.ndarray], options: dict[str, object], message: str) -> None:
    proto = model("h = Relu(x) y = Gemm(h, w)", w=weight(6, 4))
    with pytest.raises(DataError, match=message):
        new_head(proto, samples(6) | change, **options)


def test_there_are_no_labels() -> None:
    with pytest.raises(DataError, match="There are no labels for arrays"):
        new_head(model("y = Gemm(x, w)", w=weight(6, 4)), {"x": samples(6)["x"]})


def test_options_that_cannot_be_used() -> None:
    proto = model("h = Relu(x) y = Gemm(h, w)", w=weight(6, 4))
    with pytest.raises(UsageError, match='no value "hidde".*"hidden"'):
        new_head(model("hidden = Relu(x) y = Gemm(hidden, w)", w=weight(6, 4)), samples(6), at="hidde")
    with pytest.raises(UsageError, match="at least 2"):
        onnxopt.head(proto, data=samples(6), folds=1)
    with pytest.raises(ModelError, match="no floating-point"):
        new_head(model("y = ArgMax(x)", outputs="int64[N, M] y"), samples(6))


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        ("s = Gemm(x, w) y = Tanh(s)", "float[N, 4] y", "comes from Tanh, not from a linear layer"),
        ("y = Gemm(x, w) z = Tanh(y)", "float[N, 4] y, float[N, 4] z", "also go into Tanh"),
        ("a = Gemm(x, w) b = Gemm(x, v) y = Sub(a, b)", "float[N, 4] y", "comes from 2 linear layers"),
    ],
)
def test_what_is_no_head_is_not_replaced(body: str, outputs: str, reason: str) -> None:
    arrays = {"w": weight(6, 4), "v": weight(6, 4)}
    arrays = {k: v for k, v in arrays.items() if f", {k})" in body}
    result = new_head(model(body, outputs=outputs, **arrays), samples(6))
    assert result.report.replaces == ""
    assert reason in " ".join(result.report.notes)


def test_a_result_that_computes_something_else_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxopt.heads import attach

    monkeypatch.setattr(attach, "_cast", lambda array, dtype: np.asarray(array * 1.1, dtype.numpy()))
    with pytest.raises(VerificationError, match="deviates by .* from the classifier"):
        new_head(model("h = Relu(x) y = Gemm(h, w)", w=weight(6, 4)), samples(6))


def test_the_source_is_left_as_it_was() -> None:
    source = onnxopt.load(MODELS / "mnist_cnn.onnx")
    before = {name: v.const_value for name, v in source.graph.initializers.items()}
    nodes = text(source.graph)
    images = np.load(MODELS / "mnist_test.npz")["image"][:100]
    labels = np.load(MODELS / "mnist_test_labels.npy")[:100] % 2
    result = onnxopt.head(source, data={"image": images}, labels=labels, method="ridge")
    assert text(source.graph) == nodes
    assert {name: v.const_value for name, v in source.graph.initializers.items()} == before
    assert result.report.methods[0].accuracy.share > 0.9
    assert result.report.curve[-1].mean > 0.8
    assert "even" not in str(result.report)
    assert "right in 5-fold cross-validation of 100 samples" in str(result.report).replace("\n", " ")
