from __future__ import annotations

import json

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxopt
from onnxopt.errors import DataError, UsageError
from onnxopt.graft import REASONS, RefusedError
from onnxopt.graph import scopes
from onnxopt.runtime import open_session


def ops(model):
    return [node.op_type for node in model.graph]


def run(model, **feed):
    with open_session(model, optimized=False) as session:
        return session.run(feed)


def parsed(text):
    return onnxopt.load(onnx.parser.parse_model(text))


X = np.random.default_rng(7).standard_normal((5, 32)).astype(np.float32)


@pytest.mark.parametrize("cut", ["block:0", "block:-1", "backbone", "nodes:*", "s->h2", "h1->h2"])
def test_a_part_replaced_by_itself_changes_nothing(network, cut):
    host = network()
    done = onnxopt.graft(host, host, replace=cut, with_=cut)
    assert np.array_equal(run(done.model, x=X)["y"], run(host, x=X)["y"])
    assert len(done.model.graph) == len(host.graph)
    assert set(done.model.graph.initializers) == set(host.graph.initializers)
    assert done.certificate.ok
    assert all(m.equal for m in (*done.certificate.slices, *done.certificate.untouched))
    assert [(c.name, c.relative) for c in done.certificate.changed] == [("y", 0.0)]


def test_a_block_of_another_model(network):
    host, donor = network(0), network(1)
    done = onnxopt.graft(host, donor, replace="block:1", with_="block:2")
    expected = _by_hand(host, w1=_weight(donor, "w2"))
    np.testing.assert_allclose(run(done.model, x=X)["y"], expected, rtol=1e-5, atol=1e-5)
    assert [c.name for c in done.certificate.changed] == ["y"]
    assert [(m.donor, m.host) for m in done.certificate.inputs] == [("h2", "h1")]
    assert [(m.donor, m.host) for m in done.certificate.outputs] == [("h3", "h2")]
    assert len(done.model.graph.initializers) == 5


def _weight(model, name):
    return model.graph.initializers[name].const_value.numpy()


def _by_hand(model, **replaced):
    weights = {n: replaced.get(n, _weight(model, n)) for n in ("w_stem", "w0", "w1", "w2", "w_head")}
    h = X @ weights["w_stem"]
    for i in range(3):
        h = h + np.maximum(h @ weights[f"w{i}"], 0)
    return h @ weights["w_head"]


def test_insertion_and_copies_in_a_row(network):
    host = network()
    done = onnxopt.graft(host, host, after="h1", with_="block:1", repeat=2)
    h, w1 = X @ _weight(host, "w_stem"), _weight(host, "w1")
    for w in (_weight(host, "w0"), w1, w1, w1, _weight(host, "w2")):
        h = h + np.maximum(h @ w, 0)
    np.testing.assert_allclose(run(done.model, x=X)["y"], h @ _weight(host, "w_head"), rtol=1e-4, atol=1e-4)
    assert done.certificate.copies == 2
    assert len(done.certificate.slices) == 2
    assert set(done.model.graph.initializers) == set(host.graph.initializers)
    assert "Identity" not in ops(done.model)


def test_insertion_behind_an_output_and_an_input(network):
    host = network()
    activation = parsed("""
        <ir_version: 8, opset_import: ["" : 17]> g (float[n, k] a) => (float[n, k] b) { b = Tanh(a) }
    """)
    behind = onnxopt.graft(host, activation, after="y", with_="a->b").model
    np.testing.assert_allclose(run(behind, x=X)["y"], np.tanh(run(host, x=X)["y"]), rtol=1e-5)
    first = onnxopt.graft(host, activation, after="x", with_="a->b").model
    np.testing.assert_allclose(run(first, x=X)["y"], run(host, x=np.tanh(X))["y"], rtol=1e-5, atol=1e-5)


