"""Which groups become how narrow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxopt import manager
from onnxopt.allocation import consumers, costs
from onnxopt.allocation.consumers import SPOILT, TOO_FEW, held_back, observe, outlets
from onnxopt.allocation.costs import Costs, Term
from onnxopt.allocation.damage import BREAKS, NOT_FINITE, curves
from onnxopt.allocation.forecast import forecast
from onnxopt.allocation.greedy import path
from onnxopt.analysis.shapes import Shapes
from onnxopt.calibrate.collector import calibration
from onnxopt.contract import Context, Edit, Refusal
from onnxopt.coupling.analysis import analyse
from onnxopt.coupling.goals import elements, removed
from onnxopt.coupling.importance import magnitude
from onnxopt.model import load
from onnxopt.passes.prune.channels import PruneChannels
from onnxopt.pipeline import Pipeline
from onnxopt.repair.outputs import OutputError
from onnxopt.runtime import RunOptions, evaluate_node, open_session

MODELS = Path(__file__).parents[2] / "models"


def declare(text: str, **arrays: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> agraph {text}')
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def context(model: ir.Model, *shape: int, count: int = 16, **options: Any) -> Context:
    feeds = [{"x": random(*shape, seed=i)} for i in range(count)]
    return Context(
        target="portable",
        seed=0,
        evaluate=evaluate_node,
        shapes=Shapes(model),
        calibration=calibration(feeds, real=True),
        **options,
    )


def two_layers() -> ir.Model:
    """Two hidden layers: half of the first one's neurons are copies of the others, the second needs all of its own."""
    first = random(8, 16)
    return declare(
        "(float[9,8] x) => (float[9,4] y) { a = Gemm(x, u, b) r = Relu(a) c = Gemm(r, v) s = Relu(c) y = Gemm(s, w) }",
        u=np.concatenate([first, first], axis=1),
        b=np.ones(32, np.float32),
        v=random(32, 32, seed=1),
        w=random(32, 4, seed=2),
    )


def edits(model: ir.Model, ctx: Context, **options: Any) -> dict[str, str]:
    found = PruneChannels(importance="loss", multiple=1, min_channels=1, **options).run(model, ctx)
    made = {}
    for item in found:
        if isinstance(item, Edit):
            item.apply()
            if not item.repairs:
                made[item.site.output] = item.summary
    return made


def test_the_layer_whose_neurons_can_be_made_up_for_becomes_narrower() -> None:
    model = two_layers()
    made = edits(model, context(model, 9, 8), ratio=0.25)
    assert list(made) == ["u"]
    assert made["u"].startswith("32 to 16 channels, outputs expected to move by ")
    left = model.graph.initializers["u"].const_value
    assert left is not None
    assert len({tuple(column) for column in left.numpy().T.tolist()}) == 16  # one of each pair


def test_what_is_not_worth_its_channels_is_said() -> None:
    model = two_layers()
    refusals = [
        i.reason
        for i in PruneChannels(importance="loss", ratio=0.2).run(model, context(model, 9, 8))
        if isinstance(i, Refusal)
    ]
    assert "its channels are worth more than those of other layers" in refusals


def test_a_goal_that_is_out_of_reach_is_refused() -> None:
    model = two_layers()
    *_, last = PruneChannels(importance="loss", ratio=0.9, min_channels=16).run(model, context(model, 9, 8))
    assert isinstance(last, Refusal)
    assert last.reason == "not even with the least that may stay 90% of the channels are gone"


def test_a_part_of_the_parameters_and_of_the_time() -> None:
    model = two_layers()
    whole = elements(model)

    def share(made: ir.Model) -> float:
        return elements(made) / whole

    by_size, by_time = model.clone(), model.clone()
    assert edits(by_size, context(by_size, 9, 8), params=0.5, repair=False)
    assert 0.4 < share(by_size) <= 0.5
    asked: list[str] = []

    def timed(key: str, make: Callable[[], ir.Model]) -> float:
        asked.append(key)
        return share(make())

    assert edits(by_time, context(by_time, 9, 8, timed=timed), latency=0.5, repair=False)
    assert 0.4 < share(by_time) <= 0.5
    assert len(asked) == len(set(asked)) <= 8


