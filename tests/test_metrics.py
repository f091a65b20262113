"""Metrics with labels and against the original, their intervals, and what does not fit."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxopt.errors import DataError, OnnxOptError, UsageError
from onnxopt.metrics import MetricResult, classes, evaluate, spearman
from onnxopt.metrics.sequences import distance, steps

metrics = importlib.import_module("onnxopt.metrics")
evaluation = importlib.import_module("onnxopt.metrics.evaluation")
held = importlib.import_module("onnxopt.metrics.outputs")
intervals = importlib.import_module("onnxopt.metrics.intervals")
ranks = importlib.import_module("onnxopt.metrics.ranks")


def model(body: str, weights: str = "", inputs: str = "float[1, 3] x", outputs: str = "float[A, B] y") -> ir.Model:
    return ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : 17]> g ({inputs}) => ({outputs}) <{weights}> {{ {body} }}'
    )


SAME = model("y = Identity(x)")
"""Its outputs are its inputs, so that data decides what the metrics see."""


def shifted(amount: float) -> ir.Model:
    return model("y = Add(x, w)", weights=f"float[3] w = {{0, {amount}, 0}}")


def one_hot(labels: list[int]) -> list[dict[str, Any]]:
    return [{"x": np.eye(3, dtype=np.float32)[[label]]} for label in labels]


LABELS = [0, 1, 2, 0, 1, 2, 0, 0]


# ---------------------------------------------------------------------------------------------------- top1


def test_top1_with_labels_is_accuracy_and_its_drop() -> None:
    """The candidate says 1 everywhere."""
    labels = np.array([*LABELS[:-1], 1])
    found = evaluate(SAME, shifted(5), one_hot(LABELS), labels, "top1")
    assert (found.name, found.samples, found.labelled) == ("top1", 8, True)
    assert (found.baseline, found.candidate, found.drop) == (7 / 8, 3 / 8, 0.5)
    assert found.low < found.drop < found.high
    assert found.sentence().startswith("top1 0.875 to 0.375, a drop of 0.5 (95% interval ")
    assert found.sentence().endswith(" on 8 samples against labels")


def test_a_better_candidate_has_a_negative_drop() -> None:
    found = evaluate(shifted(5), SAME, one_hot(LABELS), np.array(LABELS), "top1")
    assert found.drop == -0.75
    assert found.within(0.0)


def test_top1_without_labels_is_agreement_with_the_original() -> None:
    found = evaluate(SAME, shifted(5), one_hot(LABELS), None, "top1")
    assert (found.baseline, found.candidate, found.drop, found.labelled) == (1.0, 0.25, 0.75, False)


def test_the_pairing_by_sample_narrows_the_interval() -> None:
    """Both are wrong on the same half: unpaired, the drop would be uncertain by a tenth and more."""
    labels = np.array([label if i % 2 else (label + 1) % 3 for i, label in enumerate(LABELS * 20)])
    found = evaluate(SAME, shifted(0.5), one_hot(LABELS * 20), labels, "top1")
    assert found.baseline == found.candidate == 0.5
    assert found.high - found.low <= 6 / 160


def test_no_difference_in_few_samples_is_no_certainty() -> None:
    found = evaluate(SAME, SAME, one_hot(LABELS), None, "top1")
    assert (found.drop, found.low, found.high) == (0.0, -3 / 8, 3 / 8)
    assert found.within(0.0)
    assert not found.is_certain(0.01)
    many = evaluate(SAME, SAME, one_hot(LABELS * 50), None, "top1")
    assert many.is_certain(0.01)


def test_several_positions_per_sample_and_ignored_labels() -> None:
    tokens = model("y = Identity(x)", inputs="float[1, N, 3] x", outputs="float[1, N, 3] y")
    data = [
        {"x": np.eye(3, dtype=np.float32)[None, [0, 1, 2, 2]]},
        {"x": np.eye(3, dtype=np.float32)[None, [0, 0]]},
    ]
    labels = np.array([[0, 1, 0, -100]] * 2)
    assert evaluate(tokens, tokens, data[:1], labels[:1], "top1").candidate == pytest.approx(2 / 3)
    with pytest.raises(DataError, match=r"There are 4 labels for a sample .* takes 2;"):
        evaluate(tokens, tokens, data, labels, "top1")


def test_fixed_batches_take_several_labels_at_a_time() -> None:
    batched = model("y = Identity(x)", inputs="float[2, 3] x")
    data = [{"x": np.eye(3, dtype=np.float32)[[a, b]]} for a, b in ((0, 1), (2, 0))]
    found = evaluate(batched, batched, data, np.array([0, 1, 2, 1, 1]), "top1")
    assert (found.candidate, found.samples) == (0.75, 2)


@pytest.mark.parametrize("count", [3, 6, 15])
def test_labels_must_be_as_many_as_samples(count: int) -> None:
    with pytest.raises(DataError, match=f"There are {count} labels for 8 samples|labels for a sample"):
        evaluate(SAME, SAME, one_hot(LABELS), np.arange(count), "top1")


@pytest.mark.parametrize(
    ("body", "outputs", "words"),
    [
        (
            "y = ReduceSum <keepdims = 0> (x)",
            "float y",
            r"classes along its last axis, and the model's has the shape \[\]",
        ),
        (
            "y = ArgMax <axis = 1> (x)",
            "int64[A, B] y",
            "needs a floating-point output, and the model has none.* are y",
        ),
    ],
)
def test_outputs_must_hold_classes(body: str, outputs: str, words: str) -> None:
    unfit = model(body, outputs=outputs)
    with pytest.raises(DataError, match=words):
        evaluate(unfit, unfit, one_hot(LABELS), None, "top1")


@pytest.mark.parametrize("labels", [[0, 1, 2, 0, 1, 2, 0, 3], [255] * 8, [3.0] * 8])
def test_labels_must_be_classes_of_the_output(labels: list[float]) -> None:
    with pytest.raises(DataError, match=r"The label (3|255) is none of the 3 classes .* counted from 0; .* label -1"):
        evaluate(SAME, SAME, one_hot(LABELS), np.array(labels), "top1")


def test_some_labels_must_count() -> None:
    labels = np.full(8, -100)
    with pytest.raises(DataError, match="All labels are -1 or below"):
        evaluate(SAME, SAME, one_hot(LABELS), labels, "top1")
    labels[3] = 0
    assert evaluate(SAME, SAME, one_hot(LABELS), labels, "top1").candidate == 1.0


def test_labels_must_be_whole_numbers() -> None:
    with pytest.raises(DataError, match="whole numbers"):
        evaluate(SAME, SAME, one_hot(LABELS), np.full(8, 0.5), "top1")
    assert evaluate(SAME, SAME, one_hot(LABELS), np.array(LABELS, float), "top1").candidate == 1.0


def test_the_first_floating_point_output_counts() -> None:
    outputs = {"label": np.array([1]), "none": None, "half": np.array([0.5, 2], np.float16), "more": np.ones(3)}
    assert metrics.main_output(outputs).tolist() == [0.5, 2.0]
    assert metrics.main_output(outputs).dtype == np.float64
    assert classes(np.array([[[0, 1], [1, 0]]])).tolist() == [[1, 0]]


# ---------------------------------------------------------------------------------------------------- cosine, mse


def test_cosine() -> None:
    data = [{"x": np.array([[1, 0, 0]], np.float32)}, {"x": np.array([[3, 0, 0]], np.float32)}]
    against = evaluate(SAME, shifted(1), data, None, "cosine")
    expected = (math.sqrt(0.5) + 3 / math.sqrt(10)) / 2
    assert against.baseline == 1.0
    assert against.candidate == pytest.approx(expected)
    assert against.drop == pytest.approx(1 - expected)
    labelled = evaluate(SAME, shifted(1), data, np.array([[1, 1, 0], [0, 1, 0]]), "cosine")
    assert labelled.baseline == pytest.approx(math.sqrt(0.5) / 2)
    assert labelled.drop < 0


def test_mse_is_better_when_lower() -> None:
    data = [{"x": np.array([[i, 0, 0]], np.float32)} for i in range(4)]
    against = evaluate(SAME, shifted(3), data, None, "mse")
    assert (against.baseline, against.candidate, against.drop) == (0.0, 3.0, 3.0)
    labels = np.array([[[i, 3, 0]] for i in range(4)], np.float32)
    labelled = evaluate(SAME, shifted(3), data, labels, "mse")
    assert (labelled.baseline, labelled.candidate, labelled.drop) == (3.0, 0.0, -3.0)


@pytest.mark.parametrize("metric", ["cosine", "mse"])
def test_labels_must_be_vectors_like_the_output(metric: str) -> None:
    with pytest.raises(DataError, match=f"{metric} compares the output with a label"):
        evaluate(SAME, SAME, one_hot([0, 1]), np.zeros((2, 4)), metric)
    with pytest.raises(DataError, match=metric):
        evaluate(SAME, SAME, one_hot([0, 1]), np.full((2, 3), "text"), metric)


# ---------------------------------------------------------------------------------------------------- spearman


def test_rank_correlation_with_ties() -> None:
    assert spearman(np.array([1, 2, 3, 4]), np.array([10, 20, 30, 99])) == pytest.approx(1.0)
    assert spearman(np.array([1, 2, 3, 4]), np.array([4, 3, 2, 1])) == pytest.approx(-1.0)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4
    assert spearman(np.array([1, 2, 2, 3]), np.array([1, 2, 3, 4])) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman(np.array([1, 1, 1]), np.array([1, 2, 3])) == 0.0
    assert math.isnan(spearman(np.array([1]), np.array([1])))


def scalars(*values: float) -> list[dict[str, Any]]:
    return [{"x": np.array([[v, v * v % 7, 0]], np.float32)} for v in values]


def test_spearman_with_labels_ranks_one_number_per_sample() -> None:
    first = model("y = Slice(x, s, e, a)", weights="int64[1] s = {0}, int64[1] e = {1}, int64[1] a = {1}")
    second = model("y = Slice(x, s, e, a)", weights="int64[1] s = {1}, int64[1] e = {2}, int64[1] a = {1}")
    data = scalars(1, 2, 3, 4, 5, 6)
    labels = np.array([1, 2, 3, 4, 6, 5], float)
    found = evaluate(first, second, data, labels, "spearman")
    assert found.baseline == pytest.approx(1 - 6 * 2 / (6 * 35))
    assert found.drop == pytest.approx(found.baseline - found.candidate)
    assert found.low <= found.drop <= found.high
    alone = evaluate(first, second, data, None, "spearman")
    assert alone.baseline == 1.0
    assert alone.candidate == pytest.approx(spearman(np.arange(6), np.array([1, 4, 2, 2, 4, 1])))
    with pytest.raises(DataError, match="one number per sample"):
        evaluate(SAME, SAME, data, labels, "spearman")


def test_spearman_of_vectors_ranks_the_similarities_of_pairs() -> None:
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((1, 3)).astype(np.float32)} for _ in range(12)]
    assert evaluate(
        SAME, model("y = Mul(x, w)", weights="float w = {3}"), data, None, "spearman"
    ).drop == pytest.approx(0)
    found = evaluate(SAME, shifted(0.5), data, None, "spearman")
    assert 0 < found.drop < 1
    assert found.low <= found.drop <= found.high
    vectors = np.concatenate([d["x"] for d in data]).astype(np.float64)
    moved = vectors + np.array([0, 0.5, 0])
    pairs = [(i, j) for i in range(12) for j in range(i)]

    def similarities(v: np.ndarray) -> np.ndarray:
        return np.array([v[i] @ v[j] / np.linalg.norm(v[i]) / np.linalg.norm(v[j]) for i, j in pairs])

    assert found.candidate == pytest.approx(spearman(similarities(vectors), similarities(moved)), abs=1e-3)


def test_spearman_needs_samples_of_one_shape_and_three_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    free = model("y = Identity(x)", inputs="float[1, N] x")
    with pytest.raises(DataError, match="three samples"):
        evaluate(SAME, SAME, one_hot([0, 1]), None, "spearman")
    with pytest.raises(DataError, match="one shape"):
        evaluate(free, free, [{"x": np.ones((1, n), np.float32)} for n in (2, 3, 4)], None, "spearman")
    monkeypatch.setattr(ranks, "MOST_PAIRED", 3)
    assert evaluate(SAME, SAME, one_hot(LABELS), None, "spearman").samples == 8
    monkeypatch.setattr(held, "KEPT_BYTES", 100)
    with pytest.raises(DataError, match="fewer samples"):
        evaluate(SAME, SAME, one_hot(LABELS), None, "spearman")


# ---------------------------------------------------------------------------------------------------- custom


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_metrics_for_test.py").write_text(
        """
