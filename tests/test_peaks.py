from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxopt.numeric.peaks import Peak


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, min_side=0), elements=st.floats(width=32)))
def test_the_largest_finite_magnitude(array: np.ndarray) -> None:
    peak = Peak()
    peak.add(array)
    finite = np.abs(array[np.isfinite(array)].astype(np.float64))
    assert peak.largest == (finite.max() if finite.size else 0.0)
    assert peak.unbounded == bool(np.isinf(array).any())


def test_it_goes_on_over_arrays_and_blocks() -> None:
    peak = Peak()
    for shape, value in (((3, 1 << 19), 2.0), ((4,), -7.0), ((0, 4), 0.0), ((), 5.0)):
        peak.add(np.full(shape, value, np.float32))
    assert peak.largest == 7.0
    assert not peak.unbounded


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_types(dtype: type) -> None:
    peak = Peak()
    peak.add(np.array([1, -3], dtype))
    assert peak.largest == 3.0
