"""Facts about a model: what it is made of, how large it is and what one run costs."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import onnx
import onnx_ir as ir

from onnxopt.analysis.fills import filled_elements
from onnxopt.analysis.flops import Flops, count
from onnxopt.analysis.size import model_size
from onnxopt.analysis.weights import dtype_name
from onnxopt.graph import STANDARD_DOMAINS, Scope, attribute, has_references, is_op, scopes

LARGEST = 10
"""So many of the largest constants are named."""

INDEX_TYPES = frozenset({ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.STRING})
"""Constants of these types hold shapes and indices; their elements are no parameters."""
_ONNX_DOMAINS = ("ai.onnx.ml", "ai.onnx.preview.training", "ai.onnx.preview", "ai.onnx.training")


@dataclasses.dataclass(frozen=True, slots=True)
class ModelStats:
    """The size of a model in four numbers.

    Attributes:
        nodes: Nodes, those of nested graphs and functions included.
        parameters: Elements of all constants but the int32, int64, bool and string ones, which hold shapes and
            indices. A constant that several nodes use counts once; one that a node fills with one number counts as if
            it were stored.
        bytes: What the model takes in files: the .onnx file and its data files.
        initializer_bytes: What of that are elements of initializers.
    """

    nodes: int
    parameters: int
    bytes: int
    initializer_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class ValueFacts:
    """An input or output of the model.

    Attributes:
        name: Its name.
        type: Its type, e.g. "float32" or "sequence of int64".
        shape: A number, a name or "?" per axis; None when not even the rank is declared.
    """

    name: str
    type: str
    shape: tuple[int | str, ...] | None


@dataclasses.dataclass(frozen=True, slots=True)
class ConstantFacts:
    """A constant tensor.

    Attributes:
        name: Its name.
        graph: Path of the graph that holds it; empty for the main graph.
        type: Element type.
        shape: Its dimensions.
        bytes: Of its elements.
    """

    name: str
    graph: str
    type: str
    shape: tuple[int, ...]
    bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class TypeFacts:
    """All constants of one element type.

    Attributes:
        type: Element type.
        constants: How many there are.
        elements: Their elements.
        bytes: Of their elements.
    """

    type: str
    constants: int
    elements: int
    bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class FunctionFacts:
    """A function of the model.

    Attributes:
        name: "domain::name", with "::overload" where it has one.
        nodes: Nodes in its body.
        calls: Nodes that call it.
    """

    name: str
    nodes: int
    calls: int


@dataclasses.dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model is made of. Holds numbers, text and tuples only.

    Attributes:
        name: Name of the main graph.
        ir_version: Version of the ONNX file format.
        producer: Name and version of the program that wrote it.
        opsets: (domain, version), the standard domain first as "ai.onnx".
        stats: Its size in four numbers.
        ops: (operator, how often), most frequent first; with its domain in front unless that is the standard one.
            Nested graphs and functions included.
        nested_graphs: Bodies of If, Loop, Scan and the like.
        functions: The functions it defines.
        inputs: Its inputs, in order; initializers that can be overridden are not among them.
        outputs: Its outputs, in order.
        overridable: Names of initializers that the caller can override.
        dynamic_axes: (name, where), where being e.g. "input_ids[1]"; axes without a name are listed under "?".
        constants: Initializers and Constant nodes by element type, most bytes first.
        largest: The constants with the most bytes.
        external_files: (location, bytes used) of the data files next to the model.
        custom_ops: (operator, how often) outside of the ONNX standard that are no functions of the model.
        unknown_ops: (operator, how often) in a domain of ONNX, but not in the version the model imports.
        metadata: The key-value pairs the model carries.
        flops: What one run costs.
    """

    name: str
    ir_version: int
    producer: str
    opsets: tuple[tuple[str, int], ...]
    stats: ModelStats
    ops: tuple[tuple[str, int], ...]
    nested_graphs: int
    functions: tuple[FunctionFacts, ...]
    inputs: tuple[ValueFacts, ...]
    outputs: tuple[ValueFacts, ...]
    overridable: tuple[str, ...]
    dynamic_axes: tuple[tuple[str, tuple[str, ...]], ...]
    constants: tuple[TypeFacts, ...]
    largest: tuple[ConstantFacts, ...]
    external_files: tuple[tuple[str, int], ...]
    custom_ops: tuple[tuple[str, int], ...]
    unknown_ops: tuple[tuple[str, int], ...]
    metadata: tuple[tuple[str, str], ...]
    flops: Flops


