"""Set the smallest weights to zero."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.weights import Weight, weights
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.errors import UsageError
from onnxopt.numeric import grids, magnitude
from onnxopt.numeric.magnitude import Array, Cut


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneWeights(GraphPass):
    """Set the weights of least magnitude to zero. Exactly one of threshold, ratio and pattern says which.

    Prunes what Conv, ConvTranspose, Gemm, MatMul, RNN, GRU and LSTM multiply with. Tables that Gather only looks
    up, biases and normalization parameters stay as they are.

    Attributes:
        threshold: Weights of a smaller magnitude become zero. In the unit of the weights, above 0.
        ratio: This part of the weights becomes zero, above 0 and up to 1; what is zero already counts. Of equal
            magnitudes the first in the model's order go first.
        pattern: "N:M", for example "2:4": of every M neighbours along the axis that products are summed up along
            (the input channels of a convolution, the rows of the right side of a MatMul) the N of largest
            magnitude stay, as hardware for structured sparsity wants it. Of equal magnitudes the first stays.
        scope: What ratio counts over. "tensor": each weight on its own. "global": all weights taken together, so
            that those with many small elements lose more.
        min_elements: Weights with fewer elements stay as they are.
    """

    name: ClassVar[str] = "prune-weights"
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE

    threshold: float | None = None
    ratio: float | None = None
    pattern: str | None = None
    scope: Literal["tensor", "global"] = "tensor"
    min_elements: int = 1024

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: If one cannot be used, or not exactly one of threshold, ratio and pattern is given.
        """
        given = [n for n in ("threshold", "ratio", "pattern") if getattr(self, n) is not None]
        if len(given) != 1:
            found = f"{' and '.join(given)} are given" if given else "none is given"
            raise UsageError(
                f"prune-weights needs exactly one of threshold, ratio and pattern, and {found}; "
                "write for example prune-weights{ratio=0.5}."
            )
        if self.threshold is not None and not 0 < self.threshold < float("inf"):
            raise UsageError(f"prune-weights: threshold is {self.threshold}; use a number above 0.")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise UsageError(f"prune-weights: ratio is {self.ratio}; use a number above 0 and up to 1.")
        if self.pattern is not None:
            _keep_and_group(self.pattern)
        if self.scope not in ("tensor", "global"):
            raise UsageError(f'prune-weights: scope is "{self.scope}"; use tensor or global.')
        if self.scope == "global" and self.ratio is None:
            raise UsageError(f"prune-weights: scope=global needs ratio; with {given[0]} leave it out.")
        if self.min_elements < 1:
            raise UsageError(f"prune-weights: min_elements is {self.min_elements}; use 1 or more.")

    def caveat(self) -> str:
        """Say what zeros do not bring."""
        return (
            "prune-weights: zeros alone bring no speed in ONNX Runtime, which multiplies with them like with any "
            "other number, and the file keeps its size until it is compressed."
        )

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per weight that gains zeros."""
        prunable: list[Weight] = []
        for weight in weights(model):
            if weight.tensor.size < self.min_elements or not weight.roles:
                continue
            reason = self._reason(weight)
            if reason is None:
                prunable.append(weight)
            else:
                yield Refusal(self._site(weight), reason)
        plan = self._by_pattern if self.pattern is not None else self._by_magnitude
        yield from plan(prunable)

    def _site(self, weight: Weight) -> Site:
        return Site(self.name, weight.scope.path, weight.value.name or "")

    def _reason(self, weight: Weight) -> str | None:
        """Return why the weight cannot be pruned, or None."""
        axis = _contraction_axis(weight)
        if axis is None:
            return "it is a table that is looked up and not multiplied with"
        if weight.locked is not None:
            return weight.locked
        if self.pattern is not None:
            _, group = _keep_and_group(self.pattern)
            if weight.tensor.shape[axis] % group:
                return f"its contraction axis is not a multiple of {group} long, which {self.pattern} needs"
        low, high = grids.value_range(weight.tensor.numpy())
        if not (np.isfinite(low) and np.isfinite(high)):
            return "it holds NaN or infinity"
        return None

    def _by_pattern(self, prunable: Sequence[Weight]) -> Iterator[Edit]:
        assert self.pattern is not None
        keep, group = _keep_and_group(self.pattern)
        for weight in prunable:
            axis = _contraction_axis(weight)
            assert axis is not None
            options = {"keep": keep, "group": group, "axis": axis}
            array = weight.tensor.numpy()
            before = array.size - np.count_nonzero(array)
            after = before + magnitude.surplus(array, **options)
            if after > before:
                yield self._edit(weight, before, after, functools.partial(magnitude.without_surplus, **options))

    def _by_magnitude(self, prunable: Sequence[Weight]) -> Iterator[Edit]:
        groups = [prunable] if self.scope == "global" else [[weight] for weight in prunable]
        for group in filter(None, groups):
            cut = self._cut(group)
            for weight in group:
                found = magnitude.count(weight.tensor.numpy(), cut.magnitude)
                own = Cut(cut.magnitude, min(cut.ties, found.equal))
                cut = Cut(cut.magnitude, cut.ties - own.ties)
                # At magnitude zero the ties are zeros that are there already.
                after = max(found.zero, found.below + own.ties)
                if after > found.zero:
                    yield self._edit(weight, found.zero, after, functools.partial(magnitude.without, cut=own))

    def _cut(self, group: Sequence[Weight]) -> Cut:
        if self.threshold is not None:
            return Cut(self.threshold)
        assert self.ratio is not None
        wanted = round(self.ratio * sum(weight.tensor.size for weight in group))
        if wanted == 0:
            return Cut(0.0)
        return magnitude.smallest(lambda: (weight.tensor.numpy() for weight in group), wanted)

    def _edit(self, weight: Weight, before: int, after: int, prune: Callable[[Array], Array]) -> Edit:
        size = weight.tensor.size
        return Edit(
            self._site(weight),
            f"{weight.description}, {before:,} to {after:,} of {size:,} weights zero ({after / size:.1%})",
            functools.partial(_replace, weight, prune),
        )


def _contraction_axis(weight: Weight) -> int | None:
    """Return the axis that the first node which multiplies with the weight sums up along, or None."""
    axes = (role.contraction_axis for role in weight.roles)
    return next(itertools.filterfalse(lambda axis: axis is None, axes), None)


def _keep_and_group(pattern: str) -> tuple[int, int]:
    """Read "N:M".

    Raises:
        UsageError: If it is none.
    """
    match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", pattern)
    keep, group = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < keep < group:
        raise UsageError(
            f'prune-weights: pattern is "{pattern}"; write N:M with 0 < N < M, for example 2:4 to keep 2 of 4.'
        )
    return keep, group


def _replace(weight: Weight, prune: Callable[[Array], Array]) -> None:
    old = weight.tensor
    new = ir.tensor(prune(old.numpy()), dtype=old.dtype, name=old.name, doc_string=old.doc_string)
    new.metadata_props.update(old.metadata_props)
    constant = weight.value.producer()
    if constant is None:
        weight.value.const_value = new
    else:
        constant.attributes["value"] = ir.AttrTensor("value", new)
