"""From `onnx.ModelProto` to `onnx_ir.Model`, checking on the way what the rest of onnxopt relies on.

Written here rather than taken from `onnx_ir.serde` because that one does not know map and opaque types, sparse
tensors, attributes that are not UTF-8 and `training_info`, and creates values for names that nothing produces.
What the IR has no place for is kept in `graph.meta`, which clones share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import onnx
import onnx_ir as ir

from onnxopt.errors import ModelError
from onnxopt.proto.checks import (
    byte_count,
    check_data,
    check_header,
    check_sparse,
    data_type,
    require_text,
    string_map,
)
from onnxopt.proto.collector import garbage_collection_paused
from onnxopt.proto.datafile import DataFile
from onnxopt.proto.expansion import require_expandable
from onnxopt.proto.folder import Folder
from onnxopt.proto.keys import (
    ANNOTATIONS,
    FIRST_IR_WITH_CONSTANTS,
    FUNCTION_VALUE_INFO,
    HAD_EXTERNAL_DATA,
    INPUT_ORDER,
    TRAINING_INFO,
    TYPES,
    VALUE_INFO_ORDER,
)
from onnxopt.proto.order import sort
from onnxopt.proto.tensors import EmbeddedTensor, Region, SparseTensor
from onnxopt.proto.types import shape_of, type_attribute, type_of
from onnxopt.proto.wire import Markers

_A = ir.AttributeType


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the data of a model's tensors is.

    Attributes:
        folder: Where external data lies.
        file: The .onnx file, where large raw data was left in it; None when the ModelProto is complete.
        markers: What stands for the data that was left in the file.
    """

    folder: Folder
    file: DataFile | None = None
    markers: Markers | None = None


def decode(proto: onnx.ModelProto, source: Source) -> ir.Model:
    """Return the model; its tensors refer to the proto and to files.

    Raises:
        ModelError: If something is malformed, missing or newer than the installed onnx.
    """
    check_header(proto)
    with garbage_collection_paused():
        return _Decoder(source, proto.ir_version).model(proto)


class _Values:
    """The values of one graph by name, and which of them no node has produced yet."""

    def __init__(self) -> None:
        self.by_name: dict[str, ir.Value] = {}
        self.pending: set[str] = set()
        self.unsorted = False

    def add(self, name: str, what: str) -> ir.Value:
        require_text(name)
        if name in self.by_name:
            raise ModelError(f'{what} has the name "{name}", which another value of the same graph has already.')
        value = self.by_name[name] = ir.Value(name=name)
        return value


