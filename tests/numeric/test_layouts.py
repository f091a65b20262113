"""Weights of any rank as rows that share scales."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxopt.numeric.layouts import Layout
from onnxopt.numeric.nbits import blocked


@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(-1, 3))
def test_restore_undoes_rows(shape: list[int], axis: int) -> None:
    layout = Layout(tuple(shape), None if axis < 0 else axis % len(shape))
    array = np.arange(np.prod(shape)).reshape(shape)
    rows = layout.rows(array)
    assert rows.shape[1] == layout.width
    np.testing.assert_array_equal(layout.restore(rows), array)
    # A value per row reaches the elements of that row.
    values = np.arange(len(rows))[:, None]
    np.testing.assert_array_equal(
        layout.restore(np.broadcast_to(values, rows.shape)), np.broadcast_to(layout.broadcast(values), shape)
    )
    assert layout.split == tuple(shape)


@given(st.integers(1, 7), st.integers(1, 4), st.integers(2, 5), st.integers(0, 1))
def test_blocks_of_a_matrix(others: int, count: int, block: int, axis: int) -> None:
    shape = (others, count * block) if axis else (count * block, others)
    layout = Layout(shape, axis, block)
    array = np.arange(others * count * block, dtype=np.float32).reshape(shape)
    rows = layout.rows(array)
    assert rows.shape == (others, count * block)
    np.testing.assert_array_equal(layout.restore(rows), array)
    values = np.arange(others * count).reshape(others, count)
    spread = np.broadcast_to(values[:, :, None], blocked(rows, block).shape).reshape(others, -1)
    divided = np.broadcast_to(layout.broadcast(values), array.reshape(layout.split).shape)
    np.testing.assert_array_equal(divided.reshape(shape), layout.restore(spread))
    np.testing.assert_array_equal(np.repeat(layout.shared(values), block, axis=axis), layout.restore(spread))


def test_the_last_block_may_be_short() -> None:
    layout = Layout((3, 7), 1, 4)
    filled = np.pad(np.arange(21).reshape(3, 7), ((0, 0), (0, 1)))
    np.testing.assert_array_equal(layout.restore(filled), np.arange(21).reshape(3, 7))


@pytest.mark.parametrize(("axis", "block", "kept"), [(1, 4, True), (0, 4, False), (0, 0, True), (1, 0, False)])
def test_order(axis: int, block: int, kept: bool) -> None:
    layout = Layout((8, 8), axis, block)
    array = np.arange(64).reshape(8, 8)
    assert layout.keeps_order is kept
    np.testing.assert_array_equal(layout.rows(array), array if kept else array.T)


def test_blocks_need_a_matrix_and_an_axis() -> None:
    with pytest.raises(ValueError, match="blocks need a matrix and an axis"):
        Layout((2, 3, 4), 1, 2)
    with pytest.raises(ValueError, match="blocks need a matrix and an axis"):
        Layout((2, 3), None, 2)