def summary_stats(model: ir.Model) -> ModelStats:
    """Return the size of a model in four numbers. Reads no weights; costs one walk over the model."""
    size = model_size(model)
    shared = {_identity(tensor): tensor for tensor in size.constants}
    parameters = sum(tensor.size for tensor in shared.values() if tensor.dtype not in INDEX_TYPES)
    parameters += filled_elements(model, but=INDEX_TYPES)
    return ModelStats(size.nodes, parameters, size.bytes, size.initializer_bytes)


def inspect(model: ir.Model, sizes: Mapping[str, int] | None = None) -> ModelFacts:
    """Return the facts about a model. Reads no weights.

    Args:
        model: The model; it is not changed.
        sizes: Sizes of named dynamic axes, for the cost of a run. Axes that are not named here count as 1.
    """
    walked = list(scopes(model))
    constants = _constants(walked)
    ops = [(scope, collections.Counter(node.op_identifier() for node in scope.graph)) for scope in walked]
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    return ModelFacts(
        name=model.graph.name or "",
        ir_version=model.ir_version or 0,
        producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
        opsets=_opsets(model.opset_imports),
        stats=summary_stats(model),
        ops=_ranked(_full_name(op, n) for _, counts in ops for op, n in counts.items()),
        nested_graphs=sum(scope.nested for scope in walked),
        functions=_functions(model, ops),
        inputs=tuple(map(_value, inputs)),
        outputs=tuple(map(_value, model.graph.outputs)),
        overridable=tuple(v.name or "" for v in model.graph.inputs if v.is_initializer()),
        dynamic_axes=_dynamic_axes([*inputs, *model.graph.outputs]),
        constants=_by_type(constants),
        largest=_largest(constants),
        external_files=_external_files(constants),
        custom_ops=_outsiders(model, ops, "custom"),
        unknown_ops=_outsiders(model, ops, "unknown"),
        metadata=tuple(sorted(model.metadata_props.items())),
        flops=count(model, sizes),
    )


# Constants ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Constant:
    name: str
    graph: str
    tensor: ir.TensorProtocol


def _constants(walked: Iterable[Scope]) -> list[_Constant]:
    """Return initializers and Constant nodes; data that several of them share is listed once."""
    found: dict[object, _Constant] = {}
    for scope in walked:
        for name, tensor in _constants_of(scope):
            found.setdefault(_identity(tensor), _Constant(name, scope.path, tensor))
    return list(found.values())


def _constants_of(scope: Scope) -> Iterator[tuple[str, ir.TensorProtocol]]:
    for value in scope.graph.initializers.values():
        if value.const_value is not None:
            yield value.name or "", value.const_value
    for node in scope.graph:
        if is_op(node, "Constant") and not has_references(node) and "value" in node.attributes:
            yield node.outputs[0].name or "", attribute(node, "value")


def _identity(tensor: ir.TensorProtocol) -> object:
    """Return what two tensors have in common when they are the same bytes of the same file, or the same object."""
    if isinstance(tensor, ir.ExternalTensor):
        return str(tensor.path), tensor.offset, tensor.nbytes
    return id(tensor)


def _by_type(constants: Iterable[_Constant]) -> tuple[TypeFacts, ...]:
    groups: dict[str, list[ir.TensorProtocol]] = {}
    for constant in constants:
        groups.setdefault(dtype_name(constant.tensor.dtype), []).append(constant.tensor)
    facts = [
        TypeFacts(name, len(tensors), sum(t.size for t in tensors), sum(t.nbytes for t in tensors))
        for name, tensors in groups.items()
    ]
    return tuple(sorted(facts, key=lambda f: (-f.bytes, f.type)))


