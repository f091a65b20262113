"""Which nodes can compute in float16 without leaving its range, as far as data shows."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import onnx_ir as ir

from onnxopt.analysis.half import Ports, ports
from onnxopt.contract import Context
from onnxopt.graph import Scope, attribute, constant_tensor, is_op, only_use
from onnxopt.numeric.peaks import Peak

LARGEST = 65504.0
"""The largest float16."""
SMALLEST = 2.0**-14
"""Below it float16 has fewer than 11 bits left, and at 2**-25 none."""
WIDEST_ANGLE = 8.0
"""Beyond it an angle in float16 is off by more than 0.004."""
LARGE_CONSTANT = 4096
"""A product with a constant of so many elements is a layer; smaller ones make positions and scales."""

HEAVY = frozenset(
    (
        "Attention",
        "Conv",
        "ConvTranspose",
        "Einsum",
        "FusedMatMul",
        "GRU",
        "Gather",
        "Gemm",
        "LSTM",
        "MatMul",
        "MultiHeadAttention",
        "RNN",
    )
)
"""Operators that gain; a piece of the graph without any is not worth its Casts."""

_MASKING_DEPTH = 3
_EXTENT = "which float16 holds exactly up to 2,048 only"


class Plan:
    """Decides which nodes of the main graph stay in float32, and why.

    Attributes:
        ports: Where the nodes that can turn have float32.
        reasons: Why nodes stay.
        exempt: Pairs of node and value for which magnitude does not count, because the value masks scores.
        reaching: Values that leave the range of float16.
    """

    def __init__(self, model: ir.Model, scope: Scope, ctx: Context, limit: float) -> None:
        """Run the calibration data through the model and decide; `limit` is the largest magnitude that may turn."""
        self._graph, self._limit = scope.graph, limit
        self.ports: dict[ir.Node, Ports] = {}
        self.reasons: dict[ir.Node, str] = {}
        self.exempt: set[tuple[ir.Node, ir.Value]] = set()
        self.reaching: set[ir.Value] = set()
        self._real = functools.partial(_is_real, ctx)
        for node in scope.graph:
            found = ports(node, scope.opset, ctx.shapes)
            if isinstance(found, str):
                self.reasons[node] = found
            elif found.inputs or found.outputs:
                self.ports[node] = found
        self._peaks = self._observe(model, ctx)
        self._exempt_masks()
        for node in self.ports:
            self._judge(node)
        self._keep_positions()
        self._keep_angles()
        self._keep_small_pieces()

    def peak(self, value: ir.Value) -> Peak | None:
        """Return what magnitudes a value has; None when it was not seen."""
        known = self._peaks.get(value)
        tensor = value.const_value if value.is_initializer() else constant_tensor(value)
        if known is None and tensor is not None and tensor.dtype == ir.DataType.FLOAT:
            known = self._peaks[value] = Peak()
            known.add(tensor.numpy())
        return known

    def _observe(self, model: ir.Model, ctx: Context) -> dict[ir.Value, Peak]:
        assert ctx.calibration is not None
        found: dict[ir.Value, Peak] = {}
        for node, where in self.ports.items():
            for value in where.values(node):
                if not value.is_initializer() and constant_tensor(value) is None:
                    found.setdefault(value, Peak())
        ctx.calibration.observe(model, {value.name or "": [peak] for value, peak in found.items()})
        return found

    def _judge(self, node: ir.Node) -> None:
        """Keep a node in float32 for the magnitude of a value that it takes or gives."""
        for value in self.ports[node].values(node):
            peak = self.peak(value)
            if peak is None:
                continue
            constant = constant_tensor(value) is not None
            limit = LARGEST if constant else self._limit
            if peak.largest > limit:
                self.reaching.add(value)
                if (node, value) in self.exempt:
                    continue
                what = "a constant of" if constant else "values up to"
                self.reasons.setdefault(node, f"it computes with {what} {peak.largest:.3g}; float16 ends at 65,504")
            elif 0 < peak.largest < SMALLEST:
                what = "a constant" if constant else "values"
                self.reasons.setdefault(node, f"it computes with {what} below 6.1e-5, which float16 holds poorly")

    def _exempt_masks(self) -> None:
        """Find additions and selections of masks before Softmax; a mask needs no more than to be far below."""
        for node in self.ports:
            if is_op(node, "Softmax"):
                self._exempt(node, node.inputs[0], _MASKING_DEPTH)

    def _exempt(self, user: ir.Node, value: ir.Value | None, depth: int) -> bool:
        """Exempt what masks a value; return whether there are scores of ordinary size below the masks."""
        if value is None or self._within(value):
            return value is not None
        node = value.producer()
        if node not in self.ports or not depth or only_use(value) is not user or not is_op(node, "Add", "Where"):
            return False
        operands = [v for i in self.ports[node].inputs if (v := node.inputs[i]) is not None]
        scores = [v for v in operands if self._exempt(node, v, depth - 1)]
        if not scores:
            return False
        self.exempt.update((node, v) for v in (*operands, value))
        self.exempt.add((user, value))
        return True

    def _within(self, value: ir.Value) -> bool:
        peak = self.peak(value)
        return constant_tensor(value) is None and peak is not None and peak.largest <= self._limit

    def _keep_positions(self) -> None:
        """Keep what computes sizes and positions."""
        for node in self._graph:
            sinks: Iterable[ir.Value | None] = ()
            if is_op(node, "Range"):
                sinks = node.inputs
            elif is_op(node, "Resize", "Upsample"):
                sinks = node.inputs[1:]
            elif is_op(node, "Cast") and ir.DataType(attribute(node, "to", 1)).is_integer():
                sinks = node.inputs
            self._keep_behind(sinks, f"it computes sizes or positions, {_EXTENT}")

    def _keep_angles(self) -> None:
        for node in [n for n in self.ports if is_op(n, "Sin", "Cos")]:
            peak = self.peak(node.inputs[0]) if node.inputs[0] is not None else None
            if peak is not None and peak.largest > WIDEST_ANGLE:
                reason = f"it computes with angles up to {peak.largest:.3g}, which float16 holds too coarsely"
                self.reasons.setdefault(node, reason)
                self._keep_behind(node.inputs, reason)

    def _keep_behind(self, values: Iterable[ir.Value | None], reason: str) -> None:
        """Keep what values are computed from, up to the layers that they come from."""
        pending = [v for v in values if self._real(v)]
        seen: set[ir.Node] = set()
        while pending:
            value = pending.pop()
            node = value.producer() if value is not None else None
            if node is None or node in seen or node.graph is not self._graph or _is_layer(node):
                continue
            seen.add(node)
            if node in self.ports:
                self.reasons.setdefault(node, reason)
                pending.extend(v for v in node.inputs if self._real(v))

    def _keep_small_pieces(self) -> None:
        """Keep pieces of the graph in which nothing gains."""
        parent: dict[ir.Node, ir.Node] = {}

        def root(node: ir.Node) -> ir.Node:
            while parent.setdefault(node, node) is not node:
                parent[node] = parent[parent[node]]
                node = parent[node]
            return node

        turning = {n: p for n, p in self.ports.items() if n not in self.reasons}
        for node, where in turning.items():
            for index in where.inputs:
                value = node.inputs[index]
                source = value.producer() if value is not None else None
                if source in turning and value in [source.outputs[i] for i in turning[source].outputs]:
                    parent[root(source)] = root(node)
        gaining = {root(node) for node in turning if node.op_type in HEAVY}
        for node in turning:
            if root(node) not in gaining:
                self.reasons[node] = "it is not connected with any layer that float16 makes faster"


def _is_real(ctx: Context, value: ir.Value | None) -> bool:
    return value is not None and ctx.shapes.dtype(value) == ir.DataType.FLOAT


def _is_layer(node: ir.Node) -> bool:
    """Whether it multiplies by a large constant, or two computed values that are not positions."""
    if node.op_type not in HEAVY:
        return False
    tensors = [t for v in node.inputs if (t := constant_tensor(v)) is not None]
    return not tensors or any(t.size >= LARGE_CONSTANT for t in tensors)