def mean(outputs, labels):
    return sum(float(o["y"][0, 1]) for o in outputs) / len(outputs) + (0 if labels is None else labels.sum())

def error(outputs, labels):
    return mean(outputs, labels)

error.higher_is_better = False

def text(outputs, labels):
    return "good"

number = 3
"""
    )
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("custom")
def test_custom_functions_are_found_in_the_current_folder() -> None:
    found = evaluate(SAME, shifted(0.5), one_hot(LABELS), None, "my_metrics_for_test:mean")
    assert (found.baseline, found.candidate, found.drop) == (0.25, 0.75, -0.5)
    assert found.low == found.high == -0.5
    lower = evaluate(SAME, shifted(0.5), one_hot(LABELS), np.array(LABELS), "my_metrics_for_test:error")
    assert (lower.baseline, lower.drop) == (6.25, 0.5)


@pytest.mark.usefixtures("custom")
def test_a_slow_custom_function_has_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "RESAMPLING_SECONDS", 0.0)
    found = evaluate(SAME, shifted(0.5), one_hot(LABELS), None, "my_metrics_for_test:mean")
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert not found.is_certain(100.0)


@pytest.mark.usefixtures("custom")
@pytest.mark.parametrize(
    ("metric", "error", "words"),
    [
        ("my_metrics_for_test:text", DataError, "returned str where a number is expected"),
        ("my_metrics_for_test:missing", UsageError, "cannot be imported"),
        ("no_such_module_here:mean", UsageError, "cannot be imported"),
        ("my_metrics_for_test:number", UsageError, "is no function but a int"),
        ("top-1", UsageError, 'There is no metric "top-1". Did you mean "top1"'),
    ],
)
def test_metrics_that_cannot_be_used(metric: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        evaluate(SAME, SAME, one_hot([0]), None, metric)


def test_no_samples_are_an_error() -> None:
    with pytest.raises(DataError, match="no samples"):
        evaluate(SAME, SAME, [], None, "top1")


def test_budgets() -> None:
    found = MetricResult("top1", 0.9, 0.89, 0.01, 0.004, 0.016, samples=1000, labelled=True)
    assert found.within(0.01)
    assert not found.is_certain(0.01)
    assert found.is_certain(0.02)
    assert not found.within(0.005)
    assert not found.is_certain(0.005)
    assert found.is_certain(0.003)
    assert not MetricResult("mse", 0, math.nan, math.nan, math.nan, math.nan, 1, False).within(math.inf)


# ---------------------------------------------------------------------------------------------------- several candidates


@pytest.mark.parametrize("metric", ["top1", "ctc", "cosine", "mse", "spearman"])
@pytest.mark.parametrize("room", [0, 40, 1 << 20])
def test_the_original_runs_once_for_all_candidates(metric: str, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs beyond the memory for them are computed again."""
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((1, 3)).astype(np.float32)} for _ in range(12)]
    candidates = [shifted(0.5), shifted(1.0)]
    monkeypatch.setattr(intervals, "RESAMPLING_SECONDS", 1e3)  # so that the machine's load changes no interval
    alone = [evaluate(SAME, c, data, None, metric) for c in candidates]
    opened: list[ir.Model] = []
    session = evaluation.open_session

    def counting(model: ir.Model, *args: Any, **options: Any) -> Any:
        opened.append(model)
        return session(model, *args, **options)

    monkeypatch.setattr(evaluation, "open_session", counting)
    evaluator = metrics.Evaluator(SAME, data, None, metric, kept_bytes=room)
    assert [evaluator.evaluate(c) for c in candidates] == alone
    assert len(opened) == (3 if room > 1000 else 4)