@pytest.mark.parametrize("attributes", ["", "<group = 2>", "<strides = [2, 2], pads = [1, 1, 1, 1]>"])
def test_a_convolution_that_makes_up_for_lost_channels_keeps_its_mean(attributes: str) -> None:
    depth = 4 if "group" in attributes else 8
    model = declare(
        f"(float[1,3,9,9] x) => (float[1,n,h,w] y) {{ a = Conv(x, u) r = Relu(a) y = Conv{attributes}(r, v, b) }}",
        u=random(8, 3, 1, 1),
        v=random(6, depth, 3, 3),
        b=random(6),
    )
    ctx, coupling = context(model, 1, 3, 9, 9), analyse(model)
    (group,) = coupling.groups
    assert ctx.calibration is not None
    (seen,) = observe(model, [group], outlets(model, coupling), ctx.calibration, 0)
    (problem,), (outlet,) = seen.problems, seen.outlets
    assert outlet.size == 8
    weight = problem.consumer.weight.copy()
    assert (problem.change(outlet, weight).weight == 0).all()
    weight[:, :, 0] = 0
    change = problem.change(outlet, weight)
    expected = outlet.layer.weight().reshape(*change.weight.shape[:2], depth, -1)[:, :, 0]
    np.testing.assert_allclose(change.weight.reshape(*change.weight.shape[:2], depth, -1)[:, :, 0], -expected)
    np.testing.assert_allclose(change.bias, (expected.sum(axis=-1) * problem.means[:, :1]), rtol=1e-6)


def test_places_within_units_are_positions_where_few_were_seen() -> None:
    model = declare(
        "(float[1,3,5,5] x) => (float[1,4] y) { a = Conv(x, u) r = Relu(a) f = Flatten(r) y = Gemm(f, v) }",
        u=random(6, 3, 1, 1),
        v=random(150, 4),
    )
    coupling, ctx = analyse(model), context(model, 1, 3, 5, 5, count=8)
    (group,) = coupling.groups
    assert ctx.calibration is not None
    (seen,) = observe(model, [group], outlets(model, coupling), ctx.calibration, 0)
    (problem,), (outlet,) = seen.problems, seen.outlets
    assert problem.aligned
    assert problem.consumer.covariance.shape == (1, 6, 6)
    weight = problem.consumer.weight.copy()
    weight[:, :, 2] = 0
    moved = problem.change(outlet, weight).weight[0]
    np.testing.assert_allclose(moved[:, 50:75], -outlet.layer.weight()[0][:, 50:75])
    assert (moved[:, :50] == 0).all()


def recurrent() -> ir.Model:
    """A group in front of a GRU, and one behind it."""
    return declare(
        """(float[4,1,3] x) => (float[4,1,2] z) {
            m = MatMul(x, u) a = Relu(m) y = GRU<hidden_size = 6>(a, w, r) s = Squeeze(y, one) z = MatMul(s, o) }""",
        u=random(3, 5),
        w=random(1, 18, 5),
        r=random(1, 18, 6),
        o=random(6, 2),
        one=np.array([1]),
    )