def test_a_head_may_have_another_shape(network, weighted):
    host = network()
    donor = onnxopt.load(
        weighted(
            """<ir_version: 8, opset_import: ["" : 17]> g (float[n, 32] f) => (float[n, 3] classes) {
                classes = MatMul(f, w) }""",
            3,
            w=(32, 3),
        )
    )
    done = onnxopt.graft(host, donor, replace="h3->y", with_="f->classes")
    output = done.model.graph.outputs[0]
    assert output.name == "y"
    assert str(output.shape) == "[n,3]"
    assert run(done.model, x=X)["y"].shape == (5, 3)


def test_outputs_beside_the_graft_are_proven_untouched():
    host = parsed("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 4] x) => (float[n, 4] y, float[n, 4] z) { a = Relu(x)  b = Neg(a)  y = Abs(b)  z = Tanh(a) }
    """)
    done = onnxopt.graft(host, host, replace="a->b", with_="b->y")
    assert [c.name for c in done.certificate.changed] == ["y"]
    assert {m.name for m in done.certificate.untouched} == {"z", "a"}


def test_captures_and_functions_come_along(capturing):
    host = parsed("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 4] x, bool choose) => (float[n, 4] y) <float[4] bias = {5, 6, 7, 8}> {
            a = Add(x, bias)  b = Relu(a)  y = Neg(b)
        }
    """)
    done = onnxopt.graft(host, capturing, replace="b->y", with_="d->y")
    assert ops(done.model) == ["Add", "Relu", "Neg"]
    host = parsed("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 4] x, bool choose) => (float[n, 4] y) <float[4] bias = {5, 6, 7, 8}> {
            a = Add(x, bias)
            b = If(choose) <then_branch = t () => (float[n, 4] u) { u = Neg(a) },
                            else_branch = e () => (float[n, 4] v) { v = Mul(a, bias) }>
            y = Neg(b)
        }
    """)
    done = onnxopt.graft(host, capturing, replace="a,choose->b", with_="a,choose->d")
    assert ops(done.model) == ["Add", "twice", "If", "Tanh", "Neg"]
    for choose in (True, False):
        x = np.ones((2, 4), np.float32)
        a = x + np.array([5, 6, 7, 8], np.float32)
        own = np.array([1, 2, 3, 4], np.float32)
        inner = 2 * a * a + own if choose else 2 * a - own
        found = run(done.model, x=x, choose=np.array(choose))["y"]
        np.testing.assert_allclose(found, -np.tanh(inner), rtol=1e-6)


def test_functions_of_one_name_stay_apart(capturing, capturing_text):
    text = capturing_text.replace("q = Add(p, p)", "q = Neg(p)")
    other = parsed(text)
    done = onnxopt.graft(other, capturing, replace="a,choose->c", with_="a,choose->c")
    assert sorted(name for _, name, _ in done.model.functions) == ["twice_1"]
    x, choose = np.ones((2, 4), np.float32), np.array(True)
    np.testing.assert_array_equal(run(done.model, x=x, choose=choose)["y"], run(capturing, x=x, choose=choose)["y"])


def test_an_older_donor_is_converted_and_a_newer_one_raises_the_host():
    body = "g (float[n, 4] x) => (float[n, 4] y) { a = Neg(x)  b = Softmax<axis = 1>(a)  y = Abs(b) }"
    old, new = (parsed(f'<ir_version: {ir}, opset_import: ["" : {opset}]> {body}') for ir, opset in ((6, 11), (9, 20)))
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    for host, donor, whose in ((new, old, "donor"), (old, new, "host")):
        done = onnxopt.graft(host, donor, replace="a->b", with_="a->b")
        assert done.model.opset_imports[""] == 20
        assert done.model.ir_version == 9
        assert [w for w, _ in done.certificate.opsets] == [whose]
        np.testing.assert_allclose(run(done.model, x=x)["y"], run(new, x=x)["y"], rtol=1e-6)


def test_names_of_axes_become_those_of_the_host(network):
    donor = network(1)
    for scope in scopes(donor):
        for node in scope.graph:
            for value in node.outputs:
                value.shape = None
    host = network()
    done = onnxopt.graft(host, donor, replace="block:1", with_="block:1")
    named = {d.value for n in done.model.graph for v in n.outputs for d in v.shape or () if not isinstance(d, int)}
    assert named <= {"n"}


@pytest.mark.parametrize(
    ("arguments", "reason", "message"),
    [
        ({"replace": "h1->h2", "with_": "h2->h1"}, "empty cut", "nothing lies between"),
        ({"replace": "s,r1->h1", "with_": "h1->h2"}, "boundary", "name as many on both sides"),
        ({"replace": "h1->h2", "with_": "h3->y"}, "adapter", "fitted Gemm from 8 to 32 channels"),
        ({"replace": "h1->h2", "with_": "h3->y", "adapters": "allow"}, "data", "give some with --data"),
        ({"after": "h1", "with_": "block:9"}, "no block", "It has 3"),
    ],
)
def test_refusals(network, arguments, reason, message):
    model = network()
    with pytest.raises(RefusedError, match=message) as refused:
        onnxopt.graft(model, model, **arguments)
    assert refused.value.reason == reason
    assert reason in REASONS


def test_a_way_around_the_cut_is_a_cycle():
    host = parsed("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[4] x) => (float[4] y) { a = Relu(x)  b = Neg(a)  c = Tanh(b)  d = Add(c, b)  y = Abs(d) }
    """)
    donor = parsed("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[4] p, float[4] q) => (float[4] r, float[4] s) { t = Add(p, q)  r = Neg(t)  s = Abs(t) }
    """)
    with pytest.raises(RefusedError, match="way around") as refused:
        onnxopt.graft(host, donor, replace="a,c->b,d", with_="p,q->r,s")
    assert refused.value.reason == "cycle"


def test_other_operator_sets_must_agree():
    text = """
        <ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : {}]>
        g (float[4] x) => (float[4] y) <float[4] b> {{
            a = Relu(x)
            b = ai.onnx.ml.Scaler<offset = [0.0], scale = [2.0]>(a)
            y = Neg(b)
        }}
    """
    host, donor = parsed(text.format(2)), parsed(text.format(3))
    with pytest.raises(RefusedError, match=r"version 3 of the operator set ai.onnx.ml and the host in 2") as refused:
        onnxopt.graft(host, donor, replace="a->b", with_="a->b")
    assert refused.value.reason == "opset"


def test_contradicting_options_are_usage_errors(network):
    model = network()
    with pytest.raises(UsageError, match="either replace"):
        onnxopt.graft(model, model, with_="block:0")
    with pytest.raises(UsageError, match="at least 1"):
        onnxopt.graft(model, model, with_="block:0", replace="block:0", repeat=0)
    with pytest.raises((UsageError, DataError)):
        onnxopt.graft(model, model, with_="block:0", replace="block:0", data="nowhere.npz")


NAMES = st.permutations(["a", "b", "c", "x", "y", "w", "a_1", "w_1", "t"]).map(lambda names: names[:7])


@settings(max_examples=30, deadline=None)
@given(NAMES, NAMES)
def test_names_never_collide(one, other):
    """Whatever values and weights are called on both sides, inside of bodies too."""
    host, donor = _nested(one, 2.0), _nested(other, 3.0)
    cuts = [f"{names[1]},{names[6]}->{names[2]}" for names in (one, other)]
    done = onnxopt.graft(host, donor, replace=cuts[0], with_=cuts[1])
    names = [v.name for scope in scopes(done.model) for n in scope.graph for v in n.outputs]
    names += [n for scope in scopes(done.model) for n in scope.graph.initializers]
    assert len(names) == len(set(names))
    x = np.array([-1.0, 1.0, 2.0], np.float32)
    for choose in (True, False):
        found = run(done.model, **{one[0]: x, one[6]: np.array(choose)})[one[5]]
        a = x + 2
        np.testing.assert_array_equal(found, -(a * 3 if choose else a - 3))


def _nested(names, number):
    x, a, b, w, u, y, choose = names
    return parsed(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[3] {x}, bool {choose}) => (float[3] {y}) <float {w} = {{{number}}}> {{
            {a} = Add({x}, {w})
            {b} = If({choose}) <
                then_branch = t () => (float[3] {u}) {{ {u} = Mul({a}, {w}) }},
                else_branch = e () => (float[3] {u}) {{ {u} = Sub({a}, {w}) }}
            >
            {y} = Neg({b})
        }}
    """)


