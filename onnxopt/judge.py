"""Decides whether a trial may be kept: outputs against the reference, then the user's budget."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from onnxopt import metrics
from onnxopt.contract import Guarantee
from onnxopt.manager import Verdict
from onnxopt.verify import Verifier

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import onnx_ir as ir

    from onnxopt.feeds import Data, Feed
    from onnxopt.inputs.split import Split
    from onnxopt.runtime import RunOptions


@dataclasses.dataclass(frozen=True, slots=True)
class Budget:
    """What the user allows lossy passes to cost.

    Attributes:
        max_error: Worst deviation of any output, as a fraction of the output's range; None when not limited.
        max_drop: Largest drop of the metric, in the metric's own unit (0.005 is half a point of accuracy).
        metric: Name of the metric; None for none.
        labels: Labels of `data`, one per sample; None to judge by disagreement with the original.
        data: The samples the metric is computed on.
        metric_reason: Why this metric; empty when the user named it.
    """

    max_error: float | None = None
    max_drop: float | None = None
    metric: str | None = None
    labels: np.ndarray | None = None
    data: Data | None = None
    metric_reason: str = ""

    def on(self, parts: Split) -> Budget:
        """Return the same budget, judged by the evaluation samples."""
        labels = None if self.labels is None else parts.labels(self.labels)
        return dataclasses.replace(self, data=parts.evaluation, labels=labels)

    @property
    def given(self) -> bool:
        """Whether lossy passes are allowed by a budget."""
        return self.max_error is not None or self.max_drop is not None


class ModelJudge:
    """Judges trials of one run of the manager.

    Exact trials are compared with the last lossy checkpoint (the reference itself before there is one), with the
    runtime's own optimizations off. Lossy ones are compared with the reference as they will run.
    """

    def __init__(
        self, reference: ir.Model, verifier: Verifier, feeds: Sequence[Feed], options: RunOptions, budget: Budget
    ) -> None:
        """Judge against `reference`, whose outputs `verifier` has."""
        self._reference = reference
        self._verifier = verifier
        self._exact = verifier
        self._feeds = feeds
        self._options = options
        self._budget = budget

    def __call__(self, model: ir.Model, guarantee: Guarantee) -> Verdict:
        """Return the verdict on a trial."""
        if guarantee is Guarantee.EXACT:
            checked = self._exact.check(model, guarantee)
            return Verdict(checked.ok, checked.reason)
        if guarantee is Guarantee.REDEFINES:
            return Verdict(ok=True)
        checked = self._verifier.check(model, guarantee, self._budget.max_error)
        if not checked.ok:
            return Verdict(False, checked.reason)
        return self._within_drop(model)

    def equal(self, model: ir.Model, reference: ir.Model) -> Verdict:
        """Return whether a trial computes what another model does, to rounding."""
        checked = Verifier(reference, self._feeds, self._options).check(model, Guarantee.EXACT)
        return Verdict(checked.ok, checked.reason)

    def rebase(self, model: ir.Model, guarantee: Guarantee) -> None:
        """Compare later exact trials with this checkpoint, and everything when the function was redefined."""
        self._exact = Verifier(model, self._feeds, self._options)
        if guarantee is Guarantee.REDEFINES:
            self._reference, self._verifier = model, self._exact

    def _within_drop(self, model: ir.Model) -> Verdict:
        budget = self._budget
        if budget.max_drop is None or budget.metric is None or budget.data is None:
            return Verdict(ok=True)
        result = metrics.evaluate(self._reference, model, budget.data, budget.labels, budget.metric, self._options)
        if result.drop <= budget.max_drop:
            return Verdict(ok=True)
        return Verdict(
            False,
            f"{result.name} drops by {result.drop:.4g} on {result.samples} samples (allowed {budget.max_drop:.4g})",
        )
