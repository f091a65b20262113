"""Moving a model to another version of the standard operator set.

ONNX's own converter knows how each operator changed, but it drops functions and metadata, renames values, and
fails where a body uses what it replaces. So it is given the nodes one beside the other, without the graph around
them, and what it returns is put in the place of those nodes that it had to change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import onnx
import onnx_ir as ir

from onnxopt.errors import ModelError, UsageError
from onnxopt.graph import STANDARD_DOMAINS, Names, Scope, bodies, constant_tensor, copied, scopes
from onnxopt.proto.collector import garbage_collection_paused
from onnxopt.proto.encode import encode_node, encode_type
from onnxopt.proto.inference import SMALL, infer_types

_ALIASES = {"Hardmax": "Softmax"}
"""Operators that the converter forgets, and one that changed in the same way."""
_CONVERTER_ERRORS = (RuntimeError, onnx.version_converter.ConvertError, onnx.shape_inference.InferenceError)
_IR_VERSION = 10
"""Of the models made here for the converter, which does not tie it to opsets."""


def convert_opset(model: ir.Model, version: int) -> ir.Model:
    """Move a model to a version of the standard operator set; other operator sets stay as they are.

    Names, metadata, functions and the nodes that mean the same in both versions are untouched.

    Args:
        model: The model; it is not changed.
        version: The version. A lower one than the model's works for few operators.

    Returns:
        A new model, or this one when it has the version already.

    Raises:
        UsageError: If the installed onnx does not know the version.
        ModelError: If an operator cannot be expressed in it.
    """
    newest = onnx.defs.onnx_opset_version()
    if not 1 <= version <= newest:
        raise UsageError(f"The installed onnx {onnx.__version__} knows the opsets 1 to {newest}, not {version}.")
    if all(domain not in model.opset_imports for domain in STANDARD_DOMAINS):
        raise ModelError("The model imports no standard operator set, so there is no opset to convert.")
    if all(s.opset in (0, version) for s in scopes(model)):
        return model
    with garbage_collection_paused():
        result = copied(model)
        _Conversion(result, version).run()
    for imports in (result.opset_imports, *(f.opset_imports for f in result.functions.values())):
        for domain in STANDARD_DOMAINS:
            if domain in imports:
                imports[domain] = version
    return result


@dataclasses.dataclass(frozen=True)
class _Site:
    """A node to convert, and where it is."""

    node: ir.Node
    scope: Scope


class _Conversion:
    """Converts one model in place."""

    def __init__(self, model: ir.Model, version: int) -> None:
        self._model = model
        self._version = version

    def run(self) -> None:
        sites: dict[int, list[_Site]] = {}
        for scope in scopes(self._model):
            for node in scope.graph:
                if scope.opset != self._version and self._changes(node, scope):
                    sites.setdefault(scope.opset, []).append(_Site(node, scope))
        if not sites:
            return
        types = infer_types(self._model, trust_stated=True)
        names = Names(self._model)
        for source, found in sites.items():
            for site, nodes in zip(found, self._convert(found, source, types), strict=True):
                if nodes:
                    _Replacement(site.node, nodes, names).apply()

    def _changes(self, node: ir.Node, scope: Scope) -> bool:
        """Whether the definition of the node's operator is another in the new version.

        Raises:
            ModelError: If that is known to be beyond conversion.
        """
        if node.domain not in STANDARD_DOMAINS:
            return False
        old, new = _since(node.op_type, scope.opset), _since(node.op_type, self._version)
        # An operator without a definition is the runtime's own and has no versions.
        if old is None or old == new:
            return False
        obstacle = _obstacle(node, scope.opset, self._version)
        if obstacle:
            raise self._refusal(scope.opset, f"{_label(node)} {obstacle}")
        if next(bodies(node), None) is not None:
            # If, Loop and Scan have only learned new types since; their bodies are converted on their own.
            return False
        # A tensor in a Constant is valid in every version.
        return node.op_type != "Constant" or "value" not in node.attributes

    def _convert(
        self, sites: list[_Site], source: int, types: dict[str, onnx.TypeProto]
    ) -> Iterator[list[onnx.NodeProto]]:
        """Yield for each node what it becomes; an empty list where it stays."""
        bag = _Bag(source, types)
        for site in sites:
            bag.add(site.node)
        try:
            converted = onnx.version_converter.convert_version(bag.proto, self._version)
        except _CONVERTER_ERRORS as error:
            if len(sites) > 1:
                self._find_culprit(sites, source, types)
            label = _label(sites[0].node)
            raise self._refusal(source, f"{label} cannot be converted ({_reason(error)})") from error
        for site, nodes in zip(sites, bag.sort(converted.graph), strict=True):
            original = encode_node(site.node)
            _corrected(nodes, original, bag.dtype(site.node))
            if _same(original, nodes):
                yield []
                continue
            reference = next((a.name for a in site.node.attributes.values() if a.is_ref()), None)
            if reference is not None:
                raise self._refusal(
                    source,
                    f'the attribute "{reference}" of {_label(site.node)} in {site.scope.path} becomes an input, '
                    "but its value is known only where the function is called; inline the function first",
                )
            yield nodes

    def _find_culprit(self, sites: list[_Site], source: int, types: dict[str, onnx.TypeProto]) -> None:
        """Raise for the first node that cannot be converted alone, one try per operator."""
        by_operator: dict[str, list[_Site]] = {}
        for site in sites:
            by_operator.setdefault(site.node.op_type, []).append(site)
        for group in by_operator.values():
            if len(by_operator) > 1:
                list(self._convert(group, source, types))
            else:
                for site in group:
                    list(self._convert([site], source, types))

    def _refusal(self, source: int, reason: str) -> ModelError:
        return ModelError(f"The model cannot be converted from opset {source} to {self._version}: {reason}.")


def _since(op_type: str, version: int) -> int | None:
    """Return since which version the operator is defined as it is in this version; None when it is not."""
    try:
        return int(onnx.defs.get_schema(op_type, version, "").since_version)
    except onnx.defs.SchemaError:
        return None


def _obstacle(node: ir.Node, source: int, version: int) -> str:
    """Return why a node cannot be converted, where ONNX's converter would pretend to; empty otherwise."""
    if node.op_type == "Scan" and source < 9:
        return "has a batch axis, which later versions of Scan lack"
    if node.op_type == "GroupNormalization" and source < 21 <= version:
        return "has a scale per group, which from opset 21 on is one per channel"
    if node.op_type == "Dropout" and source < 12 <= version:
        mask = node.outputs[1] if len(node.outputs) > 1 else None
        if mask is not None and (mask.uses() or mask.is_graph_output()):
            return "returns a mask, which means the opposite from opset 12 on"
    return ""


