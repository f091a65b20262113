"""From `onnx_ir.Model` to `onnx.ModelProto`, the reverse of `decode`.

What an edit has not touched comes out as it was in the file: order of `value_info`, metadata and opset imports,
types that the IR cannot express, sparse tensors, training information. Normalized are: empty names and domains
that were stored explicitly, entries of `value_info` and annotations about values that do not exist, repeated keys
of metadata, checksums of external data, types of attributes that were not stated, and the domain "ai.onnx" of
nodes (to "").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import onnx
import onnx_ir as ir

from onnxopt.errors import ModelError
from onnxopt.proto.collector import garbage_collection_paused
from onnxopt.proto.keys import (
    ANNOTATIONS,
    FIRST_IR_WITH_CONSTANTS,
    FUNCTION_VALUE_INFO,
    INPUT_ORDER,
    TRAINING_INFO,
    TYPES,
    VALUE_INFO_ORDER,
)
from onnxopt.proto.tensors import SparseTensor

Place = Callable[[onnx.TensorProto, ir.TensorProtocol, bool], bool]
"""Decides where the data of a tensor goes: fills in the TensorProto and returns True, or False to embed the data.

The last argument is True for initializers and False for tensors in attributes.
"""

_ANNOTATION = "quant_parameter_tensor_names"
_A = ir.AttributeType
_D = ir.DataType
_FIRST_IR_WITH_FUNCTIONS = 8
_FIRST_IR_OF = {
    _D.FLOAT8E4M3FN: 9,
    _D.FLOAT8E4M3FNUZ: 9,
    _D.FLOAT8E5M2: 9,
    _D.FLOAT8E5M2FNUZ: 9,
    _D.INT4: 10,
    _D.UINT4: 10,
    _D.FLOAT4E2M1: 11,
    _D.FLOAT8E8M0: 12,
    _D.INT2: 13,
    _D.UINT2: 13,
    _D.FLOAT6E2M3: 14,
    _D.FLOAT6E3M2: 14,
}


def embed(target: onnx.TensorProto, tensor: ir.TensorProtocol, initializer: bool) -> bool:
    """Embed every tensor."""
    return False


def encode(model: ir.Model, place: Place = embed, *, oldest_ir_version: int = 0) -> onnx.ModelProto:
    """Return the model as a protobuf. By default it is complete, external data included: mind its size.

    The IR version is the model's own, raised where functions or element types need a later one.

    Args:
        model: The model; it is not changed.
        place: Where the data of tensors goes.
        oldest_ir_version: The IR version is raised to this one at least. From version 4 on, initializers are not
            listed among the inputs any more.

    Raises:
        ModelError: If the model holds something that ONNX cannot express.
    """
    with garbage_collection_paused():
        return _Encoder(place).model(model, oldest_ir_version)


def encode_node(node: ir.Node) -> onnx.NodeProto:
    """Return a node as a protobuf, with all that is in its attributes."""
    proto = onnx.NodeProto()
    _Encoder(embed).node(proto, node)
    return proto


def encode_attribute(attribute: ir.Attr) -> onnx.AttributeProto:
    """Return an attribute as a protobuf, with all that is in it."""
    proto = onnx.AttributeProto()
    _Encoder(embed).attribute(proto, attribute)
    return proto


def encode_type(kind: ir.TypeProtocol | None, shape: ir.Shape | None) -> onnx.TypeProto:
    """Return a type and the shape of its tensors as a protobuf; an empty one where the type is not known."""
    proto = onnx.TypeProto()
    _Encoder(embed).type(proto, kind, shape)
    return proto


class _Encoder:
    """One walk over a model."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._dtypes: set[ir.DataType] = set()

    def model(self, model: ir.Model, oldest_ir_version: int) -> onnx.ModelProto:
        proto = onnx.ModelProto()
        for name in ("producer_name", "producer_version", "domain", "doc_string", "model_version"):
            if (stated := getattr(model, name)) is not None:
                setattr(proto, name, stated)
        _opsets(proto.opset_import, model.opset_imports)
        _strings(proto.metadata_props, model.metadata_props)
        for configuration in model.device_configurations:
            proto.configuration.append(ir.serde.serialize_model_configuration(configuration))
        self._graph(proto.graph, model.graph)
        proto.graph.value_info.extend(
            info for info in model.graph.meta.get(FUNCTION_VALUE_INFO, ()) if _has_function(model, info.name)
        )
        for function in model.functions.values():
            self._function(proto.functions.add(), function)
        proto.training_info.extend(model.graph.meta.get(TRAINING_INFO, ()))
        needed = [_FIRST_IR_OF.get(d, 0) for d in self._dtypes] + [_FIRST_IR_WITH_FUNCTIONS * bool(model.functions)]
        proto.ir_version = max(model.ir_version, oldest_ir_version, *needed)
        inputs = model.graph.inputs
        if proto.ir_version < FIRST_IR_WITH_CONSTANTS:
            inputs = _with_initializers(model.graph)
        for value in inputs:
            self._value(proto.graph.input.add(), value, model.graph)
        return proto

    def _graph(self, proto: onnx.GraphProto, graph: ir.Graph) -> None:
        """Write all of a graph but its inputs."""
        if graph.name is not None:
            proto.name = graph.name
        if graph.doc_string is not None:
            proto.doc_string = graph.doc_string
        _strings(proto.metadata_props, graph.metadata_props)
        for value in graph.initializers.values():
            if value.const_value is None:
                raise ModelError(f'The initializer "{value.name}" has no data.')
            if isinstance(value.const_value, SparseTensor):
                proto.sparse_initializer.add().CopyFrom(value.const_value.proto)
            else:
                self._tensor(proto.initializer.add(), value.const_value, value.name, initializer=True)
        for node in graph:
            self.node(proto.node.add(), node)
        self._value_info(proto.value_info, graph)
        for value in graph.outputs:
            self._value(proto.output.add(), value, graph)
        annotations = _annotations(graph)
        for name in annotations:
            entry = proto.quantization_annotation.add(tensor_name=name)
            _strings(entry.quant_parameter_tensor_names, annotations[name])

    def _value_info(self, proto: Any, graph: ir.Graph) -> None:
        """Describe values: first those that were described in the file, in its order, then the new ones."""
        listed = graph.meta.get(VALUE_INFO_ORDER, ())
        names = set(listed)
        known = {v.name: v for v in (*graph.inputs, *graph.initializers.values(), *graph.outputs)}
        new = []
        for value in graph.initializers.values():
            # The tensor itself says what its type and shape are.
            if value.name not in names and (value.doc_string or value.metadata_props) and not value.is_graph_input():
                new.append(value)
        for node in graph:
            for value in node.outputs:
                if value.name in names:
                    known[value.name] = value
                elif value.name and not value.is_graph_output():
                    new.append(value)
        types = graph.meta.get(TYPES, {})
        for value in [*(known[name] for name in listed if name in known), *new]:
            stated = value.type is not None or value.shape is not None or value.name in types
            if stated or value.doc_string or value.metadata_props:
                self._value(proto.add(), value, graph)

    def _function(self, proto: onnx.FunctionProto, function: ir.Function) -> None:
        for name in ("domain", "name", "overload", "doc_string"):
            if text := getattr(function, name):
                setattr(proto, name, text)
        _opsets(proto.opset_import, function.opset_imports)
        _strings(proto.metadata_props, function.metadata_props)
        proto.input.extend(value.name for value in function.inputs)
        proto.output.extend(value.name for value in function.outputs)
        for attribute in function.attributes.values():
            if attribute.value is None:
                proto.attribute.append(attribute.name)
            else:
                self.attribute(proto.attribute_proto.add(), attribute)
        for node in function:
            self.node(proto.node.add(), node)
        self._value_info(proto.value_info, function.graph)

    def node(self, proto: onnx.NodeProto, node: ir.Node) -> None:
        proto.op_type = node.op_type
        for name in ("domain", "name", "overload"):
            if text := getattr(node, name):
                setattr(proto, name, text)
        if node.doc_string is not None:
            proto.doc_string = node.doc_string
        proto.input.extend("" if value is None else value.name for value in node.inputs)
        proto.output.extend(value.name for value in node.outputs)
        for attribute in node.attributes.values():
            self.attribute(proto.attribute.add(), attribute)
        _strings(proto.metadata_props, node.metadata_props)
        for configuration in node.device_configurations:
            proto.device_configurations.append(ir.serde.serialize_node_device_configuration(configuration))

    def attribute(self, proto: onnx.AttributeProto, attribute: ir.Attr) -> None:
        kind, value = attribute.type, attribute.value
        proto.name = attribute.name
        proto.type = cast(Any, kind.value)
        if attribute.doc_string is not None:
            proto.doc_string = attribute.doc_string
        if attribute.is_ref():
            proto.ref_attr_name = attribute.ref_attr_name or ""
        elif kind == _A.INT:
            proto.i = value
        elif kind == _A.FLOAT:
            proto.f = value
        elif kind == _A.INTS:
            proto.ints.extend(value)
        elif kind == _A.FLOATS:
            proto.floats.extend(value)
        elif kind == _A.STRING:
            proto.s = _raw(value)
        elif kind == _A.STRINGS:
            proto.strings.extend(_raw(s) for s in value)
        elif kind == _A.TENSOR:
            self._tensor(proto.t, value, value.name, initializer=False)
        elif kind == _A.TENSORS:
            for tensor in value:
                self._tensor(proto.tensors.add(), tensor, tensor.name, initializer=False)
        elif kind == _A.GRAPH:
            self._body(proto.g, value)
        elif kind == _A.GRAPHS:
            for body in value:
                self._body(proto.graphs.add(), body)
        elif kind == _A.SPARSE_TENSOR:
            proto.sparse_tensor.CopyFrom(value)
        elif kind == _A.SPARSE_TENSORS:
            proto.sparse_tensors.extend(value)
        elif kind == _A.TYPE_PROTO:
            self.type(proto.tp, value.type, value.shape)
        elif kind == _A.TYPE_PROTOS:
            for entry in value:
                self.type(proto.type_protos.add(), entry.type, entry.shape)

    def _body(self, proto: onnx.GraphProto, graph: ir.Graph) -> None:
        self._graph(proto, graph)
        for value in graph.inputs:
            self._value(proto.input.add(), value, graph)

    def _tensor(
        self, proto: onnx.TensorProto, tensor: ir.TensorProtocol, name: str | None, *, initializer: bool
    ) -> None:
        self._dtypes.add(tensor.dtype)
        string = tensor.dtype == _D.STRING
        proto.data_type = tensor.dtype.value
        proto.dims.extend(tensor.shape.numpy())
        if string or not self._place(proto, tensor, initializer):
            if isinstance(tensor, ir.serde.TensorProtoTensor):
                proto.CopyFrom(tensor.raw)
                proto.ClearField("metadata_props")
            elif string:
                proto.string_data.extend(_strings_of(tensor))
            else:
                proto.raw_data = tensor.tobytes()
        if name:
            proto.name = name
        if tensor.doc_string:
            proto.doc_string = tensor.doc_string
        _strings(proto.metadata_props, tensor.metadata_props)

    def _value(self, proto: onnx.ValueInfoProto, value: ir.Value, graph: ir.Graph) -> None:
        proto.name = value.name or ""
        kept = None if value.type is not None else graph.meta.get(TYPES, {}).get(value.name)
        if kept is not None:
            proto.type.CopyFrom(kept)
        elif value.type is not None:
            self.type(proto.type, value.type, value.shape)
        if value.doc_string is not None:
            proto.doc_string = value.doc_string
        _strings(proto.metadata_props, value.metadata_props)

    def type(self, proto: onnx.TypeProto, kind: ir.TypeProtocol | None, shape: ir.Shape | None) -> None:
        if kind is None:
            return
        if kind.denotation:
            proto.denotation = kind.denotation
        if isinstance(kind, ir.SequenceType):
            self.type(proto.sequence_type.elem_type, kind.elem_type, shape)
        elif isinstance(kind, ir.OptionalType):
            self.type(proto.optional_type.elem_type, kind.elem_type, shape)
        else:
            leaf = proto.sparse_tensor_type if isinstance(kind, ir.SparseTensorType) else proto.tensor_type
            self._dtypes.add(kind.dtype)
            leaf.elem_type = kind.dtype.value
            if shape is not None:
                _dims(leaf.shape, shape)


