"""Limited-memory BFGS with a Wolfe line search (Nocedal and Wright, Numerical Optimization, chapters 3 and 7)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from onnxopt.probe.classifier import Array

Objective = Callable[[Array], tuple[float, Array]]
"""Returns value and gradient at a point."""

_ARMIJO, _CURVATURE = 1e-4, 0.9
_MOST_TRIALS = 25


def minimize(
    objective: Objective, start: Array, *, tolerance: float = 1e-4, most_steps: int = 500, memory: int = 10
) -> Array:
    """Minimize a smooth function.

    Args:
        objective: The function.
        start: A vector; it is not changed.
        tolerance: Stops when no component of the gradient is larger.
        most_steps: Stops after so many steps.
        memory: Pairs of steps and gradient changes that approximate the Hessian.

    Returns:
        Where it ended.
    """
    point, pairs = start.copy(), deque[tuple[Array, Array]](maxlen=memory)
    value, gradient = objective(point)
    for _ in range(most_steps):
        if np.abs(gradient).max(initial=0.0) <= tolerance:
            break
        direction = -_times_inverse_hessian(gradient, pairs)
        step = 1.0 if pairs else min(1.0, 1.0 / float(np.abs(gradient).sum()))
        found = _line_search(objective, point, value, gradient, direction, step)
        if found is None:
            break
        new_point, value, new_gradient = found
        change, turn = new_point - point, new_gradient - gradient
        if change @ turn > 1e-12 * (turn @ turn):
            pairs.append((change, turn))
        point, gradient = new_point, new_gradient
    return point


def _times_inverse_hessian(gradient: Array, pairs: deque[tuple[Array, Array]]) -> Array:
    """Apply the approximate inverse Hessian: the two-loop recursion."""
    result = gradient.copy()
    weights: list[float] = []
    for change, turn in reversed(pairs):
        weight = float(change @ result) / float(change @ turn)
        result -= weight * turn
        weights.append(weight)
    if pairs:
        change, turn = pairs[-1]
        result *= float(change @ turn) / float(turn @ turn)
    for (change, turn), weight in zip(pairs, reversed(weights), strict=True):
        result += (weight - float(turn @ result) / float(change @ turn)) * change
    return result


def _line_search(
    objective: Objective, point: Array, value: float, gradient: Array, direction: Array, step: float
) -> tuple[Array, float, Array] | None:
    """Return point, value and gradient where the function fell enough and got flat enough; None where it cannot fall.

    The step is doubled until it is too long, and then halved between the longest that is too short and the
    shortest that is too long. The objectives here are convex, so the bracket holds a good step.
    """
    slope = float(gradient @ direction)
    if slope >= 0:
        return None
    low, high = 0.0, np.inf
    best = None
    for _ in range(_MOST_TRIALS):
        there = point + step * direction
        new_value, new_gradient = objective(there)
        if not new_value <= value + _ARMIJO * step * slope:
            high = step
        else:
            best = (there, new_value, new_gradient)
            new_slope = float(new_gradient @ direction)
            if abs(new_slope) <= -_CURVATURE * slope:
                break
            low, high = (step, high) if new_slope < 0 else (low, step)
        step = (low + high) / 2 if np.isfinite(high) else 2 * step
    return best
