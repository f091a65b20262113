"""Whether the target computes what the source computes: all outputs, or else the values between the layers.

Rounding must not hide an error, nor pass for one. So what is compared is free of it: both models in real numbers, and
where the target stores its parameters in fewer bits, the source with the parameters that the target ended up with,
moved back. Writing integers made sure that each is within a step of its number, and a parameter in a wrong place moves
back to where it came from and shows. What rounding costs as the models run is measured apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxopt import feeds as feeding
from onnxopt.calibrate.collector import observe
from onnxopt.contract import Guarantee, Silent
from onnxopt.errors import DataError, RuntimeFailure
from onnxopt.feeds import Data, Feed
from onnxopt.graph import copied
from onnxopt.runtime import RunOptions, open_session
from onnxopt.transfer.fit import is_lossy
from onnxopt.transfer.match import Pair
from onnxopt.transfer.move import Moved, move
from onnxopt.transfer.result import Certificate, Verdict
from onnxopt.transfer.skeleton import Skeleton
from onnxopt.transfer.view import Viewer
from onnxopt.transfer.wide import widened
from onnxopt.verify import Verifier

_LOSSY = "one of the models rounds what the other does not, and in real numbers their outputs agree"

LAYER_TOLERANCE = 1e-3
"""Values of a layer are equal when they differ by less, relative to the largest of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """How models are run to compare them.

    Attributes:
        data: Inputs of the source; generated without any.
        seed: Seeds generated ones.
        shape: Sizes of their dynamic axes.
        options: Provider, threads and custom operators.
    """

    data: Data | Sequence[Feed] | None = None
    seed: int = 0
    shape: Mapping[str, int] | None = None
    options: RunOptions = dataclasses.field(default_factory=RunOptions)

    def feeds(self, model: ir.Model) -> list[Feed]:
        """Return inputs that a model runs with.

        Raises:
            DataError: If none are found.
            RuntimeFailure: If the model does not run.
        """
        if self.data is not None:
            return [feed for feed, _ in zip(self.data, range(4), strict=False)]
        with open_session(model, self.options, optimized=True) as session:
            return feeding.generate_runnable(model, session.run, seed=self.seed, shape=self.shape)


@dataclasses.dataclass(frozen=True)
class Finding:
    """What comparing showed.

    Attributes:
        certificate: The account.
        equal: Indexes of the target's layers that compute what their counterparts compute.
        wrong: Those whose inputs agree while their results do not.
    """

    certificate: Certificate
    equal: frozenset[int] = frozenset()
    wrong: frozenset[int] = frozenset()

    @property
    def consistent(self) -> bool:
        """Whether no outputs contradict that all layers compute the same; some may not have been compared."""
        found = self.certificate
        return found.verification is None and 0 < found.layers_equal == found.layers_compared


def certify(
    source: Skeleton,
    moved: Moved,
    pairs: Sequence[Pair],
    feeds: Sequence[Feed],
    options: RunOptions,
) -> Finding:
    """Compare a target, into which the source's parameters were moved, with the source; both in real numbers.

    Args:
        source: The source.
        moved: The target, and what was done to it.
        pairs: The layers that were given the source's parameters.
        feeds: Inputs of the source.
        options: How to run the models.
    """
    whole = len(pairs) == len(source.layers) == len(moved.skeleton.layers)
    reason = "" if whole else "not all layers of the two models correspond"
    reason = _interface_difference(source.model, moved.skeleton.model) or reason
    reference, computed = as_stored(source, moved.skeleton, pairs), widened(moved.skeleton)
    verification = None
    if not reason:
        named = _named_like(computed, source.model)
        verification = Verifier(reference.model, feeds, options).check(named)
        if verification.ok:
            return Finding(Certificate("equal", "", verification))
        reason = verification.reason
    paired = [dataclasses.replace(p, source=reference.groups[p.source.index]) for p in pairs]
    certificate = Certificate("none", reason, verification)
    return _between(reference, computed, moved, paired, feeds, options, certificate)


