"""The blocks a network is built of, and where its head begins.

The activations of a network are what depends on its inputs by way of a layer with weights: masks, positions and
sizes do not count. A bottleneck is a value that all of them pass: at its place in the order of computation nothing
else that was computed before is still needed. Between two bottlenecks lies a residual block where values take
more than one way, and a plain layer otherwise.
"""

from __future__ import annotations

import dataclasses
import itertools

import onnx_ir as ir

from onnxopt.graft.cut import SIZES, Flow
from onnxopt.graft.reasons import RefusedError
from onnxopt.graph import attribute, constant_ints, constant_tensor, is_op

_WEIGHTY = 64
"""Elements from which on a constant with more than one axis counts as weights."""
_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv", "FusedMatMul", "MatMulNBits"})
_QUANTIZED = frozenset({"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul"})
_MIXERS = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention", "LSTM", "GRU", "RNN"})
_SCORES = frozenset({"Softmax", "Sigmoid", "Tanh"})
_SEQUENCES = frozenset({"SplitToSequence", "SequenceConstruct", "SequenceInsert", "SequenceErase", "SequenceMap"})
"""What they compute is no place to cut: other exports of a network have tensors alone."""
_TABLES = frozenset({"Gather", "GatherBlockQuantized", "EmbedLayerNormalization"})
_SOURCES = _LAYERS | _QUANTIZED | _MIXERS | _TABLES
_LONGEST_PERIOD = 4


@dataclasses.dataclass(frozen=True)
class _Segment:
    """What lies between two bottlenecks.

    Attributes:
        start: The first.
        end: The second.
        layers: Operators with weights in between, sorted.
        products: The same, with products of activations and what normalizes them.
        residual: Whether values take more than one way.
    """

    start: ir.Value
    end: ir.Value
    layers: tuple[str, ...]
    products: tuple[str, ...]
    residual: bool


def blocks(flow: Flow) -> list[tuple[ir.Value, ir.Value]]:
    """Return first and last value of every block, in order.

    Residual blocks where there are at least two of them, layers with weights otherwise. Normalizations and
    activations behind a block belong to it. Blocks that alternate, such as attention and feed-forward layers, are
    taken together.
    """
    segments = _segments(flow)
    wanted = {id(s) for s in _residual(segments) or [s for s in segments if s.layers]}
    bare: list[_Segment] = []
    extended: list[_Segment] = []
    for segment in segments:
        if id(segment) in wanted:
            bare.append(segment)
            extended.append(segment)
        elif extended and not segment.layers and extended[-1].end is segment.start:
            extended[-1] = dataclasses.replace(extended[-1], end=segment.end)
    return [(g[0].start, g[-1].end) for g in _grouped(_as_usual(bare, extended))]


def _as_usual(bare: list[_Segment], extended: list[_Segment]) -> list[_Segment]:
    """Return the segments with what follows them where that is usual for their kind.

    What stands behind few blocks of a kind, a last normalization for one, is no part of them.
    """
    followed: dict[tuple[str, ...], list[bool]] = {}
    for one, other in zip(bare, extended, strict=True):
        followed.setdefault(one.products, []).append(one.end is not other.end)
    return [
        other if 2 * sum(followed[one.products]) > len(followed[one.products]) else one
        for one, other in zip(bare, extended, strict=True)
    ]


def _residual(segments: list[_Segment]) -> list[_Segment]:
    """Return the residual blocks, unless there is but one."""
    found = [s for s in segments if s.residual and s.layers]
    return found if len(found) > 1 else []


def _grouped(segments: list[_Segment]) -> list[list[_Segment]]:
    """Put segments together that repeat with a period longer than one."""
    joined = all(a.end is b.start for a, b in itertools.pairwise(segments))
    kinds = [s.products for s in segments]
    if joined and len(set(kinds)) > 1:
        for period in range(2, _LONGEST_PERIOD + 1):
            if len(kinds) % period == 0 and len(kinds) > period and kinds[period:] == kinds[:-period]:
                return [segments[i : i + period] for i in range(0, len(segments), period)]
    return [[s] for s in segments]


