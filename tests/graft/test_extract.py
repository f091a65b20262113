from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

import onnxopt
from onnxopt.errors import UsageError
from onnxopt.graft import REASONS, RefusedError
from onnxopt.graft.blocks import blocks
from onnxopt.graft.cut import Backbone, Block, Flow, Nodes, Tensors, parse_cut, resolve
from onnxopt.graft.extraction import prove, take_out
from onnxopt.graft.probe import Probe
from onnxopt.graft.slicing import Types, standalone
from onnxopt.runtime import open_session


def ops(model):
    return [node.op_type for node in model.graph]


def names(values):
    return [v.name for v in values]


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("a, b->c", Tensors(("a", "b"), ("c",))),
        ("nodes:/layer/*", Nodes("/layer/*")),
        ("block:-1", Block(-1)),
        ("backbone", Backbone()),
        ("nodes:x->y", Nodes("x->y")),
    ],
)
def test_cuts_are_read(text, cut):
    assert parse_cut(text) == cut
    assert parse_cut(str(cut)) == cut


@pytest.mark.parametrize("text", ["", "a", "a->", "->b", "block:x", "nodes:"])
def test_what_is_no_cut_is_told(text):
    with pytest.raises(UsageError, match="names no block|is no cut"):
        parse_cut(text)


def test_captured_values_functions_and_operator_sets_come_along(capturing):
    with pytest.raises(RefusedError, match='also needs "choose"; add it to the boundary') as refused:
        onnxopt.extract(capturing, "a->d")
    assert refused.value.reason == "open cut"
    done = onnxopt.extract(capturing, "a,choose->d")
    assert ops(done.model) == ["twice", "If", "Tanh"]
    assert names(done.model.graph.inputs) == ["a", "choose"]
    assert str(done.model.graph.inputs[0].shape) == "[n,4]"
    assert list(done.model.graph.initializers) == ["bias"]
    assert [name for _, name, _ in done.model.functions] == ["twice"]
    assert dict(done.model.opset_imports) == {"": 17, "local": 1}
    assert (done.certificate.captures, done.certificate.functions) == (3, 1)
    assert done.certificate.ok
    assert all(m.equal for m in done.certificate.matches)


def test_the_model_is_left_alone_and_shares_its_weights(network):
    model = network()
    before = onnx.ModelProto.FromString(_bytes(model))
    part = onnxopt.extract(model, "h1->h2").model
    assert part.graph.initializers["w1"].const_value is model.graph.initializers["w1"].const_value
    assert _bytes(model) == before.SerializeToString()


def _bytes(model):
    from onnxopt.proto.encode import encode

    return encode(model, lambda *_: False).SerializeToString()


def test_metadata_stays():
    proto = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 17], producer_name: "someone">
        g (float[2] x) => (float[2] y) { a = Relu(x)  b = Neg(a)  y = Abs(b) }
    """)
    proto.metadata_props.add(key="author", value="me")
    proto.graph.node[1].doc_string = "turns around"
    done = onnxopt.extract(proto, "a->b")
    assert done.model.metadata_props == {"author": "me"}
    assert done.model.producer_name == "someone"
    assert next(iter(done.model.graph)).doc_string == "turns around"


def test_a_part_may_have_several_boundaries(network):
    done = onnxopt.extract(network(), "s,r1->h1,h2")
    assert ops(done.model) == ["Add", "MatMul", "Relu", "Add"]
    assert names(done.model.graph.outputs) == ["h1", "h2"]


def test_nodes_by_glob_keep_what_computes_their_constants():
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[2, 3] x) => (float[6] y) {
            shape = Constant<value = int64[1] {6}>()
            first = Reshape(x, shape)
            second = Neg(first)
            y = Relu(second)
        }
    """)
    done = onnxopt.extract(proto, "nodes:[fs]*t")
    assert ops(done.model) == ["Constant", "Reshape"]
    assert names(done.model.graph.outputs) == ["first"]


def test_an_initializer_the_caller_may_override_stays_an_input():
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x, float[2] scale) => (float[2] y) <float[2] scale = {2, 3}> { a = Mul(x, scale)  y = Neg(a) }
    """)
    part = onnxopt.extract(proto, "x->a").model
    assert names(part.graph.inputs) == ["x", "scale"]
    assert list(part.graph.initializers) == ["scale"]


def test_types_come_from_inference_where_nothing_declares_them():
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 3] x) => (int64[k] y) {
            pairs = SplitToSequence<axis = 0, keepdims = 1>(x)
            count = SequenceLength(pairs)
            shape = Constant<value = int64[1] {1}>()
            y = Reshape(count, shape)
        }
    """)
    done = onnxopt.extract(proto, "pairs->count")
    assert done.certificate.inputs[0].type == "sequence(tensor(float))"
    assert done.certificate.outputs[0].type == "int64 []"


