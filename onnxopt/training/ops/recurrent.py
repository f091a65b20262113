"""LSTM, GRU and RNN, step by step, with the gates in ONNX's order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from onnxopt.training.call import Call, Operator
from onnxopt.training.values import NoCounterpart

_Step = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]
"""Takes what the input contributes at one time and the state; gives the next state, the hidden one first."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "softsign": functional.softsign,
    "softplus": functional.softplus,
}


def _activations(call: Call, direction: int, defaults: Sequence[str]) -> list[Callable[[Tensor], Tensor]]:
    given = list(call.get("activations") or ())
    if call.get("activation_alpha") or call.get("activation_beta"):
        raise NoCounterpart("has activations with parameters")
    names = given[direction * len(defaults) : (direction + 1) * len(defaults)] or list(defaults)
    for name in names:
        if name.lower() not in _ACTIVATIONS:
            raise NoCounterpart(f'has the activation "{name}"')
    return [_ACTIVATIONS[name.lower()] for name in names]


def _limited(call: Call, x: Tensor) -> Tensor:
    limit = call.get("clip")
    return x if limit is None else x.clamp(-limit, limit)


def _reversed(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Turn around [sequence, batch, ...] in time, each sample within its length."""
    if lengths is None:
        return x.flip(0)
    steps = torch.arange(x.shape[0]).reshape(-1, 1)
    order = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return x[order, torch.arange(x.shape[1])]


def _unrolled(
    step: _Step, inputs: Tensor, state: tuple[Tensor, ...], lengths: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the hidden state at each time and the last states."""
    seen = []
    for time, part in enumerate(inputs):
        after = step(part, state)
        if lengths is not None:
            running = (time < lengths).reshape(-1, 1)
            after = tuple(torch.where(running, new, old) for new, old in zip(after, state, strict=True))
            seen.append(torch.where(running, after[0], torch.zeros_like(after[0])))
        else:
            seen.append(after[0])
        state = after
    return torch.stack(seen), state


def _recurrent(
    call: Call,
    x: Tensor,
    w: Tensor,
    lengths: Tensor | None,
    initial: Sequence[Tensor | None],
    make: Callable[[int], tuple[Callable[[Tensor], Tensor], _Step]],
) -> tuple[Tensor, ...]:
    """Run all directions.

    Args:
        call: The node.
        x: [sequence, batch, input], or [batch, sequence, input] with layout 1.
        w: Input weights, [directions, gates * hidden, input].
        lengths: Steps of each sample.
        initial: First state of each kind, [directions, batch, hidden].
        make: Returns for a direction how the input contributes, and the step.
    """
    batch_first = bool(call.get("layout", 0))
    x = x.transpose(0, 1) if batch_first else x
    hidden = call.get("hidden_size")
    outputs, finals = [], []
    for direction in range(w.shape[0]):
        backwards = direction == 1 or call.get("direction", "forward") == "reverse"
        project, step = make(direction)
        given = [t if t is None or not batch_first else t.transpose(0, 1) for t in initial]
        zero = torch.zeros((x.shape[1], hidden), dtype=x.dtype)
        state = tuple(zero if t is None else t[direction] for t in given)
        seen, last = _unrolled(step, project(_reversed(x, lengths) if backwards else x), state, lengths)
        outputs.append(_reversed(seen, lengths) if backwards else seen)
        finals.append(last)
    y = torch.stack(outputs, dim=1)
    states = [torch.stack(each) for each in zip(*finals, strict=True)]
    if batch_first:
        return y.permute(2, 0, 1, 3), *(s.transpose(0, 1) for s in states)
    return y, *states


def lstm(
    call: Call,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    c: Tensor | None = None,
    p: Tensor | None = None,
) -> Any:
    """Long short-term memory; gates in the order input, output, forget, cell."""
    size = call.get("hidden_size")

    def make(direction: int) -> tuple[Callable[[Tensor], Tensor], _Step]:
        f, g, last = _activations(call, direction, ("Sigmoid", "Tanh", "Tanh"))
        bias = 0 if b is None else b[direction, : 4 * size] + b[direction, 4 * size :]
        peep = (0, 0, 0) if p is None else tuple(p[direction].split(size))

        def step(part: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, cell = state
            i, o, forget, new = (part + hidden @ r[direction].T).split(size, dim=-1)
            i = f(_limited(call, i + peep[0] * cell))
            forget = 1 - i if call.get("input_forget", 0) else f(_limited(call, forget + peep[2] * cell))
            cell = forget * cell + i * g(_limited(call, new))
            return f(_limited(call, o + peep[1] * cell)) * last(cell), cell

        return lambda seq: seq @ w[direction].T + bias, step

    return _recurrent(call, x, w, lengths, (h, c), make)


def gru(
    call: Call,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
) -> Any:
    """Gated recurrent unit; gates in the order update, reset, hidden."""
    size = call.get("hidden_size")

    def make(direction: int) -> tuple[Callable[[Tensor], Tensor], _Step]:
        f, g = _activations(call, direction, ("Sigmoid", "Tanh"))
        zero = torch.zeros(6 * size, dtype=x.dtype)
        wb, rb = (zero if b is None else b[direction]).split(3 * size)
        rw = r[direction]

        def step(part: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (hidden,) = state
            gates = f(_limited(call, part[:, : 2 * size] + hidden @ rw[: 2 * size].T + rb[: 2 * size]))
            update, reset = gates.split(size, dim=-1)
            if call.get("linear_before_reset", 0):
                own = reset * (hidden @ rw[2 * size :].T + rb[2 * size :])
            else:
                own = (reset * hidden) @ rw[2 * size :].T + rb[2 * size :]
            new = g(_limited(call, part[:, 2 * size :] + own))
            return ((1 - update) * new + update * hidden,)

        return lambda seq: seq @ w[direction].T + wb, step

    return _recurrent(call, x, w, lengths, (h,), make)


def rnn(
    call: Call,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
) -> Any:
    """Plain recurrent network."""
    size = call.get("hidden_size")

    def make(direction: int) -> tuple[Callable[[Tensor], Tensor], _Step]:
        (f,) = _activations(call, direction, ("Tanh",))
        bias = 0 if b is None else b[direction, :size] + b[direction, size:]

        def step(part: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (f(_limited(call, part + state[0] @ r[direction].T)),)

        return lambda seq: seq @ w[direction].T + bias, step

    return _recurrent(call, x, w, lengths, (h,), make)


OPS: dict[str, Operator] = {"LSTM": lstm, "GRU": gru, "RNN": rnn}
