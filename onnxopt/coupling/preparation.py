"""What can be done to a model beforehand, so that more of it can be removed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import onnx_ir as ir

from onnxopt.contract import Evaluate
from onnxopt.coupling.analysis import Coupling, analyse
from onnxopt.coupling.constants import computed_weights, store_computed
from onnxopt.coupling.sharing import copy_apart, shared_vectors

Preparation = tuple[ir.Value, str, Callable[[], None]]
"""The first value that it is about, what is done in words, and what does it."""


def preparations(model: ir.Model, coupling: Coupling, evaluate: Evaluate) -> Iterator[Preparation]:
    """Yield what lets more be removed; what comes next is looked for in the model as it then is.

    Args:
        model: The model that was analysed.
        coupling: The analysis.
        evaluate: Computes nodes.
    """
    free = _removable(coupling)
    computed = computed_weights(model)
    if computed:
        clone = model.clone()
        store_computed(clone, computed_weights(clone), evaluate)
        stored = _removable(analyse(clone))
        if stored > free:
            summary = f"weights that nodes compute from constants ({len(computed)}): stored, to be cut"
            yield computed[0], summary, functools.partial(store_computed, model, computed, evaluate)
            free = stored
    shared = shared_vectors(model)
    if shared:
        clone = model.clone()
        copy_apart(clone, shared_vectors(clone))
        apart = analyse(clone)
        if _removable(apart) > free or len(apart.groups) > len(coupling.groups):
            summary = f"small constants that nodes share ({len(shared)}): a copy for each, to be cut on its own"
            yield shared[0], summary, functools.partial(copy_apart, model, shared)


def _removable(coupling: Coupling) -> int:
    return sum(group.parameters for group in coupling.groups)