def test_what_groups_lose_whose_layers_cannot_be_read_is_measured() -> None:
    model = recurrent()
    coupling, ctx = analyse(model), context(model, 4, 1, 3)
    curve, _ = curves(model, coupling, ctx, lambda group: 1, magnitude)
    assert curve.unread == "GRU y is not a linear layer with a constant weight and a computed input"
    np.testing.assert_array_equal(curve.order, np.argsort(magnitude(curve.group), kind="stable")[:4])
    zeroed = model.clone()
    weight = random(1, 18, 5)
    weight[..., curve.order[:2]] = 0
    zeroed.graph.initializers["w"].const_value = ir.tensor(weight)
    lost = power = 0.0
    with (
        open_session(model, RunOptions(), optimized=False) as before,
        open_session(zeroed, RunOptions(), optimized=False) as after,
    ):
        for seed in range(16):
            feed = {"x": random(4, 1, 3, seed=seed)}
            (wanted,), (got,) = before.run(feed).values(), after.run(feed).values()
            lost, power = lost + float(np.square(wanted - got).sum()), power + float(np.square(wanted).sum())
    np.testing.assert_allclose(curve.lost[2], lost / power, rtol=1e-4)


def test_the_report_says_which_groups_were_judged_without_repair() -> None:
    model = recurrent()
    made = edits(model, context(model, 4, 1, 3), ratio=0.5, repair=False)
    why = "(GRU y is not a linear layer with a constant weight and a computed input)"
    assert made["u"].endswith(f"% without repair {why}")


def test_a_branch_that_no_sample_runs_is_not_worth_nothing() -> None:
    model = declare(
        """(float[4,8] x) => (float[4,3] y) {
            m = ReduceMax<keepdims = 0>(x) c = Greater(m, huge)
            y = If (c) <
                then_branch = t () => (float[4,3] p) { a = MatMul(x, u) r = Relu(a) p = MatMul(r, v) },
                else_branch = e () => (float[4,3] q) { q = MatMul(x, w) }
            > }""",
        huge=np.float32(1e9),
        u=random(8, 16),
        v=random(16, 3),
        w=random(8, 3),
    )
    coupling, ctx = analyse(model), context(model, 4, 8)
    (curve,) = curves(model, coupling, ctx, lambda group: 1, magnitude)
    assert not curve.measured
    scores = magnitude(curve.group)
    np.testing.assert_allclose(curve.lost[-1], 1 - scores.max() / scores.sum())
    made = edits(model, ctx, ratio=0.5, repair=False)
    assert made["u"] == (
        "16 to 8 channels, by their scores: the outputs do not show what they are worth "
        "(MatMul p is in a body of If, Loop or Scan)"
    )


def fresh_error(original: ir.Model, model: ir.Model, *shape: int) -> float:
    observer = OutputError(["y"])
    feeds = [{"x": random(*shape, seed=1000 + i)} for i in range(200)]
    calibration(feeds, real=True).observe_both(original, model, [observer])
    return observer.error


def test_few_samples_promise_no_more_than_they_can_keep() -> None:
    """With fewer rows than channels, nothing is lost on the samples that layers were fitted to."""
    model = declare(
        "(float[1,16] x) => (float[1,4] y) { a = MatMul(x, u) r = Relu(a) y = MatMul(r, v) }",
        u=random(16, 64),
        v=random(64, 4, seed=1),
    )
    original, ctx = model.clone(), context(model, 1, 16, count=24)
    passes = PruneChannels(ratio=0.5, importance="loss")
    expected = 0.0
    for item in passes.run(model, ctx):
        if isinstance(item, Edit):
            item.apply()
            if item.removed is not None and item.removed.predicted is not None:
                expected = item.removed.predicted.share
    found = fresh_error(original, model, 1, 16)
    assert found > 0.1
    assert expected == pytest.approx(found, rel=0.5)


@pytest.mark.parametrize(("samples", "held"), [(1, []), (2, [1]), (3, [2]), (4, [3]), (10, [3, 7])])
def test_one_of_four_samples_is_held_back(samples: int, held: list[int]) -> None:
    assert list(held_back(samples)) == held


def test_a_single_sample_shows_no_loss_after_repair() -> None:
    model = two_layers()
    made = edits(model, context(model, 9, 8, count=1), ratio=0.5, repair=False)
    assert any(f"without repair ({TOO_FEW})" in summary for summary in made.values()), made


