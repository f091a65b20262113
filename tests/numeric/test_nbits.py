"""Codes of few bits in blocks: packing, grids and rounding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.numeric import nbits
from onnxopt.numeric.nbits import BlockGrid, Spec

BITS = st.sampled_from([2, 4, 8])


def random(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def square_error(matrix: np.ndarray, spec: Spec, importance: np.ndarray | None = None) -> np.ndarray:
    grid = nbits.fit(matrix, spec, importance)
    error = (nbits.decode(nbits.encode(matrix, grid), grid, matrix.shape[1]) - matrix) ** 2
    return error if importance is None else error * importance


@given(BITS, st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_unpack_undoes_pack(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns), np.uint8)
    packed = nbits.pack(codes, bits)
    assert packed.shape == (rows, -(-columns * bits // 8))
    np.testing.assert_array_equal(nbits.unpack(packed, bits, columns), codes)


def test_the_first_code_lies_in_the_lowest_bits() -> None:
    assert nbits.pack(np.array([[1, 2, 3]], np.uint8), 4).tolist() == [[0x21, 0x03]]
    assert nbits.pack(np.array([[1, 2, 3, 0, 2]], np.uint8), 2).tolist() == [[0b00_11_10_01, 0b10]]


@settings(max_examples=60, deadline=None)
@given(
    BITS,
    st.sampled_from([16, 32, 100]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["none", "mse"]),
    st.integers(1, 6),
    st.integers(1, 130),
    st.integers(0, 2**32 - 1),
)
def test_rounding_stays_within_half_a_step(
    bits: int, block: int, symmetric: bool, signed: bool, clip: str, rows: int, columns: int, seed: int
) -> None:
    matrix = random(rows, columns, seed) * 3
    spec = Spec(bits, block, symmetric, "mse" if clip == "mse" else "none", signed)
    grid = nbits.fit(matrix, spec)
    codes = nbits.encode(matrix, grid)
    assert codes.shape == (rows, grid.scale.shape[1] * block)
    assert codes.max() < 1 << bits
    if symmetric:
        assert (grid.zero_point == 1 << (bits - 1)).all()
        assert signed or (grid.scale > 0).all()
    if clip == "mse":
        return
    error = np.abs(nbits.decode(codes, grid, columns) - matrix)
    steps = np.repeat(np.abs(grid.scale), block, axis=1)[:, :columns]
    # A signed scale reaches one extreme with all its levels, and misses the other one by up to a step; the zero
    # point of a grid with two extremes is rounded, which moves both by up to half a step.
    assert (error <= steps * (0.501 if symmetric and not signed else 1.01) + 1e-6).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_search_never_makes_a_block_worse(bits: int, symmetric: bool) -> None:
    matrix, block = random(40, 256), 32
    plain = square_error(matrix, Spec(bits, block, symmetric, "none")).reshape(-1, block).sum(axis=1)
    searched = square_error(matrix, Spec(bits, block, symmetric, "mse")).reshape(-1, block).sum(axis=1)
    assert (searched <= plain * 1.0001).all()
    assert searched.sum() < plain.sum() * (1 if bits == 8 else 0.99)


def test_the_search_heeds_importance() -> None:
    matrix, importance = random(40, 64), np.geomspace(1, 1000, 64).astype(np.float32)
    spec = Spec(4, 64, clip="mse")
    blind = nbits.fit(matrix, spec)
    error = (nbits.decode(nbits.encode(matrix, blind), blind, 64) - matrix) ** 2 * importance
    assert square_error(matrix, spec, importance).sum() < error.sum() * 0.95


def test_what_fills_up_a_block_stands_for_zero() -> None:
    grid = nbits.fit(random(3, 20) + 2, Spec(4, 16))
    codes = nbits.encode(random(3, 20) + 2, grid).reshape(3, 2, 16)
    assert (codes[:, 1, 4:] == grid.zero_point[:, 1, None]).all()


def test_zeros_stay_zeros() -> None:
    for symmetric in (False, True):
        assert not square_error(np.zeros((2, 40), np.float32), Spec(4, 16, symmetric, "mse")).any()


def test_scales_are_rounded_to_their_type_before_codes_are_chosen() -> None:
    grid = nbits.fit(random(3, 64), Spec(8, 32, scale_dtype=np.float16))
    assert grid.scale.dtype == np.float16


def test_large_matrices_are_worked_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, spec = random(50, 96), Spec(4, 32, clip="mse")
    whole = nbits.fit(matrix, spec)
    monkeypatch.setattr(nbits, "CHUNK_ELEMENTS", 96 * 7)
    pieces = nbits.fit(matrix, spec)
    np.testing.assert_array_equal(whole.scale, pieces.scale)
    np.testing.assert_array_equal(nbits.encode(matrix, whole), nbits.encode(matrix, pieces))


def test_grids_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="not rows of blocks"):
        BlockGrid(np.ones(3), np.ones(3, np.uint8), 4, 16)
    with pytest.raises(ValueError, match="3 bits in blocks of 16"):
        BlockGrid(np.ones((1, 1)), np.ones((1, 1), np.uint8), 3, 16)