def _dims(proto: onnx.TensorShapeProto, shape: ir.Shape) -> None:
    # A shape of rank 0 is stated too, and differs from an unknown one.
    proto.SetInParent()
    for index, dim in enumerate(shape):
        entry = proto.dim.add()
        if isinstance(dim, int):
            entry.dim_value = dim
        elif dim.value is not None:
            entry.dim_param = dim.value
        if denotation := shape.get_denotation(index):
            entry.denotation = denotation


def _raw(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


def _strings_of(tensor: ir.TensorProtocol) -> list[bytes]:
    if isinstance(tensor, ir.StringTensor):
        return list(tensor.string_data())
    return [_raw(s) for s in tensor.numpy().reshape(-1).tolist()]


def _strings(proto: Any, entries: Mapping[str, str]) -> None:
    for key, value in entries.items():
        proto.add(key=key, value=value)


def _opsets(proto: Any, imports: Mapping[str, int]) -> None:
    for domain, version in imports.items():
        proto.add(domain=domain, version=version)


def _with_initializers(graph: ir.Graph) -> list[ir.Value]:
    """Return the inputs as IR version 3 has them: the file's order, then initializers that are new."""
    available = {v.name: v for v in (*graph.inputs, *graph.initializers.values())}
    order = graph.meta.get(INPUT_ORDER, ())
    return [available[name] for name in dict.fromkeys([*order, *available]) if name in available]


def _annotations(graph: ir.Graph) -> dict[str, dict[str, str]]:
    """Return value name -> quantization annotation, of values that exist."""
    values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
    if VALUE_INFO_ORDER not in graph.meta:
        # Loaded by `onnx_ir`, which keeps them with the values.
        return {v.name: v.meta[_ANNOTATION] for v in values if v.name and _ANNOTATION in v.meta}
    kept = graph.meta.get(ANNOTATIONS)
    if not kept:
        return {}
    existing = {v.name for v in values}
    return {name: annotation for name, annotation in kept.items() if name in existing}


def _has_function(model: ir.Model, value_info: str) -> bool:
    owner = value_info.partition("/")[0]
    domain, _, name = owner.partition("::")
    return (domain, name, "") in model.functions


def tensors(proto: onnx.ModelProto) -> Iterable[onnx.TensorProto]:
    """Yield every dense tensor of a model, in attributes, bodies and functions too."""
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(proto: onnx.GraphProto) -> Iterable[onnx.TensorProto]:
    yield from proto.initializer
    yield from _node_tensors(proto.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterable[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for body in (attribute.g, *attribute.graphs):
                yield from _graph_tensors(body)
