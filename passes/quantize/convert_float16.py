"""Compute in float16."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.half_plan import LARGEST, Plan
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
    remove_node,
    replace_value,
    root_scopes,
    use_count,
)
from onnxopt.numeric import deferred

MASKED = 49152.0
"""What a mask's out-of-range numbers become: with the lowest score added, still within the range. Scores up to 16 drown
in it, so that a row that is masked as a whole comes out even, as it does in float32."""
NEEDED_OPSET = 8
"""Before it Max and Min, which hold masks within the range, did not broadcast."""


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
        plan = Plan(model, scope, ctx, LARGEST / self.margin)
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


class _Conversion:
    """Turns nodes, in the order of the graph, and keeps track of which values exist in both types."""

    def __init__(self, scope: Scope, names: Names, plan: Plan) -> None:
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