def test_a_candidate_that_fails_half_way_spoils_nothing() -> None:
    data = one_hot(LABELS)
    fixed = model("y = Reshape(x, s)", weights="int64[2] s = {1, 4}")
    evaluator = metrics.Evaluator(SAME, data, None, "top1")
    with pytest.raises(OnnxOptError):
        evaluator.evaluate(fixed)
    assert evaluator.evaluate(shifted(5)) == evaluate(SAME, shifted(5), data, None, "top1")


def test_rare_losses_are_not_taken_for_rarer_than_they_may_be() -> None:
    """One loss in 100: resampling alone says at most 3 in 100, and the exact limit is 4.7."""
    labels = np.array([0] * 99 + [1])
    found = evaluate(SAME, shifted(-5), one_hot(labels.tolist()), None, "top1")
    assert found.drop == 0.01
    assert found.high == pytest.approx(0.0474)


def test_positions_count_where_nothing_differs() -> None:
    tokens = model("y = Identity(x)", inputs="float[1, N, 3] x", outputs="float[1, N, 3] y")
    data = [{"x": np.eye(3, dtype=np.float32)[None, [0, 1, 2, 2]]}] * 10
    assert evaluate(tokens, tokens, data, None, "top1").high == pytest.approx(3 / 40)


def test_a_single_sample_proves_nothing() -> None:
    found = evaluate(SAME, shifted(1), one_hot([0]), None, "cosine")
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_spearman_averages_over_the_length_where_samples_differ_in_it() -> None:
    free = model("y = Identity(x)", inputs="float[1, T, 3] x", outputs="float[1, T, 3] y")
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((1, int(t), 3)).astype(np.float32)} for t in rng.integers(2, 9, size=12)]
    found = evaluate(free, free, data, None, "spearman")
    assert (found.candidate, found.samples) == (1.0, 12)
    pooled = [{"x": d["x"].mean(axis=1)} for d in data]
    noisy = model("a = Add(x, w) y = Tanh(a)", weights="float[3] w = {0, 2, 0}")
    spread = model("y = Add(x, w)", "float[3] w = {0, 2, 0}", "float[1, T, 3] x", "float[1, T, 3] y")
    assert evaluate(free, spread, data, None, "spearman").candidate == pytest.approx(
        evaluate(SAME, shifted(2), pooled, None, "spearman").candidate, abs=1e-6
    )
    assert evaluate(SAME, noisy, pooled, None, "spearman").candidate < 1


