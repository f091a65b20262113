"""How many bytes a model takes in files, counted without writing it: no weight is read, no protobuf is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from onnxopt.proto.encode import encode_attribute, encode_type
from onnxopt.proto.keys import FIRST_IR_WITH_CONSTANTS, VALUE_INFO_ORDER

_WIDE_TAG = 1
"""Field numbers of 16 and more take a second byte."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSize:
    """How large a model is.

    Attributes:
        bytes: What it takes in files: the .onnx file and the data files next to it.
        initializer_bytes: What of that are elements of initializers, those of nested graphs included.
        nodes: Nodes, those of nested graphs and functions included.
        constants: The tensors of initializers and Constant nodes, each object once.
    """

    bytes: int
    initializer_bytes: int
    nodes: int
    constants: tuple[ir.TensorProtocol, ...]


def model_size(model: ir.Model) -> ModelSize:
    """Count what a model takes when it is saved as it stands, in one walk.

    Elements count the same wherever they lie; where a data file pads between tensors, the padding is not counted.
    """
    counter = _Counter()
    total = counter.model(model)
    return ModelSize(total, counter.initializer_bytes, counter.nodes, tuple(counter.constants.values()))


class _Counter:
    """Walks one model. Each method returns the bytes of one message, without the field it is in."""

    def __init__(self) -> None:
        self.initializer_bytes = 0
        self.nodes = 0
        self.constants: dict[int, ir.TensorProtocol] = {}

    def model(self, model: ir.Model) -> int:
        total = _number(model.ir_version or 0) + (_number(model.model_version) if model.model_version else 0)
        total += _texts(model.producer_name, model.producer_version, model.domain, model.doc_string)
        total += _opsets(model.opset_imports) + _pairs(model.metadata_props)
        total += _field(self.graph(model.graph) + _as_inputs(model))
        return total + sum(_WIDE_TAG + _field(self.function(f)) for f in model.functions.values())

    def graph(self, graph: ir.Graph) -> int:
        total = _texts(graph.name, graph.doc_string) + _pairs(graph.metadata_props, _WIDE_TAG)
        total += sum(_field(_value_info(value)) for value in (*graph.inputs, *graph.outputs))
        listed = frozenset(graph.meta.get(VALUE_INFO_ORDER, ()))
        total += sum(_declaration(v) for v in (*graph.inputs, *graph.outputs) if v.name in listed)
        for value in graph.initializers.values():
            # what its tensor says is not said again, unless the file that was read did
            if not value.is_graph_input() and (value.name in listed or value.doc_string or value.metadata_props):
                total += _declaration(value)
            tensor = value.const_value
            if tensor is not None:
                self.constants[id(tensor)] = tensor
                self.initializer_bytes += tensor.nbytes
                total += _field(_tensor(tensor))
        for node in graph:
            total += _field(self.node(node))
            for output in node.outputs:
                if not output.is_graph_output():
                    total += _declaration(output)
        return total

    def function(self, function: ir.Function) -> int:
        total = _texts(function.name, function.domain, function.overload, function.doc_string)
        total += _opsets(function.opset_imports) + _pairs(function.metadata_props)
        total += _texts(*(v.name for v in function.inputs), *(v.name for v in function.outputs))
        for attribute in function.attributes.values():
            default = attribute.value is not None
            total += _field(self.attribute(attribute)) if default else _text(attribute.name)
        for node in function:
            total += _field(self.node(node)) + sum(map(_declaration, node.outputs))
        return total + sum(map(_declaration, function.inputs))

    def node(self, node: ir.Node) -> int:
        self.nodes += 1
        total = _texts(node.op_type, node.domain, node.name, node.overload, node.doc_string)
        total += _pairs(node.metadata_props)
        for value in (*node.inputs, *node.outputs):
            # An optional one that is left out is an empty text: two bytes.
            total += 2 if value is None or not value.name else _text(value.name)
        for attribute in node.attributes.values():
            total += _field(self.attribute(attribute))
            if node.op_type == "Constant" and attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                self.constants[id(attribute.value)] = attribute.value
        return total

    def attribute(self, attribute: ir.Attr) -> int:
        # Name, and the type as a field of three bytes.
        total = _texts(attribute.name, attribute.doc_string) + 3
        value, kinds = attribute.value, ir.AttributeType
        if attribute.is_ref():
            return total + _WIDE_TAG + _text(attribute.ref_attr_name)
        match attribute.type:
            case kinds.INT:
                return total + _number(value)
            case kinds.FLOAT:
                return total + 5
            case kinds.STRING:
                return total + _field(_length(value))
            case kinds.INTS:
                return total + sum(map(_number, value))
            case kinds.FLOATS:
                return total + 5 * len(value)
            case kinds.STRINGS:
                return total + sum(_field(_length(text)) for text in value)
            case kinds.TENSOR:
                return total + _field(_tensor(value))
            case kinds.GRAPH:
                return total + _field(self.graph(value))
            case kinds.GRAPHS:
                return total + sum(_field(self.graph(graph)) for graph in value)
        return int(encode_attribute(attribute).ByteSize())