def _segments(flow: Flow) -> list[_Segment]:
    """Return what lies between the bottlenecks, in order."""
    active = _active(flow)
    remaining = {v: sum(r in active for r in flow.readers.get(v, ())) for n in active for v in n.outputs}
    found: list[_Segment] = []
    live: set[ir.Value] = set()
    start: ir.Value | None = None
    layers: list[str] = []
    products: list[str] = []
    widest = 0
    for node in flow.nodes:
        if node not in active:
            continue
        if start is not None and node.op_type not in _TABLES and has_weights(flow, node):
            layers.append(node.op_type)
        if start is not None and node.op_type in _LAYERS | _MIXERS | _SCORES:
            products.append(node.op_type)
        for value in flow.reads[node]:
            if value in remaining:
                remaining[value] -= 1
                if not remaining[value]:
                    live.discard(value)
        live.update(v for v in node.outputs if remaining[v])
        widest = max(widest, len(live))
        # The last value is read by nobody; it ends the last segment.
        here = next(iter(live)) if len(live) == 1 else node.outputs[0] if not live else None
        if here is None or here.producer() is not node or node.op_type in _SEQUENCES:
            continue
        if start is not None:
            found.append(_Segment(start, here, tuple(sorted(layers)), tuple(sorted(products)), widest > 1))
        start, layers, products, widest = here, [], [], 0
    return found


def _active(flow: Flow) -> set[ir.Node]:
    """Return the nodes that compute activations which matter to the first output."""
    values: set[ir.Value] = set()
    nodes: set[ir.Node] = set()
    for node in flow.nodes:
        if node.op_type in SIZES:
            continue
        # The second input of CastLike is looked at for its type alone.
        read = flow.reads[node][:1] if node.op_type == "CastLike" else flow.reads[node]
        begins = has_weights(flow, node) and any(v in flow.varying for v in read)
        if begins or any(v in values for v in read):
            nodes.add(node)
            values.update(node.outputs)
    outputs = [v for v in flow.graph.outputs if v in values]
    return nodes & flow.needed_for(outputs[:1], set())


def has_weights(flow: Flow, node: ir.Node) -> bool:
    """Whether a node is a layer that holds weights, or looks up a table."""
    return node.op_type in _SOURCES and any(v is not None and _is_weighty(flow, v) for v in node.inputs)


def _is_weighty(flow: Flow, value: ir.Value) -> bool:
    """Whether a value is a large constant, or is computed from constants, as weights that are stored small are."""
    if value in flow.varying:
        return False
    tensor = constant_tensor(value) or value.const_value
    # Frequencies of positions, for one, lie along a single axis.
    return tensor is None or (tensor.size >= _WEIGHTY and sum(d > 1 for d in tensor.shape.numpy()) > 1)


def backbone(flow: Flow) -> ir.Value:
    """Return the value in front of the head.

    That is what the last pooling over space or time reads; without one, what the last linear layer reads where it
    lies behind the last block, and else the end of the last block.

    Raises:
        RefusedError: If there is nothing of the kind.
    """
    active = _active(flow)
    ordered = [node for node in flow.nodes if node in active]
    for node in reversed(ordered):
        value = node.inputs[0] if _pools(node) else None
        if value is None or value.producer() is None:
            continue
        behind = [n for n in flow.after(node.outputs) & active if n.op_type in _LAYERS and has_weights(flow, n)]
        # It is the last one when what follows are linear layers.
        if all(n.op_type in ("Gemm", "MatMul") or _is_pointwise(n) for n in behind):
            return value
    found = blocks(flow) if _residual(_segments(flow)) else []
    layer = next((n for n in reversed(ordered) if n.op_type in _LAYERS and has_weights(flow, n)), None)
    if found and (layer is None or layer not in flow.after([found[-1][1]])):
        return found[-1][1]
    if layer is not None and layer.inputs[0] is not None and layer.inputs[0].producer() is not None:
        return layer.inputs[0]
    raise RefusedError("no backbone", "No pooling and no linear layer was found in front of the output; name tensors.")


def _pools(node: ir.Node) -> bool:
    """Whether a node averages over space or time."""
    if is_op(node, "GlobalAveragePool", "GlobalMaxPool"):
        return True
    if not is_op(node, "ReduceMean", "ReduceMax"):
        return False
    axes = attribute(node, "axes") or (_written(node.inputs[1]) if len(node.inputs) > 1 else None)
    # Over the last axis alone it is a part of a normalization.
    return axes is not None and tuple(axes) not in ((-1,), (), (3,)) and (len(axes) > 1 or axes[0] == 1)


def _written(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return constant integers, also where exporters put a node without effect on the numbers behind them."""
    node = None if value is None else value.producer()
    return constant_ints(node.inputs[0] if is_op(node, "Reshape", "Cast", "Identity") and node is not None else value)


def _is_pointwise(node: ir.Node) -> bool:
    """Whether a convolution is a linear layer in disguise: with a kernel of one element."""
    weight = constant_tensor(node.inputs[1]) if len(node.inputs) > 1 else None
    return node.op_type == "Conv" and weight is not None and all(d == 1 for d in weight.shape.numpy()[2:])
