"""Helpers over `onnx_ir` that several passes share.

Clones of a model share their tensors, so nothing here writes into a tensor, and initializers are never
renamed (renaming a value renames its tensor, and with it the clone's).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.proto.collector import garbage_collection_paused

STANDARD_DOMAINS = ("", "ai.onnx")
RANDOM_OPS = frozenset(
    [
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Multinomial",
        "Bernoulli",
        "Dropout",
        "BiasDropout",
        "BitmaskDropout",
        "BitmaskBiasDropout",
    ]
)
"""Operators that may return something else for the same inputs."""
OPEN_END = 2**31 - 1
"""Positions of slices from here on lie behind the end of every axis."""
_MANY_OUTPUTS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Scope:
    """One graph of a model: the main graph, a body of If / Loop / Scan, or a function.

    Attributes:
        graph: The graph itself.
        path: "" for the main graph, "node.attribute" chains for nested graphs, "function domain::name" first for
            functions. Stable across clones.
        opsets: Domain -> version that the nodes of this graph are written in: the model's or the function's own.
        function: The function the graph belongs to, if any.
        nested: True when the graph is an attribute of a node, so that its nodes may use values of outer graphs.
    """

    graph: ir.Graph
    path: str
    opsets: dict[str, int]
    function: ir.Function | None
    nested: bool

    @property
    def opset(self) -> int:
        """Version of the standard ONNX operator set in this graph; 0 when it imports none."""
        return self.opsets.get("", self.opsets.get("ai.onnx", 0))


def scopes(model: ir.Model) -> Iterator[Scope]:
    """Yield every graph of the model, outer before inner, functions last.

    Nodes may be removed and added while iterating; bodies of nodes that are gone by then are not visited.
    """
    for root in root_scopes(model):
        yield from _with_inner(root)


def root_scopes(model: ir.Model) -> Iterator[Scope]:
    """Yield the main graph, then each function's graph; `inner_scopes` leads from there into nested graphs."""
    yield Scope(model.graph, "", model.opset_imports, None, nested=False)
    for function in list(model.functions.values()):
        overload = f"::{function.overload}" if function.overload else ""
        path = f"function {function.domain}::{function.name}{overload}"
        yield Scope(function.graph, path, function.opset_imports, function, nested=False)


def inner_scopes(scope: Scope, node: ir.Node) -> Iterator[Scope]:
    """Yield the graphs that a node of the scope carries, not those inside them."""
    for name, body in bodies(node):
        inner = f"{node.name or first_output(node)}.{name}"
        path = f"{scope.path}/{inner}" if scope.path else inner
        yield Scope(body, path, scope.opsets, scope.function, nested=True)


def _with_inner(scope: Scope) -> Iterator[Scope]:
    yield scope
    for node in scope.graph:
        for inner in inner_scopes(scope, node):
            yield from _with_inner(inner)


def copied(model: ir.Model) -> ir.Model:
    """Return a copy of a model's graphs; tensors are shared."""
    with garbage_collection_paused():
        copy = model.clone()
    copy.meta.update(model.meta)
    return copy


