"""Sizes that are computed from other sizes follow the axes that they are made of; see `Pruned`."""

import numpy as np

ONE = np.array([1])


def test_a_recurrent_layer_with_an_initial_state_of_the_size_of_the_batch(prune):
    done = prune(
        """(float[3,batch,4] x) => (float[3,batch,5] y) {
        a = MatMul(x, v) s = Shape(x) n = Gather(s, one) z = Concat <axis = 0> (one, n, hidden)
        h = ConstantOfShape(z) c = ConstantOfShape(z) b = LSTM <hidden_size = 8> (a, w, r, p, "", h, c)
        d = Squeeze(b, one) y = MatMul(d, u) }""",
        {"one": ONE, "hidden": np.array([8])}, v=(4, 6), w=(1, 32, 6), r=(1, 32, 8), p=(1, 64), u=(8, 5),
    )  # fmt: skip
    assert done.groups == {"v": 6, "w": 8}
    assert done.shape("r") == [1, 16, 4]
    assert done.node("LSTM").attributes["hidden_size"].value == 4


def test_a_product_of_sizes_follows_what_is_merged(prune):
    done = prune(
        """(float[2,3,4,length] x) => (float[2,length,5] y) {
        a = Conv(x, w) b = Transpose <perm = [0, 3, 1, 2]> (a) s = Shape(b)
        c = Gather(s, two) h = Gather(s, three) m = Mul(c, h) t = Concat <axis = 0> (nulls, m)
        d = Reshape(b, t) y = MatMul(d, u) }""",
        {"two": np.array([2]), "three": np.array([3]), "nulls": np.array([0, 0])}, w=(6, 3, 1, 1), u=(24, 5),
    )  # fmt: skip
    assert done.groups == {"w": 6}
    assert [done.shape(name) for name in "wu"] == [[3, 3, 1, 1], [12, 5]]


def test_a_product_of_other_sizes_freezes(prune):
    done = prune(
        """(float[2,3,4,4] x) => (float[2,5] y) {
        a = Conv(x, w) g = Conv(x, q) k = Conv(g, j) s = Shape(g) c = Gather(s, one) h = Gather(s, two) m = Mul(c, h)
        t = Concat <axis = 0> (one, m) b = ReduceMean <axes = [2, 3], keepdims = 0> (a) d = Reshape(b, t)
        e = MatMul(d, u) f = ReduceSum <keepdims = 1> (k) y = Add(e, f) }""",
        {"one": ONE, "two": np.array([2])},
        w=(6, 3, 1, 1), q=(3, 3, 1, 1), j=(2, 3, 1, 1), u=(12, 5),
    )  # fmt: skip
    assert done.why("w", 0) == "Reshape d moves elements across it and follows another factor"
    assert done.why("q", 0) == "its size is computed in front of Reshape d"