class _Decoder:
    """One walk over a ModelProto."""

    def __init__(self, source: Source, ir_version: int) -> None:
        self._source = source
        self._ir_version = ir_version
        self._configurations: dict[str, ir.ModelConfiguration] = {}

    def model(self, proto: onnx.ModelProto) -> ir.Model:
        configurations = tuple(ir.serde.deserialize_model_configuration(c) for c in proto.configuration)
        self._configurations = {c.name: c for c in configurations}
        graph = self._graph(proto.graph, [])
        graph.opset_imports.update(_opsets(proto.opset_import))
        if self._ir_version < FIRST_IR_WITH_CONSTANTS:
            _take_out_initializers(graph)
        functions = self._functions(proto, graph)
        require_expandable(graph, functions)
        if self._source.folder.is_used:
            graph.meta[HAD_EXTERNAL_DATA] = True
        if proto.training_info:
            graph.meta[TRAINING_INFO] = tuple(proto.training_info)
        return ir.Model(
            graph,
            ir_version=proto.ir_version,
            producer_name=_optional(proto, "producer_name"),
            producer_version=_optional(proto, "producer_version"),
            domain=_optional(proto, "domain"),
            model_version=_optional(proto, "model_version"),
            doc_string=_optional(proto, "doc_string"),
            functions=functions,
            metadata_props=string_map(proto.metadata_props),
            device_configurations=configurations,
        )

    def _functions(self, proto: onnx.ModelProto, graph: ir.Graph) -> list[ir.Function]:
        functions = {}
        for entry in proto.functions:
            function = self._function(entry)
            if function.identifier() in functions:
                raise ModelError(f'the function "{entry.domain}::{entry.name}" is defined twice.')
            functions[function.identifier()] = function
        described = [i for i in proto.graph.value_info if _names_function(i.name, functions)]
        if described:
            graph.meta[FUNCTION_VALUE_INFO] = tuple(described)
        return list(functions.values())

    def _graph(self, proto: onnx.GraphProto, outer: list[_Values]) -> ir.Graph:
        values = _Values()
        types: dict[str, onnx.TypeProto] = {}
        inputs = []
        for info in proto.input:
            value = values.add(info.name, "an input")
            _describe(value, info, types)
            inputs.append(value)
        infos = {info.name: info for info in proto.value_info}
        initializers = self._initializers(proto, values, infos, types)
        nodes = self._nodes(proto.node, [*outer, values], infos, types)
        outputs = []
        for info in proto.output:
            if info.name not in values.by_name:
                raise ModelError(_unknown_output(info.name, proto.name, outer))
            value = values.by_name[info.name]
            _describe(value, info, types)
            outputs.append(value)
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=nodes,
            initializers=initializers,
            doc_string=_optional(proto, "doc_string"),
            name=_optional(proto, "name"),
            metadata_props=string_map(proto.metadata_props),
        )
        graph.meta[VALUE_INFO_ORDER] = tuple(infos)
        if types:
            graph.meta[TYPES] = types
        if proto.quantization_annotation:
            graph.meta[ANNOTATIONS] = {
                a.tensor_name: string_map(a.quant_parameter_tensor_names) or {} for a in proto.quantization_annotation
            }
        if values.unsorted:
            sort(graph, f'the graph "{proto.name}"')
        return graph

    def _initializers(
        self,
        proto: onnx.GraphProto,
        values: _Values,
        infos: dict[str, onnx.ValueInfoProto],
        types: dict[str, onnx.TypeProto],
    ) -> list[ir.Value]:
        tensors = [(t.name, self._tensor(t, "the initializer")) for t in proto.initializer]
        tensors += [(s.values.name, SparseTensor(s)) for s in proto.sparse_initializer]
        found: dict[str, ir.Value] = {}
        for name, tensor in tensors:
            if not name:
                raise ModelError("an initializer has no name.")
            if name in found:
                raise ModelError(f'there are two initializers with the name "{name}".')
            value = values.by_name.get(name)
            if value is None:
                value = values.add(name, "an initializer")
                value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
                if name in infos:
                    _describe(value, infos[name], types)
            value.const_value = tensor
            found[name] = value
        return list(found.values())

    def _nodes(
        self,
        protos: Sequence[onnx.NodeProto],
        scopes: list[_Values],
        infos: dict[str, onnx.ValueInfoProto],
        types: dict[str, onnx.TypeProto],
    ) -> list[ir.Node]:
        values = scopes[-1]
        # Declared first: nodes may be out of order, and bodies may use what the outer graph computes later.
        for proto in protos:
            for name in proto.output:
                if name:
                    value = values.add(name, f"an output of {_node_label(proto)}")
                    values.pending.add(name)
                    if name in infos:
                        _describe(value, infos[name], types)
        return [self._node(proto, scopes) for proto in protos]

    def _node(self, proto: onnx.NodeProto, scopes: list[_Values]) -> ir.Node:
        inputs = [_find(name, scopes, proto) if name else None for name in proto.input]
        attributes = [self._attribute(a, scopes) for a in proto.attribute]
        if len({a.name for a in attributes}) != len(attributes):
            raise ModelError(f"{_node_label(proto)} has an attribute twice.")
        values = scopes[-1]
        outputs = [values.by_name[name] if name else ir.Value(name="") for name in proto.output]
        values.pending.difference_update(proto.output)
        require_text(proto.name, proto.op_type, proto.domain, proto.overload)
        if not proto.op_type:
            raise ModelError(f"{_node_label(proto)} names no operator.")
        return ir.Node(
            proto.domain,
            proto.op_type,
            inputs,
            attributes,
            overload=proto.overload,
            outputs=outputs,
            name=proto.name,
            doc_string=_optional(proto, "doc_string"),
            metadata_props=string_map(proto.metadata_props),
            device_configurations=self._devices(proto, scopes) if proto.device_configurations else (),
        )

    def _devices(self, proto: onnx.NodeProto, scopes: list[_Values]) -> tuple[ir.NodeDeviceConfiguration, ...]:
        visible: dict[str, ir.Value] = {}
        for scope in scopes:
            visible.update(scope.by_name)
        found = []
        for entry in proto.device_configurations:
            decoded = ir.serde.deserialize_node_device_configuration(entry, values=visible)
            known = self._configurations.get(entry.configuration_id)
            found.append(dataclasses.replace(decoded, configuration=known) if known else decoded)
        return tuple(found)

    def _attribute(self, proto: onnx.AttributeProto, scopes: list[_Values]) -> ir.Attr:
        kind = _attribute_type(proto)
        doc = _optional(proto, "doc_string")
        require_text(proto.name, proto.ref_attr_name)
        if proto.ref_attr_name:
            return ir.RefAttr(proto.name, proto.ref_attr_name, kind, doc_string=doc)
        value: object = None
        if kind in _PLAIN:
            value = getattr(proto, _PLAIN[kind])
        elif kind == _A.STRING:
            value = _text(proto.s)
        elif kind == _A.STRINGS:
            value = [_text(s) for s in proto.strings]
        elif kind == _A.TENSOR:
            value = self._tensor(proto.t, f'the attribute "{proto.name}"')
        elif kind == _A.TENSORS:
            value = [self._tensor(t, f'the attribute "{proto.name}"') for t in proto.tensors]
        elif kind == _A.GRAPH:
            value = self._graph(proto.g, scopes)
        elif kind == _A.GRAPHS:
            value = [self._graph(g, scopes) for g in proto.graphs]
        elif kind == _A.SPARSE_TENSOR:
            value = _sparse(proto.sparse_tensor, proto.name)
        elif kind == _A.SPARSE_TENSORS:
            value = tuple(_sparse(s, proto.name) for s in proto.sparse_tensors)
        elif kind == _A.TYPE_PROTO:
            value = type_attribute(proto.tp, proto.name)
        elif kind == _A.TYPE_PROTOS:
            value = [type_attribute(t, proto.name) for t in proto.type_protos]
        return ir.Attr(proto.name, kind, value, doc_string=doc)

    def _tensor(self, proto: onnx.TensorProto, what: str) -> ir.TensorProtocol:
        require_text(proto.name, proto.doc_string)
        label = f'{what} "{proto.name}"' if proto.name else what
        dtype = data_type(proto)
        if proto.HasField("segment"):
            raise ModelError(f"{label} is stored in segments, which no runtime reads; export the model again.")
        if proto.data_location == onnx.TensorProto.EXTERNAL:
            return self._source.folder.tensor(proto, dtype, label)
        if proto.HasField("raw_data") and self._source.markers is not None:
            place = self._source.markers.read(proto.raw_data)
            if place is not None:
                return self._in_file(proto, dtype, place, label)
        check_data(proto, dtype, label)
        if dtype == ir.DataType.STRING:
            return ir.serde.deserialize_tensor(proto)
        return ir.serde.TensorProtoTensor(proto)

    def _in_file(
        self, proto: onnx.TensorProto, dtype: ir.DataType, place: tuple[int, int], label: str
    ) -> ir.TensorProtocol:
        offset, length = place
        expected = byte_count(dtype, proto.dims, label)
        if length != expected or dtype == ir.DataType.STRING:
            raise ModelError(
                f"{label} has the shape {list(proto.dims)} of {dtype.name}, which takes {expected} bytes, but "
                f"holds {length}: the file is damaged."
            )
        assert self._source.file is not None, "markers are made for a file"
        return EmbeddedTensor(
            Region(self._source.file, offset, length, dtype), ir.Shape(proto.dims, frozen=True), proto
        )

    def _function(self, proto: onnx.FunctionProto) -> ir.Function:
        values = _Values()
        types: dict[str, onnx.TypeProto] = {}
        infos = {info.name: info for info in proto.value_info}
        inputs = []
        label = f'the function "{proto.domain}::{proto.name}"'
        require_text(proto.domain, proto.name, proto.overload, *proto.attribute)
        for name in proto.input:
            value = values.add(name, f"an input of {label}")
            if name in infos:
                _describe(value, infos[name], types)
            inputs.append(value)
        nodes = self._nodes(proto.node, [values], infos, types)
        missing = [name for name in proto.output if name not in values.by_name]
        if missing:
            raise ModelError(f'the output "{missing[0]}" of {label} is computed by no node.')
        graph = ir.Graph(
            inputs,
            [values.by_name[name] for name in proto.output],
            nodes=nodes,
            doc_string=_optional(proto, "doc_string"),
            opset_imports=_opsets(proto.opset_import),
            metadata_props=string_map(proto.metadata_props),
        )
        graph.meta[VALUE_INFO_ORDER] = tuple(infos)
        if types:
            graph.meta[TYPES] = types
        if values.unsorted:
            sort(graph, label)
        attributes = [self._attribute(a, []) for a in proto.attribute_proto]
        attributes += [ir.Attr(name, _A.UNDEFINED, None) for name in proto.attribute]
        return ir.Function(proto.domain, proto.name, proto.overload, graph=graph, attributes=attributes)


