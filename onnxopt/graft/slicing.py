"""A part of a model as a model of its own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.shapes import Shapes
from onnxopt.graft.cut import Part
from onnxopt.graft.probe import Probe
from onnxopt.graft.reasons import RefusedError
from onnxopt.graph import STANDARD_DOMAINS, copied, drop_unused_initializers, remove_node, scopes, use_count
from onnxopt.proto.collector import garbage_collection_paused
from onnxopt.proto.inference import infer_types
from onnxopt.proto.keys import TRAINING_INFO


class Types:
    """Types and shapes of the values of a model: what it declares, what follows, what ONNX infers, and what is seen."""

    def __init__(self, model: ir.Model, probe: Probe | None = None) -> None:
        """Take the model; nothing is worked out yet.

        Args:
            model: The model.
            probe: Runs it, to see how many axes a value has where nothing else tells.
        """
        self._model = model
        self._probe = probe
        self.shapes = Shapes(model)
        self._inferred: dict[str, tuple[ir.TypeProtocol | None, ir.Shape | None]] | None = None

    def type(self, value: ir.Value) -> ir.TypeProtocol:
        """Return the type of a value.

        Raises:
            RefusedError: If nothing tells it.
        """
        if value.type is not None and value.dtype not in (None, ir.DataType.UNDEFINED):
            return value.type
        dtype = self.shapes.dtype(value)
        if dtype not in (None, ir.DataType.UNDEFINED):
            return ir.TensorType(dtype)
        found = self._infer().get(value.name or "", (None, None))[0]
        if found is None:
            raise RefusedError(
                "unknown type", f'Nothing tells the element type of "{value.name}", so the cut cannot end there.'
            )
        return found

    def shape(self, value: ir.Value) -> ir.Shape | None:
        """Return the shape of a value, with the names that the model gives to dynamic axes; None when unknown."""
        if isinstance(value.type, (ir.SequenceType, ir.OptionalType)):
            return value.shape
        known = self.shapes.ir_shape(value)
        stated = value.shape
        if known is None and stated is None:
            inferred = self._infer().get(value.name or "", (None, None))[1]
            return inferred if inferred is not None else self._seen(value)
        if known is None:
            return stated.copy() if stated is not None else None
        if stated is None or len(stated) != len(known):
            return known
        # A name that the model declares is better than none.
        return ir.Shape([s if _is_open(k) else k for k, s in zip(known, stated, strict=True)])

    def _seen(self, value: ir.Value) -> ir.Shape | None:
        """Return as many axes of unknown size as the value is seen to have."""
        if self._probe is None:
            return None
        found = [np.ndim(v) for values in self._probe.values([value.name or ""]) for v in values.values()]
        return ir.Shape([None] * found[0]) if len(set(found)) == 1 else None

    def _infer(self) -> dict[str, tuple[ir.TypeProtocol | None, ir.Shape | None]]:
        if self._inferred is None:
            found = infer_types(self._model, trust_stated=True)
            self._inferred = {
                name: (ir.serde.deserialize_type_proto_for_type(p), ir.serde.deserialize_type_proto_for_shape(p))
                for name, p in found.items()
            }
        return self._inferred


def _is_open(dim: int | ir.SymbolicDim) -> bool:
    return not isinstance(dim, int) and dim.value is None


def standalone(part: Part, types: Types | None = None) -> ir.Model:
    """Return a part as a model: its boundary values are inputs and outputs, under their own names.

    Weights are shared with the model it comes from. Functions and operator sets that it does not use are left out,
    metadata stays.

    Args:
        part: The part; its model is not changed.
        types: Types and shapes of the values of its model, where they have been worked out.

    Raises:
        RefusedError: If nothing tells the type of a boundary value.
    """
    types = types or Types(part.model)
    described = {v: (types.type(v), types.shape(v)) for v in (*part.inputs, *part.outputs)}
    with garbage_collection_paused():
        copy = copied(part.model)
        graph = copy.graph
        graph.meta.pop(TRAINING_INFO, None)
        kept = {new for old, new in zip(part.model.graph, graph, strict=True) if old in set(part.nodes)}
        values = {v.name: v for v in (*graph.inputs, *(v for node in graph for v in node.outputs))}
        outputs = [values[v.name] for v in part.outputs]
        inputs = [_as_input(graph, values[v.name]) for v in part.inputs]
        for value, source in zip((*inputs, *outputs), (*part.inputs, *part.outputs), strict=True):
            value.type, value.shape = described[source]
        graph.outputs.clear()
        graph.outputs.extend(outputs)
        for node in reversed(list(graph)):
            if node not in kept:
                remove_node(node)
        _settle_inputs(graph, inputs)
        drop_unused(copy)
    return copy


def forget_sizes(model: ir.Model) -> None:
    """Leave of the shapes of inputs and outputs the number of axes alone.

    Runtimes infer shapes within branches that are never taken, and reject what cannot be there: with sizes that the
    model around the part did not state, a part may be rejected that ran inside.
    """
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and not value.is_initializer():
            value.shape = ir.Shape([None] * len(value.shape))


def _as_input(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Return a free value that takes the place and the name of another."""
    if value.is_graph_input():
        return value
    name = value.name
    value.name = f"{name}__inside"
    new = ir.Value(name=name, doc_string=value.doc_string)
    new.metadata_props.update(value.metadata_props)
    value.replace_all_uses_with(new, replace_graph_outputs=True)
    return new


def _settle_inputs(graph: ir.Graph, inputs: list[ir.Value]) -> None:
    """Leave as inputs the boundary, and the initializers a caller may override that are still used."""
    overridable = [v for v in graph.inputs if v.is_initializer() and v not in inputs and use_count(v)]
    graph.inputs.clear()
    graph.inputs.extend([*inputs, *overridable])
    drop_unused_initializers(graph, list(graph.initializers.values()))


def drop_unused(model: ir.Model) -> None:
    """Remove the functions that nothing calls, and the operator sets that nothing is written in."""
    used: set[ir.OperatorIdentifier] = set()
    waiting = [model.graph]
    domains: set[str] = set()
    while waiting:
        for node in waiting.pop().all_nodes():
            identifier = node.op_identifier()
            domains.add(node.domain)
            if identifier in model.functions and identifier not in used:
                used.add(identifier)
                waiting.append(model.functions[identifier].graph)
    for identifier in [i for i in model.functions if i not in used]:
        model.functions.pop(identifier)
    domains.update(STANDARD_DOMAINS)
    for scope in scopes(model):
        imports = scope.graph.opset_imports if scope.function is None else {}
        for domain in [d for d in imports if d not in domains]:
            imports.pop(domain)