def _largest(constants: Iterable[_Constant]) -> tuple[ConstantFacts, ...]:
    order = sorted(constants, key=lambda c: -c.tensor.nbytes)[:LARGEST]
    return tuple(
        ConstantFacts(c.name, c.graph, dtype_name(c.tensor.dtype), tuple(c.tensor.shape.numpy()), c.tensor.nbytes)
        for c in order
    )


def _external_files(constants: Iterable[_Constant]) -> tuple[tuple[str, int], ...]:
    used: collections.Counter[str] = collections.Counter()
    for constant in constants:
        if isinstance(constant.tensor, ir.ExternalTensor):
            used[str(constant.tensor.location)] += constant.tensor.nbytes
    return tuple(sorted(used.items()))


# Operators ------------------------------------------------------------------------------------------------

_Ops = Iterable[tuple[Scope, Mapping[ir.OperatorIdentifier, int]]]
"""How often each graph uses each operator."""


def _full_name(op: ir.OperatorIdentifier, times: int) -> tuple[str, int]:
    domain, name, _ = op
    return (name if domain in STANDARD_DOMAINS else f"{domain}.{name}"), times


def _ranked(counts: Iterable[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """Add up by name, and put the largest first."""
    total: collections.Counter[str] = collections.Counter()
    for name, times in counts:
        total[name] += times
    return tuple(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def _functions(model: ir.Model, ops: _Ops) -> tuple[FunctionFacts, ...]:
    return tuple(
        FunctionFacts(
            "::".join(filter(None, identifier)),
            len(function.graph),
            sum(counts.get(identifier, 0) for _, counts in ops),
        )
        for identifier, function in model.functions.items()
    )


def _outsiders(model: ir.Model, ops: _Ops, wanted: str) -> tuple[tuple[str, int], ...]:
    """Return the operators of one standing that are no functions of the model."""
    return _ranked(
        _full_name(op, times)
        for scope, counts in ops
        for op, times in counts.items()
        if op not in model.functions and _standing(op, scope) == wanted
    )


def _standing(op: ir.OperatorIdentifier, scope: Scope) -> str:
    """Return "custom" outside of the ONNX standard, "unknown" if the imported version lacks it, else "known"."""
    domain, name, _ = op
    standard = domain in STANDARD_DOMAINS
    if not standard and domain not in _ONNX_DOMAINS:
        return "custom"
    try:
        schema = onnx.defs.get_schema(
            name, scope.opset if standard else scope.opsets.get(domain, 0), "" if standard else domain
        )
    except onnx.defs.SchemaError:
        return "unknown"
    return "unknown" if schema.deprecated else "known"


# Interface ------------------------------------------------------------------------------------------------


def _type(kind: ir.TypeProtocol | None) -> str:
    if isinstance(kind, ir.TensorType):
        return dtype_name(kind.dtype)
    if isinstance(kind, ir.SparseTensorType):
        return f"sparse {dtype_name(kind.dtype)}"
    if isinstance(kind, ir.SequenceType):
        return f"sequence of {_type(kind.elem_type)}"
    if isinstance(kind, ir.OptionalType):
        return f"optional {_type(kind.elem_type)}"
    return "?"


def _value(value: ir.Value) -> ValueFacts:
    shape = None if value.shape is None else tuple(_dimension(dim) for dim in value.shape)
    return ValueFacts(value.name or "", _type(value.type), shape)


def _dimension(dim: int | ir.SymbolicDim) -> int | str:
    return dim if isinstance(dim, int) else str(dim.value or "?")


def _dynamic_axes(values: Iterable[ir.Value]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    where: dict[str, list[str]] = {}
    for value in values:
        for axis, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int):
                where.setdefault(str(_dimension(dim)), []).append(f"{value.name}:{axis}")
    return tuple((name, tuple(places)) for name, places in where.items())


def _opsets(imports: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    named = {("ai.onnx" if domain in STANDARD_DOMAINS else domain): version for domain, version in imports.items()}
    return tuple(sorted(named.items(), key=lambda item: (item[0] != "ai.onnx", item[0])))