def bodies(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    """Yield (attribute name, graph) for each graph a node carries."""
    # `.data` is the plain dictionary inside; iterating over the wrapper takes five times as long.
    for name, attribute in node.attributes.data.items():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield name, attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            for index, graph in enumerate(attribute.as_graphs()):
                yield f"{name}[{index}]", graph


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Yield every node of the model, nested graphs and functions included."""
    for scope in scopes(model):
        yield from scope.graph


def is_op(node: ir.Node | None, *op_types: str, domain: str = "") -> bool:
    """Whether the node is one of these operators of the domain ("" is the standard one)."""
    if node is None or node.op_type not in op_types:
        return False
    return node.domain == domain or (domain == "" and node.domain in STANDARD_DOMAINS)


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Return the value of an attribute, or the default when it is absent.

    Strings come as str, lists as tuples. Check `has_references` first: inside a function an attribute can refer
    to one of the caller's, and then its value is not known here.

    Raises:
        ValueError: If the attribute is such a reference.
    """
    found = node.attributes.get(name)
    if found is None:
        return default
    if found.is_ref():
        raise ValueError(f"attribute {name} of {node.name} refers to an attribute of the calling node")
    return found.value


def has_references(node: ir.Node) -> bool:
    """Whether any attribute refers to an attribute of the function's caller."""
    return any(a.is_ref() for a in node.attributes.data.values())


_SCALAR_CONSTANTS = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor of a value that nobody can change: a frozen initializer or a Constant node.

    An initializer that is also a graph input can be overridden by the caller and is not constant. (Models of IR
    version 3 must list every initializer as an input; loading takes those out, so they count as constants.)
    """
    if value is None:
        return None
    if value.is_initializer():
        return None if value.is_graph_input() else value.const_value
    node = value.producer()
    if node is None or not is_op(node, "Constant") or has_references(node):
        return None
    if "value" in node.attributes:
        tensor: ir.TensorProtocol = node.attributes["value"].value
        return tensor
    for name, dtype in _SCALAR_CONSTANTS.items():
        if name in node.attributes:
            return ir.tensor(np.asarray(node.attributes[name].value, dtype=dtype))
    return None


def constant_array(value: ir.Value | None, max_bytes: int | None = None) -> np.ndarray | None:
    """Return the constant's array, or None when it is no constant or larger than `max_bytes`.

    The array may be a memory-mapped view of a file: treat it as read-only.
    """
    tensor = constant_tensor(value)
    if tensor is None or (max_bytes is not None and tensor.nbytes > max_bytes):
        return None
    return tensor.numpy()


def constant_scalar(value: ir.Value | None) -> float | None:
    """Return the number of a constant with one numeric element of any rank, or None."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.size != 1 or tensor.dtype == ir.DataType.STRING:
        return None
    return float(tensor.numpy().reshape(()).astype(np.float64))


def constant_ints(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return a constant of integers flattened to a tuple, or None. Meant for shapes, axes and pads."""
    array = constant_array(value, max_bytes=8192)
    if array is None or array.dtype.kind not in "iu":
        return None
    return tuple(int(x) for x in array.reshape(-1))


class Names:
    """Hands out value and node names that collide with nothing in the model."""

    def __init__(self, model: ir.Model) -> None:
        """Collect the names in use; costs one walk over the model."""
        self._used: set[str] = set()
        for scope in scopes(model):
            self._used.update(v.name for v in scope.graph.inputs if v.name)
            self._used.update(scope.graph.initializers)
            for node in scope.graph:
                if node.name:
                    self._used.add(node.name)
                self._used.update(v.name for v in node.outputs if v.name)

    def fresh(self, base: str) -> str:
        """Return `base`, or `base` with the first free number behind it, and reserve it."""
        name, number = base, 1
        while name in self._used:
            name = f"{base}_{number}"
            number += 1
        self._used.add(name)
        return name


def add_constant(
    scope: Scope, names: Names, base: str, array: np.ndarray | ir.TensorProtocol, before: ir.Node
) -> ir.Value:
    """Add a constant to the scope and return its value.

    It becomes an initializer; in a function, which cannot have any, a Constant node in front of `before`.
    """
    name = names.fresh(base)
    tensor = ir.tensor(array, name=name) if isinstance(array, np.ndarray) else named(array, name)
    if scope.function is None:
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        scope.graph.register_initializer(value)
        return value
    node = ir.node("Constant", [], {"value": tensor}, name=name)
    output = node.outputs[0]
    output.name, output.dtype, output.shape = name, tensor.dtype, ir.Shape(tensor.shape.numpy())
    scope.graph.insert_before(before, node)
    return output


def cannot_replace(old: ir.Value, new: ir.Value) -> str | None:
    """Return why the uses of `old` cannot be redirected to `new`, or None.

    `new` must be visible wherever `old` is used; the caller knows that. What is checked here is that the name and
    the declared type of a graph output survive.
    """
    if not old.is_graph_output():
        return None
    if new.is_graph_output():
        return "both values are graph outputs, whose names must stay"
    if new.producer() is None:
        return "a graph input or initializer cannot take the name of a graph output"
    if new.graph is not old.graph:
        return "the graph output would come from an outer graph"
    return None


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Redirect all uses of `old`, its role as a graph output included, to `new`.

    The output's name, type and declared shape move over to `new`; `old` gives its name up.

    Raises:
        ValueError: If `cannot_replace` gives a reason.
    """
    reason = cannot_replace(old, new)
    if reason:
        raise ValueError(reason)
    if old.is_graph_output():
        name = old.name
        old.name = f"{name}__replaced"
        new.name = name
        if old.type is not None:
            new.type = old.type
        new.shape = old.shape.copy() if old.shape is not None else None
        new.doc_string = old.doc_string
        new.metadata_props.update(old.metadata_props)
    elif new.shape is None and old.shape is not None and new.producer() is not None:
        new.shape = old.shape.copy()
    if new.type is None and new.producer() is not None:
        new.type = old.type
    if old.is_graph_output() and old.graph is not None:
        outputs = old.graph.outputs
        # The plain list inside is several times faster to go through.
        plain = getattr(outputs, "data", outputs)
        for index in [i for i, output in enumerate(plain) if output is old]:
            outputs[index] = new
    old.replace_all_uses_with(new)


def remove_node(node: ir.Node) -> None:
    """Take a node whose outputs nobody uses out of its graph.

    Raises:
        ValueError: If an output is still used.
    """
    graph = node.graph
    assert graph is not None, "the node is in no graph"
    nodes = getattr(graph, "_nodes", None)
    if nodes is None or len(graph.outputs) < _MANY_OUTPUTS:
        graph.remove(node, safe=True)
    else:
        # What the call above does, without going through all outputs of the graph for every node.
        if any(use_count(o) or o.is_graph_output() for o in node.outputs):
            raise ValueError(f"an output of {node.name or first_output(node)} is still used")
        _detach(node)
        node.graph = None
        nodes.remove(node)
    _release_captures(node)


def _detach(node: ir.Node) -> None:
    for index in range(len(node.inputs)):
        node.replace_input_with(index, None)


def _release_captures(node: ir.Node) -> None:
    """Make the bodies of a removed node stop counting as users of outer values."""
    for _, body in bodies(node):
        for inner in body:
            _release_captures(inner)
            _detach(inner)


def remove_unused(node: ir.Node) -> None:
    """Take a node out of its graph when nothing uses it, and with it whatever fed only it.

    Frozen initializers that lose their last use go too.
    """
    pending = [node]
    while pending:
        current = pending.pop()
        if current.graph is None or any(use_count(v) or v.is_graph_output() for v in current.outputs):
            continue
        inputs = [v for v in current.inputs if v is not None]
        remove_node(current)
        drop_unused_constants(inputs)
        pending.extend(p for v in inputs if (p := v.producer()) is not None)


def insert_before(node: ir.Node, new: ir.Node) -> None:
    """Put a new node in front of another, in the same graph."""
    graph = node.graph
    assert graph is not None, "the node is in no graph"
    graph.insert_before(node, new)


def make_node(
    names: Names,
    op_type: str,
    inputs: list[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    like: ir.Value,
    domain: str = "",
    base: str | None = None,
) -> ir.Node:
    """Make a one-output node with fresh names, its output typed like another value.

    Args:
        names: Where the names come from.
        op_type: The operator.
        inputs: Its inputs; None for an optional one that is left out.
        attributes: Plain Python values.
        like: The value whose type and shape the output gets.
        domain: The operator's domain.
        base: What the names are derived from; the name of `like` by default.
    """
    base = base or like.name or op_type
    node = ir.node(op_type, inputs, attributes or {}, domain=domain, name=names.fresh(f"{base}/{op_type}"))
    output = node.outputs[0]
    output.name = names.fresh(f"{base}/{op_type}_output")
    output.type = like.type
    output.shape = like.shape.copy() if like.shape is not None else None
    return node


def only_use(value: ir.Value) -> ir.Node | None:
    """Return the one node that uses the value once, or None when there are more uses or it is an output."""
    if use_count(value) != 1 or value.is_graph_output():
        return None
    return next(iter(value.uses())).node


def first_output(node: ir.Node) -> str:
    """Return the name of the first output that has one, else the node's own name; sites are named by it."""
    return next((v.name for v in node.outputs if v.name), node.name or "")


def use_count(value: ir.Value) -> int:
    """Return how often nodes use the value, in constant time.

    `value.uses()` copies the uses; asking it at every user of a value that thousands share takes quadratic time.
    """
    uses = getattr(value, "_uses", None)
    return len(value.uses() if uses is None else uses)


def is_used(value: ir.Value) -> bool:
    """Whether a node uses the value, or it is an output of its graph."""
    return bool(use_count(value)) or value.is_graph_output()


def named(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """Return a tensor of this name that shares the data of another one, whose own name stays."""
    if isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=name,
            base_dir=tensor.base_dir,
        )
    if type(tensor) is ir.LazyTensor:  # the kinds derived from it lie in a file
        return ir.LazyTensor(
            lambda: ir.Tensor(tensor.numpy(), dtype=tensor.dtype), tensor.dtype, tensor.shape, name=name
        )
    if isinstance(tensor, ir.StringTensor):
        return ir.StringTensor(tensor.string_data(), shape=tensor.shape, name=name)
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)


def drop_unused_constants(values: Iterable[ir.Value | None]) -> None:
    """Remove those of the values that are frozen initializers or Constant nodes nothing uses any more."""
    for value in values:
        if value is None or value.is_graph_output() or use_count(value):
            continue
        node = value.producer()
        if node is not None:
            if is_op(node, "Constant") and node.graph is not None:
                remove_node(node)
        elif value.is_initializer() and value.graph is not None:
            drop_unused_initializers(value.graph, [value])


def drop_unused_initializers(graph: ir.Graph, candidates: list[ir.Value | None]) -> None:
    """Remove those of the values that are initializers of the graph which nothing uses any more."""
    for value in candidates:
        if (
            value is not None
            and value.is_initializer()
            and value.graph is graph
            and not value.is_graph_input()
            and not value.is_graph_output()
            and not use_count(value)
            and value.name is not None
        ):
            graph.initializers.pop(value.name, None)
