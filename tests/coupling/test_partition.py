import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from onnxopt.coupling import builder
from onnxopt.coupling.analysis import analyse
from onnxopt.coupling.partition import Partition, components

PAIRS = st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40)


def sides(pairs):
    array = np.array(pairs, np.int64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def by_hand(count, pairs):
    labels = list(range(count))
    for a, b in pairs:
        low, high = sorted((labels[a], labels[b]))
        labels = [low if label == high else label for label in labels]
    return labels


@given(PAIRS)
def test_components(pairs):
    assert components(30, *sides(pairs)).tolist() == by_hand(30, pairs)


@given(PAIRS, PAIRS, st.sets(st.integers(0, 29), max_size=3), st.sets(st.integers(0, 29), max_size=3))
def test_merging_later_is_like_merging_at_once(first, second, frozen, later):
    reasons = np.full(30, -1, np.int64)
    reasons[list(frozen)] = 0
    partition = Partition(components(30, *sides(first)), reasons)
    everything = np.arange(30)
    expected = by_hand(30, first + second)
    stay = {expected[i] for i in frozen | later}
    more = (*sides(second), np.array(sorted(later), np.int64))
    assert partition.free_after(*more, everything) == len(set(expected) - stay)
    partition.merge(*more, 1)
    assert by_hand(30, enumerate(partition.labels.tolist())) == expected
    assert {expected[i] for i in np.flatnonzero(partition.reasons_of(everything) >= 0)} == stay


def test_a_long_chain_takes_few_rounds():
    order = np.random.default_rng(0).permutation(100_000)
    assert not components(100_000, order[:-1], order[1:]).any()


def test_the_first_reason_stays():
    partition = Partition(np.array([0, 0, 2, 3]), np.array([-1, 4, 7, -1]))
    partition.merge(np.array([0]), np.array([2]), np.array([3]), 9)
    assert partition.reasons_of(np.arange(4)).tolist() == [4, 4, 4, 9]


def test_axes_too_large_to_hold_are_not_followed(build, monkeypatch):
    """Twenty-eight Concats of a value with itself make an axis of 2 ** 28 indexes out of one."""
    doublings = "\n".join(f"v{i + 1} = Concat <axis = 1> (v{i}, v{i})" for i in range(28))
    model = build(
        "(float[2, 4] x) => (float[2, s] y) { v0 = MatMul (x, w) " + doublings + " y = Relu (v28) }", w=(4, 1)
    )
    monkeypatch.setattr(builder, "MOST_INDEXES", 1 << 12)
    tracemalloc.start()
    coupling = analyse(model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not coupling.groups
    assert peak < 10 << 20