_PLAIN = {_A.FLOAT: "f", _A.INT: "i", _A.FLOATS: "floats", _A.INTS: "ints"}
_FIELDS = {
    **_PLAIN,
    _A.STRING: "s",
    _A.STRINGS: "strings",
    _A.TENSOR: "t",
    _A.TENSORS: "tensors",
    _A.GRAPH: "g",
    _A.GRAPHS: "graphs",
    _A.SPARSE_TENSOR: "sparse_tensor",
    _A.SPARSE_TENSORS: "sparse_tensors",
    _A.TYPE_PROTO: "tp",
    _A.TYPE_PROTOS: "type_protos",
}


def _attribute_type(proto: onnx.AttributeProto) -> ir.AttributeType:
    """Return the type an attribute states, or that of the field in use: before IR version 2 none was stated."""
    if proto.type:
        return ir.AttributeType(proto.type)
    used = {field.name for field, _ in proto.ListFields()}
    kind = next((k for k, name in _FIELDS.items() if name in used), _A.UNDEFINED)
    # A type that the installed onnx does not know reads as none.
    if kind == _A.UNDEFINED and not proto.ref_attr_name:
        raise ModelError(f'the attribute "{proto.name}" has no value that onnx {onnx.__version__} knows.')
    return kind


def _optional(proto: Any, field: str) -> Any:
    """Return what a field holds, or None where it is absent (an empty text can be stated)."""
    if not proto.HasField(field):
        return None
    value = getattr(proto, field)
    if isinstance(value, bytes):
        require_text(value)
    return value