def test_outputs_that_are_not_finite_judge_nothing() -> None:
    model = declare(
        "(float[4,8] x) => (float[4,3] y) { a = MatMul(x, u) r = Relu(a) p = MatMul(r, v) y = Log(p) }",
        u=random(8, 32),
        v=random(32, 3, seed=1),
    )
    found = list(PruneChannels(ratio=0.5, importance="loss").run(model, context(model, 4, 8)))
    reason = "on your samples outputs of the original hold NaN or infinity, so that what they lose cannot be told"
    assert [item.reason for item in found if isinstance(item, Refusal)][-1] == reason
    assert not any(isinstance(item, Edit) for item in found)
    assert forecast(model, context(model, 4, 8), "params", [0.5], lambda group: [8]) == ()


def spoilt(value: float) -> ir.Model:
    """Return a network with a branch whose weights are not finite, and which is computed but never chosen."""
    weight = random(32, 3, seed=1)
    weight[0, 0] = value
    return declare(
        """(float[4,8] x) => (float[4,3] y) {
            a = MatMul(x, u) r = Relu(a) p = MatMul(r, v) m = ReduceMax<keepdims = 1>(x) c = Greater(m, huge)
            b = MatMul(x, s) q = Relu(b) g = MatMul(q, w) y = Where(c, g, p) }""",
        huge=np.float32(1e9),
        u=random(8, 32),
        v=random(32, 3, seed=2),
        s=random(8, 32, seed=3),
        w=weight,
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_losses_that_are_not_finite_are_not_added_up(value: float) -> None:
    model = spoilt(value)
    coupling, ctx = analyse(model), context(model, 4, 8)
    found = {curve.group.name: curve for curve in curves(model, coupling, ctx, lambda group: 8, magnitude)}
    assert found["u"].unread == ""
    assert found["s"].unread == SPOILT
    assert all(np.isfinite(curve.lost).all() for curve in found.values())


def test_units_without_which_outputs_are_not_finite_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumers, "MOST_INPUTS", 4)  # so that nothing is fitted
    model = declare(
        """(float[4,8] x) => (float[4,3] y) {
            a = MatMul(x, u) r = Sigmoid(a) s = MatMul(r, v) p = Sub(s, least) q = Sqrt(p)
            b = MatMul(x, w) t = Relu(b) m = MatMul(t, o) y = Add(q, m) }""",
        u=random(8, 32) / 10,
        v=np.ones((32, 3), np.float32),
        least=np.array([10], np.float32),
        w=random(8, 32, seed=1),
        o=random(32, 3, seed=2),
    )
    ctx = context(model, 4, 8)
    judged = {curve.group.name: curve for curve in curves(model, analyse(model), ctx, lambda group: 8, magnitude)}
    assert (judged["u"].unread, len(judged["u"].order)) == (BREAKS, 0)
    assert len(judged["w"].order) == 24
    found = list(PruneChannels(ratio=0.3, importance="loss", repair=False).run(model, ctx))
    reasons = {item.site.output: item.reason for item in found if isinstance(item, Refusal)}
    assert reasons["u"] == f"its channels stay: {BREAKS}"
    assert [item.site.output for item in found if isinstance(item, Edit)] == ["w"]


def test_a_fit_that_breaks_outputs_is_not_counted_on() -> None:
    """Without a unit the root is of zero; fitted to it are others, whose sum may be less."""
    model = declare(
        "(float[4,8] x) => (float[4,32] y) { a = MatMul(x, u) r = Sigmoid(a) p = MatMul(r, v) y = Sqrt(p) }",
        u=5 * random(8, 32),
        v=np.eye(32, dtype=np.float32),
    )
    (curve,) = curves(model, analyse(model), context(model, 4, 8), lambda group: 8, magnitude)
    assert curve.unread == NOT_FINITE
    assert curve.measured
    assert np.isfinite(curve.lost).all()


