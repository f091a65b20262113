"""Taking weights out of serialized models and putting them back."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import parser

from onnxopt.proto.wire import THRESHOLD, Markers, Slot, WireError, expand, strip


def model_with(sizes: list[int], *, nested: bool = False) -> onnx.ModelProto:
    """A model with a tensor of each size in bytes: in initializers, attributes, bodies and a function."""
    proto = parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "f": 1]> g (float[N] x, bool c) => (float[N] y) {
            y = If(c) <then_branch = t () => (a) { a = f.F(x) }, else_branch = e () => (b) { b = Identity(x) }> }
        <domain: "f", opset_import: ["": 17]> F (a) => (b) { b = Relu(a) }"""
    )
    body = proto.graph.node[0].attribute[0].g
    places = [
        lambda: proto.graph.initializer.add(),
        lambda: proto.graph.node.add(op_type="Constant", output=["k"]).attribute.add(name="value", type=4).t,
        lambda: body.initializer.add(),
        lambda: body.node.add(op_type="Constant", output=["k"]).attribute.add(name="value", type=9).tensors.add(),
        lambda: proto.functions[0].node.add(op_type="Constant").attribute.add(name="value", type=4).t,
    ]
    for number, size in enumerate(sizes):
        tensor = places[number % len(places)]()
        tensor.dims.append(size)
        tensor.data_type = onnx.TensorProto.UINT8
        tensor.name = f"t{number}"
        tensor.raw_data = np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8).tobytes()
        tensor.doc_string = "after the data"
    return proto


sizes = st.lists(st.sampled_from([0, 1, 100, THRESHOLD - 1, THRESHOLD, 1 << 14, 200_000]), max_size=12)


@given(sizes)
def test_there_and_back(sizes: list[int]) -> None:
    raw = model_with(sizes).SerializeToString()
    markers = Markers()
    stripped = strip(raw, markers)
    assert len(stripped) < THRESHOLD * (len(sizes) + 2)
    proto = onnx.ModelProto.FromString(stripped)
    places: list[tuple[int, int]] = []
    for tensor in all_tensors(proto):
        place = markers.read(tensor.raw_data)
        assert (place is not None) == (tensor.dims[0] >= THRESHOLD)
        if place is not None:
            assert place[1] == tensor.dims[0]
            tensor.raw_data = markers.make(len(places), 0)
            places.append(place)
    pieces = expand(proto.SerializeToString(), markers, [length for _, length in places])
    whole = b"".join(raw[places[p.index][0] : sum(places[p.index])] if isinstance(p, Slot) else p for p in pieces)
    assert whole == raw


def all_tensors(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Every tensor of `model_with`, in the order of the serialized model."""
    found: list[onnx.TensorProto] = []
    body = proto.graph.node[0].attribute[0].g
    for nodes in (body.node, proto.graph.node, proto.functions[0].node):
        for node in nodes:
            for attribute in node.attribute:
                found += [attribute.t] if attribute.HasField("t") else list(attribute.tensors)
    return [*found, *body.initializer, *proto.graph.initializer]


@pytest.mark.parametrize("raw", [b"\x07", b"\x80" * 11, b"\x3a\xff\xff\xff\xff\x0f", b"\x09\x01", b"\x0d\x01", b"\x3a"])
def test_malformed(raw: bytes) -> None:
    with pytest.raises(WireError):
        strip(raw, Markers())


def test_endless_nesting() -> None:
    """Graphs in attributes in nodes in graphs, deeper than Python's stack allows."""
    inner = bytes(THRESHOLD)
    for _ in range(400):
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            inner = tag + varint(len(inner)) + inner
    with pytest.raises(WireError, match="nested too deeply"):
        strip(b"\x3a" + varint(len(inner)) + inner, Markers())


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def test_data_that_looks_like_a_marker() -> None:
    """Only the loader's own token counts."""
    markers, others = Markers(), Markers()
    assert markers.read(others.make(1, 2)) is None
    assert markers.read(markers.make(1, 2) + b"x") is None
    assert markers.read(markers.make(1 << 40, 2)) == (1 << 40, 2)
