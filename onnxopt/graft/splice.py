"""Putting the nodes of one model into another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.contents import Content, equal_graphs
from onnxopt.errors import ModelError
from onnxopt.graft.interface import FITTED, Adapter
from onnxopt.graft.pairing import Sizes
from onnxopt.graft.reasons import RefusedError
from onnxopt.graft.slicing import drop_unused
from onnxopt.graph import (
    STANDARD_DOMAINS,
    Names,
    Scope,
    add_constant,
    bodies,
    insert_before,
    remove_unused,
    replace_value,
)
from onnxopt.instantiate import Bindings, Instantiation, take_over
from onnxopt.proto.order import sort

_RESIZE_SINCE = 11


@dataclasses.dataclass(frozen=True)
class Fit:
    """An adapter whose weights follow from data.

    Attributes:
        adapter: The adapter.
        before: The value it reads.
        weight: Its weight, still zero.
        bias: Its bias, still zero.
    """

    adapter: Adapter
    before: ir.Value
    weight: ir.Value
    bias: ir.Value


@dataclasses.dataclass(frozen=True)
class Copy:
    """The donor's part where it now stands in the host.

    Attributes:
        inputs: For each input of the part the value it reads.
        outputs: For each of its outputs the value it computes, in front of any adapter.
        nodes: Its nodes.
    """

    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]


class Splice:
    """Puts parts of a donor into a host, which it changes.

    Attributes:
        shared: Constants of the donor that the host already had, in bytes.
        renamed: Functions of the donor that were renamed because the host has others of their name.
    """

    def __init__(self, host: ir.Model, donor: ir.Model, anchor: ir.Node, note: str) -> None:
        """Prepare the host.

        Args:
            host: The host; changed.
            donor: The part to put into it, in the host's operator sets.
            anchor: A node of the host in front of which nodes go.
            note: Kept in the metadata of the copied nodes.

        Raises:
            RefusedError: If operator sets do not agree.
        """
        self.host, self.donor = host, donor
        self.shared = 0
        self.renamed: list[str] = []
        self._anchor = anchor
        self._names = Names(host)
        self._scope = Scope(host.graph, "", host.opset_imports, None, nested=False)
        self._note = note
        self._agree_on_operator_sets()
        self._calls = self._bring_functions()
        self._constants: Bindings = {}

    # What the donor brings along ---------------------------------------------------------------------------

    def _agree_on_operator_sets(self) -> None:
        self.host.ir_version = max(self.host.ir_version, self.donor.ir_version)
        for domain, version in self.donor.opset_imports.items():
            domain = "" if domain in STANDARD_DOMAINS else domain
            held = self._scope.opset if not domain else self.host.opset_imports.get(domain)
            if held is None or not held:
                self.host.opset_imports[domain] = version
            elif held != version:
                raise RefusedError(
                    "opset",
                    f"The donor is written in version {version} of the operator set {domain or 'ai.onnx'} and the host "
                    f"in {held}; only ai.onnx can be converted.",
                )

    def _bring_functions(self) -> dict[ir.OperatorIdentifier, ir.OperatorIdentifier]:
        """Add the donor's functions; return under which name each is called from now on."""
        calls: dict[ir.OperatorIdentifier, ir.OperatorIdentifier] = {}
        brought: list[ir.Function] = []
        for identifier, function in self.donor.functions.items():
            held = self.host.functions.get(identifier)
            if held is not None and equal_functions(held, function):
                continue
            copy = function.clone()
            if held is not None:
                number = 1
                while (function.domain, f"{function.name}_{number}", function.overload) in self.host.functions:
                    number += 1
                copy.name = f"{function.name}_{number}"
                self.renamed.append(f"{function.domain}::{function.name}")
                calls[identifier] = copy.identifier()
            self.host.functions[copy.identifier()] = copy
            brought.append(copy)
        for copy in brought:
            _redirect(copy.graph.all_nodes(), calls)
        return calls

    def _bring_constants(self) -> Bindings:
        """Return what stands for each constant of the donor in the host, which has it once."""
        if self._constants:
            return self._constants
        held: dict[Content, ir.Value] = {}
        for value in self.host.graph.initializers.values():
            if value.const_value is not None and not value.is_graph_input():
                held.setdefault(Content(value.const_value), value)
        for value in self.donor.graph.initializers.values():
            if value.const_value is None:
                continue
            found = held.get(Content(value.const_value))
            if found is None:
                found = add_constant(
                    self._scope, self._names, value.name or "constant", value.const_value, self._anchor
                )
                held[Content(value.const_value)] = found
            else:
                self.shared += value.const_value.nbytes
            self._constants[value] = found
        return self._constants

    # Copies -----------------------------------------------------------------------------------------------

    def copy(self, inputs: Sequence[ir.Value]) -> Copy:
        """Copy the donor's part once, reading these values."""
        bindings: Bindings = dict(self._bring_constants())
        boundary = [v for v in self.donor.graph.inputs if not v.is_initializer()]
        bindings.update(zip(boundary, inputs, strict=True))
        maker = Instantiation(self._scope, self._names, self._anchor, metadata={"onnxopt.donor": self._note})
        nodes = maker.nodes(self.donor.graph, bindings)
        _redirect((n for node in nodes for n in (node, *_inner(node))), self._calls)
        outputs = [value for v in self.donor.graph.outputs if (value := bindings[v]) is not None]
        return Copy(tuple(inputs), tuple(outputs), tuple(nodes))

    def adapt(self, value: ir.Value, chain: Sequence[Adapter]) -> tuple[ir.Value, list[Fit]]:
        """Put adapters behind a value; return what comes out, and those that are still to be fitted.

        Raises:
            RefusedError: If the opset has no such operator.
        """
        fits: list[Fit] = []
        for adapter in chain:
            if adapter.kind in FITTED:
                value, fit = self._fitted(value, adapter)
                fits.append(fit)
            else:
                value = self._plain(value, adapter)
        return value, fits

    def _plain(self, value: ir.Value, adapter: Adapter) -> ir.Value:
        dtype = value.dtype
        if adapter.kind == "Cast":
            assert adapter.dtype is not None
            return self._node("Cast", [value], {"to": adapter.dtype.value}, value, adapter.dtype)
        if adapter.kind == "Transpose":
            return self._node("Transpose", [value], {"perm": list(adapter.perm)}, value, dtype)
        if adapter.kind == "Reshape":
            return self._node("Reshape", [value, self._constant("shape", adapter.shape)], {}, value, dtype)
        if self._scope.opset < _RESIZE_SINCE:
            raise RefusedError(
                "opset", f"A Resize to given sizes needs opset {_RESIZE_SINCE}; the host has {self._scope.opset}."
            )
        shape = self._node("Shape", [value], {}, value, ir.DataType.INT64)
        kept = self._node("Gather", [shape, self._constant("axes", (0, 1))], {"axis": 0}, value, ir.DataType.INT64)
        sizes = self._node(
            "Concat", [kept, self._constant("sizes", adapter.shape)], {"axis": 0}, value, ir.DataType.INT64
        )
        attributes = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
        empty = self._array("empty", np.zeros(0, np.float32))
        return self._node("Resize", [value, empty, empty, sizes], attributes, value, dtype)

    def _fitted(self, value: ir.Value, adapter: Adapter) -> tuple[ir.Value, Fit]:
        """Put a linear layer behind a value whose weights are zero."""
        before, after = adapter.channels
        dtype = np.float32 if value.dtype is None else value.dtype.numpy()
        shape = (after, before, 1, 1) if adapter.kind == "Conv" else (before, after)
        weight = self._array("adapter_weight", np.zeros(shape, dtype))
        bias = self._array("adapter_bias", np.zeros(after, dtype))
        if adapter.kind == "Conv":
            result = self._node("Conv", [value, weight, bias], {}, value, value.dtype)
        elif adapter.rank == 2:
            result = self._node("Gemm", [value, weight, bias], {}, value, value.dtype)
        else:
            product = self._node("MatMul", [value, weight], {}, value, value.dtype)
            result = self._node("Add", [product, bias], {}, value, value.dtype)
        return result, Fit(adapter, value, weight, bias)

    def sizes(self, sizes: Sizes, inputs: Sequence[ir.Value | None]) -> ir.Value:
        """Compute a list of sizes of other values, or a single one."""
        parts: list[ir.Value] = []
        for element in sizes.elements:
            if isinstance(element, int):
                parts.append(self._constant("size", (element,)))
                continue
            source = inputs[element[0]]
            assert source is not None, "sizes are told from inputs that have a counterpart"
            shape = self._node("Shape", [source], {}, source, ir.DataType.INT64)
            axis = self._constant("axis", (element[1],))
            parts.append(self._node("Gather", [shape, axis], {"axis": 0}, source, ir.DataType.INT64))
        like = parts[0]
        if sizes.scalar:
            empty = self._array("scalar", np.zeros(0, np.int64))
            return self._node("Reshape", [parts[0], empty], {}, like, ir.DataType.INT64)
        return self._node("Concat", list(parts), {"axis": 0}, like, ir.DataType.INT64)

    def _node(
        self,
        op_type: str,
        inputs: list[ir.Value | None],
        attributes: Mapping[str, Any],
        like: ir.Value,
        dtype: ir.DataType | None,
    ) -> ir.Value:
        base = f"{like.name}/adapter"
        node = ir.node(op_type, inputs, attributes, name=self._names.fresh(f"{base}/{op_type}"))
        output = node.outputs[0]
        output.name = self._names.fresh(f"{base}/{op_type}_output")
        output.type = None if dtype is None else ir.TensorType(dtype)
        insert_before(self._anchor, node)
        return output

    def _constant(self, base: str, numbers: Iterable[int]) -> ir.Value:
        return self._array(base, np.array(list(numbers), np.int64))

    def _array(self, base: str, array: np.ndarray) -> ir.Value:
        return add_constant(self._scope, self._names, f"adapter/{base}", array, self._anchor)

    # The host's side ----------------------------------------------------------------------------------------

    def replace(self, old: ir.Value, new: ir.Value, *, free: bool) -> None:
        """Put a value in the place of one of the host's.

        Args:
            old: The host's value.
            new: The value.
            free: Whether the type and shape of a graph output may change to those of the new value.
        """
        kind, shape, name = new.type, new.shape, old.name
        is_output = old.is_graph_output()
        take_over(old, new, self._names, self._anchor)
        if is_output and free:
            output = next(v for v in self.host.graph.outputs if v.name == name)
            output.type, output.shape = kind, shape

    def finish(self, removed: Sequence[ir.Node]) -> None:
        """Remove what nothing needs any more, and put the nodes in order.

        Raises:
            RefusedError: If nodes depend on themselves.
        """
        for node in reversed(removed):
            remove_unused(node)
        drop_unused(self.host)
        try:
            sort(self.host.graph, "The result")
        except ModelError as error:
            raise RefusedError(
                "cycle",
                f"{str(error).rstrip('.')}: the host computes some inputs of the cut from its outputs; choose a cut "
                "without a way around it.",
            ) from error


