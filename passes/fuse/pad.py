"""Zeros that a Pad puts around an image become the padding of the convolutions behind it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import ClassVar

import onnx_ir as ir

from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.graph import (
    Scope,
    attribute,
    constant_ints,
    constant_scalar,
    has_references,
    is_op,
    remove_unused,
    scopes,
)

AMOUNTS_AS_INPUT = 11
"""From this opset on, Pad takes its amounts and its value as inputs."""

_MOST_USERS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusePad(GraphPass):
    """Fold a Pad with zeros into every Conv and AveragePool that uses it.

    An AveragePool then counts the padding. A MaxPool pads with minus infinity, so what pads for one stays.
    """

    name: ClassVar[str] = "fuse-pad"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per Pad."""
        for scope in scopes(model):
            for node in scope.graph:
                if not is_op(node, "Pad") or not _users(node):
                    continue
                site = Site(self.name, scope.path, node.outputs[0].name or "")
                plan = _plan(node, scope)
                if isinstance(plan, str):
                    yield Refusal(site, plan)
                elif plan is not None:
                    kinds = ", ".join(sorted({user.op_type for user, _ in plan}))
                    yield Edit(site, f"folded into {kinds}", functools.partial(_apply, node, plan))


_Plan = list[tuple[ir.Node, tuple[int, ...]]]
"""Each user with the pads it gets."""


def _users(pad: ir.Node) -> list[ir.Node]:
    return [use.node for use in pad.outputs[0].uses()]


def _plan(pad: ir.Node, scope: Scope) -> _Plan | str | None:
    users = _users(pad)
    if pad.outputs[0].is_graph_output() or not any(
        is_op(u, "Conv", "AveragePool", "MaxPool") and u.inputs[0] is pad.outputs[0] for u in users
    ):
        return None
    amounts = _zeros(pad, scope.opset)
    if amounts is None:
        return "it does not pad with a constant number of zeros"
    rank = len(amounts) // 2
    if any(amounts[axis] or amounts[rank + axis] for axis in (0, 1)) or min(amounts) < 0:
        return "it pads the batch or the channels, or cuts something off"
    added = (*amounts[2:rank], *amounts[rank + 2 :])
    if len(users) > _MOST_USERS:
        return "too many nodes use it"
    plan: _Plan = []
    for user in users:
        pads = _with_pads(user, pad, added, scope.opset)
        if isinstance(pads, str):
            return pads
        plan.append((user, pads))
    return plan


def _zeros(pad: ir.Node, opset: int) -> tuple[int, ...] | None:
    """Return how many zeros a Pad puts before and after each axis, or None."""
    if has_references(pad) or attribute(pad, "mode", "constant") != "constant":
        return None
    if opset < AMOUNTS_AS_INPUT:
        given = attribute(pad, "pads")
        return tuple(given) if given and attribute(pad, "value", 0.0) == 0 else None
    inputs = [*pad.inputs, None, None, None]
    if inputs[3] is not None or (inputs[2] is not None and constant_scalar(inputs[2]) != 0):
        return None
    return constant_ints(inputs[1])


def _with_pads(user: ir.Node, pad: ir.Node, added: Sequence[int], opset: int) -> tuple[int, ...] | str:
    """Return the pads a node gets when it does the padding, or why it cannot."""
    if is_op(user, "MaxPool"):
        return "a MaxPool pads with minus infinity, not with zeros"
    if not is_op(user, "Conv", "AveragePool") or user.inputs[0] is not pad.outputs[0]:
        return "something else uses it, too"
    if user.graph is not pad.graph or has_references(user):
        return "what uses it is in another graph, or an attribute refers to the function's caller"
    if attribute(user, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "the padding of what uses it depends on the size of the image"
    own = attribute(user, "pads") if attribute(user, "auto_pad", "NOTSET") == "NOTSET" else None
    own = own or (0,) * len(added)
    if len(own) != len(added):
        return "the two do not pad the same number of axes"
    pads = tuple(a + b for a, b in zip(own, added, strict=True))
    if is_op(user, "AveragePool"):
        reason = _average_reason(user, own, pads, opset)
        if reason:
            return reason
    return pads


def _average_reason(user: ir.Node, own: Sequence[int], pads: Sequence[int], opset: int) -> str | None:
    if opset < 7 or attribute(user, "ceil_mode", 0):
        return "a pooling window may reach beyond the padding"
    if any(own) and not attribute(user, "count_include_pad", 0):
        return "the pooling leaves its own padding out of the average"
    kernel = attribute(user, "kernel_shape", ())
    if any(amount >= size for amount, size in zip(pads, (*kernel, *kernel), strict=False)):
        return "a pooling window could lie in the padding as a whole"
    return None


def _apply(pad: ir.Node, plan: _Plan) -> None:
    source = pad.inputs[0]
    for user, pads in plan:
        user.replace_input_with(0, source)
        user.attributes.pop("auto_pad", None)
        user.attributes["pads"] = ir.AttrInt64s("pads", pads)
        if is_op(user, "AveragePool"):
            user.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 1)
    remove_unused(pad)
