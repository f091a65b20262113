from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.probe import logistic, ridge
from onnxopt.probe.classifier import Array, log_loss, log_softmax, one_hot, singular, standardize
from onnxopt.probe.lbfgs import minimize


def blobs(rows: int, columns: int, count: int, *, seed: int = 0, apart: float = 1.5) -> tuple[Array, Array]:
    """Return features around one centre per class."""
    random = np.random.default_rng(seed)
    classes = np.arange(rows) % count
    return random.normal(size=(count, columns))[classes] * apart + random.normal(size=(rows, columns)), classes


@pytest.mark.parametrize("shape", [(40, 8), (12, 30)])
def test_ridge_solves_its_normal_equations(shape: tuple[int, int]) -> None:
    features, classes = blobs(*shape, 3)
    fitted = ridge.fit(features, classes, 3)
    scaling = standardize(features)
    x, y = scaling.apply(features), one_hot(classes, 3)
    weight = np.linalg.solve(x.T @ x + fitted.penalty * np.eye(shape[1]), x.T @ (y - y.mean(axis=0)))
    expected = x @ weight + y.mean(axis=0)
    scores = fitted.scores(features)
    # The scores are those of the regression, all times one factor.
    factor = (scores * expected).sum() / (expected**2).sum()
    assert factor > 0
    np.testing.assert_allclose(scores, factor * expected, rtol=1e-6, atol=1e-6 * np.abs(scores).max())


def test_leave_one_out_is_what_refitting_without_the_row_gives() -> None:
    features, classes = blobs(20, 5, 2)
    x, y = features - features.mean(axis=0), one_hot(classes, 2)
    left, values, _ = singular(x)
    centred = y - y.mean(axis=0)
    quick = ridge._leave_one_out(values, left, left.T @ centred, centred, 2.0) + y.mean(axis=0)
    for row in range(20):
        rest = np.delete(np.arange(20), row)
        mean, target = x[rest].mean(axis=0), y[rest].mean(axis=0)
        inner = x[rest] - mean
        weight = np.linalg.solve(inner.T @ inner + 2.0 * np.eye(5), inner.T @ (y[rest] - target))
        np.testing.assert_allclose(quick[row], (x[row] - mean) @ weight + target, rtol=1e-9)


def test_a_sample_is_left_out_with_all_its_variants() -> None:
    samples, classes = blobs(12, 5, 2)
    random = np.random.default_rng(3)
    rows = np.concatenate([samples + 0.1 * random.normal(size=samples.shape) for _ in range(3)])
    x, y = rows - rows.mean(axis=0), one_hot(np.tile(classes, 3), 2)
    left, values, _ = singular(x)
    centred = y - y.mean(axis=0)
    quick = ridge._leave_samples_out(values, left, left.T @ centred, centred, 2.0, 3) + y.mean(axis=0)
    for sample in range(12):
        out = sample + 12 * np.arange(3)
        rest = np.setdiff1d(np.arange(36), out)
        mean, target = x[rest].mean(axis=0), y[rest].mean(axis=0)
        inner = x[rest] - mean
        weight = np.linalg.solve(inner.T @ inner + 2.0 * np.eye(5), inner.T @ (y[rest] - target))
        np.testing.assert_allclose(quick[out], (x[out] - mean) @ weight + target, rtol=1e-6)


def test_variants_that_are_copies_change_nothing_but_the_penalty() -> None:
    """The penalty is relative to the number of rows, so the same classifier comes out."""
    features, classes = blobs(40, 6, 3, apart=0.7)
    one = ridge.fit(features, classes, 3)
    three = ridge.fit(np.tile(features, (3, 1)), np.tile(classes, 3), 3, 3)
    assert three.penalty == pytest.approx(3 * one.penalty)
    np.testing.assert_allclose(three.scores(features), one.scores(features), rtol=0.02, atol=0.02)