def as_run(
    certificate: Certificate,
    source: Skeleton,
    before: Skeleton,
    after: Skeleton,
    feeds: Sequence[Feed],
    options: RunOptions,
) -> Certificate:
    """Add to a certificate in real numbers how the models compare as they run.

    Args:
        certificate: What was found in real numbers.
        source: The source.
        before: The target as it was given.
        after: The target with what was moved.
        feeds: Inputs of the source.
        options: How to run the models.
    """
    theirs = renamed(feeds, source.model, after.model)
    certificate = dataclasses.replace(
        certificate,
        rounding=rounding(after, theirs, options),
        rounding_before=rounding(before, theirs, options),
    )
    if certificate.verdict != "equal" or not (rounds(source) or rounds(after)):
        return certificate
    given = source.real.original
    found = Verifier(given, feeds, options).check(_named_like(after.real.original, given), Guarantee.APPROXIMATE)
    if not found.ok:
        return dataclasses.replace(certificate, verdict="none", reason=found.reason, verification=found)
    verdict: Verdict = "close" if found.worst > 0 else "equal"
    return dataclasses.replace(certificate, verdict=verdict, reason=_LOSSY * (found.worst > 0), verification=found)


def rounding(skeleton: Skeleton, feeds: Sequence[Feed], options: RunOptions) -> float | None:
    """Return how far a model lies from itself in real numbers, relative to the range of outputs.

    None for one that rounds nothing while it runs, or cannot be compared.

    Args:
        skeleton: The model.
        feeds: Its inputs.
        options: How to run it.
    """
    if not rounds(skeleton):
        return None
    found = Verifier(widened(skeleton), feeds, options).check(skeleton.real.original, Guarantee.APPROXIMATE)
    return found.worst if found.ok else None


def rounds(skeleton: Skeleton) -> bool:
    """Whether a model stores parameters in less than 32 bits, or computes with integers."""
    return is_lossy(skeleton) or skeleton.real.model is not skeleton.real.original


def as_stored(source: Skeleton, target: Skeleton, pairs: Sequence[Pair]) -> Skeleton:
    """Return the source in real numbers with the parameters that the target stores, where that has fewer bits."""
    model = widened(source)
    if not is_lossy(target):
        return source if model is source.model else Viewer(model).view()
    if model is source.model:
        model = copied(model)
    back = [Pair(p.target, p.source, p.confidence) for p in pairs]
    move(target, model, back, [p.source.index for p in pairs])
    return Viewer(model).view()


def _interface_difference(source: ir.Model, target: ir.Model) -> str:
    for what in ("inputs", "outputs"):
        ours, theirs = (len([v for v in getattr(m.graph, what) if not v.is_initializer()]) for m in (source, target))
        if ours != theirs:
            return f"the source has {ours} {what} and the target {theirs}"
    return ""


def counterparts(source: ir.Model, target: ir.Model, what: str) -> dict[str, str]:
    """Return the target's inputs or outputs by those of the source: of the same name, or else the same place."""
    ours, theirs = ([v.name or "" for v in getattr(m.graph, what) if not v.is_initializer()] for m in (source, target))
    if set(ours) == set(theirs):
        return {name: name for name in ours}
    return dict(zip(ours, theirs, strict=False))


def renamed(feeds: Sequence[Feed], source: ir.Model, target: ir.Model) -> list[Feed]:
    """Return inputs of the source as inputs of the target."""
    names = counterparts(source, target, "inputs")
    return [{names[n]: v for n, v in feed.items() if n in names} for feed in feeds]