@pytest.mark.parametrize(
    ("cut", "reason", "message"),
    [
        ("x->v", "nested", "lies inside"),
        ("d->c", "empty cut", "does not depend on"),
        ("a->a", "empty cut", "Nothing lies in front"),
        ("c->x", "empty cut", "Nothing lies in front"),
        ("block:0", "no block", "no block 0"),
        ("backbone", "no backbone", "name tensors"),
        ("a->c", "open cut", '"choose"'),
    ],
)
def test_refusals(capturing, cut, reason, message):
    with pytest.raises(RefusedError, match=message) as refused:
        onnxopt.extract(capturing, cut)
    assert refused.value.reason == reason
    assert reason in REASONS


def test_random_numbers_are_refused():
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[4] x) => (float[4] y) { noise = RandomNormalLike(x)  a = Add(x, noise)  y = Neg(a) }
    """)
    with pytest.raises(RefusedError, match="draws random numbers") as refused:
        onnxopt.extract(proto, "x->a")
    assert refused.value.reason == "random"


def test_a_model_that_does_not_run_is_refused():
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17, "nobody" : 1]>
        g (float[4] x) => (float[4] y) { a = nobody.Knows(x)  b = Relu(a)  y = Neg(b) }
    """)
    with pytest.raises(RefusedError) as refused:
        onnxopt.extract(proto, "a->b")
    assert refused.value.reason in ("unknown type", "does not run")


@pytest.mark.parametrize("cut", ["nothing->y", "x->nothing", "x,x->d", "nodes:nothing*", "d,c->y"])
def test_names_that_mean_nothing_are_usage_errors(capturing, cut):
    with pytest.raises(UsageError, match="no tensor|named twice|No node|leave it out"):
        onnxopt.extract(capturing, cut)


def test_a_part_that_computes_something_else_is_found(network):
    model = network()
    part = resolve(model, parse_cut("h1->h2"))
    alone = standalone(part)
    alone.graph.initializers["w1"].const_value = model.graph.initializers["w2"].const_value
    feeds = [{"x": np.ones((2, 32), np.float32)}]
    with pytest.raises(RefusedError, match="does not compute what it computes inside") as refused:
        prove(part, alone, Probe(model, feeds))
    assert refused.value.reason == "not reproduced"


def test_a_branch_that_is_never_taken_does_not_reject_the_part():
    """Inside, the runtime does not know that `a` has two rows, so it does not see that the branch could not run."""
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[2, 3] x, int64[2] shape, bool choose) => (float[p, q] y) {
            a = Reshape(x, shape)
            b = If(choose) <
                then_branch = t () => (float[u, v] c) {
                    axis = Constant<value = int64[1] {0}>()
                    d = Squeeze(a, axis)
                    c = Unsqueeze(d, axis)
                },
                else_branch = e () => (float[r, s] f) { f = Neg(a) }
            >
            y = Relu(b)
        }
    """)
    model = onnxopt.load(proto)
    values = {v.name: v for n in model.graph for v in n.outputs}
    values["a"].shape = ir.Shape([2, 3])
    part = resolve(model, parse_cut("a,choose->b"))
    feeds = [{"x": np.ones((2, 3), np.float32), "shape": np.array([2, 3]), "choose": np.array(False)}]
    unstated = onnxopt.load(proto)
    alone, proof = take_out(part, Types(model), Probe(unstated, feeds))
    assert all(m.equal for m in proof)
    assert [d.value for d in alone.graph.inputs[0].shape] == [None, None]


def test_residual_blocks_are_found(network):
    found = blocks(Flow(network()))
    assert [(a.name, b.name) for a, b in found] == [("s", "h1"), ("h1", "h2"), ("h2", "h3")]
    done = onnxopt.extract(network(), "block:-1")
    assert names(done.model.graph.inputs) == ["h2"]
    assert ops(done.model) == ["MatMul", "Relu", "Add"]


def test_no_block_ends_at_a_sequence():
    """Other exports of the same network split with Split or Slice."""
    text, last = "", "s"
    for i in range(3):
        text += (
            f"q{i} = SplitToSequence<axis = 1>({last}, half) a{i} = SequenceAt(q{i}, zero) b{i} = SequenceAt(q{i}, one)"
        )
        text += f" m{i} = MatMul(b{i}, v) t{i} = Tanh(m{i}) h{i} = Concat<axis = 1>(a{i}, t{i}) "
        last = f"h{i}"
    proto = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 32] x) => (float[n, 32] y)
        <int64 half = {{16}}, int64 zero = {{0}}, int64 one = {{1}}> {{ s = MatMul(x, w) {text} y = Neg({last}) }}
    """)
    random = np.random.default_rng(0)
    for name, size in {"w": 32, "v": 16}.items():
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(random.standard_normal((size, size), np.float32) / 6, name)
        )
    found = blocks(Flow(onnxopt.load(proto)))
    assert [(a.name, b.name) for a, b in found] == [("s", "h0"), ("h0", "h1"), ("h1", "h2")]