def test_a_few_samples_do_not_show_what_features_spread() -> None:
    """Their scales are drawn together: the fewer samples, the more."""
    features = np.random.default_rng(0).normal(size=(1000, 2)) * [1.0, 9.0]
    ratios = [float(np.divide(*standardize(features[:n]).scale[::-1])) for n in (10, 100, 1000)]
    assert 1 < ratios[0] < 1.2 < ratios[1] < ratios[2] < 9
    assert standardize(features[:30], 10).scale[0] > standardize(features[:30]).scale[0]


def test_temperature_leaves_less_loss_than_the_regression_alone() -> None:
    features, classes = blobs(300, 6, 3, apart=1.0)
    fitted = ridge.fit(features[:200], classes[:200], 3)
    raw = fitted.scores(features[200:]) / np.abs(fitted.scores(features)).max()
    assert log_loss(fitted.scores(features[200:]), classes[200:]) < 0.9 * log_loss(raw, classes[200:])


@pytest.mark.parametrize("shape", [(60, 6), (30, 80)])
def test_logistic_is_at_the_minimum_of_its_loss(shape: tuple[int, int]) -> None:
    features, classes = blobs(*shape, 3, apart=0.7)
    fitted = logistic.fit(features, classes, 3)
    error = np.exp(log_softmax(fitted.scores(features))) - one_hot(classes, 3)
    scaling = standardize(features)
    size = np.sqrt(shape[1])
    gradient = scaling.apply(features).T @ error / len(features) / size
    weight = fitted.weight * scaling.scale[:, None] * size
    assert np.abs(gradient + fitted.penalty * weight).max() < 2e-4
    assert np.abs(error.sum(axis=0)).max() / len(features) < 2e-4


@pytest.mark.parametrize("fit", [ridge.fit, logistic.fit], ids=["ridge", "logistic"])
def test_constant_and_tiny_features_count_for_nothing(fit: object) -> None:
    features, classes = blobs(40, 4, 2)
    useless = np.hstack([features, np.full((40, 1), 7.0), 1e6 + 1e-3 * features[:, :1]])
    fitted = fit(useless, classes, 2)  # type: ignore[operator]
    assert np.isfinite(fitted.weight).all()
    assert not fitted.weight[4].any()
    assert not fitted.weight[5].any()


@pytest.mark.parametrize("fit", [ridge.fit, logistic.fit], ids=["ridge", "logistic"])
def test_features_that_tell_nothing_give_the_shares_of_the_classes(fit: object) -> None:
    classes = np.array([0, 0, 0, 1] * 10)
    fitted = fit(np.ones((40, 3)), classes, 2)  # type: ignore[operator]
    assert (fitted.scores(np.ones((1, 3))).argmax(axis=1) == 0).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), columns=st.integers(1, 12))
def test_lbfgs_finds_the_minimum_of_a_quadratic(seed: int, columns: int) -> None:
    random = np.random.default_rng(seed)
    root = random.normal(size=(columns + 2, columns))
    curvature = root.T @ root + 0.1 * np.eye(columns)
    target = random.normal(size=columns)

    def objective(point: Array) -> tuple[float, Array]:
        away = curvature @ (point - target)
        return 0.5 * float((point - target) @ away), away

    found = minimize(objective, np.zeros(columns), tolerance=1e-9)
    np.testing.assert_allclose(found, target, atol=1e-6)


def test_lbfgs_descends_the_valley_of_rosenbrock() -> None:
    def objective(point: Array) -> tuple[float, Array]:
        a, b = point
        value = (1 - a) ** 2 + 100 * (b - a * a) ** 2
        return float(value), np.array([-2 * (1 - a) - 400 * a * (b - a * a), 200 * (b - a * a)])

    np.testing.assert_allclose(minimize(objective, np.array([-1.2, 1.0]), tolerance=1e-8), [1, 1], atol=1e-5)


def test_lbfgs_stops_where_the_function_cannot_fall() -> None:
    start = np.array([1.0, 2.0])
    assert (minimize(lambda p: (0.0, np.zeros(2)), start) == start).all()
    assert (minimize(lambda p: (np.nan, np.ones(2)), start) == start).all()
