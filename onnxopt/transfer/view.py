"""From a model to its skeleton."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.shapes import Shapes
from onnxopt.graph import attribute, bodies, first_output, is_op
from onnxopt.transfer.layers import Layer, read_layer
from onnxopt.transfer.members import Chain, follow
from onnxopt.transfer.parts import PartFinder
from onnxopt.transfer.skeleton import Edge, Group, Operand, Place, Skeleton, joined
from onnxopt.transfer.tensors import Sliced, Tensor, reshaped
from onnxopt.transfer.to_real import in_real_numbers
from onnxopt.transfer.trace import Tracer

Ways = dict[tuple[int, str], float | None]
"""What reaches a value: (node of the skeleton, label) -> gain."""

_CUTS = frozenset({"Shape", "Size", "ConstantOfShape", "EyeLike"})
# fmt: off
_FIRST_ONLY = frozenset(
    {
        "Reshape", "Expand", "Slice", "Squeeze", "Unsqueeze", "Tile", "Pad", "CastLike", "Resize", "TopK", "Clip",
        "Split", "SplitToSequence", "Trilu", "QuantizeLinear", "DequantizeLinear", "Dropout", "CumSum",
        "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare",
        "ReduceLogSum", "ReduceLogSumExp",
    }
)
"""Operators whose further inputs are sizes, axes and limits."""
_NONLINEAR = frozenset(
    {
        "Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Erf",
        "Gelu", "FastGelu", "QuickGelu", "BiasGelu", "Mish", "Swish", "Softplus", "Softsign", "Clip", "ThresholdedRelu",
        "Exp", "Log", "BiasSplitGelu", "Sin", "Cos",
    }
)
# fmt: on
_ATTENTION = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention", "DecoderMaskedMultiHeadAttention"})
QUERY, KEY, VALUE = "M0S", "M1S", "M1"
_AFTER = "M0"


class Viewer:
    """Builds the skeleton of one model."""

    def __init__(self, model: ir.Model, limits: Mapping[str, float] | None = None) -> None:
        """Prepare to go through the main graph; for the limits see `in_real_numbers`."""
        self.real = in_real_numbers(model, limits)
        self.model = self.real.model
        self.tracer = Tracer(Shapes(self.model), self.real.tensors)
        self.groups: list[Group] = []
        self._clips: dict[Place, float] = {}
        self._ways: dict[ir.Value, Ways] = {}
        self._absorbed: set[Operand] = set()
        self._parts = PartFinder(self.tracer)

    def view(self) -> Skeleton:
        """Return the skeleton."""
        graph = self.model.graph
        inputs = [v for v in graph.inputs if not v.is_initializer()]
        for number, value in enumerate(inputs):
            group = Group(len(self.groups), "input", ("input", number), value.name or "")
            self.groups.append(group)
            self._ways[value] = {(group.index, ""): 1.0}
        self._visit(graph)
        for number, value in enumerate(graph.outputs):
            group = Group(len(self.groups), "output", ("output", number), value.name or "")
            group.edges = _edges([self._of(value)])
            self.groups.append(group)
        grids = {g.name: frozenset(self._of(g.value)) for g in self.real.grids if g.clips}
        return Skeleton(self.real, self.groups, self._clips, grids)

    def _visit(self, graph: ir.Graph) -> None:
        for node in graph:
            if node.op_type not in _CUTS and not is_op(node, "Constant"):
                self._node(node)

    def _of(self, value: ir.Value | None) -> Ways:
        return {} if value is None else self._ways.get(value, {})

    def _inputs(self, node: ir.Node) -> list[Ways]:
        """Return what reaches each input that counts."""
        if is_op(node, *_FIRST_ONLY):
            return [self._of(node.inputs[0])]
        return [self._of(v) for i, v in enumerate(node.inputs) if (node, i) not in self._absorbed]

    def _node(self, node: ir.Node) -> None:
        for _, body in bodies(node):
            self._body(node, body)
        layer = read_layer(node, self.tracer, self._absorbed)
        if layer is not None:
            self._layer(node, layer)
            return
        if self._take_part(node):
            return
        self._generic_parameters(node)
        ways = self._passed(node)
        for output in node.outputs:
            self._ways[output] = dict(ways)

    def _body(self, node: ir.Node, body: ir.Graph) -> None:
        outside = _union([self._of(v) for v in node.inputs])
        for value in body.inputs:
            self._ways[value] = dict(outside)
        self._visit(body)

    def _passed(self, node: ir.Node) -> Ways:
        """Return what reaches the outputs of a node without parameters of its own."""
        ways = self._inputs(node)
        inner = [self._of(v) for _, body in bodies(node) for v in body.outputs]
        if inner:
            return _union([*ways, *inner])
        if node.op_type in _ATTENTION and len(ways) > 2:
            return self._attended(node, ways)
        if is_op(node, "MatMul", "Gemm", "Einsum") or node.op_type == "FusedMatMul":
            return self._product(node, ways)
        if is_op(node, "Softmax", "LogSoftmax"):
            return _labelled(ways[0], "S")
        if node.op_type in _NONLINEAR:
            self._clip(node, ways[0])
            return _labelled(_union(ways), "N")
        if is_op(node, "Mul", "Div"):
            return self._scaled(node, ways)
        if is_op(node, "Concat"):
            return self._concatenated(node, ways)
        return _union(ways)

    def _product(self, node: ir.Node, ways: list[Ways]) -> Ways:
        if len(ways) < 2 or not ways[0] or not ways[1]:
            return _union(ways)
        factor = float(attribute(node, "alpha", 1.0))
        first, second = (self._common_gain(w) for w in ways[:2])
        return _union(
            [
                _labelled(_times(ways[0], _product(second, factor)), "M0"),
                _labelled(_times(ways[1], _product(first, factor)), "M1"),
                *ways[2:],
            ]
        )

    def _common_gain(self, ways: Ways) -> float | None:
        """Return by how much what layers computed has been scaled, where it is the same for all of them."""
        gains = {
            gain
            for (source, label), gain in ways.items()
            if self.groups[source].kind in ("linear", "conv") and "S" not in label
        }
        return gains.pop() if len(gains) == 1 else 1.0

    def _clip(self, node: ir.Node, ways: Ways) -> None:
        """Remember where a Clip from 0 on ends, which quantizers leave out."""
        if not is_op(node, "Clip"):
            return
        ends = [attribute(node, n) for n in ("min", "max")]
        if len(node.inputs) == 3:
            ends = [self.tracer.number(v) for v in node.inputs[1:]]
        if ends[0] == 0 and ends[1] is not None:
            self._clips[frozenset(ways)] = float(ends[1])

    def _scaled(self, node: ir.Node, ways: list[Ways]) -> Ways:
        numbers = [self.tracer.number(v) for v in node.inputs[:2]]
        for index, number in enumerate(numbers):
            if number is not None and not (is_op(node, "Div") and (index == 0 or number == 0)):
                return _times(self._of(node.inputs[1 - index]), 1 / number if is_op(node, "Div") else number)
        return _union(ways)

    def _concatenated(self, node: ir.Node, ways: list[Ways]) -> Ways:
        found: list[Ways] = []
        for index, own in enumerate(ways):
            # Where all parts come from one layer, as in rotary embeddings, their order says nothing about layers.
            alone = all(set(own) == set(other) or not other for other in ways)
            found.append(own if alone else _labelled(own, f"C{index}"))
        return _union(found)

    def _attended(self, node: ir.Node, ways: list[Ways]) -> Ways:
        by_input = dict(
            zip((i for i in range(len(node.inputs)) if (node, i) not in self._absorbed), ways, strict=False)
        )
        scale = self._attention_scale(node, node.inputs[0])
        nothing: Ways = {}
        query, key, value = (by_input.get(i, nothing) for i in range(3))
        gains = self._common_gain(query), self._common_gain(key)
        found = [
            _labelled(_times(query, _product(gains[1], scale)), QUERY + _AFTER),
            _labelled(_times(key, _product(gains[0], scale)), KEY + _AFTER),
            _labelled(value, VALUE),
        ]
        turning = (7, 8) if node.op_type == "GroupQueryAttention" else ()
        for index, rest in by_input.items():
            if index in turning:
                found += [_labelled(rest, QUERY + _AFTER), _labelled(rest, KEY + _AFTER)]
            elif index > 2:
                found.append(_labelled(rest, "S" + _AFTER))
        return _union(found)

    def _attention_scale(self, node: ir.Node, query: ir.Value | None, width: int | None = None) -> float | None:
        given = float(attribute(node, "scale", 0.0))
        if given:
            return given
        heads = int(attribute(node, "num_heads", 0) or attribute(node, "q_num_heads", 0))
        shape = None if query is None or width is not None else self.tracer.shapes.of(query)
        last = width if width is not None else shape[-1] if shape else None
        if isinstance(last, int) and shape is not None and len(shape) == 4:
            return 1 / float(np.sqrt(last))
        return 1 / float(np.sqrt(last // heads)) if isinstance(last, int) and heads and last >= heads else None

    def _layer(self, node: ir.Node, layer: Layer) -> None:
        """Add a layer, or one for each part that its channels are split into."""
        reaching = [self._of(node.inputs[i]) for i in layer.data]
        chain = follow(node, layer, self.tracer)
        self._absorbed.update(chain.absorbed)
        if layer.packed:
            self._packed(node, layer, reaching)
            return
        ranges = self._parts.ranges(chain.end, layer) if layer.kind == "linear" else {}
        own: Ways
        if ranges:
            indexes = {}
            for part in sorted(set(ranges.values())):
                indexes[part] = self._add(node, layer, chain, reaching, part).index
            for value, part in ranges.items():
                self._ways[value] = {(indexes[part], ""): layer.gain}
            own = {(index, ""): layer.gain for index in indexes.values()}
        else:
            group = self._add(node, layer, chain, reaching)
            own = {(group.index, ""): layer.gain}
        if layer.adds is not None:
            own = _union([own, self._of(node.inputs[layer.adds])])
        limits = attribute(node, "activation_params", ())
        if attribute(node, "activation", "") == "Clip" and len(limits) == 2 and limits[0] == 0:
            self._clips[frozenset(own)] = float(limits[1])
        for output in node.outputs[:1]:
            self._ways[output] = _labelled(own, "N") if layer.activated else own
        for output in node.outputs[1:]:
            self._ways[output] = _union(reaching) | self._ways.get(output, {})

    def _packed(self, node: ir.Node, layer: Layer, reaching: list[Ways]) -> None:
        """Add the three layers that the attention of onnxruntime holds, and the attention itself."""
        assert layer.weight is not None
        widths = attribute(node, "qkv_hidden_sizes") or [layer.weight.shape[1] // 3] * 3
        ends = np.cumsum([0, *widths])
        scale = self._attention_scale(node, node.inputs[0], int(widths[0]))
        chain = Chain(node.outputs[0], list(layer.members), [])
        found: list[Ways] = []
        for number, label in enumerate((QUERY + _AFTER, KEY + _AFTER, VALUE)):
            part = (int(ends[number]), int(ends[number + 1]))
            group = self._add(node, layer, chain, reaching, part)
            found.append({(group.index, label): 1.0 if label == VALUE else scale})
        rest = [_labelled(self._of(v), "S" + _AFTER) for v in node.inputs[3:]]
        for output in node.outputs:
            self._ways[output] = _union([*found, *rest])

    def _add(
        self, node: ir.Node, layer: Layer, chain: Chain, reaching: list[Ways], part: tuple[int, int] | None = None
    ) -> Group:
        weight, members = layer.weight, chain.members
        if part is not None and weight is not None:
            weight = _columns(weight, layer.channels, part)
            members = [m.narrowed(*part) for m in members]
        shape = weight.shape if weight is not None else members[0].parts[0].shape
        group = Group(
            len(self.groups),
            layer.kind,
            (layer.kind, shape, *layer.attributes),
            first_output(node),
            weight,
            layer.channels,
            members,
            _edges(reaching),
            [*((node, i) for i in layer.operands), *chain.absorbed],
            chain.onward if part is None else (1.0, 0.0),
            chain.end if part is None and chain.complete else None,
        )
        self.groups.append(group)
        return group

    def _take_part(self, node: ir.Node) -> bool:
        """Whether a node's outputs were assigned when the layer was found whose channels it parts."""
        return bool(node.outputs) and all(v in self._ways for v in node.outputs)

    def _generic_parameters(self, node: ir.Node) -> None:
        """Add a group for each operand with many numbers that no kind of layer is known for."""
        if node.op_type in _FIRST_ONLY and not is_op(node, "Slice"):
            return
        for index, value in enumerate(node.inputs):
            if (node, index) in self._absorbed or value is None or self._of(value):
                continue
            weight = self.tracer.parameter(value)
            if weight is None or not self._enters(node, value):
                continue
            shape = weight.shape
            while shape[0] == 1:
                shape = shape[1:]
            others = [self._of(v) for i, v in enumerate(node.inputs) if i != index]
            group = Group(
                len(self.groups),
                node.op_type,
                (node.op_type, index if len(node.inputs) > 2 else 0, shape),
                value.name or first_output(node),
                reshaped(weight, shape),
                0,
                edges=_edges(others),
                operands=[(node, index)],
            )
            self.groups.append(group)
            self._ways[value] = {(group.index, ""): 1.0}

    def _enters(self, node: ir.Node, value: ir.Value) -> bool:
        """Whether a traced operand meets anything that is computed here; otherwise it is on its way to a layer."""
        if all(self.tracer.is_constant(v) for v in node.inputs):
            return False
        return any(self.tracer.tensor(o) is None for o in node.outputs)