def test_a_graft_is_a_pass_of_a_pipeline(tmp_path, network):
    donor = tmp_path / "donor.onnx"
    onnxopt.save(network(1), donor)
    host = network(0)
    spec = f"graft{{donor={donor},take=block:2,replace=block:1}}"
    result = onnxopt.optimize(host, passes=f"{spec},fold-constants", measure=False)
    report = next(p for p in result.report.passes if p.name == "graft")
    assert (report.status, report.guarantee) == ("kept", "redefines")
    assert report.spec == spec
    assert result.report.verification is not None and result.report.verification.ok
    expected = _by_hand(host, w1=_weight(network(1), "w2"))
    np.testing.assert_allclose(run(result.model, x=X)["y"], expected, rtol=1e-5, atol=1e-5)


def test_a_pass_tells_why_nothing_was_grafted(tmp_path, network):
    host = network(0)
    for spec, status, reason in [
        ("graft", "skipped", "it needs a donor"),
        (f"graft{{donor={tmp_path}/none.onnx,take=block:0,replace=block:0}}", "unchanged", "does not exist"),
        (f"graft{{donor={tmp_path}/donor.onnx,take=block:9,replace=block:0}}", "unchanged", "It has 3"),
    ]:
        onnxopt.save(network(1), tmp_path / "donor.onnx")
        report = onnxopt.optimize(host, passes=spec, measure=False).report.passes[0]
        assert report.status == status
        assert reason in (report.reason or report.refusals[0][0])


