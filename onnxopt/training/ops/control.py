"""If, Loop and Scan: their bodies run like the graph around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onnxopt.training.call import Call, Operator
from onnxopt.training.values import NoCounterpart, ints, normal_axis


def if_(call: Call, condition: Tensor) -> Any:
    """Run one branch."""
    branch = call.get("then_branch" if bool(condition.reshape(-1)[0]) else "else_branch")
    return tuple(call.run_body(branch, []))


def loop(call: Call, trips: Tensor | None, condition: Tensor | None, *carried: Any) -> Any:
    """Run the body while the condition holds; what it scans out is stacked."""
    body = call.get("body")
    limit = None if trips is None else ints(trips)[0]
    going = condition is None or bool(condition.reshape(-1)[0])
    state = list(carried)
    scanned: list[list[Tensor]] = [[] for _ in range(len(body.outputs) - 1 - len(state))]
    iteration = 0
    while going and (limit is None or iteration < limit):
        number = torch.tensor(iteration, dtype=torch.int64)
        results = call.run_body(body, [number, torch.tensor(True), *state])
        going = bool(results[0].reshape(-1)[0])
        state = results[1 : 1 + len(state)]
        for column, value in zip(scanned, results[1 + len(state) :], strict=True):
            column.append(value)
        iteration += 1
    if iteration == 0 and scanned:
        raise NoCounterpart("makes a stack of nothing: its body never ran")
    return (*state, *(torch.stack(column) for column in scanned))


def scan(call: Call, *inputs: Any) -> Any:
    """Run the body over slices."""
    body, count = call.get("body"), call.get("num_scan_inputs")
    if call.opset < 9:
        raise NoCounterpart("is the form of opset 8")
    states = list(inputs[: len(inputs) - count])
    sequences = list(inputs[len(inputs) - count :])
    in_axes = call.get("scan_input_axes") or [0] * count
    in_turned = call.get("scan_input_directions") or [0] * count
    columns: list[list[Tensor]] = [[] for _ in range(len(body.outputs) - len(states))]
    parts = [
        (s.flip(normal_axis(a, s.ndim)) if back else s).unbind(normal_axis(a, s.ndim))
        for s, a, back in zip(sequences, in_axes, in_turned, strict=True)
    ]
    for slices in zip(*parts, strict=True):
        results = call.run_body(body, [*states, *slices])
        states = results[: len(states)]
        for column, value in zip(columns, results[len(states) :], strict=True):
            column.append(value)
    out_axes = call.get("scan_output_axes") or [0] * len(columns)
    out_turned = call.get("scan_output_directions") or [0] * len(columns)
    stacked = [
        torch.stack(column[::-1] if back else column, dim=normal_axis(axis, column[0].ndim + 1))
        for column, axis, back in zip(columns, out_axes, out_turned, strict=True)
    ]
    return (*states, *stacked)


OPS: dict[str, Operator] = {"If": if_, "Loop": loop, "Scan": scan}
