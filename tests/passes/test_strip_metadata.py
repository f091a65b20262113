"""What exporters note about nodes goes; whatever else is attached to a model stays."""

import onnx
import onnx_ir as ir
import pytest

import onnxopt

SPEC = "strip-metadata"
TEXT = """<ir_version: 10, opset_import: ["" : 21]> g (float[2] x, bool c) => (float[2] y) <float[2] w = {1, 2}> {
    a = Add(x, w)
    y = If (c) <then_branch = t () => (float[2] b) { b = Neg(a) }, else_branch = e () => (float[2] d) { d = Abs(a) }>
}"""


def noted(holder, **notes):
    for key, text in notes.items():
        holder.metadata_props.add(key=key.replace("__", "."), value=text)


@pytest.fixture
def annotated():
    proto = onnx.parser.parse_model(TEXT)
    add, choice = proto.graph.node
    noted(add, pkg__torch__onnx__stack_trace="File /home/me/net.py, line 3", namespace="net.layer", layer_ann="cpu")
    noted(choice.attribute[0].g.node[0], pkg__onnxscript__rewriter__rule_name="FuseAll")
    noted(proto.graph, pkg__torch__export__graph_signature="long", mine="kept")
    noted(proto, author="kept")
    add.doc_string = "also a stack trace"
    proto.graph.doc_string = "kept"
    return proto


def test_only_notes_of_exporters_go(annotated):
    result = onnxopt.optimize(annotated, passes=SPEC, measure=False)
    proto = ir.to_proto(result.model)
    left = [(p.key, p.value) for holder in (proto, proto.graph, *proto.graph.node) for p in holder.metadata_props]
    assert left == [("author", "kept"), ("mine", "kept"), ("layer_ann", "cpu")]
    assert proto.graph.doc_string == "kept"
    assert not proto.graph.node[0].doc_string
    assert not proto.graph.node[1].attribute[0].g.node[0].metadata_props
    assert b"/home/me" not in proto.SerializeToString()


def test_the_report_says_how_much_and_of_what(annotated):
    (done,) = onnxopt.optimize(annotated, passes=SPEC, measure=False).report.passes
    first, nested = done.applied
    size = len("pkg.torch.onnx.stack_traceFile /home/me/net.py, line 3namespacenet.layer")
    size += len("pkg.torch.export.graph_signaturelongalso a stack trace")
    assert first.summary == (
        f"dropped {size} bytes of the exporter's notes: pkg.torch.onnx.stack_trace, "
        "pkg.torch.export.graph_signature, doc strings and 1 more"
    )
    assert nested.site.graph.endswith("then_branch")
    assert nested.summary == "dropped 40 bytes of the exporter's notes: pkg.onnxscript.rewriter.rule_name"


def test_a_model_without_notes_is_left_alone(rewritten):
    assert rewritten(TEXT, SPEC).edits == 0


def test_what_it_was_made_from_keeps_its_notes(annotated):
    model = onnxopt.load(annotated)
    onnxopt.optimize(model, passes=SPEC, verify=False, measure=False)
    assert "namespace" in next(iter(model.graph)).metadata_props


def test_the_recipe_for_small_files_drops_them(annotated):
    result = onnxopt.optimize(annotated, recipe="small", measure=False)
    assert result.report.passes[-1].name == SPEC
    assert result.report.passes[-1].applied