def _text(raw: bytes) -> str | bytes:
    """Return a string attribute; bytes where it is not UTF-8, which custom operators use."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _sparse(proto: onnx.SparseTensorProto, name: str) -> onnx.SparseTensorProto:
    check_sparse(proto, data_type(proto.values), f'the sparse tensor in the attribute "{name}"')
    return proto


def _describe(value: ir.Value, info: onnx.ValueInfoProto, types: dict[str, onnx.TypeProto]) -> None:
    """Give a value what a ValueInfoProto says about it."""
    if info.HasField("type"):
        kind = type_of(info.type)
        if kind is None and info.type.WhichOneof("value") is not None:
            types[info.name] = info.type
        value.type, value.shape = kind, shape_of(info.type)
    if info.metadata_props:
        value.metadata_props.update(string_map(info.metadata_props) or {})
    if info.doc_string:
        require_text(info.doc_string)
        value.doc_string = info.doc_string


def _find(name: str, scopes: list[_Values], proto: onnx.NodeProto) -> ir.Value:
    for scope in reversed(scopes):
        value = scope.by_name.get(name)
        if value is not None:
            if name in scope.pending:
                scope.unsorted = True
            return value
    raise ModelError(f'{_node_label(proto)} uses "{name}", which is no input, no initializer and computed by no node.')


def _node_label(proto: onnx.NodeProto) -> str:
    name = proto.name or next((o for o in proto.output if o), "")
    return f'the node "{name}" ({proto.op_type})'


def _unknown_output(name: str, graph: str, outer: list[_Values]) -> str:
    if any(name in scope.by_name for scope in outer):
        return (
            f'the body "{graph}" returns "{name}" of the graph around it directly, which runtimes refuse; put an '
            "Identity node in between."
        )
    return f'the output "{name}" of the graph "{graph}" is computed by no node.'


def _opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {entry.domain: entry.version for entry in imports}


def _names_function(name: str, functions: dict[tuple[str, str, str], ir.Function]) -> bool:
    """Whether a `value_info` entry is about a value of a function: "domain::name/value"."""
    owner, slash, _ = name.partition("/")
    domain, colons, function = owner.partition("::")
    return bool(slash and colons) and (domain, function, "") in functions


def _take_out_initializers(graph: ir.Graph) -> None:
    graph.meta[INPUT_ORDER] = tuple(v.name for v in graph.inputs)
    kept = [v for v in graph.inputs if not v.is_initializer()]
    if len(kept) != len(graph.inputs):
        graph.inputs[:] = kept
