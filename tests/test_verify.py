"""Candidates that are wrong in every way are refused with a reason; those that only round differently are not."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxopt import runtime
from onnxopt.compare import yardstick
from onnxopt.compare.verdict import Verification
from onnxopt.contract import Guarantee
from onnxopt.errors import DataError, RuntimeFailure, UsageError
from onnxopt.session.loaded import Session
from onnxopt.verify import Verifier

# `onnxopt.verify` is the function
verify = importlib.import_module("onnxopt.verify")

APPROXIMATE, REDEFINES = Guarantee.APPROXIMATE, Guarantee.REDEFINES


def model(
    body: str,
    inputs: str = "float[N, 4] x",
    outputs: str = "float[N, 4] y",
    weights: str = "",
    opset: int = 17,
) -> ir.Model:
    return ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) <{weights}> {{ {body} }}'
    )


def check(one: ir.Model, two: ir.Model, *args: Any, **named: Any) -> Verification:
    found: Verification = verify.verify(one, two, *args, **named)
    return found


def add(amount: float, **named: Any) -> ir.Model:
    """Return a model that adds a constant to the second column."""
    return model("y = Add(x, w)", weights=f"float[4] w = {{0, {amount}, 0, 0}}", **named)


def test_a_model_equals_itself() -> None:
    found = check(add(1), add(1))
    assert (found.ok, found.reason, found.mode, found.worst) == (True, "", "exact", 0.0)
    assert found.feeds > 1
    [(axis, sizes)] = found.shapes
    assert axis == "N"
    assert len(sizes) > 1
    [output] = found.outputs
    assert (output.name, output.kind, output.max_abs, output.first_index, output.ok) == (
        "y",
        "float",
        0.0,
        None,
        True,
    )
    assert output.cosine == pytest.approx(1.0)
    assert 1e-7 < output.tolerance < 1e-5


def test_paths_and_protos_are_taken(tmp_path: Path) -> None:
    proto = ir.to_proto(add(1))
    onnx.save(proto, tmp_path / "a.onnx")
    assert check(tmp_path / "a.onnx", proto).ok  # type: ignore[arg-type]


def test_a_wrong_value_is_named_with_its_place_and_size() -> None:
    feeds = [{"x": np.array([[0, 0, 0, 1]], np.float32)}]
    found = check(add(0), add(0.25), feeds=feeds)
    assert not found.ok
    assert found.reason.startswith('output "y" deviates by 2.5e-01 of its range (allowed ')
    assert found.reason.endswith("), first at [0, 1]")
    assert found.worst == found.outputs[0].relative == 0.25
    assert not found.outputs[0].ok


def test_rounding_is_tolerated_and_little_more_is_not() -> None:
    """(x * a) * b is not x * (a * b) to the last bit."""
    weights = "float[4] a = {1.1, 1.3, 0.7, 0.9}, float[4] b = {0.3, 1.7, 1.9, 2.3}"
    reference = model("p = Mul(x, a) y = Mul(p, b)", weights=weights)
    found = check(reference, model("c = Mul(a, b) y = Mul(x, c)", weights=weights))
    assert found.ok
    assert 0 < found.worst < found.outputs[0].tolerance
    wrong = weights.replace("2.3", "2.3001")
    assert not check(reference, model("p = Mul(x, a) y = Mul(p, b)", weights=wrong)).ok


def test_half_precision_is_given_its_own_rounding() -> None:
    def half(body: str) -> ir.Model:
        return model(
            f"w = Cast <to = 1> (x) p = Mul(w, a) {body} y = Cast <to = 10> (q)",
            inputs="float16[N, 4] x",
            outputs="float16[N, 4] y",
            weights="float[4] a = {1.1, 1.3, 0.7, 0.9}, float[4] b = {0.3, 1.7, 1.9, 2.3}",
        )

    rounded = half("h = Cast <to = 10> (p) r = Cast <to = 1> (h) q = Mul(r, b)")
    found = check(rounded, half("q = Mul(p, b)"))
    assert found.ok, found.reason
    assert 1e-5 < found.worst < found.outputs[0].tolerance < 1e-2
    assert not check(rounded, half("q = Mul(p, a)")).ok


def test_bfloat16_outputs_are_compared() -> None:
    def narrow(body: str) -> ir.Model:
        return model(body, outputs="bfloat16[N, 4] y")

    assert check(narrow("y = Cast <to = 16> (x)"), narrow("a = Neg(x) b = Neg(a) y = Cast <to = 16> (b)")).ok
    found = check(narrow("y = Cast <to = 16> (x)"), narrow("b = Add(x, x) y = Cast <to = 16> (b)"))
    assert 'output "y" deviates' in found.reason


def test_values_far_from_zero_have_more_rounding_in_their_range() -> None:
    """Next to 1000 a float32 is known to 6e-5, which is much of a range of 0.01."""
    feeds = [{"x": np.linspace(0, 0.01, 8, dtype=np.float32).reshape(2, 4)}]
    reference = model("y = Add(x, w)", weights="float w = {1000}")
    split = model("a = Add(x, u) y = Add(a, w)", weights="float w = {700.3}, float u = {299.7}")
    found = check(reference, split, feeds=feeds)
    assert found.ok, found.reason
    assert found.worst > 1e-3


def test_new_nan_and_infinity_are_named() -> None:
    feeds = [{"x": np.array([[1, 2, 3, 4], [0, 1, 1, 1]], np.float32)}]
    reference = model("y = Identity(x)")
    nan = check(reference, model("a = Div(x, x) b = Mul(a, x) y = Identity(b)"), feeds=feeds)
    assert nan.reason == 'output "y" is NaN where the original has 0, first at [1, 0]'
    assert nan.worst == math.inf
    zero = "float z = {0}"
    infinite = check(reference, model("a = Div(x, z) y = Add(a, x)", weights=zero), feeds=[{"x": feeds[0]["x"] + 1}])
    assert infinite.reason == 'output "y" is inf where the original has 2, first at [0, 0]'


def test_nan_and_infinity_of_the_original_may_stay() -> None:
    feeds = [{"x": np.array([[1, -1, 0, 4]], np.float32)}]
    log = model("y = Log(x)")
    found = check(log, model("a = Identity(x) y = Log(a)"), feeds=feeds)
    assert found.ok
    assert found.worst == 0.0


def test_an_output_without_a_number_is_noted() -> None:
    root = model("y = Sqrt(x)")
    found = check(root, model("a = Identity(x) y = Sqrt(a)"), feeds=[{"x": np.full((2, 4), -1, np.float32)}])
    assert found.ok
    assert found.outputs[0].note == "holds nothing but NaN and infinity, so there was no number to compare"
    assert found.extent == "no values could be compared, only types and shapes"
    found = check(root, root, feeds=[{"x": np.array([[-1, 4, -1, -1]], np.float32)}])
    assert found.outputs[0].note == ""
    assert found.extent == "outputs are equal"


def test_what_a_random_operator_made_is_not_called_equal() -> None:
    root = model("y = RandomNormalLike(x) z = Neg(x)", outputs="float[N, 4] y, float[N, 4] z")
    found = check(root, root, feeds=[{"x": np.ones((2, 4), np.float32)}])
    assert [output.compared for output in found.outputs] == [False, True]
    assert found.extent == "values of 1 of 2 outputs could be compared and are equal"


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (model("y = Add(x, x)", inputs="float[N, 5] x"), 'the input "x" is declared with the shape [N, 5]'),
        (model("z = Add(x, x)", outputs="float[N, 4] z"), 'the output "y" is missing'),
        (
            model("a = Add(x, x) y = Cast <to = 11> (a)", outputs="double[N, 4] y"),
            "declared as double instead of float",
        ),
        (model("y = NoSuchOperator(x)"), "the ONNX checker rejects the model: "),
    ],
)
def test_a_broken_structure_is_refused_before_anything_runs(
    candidate: ir.Model, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Verifier(model("y = Add(x, x)"), [{"x": np.zeros((1, 4), np.float32)}])
    monkeypatch.setattr(verify, "open_session", None)
    monkeypatch.setattr(yardstick, "open_session", None)
    found = judge.check(candidate)
    assert not found.ok
    assert reason in found.reason


def test_outputs_in_another_order_are_refused() -> None:
    pair = "float[N, 4] y, float[N, 4] z"
    reference = model("y = Neg(x) z = Abs(x)", outputs=pair)
    swapped = model("y = Neg(x) z = Abs(x)", outputs="float[N, 4] z, float[N, 4] y")
    assert check(reference, swapped).reason == "the outputs are in another order: z, y"


def test_a_shape_that_changes_is_named() -> None:
    free = "float[A, B] y"
    found = check(model("y = Identity(x)", outputs=free), model("y = Transpose(x)", outputs=free))
    assert found.reason.startswith('output "y" has shape [4, ')


def test_a_candidate_that_does_not_load_is_refused_in_words() -> None:
    reference = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17, "no.such" : 1]> g (float[2] x) => (float[2] y) { y = Neg(x) }'
    )
    strange = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17, "no.such" : 1]> g (float[2] x) => (float[2] y) { y = no.such.Op(x) }'
    )
    found = check(reference, strange)
    assert not found.ok
    assert "cannot load" in found.reason
    assert not found.reason.endswith(".")
    with pytest.raises(RuntimeFailure):
        check(strange, reference)


def test_integer_outputs_must_be_equal() -> None:
    feeds = [{"x": np.array([[1, 2], [3, 4]], np.int64)}]

    def whole(weight: int) -> ir.Model:
        return model("y = Add(x, w)", "int64[N, 2] x", "int64[N, 2] y", weights=f"int64[2] w = {{0, {weight}}}")

    assert check(whole(3), whole(3), feeds=feeds).ok
    found = check(whole(3), whole(4), feeds=feeds)
    assert found.reason == 'output "y" differs in 50% of its elements (allowed none), first at [0, 1]'
    assert found.outputs[0].max_abs == 1.0


def test_boolean_and_string_outputs_must_be_equal() -> None:
    def above(limit: float) -> ir.Model:
        return model("y = Greater(x, w)", outputs="bool[N, 4] y", weights=f"float w = {{{limit}}}")

    feeds = [{"x": np.array([[1, 2, 3, 4]], np.float32)}]
    assert check(above(2.5), above(2.6), feeds=feeds).ok
    assert "differs in 25% of its elements" in check(above(2.5), above(1.5), feeds=feeds).reason
    strings = "string[2] s"
    same = model("y = Identity(s)", strings, "string[2] y")
    twice = model("y = Gather(s, w)", strings, "string[2] y", weights="int64[2] w = {0, 0}")
    words = [{"s": np.array(["a", "b"], object)}]
    assert check(same, same, feeds=words).ok
    assert "differs in 50% of its elements" in check(same, twice, feeds=words).reason


def ranked(weights: str, k: int = 1) -> ir.Model:
    return model("s = Mul(x, w) y = ArgMax <axis = 1, keepdims = 0> (s)", outputs="int64[N] y", weights=weights)


def test_ties_of_argmax_are_tolerated_and_other_classes_are_not() -> None:
    feeds = [{"x": np.array([[1, 1, 0, 0.5]], np.float32)}]
    reference = ranked("float[4] w = {1, 1, 1, 1}")
    tie = check(reference, ranked("float[4] w = {1, 1.0000002, 1, 1}"), feeds=feeds)
    assert tie.ok, tie.reason
    assert tie.outputs[0].note == "differs only where the ranked values tie"
    near = [{"x": np.array([[1, 0.995, 0, 0.5]], np.float32)}]
    other = check(reference, ranked("float[4] w = {1, 1.01, 1, 1}"), feeds=near)
    assert other.reason == 'output "y" differs in 100% of its elements (allowed none), first at [0]'


def test_ties_among_inputs_are_found_too() -> None:
    feeds = [{"x": np.array([[1, 1, 0, 0.5]], np.float32)}]
    first = model("y = ArgMax <axis = 1> (x)", outputs="int64[N, 1] y")
    last = model("y = ArgMax <axis = 1, select_last_index = 1> (x)", outputs="int64[N, 1] y")
    assert check(first, last, feeds=feeds).ok
    apart = [{"x": np.array([[1, 0.5, 0, 1.01]], np.float32)}]
    assert not check(model("y = ArgMin <axis = 1> (x)", outputs="int64[N, 1] y"), first, feeds=apart).ok


def test_indices_of_topk_may_swap_where_values_tie() -> None:
    def top(weights: str) -> ir.Model:
        return model(
            "s = Mul(x, w) v, y = TopK(s, k)",
            outputs="float[N, 2] v, int64[N, 2] y",
            weights=f"float[4] w = {weights}, int64[1] k = {{2}}",
        )

    feeds = [{"x": np.array([[1, 1, 0, 0.5]], np.float32)}]
    assert check(top("{1, 1, 1, 1}"), top("{1, 1.0000002, 1, 1}"), feeds=feeds).ok
    found = check(top("{1, 1, 1, 1}"), top("{1, 1, 1, 2.1}"), feeds=feeds)
    assert not found.ok


def test_discrete_outputs_may_flip_where_the_original_flips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the original itself says something else with optimizations on, neither answer is wrong."""
    feeds = [{"x": np.array([[1, 2, 3, 4]], np.float32)}]

    def above(limit: float) -> ir.Model:
        return model("y = Greater(x, w)", outputs="bool[N, 4] y", weights=f"float w = {{{limit}}}")

    reference = above(2.5)
    when_optimized(monkeypatch, reference, above(1.5))
    found = Verifier(reference, feeds).check(above(1.5))
    assert found.ok, found.reason
    assert found.outputs[0].note == "differs only where the original does between optimizations off and on"
    assert not Verifier(reference, feeds).check(above(0.5)).ok


