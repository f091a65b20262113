"""Rounding that makes up for its errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.numeric import gptq, nbits
from onnxopt.numeric.nbits import Spec


def correlated(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Vectors that lie near a subspace, some of whose elements are much larger than others."""
    rng = np.random.default_rng(seed)
    basis = rng.standard_normal((max(1, size // 4), size))
    vectors = rng.standard_normal((count, len(basis))) @ basis + 0.1 * rng.standard_normal((count, size))
    return (vectors * np.geomspace(0.1, 3, size)[rng.permutation(size)]).astype(np.float32)


def random(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, 1]).standard_normal((rows, columns)).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([2, 4, 8]),
    st.sampled_from([16, 32, 128]),
    st.booleans(),
    st.integers(1, 20),
    st.integers(1, 90),
    st.integers(1, 200),
    st.integers(0, 2**32 - 1),
)
def test_it_is_never_worse_than_rounding_to_nearest(
    bits: int, block: int, symmetric: bool, rows: int, columns: int, count: int, seed: int
) -> None:
    x, w = correlated(count, columns, seed), random(rows, columns, seed)
    rounded = gptq.quantize(w, x.T @ x, Spec(bits, block, symmetric, "mse"))
    assert rounded.loss <= rounded.plain_loss
    error = (nbits.decode(rounded.codes, rounded.grid, columns) - w).astype(np.float64)
    assert np.sum((x @ error.T) ** 2) == pytest.approx(rounded.loss, rel=2e-2, abs=1e-3 * float(np.sum((x @ w.T) ** 2)))
    # What fills up the last block stands for 0.0.
    filling = rounded.codes.reshape(*rounded.grid.scale.shape, block)[:, -1, (columns - 1) % block + 1 :]
    assert (filling == rounded.grid.zero_point[:, -1, None]).all()


def test_it_gains_on_fresh_inputs() -> None:
    x, w = correlated(1000, 128), random(64, 128)
    seen, fresh = x[:500], x[500:]
    spec = Spec(4, 32, clip="mse")
    rounded = gptq.quantize(w, seen.T @ seen, spec)
    grid = nbits.fit(w, spec)
    nearest = nbits.decode(nbits.encode(w, grid), grid, 128) - w
    made = nbits.decode(rounded.codes, rounded.grid, 128) - w
    assert np.sum((fresh @ made.T) ** 2) < 0.5 * np.sum((fresh @ nearest.T) ** 2)


def test_independent_inputs_leave_nothing_to_make_up_for() -> None:
    w = random(8, 64)
    rounded = gptq.quantize(w, np.eye(64, dtype=np.float32), Spec(4, 32))
    np.testing.assert_array_equal(rounded.codes, nbits.encode(w, rounded.grid))


def test_inputs_that_are_always_zero_are_rounded_to_nearest() -> None:
    x, w = correlated(200, 48), random(8, 48)
    x[:, 5] = 0
    rounded = gptq.quantize(w, x.T @ x, Spec(4, 16))
    np.testing.assert_array_equal(rounded.codes[:, 5], nbits.encode(w, rounded.grid)[:, 5])


def test_no_inputs_at_all() -> None:
    w = random(8, 48)
    rounded = gptq.quantize(w, np.zeros((48, 48), np.float32), Spec(4, 16))
    np.testing.assert_array_equal(rounded.codes, nbits.encode(w, rounded.grid))


def test_rows_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = correlated(200, 48), random(30, 48)
    whole = gptq.quantize(w, x.T @ x, Spec(4, 16))
    monkeypatch.setattr(gptq, "ROWS", 7)
    pieces = gptq.quantize(w, x.T @ x, Spec(4, 16))
    assert np.mean(whole.codes == pieces.codes) > 0.999


@pytest.mark.parametrize("size", [1, 2, 100, 128, 129, 300])
def test_triangular_inverse(size: int) -> None:
    upper = np.triu(np.random.default_rng(0).standard_normal((size, size))) * 0.1 + np.eye(size)
    inverse = gptq._triangular_inverse(upper)
    np.testing.assert_allclose(inverse @ upper, np.eye(size), atol=1e-8)
    assert not np.tril(inverse, -1).any()


def test_nothing_is_written_into_what_was_given() -> None:
    x, w = correlated(100, 48), random(8, 48)
    gram = x.T @ x
    copies = w.copy(), gram.copy()
    gptq.quantize(w, gram, Spec(4, 16))
    np.testing.assert_array_equal(w, copies[0])
    np.testing.assert_array_equal(gram, copies[1])
