"""Which units of which groups go, all groups together, so that a goal is reached at the least loss."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.allocation import costs
from onnxopt.allocation.costs import Costs
from onnxopt.allocation.damage import Curve, curves
from onnxopt.allocation.greedy import Array, path
from onnxopt.contract import Context
from onnxopt.coupling.analysis import Coupling, Group, analyse
from onnxopt.coupling.goals import elements
from onnxopt.coupling.importance import Scores
from onnxopt.coupling.partition import Ints
from onnxopt.coupling.removal import Removal
from onnxopt.removed import Damage


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """What goes of a group.

    Attributes:
        gone: The places of its units that go, ascending.
        loss: The square error of the model's outputs by their power that is expected of it; None when not known.
        unread: Why its loss after repair could not be worked out; empty where it was.
        importance: The part of the importance of its units that goes; None when not known.
        stays: Why nothing of it may go; empty where something may.
    """

    gone: Ints
    loss: float | None = None
    unread: str = ""
    importance: Damage | None = None
    stays: str = ""

    @property
    def predicted(self) -> Damage | None:
        """What is expected of it."""
        return self.importance if self.loss is None else Damage(math.sqrt(max(0.0, self.loss)), "outputs")

    def __str__(self) -> str:
        """Return e.g. `, outputs expected to move by 1.2%`; nothing when only scores were asked for."""
        if self.loss is None:
            return (
                f", by their scores: the outputs do not show what they are worth ({self.unread})" if self.unread else ""
            )
        without = f" without repair ({self.unread})" if self.unread else ""
        return f", outputs expected to move by {math.sqrt(self.loss):.1%}{without}"


class Allocation:
    """The order in which groups become narrower, and how far a goal goes along it."""

    def __init__(
        self,
        model: ir.Model,
        coupling: Coupling,
        ctx: Context,
        widths: Callable[[Group], Sequence[int]],
        scores: Callable[[Group], Scores],
    ) -> None:
        """Look at data.

        Args:
            model: The model that was analysed; it is not changed.
            coupling: The analysis.
            ctx: With data.
            widths: How many units of a group may stay, fewer than there are; maybe none at all.
            scores: The importance of units whose consumers cannot be read.
        """
        self._model, self._coupling, self._ctx = model, coupling, ctx
        least = {group.name: min(widths(group), default=group.units) for group in coupling.groups}
        found = {c.group.name: c for c in curves(model, coupling, ctx, lambda g: least[g.name], scores)}
        self._curves: list[Curve] = [found[group.name] for group in coupling.groups]
        self._choices = [
            np.array(sorted(g.units - w for w in widths(g) if g.units - w <= len(curve.order)), np.int64)
            for g, curve in zip(coupling.groups, self._curves, strict=True)
        ]

    def for_ratio(self, ratio: float) -> dict[str, Share] | None:
        """Return the share of each group so that this part of all channels goes, or None where not so many may."""
        found = costs.channels(self._coupling)
        whole = found.left(np.zeros(found.groups, np.int64))
        return self._until(found, lambda gone: found.left(gone) <= (1 - ratio) * whole + 1e-6)

    def for_elements(self, fraction: float) -> dict[str, Share] | None:
        """Return the share of each group so that at most this part of all parameters is left, or None."""
        found = costs.elements(self._coupling)
        whole = found.left(np.zeros(found.groups, np.int64))
        total = elements(self._model)
        return self._until(found, lambda gone: total - whole + found.left(gone) <= fraction * total)

    def for_products(self, fraction: float) -> dict[str, Share] | None:
        """Return the share of each group so that at most this part of the multiplications is left, or None.

        Those by constants that get no narrower, and those without constants, do not count.
        """
        found = self._products
        whole = found.left(np.zeros(found.groups, np.int64))
        return self._until(found, lambda gone: found.left(gone) <= fraction * whole)

    def for_time(self, fraction: float, key: str) -> dict[str, Share] | None:
        """Return the share of each group so that a model takes at most this part of the time, or None.

        Args:
            fraction: What the result may take of the time of the original.
            key: What the candidates are remembered by, with what is gone.
        """
        assert self._ctx.timed is not None, "the pass looked"
        timed = self._ctx.timed
        states = list(self._path(self._products))
        low, high = 0, len(states) - 1

        def time(index: int) -> float:
            gone = states[index]
            return timed(f"{key} {gone.tolist()}", lambda: self._narrowed(gone))

        if high < 1 or time(high) > fraction:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if time(middle) <= fraction else (middle, high)
        return self._shares(states[high])

    @functools.cached_property
    def _products(self) -> Costs:
        assert self._ctx.calibration is not None, "the pass looked"
        return costs.products(self._model, self._coupling, self._ctx.calibration)

    def _path(self, found: Costs) -> Iterator[Array]:
        return path([curve.lost for curve in self._curves], self._choices, found)

    def _until(self, found: Costs, reached: Callable[[Array], bool]) -> dict[str, Share] | None:
        gone = next((state for state in self._path(found) if reached(state)), None)
        return None if gone is None else self._shares(gone)

    def _shares(self, gone: Array) -> dict[str, Share]:
        return {
            curve.group.name: Share(
                np.sort(curve.order[:count]),
                float(curve.lost[count]) if curve.measured else None,
                curve.unread,
                stays="" if len(curve.order) else curve.unread,
            )
            for curve, count in zip(self._curves, gone.tolist(), strict=True)
        }

    def _narrowed(self, gone: Array) -> ir.Model:
        candidate = self._model.clone()
        removal = Removal(candidate, analyse(candidate))
        for curve, share in zip(self._curves, self._shares(gone).values(), strict=True):
            removal.remove(curve.group.roots[share.gone])
        return candidate