def _columns(weight: Tensor, axis: int, part: tuple[int, int]) -> Tensor:
    return Sliced(weight, axis, *part)


def _labelled(ways: Ways, label: str) -> Ways:
    found: Ways = {}
    for (source, before), gain in ways.items():
        _merge(found, (source, joined(before, label)), gain)
    return found


def _times(ways: Ways, factor: float | None) -> Ways:
    return {key: gain if "S" in key[1] or "N" in key[1] else _product(gain, factor) for key, gain in ways.items()}


def _product(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first * second


def _union(all_ways: Iterable[Ways]) -> Ways:
    found: Ways = {}
    for ways in all_ways:
        for key, gain in ways.items():
            _merge(found, key, gain)
    return found


def _merge(found: Ways, key: tuple[int, str], gain: float | None) -> None:
    if key in found and found[key] != gain:
        gain = None
    found[key] = gain


def _edges(reaching: Iterable[Ways]) -> list[Edge]:
    """Return the ways as edges; a direct way next to one through a nonlinearity is part of that (x * sigmoid(x))."""
    ways = _union(reaching)
    bent = {source for source, label in ways if label == "N"}
    return [
        Edge(source, label, gain)
        for (source, label), gain in sorted(ways.items(), key=lambda item: item[0])
        if not (label == "" and source in bent)
    ]