def test_the_metric_that_fits_is_chosen_and_says_why() -> None:
    scores = model("y = Softmax(x)")
    assert metrics.choose(scores, None) == ("top1", "the main output comes from Softmax, as scores of classes do")
    assert metrics.choose(SAME, None) == ("cosine", "the main output holds no scores of classes")
    assert metrics.choose(SAME, np.array([1, 2])) == ("top1", "the labels are whole numbers")
    assert metrics.choose(scores, np.array([[0.5]]))[0] == "cosine"
    with pytest.raises(DataError, match="no floating-point output"):
        metrics.choose(model("y = ArgMax(x)", outputs="int64[1, 3] y"), None)


# ---------------------------------------------------------------------------------------------------- ctc


def said(text: str, classes: str = "-abc") -> dict[str, np.ndarray]:
    """Return outputs that say a class per step, most likely first in its row."""
    return {"y": np.eye(len(classes), dtype=np.float32)[[classes.index(c) for c in text]][None]}


def labels(*texts: str, classes: str = "-abc") -> np.ndarray:
    longest = max(map(len, texts))
    return np.array([[classes.index(c) for c in t] + [-1] * (longest - len(t)) for t in texts])


@pytest.mark.parametrize(
    ("one", "two", "edits"),
    [("", "", 0), ("abc", "abc", 0), ("abc", "", 3), ("abc", "ac", 1), ("abc", "xbcd", 2), ("kitten", "sitting", 3)],
)
def test_the_distance_counts_insertions_deletions_and_replacements(one: str, two: str, edits: int) -> None:
    assert distance([*map(ord, one)], [*map(ord, two)]) == distance([*map(ord, two)], [*map(ord, one)]) == edits


