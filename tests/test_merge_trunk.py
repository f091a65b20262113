from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxopt
from onnxopt.errors import ModelError, NothingDoneError, UsageError, VerificationError
from onnxopt.merge_trunk import Fork, merge_trunk
from onnxopt.runtime import RunOptions, open_session
from onnxopt.unite import unite

HEADER = '<ir_version: 8, opset_import: ["" : {opset}]>'


def model(
    body: str, *, inputs: str = "float[N, 4] x", outputs: str = "float[N, 3] y", opset: int = 17, **arrays: np.ndarray
) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f"{HEADER.format(opset=opset)} g ({inputs}) => ({outputs}) {{ {body} }}")
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.checker.check_model(proto)
    return proto


def weight(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


TRUNK = "h = MatMul(x, w) r = Relu(h) "
A = model(TRUNK + "y = MatMul(r, v)", w=weight(1, 4, 5), v=weight(2, 5, 3))
B = model(TRUNK + "y = MatMul(r, v)", w=weight(1, 4, 5), v=weight(3, 5, 3))


def run(source: onnx.ModelProto | ir.Model, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with open_session(onnxopt.load(source), RunOptions(), optimized=False) as session:
        return session.run(feed)


def text(graph: ir.Graph) -> list[str]:
    return [
        f"{', '.join(str(v.name) for v in n.outputs)} = {n.op_type}({', '.join(v.name if v else '' for v in n.inputs)})"
        for n in graph
    ]


def test_the_trunk_is_computed_once() -> None:
    merged = merge_trunk([A, B], measure=False)
    assert text(merged.result.model.graph) == [
        "h = MatMul(x, w)",
        "r = Relu(h)",
        "y = MatMul(r, v)",
        "model2.y = MatMul(r, v_1)",
    ]
    trunk = merged.trunk
    assert (trunk.nodes, trunk.of, trunk.parameters) == (2, 4, 20)
    assert trunk.forks == (Fork("r", (("model1", "MatMul", "y"), ("model2", "MatMul", "model2.y"))),)
    assert merged.parts[1].outputs == (("y", "model2.y"),)


def test_every_output_is_that_of_its_own_model_to_the_bit() -> None:
    merged = merge_trunk([A, B], measure=False).result.model
    feed = {"x": weight(7, 6, 4)}
    found = run(merged, feed)
    assert run(A, feed)["y"].tobytes() == found["y"].tobytes()
    assert run(B, feed)["y"].tobytes() == found["model2.y"].tobytes()


def test_three_models_and_the_report() -> None:
    third = model(TRUNK + "y = MatMul(h, v)", w=weight(1, 4, 5), v=weight(3, 5, 3))
    merged = merge_trunk([A, B, third], measure=False)
    assert merged.trunk.nodes == 2
    said = str(merged.result.report)
    assert "model1 + model2 + model3" in said
    assert "2 of 5 nodes" in said
    assert "Of model3, y is model3.y." in said


def test_inputs_of_other_names_are_matched_in_order() -> None:
    other = model(
        "h = MatMul(image, w) r = Relu(h) y = MatMul(r, v)",
        inputs="float[N, 4] image",
        w=weight(1, 4, 5),
        v=weight(3, 5, 3),
    )
    merged = merge_trunk([A, other], measure=False)
    assert [v.name for v in merged.result.model.graph.inputs] == ["x"]
    assert merged.parts[1].inputs == (("image", "x"),)


def test_an_input_of_another_type_stays_its_own() -> None:
    other = model("y = Cast<to = 1>(x)", inputs="int64[N, 3] x")
    whole, parts = unite([onnxopt.load(A), onnxopt.load(other)], ["a", "b"])
    assert [v.name for v in whole.graph.inputs] == ["x", "x_1"]
    assert parts[1].inputs == (("x", "x_1"),)


def test_models_that_share_nothing_are_refused() -> None:
    other = model(TRUNK + "y = MatMul(r, v)", w=weight(9, 4, 5), v=weight(3, 5, 3))
    with pytest.raises(NothingDoneError, match="share no layer: each begins with MatMul, but on other inputs"):
        merge_trunk([A, other])
    relu = model("r = Relu(x) y = MatMul(r, v)", v=weight(3, 4, 3))
    with pytest.raises(NothingDoneError, match="model1 begins with MatMul, model2 begins with Relu"):
        merge_trunk([A, relu])


def test_weights_alone_are_no_trunk() -> None:
    other = model("r = Relu(x) h = MatMul(r, w) y = MatMul(h, v)", w=weight(1, 4, 5), v=weight(2, 5, 3))
    with pytest.raises(NothingDoneError):
        merge_trunk([A, other])


def test_one_model_is_not_enough() -> None:
    with pytest.raises(UsageError, match="two or more"):
        merge_trunk([A])


def test_versions_of_other_domains_must_agree() -> None:
    def with_domain(version: int) -> onnx.ModelProto:
        made = onnx.ModelProto.FromString(A.SerializeToString())
        made.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", version))
        return made

    with pytest.raises(ModelError, match='first imports version 3 of the operators "ai.onnx.ml" and second version 4'):
        unite([onnxopt.load(with_domain(3)), onnxopt.load(with_domain(4))], ["first", "second"])


def test_an_older_opset_is_raised() -> None:
    older = model(TRUNK + "y = MatMul(r, v)", opset=13, w=weight(1, 4, 5), v=weight(3, 5, 3))
    merged = merge_trunk([older, A], measure=False)
    assert merged.result.model.opset_imports[""] == 17
    assert merged.trunk.nodes == 2


def test_the_same_model_twice_keeps_both_outputs() -> None:
    merged = merge_trunk([A, A], measure=False)
    feed = {"x": weight(5, 2, 4)}
    found = run(merged.result.model, feed)
    assert found["y"].tobytes() == found["model2.y"].tobytes() == run(A, feed)["y"].tobytes()


def test_outputs_that_are_inputs_or_weights() -> None:
    handed = model(
        TRUNK + "y = MatMul(r, v)", outputs="float[N, 3] y, float[N, 4] x", w=weight(1, 4, 5), v=weight(2, 5, 3)
    )
    merged = merge_trunk([A, handed], measure=False)
    feed = {"x": weight(5, 2, 4)}
    found = run(merged.result.model, feed)
    assert found[dict(merged.parts[1].outputs)["x"]].tobytes() == feed["x"].tobytes()


def test_random_nodes_are_not_shared() -> None:
    noisy = model("n = RandomNormalLike(x) h = Add(x, n) y = MatMul(h, v)", v=weight(2, 4, 3))
    other = model("n = RandomNormalLike(x) h = Add(x, n) y = MatMul(h, v)", v=weight(3, 4, 3))
    with pytest.raises(NothingDoneError):
        merge_trunk([noisy, other])


def test_branches_that_capture_values_of_the_trunk() -> None:
    body = (
        TRUNK + "s = ReduceSum<keepdims = 0>(r) z = Constant<value_float = 0.0>() c = Greater(s, z) "
        "y = If (c) <then_branch = t () => (float[N, 3] p) { p = MatMul(r, v) }, "
        "else_branch = e () => (float[N, 3] q) { k = Neg(r) q = MatMul(k, v) }>"
    )
    first = model(body, w=weight(1, 4, 5), v=weight(2, 5, 3))
    second = model(body, w=weight(1, 4, 5), v=weight(3, 5, 3))
    merged = merge_trunk([first, second], measure=False)
    assert merged.trunk.nodes >= 4
    for scale in (1, -1):
        feed = {"x": np.float32(scale) * np.abs(weight(5, 2, 4))}
        found = run(merged.result.model, feed)
        assert run(second, feed)["y"].tobytes() == found["model2.y"].tobytes()


def test_overridable_weights_stay_with_their_model() -> None:
    def overridable(seed: int) -> onnx.ModelProto:
        made = model(TRUNK + "y = MatMul(r, v)", w=weight(1, 4, 5), v=weight(seed, 5, 3))
        made.graph.input.append(onnx.helper.make_tensor_value_info("v", onnx.TensorProto.FLOAT, [5, 3]))
        return made

    merged = merge_trunk([overridable(2), overridable(3)], measure=False)
    assert [v.name for v in merged.result.model.graph.inputs] == ["x", "v", "v_1"]
    feed = {"x": weight(5, 2, 4)}
    found = run(merged.result.model, feed)
    assert run(overridable(3), feed)["y"].tobytes() == found["model2.y"].tobytes()


def test_functions_are_written_out() -> None:
    def calling(seed: int) -> onnx.ModelProto:
        made = onnx.parser.parse_model(
            """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
            g (float[N, 4] x) => (float[N, 3] y) { r = own.dense(x, w) y = MatMul(r, v) }
            <domain: "own", opset_import: ["" : 17]> dense (a, b) => (c) { h = MatMul(a, b) c = Relu(h) }"""
        )
        made.graph.initializer.append(onnx.numpy_helper.from_array(weight(1, 4, 5), "w"))
        made.graph.initializer.append(onnx.numpy_helper.from_array(weight(seed, 5, 3), "v"))
        return made

    merged = merge_trunk([calling(2), calling(3)], measure=False)
    assert merged.trunk.nodes == 2
    assert not merged.result.model.functions


@settings(deadline=None, max_examples=15)
@given(st.lists(st.sampled_from(["Relu", "Neg", "Abs", "Tanh"]), min_size=2, max_size=6), st.data())
def test_the_longest_common_beginning_is_shared(ops: list[str], data: st.DataObject) -> None:
    """Two chains share as many nodes as they have in common at the start, and no other."""
    shared = data.draw(st.integers(1, len(ops) - 1))

    def chain(tail: str) -> onnx.ModelProto:
        names = ["x", *(f"h{i}" for i in range(len(ops) - 1)), "y"]
        kinds = [*ops[:shared], tail, *ops[shared + 1 :]]
        body = " ".join(f"{names[i + 1]} = {op}({names[i]})" for i, op in enumerate(kinds))
        return model(body, outputs="float[N, 4] y")

    merged = merge_trunk([chain("Exp"), chain("Sigmoid")], measure=False)
    assert merged.trunk.nodes == shared
    assert len(list(merged.result.model.graph)) == 2 * len(ops) - shared


def test_the_models_are_not_changed(tmp_path: Path) -> None:
    loaded = [onnxopt.load(A), onnxopt.load(B)]
    before = [ir.to_proto(m).SerializeToString() for m in loaded]
    merge_trunk(loaded, measure=False)
    assert [ir.to_proto(m).SerializeToString() for m in loaded] == before


def test_an_output_that_is_not_that_of_its_model_is_found() -> None:
    """One weight that differs in its last bit is enough."""
    merged = merge_trunk([A, B], measure=False)
    array = weight(3, 5, 3)
    array[0, 0] = np.nextafter(array[0, 0], np.float32(9))
    other = model(TRUNK + "y = MatMul(r, v)", w=weight(1, 4, 5), v=array)
    feeds = [{"x": np.abs(weight(5, 64, 4))}]
    module = importlib.import_module("onnxopt.merge_trunk")
    check = module._require_equal
    check([onnxopt.load(A), onnxopt.load(B)], merged.parts, merged.result.model, feeds, RunOptions())
    with pytest.raises(VerificationError, match='output "y" of model2 is not the same to the bit'):
        check([onnxopt.load(A), onnxopt.load(other)], merged.parts, merged.result.model, feeds, RunOptions())
