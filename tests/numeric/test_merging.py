import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from onnxopt.numeric.merging import Merge, costs, factors, least_costly


def test_costs_are_the_square_error_of_the_best_multiple():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(50, 4)), rng.normal(size=(4, 3))
    found = costs(x.T @ x, np.square(w).sum(axis=1))
    for i, j in [(0, 1), (3, 2)]:
        merge = Merge(np.array([i]), np.array([j]))
        lost = np.outer(x[:, i] - factors(x.T @ x, merge)[0] * x[:, j], w[i])
        np.testing.assert_allclose(found[i, j], np.square(lost).sum())
    assert np.isinf(np.diag(found)).all()


def test_multiples_of_one_another_cost_nothing():
    x = np.random.default_rng(0).normal(size=(50, 3))
    x = np.concatenate([x, 2 * x[:, :1], x[:, 1:2], np.zeros((50, 1))], axis=1)
    gram = x.T @ x
    merge = least_costly([costs(gram, np.ones(6))], 3)
    restored = x.copy()
    restored[:, merge.gone] = x[:, merge.into] * factors(gram, merge)
    np.testing.assert_allclose(restored, x, atol=1e-6)


@given(st.integers(2, 9), st.integers(0, 1000), st.data())
def test_what_stays_stands_for_what_goes(n, seed, data):
    x = np.random.default_rng(seed).normal(size=(20, n))
    count = data.draw(st.integers(1, n - 1))
    merge = least_costly([costs(x.T @ x, np.ones(n)), costs(x.T @ x, np.arange(n) + 1.0)], count)
    assert len(merge.gone) == count
    assert not set(merge.gone) & set(merge.into)
    assert sorted(set(merge.gone)) == merge.gone.tolist()
