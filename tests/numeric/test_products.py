"""Mean products of vectors about a centre."""

from __future__ import annotations

import numpy as np

from onnxopt.numeric.products import Products


def test_they_are_those_about_any_centre() -> None:
    rows = np.random.default_rng(0).normal(size=(700, 6)) + np.arange(6)
    products = Products(6)
    for portion in np.split(rows, 7):
        products.add(portion)
    assert products.count == 700
    np.testing.assert_allclose(products.mean, rows.mean(axis=0), rtol=1e-5)
    for centre in (np.zeros((2, 3)), rows.mean(axis=0).reshape(2, 3), np.full((2, 3), 5.0)):
        apart = (rows.reshape(700, 2, 3) - centre).transpose(1, 0, 2)
        expected = apart.transpose(0, 2, 1) @ apart / 700
        np.testing.assert_allclose(products.about(centre), expected, rtol=1e-4, atol=1e-4)


def test_a_mean_far_from_zero_leaves_what_vectors_have_of_their_own() -> None:
    rows = (np.random.default_rng(0).normal(size=(2000, 3)) + 3e4).astype(np.float32)
    products = Products(3)
    products.add(rows)
    found = products.about(products.mean[None])[0]
    np.testing.assert_allclose(found, np.cov(rows.T.astype(np.float64), bias=True), rtol=1e-2, atol=1e-2)


def test_what_was_not_finite_is_not_usable() -> None:
    products = Products(2)
    assert not products.usable
    products.add(np.ones((0, 2)))
    assert not products.usable
    products.add(np.ones((3, 2)))
    assert products.usable
    for value in (np.nan, np.inf, 3e38):
        spoilt = Products(2)
        spoilt.add(np.array([[1, 1], [value, 1], [-value, 2]]))
        assert not spoilt.usable
