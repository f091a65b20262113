"""Inner names get short; everything that callers refer to keeps its own."""

import numpy as np
import onnx
import onnx_ir as ir

import onnxopt

SPEC = "shorten-names"
HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
TEXT = f"""{HEAD} g (float[2] a, bool condition) => (float[2] result)
<float[2] weight_of_the_first_layer = {{1, 2}}, float[2] c = {{3, 4}}> {{
    [the_first_layer] after_the_first_layer = Add(a, weight_of_the_first_layer)
    scaled = Mul(after_the_first_layer, c)
    result = If (condition) <
        then_branch = t () => (float[2] b) <float[2] inner_weight = {{5, 6}}>
            {{ captured = Add(scaled, inner_weight) b = Mul(captured, c) }},
        else_branch = e () => (float[2] other) {{ other = Neg(after_the_first_layer) }}>
}}"""


def test_inputs_outputs_and_those_of_bodies_keep_their_names(rewritten):
    found = rewritten(TEXT, SPEC)
    graph = found.model.graph
    assert [v.name for v in (*graph.inputs, *graph.outputs)] == ["a", "condition", "result"]
    body = graph.node(2).attributes["then_branch"].as_graph()
    assert [v.name for v in body.outputs] == ["b"]
    # neither a nor b is taken again, and bodies see the names around them
    assert list(graph.initializers) == ["c", "d"]
    assert [v.name for n in graph for v in n.outputs] == ["e", "f", "result"]
    assert [v.name for n in body for v in n.inputs] == ["f", "g", "h", "d"]
    assert not [n.name for n in graph if n.name]
    saved = sum(len(n) - 1 for n in ("weight_of_the_first_layer", "after_the_first_layer", "scaled", "inner_weight"))
    saved += len("captured") - 1
    assert found.report.passes[0].applied[0].summary == (
        f"6 names of values with {saved} letters less, 1 of nodes left out"
    )


def test_the_original_keeps_its_names_although_it_shares_tensors():
    model = onnxopt.load(onnx.parser.parse_model(TEXT))
    before = ir.to_proto(model).SerializeToString()
    result = onnxopt.optimize(model, passes=SPEC, verify=False, measure=False)
    assert ir.to_proto(model).SerializeToString() == before
    assert result.report.passes[0].applied


def test_weights_that_the_caller_can_override_keep_their_names(rewritten):
    proto = onnx.parser.parse_model(f"{HEAD} g (float[2] x, float[2] w) => (float[2] y) {{ y = Add(x, w) }}")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(2, "f"), "w"))
    assert rewritten(proto, SPEC).edits == 0


def test_quantization_annotations_refer_to_names():
    proto = onnx.parser.parse_model(f"{HEAD} g (float[2] x) => (float[2] y) {{ inner = Neg(x) y = Neg(inner) }}")
    note = proto.graph.quantization_annotation.add(tensor_name="inner")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="x")
    (done,) = onnxopt.optimize(proto, passes=SPEC, verify=False, measure=False).report.passes
    assert done.refusals == (("its quantization annotations refer to values by name", 1),)


def test_sparse_weights_stay_as_they_are(rewritten, tmp_path):
    proto = onnx.parser.parse_model(f"{HEAD} g (float[3] x) => (float[3] y) {{ inner = Add(x, b) y = Neg(inner) }}")
    values = onnx.numpy_helper.from_array(np.float32([5]), "b")
    proto.graph.sparse_initializer.append(
        onnx.helper.make_sparse_tensor(values, onnx.numpy_helper.from_array(np.int64([1])), [3])
    )
    path = tmp_path / "m.onnx"
    onnxopt.save(rewritten(proto, SPEC).model, path)
    written = onnx.load(path).graph
    assert not written.initializer
    assert [s.values.name for s in written.sparse_initializer] == ["b"]
    assert written.node[0].output == ["a"]