def insertion(model: ir.Model, name: str) -> ir.Node:
    """Put an Identity behind a value, and in front of all that reads it; return it.

    Raises:
        RefusedError: If the value is an input that is an output too.
    """
    value = next(v for v in (*model.graph.inputs, *(o for n in model.graph for o in n.outputs)) if v.name == name)
    names = Names(model)
    identity = ir.node("Identity", [value], name=names.fresh(f"{name}/Identity"))
    output = identity.outputs[0]
    output.name = names.fresh(f"{name}/inserted")
    output.type = value.type
    if value.producer() is None and value.is_graph_output():
        raise RefusedError("boundary", f'"{name}" is an input that is an output too; nothing can come between.')
    node = value.producer()
    if node is None:
        model.graph.insert_before(next(iter(model.graph)), identity)
    else:
        model.graph.insert_after(node, identity)
    shape = value.shape
    replace_value(value, output)
    identity.replace_input_with(0, value)
    if value.is_graph_output():
        raise AssertionError("the output moved on")
    output.shape = shape.copy() if shape is not None else None
    return identity


def equal_functions(one: ir.Function, other: ir.Function) -> bool:
    """Whether two functions are the same."""
    return (
        dict(one.opset_imports) == dict(other.opset_imports)
        and list(one.attributes) == list(other.attributes)
        and [a.value for a in one.attributes.values()] == [a.value for a in other.attributes.values()]
        and equal_graphs(one.graph, other.graph)
    )


def _redirect(nodes: Iterable[ir.Node], calls: Mapping[ir.OperatorIdentifier, ir.OperatorIdentifier]) -> None:
    for node in nodes:
        target = calls.get(node.op_identifier())
        if target is not None:
            node.op_type = target[1]


def _inner(node: ir.Node) -> Iterable[ir.Node]:
    return (n for _, body in bodies(node) for n in body.all_nodes())
