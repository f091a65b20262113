"""Sizes of dynamic axes: from their names, positions, expressions and the user."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.errors import DataError, UsageError
from onnxopt.inputs.axes import Axes, Kind, evaluate, words


def value(name: str, shape: list[int | str | None] | None, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=None if shape is None else ir.Shape(shape))


def kinds(*inputs: ir.Value) -> dict[str, Kind]:
    return {axis.key: axis.kind for axis in Axes(list(inputs))}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("batch", Kind.BATCH),
        ("batch_size", Kind.BATCH),
        ("N", Kind.BATCH),
        ("sequence_length", Kind.SEQUENCE),
        ("seqLen", Kind.SEQUENCE),
        ("num_tokens", Kind.SEQUENCE),
        ("past_sequence_length", Kind.PAST),
        ("total_sequence_length", Kind.TOTAL),
        ("height", Kind.HEIGHT),
        ("W", Kind.WIDTH),
        ("num_channels_latent", Kind.CHANNELS),
        ("num_boxes", Kind.COUNT),
        ("audio_samples", Kind.SAMPLES),
    ],
)
def test_a_name_says_what_an_axis_is(name: str, kind: Kind) -> None:
    assert kinds(value("x", [name, 2])) == {name: kind}


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "expected"),
    [
        ("x", ["d0", 3, "s1", "s2"], "FLOAT", [Kind.BATCH, Kind.HEIGHT, Kind.WIDTH]),
        ("x", [None, None, None, 3], "FLOAT", [Kind.BATCH, Kind.HEIGHT, Kind.WIDTH]),
        ("x", [1, 3, 48, None], "FLOAT", [Kind.WIDTH]),
        ("x", ["unk__1", "unk__2"], "INT64", [Kind.BATCH, Kind.SEQUENCE]),
        ("x", [1, None], "FLOAT", [Kind.FEATURES]),
        ("waveform", [1, None], "FLOAT", [Kind.SAMPLES]),
        ("waveforms", ["batch_size", "N"], "FLOAT", [Kind.BATCH, Kind.SAMPLES]),
        ("x", [1, 80, None], "FLOAT", [Kind.SEQUENCE]),
        ("x", [None, None, None], "FLOAT", [Kind.BATCH, Kind.SEQUENCE, Kind.FEATURES]),
        ("past_key_values.0.key", [None, 12, None, 64], "FLOAT", [Kind.BATCH, Kind.PAST]),
        ("attention_mask", [1, 1, None, None], "FLOAT", [Kind.SEQUENCE, Kind.SEQUENCE]),
        ("x", [1, 1, None, None, None], "FLOAT", [Kind.DEPTH, Kind.HEIGHT, Kind.WIDTH]),
        ("x", [None], "FLOAT", [Kind.COUNT]),
    ],
)
def test_else_its_position_does(name: str, shape: list[int | str | None], dtype: str, expected: list[Kind]) -> None:
    assert list(kinds(value(name, shape, ir.DataType[dtype])).values()) == expected


def test_exporters_placeholders_are_no_names() -> None:
    axes = Axes([value("x", ["?", -1, "None", "", "-1", "batch"])])
    assert axes.names == ("x:0", "x:1", "x:2", "x:3", "x:4", "batch")


def test_the_same_name_has_the_same_size() -> None:
    axes = Axes([value("ids", ["batch", "seq"]), value("mask", ["batch", "seq"])])
    for index in range(3):
        chosen = axes.choose(index, {})
        assert axes.concrete("ids", chosen) == axes.concrete("mask", chosen)


def test_sizes_differ_between_sets() -> None:
    axes = Axes([value("ids", ["batch", "seq"])])
    assert len({axes.concrete("ids", axes.choose(index, {})) for index in range(3)}) == 3


@pytest.mark.parametrize("name", ["past_sequence_length + sequence_length", "past_sequence_length+sequence_length"])
def test_expressions_are_computed(name: str) -> None:
    inputs = [
        value("mask", ["batch_size", name]),
        value("ids", ["batch_size", "sequence_length"]),
        value("past", ["batch_size", 2, "past_sequence_length", 4]),
    ]
    axes = Axes(inputs)
    assert axes.names == ("batch_size", "past_sequence_length", "sequence_length")
    chosen = axes.choose(0, axes.overrides({"sequence_length": 5, "past_sequence_length": 0}))
    assert axes.concrete("mask", chosen) == (1, 5)
    assert axes.concrete("past", chosen) == (1, 2, 0, 4)


def test_a_total_length_is_past_plus_new() -> None:
    axes = Axes([value("mask", ["b", "total_length"]), value("ids", ["b", "seq"]), value("past", ["b", "past_length"])])
    chosen = axes.choose(0, {})
    assert chosen["total_length"] == chosen["seq"] + chosen["past_length"]
    assert axes.choose(0, {"total_length": 4})["total_length"] == 4


def test_a_hyphen_is_part_of_a_name() -> None:
    assert Axes([value("x", ["batch-size", 3])]).names == ("batch-size",)
    assert Axes([value("x", ["a-b"]), value("y", ["a", "b"])]).names == ("a", "b")


def test_overrides_by_name_and_by_position() -> None:
    axes = Axes([value("x", ["batch", 3, None])])
    assert axes.overrides({"batch": 4, "x:2": 7, "x:1": 3}) == {"batch": 4, "x:2": 7}
    assert axes.overrides({"x:0": 4}) == {"batch": 4}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"bach": 1}, r'no dynamic axis "bach"\. Did you mean "batch"\? It has batch, x:2\.'),
        ({"x:9": 1}, "no dynamic axis"),
        ({"y:0": 1}, "no dynamic axis"),
        ({"x:1": 4}, "the fixed size 3; it cannot be 4"),
        ({"batch": -1}, "at least 0, not -1"),
    ],
)
def test_overrides_that_cannot_be(shape: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Axes([value("x", ["batch", 3, None])]).overrides(shape)


def test_overrides_of_a_static_model() -> None:
    with pytest.raises(UsageError, match="All its axes are fixed"):
        Axes([value("x", [1, 3])]).overrides({"batch": 1})


def test_absurd_sizes_are_refused() -> None:
    axes = Axes([value("x", [1 << 20, 1 << 20])])
    with pytest.raises(DataError, match="too large to be generated"):
        axes.concrete("x", axes.choose(0, {}))


def test_sizes_shrink_where_an_input_would_be_unusually_large() -> None:
    axes = Axes([value("x", ["batch", 64, "h", "h", "h"]), value("y", ["h", 2])])
    shape = axes.concrete("x", axes.choose(2, {}))
    assert shape == (3, 64, 20, 20, 20)
    assert axes.concrete("x", axes.choose(2, {"h": 100})) == (1, 64, 100, 100, 100)


def test_weights_decide_the_size_of_an_axis() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, C, H, W] image, float[B, F] row, float[S, T, I] steps) => (float y, float z, float l)
        <float[8, 5, 3, 3] w, float[7, 2] m, float[1, 16, 6] wx, float[1, 16, 4] wh> {
            n = Neg(image) y = Conv(n, w) z = MatMul(row, m) l = LSTM<hidden_size = 4>(steps, wx, wh)
        }"""
    )
    chosen = Axes(list(model.graph.inputs)).choose(0, {})
    assert (chosen["C"], chosen["F"], chosen["I"]) == (5, 7, 6)