def test_rounded_integers_may_differ_as_often_and_as_much_as_the_original_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def quantized(offsets: str) -> ir.Model:
        return model(
            "a = Add(x, w) y = QuantizeLinear(a, s, z)",
            outputs="uint8[N, 4] y",
            weights=f"float[4] w = {offsets}, float s = {{1}}, uint8 z = {{0}}",
        )

    feeds = [{"x": np.array([[10, 20, 30, 40]], np.float32)}]
    reference = quantized("{0, 0, 0, 0}")
    when_optimized(monkeypatch, reference, quantized("{1, 0, 0, 0}"))
    judge = Verifier(reference, feeds)
    assert judge.check(quantized("{0, 1, 1, 0}")).ok
    assert not judge.check(quantized("{0, 2, 0, 0}")).ok
    assert not judge.check(quantized("{1, 1, 1, 1}")).ok


def when_optimized(monkeypatch: pytest.MonkeyPatch, target: ir.Model, instead: ir.Model) -> None:
    """Let the runtime's optimizations turn one model into another."""
    real = runtime.open_session

    def fake(source: Any, options: Any = None, *, optimized: bool) -> Session:
        return real(instead if source is target and optimized else source, options, optimized=optimized)

    monkeypatch.setattr(verify, "open_session", fake)
    monkeypatch.setattr(yardstick, "open_session", fake)


