"""What removals save, told before they are made, is what is missing afterwards."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxopt import model as models
from onnxopt.analysis.flops import count
from onnxopt.analysis.inspect import summary_stats
from onnxopt.coupling.analysis import analyse
from onnxopt.coupling.ledger import Ledger
from onnxopt.coupling.removal import Removal
from onnxopt.removed import Change, Removed, Width

MODELS = Path(__file__).parents[2] / "models"

GRAPHS = {
    "depthwise and grouped convolutions": (
        """(float[1,3,8,8] x) => (float[1,5,8,8] y) {
        a = Conv(x, w) b = Relu(a) c = Conv<group=8, pads=[1,1,1,1]>(b, d) e = Conv<group=2>(c, g)
        y = Conv(e, v) }""",
        {"w": (8, 3, 1, 1), "d": (8, 1, 3, 3), "g": (8, 4, 1, 1), "v": (5, 8, 1, 1)},
    ),
    "a residual stream": (
        """(float[1,3,6,6] x) => (float[1,2,6,6] y) {
        a = Conv(x, w) b = Relu(a) c = Conv(b, u) d = Add(b, c) e = Relu(d) y = Conv(e, v) }""",
        {"w": (8, 3, 1, 1), "u": (8, 8, 1, 1), "v": (2, 8, 1, 1)},
    ),
    "fused attention": (
        """(float[1,6,16] x) => (float[1,6,4] y) {
        q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
        a = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v) y = MatMul(a, o) }""",
        {"wq": (16, 16), "wk": (16, 16), "wv": (16, 16), "o": (16, 4)},
    ),
    "a transposed convolution and a product of activations": (
        """(float[1,4,5,5] x) => (float[1,5,5] y) {
        a = ConvTranspose(x, w) b = Relu(a) c = Conv(b, v) s = Squeeze(c, axis) t = Transpose<perm=[0,2,1]>(s)
        y = MatMul(s, t) }""",
        {"w": (4, 8, 1, 1), "v": (1, 8, 1, 1)},
    ),
}


def removals(model: ir.Model) -> list[Removed]:
    """Remove half of each group, and return what was told of it before."""
    coupling = analyse(model)
    removal = Removal(model, coupling)
    ledger, found = Ledger(removal), []
    for group in coupling.groups:
        gone = np.arange(group.units // 2)
        found.append(ledger.removed(group, gone, None))
        removal.remove(group.roots[gone])
    return found


def check(model: ir.Model) -> list[Removed]:
    """Compare what is told with what is counted."""
    macs, parameters = count(model).macs, summary_stats(model).parameters
    found = removals(model)
    assert (found[0].macs.before, found[0].parameters.before) == (macs, parameters)
    assert (found[-1].macs.after, found[-1].parameters.after) == (count(model).macs, summary_stats(model).parameters)
    for one, other in itertools.pairwise(found):
        assert (one.macs.after, one.parameters.after) == (other.macs.before, other.parameters.before)
    return found


@pytest.mark.parametrize("name", GRAPHS)
def test_what_is_told_is_what_is_missing(build, name):
    text, shapes = GRAPHS[name]
    constants = {"axis": np.array([1])} if "axis" in text else {}
    found = check(build(text, constants, **shapes))
    assert all(removed.macs.gone > 0 and removed.parameters.gone > 0 for removed in found)


@pytest.mark.parametrize("name", ["mnist_cnn.onnx", "mnist_cnn_bn.onnx"])
def test_what_is_told_of_a_network_is_what_is_missing(name):
    assert len(check(models.load(MODELS / name))) == 4


def test_what_was_left_alone_does_not_count(build):
    model = build(*GRAPHS["a residual stream"][:1], **GRAPHS["a residual stream"][1])
    removal = Removal(model, analyse(model))
    ledger = Ledger(removal)
    (group,) = removal.coupling.groups
    first, second = (ledger.removed(group, np.arange(gone), None) for gone in (6, 4))
    assert first.channels == Change(8, 2)
    assert second.channels == Change(8, 4)
    assert second.parameters == Change(24 + 64 + 16, 12 + 16 + 8)


def test_the_layers_are_those_that_make_and_take_the_units(build):
    model = build(*GRAPHS["a residual stream"][:1], **GRAPHS["a residual stream"][1])
    (removed,) = removals(model)
    assert set(removed.widths) == {
        Width("w", "outputs", 8, 4),
        Width("u", "outputs", 8, 4),
        Width("u", "inputs", 8, 4),
        Width("v", "inputs", 8, 4),
    }
    assert set(removed.behind) == {"c", "y"}