def test_repeats_and_blanks_are_no_symbols() -> None:
    """Other steps than the original's may spell the same; top1 would count them as wrong."""
    reference = [said("-aa--ab-"), said("--------"), said("---c----")]
    candidate = [said("aaa-aab-"), said("--------"), said("---cc---")]
    found = metrics.compare(reference, candidate, None, "ctc")
    assert (found.baseline, found.candidate, found.drop) == (1.0, 1.0, 0.0)
    assert found.low < 0 < found.high, "three samples prove little"
    assert metrics.compare(reference, candidate, None, "top1").drop > 0


def test_errors_are_a_share_of_all_symbols() -> None:
    reference = [said("-a-b-c-a-"), said("-a-------")]
    candidate = [said("-a-b-b-a-"), said("---------")]
    found = metrics.compare(reference, candidate, None, "ctc")
    assert found.drop == pytest.approx(2 / 5)
    assert found.candidate == pytest.approx(3 / 5)


def test_the_blank_may_be_the_last_class() -> None:
    reference, candidate = [said("##a#b##a#", "abc#")], [said("##aa##baa", "abc#")]
    assert metrics.compare(reference, candidate, None, "ctc").drop == pytest.approx(0)
    # a blank of 0 would be dropped, and the a of class 0 with it
    assert metrics.compare(reference, [said("####b####", "abc#")], None, "ctc").drop == pytest.approx(2 / 3)