def test_what_the_original_differs_by_in_itself_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = [{"x": np.array([[0, 0, 0, 1]], np.float32)}]
    reference = add(0)
    assert not Verifier(reference, feeds).check(add(0.02)).ok
    when_optimized(monkeypatch, reference, add(0.01))
    found = Verifier(reference, feeds).check(add(0.02))
    assert found.ok, found.reason
    assert found.outputs[0].tolerance == pytest.approx(yardstick.SPREAD_FACTOR * 0.01)
    assert not Verifier(reference, feeds).check(add(0.04)).ok


def test_a_candidate_must_be_sane_with_optimizations_on(monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = [{"x": np.array([[0, 0, 0, 1]], np.float32)}]
    candidate = add(0)
    when_optimized(monkeypatch, candidate, add(0.5))
    found = Verifier(add(0), feeds).check(candidate)
    assert found.reason.startswith('with the runtime\'s optimizations on, output "y" deviates by 5.0e-01')
    assert found.worst == 0.5


def test_a_candidate_must_run_with_optimizations_on(monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = [{"x": np.array([[0, 0, 0, 1]], np.float32)}]
    candidate = add(0)
    when_optimized(monkeypatch, candidate, model("y = Reshape(x, w)", weights="int64[1] w = {7}"))
    found = Verifier(add(0), feeds).check(candidate)
    assert not found.ok
    assert found.reason.startswith("with the runtime's optimizations on it does not run: ")


def test_an_original_that_only_runs_optimized_is_compared_as_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = runtime.open_session

    def fake(source: Any, options: Any = None, *, optimized: bool) -> Session:
        if not optimized:
            raise RuntimeFailure("No kernel.")
        return real(source, options, optimized=True)

    monkeypatch.setattr(verify, "open_session", fake)
    monkeypatch.setattr(yardstick, "open_session", fake)
    judge = Verifier(add(0), [{"x": np.array([[0, 0, 0, 1]], np.float32)}])
    assert judge.check(add(0)).mode == "as run"
    assert judge.check(add(0)).ok
    assert "deviates by 5.0e-01" in judge.check(add(0.5)).reason


def test_a_provider_is_used_where_the_cpu_lacks_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact results are compared on the CPU, in full precision, unless only the provider can run them."""
    real = runtime.open_session
    only_on_device = add(0)
    opened: list[tuple[str, bool]] = []

    def fake(source: Any, options: Any = None, *, optimized: bool) -> Session:
        opened.append((options.provider, optimized))
        if source is only_on_device and options.provider == "cpu":
            raise RuntimeFailure("No kernel.")
        return real(source, optimized=optimized)

    monkeypatch.setattr(verify, "open_session", fake)
    monkeypatch.setattr(yardstick, "open_session", fake)
    judge = Verifier(add(0), [{"x": np.array([[0, 0, 0, 1]], np.float32)}], runtime.RunOptions(provider="cuda"))
    assert judge.check(add(0)).ok
    assert ("cuda", False) not in opened
    assert opened[-1] == ("cuda", True)
    found = judge.check(only_on_device)
    assert (found.ok, found.mode) == (True, "exact")
    assert ("cuda", False) in opened


def test_random_outputs_are_compared_in_type_and_shape_alone() -> None:
    outputs = "float[N, 4] y, float[N, 4] z"
    noisy = model("n = RandomNormalLike(x) y = Add(x, n) z = Neg(x)", outputs=outputs)
    other = model("n = RandomUniformLike(x) a = Add(n, n) y = Add(x, a) z = Neg(x)", outputs=outputs)
    found = check(noisy, other)
    assert found.ok, found.reason
    assert found.outputs[0].note == "depends on a random operator; only type and shape can be compared"
    assert found.outputs[1].note == ""
    wrong = model("n = RandomNormalLike(x) y = Add(x, n) z = Abs(x)", outputs=outputs)
    assert 'output "z" deviates' in check(noisy, wrong).reason
    lossy = check(noisy, wrong, max_error=0.01)
    assert 'output "z" deviates' in lossy.reason
    assert "two runs of the original" in lossy.outputs[0].note


def test_the_shape_of_random_outputs_must_stay() -> None:
    free = "float[A, B] y"
    noisy = model("y = RandomNormalLike(x)", outputs=free)
    found = check(noisy, model("n = RandomNormalLike(x) y = Transpose(n)", outputs=free))
    assert 'output "y" has shape [4, ' in found.reason


def test_sequences_are_compared_element_by_element() -> None:
    def pair(body: str) -> ir.Model:
        return model(f"{body} y = SequenceConstruct(a, b)", outputs="seq(float[N, 4]) y")

    reference = pair("a = Neg(x) b = Abs(x)")
    assert check(reference, pair("c = Identity(x) a = Neg(c) b = Abs(c)")).ok
    found = check(reference, pair("a = Neg(x) b = Neg(x)"))
    assert "first at [1, " in found.reason
    longer = model("a = Neg(x) b = Abs(x) y = SequenceConstruct(a, b, b)", outputs="seq(float[N, 4]) y")
    assert 'output "y" has 3 elements instead of 2' in check(reference, longer).reason


BACKEND = Path(onnx.__file__).parent / "backend" / "test" / "data" / "simple"


@pytest.mark.parametrize("name", [f"test_sequence_model{i}" for i in range(1, 9)])
def test_the_sequence_models_of_onnx_equal_themselves(name: str) -> None:
    path = BACKEND / name / "model.onnx"
    if not path.exists():
        pytest.skip("this build of onnx comes without its test models")
    found = check(path, path)  # type: ignore[arg-type]
    assert found.ok, found.reason
    assert found.worst == 0.0


# ---------------------------------------------------------------------------------------------------- lossy


def test_lossy_results_are_judged_by_the_budget() -> None:
    feeds = [{"x": np.array([[0, 0, 0, 1]], np.float32)}]
    within = check(add(0), add(0.01), feeds=feeds, max_error=0.02)
    assert (within.ok, within.mode) == (True, "as run")
    assert within.worst == pytest.approx(0.01)
    beyond = check(add(0), add(0.03), feeds=feeds, max_error=0.02)
    assert beyond.reason == 'output "y" deviates by 3.0e-02 of its range (allowed 2.0e-02), first at [0, 1]'


@pytest.mark.parametrize("max_error", [None, math.inf])
def test_without_a_budget_anything_finite_goes(max_error: float | None) -> None:
    feeds = [{"x": np.array([[0, 0, 0, 1]], np.float32)}]
    found = Verifier(add(0), feeds).check(add(900), APPROXIMATE, max_error)
    assert found.ok
    assert found.worst == 900
    broken = Verifier(add(0), feeds).check(model("a = Div(x, x) y = Mul(a, x)"), APPROXIMATE, max_error)
    assert "is NaN where the original has 0" in broken.reason


def test_labels_count_by_the_share_that_changes() -> None:
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((200, 4)).astype(np.float32)}]
    reference, other = ranked("float[4] w = {1, 1, 1, 1}"), ranked("float[4] w = {1, 1.1, 1, 1}")
    found = check(reference, other, feeds=feeds, max_error=0.2)
    assert found.ok
    assert 0.0 < found.worst < 0.1
    strict = check(reference, other, feeds=feeds, max_error=0.001)
    assert "% of its elements (allowed 0.1%), first at [" in strict.reason


def test_other_integers_count_by_their_distance() -> None:
    def quantized(scale: float) -> ir.Model:
        return model(
            "y = QuantizeLinear(x, s, z)",
            outputs="uint8[N, 4] y",
            weights=f"float s = {{{scale}}}, uint8 z = {{0}}",
        )

    feeds = [{"x": np.array([[0, 1, 50, 200]], np.float32)}]
    found = check(quantized(1), quantized(1.01), feeds=feeds, max_error=0.02)
    assert found.ok
    assert found.worst == pytest.approx(2 / 200)
    assert (
        "deviates by 1.0e-02 of its range" in check(quantized(1), quantized(1.01), feeds=feeds, max_error=0.001).reason
    )


def test_a_budget_for_an_exact_comparison_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="max_error"):
        check(add(0), add(0), guarantee=Guarantee.EXACT, max_error=0.1)


# ---------------------------------------------------------------------------------------------------- the rest


def test_a_redefined_model_only_has_to_run() -> None:
    judge = Verifier(add(0), [{"x": np.zeros((1, 4), np.float32)}])
    new = model("a = MatMul(x, w) new = Relu(a)", outputs="float[N, 1] new", weights="float[4, 1] w = {1, 1, 1, 1}")
    assert judge.check(new, REDEFINES).ok
    other_inputs = model("y = Neg(z)", inputs="float[N, 7] z", outputs="float[N, 7] y")
    assert judge.check(other_inputs, REDEFINES).ok
    broken = model("y = Reshape(x, w)", weights="int64[1] w = {7}", outputs="float[A] y")
    assert not judge.check(broken, REDEFINES).ok


def test_reference_outputs_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = add(0)
    opened: list[Any] = []
    real = runtime.open_session

    def counting(source: Any, options: Any = None, *, optimized: bool) -> Session:
        opened.append(source)
        return real(source, options, optimized=optimized)

    monkeypatch.setattr(verify, "open_session", counting)
    monkeypatch.setattr(yardstick, "open_session", counting)
    feeds = [{"x": np.full((2, 4), i, np.float32)} for i in range(3)]
    judge = Verifier(reference, feeds)
    assert not opened
    for _ in range(3):
        assert judge.check(add(0)).ok
    assert sum(source is reference for source in opened) == 2
    opened.clear()
    forgetful = Verifier(reference, feeds, cache_bytes=40)
    first = forgetful.check(add(0.5))
    assert [forgetful.check(add(0.5)), judge.check(add(0.5))] == [first, first]
    assert sum(source is reference for source in opened) > 2


def test_feeds_the_original_cannot_run_are_left_out_and_noted() -> None:
    reference = model("y = Reshape(x, w)", weights="int64[2] w = {2, 4}", outputs="float[A, B] y")
    feeds = [{"x": np.zeros((n, 4), np.float32)} for n in (3, 2, 5)]
    found = check(reference, reference, feeds=feeds)
    assert (found.ok, found.feeds) == (True, 1)
    assert found.shapes == (("N", (2,)),)
    assert found.notes[0].startswith("the original does not run on 2 of 3 feeds: ")
    with pytest.raises(RuntimeFailure):
        check(reference, reference, feeds=feeds[:1])


def test_feeds_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = [{"x": np.full((1, 4), i, np.float32)} for i in range(100)]
    assert check(add(0), add(0), feeds=feeds).feeds == verify.EXACT_FEEDS
    assert check(add(0), add(0), feeds=feeds, max_error=1.0).feeds == verify.LOSSY_FEEDS
    monkeypatch.setattr(verify, "FEED_BYTES", 33)
    assert check(add(0), add(0), feeds=feeds, max_error=1.0).feeds == 2
    with pytest.raises(DataError, match="no inputs"):
        Verifier(add(0), [])


def test_models_without_inputs_are_verified() -> None:
    def constant(value: float) -> ir.Model:
        return model("y = Exp(w)", inputs="", outputs="float[2] y", weights=f"float[2] w = {{0, {value}}}")

    assert check(constant(1), constant(1)).ok
    assert not check(constant(1), constant(2)).ok


def test_outputs_of_one_element_are_measured_by_their_size() -> None:
    def scalar(weight: float) -> ir.Model:
        return model(
            "a = Mul(x, w) y = ReduceSum <keepdims = 0> (a)", outputs="float y", weights=f"float w = {{{weight}}}"
        )

    feeds = [{"x": np.ones((1, 4), np.float32)}]
    found = check(scalar(1), scalar(1.1), feeds=feeds, max_error=0.2)
    assert found.worst == pytest.approx(0.1, rel=1e-5)
    assert found.outputs[0].first_index == ()