class _Bag:
    """A model of unconnected nodes: node i has the inputs "i.in.0" and so on, and the outputs "i.out.0" and so on.

    Attributes:
        proto: The model.
    """

    def __init__(self, opset: int, types: dict[str, onnx.TypeProto]) -> None:
        self.proto = onnx.ModelProto(ir_version=_IR_VERSION)
        self.proto.opset_import.add(domain="", version=opset)
        self.proto.graph.name = "nodes"
        self._types = types
        self._count = 0

    def add(self, node: ir.Node) -> None:
        proto = self.proto.graph.node.add()
        proto.CopyFrom(encode_node(node))
        proto.op_type = _ALIASES.get(node.op_type, node.op_type)
        for attribute in proto.attribute:
            # The value is not known; whether the attribute stays an attribute does not depend on it.
            attribute.ClearField("ref_attr_name")
        del proto.input[:], proto.output[:]
        for index, value in enumerate(node.inputs):
            proto.input.append(self._input(value, f"{self._count}.in.{index}"))
        for index, value in enumerate(node.outputs):
            name = f"{self._count}.out.{index}" if value.name else ""
            proto.output.append(name)
            if name:
                self._describe(self.proto.graph.output.add(name=name), value)
        self._count += 1

    def _input(self, value: ir.Value | None, name: str) -> str:
        if value is None:
            return ""
        tensor = constant_tensor(value)
        if tensor is not None and tensor.dtype != ir.DataType.STRING and tensor.nbytes <= SMALL:
            self.proto.graph.initializer.add(
                name=name, dims=tensor.shape.numpy(), data_type=tensor.dtype.value, raw_data=tensor.tobytes()
            )
        else:
            self._describe(self.proto.graph.input.add(name=name), value)
        return name

    def _describe(self, info: onnx.ValueInfoProto, value: ir.Value) -> None:
        known = self._types.get(value.name or "")
        info.type.CopyFrom(encode_type(value.type, value.shape) if known is None else known)

    def dtype(self, node: ir.Node) -> ir.DataType | None:
        """Return the element type of a node's first input, where it is known."""
        value = node.inputs[0] if node.inputs else None
        if value is None:
            return None
        if value.dtype is not None:
            return value.dtype
        known = self._types.get(value.name or "")
        if known is None or not known.tensor_type.elem_type:
            return None
        return ir.DataType(known.tensor_type.elem_type)

    def sort(self, graph: onnx.GraphProto) -> list[list[onnx.NodeProto]]:
        """Return the nodes of the converted model by the node they came from."""
        owner: dict[str, int] = {}
        found: list[list[onnx.NodeProto]] = [[] for _ in range(self._count)]
        # From the outputs backwards, so that a new constant is met after the node that uses it.
        added = [_constant(t) for t in graph.initializer if ".in." not in t.name]
        for node in reversed([*added, *graph.node]):
            owners = [int(n.split(".")[0]) if ".out." in n else owner.get(n) for n in node.output]
            index = next((o for o in owners if o is not None), None)
            if index is not None:
                found[index].insert(0, node)
                owner.update(dict.fromkeys(node.input, index))
        return found


def _constant(tensor: onnx.TensorProto) -> onnx.NodeProto:
    """Return an initializer that the converter made as a node."""
    return onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)


