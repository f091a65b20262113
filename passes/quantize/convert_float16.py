"""Compute in float16."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.half import Ports, ports
from onnxopt.contract import NEEDS_DATA, Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.errors import UsageError
from onnxopt.graph import (
    Names,
    Scope,
    add_constant,
    attribute,
    constant_tensor,
    drop_unused_constants,
    first_output,
    insert_before,
    is_op,
    make_node,
    only_use,
    remove_node,
    replace_value,
    root_scopes,
    use_count,
)
from onnxopt.numeric import deferred
from onnxopt.numeric.peaks import Peak

LARGEST = 65504.0
"""The largest float16."""
SMALLEST = 2.0**-14
"""Below it float16 has fewer than 11 bits left, and at 2**-25 none."""
EXACT = 2048
"""Up to here float16 holds every integer."""
WIDEST_ANGLE = 8.0
"""Beyond it an angle in float16 is off by more than 0.004."""
MASKED = 49152.0
"""What a mask's out-of-range numbers become: with the lowest score added, still within the range. Scores up to 16 drown
in it, so that a row that is masked as a whole comes out even, as it does in float32."""
NEEDED_OPSET = 8
"""Before it Max and Min, which hold masks within the range, did not broadcast."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertFloat16(GraphPass):
    """Compute in float16 on cuda, and in float32 wherever numbers would overflow or drown.

    Inputs and outputs of the graph keep their types: Casts stand behind and before them, and at the borders of what
    stays in float32, one per value. What stays is found from the data: operators that touch values beyond a quarter
    of the largest float16 (see `margin`) or entirely below 2**-14, angles beyond 8, and whatever computes sizes and
    positions. Operators without a float16 kernel stay, and so do bodies of If, Loop and Scan. Weights are converted
    once however often they are used. Masks of -3.4e38 that are added to scores before Softmax become -49,152.

    Attributes:
        margin: Inputs other than those given may reach so many times the magnitudes seen.
    """

    name: ClassVar[str] = "convert-float16"
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE
    needs_data: ClassVar[bool] = True

    margin: float = 4.0

    def __post_init__(self) -> None:
        """Check the option.

        Raises:
            UsageError: If it cannot be used.
        """
        if not 1.0 <= self.margin < float("inf"):
            raise UsageError(f"convert-float16: margin is {self.margin}; use 1 or more.")

    def skip_reason(self, model: ir.Model, ctx: Context) -> str | None:
        """Return why float16 does not pay or cannot be judged."""
        if ctx.target != "cuda":
            return (
                "it is for the target cuda; a CPU computes float16 more slowly than float32 (store-float16 halves the "
                "file at no cost)"
            )
        opset = next(root_scopes(model)).opset
        if opset < NEEDED_OPSET:
            return f"it needs opset {NEEDED_OPSET}, and the model has {opset}"
        return NEEDS_DATA if ctx.calibration is None else None

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per node; the model is observed once before."""
        scope = next(root_scopes(model))
        plan = _Plan(model, scope, ctx, LARGEST / self.margin)
        conversion = _Conversion(scope, Names(model), plan)
        for node in list(scope.graph):
            site = Site(self.name, "", first_output(node))
            reason = plan.reasons.get(node)
            if reason is not None:
                yield Refusal(site, reason)
            elif node in plan.ports and conversion.pays(node):
                yield Edit(site, f"{node.op_type} in float16", functools.partial(conversion.apply, node))

    def caveat(self) -> str:
        """Say where float16 pays."""
        return "float16 is for GPUs: on a CPU, which this may have been measured on, it is slower than float32."


class _Plan:
    """Decides which nodes of the main graph stay in float32, and why.

    Attributes:
        ports: Where the nodes that can turn have float32.
        reasons: Why nodes stay.
        exempt: Pairs of node and value for which magnitude does not count, because the value masks scores.
        reaching: Values that leave the range of float16.
    """

    def __init__(self, model: ir.Model, scope: Scope, ctx: Context, limit: float) -> None:
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


class _Conversion:
    """Turns nodes, in the order of the graph, and keeps track of which values exist in both types."""

    def __init__(self, scope: Scope, names: Names, plan: _Plan) -> None:
        self._scope, self._names, self._plan = scope, names, plan
        self._halves: dict[ir.Value, ir.Value] = {}

    def pays(self, node: ir.Node) -> bool:
        """Whether to turn a node: one that gives no real numbers only where it takes float16 as it comes."""
        where = self._plan.ports[node]
        if where.outputs:
            return True
        taken = [v for i in where.inputs if (v := node.inputs[i]) is not None and constant_tensor(v) is None]
        return all(v in self._halves and is_op(v.producer(), "Cast") for v in taken) and bool(taken)

    def apply(self, node: ir.Node) -> None:
        """Turn a node: it takes float16, and gives float32 through Casts that go when nothing needs them."""
        where = self._plan.ports[node]
        for index in where.inputs:
            value = node.inputs[index]
            if value is not None:
                node.replace_input_with(index, self._half(value, node))
                self._forget(value)
        self._retype(node)
        for index in reversed(where.outputs):
            self._restore(node, node.outputs[index])

    def _half(self, value: ir.Value, user: ir.Node) -> ir.Value:
        """Return the value in float16."""
        if value not in self._halves:
            tensor = constant_tensor(value)
            made = self._cast(value, user) if tensor is None else self._constant(value, tensor, user)
            self._halves[value] = made
        return self._halves[value]

    def _constant(self, value: ir.Value, tensor: ir.TensorProtocol, user: ir.Node) -> ir.Value:
        narrow = deferred.tensor(
            lambda: to_half(tensor.numpy()), ir.DataType.FLOAT16, tensor.shape.numpy(), value.name or "constant"
        )
        return add_constant(self._scope, self._names, f"{value.name}_float16", narrow, user)

    def _cast(self, value: ir.Value, user: ir.Node) -> ir.Value:
        source = value
        if self._may_overflow(value):
            source = self._clipped(value, user)
        to = {"to": ir.DataType.FLOAT16.value}
        cast = make_node(self._names, "Cast", [source], to, like=value)
        cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
        insert_before(user, cast)
        return cast.outputs[0]

    def _may_overflow(self, value: ir.Value) -> bool:
        """Whether it leaves the range, or would with other inputs because a constant behind it does."""
        peak = self._plan.peak(value)
        if peak is not None and peak.unbounded:
            return False  # a mask of infinities stays one
        node = value.producer()
        return value in self._plan.reaching or (
            node is not None
            and any(v in self._plan.reaching and constant_tensor(v) is not None for v in node.inputs if v is not None)
        )

    def _clipped(self, value: ir.Value, user: ir.Node) -> ir.Value:
        """Return the value within what masks may have."""
        for op_type, bound in (("Max", -MASKED), ("Min", MASKED)):
            constant = add_constant(self._scope, self._names, f"{value.name}_bound", np.array(bound, np.float32), user)
            node = make_node(self._names, op_type, [value, constant], like=value)
            insert_before(user, node)
            value = node.outputs[0]
        return value

    def _forget(self, value: ir.Value) -> None:
        """Remove a value that nothing uses any more, if it is a constant or a Cast of this pass."""
        if use_count(value) or value.is_graph_output():
            return
        node = value.producer()
        if node is not None and value in self._halves and is_op(node, "Cast"):
            remove_node(node)
        else:
            drop_unused_constants([value])

    def _retype(self, node: ir.Node) -> None:
        """Change the attributes that say which type a node gives."""
        if is_op(node, "Cast") and self._plan.ports[node].outputs:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16.value)
        elif is_op(node, "ConstantOfShape"):
            fill = attribute(node, "value")
            array = np.zeros(1, np.float32) if fill is None else fill.numpy()
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(to_half(array), name="value"))

    def _restore(self, node: ir.Node, value: ir.Value) -> None:
        """Let the users of an output have it in float32."""
        half = ir.TensorType(ir.DataType.FLOAT16)
        if not use_count(value) and not value.is_graph_output():
            value.type = half
            return
        name, was_output = value.name, value.is_graph_output()
        cast = make_node(self._names, "Cast", [None], {"to": ir.DataType.FLOAT.value}, like=value)
        restored = cast.outputs[0]
        restored.type = restored.type or ir.TensorType(ir.DataType.FLOAT)
        self._scope.graph.insert_after(node, cast)
        replace_value(value, restored)
        value.type = half
        if was_output:
            value.name = self._names.fresh(f"{name}_float16")
        cast.replace_input_with(0, value)
        self._halves[restored] = value


def to_half(array: np.ndarray) -> np.ndarray:
    """Return an array in float16; finite numbers that it cannot hold become those of a mask."""
    out_of_range = np.isfinite(array) & (np.abs(array) > LARGEST)
    if out_of_range.any():
        array = np.where(out_of_range, np.copysign(np.float32(MASKED), array), array)
    return array.astype(np.float16)
