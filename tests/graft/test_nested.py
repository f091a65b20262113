from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest

import onnxopt
from onnxopt.errors import UsageError
from onnxopt.graft import RefusedError
from onnxopt.graph import scopes
from onnxopt.runtime import open_session

BRANCHES = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 4] x, bool choose) => (float[n, 4] y, float[n, 4] aside) <float[4] bias = {1, 2, 3, 4}> {
        a = Relu(x)
        aside = Neg(x)
        c = If(choose) <
            then_branch = t () => (float[n, 4] u) { v = Mul(a, a) w = Add(v, bias) u = Tanh(w) },
            else_branch = e () => (float[n, 4] u) { w = Sub(a, bias) u = Exp(w) }
        >
        y = Neg(c)
    }
"""
LOOP = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[3] x, int64 times) => (float[3] y) <float[1] half = {0.5}> {
        go = Constant<value = bool {1}>()
        scaled = Add(x, x)
        y = Loop(times, go, scaled) <
            body = b (int64 i, bool cond, float[3] state) => (bool cond_out, float[3] next) {
                cond_out = Identity(cond)
                m = Mul(state, half)
                k = Add(m, x)
                next = Tanh(k)
            }
        >
    }
"""
SCAN = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[5, 2] x) => (float[2] last, float[5, 2] sums) <float[2] zero = {0, 0}> {
        last, sums = Scan <num_scan_inputs = 1,
            body = b (float[2] before, float[2] row) => (float[2] after, float[2] out) {
                s = Add(before, row)
                after = Relu(s)
                out = Neg(after)
            }
        > (zero, x)
    }
"""
DONOR = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 4] p) => (float[n, 4] q) <float[4] bias = {5, 6, 7, 8}> { w = Sub(p, bias) q = Abs(w) }
"""


BIAS = np.array([1, 2, 3, 4], np.float32)


def run(model, **feed):
    with open_session(model, optimized=False) as session:
        return session.run(feed)


def parsed(text):
    return onnx.parser.parse_model(text)


def ops(model, path):
    return next([n.op_type for n in s.graph] for s in scopes(model) if s.path == path)


def test_a_part_of_a_branch_is_found_by_its_names():
    done = onnxopt.extract(parsed(BRANCHES), "v->u")
    assert [n.op_type for n in done.model.graph] == ["Add", "Tanh"]
    assert list(done.model.graph.initializers) == ["bias"]
    assert done.certificate.body == "c.then_branch"
    assert "then_branch of c" in done.certificate.words()[-1]
    x = np.array([[1.0, 2.0, 3.0, 4.0]], np.float32)
    np.testing.assert_allclose(run(done.model, v=x)["u"], np.tanh(x + BIAS), rtol=1e-6)


def test_names_in_two_branches_need_the_path():
    with pytest.raises(UsageError, match=r"fits in 2 bodies: .*in PATH"):
        onnxopt.extract(parsed(BRANCHES), "w->u")
    done = onnxopt.extract(parsed(BRANCHES), "w->u in c.else_branch")
    assert [n.op_type for n in done.model.graph] == ["Exp"]


def test_a_body_that_is_not_there():
    with pytest.raises(UsageError, match=r'no body "c.then".*c\.then_branch'):
        onnxopt.extract(parsed(BRANCHES), "w->u in c.then")


@pytest.mark.parametrize(
    ("text", "cut", "wanted"),
    [
        (LOOP, "state,x->k", ["Mul", "Add"]),
        (LOOP, "nodes:k", ["Add"]),
        (SCAN, "before,row->after", ["Add", "Relu"]),
    ],
)
def test_parts_of_loops(text, cut, wanted):
    done = onnxopt.extract(parsed(text), cut)
    assert [n.op_type for n in done.model.graph] == wanted
    assert done.certificate.ok
    assert "iteration" in done.certificate.note or "iterate" in done.certificate.note


@pytest.mark.parametrize(("times", "note"), [(2, "the first iteration was compared"), (0, "does not iterate")])
def test_loops_are_run_on_what_they_are_given_first(tmp_path, times, note):
    np.savez(tmp_path / "d.npz", x=np.ones((1, 3), np.float32), times=np.array([times], np.int64))
    done = onnxopt.extract(parsed(LOOP), "state->m", data=tmp_path / "d.npz")
    assert note in done.certificate.note


