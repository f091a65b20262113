"""Mode "structure": a graph with new parameters, as a network starts out before training."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.errors import UsageError
from onnxopt.graph import constant_tensor
from onnxopt.transfer.edit import Editor
from onnxopt.transfer.result import Parameter, Status, Transfer
from onnxopt.transfer.skeleton import Group
from onnxopt.transfer.tensors import Array, Store, Tensor, Unwritable
from onnxopt.transfer.view import Viewer

_EMBEDDING_SPREAD = 0.02


def initialize(model: ir.Model, seed: int, only: Sequence[str] = (), freeze: Sequence[str] = ()) -> Transfer:
    """Return a model with new parameters: weights uniform within 1 / sqrt(fan-in), biases 0, scales 1.

    Embedding tables are normal with a standard deviation of .02, and normalizations start from mean 0 and variance 1.
    Parameters of other operators stay as they are.

    Args:
        model: The model; it is not changed.
        seed: The same seed gives the same parameters.
        only: Glob patterns of names: other parameters keep their numbers.
        freeze: Glob patterns of names that keep their numbers.

    Raises:
        UsageError: If a pattern fits no parameter.
    """
    copy = model.clone()
    copy.meta.update(model.meta)
    skeleton = Viewer(copy).view()
    names = [v.name or "" for g in skeleton.layers for v in g.leaves()]
    for option, patterns in (("only", only), ("freeze", freeze)):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise UsageError(f'{option} "{pattern}" fits no parameter.', option)
    store = Store()
    found: dict[str, Parameter] = {}
    random = np.random.default_rng(seed)
    for group in skeleton.layers:
        reason = _initialize(group, store, random, only, freeze)
        for leaf in group.leaves():
            tensor = constant_tensor(leaf)
            size = 0 if tensor is None else int(tensor.size)
            name = leaf.name or ""
            status: Status = "exact" if not reason else "left out" if reason.startswith("a pattern") else "unmatched"
            found.setdefault(name, Parameter(name, size, status, False, (), "drawn at random" * (not reason), reason))
    Editor(skeleton.real).commit(store)
    return Transfer(copy, "structure", tuple(found.values()), (), None, ())


def _initialize(
    group: Group, store: Store, random: np.random.Generator, only: Sequence[str], freeze: Sequence[str]
) -> str:
    """Draw the parameters of a layer; return why not."""
    names = [v.name or "" for v in group.leaves()]
    if any(fnmatch.fnmatchcase(n, p) for n in names for p in freeze):
        return "a pattern froze it"
    if only and not any(fnmatch.fnmatchcase(n, p) for n in names for p in only):
        return "a pattern left it out"
    before = dict(store.written)
    try:
        for tensor, array in _drawn(group, random):
            tensor.write(array, store)
    except Unwritable as error:
        store.written = before
        return str(error)
    return ""


def _drawn(group: Group, random: np.random.Generator) -> Iterator[tuple[Tensor, Array]]:
    """Yield parameters with their new numbers.

    Raises:
        Unwritable: If it is not known how the kind of layer starts.
    """
    weight = group.weight
    if group.kind == "embedding" and weight is not None:
        yield weight, random.normal(0, _EMBEDDING_SPREAD, weight.shape).astype(np.float32)
    elif group.kind in ("linear", "conv") and weight is not None:
        inputs = int(np.prod([n for i, n in enumerate(weight.shape) if i != group.channels]))
        bound = 1 / np.sqrt(max(inputs, 1))
        yield weight, random.uniform(-bound, bound, weight.shape).astype(np.float32)
    elif group.kind != "affine":
        raise Unwritable(f"how {group.kind} starts is not known")
    for member in group.members:
        starts = {"bias": (0.0,), "scale": (1.0,), "norm": (1.0, 0.0, 0.0, 1.0)}[member.kind]
        for part, number in zip(member.parts, starts, strict=True):
            yield part, np.full(part.shape, number, np.float32)