def test_the_backbone_ends_in_front_of_the_head(network):
    assert names(resolve(network(), Backbone()).outputs) == ["h3"]


def test_a_pooling_ends_the_backbone():
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 3, 16, 16] x) => (float[n, 8] y) {
            a = Conv<pads = [1, 1, 1, 1]>(x, k)
            b = Relu(a)
            p = GlobalAveragePool(b)
            f = Flatten(p)
            y = MatMul(f, w)
        }
    """)
    rng = np.random.default_rng(0)
    for name, shape in {"k": (64, 3, 3, 3), "w": (64, 8)}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape, np.float32), name))
    assert names(resolve(onnxopt.load(proto), Backbone()).outputs) == ["b"]


def test_alternating_blocks_are_one():
    text, last = "", "s"
    for i in range(3):
        text += f"m{i} = MatMul({last}, w) a{i} = Tanh(m{i}) h{i} = Add({last}, a{i}) "
        text += f"k{i} = Gemm(h{i}, w) j{i} = Tanh(k{i}) l{i} = Add(h{i}, j{i}) n{i} = Relu(l{i}) "
        last = f"n{i}"
    proto = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 32] x) => (float[n, 32] y) {{ s = MatMul(x, w) {text} y = Neg({last}) }}
    """)
    weights = np.random.default_rng(0).standard_normal((32, 32), np.float32) / 6
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    found = blocks(Flow(onnxopt.load(proto)))
    assert [(a.name, b.name) for a, b in found] == [("s", "n0"), ("n0", "n1"), ("n1", "y")]


def test_the_command_writes_the_part_and_its_manifest(invoke, tmp_path, network):
    import json

    source, part, manifest = tmp_path / "model.onnx", tmp_path / "part.onnx", tmp_path / "part.json"
    onnxopt.save(network(), source)
    result = invoke("extract", source, "--block", 1, "-o", part, "--manifest", manifest)
    assert result.exit_code == 0, result.output
    assert "in   h1  float32 [n, 32]" in result.output
    assert "Certified" in result.output
    record = json.loads(manifest.read_text())
    assert (record["operation"], record["cut"], record["nodes"]) == ("extract", "block:1", 3)
    assert {f["path"] for f in record["source"] + record["result"]} == {str(source), str(part)}
    assert all(len(f["sha256"]) == 64 for f in record["source"] + record["result"])
    feed = {"h1": np.ones((3, 32), np.float32)}
    with open_session(part, optimized=True) as session:
        assert session.run(feed)["h2"].shape == (3, 32)


def test_the_command_refuses_with_one_sentence(invoke, tmp_path, network):
    source, part = tmp_path / "model.onnx", tmp_path / "part.onnx"
    onnxopt.save(network(), source)
    for arguments, code, message in [
        (["--from", "r1", "--to", "h2"], 1, 'also needs "s"'),
        (["--from", "r1"], 2, "--to is missing"),
        (["--block", 1, "--backbone"], 2, "Give one of"),
        (["--block", 7], 1, "It has 3, counted from 0."),
        (["--block", 1, "--manifest", tmp_path / "m.txt"], 2, "must end in .json"),
    ]:
        result = invoke("extract", source, *arguments, "-o", part)
        assert result.exit_code == code, result.output
        assert message in result.output
        assert not part.exists()
    result = invoke("extract", source, "--block", 1, "--manifest", tmp_path / "m.json")
    assert result.exit_code == 2


def test_reasons_are_documented():
    refusals, _, _ = (Path(__file__).parents[2] / "docs" / "transplant.md").read_text().partition("\n## ")
    rows = [line.split("|")[1].strip() for line in refusals.splitlines() if line.startswith("| ")][1:]
    assert rows == list(REASONS)


def test_axes_behind_a_reshape_are_those_of_a_pooling(weighted):
    proto = weighted(
        """
        <ir_version: 8, opset_import: ["" : 18]>
        g (float[1, 2, 4, 4] x) => (float[1, 64] y) {
            c = Conv(x, k)  a = Relu(c)
            given = Constant<value = int64[2] {-1, -2}>()
            flat = Constant<value = int64[1] {-1}>()
            axes = Reshape(given, flat)
            pooled = ReduceMean<keepdims = 0>(a, axes)
            y = MatMul(pooled, w)
        }
    """,
        k=(8, 2, 3, 3),
        w=(8, 64),
    )
    assert names(onnxopt.extract(proto, "backbone").model.graph.outputs) == ["a"]
