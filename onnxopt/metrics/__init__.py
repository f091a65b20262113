"""Metrics on real samples: how much worse is a model at its task than the original?

With labels the metric of both models is taken and the drop is their difference, sample by sample. Without labels
the original's outputs take the place of the labels. Built-in metrics look at the first floating-point output:

    top1      Share of positions whose largest class (last axis) is the label, or the original's.
    ctc       For readers of text or speech, whose output holds scores of classes step by step: share of symbols read
              right. The largest class of each step is taken, repeats are collapsed, blanks dropped; what is left
              differs from the label, or from what the original reads, by so many insertions, deletions and
              replacements, as a share of the symbols of all samples together (1 - the character error rate). See
              `onnxopt.metrics.sequences` for which class is the blank.
    cosine    Mean cosine between the output of a sample and its label vector, or the original's output.
    mse       Mean squared difference from the label, or from the original's output. Lower is better.
    spearman  Rank correlation over samples. With labels: between the one number a sample has for an output, and
              its label. Without: between the candidate's and the original's numbers; and where outputs are
              vectors, between the cosine similarities of all pairs of samples (of the first 256), which is what
              searches by similarity rank by.

`module:function` names a function of (outputs, labels), where outputs holds a dict of arrays per sample and labels
an array or None. It returns a number; higher is better unless it has an attribute `higher_is_better = False`.
"""

from __future__ import annotations

from onnxopt.metrics.choice import choose
from onnxopt.metrics.evaluation import Evaluator, compare, evaluate, labels_per_sample
from onnxopt.metrics.outputs import classes, main_output
from onnxopt.metrics.ranks import spearman
from onnxopt.metrics.result import MetricResult

__all__ = [
    "Evaluator",
    "MetricResult",
    "choose",
    "classes",
    "compare",
    "evaluate",
    "labels_per_sample",
    "main_output",
    "spearman",
]
