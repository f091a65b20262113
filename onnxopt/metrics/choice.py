"""Which metric fits a model."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxopt.analysis import task
from onnxopt.errors import DataError


def choose(model: ir.Model, labels: np.ndarray | None) -> tuple[str, str]:
    """Return the metric that fits a model, and why.

    Raises:
        DataError: If no built-in metric does.
    """
    if task.main_output(model) is None:
        names = ", ".join(v.name or "" for v in model.graph.outputs)
        raise DataError(
            f"No built-in metric fits the model, which has no floating-point output ({names}); name a function with "
            "--metric module:function."
        )
    reads = task.reads_sequences(model)
    if reads and (labels is None or (labels.dtype.kind in "iu" and labels.ndim == 2)):
        return "ctc", "the only output holds a Softmax of many classes step by step, as that of a reader does"
    if labels is not None and labels.dtype.kind in "iub":
        return "top1", "the labels are whole numbers"
    scores = task.class_scores(model)
    if scores is not None and labels is None:
        return "top1", f"the main output comes from {scores}, as scores of classes do"
    if labels is not None:
        return "cosine", "the labels are no whole numbers"
    return "cosine", "the main output holds no scores of classes"