def test_the_command_end_to_end(invoke, tmp_path, network):
    host, donor, out, manifest = (tmp_path / n for n in ("host.onnx", "donor.onnx", "out.onnx", "out.json"))
    onnxopt.save(network(0), host)
    onnxopt.save(network(1), donor)
    result = invoke(
        "graft", host, donor, "--replace", "block:0", "--with", "block:1", "-o", out, "--manifest", manifest
    )
    assert result.exit_code == 0, result.output
    assert "h1 reads s" in result.output
    assert "Certified" in result.output
    record = json.loads(manifest.read_text())
    assert record["operation"] == "graft"
    assert [f["path"] for key in ("host", "donor", "result") for f in record[key]] == [str(host), str(donor), str(out)]
    assert all(m["ok"] for m in record["slices"] + record["untouched"])
    expected = _by_hand(network(0), w0=_weight(network(1), "w1"))
    np.testing.assert_allclose(run(onnxopt.load(out), x=X)["y"], expected, rtol=1e-5, atol=1e-5)


def test_the_command_refuses_with_one_sentence(invoke, tmp_path, network):
    host, out = tmp_path / "host.onnx", tmp_path / "out.onnx"
    onnxopt.save(network(0), host)
    for arguments, code, message in [
        (["--with", "block:0"], 2, "either --replace"),
        (["--replace", "h1->h2", "--with", "h3->y"], 1, "--adapters allow puts it in"),
        (["--replace", "block", "--with", "block:0"], 2, "is no cut"),
    ]:
        result = invoke("graft", host, host, *arguments, "-o", out)
        assert result.exit_code == code, result.output
        assert message in result.output
        assert not out.exists()
    result = invoke("graft", host, host, "--replace", "block:0", "--with", "block:0", "-o", host)
    assert result.exit_code == 2
