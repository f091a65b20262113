"""Weights that nodes compute from constants alone are stored where that lets channels go."""

import numpy as np
import pytest

import onnxopt
from onnxopt import feeds
from onnxopt.analysis.evaluation import compute
from onnxopt.analysis.inspect import summary_stats
from onnxopt.coupling import constants
from onnxopt.coupling.analysis import analyse
from onnxopt.coupling.constants import computed_weights, store_computed
from onnxopt.coupling.removal import Removal
from onnxopt.runtime import evaluate_node
from onnxopt.verify import Verifier

STANDARDIZED = """(float[1,3,9,9] x) => (float[1,5,9,9] y) {
    a = Conv(x, w) r = Relu(a)
    m = ReduceMean <axes = [1, 2, 3], keepdims = 1> (u) d = Sub(u, m) q = Mul(d, d)
    s = ReduceMean <axes = [1, 2, 3], keepdims = 1> (q) t = Sqrt(s) v = Div(d, t) y = Conv(r, v) }"""


def optimize(model, spec):
    result = onnxopt.optimize(model, passes=spec, max_error=float("inf"), measure=False)
    return result.model, result.report


@pytest.mark.parametrize("name", ["prune-channels", "merge-channels"])
def test_standardized_weights_are_stored_and_cut(build, name):
    model = build(STANDARDIZED, w=(16, 3, 1, 1), u=(5, 16, 1, 1))
    pruned, report = optimize(model, f"{name}{{ratio=0.5}}")
    assert [edit.summary.partition(",")[0] for edit in report.passes[0].applied] == [
        "weights that nodes compute from constants (1): stored",
        "16 to 8 channels",
    ]
    assert pruned.graph.initializers["v"].const_value.shape == (5, 8, 1, 1)
    assert {node.op_type for node in pruned.graph} == {"Conv", "Relu"}


@pytest.mark.parametrize("name", ["prune-channels", "merge-channels"])
def test_weights_that_are_stored_wrongly_are_found_out(build, monkeypatch, name):
    def compute_wrongly(*arguments):
        return [array * 1.01 for array in compute(*arguments)]

    monkeypatch.setattr(constants, "compute", compute_wrongly)
    text = STANDARDIZED.replace("a = Conv(x, w) r = Relu(a)", "b = Conv(x, o) c = Relu(b) a = Conv(c, w) r = Relu(a)")
    model = build(text, o=(8, 3, 1, 1), w=(16, 8, 1, 1), u=(5, 16, 1, 1))
    pruned, report = optimize(model, f"{name}{{ratio=0.5}}")
    (dropped,) = report.passes[0].dropped
    assert dropped.site.output == "v"
    assert dropped.summary.startswith("weights that nodes compute from constants (1): stored")
    assert [edit.summary.partition(" channels")[0] for edit in report.passes[0].applied] == ["8 to 4"]
    assert any(node.op_type == "ReduceMean" for node in pruned.graph)


def test_what_pruning_is_compared_with_computes_its_weights_itself(build):
    model = build(STANDARDIZED, w=(16, 3, 1, 1), u=(5, 16, 1, 1))
    original = model.clone()
    store_computed(model, computed_weights(model), evaluate_node)
    coupling = analyse(model)
    removal = Removal(model, coupling, original)
    (group,) = coupling.groups
    weight = next(m.value for m in group.members if m.consumes)
    removal.replace(weight, 2 * removal.whole(weight))
    removal.remove(group.roots[:8])
    reference = removal.zeroed()
    assert [node.op_type for node in reference.graph].count("ReduceMean") == 2
    checked = Verifier(reference, feeds.generate(original, sets=2)).check(model)
    assert checked.ok, checked.reason
    assert {node.op_type for node in model.graph} == {"Conv", "Relu"}


def test_what_is_stored_equals_what_was_computed(build):
    model = build(STANDARDIZED, w=(16, 3, 1, 1), u=(5, 16, 1, 1))
    inputs = feeds.generate(model, sets=2)
    verifier = Verifier(model.clone(), inputs)
    (value,) = computed_weights(model)
    assert value.name == "v"
    store_computed(model, [value], evaluate_node)
    assert verifier.check(model).ok
    assert list(model.graph.initializers) == ["w", "v"]


def test_weights_that_channels_are_followed_through_stay_as_they_are(build):
    model = build("(float[2,16] x) => (float[2,4] y) { a = MatMul(x, w) t = Transpose(v) y = MatMul(a, t) }",
                  w=(16, 16), v=(4, 16))  # fmt: skip
    pruned, report = optimize(model, "prune-channels")
    assert [edit.summary for edit in report.passes[0].applied] == ["16 to 8 channels"]
    assert any(node.op_type == "Transpose" for node in pruned.graph)


def test_weights_of_one_number_count_and_are_cut(build):
    text = "(float[2,16] x) => (float[2,4] y) { w = ConstantOfShape(s) a = MatMul(x, w) y = MatMul(a, v) }"
    model = build(text, {"s": np.array([16, 32])}, v=(32, 4))
    assert summary_stats(model).parameters == 16 * 32 + 32 * 4
    pruned, report = optimize(model, "prune-channels{ratio=0.5}")
    assert report.after.parameters == 16 * 16 + 16 * 4
    assert any(node.op_type == "ConstantOfShape" for node in pruned.graph)