def test_ctc_with_labels_compares_both_models_with_them() -> None:
    reference, candidate = [said("-a-b-c"), said("-a----")], [said("-a-b--"), said("-a-b--")]
    found = metrics.compare(reference, candidate, labels("abc", "ab"), "ctc")
    assert found.labelled
    assert (found.baseline, found.candidate) == pytest.approx((4 / 5, 4 / 5))
    assert found.drop == 0


def test_time_may_come_first() -> None:
    along = said("-a-b-c")["y"].transpose(1, 0, 2)
    assert [row.tolist() for row in steps(along)] == [[0, 1, 0, 2, 0, 3]]


def test_rare_errors_are_not_taken_for_rarer_than_they_may_be() -> None:
    one = [said("-a-b-c-a-b-")] * 100
    found = metrics.compare(one, one, None, "ctc")
    assert found.high == pytest.approx(3.0 / 500)


@pytest.mark.parametrize(
    ("outputs", "label", "reason"),
    [
        ({"y": np.zeros((2, 3, 4, 5), np.float32)}, None, "along its last two axes"),
        (said("-a-b"), np.array([[0.5, 1.0]]), "labels of whole numbers"),
    ],
)
def test_what_does_not_fit_ctc(outputs: dict[str, np.ndarray], label: np.ndarray | None, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        metrics.compare([outputs], [outputs], label, "ctc")


def test_a_reader_is_judged_by_what_it_reads() -> None:
    image, scores = "float[n, 3, 48, w] x", "float[n, t, 40] y"
    body = "p = ReduceMean <axes = [2], keepdims = 0> (x) q = Transpose <perm = [0, 2, 1]> (p) m = MatMul(q, w) "
    weights = "float[3, 40] w"
    reader = model(f"{body} y = Softmax(m)", weights, image, scores)
    why = "the only output holds a Softmax of many classes step by step, as that of a reader does"
    assert metrics.choose(reader, None) == ("ctc", why)
    assert metrics.choose(reader, labels("abc", "ab")) == ("ctc", why)
    assert metrics.choose(reader, np.array([1, 2]))[0] == "top1"
    few = model(f"{body} y = Softmax(m)", "float[3, 4] w", image, "float[n, t, 4] y")
    words = model("e = Gather(t, x) y = Softmax(e)", "float[9, 40] t", "int64[n, s] x", "float[n, s, 40] y")
    detector = model(f"{body} y = Softmax(m) z = Relu(m)", weights, image, f"{scores}, float[n, t, 40] z")
    assert [metrics.choose(m, None)[0] for m in (few, words, detector)] == ["top1"] * 3