def _varint(number: int) -> int:
    """Return the bytes of a variable-length integer."""
    return (number.bit_length() + 6) // 7 or 1 if number >= 0 else 10


def _number(number: int) -> int:
    """Return the bytes of an integer field."""
    return 1 + _varint(number)


def _field(length: int) -> int:
    """Return the bytes of a field that holds a message or text of this length."""
    return length + 2 if length < 128 else 1 + _varint(length) + length


def _length(text: str | bytes) -> int:
    return len(text) if isinstance(text, bytes) or text.isascii() else len(text.encode())


def _text(text: str | None) -> int:
    """Return the bytes of a text field; an empty one is not written."""
    return _field(_length(text)) if text else 0


def _texts(*texts: str | None) -> int:
    total = 0
    for text in texts:
        if text:
            total += _field(_length(text))
    return total


def _pairs(entries: Mapping[str, str], tag: int = 0) -> int:
    return sum(tag + _field(_texts(key, value)) for key, value in entries.items()) if entries else 0


def _opsets(imports: Mapping[str, int]) -> int:
    return sum(_field(_field(_length(domain)) + _number(version)) for domain, version in imports.items())


def _as_inputs(model: ir.Model) -> int:
    """Return the bytes of initializers that are inputs too, which an old version of the format makes of them all."""
    if model.ir_version >= FIRST_IR_WITH_CONSTANTS:
        return 0
    initializers = model.graph.initializers.values()
    return sum(_field(_value_info(value)) for value in initializers if not value.is_graph_input())


def _declaration(value: ir.Value) -> int:
    """Return the bytes of the field that declares a value's type in its graph, if it gets one."""
    if value.name and (value.type is not None or value.shape is not None or value.doc_string):
        return _field(_value_info(value))
    return 0


def _value_info(value: ir.Value) -> int:
    total = _texts(value.name, value.doc_string) + _pairs(value.metadata_props)
    if isinstance(value.type, ir.TensorType) and not value.type.denotation:
        shape = 0 if value.shape is None else _field(_shape(value.shape))
        return total + _field(_field(_number(value.type.dtype.value) + shape))
    return total + (0 if value.type is None else _field(encode_type(value.type, value.shape).ByteSize()))


def _shape(shape: ir.Shape) -> int:
    total = 0
    for dim in shape:
        if isinstance(dim, int):
            total += _field(_number(dim))
        else:
            total += 2 if dim.value is None else _field(_field(_length(dim.value)))
    return total


def _tensor(tensor: ir.TensorProtocol) -> int:
    if isinstance(tensor, ir.serde.TensorProtoTensor) and not tensor.raw.HasField("raw_data"):
        return int(tensor.raw.ByteSize())  # it is written as it was read, one element a field
    total = sum(map(_number, tensor.shape.numpy())) + _number(tensor.dtype.value)
    total += _texts(tensor.name, tensor.doc_string) + _pairs(tensor.metadata_props, _WIDE_TAG)
    if isinstance(tensor, ir.ExternalTensor):
        where = {"location": str(tensor.location), "offset": str(tensor.offset), "length": str(tensor.length)}
        return total + _pairs(where) + 2 + tensor.nbytes
    if tensor.dtype == ir.DataType.STRING:
        return total + sum(_field(len(item)) for item in tensor.numpy().reshape(-1))
    return total + _field(tensor.nbytes)
