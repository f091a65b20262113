"""Types and shapes as ONNX infers them, without looking at large weights."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

from onnxopt.proto.encode import encode

SMALL = 1024
"""Tensors of up to this many bytes are shown to inference: shapes, axes, scales."""


def infer_types(model: ir.Model, *, trust_stated: bool) -> dict[str, onnx.TypeProto]:
    """Return types and shapes by value name, of the main graph and of the bodies in it.

    A name that means different values in different bodies is left out.

    Args:
        model: The model; it is not changed.
        trust_stated: Whether what the model states about intermediate values and outputs counts, or only what
            follows from its inputs.
    """
    proto = encode(model, leave_out)
    if not trust_stated:
        _forget(proto.graph, outermost=True)
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except onnx.shape_inference.InferenceError:
        # Of a model that contradicts itself only what it states is known.
        inferred = proto
    found: dict[str, onnx.TypeProto | None] = {}
    for info in _value_infos(inferred.graph):
        found[info.name] = info.type if found.get(info.name, info.type) == info.type else None
    return {name: kind for name, kind in found.items() if kind is not None}


def leave_out(target: onnx.TensorProto, tensor: ir.TensorProtocol, initializer: bool) -> bool:
    """Leave the data of large tensors out (an `encode.Place`): inference needs their types and shapes only."""
    if tensor.nbytes <= SMALL:
        return False
    target.data_location = onnx.TensorProto.EXTERNAL
    target.external_data.add(key="location", value="weights")
    return True


def _forget(graph: onnx.GraphProto, *, outermost: bool) -> None:
    """Remove what is stated about all but the inputs of the model."""
    del graph.value_info[:]
    for info in (*graph.output, *(() if outermost else graph.input)):
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.ClearField("shape")
    for body in _bodies(graph):
        _forget(body, outermost=False)


def _value_infos(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    yield from (*graph.input, *graph.value_info, *graph.output)
    for body in _bodies(graph):
        yield from _value_infos(body)


def _bodies(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
            yield from attribute.graphs