def test_a_graft_in_a_branch_changes_that_branch_alone():
    host = parsed(BRANCHES)
    done = onnxopt.graft(host, parsed(DONOR), replace="a->w in c.then_branch", with_="p->q")
    assert ops(done.model, "c.then_branch") == ["Sub", "Abs", "Tanh"]
    assert ops(done.model, "c.else_branch") == ["Sub", "Exp"]
    names = [v.name for s in scopes(done.model) if s.path != "c.else_branch" for n in s.graph for v in n.outputs]
    assert len(names) == len(set(names))
    x = np.array([[1.0, -2.0, 3.0, 4.0]], np.float32)
    a = np.maximum(x, 0)
    for choose, wanted in ((True, np.tanh(np.abs(a - [5, 6, 7, 8]))), (False, np.exp(a - [1, 2, 3, 4]))):
        found = run(done.model, x=x, choose=np.array(choose))
        np.testing.assert_allclose(found["y"], -wanted, rtol=1e-6)
        np.testing.assert_array_equal(found["aside"], -x)
    assert [c.name for c in done.certificate.changed] == ["y"]
    assert "aside" in [m.name for m in done.certificate.untouched]


def test_a_branch_is_a_donor():
    done = onnxopt.graft(parsed(DONOR), parsed(BRANCHES), replace="p->q", with_="a->w in c.then_branch")
    x = np.array([[1.0, 2.0, 3.0, 4.0]], np.float32)
    np.testing.assert_array_equal(run(done.model, p=x)["q"], x * x + [1, 2, 3, 4])


@pytest.mark.parametrize(
    ("text", "cut", "inputs"),
    [
        (BRANCHES, "a->w in c.then_branch", {"x": np.ones((1, 4), np.float32), "choose": np.array(True)}),
        (LOOP, "state,x->k", {"x": np.array([1, 2, 3], np.float32), "times": np.array(3, np.int64)}),
        (SCAN, "before,row->after", {"x": np.arange(10, dtype=np.float32).reshape(5, 2)}),
    ],
)
def test_a_part_of_a_body_in_its_own_place_changes_nothing(text, cut, inputs):
    host = parsed(text)
    done = onnxopt.graft(host, host, replace=cut, with_=cut)
    for name, value in run(onnxopt.load(host), **inputs).items():
        np.testing.assert_array_equal(run(done.model, **inputs)[name], value)
    assert all(c.relative == 0 for c in done.certificate.changed)


def test_something_is_inserted_in_a_body():
    done = onnxopt.graft(parsed(LOOP), parsed(LOOP), after="m", with_="k->next", repeat=2)
    assert ops(done.model, "y.body") == ["Identity", "Mul", "Tanh", "Tanh", "Add", "Tanh"]


def test_a_host_in_an_older_opset_is_raised_around_its_body():
    newer = parsed(DONOR.replace("17", "21"))
    done = onnxopt.graft(parsed(BRANCHES.replace("17", "13")), newer, replace="a->w in c.then_branch", with_="p->q")
    assert done.model.opset_imports[""] == 21
    assert ops(done.model, "c.then_branch") == ["Sub", "Abs", "Tanh"]


def test_what_a_branch_gives_keeps_its_type():
    wider = parsed(DONOR.replace("float[n, 4] q", "int64[n, 4] q").replace("q = Abs(w)", "q = Cast<to = 7>(w)"))
    with pytest.raises(RefusedError) as refused:
        onnxopt.graft(parsed(BRANCHES), wider, replace="a->u in c.then_branch", with_="p->q")
    assert refused.value.reason == "shape"


def test_what_would_have_to_be_fitted_within_a_body_is_refused_without_asking_for_data():
    wide = parsed(
        DONOR.replace("float[n, 4] p", "float[n, 6] p")
        .replace("float[n, 4] q", "float[n, 6] q")
        .replace("float[4] bias = {5, 6, 7, 8}", "float[6] bias = {5, 6, 7, 8, 9, 10}")
    )
    with pytest.raises(RefusedError, match="cannot be put into a body") as refused:
        onnxopt.graft(parsed(BRANCHES), wide, replace="a->u in c.then_branch", with_="p->q", adapters="allow")
    assert refused.value.reason == "adapter"
    assert "--data" not in str(refused.value)


def test_cuts_across_bodies_are_refused():
    with pytest.raises(RefusedError, match="a cut lies in one graph") as refused:
        onnxopt.extract(parsed(BRANCHES), "x->v")
    assert refused.value.reason == "nested"


def test_the_command_takes_the_path(tmp_path, invoke):
    model, out = tmp_path / "m.onnx", tmp_path / "out.onnx"
    onnx.save(parsed(BRANCHES), model)
    done = invoke("extract", model, "--from", "w", "--to", "u", "--in", "c.else_branch", "-o", out)
    assert done.exit_code == 0, done.output
    assert "It lies in the body c.else_branch" in done.output.replace("\n", " ")
    assert [n.op_type for n in onnxopt.load(out).graph] == ["Exp"]
    cut = "w->u in c.else_branch"
    done = invoke("graft", model, model, "--replace", cut, "--with", cut, "-o", tmp_path / "same.onnx")
    assert done.exit_code == 0, done.output