def test_an_unknown_rank_follows_from_the_weights() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[1] x) => (float y) <float[8, 5, 3, 3] w> { y = Conv(x, w) }'
    )
    model.graph.inputs[0].shape = None
    axes = Axes(list(model.graph.inputs))
    shape = axes.concrete("x", axes.choose(0, {}))
    assert len(shape) == 4
    assert shape[1] == 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a + b", 7),
        ("2*a", 10),
        ("a//b", 2),
        ("a/b", 2),
        ("max(a, b) - 1", 4),
        ("floor((a + 1) / 2)", 3),
        ("-a + 6", 1),
        ("a % 3", 2),
        ("n.x + 1", 10),
        ("a + c", None),
        ("a / 0", None),
        ("a ** b", None),
        ("__import__('os')", None),
        ("a +", None),
        ("[a]", None),
    ],
)
def test_evaluate(text: str, expected: int | None) -> None:
    assert evaluate(text, {"a": 5, "b": 2, "n.x": 9}) == expected


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_text_can_be_a_name(name: str) -> None:
    """Whatever an exporter wrote, the axis gets a size."""
    axes = Axes([value("x", [name, 3])])
    shape = axes.concrete("x", axes.choose(0, {}))
    assert len(shape) == 2
    assert shape[0] >= 0


def test_words() -> None:
    assert words("pastSequence_len.1") == ["past", "sequence", "len"]
    assert words("input_ids") == ["input", "ids"]
    assert words("ROIAlign2") == ["roi", "align"]