def test_a_weight_behind_a_transpose_is_judged_like_one_that_is_stored_so() -> None:
    head = "(float[9,8] x) => (float[9,4] y) { a = MatMul(x, u) r = Relu(a)"
    weights = {"u": random(8, 32), "v": random(32, 32, seed=1), "w": random(32, 4, seed=2)}
    plain = declare(f"{head} c = MatMul(r, v) s = Relu(c) y = MatMul(s, w) }}", **weights)
    stored = {name: array if name == "u" else np.ascontiguousarray(array.T) for name, array in weights.items()}
    views = "p = Transpose(v) q = Identity(p) c = MatMul(r, q) s = Relu(c) t = Transpose(w) y = MatMul(s, t)"
    behind = declare(f"{head} {views} }}", **stored)
    found = [list(curves(m, analyse(m), context(m, 9, 8), lambda g: 1, magnitude)) for m in (plain, behind)]
    assert len(found[0]) == 2
    for expected, curve in zip(*found, strict=True):
        assert curve.unread == ""
        np.testing.assert_array_equal(curve.order, expected.order)
        np.testing.assert_allclose(curve.lost, expected.lost, rtol=1e-5)


def test_counted_costs_are_those_of_the_model() -> None:
    model = load(MODELS / "mnist_cnn_bn.onnx").clone()
    coupling = analyse(model)
    found = costs.elements(coupling)
    gone = np.array([group.units // 3 for group in coupling.groups])
    whole = found.left(np.zeros(len(gone), np.int64))
    assert whole - found.left(gone) == removed(coupling, {g.name: g.units // 3 for g in coupling.groups})
    then = gone.copy()
    then[1] += 5
    assert found.saved(gone, 1, then[1:2])[0] == found.left(gone) - found.left(then)


def test_products_count_positions() -> None:
    model = declare(
        "(float[1,3,9,9] x) => (float[1,n,h,w] y) { a = Conv(x, u) r = Relu(a) y = Conv<strides = [2, 2]>(r, v) }",
        u=random(8, 3, 1, 1),
        v=random(6, 8, 1, 1),
    )
    ctx = context(model, 1, 3, 9, 9)
    assert ctx.calibration is not None
    found = costs.products(model, analyse(model), ctx.calibration)
    assert found.left(np.array([0])) == 81 * 24 + 25 * 48
    assert found.left(np.array([3])) == 81 * 15 + 25 * 30


def test_the_path_takes_the_best_rate_even_where_that_is_a_large_step() -> None:
    found = Costs([Term(1, (4,), ({0: 1},)), Term(1, (4,), ({1: 1},))], 2)
    lost = [np.array([0.0, 3.0, 3.0, 3.0]), np.array([0.0, 1.5, 4.0, 9.0])]
    choices = [np.array([1, 2, 3]), np.array([1, 2, 3])]
    states = [state.tolist() for state in path(lost, choices, found)]
    assert states == [[0, 0], [3, 0], [3, 1], [3, 2], [3, 3]]


def test_a_classifier_keeps_its_accuracy_at_half_its_channels() -> None:
    original = load(MODELS / "mnist_cnn.onnx")
    images = np.load(MODELS / "mnist_calibration.npz")["image"][:96]
    data = calibration([{"image": images[i : i + 1]} for i in range(len(images))], real=True)
    ctx = Context(target="portable", seed=0, evaluate=evaluate_node, shapes=Shapes(original), calibration=data)
    passes = Pipeline.parse("prune-channels{ratio=0.5,importance=loss}").passes
    pruned = manager.run(original, passes, ctx).model

    def right(model: ir.Model) -> float:
        with open_session(model, RunOptions(), optimized=True) as session:
            (scores,) = session.run({"image": np.load(MODELS / "mnist_test.npz")["image"]}).values()
        return float((scores.argmax(axis=1) == np.load(MODELS / "mnist_test_labels.npy")).mean())

    assert right(pruned) > right(original) - 0.02
