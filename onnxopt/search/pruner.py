"""Pruned models for a search: what they are expected to cost, and how they are made."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from onnxopt import manager
from onnxopt.allocation.forecast import Goal, Level, forecast
from onnxopt.contract import Guarantee
from onnxopt.coupling.selection import LEAST, MULTIPLE, widths
from onnxopt.judge import Budget
from onnxopt.pipeline import Pipeline

if TYPE_CHECKING:
    from onnxopt.contract import Progress
    from onnxopt.ground import Ground

LEFT = (0.85, 0.7, 0.55, 0.4, 0.3, 0.2, 0.14, 0.1)
"""Parts of the time, or of the parameters, that a pruned candidate may be left with."""


class Pruner:
    """Prunes the original of a search.

    Attributes:
        goal: What a part of is to be left.
    """

    def __init__(self, ground: Ground, lossless: Pipeline) -> None:
        """Prepare; nothing is run yet.

        Args:
            ground: The models, the inputs and the options.
            lossless: What runs behind what prunes.
        """
        self._ground, self._lossless = ground, lossless
        self.goal: Goal = "params" if ground.settings.objective == "size" else "latency"

    def forecast(self) -> tuple[Level, ...]:
        """Return what pruning is expected to do to the outputs, the mildest first; nothing where nothing can go."""
        start, ctx = self._ground.start, self._ground.ctx
        return forecast(start, ctx, self.goal, LEFT, lambda group: widths(group, MULTIPLE, LEAST))

    def prune(self, passes: str, progress: Progress) -> manager.Outcome:
        """Prune the original, and run the lossless passes on what is left.

        Args:
            passes: What prunes, as a pipeline string.
            progress: Told what is being done.
        """
        ground = self._ground
        pipeline = (*Pipeline.parse(passes).passes, *self._lossless.passes)
        judge = ground.bench.judge(Budget(max_error=math.inf))()
        return manager.run(ground.start, pipeline, ground.ctx, judge, progress=progress)


def lossy(outcome: manager.Outcome) -> manager.Outcome:
    """Return an outcome without what exact passes report."""
    kept = tuple(done for done in outcome.passes if done.guarantee != Guarantee.EXACT.value)
    return manager.Outcome(outcome.model, kept, outcome.denials)