def _named_like(model: ir.Model, other: ir.Model) -> ir.Model:
    """Return a copy whose inputs and outputs are named and ordered as those of another model."""
    copy = model.clone()
    copy.meta.update(model.meta)
    for what in ("inputs", "outputs"):
        back = {theirs: ours for ours, theirs in counterparts(other, model, what).items()}
        values = [v for v in getattr(copy.graph, what) if not v.is_initializer()]
        taken = {v.name: v for node in copy.graph for v in node.outputs}
        for value in values:
            wanted = back.get(value.name or "", value.name)
            if wanted != value.name and wanted in taken and taken[wanted] is not value:
                taken[wanted].name = f"{wanted}__inside"
        for value in values:
            value.name = back.get(value.name or "", value.name)
            declared = next((v.shape for v in getattr(other.graph, what) if v.name == value.name), None)
            # Axes have other names in other exports; what a model computes shows whether they mean the same.
            if declared is not None and value.shape is not None and _may_be(declared, value.shape):
                value.shape = declared.copy()
        order = [v.name for v in getattr(other.graph, what)]
        if [v.name for v in values] != order and what == "outputs":
            ordered = sorted(values, key=lambda v: order.index(v.name) if v.name in order else len(order))
            copy.graph.outputs[:] = ordered
    return copy


def _may_be(first: ir.Shape, second: ir.Shape) -> bool:
    """Whether two declared shapes differ in the names of dynamic axes alone."""
    kinds = [[n if isinstance(n, int) else None for n in shape] for shape in (first, second)]
    return kinds[0] == kinds[1]


class _Keeper:
    """Keeps what a value was in each run, up to a size."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []

    def add(self, array: np.ndarray) -> None:
        """Keep one run's."""
        self.arrays.append(np.array(array, np.float32))


def _between(
    source: Skeleton,
    target: ir.Model,
    moved: Moved,
    pairs: Sequence[Pair],
    feeds: Sequence[Feed],
    options: RunOptions,
    certificate: Certificate,
) -> Finding:
    """Compare the values that corresponding layers compute, on the same inputs."""
    comparable = [(s, t, p) for p in pairs if (s := _computed(p.source.output)) and (t := _computed(p.target.output))]
    theirs = renamed(feeds[:1], source.model, target)
    try:
        ours = _kept(source.model, [s for s, _, _ in comparable], feeds[:1], options)
        others = _kept(target, [t for _, t, _ in comparable], theirs, options)
    except (RuntimeFailure, DataError, KeyError) as error:
        reason = f"{certificate.reason}; layers cannot be compared: {error}"
        return Finding(dataclasses.replace(certificate, reason=reason))
    # In front of an activation that begins otherwise, values differ as they should.
    comparable = [(s, t, p) for s, t, p in comparable if np.allclose(p.source.onward, p.target.onward)]
    verdicts = {
        p.target.index: _agree(ours[s].arrays, others[t].arrays, moved.ratios.get(p.target.index, 1.0))
        for s, t, p in comparable
    }
    equal = frozenset(i for i, verdict in verdicts.items() if verdict)
    inputs = {g.index for g in moved.skeleton.groups if g.kind == "input"}
    wrong = [
        p.target
        for _, _, p in comparable
        if verdicts[p.target.index] is False and all(e.source in equal or e.source in inputs for e in p.target.edges)
    ]
    certificate = dataclasses.replace(
        certificate,
        verdict="trunk" if equal else "none",
        layers_equal=len(equal),
        layers_compared=sum(v is not None for v in verdicts.values()),
        first_difference=wrong[0].name if wrong else "",
    )
    return Finding(certificate, equal, frozenset(g.index for g in wrong))


def _kept(model: ir.Model, names: Sequence[str], feeds: Sequence[Feed], options: RunOptions) -> dict[str, _Keeper]:
    keepers = {name: _Keeper() for name in names}
    observe(model, {n: [k] for n, k in keepers.items()}, feeds, options, Silent())
    return keepers


def _computed(value: ir.Value | None) -> str:
    return value.name or "" if value is not None and value.producer() is not None else ""


def _agree(first: list[np.ndarray], second: list[np.ndarray], ratio: float) -> bool | None:
    """Return whether values agree, in whatever layout; None when they are not as many."""
    if not first or not second or first[0].size != second[0].size:
        return None
    a, b = first[0].reshape(-1) * np.float32(ratio), second[0].reshape(-1)
    tolerance = LAYER_TOLERANCE * (float(np.abs(a).max(initial=0)) or 1.0)
    if np.abs(a - b).max(initial=0) <= tolerance:
        return True
    return bool(np.abs(np.sort(a) - np.sort(b)).max(initial=0) <= tolerance)