def _same(original: onnx.NodeProto, nodes: list[onnx.NodeProto]) -> bool:
    """Whether the converter left a node as it was, up to the names of its inputs and outputs."""
    if len(nodes) != 1 or nodes[0].op_type != original.op_type:
        return False
    inputs = [name.rpartition(".")[2] for name in nodes[0].input]
    if _trimmed(inputs) != _trimmed([str(i) if name else "" for i, name in enumerate(original.input)]):
        return False
    before = {a.name: a for a in original.attribute}
    after = {a.name: a for a in nodes[0].attribute}
    return before.keys() == after.keys() and all(
        before[n].ref_attr_name or _content(before[n]) == _content(after[n]) for n in before
    )


def _content(attribute: onnx.AttributeProto) -> bytes:
    copy = onnx.AttributeProto()
    copy.CopyFrom(attribute)
    copy.ClearField("doc_string")
    return bytes(copy.SerializeToString(deterministic=True))


def _trimmed(names: Iterable[str]) -> list[str]:
    found = list(names)
    while found and not found[-1]:
        found.pop()
    return found


def _corrected(nodes: list[onnx.NodeProto], original: onnx.NodeProto, dtype: ir.DataType | None) -> None:
    """Repair what the converter is known to get wrong.

    Args:
        nodes: What it made of a node; changed in place.
        original: The node.
        dtype: Element type of the node's first input, where that is known.
    """
    for node in nodes:
        if node.op_type == "Resize" and original.op_type in ("Upsample", "Resize"):
            # Before opset 11 the coordinates were mapped by the plain scale and rounded down.
            stated = {a.name for a in node.attribute}
            for name, value in (("coordinate_transformation_mode", "asymmetric"), ("nearest_mode", "floor")):
                if name not in stated:
                    node.attribute.append(onnx.helper.make_attribute(name, value))
        if original.op_type in _ALIASES and node.op_type == _ALIASES[original.op_type]:
            node.op_type = original.op_type
        if node.op_type == "Constant" and original.op_type in ("Clip", "Pad") and dtype is not None:
            tensor = node.attribute[0].t
            if tensor.data_type == onnx.TensorProto.FLOAT and dtype != ir.DataType.FLOAT:
                # The largest float32 stands for no bound, and so does the infinity that it becomes.
                with np.errstate(over="ignore"):
                    array = ir.serde.TensorProtoTensor(tensor).numpy().astype(dtype.numpy())
                tensor.CopyFrom(ir.serde.serialize_tensor(ir.tensor(array, dtype=dtype)))


class _Replacement:
    """Puts converted nodes in the place of one node."""

    def __init__(self, node: ir.Node, protos: list[onnx.NodeProto], names: Names) -> None:
        self._node = node
        self._protos = protos
        self._names = names

    def apply(self) -> None:
        node, graph = self._node, self._node.graph
        assert graph is not None, "the node is in a graph"
        values: dict[str, ir.Value | None] = {"": None}
        values.update({f"in.{i}": v for i, v in enumerate(node.inputs)})
        new = [self._make(proto, values) for proto in self._protos]
        graph.insert_before(node, new)
        for index, output in enumerate(node.outputs):
            replacement = values.get(f"out.{index}")
            if not output.name or replacement is None:
                continue
            replacement.name, replacement.doc_string = output.name, output.doc_string
            replacement.type, replacement.shape = output.type, output.shape
            replacement.metadata_props.update(output.metadata_props)
            output.replace_all_uses_with(replacement, replace_graph_outputs=True)
        graph.remove(node, safe=True)

    def _make(self, proto: onnx.NodeProto, values: dict[str, ir.Value | None]) -> ir.Node:
        old = self._node
        keeps = proto.op_type != "Constant"
        made = ir.Node(
            "",
            proto.op_type,
            [values[_local(name)] for name in proto.input],
            [ir.serde.deserialize_attribute(a) for a in proto.attribute],
            num_outputs=len(proto.output),
            name=self._names.fresh(f"{old.name or old.outputs[0].name}/{proto.op_type}"),
            doc_string=old.doc_string if keeps else None,
            metadata_props=dict(old.metadata_props) if keeps else None,
        )
        for name, output in zip(proto.output, made.outputs, strict=True):
            # The names of the old node's outputs are taken over in `apply`.
            output.name = self._names.fresh(f"{old.outputs[0].name}/{proto.op_type}_output") if name else ""
            values[_local(name)] = output
        return made


def _local(name: str) -> str:
    """Return a name of the bag without the number of the node: "in.0" for "7.in.0"."""
    head, dot, rest = name.partition(".")
    return rest if dot and head.isdigit() and rest.startswith(("in.", "out.")) else name


def _label(node: ir.Node) -> str:
    return f'the node "{node.name or node.outputs[0].name}" ({node.op_type})'


def _reason(error: Exception) -> str:
    """Return what the converter says, without the place in its source code."""
    text = " ".join(str(error).split())
    return text.rpartition("Assertion ")[2].rpartition(" failed: ")[2] or text
