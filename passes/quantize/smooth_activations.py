"""Even out the channels of activations, so that one 8-bit scale serves all of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.linear import loss, scaled
from onnxopt.analysis.products import NoProduct, Product, product, products, too_small
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import NEEDS_DATA, Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.errors import UsageError
from onnxopt.graph import (
    Names,
    Scope,
    add_constant,
    attribute,
    constant_array,
    drop_unused_constants,
    first_output,
    is_op,
    use_count,
)
from onnxopt.numeric import deferred
from onnxopt.numeric.smoothing import Activation, ChannelSamples, expected_error, factors, largest_of_rows
from onnxopt.rewrite import Builder

ALPHAS = (0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8)
"""What is tried. .3 was best for no layer of a sentence encoder, and multiplied the error of some by five."""
LEAST_GAIN = 0.03
"""Factors that shrink the error of a layer by less are not worth an operator."""
MOST_SAMPLES = 32
TOTAL_ROWS = 128
"""Rows of an activation that the error is estimated on."""
MOST_COLUMNS = 384
"""Columns of a weight that the error is estimated on."""
MOST_DEPTH = 4
"""How many nodes factors are carried back through."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothActivations(GraphPass):
    """Divide the channels of an activation by factors, and multiply the weights behind it by them.

    The products stay what they were, up to rounding. It helps `quantize-dynamic` behind it: where a few channels are
    much larger than the others, an 8-bit scale for all of them is too coarse for most. The factors are those of
    SmoothQuant (Xiao et al., 2022), max|x|^alpha / max|w|^(1 - alpha) for each channel.

    The division goes into the normalization, the scale or the layer in front, where nothing else uses the activation;
    otherwise a Mul is inserted. Layers on the same activation share their factors.

    Keep it directly before the pass that quantizes: fusions would take a Mul back into the weight.

    Attributes:
        alpha: How much of the spread moves into the weights, from 0 to 1; .65 is a good guess. "auto" takes the best
            for each layer, by the error of its product of 8-bit integers, with factors learnt from one half of the
            calibration samples and judged by the other. Layers that gain nothing are left alone.
        min_elements: Layers whose weight has fewer elements are left alone.
    """

    name: ClassVar[str] = "smooth-activations"
    # Exact passes run in rounds with one another, and fusions would take the factors back.
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE
    needs_data: ClassVar[bool] = True

    alpha: float | Literal["auto"] = "auto"
    min_elements: int = 2048

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: If one cannot be used.
        """
        if self.alpha != "auto" and not (isinstance(self.alpha, (int, float)) and 0 <= self.alpha <= 1):
            raise UsageError(f'smooth-activations: alpha is {self.alpha}; use "auto" or a number from 0 to 1.')
        if self.min_elements < 1:
            raise UsageError(f"smooth-activations: min_elements is {self.min_elements}; use 1 or more.")

    def skip_reason(self, model: ir.Model, ctx: Context) -> str | None:
        """Return why the pass does not apply."""
        return NEEDS_DATA if ctx.calibration is None else None

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per activation: the layers that it is multiplied in."""
        assert ctx.calibration is not None, "skip_reason looked"
        groups: dict[ir.Value, list[Product]] = {}
        for item in products(model, ctx.shapes):
            if isinstance(item, NoProduct) or item.tensor.size < self.min_elements:
                continue
            reason = _reason(item)
            if reason is not None:
                yield Refusal(Site(self.name, item.scope.path, first_output(item.node)), reason)
            else:
                groups.setdefault(item.x, []).append(item)
        samples = max(1, min(MOST_SAMPLES, ctx.calibration.samples))
        observers = {x: ChannelSamples(samples, -(-TOTAL_ROWS // samples), ctx.seed) for x in groups}
        ctx.calibration.observe(model, {x.name or "": [observer] for x, observer in observers.items()})
        names = Names(model)
        for x, members in groups.items():
            yield self._group(x, members, observers[x].activation(), names, ctx)

    def _group(
        self, x: ir.Value, members: list[Product], activation: Activation | None, names: Names, ctx: Context
    ) -> Edit | Refusal:
        # Looked at again: an edit before may have changed their weights.
        found = [product(m.node, m.scope, ctx.shapes) for m in members]
        items = [p for p in found if isinstance(p, Product)]
        site = Site(self.name, members[0].scope.path, first_output(members[0].node))
        if activation is None:
            return Refusal(site, "its activation was empty, or held NaN or infinity")
        best = self._best(activation, [_matrix(p) for p in items])
        if isinstance(best, str):
            return Refusal(site, best)
        reasons = [r for p in items if (r := loss(p.tensor, _per_row(p, best.factors)))]
        if reasons:
            return Refusal(site, reasons[0])
        carriers = _Carriers(len(best.factors), items[0].scope, ctx.shapes)
        parts = carriers.find(x, {p.node for p in items}, MOST_DEPTH)
        summary = (
            f"{len(items)} layer{'s' if len(items) > 1 else ''} of {items[0].rows} channels, alpha {best.alpha:.2f}, "
            f"divided in {'a Mul' if parts is None else parts[0].node.op_type}: estimated error of "
            f"8-bit products {best.before:.2%} to {best.after:.2%}"
        )
        return Edit(site, summary, functools.partial(_apply, x, items, parts, best.factors, names))

    def _best(self, activation: Activation, weights: list[np.ndarray]) -> _Choice | str:
        """Return the factors with the smallest error, or why there are none."""
        largest = largest_of_rows(weights)
        if not np.isfinite(largest).all():
            return "its weight holds NaN or infinity"
        shown = [w[:, :: -(-w.shape[1] // MOST_COLUMNS)] for w in weights]
        before = expected_error(activation, shown, None)
        alphas = ALPHAS if self.alpha == "auto" else (float(self.alpha),)
        after, alpha = min((expected_error(activation, shown, alpha), alpha) for alpha in alphas)
        if self.alpha == "auto" and not after < before * (1 - LEAST_GAIN):
            return "no factors make its product of 8-bit integers more accurate"
        return _Choice(alpha, factors(activation.magnitude, largest, alpha), before, after)


@dataclasses.dataclass(frozen=True, slots=True)
class _Choice:
    alpha: float
    factors: np.ndarray
    before: float
    after: float


def _reason(item: Product) -> str | None:
    if item.scope.path:
        return "its activation lies in a nested graph or a function, whose values are not observed"
    if item.tensor.dtype != ir.DataType.FLOAT:
        return "its weight is not float32"
    if reason := too_small(item):
        return reason
    if not _owns(item):
        return "something else uses its weight too"
    if item.x.producer() is None and not item.x.is_graph_input():
        return "its activation is a constant"
    return None


def _matrix(item: Product) -> np.ndarray:
    """Return the weight as K x N; a view where it is stored so."""
    array = item.tensor.numpy()
    return array.T if item.transposed else array


def _per_column(item: Product, s: np.ndarray) -> np.ndarray:
    """Shape factors per column of the weight so that they broadcast over it as it is stored."""
    return s[:, None] if item.transposed else s[None, :]


def _per_row(item: Product, s: np.ndarray) -> np.ndarray:
    """Shape factors per channel of the activation so that they broadcast over the weight as it is stored."""
    return s[None, :] if item.transposed else s[:, None]


# Where the division goes -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """A constant that is divided so that a value behind it is.

    Attributes:
        node: The node that uses it.
        index: Which input of the node it is; it has one number per channel, or one for all.
        product: The node as a product, when it is the weight, whose columns are divided; None otherwise.
    """

    node: ir.Node
    index: int
    product: Product | None = None


_NORMALIZATIONS = {
    ("", "LayerNormalization"): (1, 2),
    ("", "RMSNormalization"): (1,),
    ("", "SimplifiedLayerNormalization"): (1,),
    ("com.microsoft", "SimplifiedLayerNormalization"): (1,),
}


@dataclasses.dataclass(frozen=True, slots=True)
class _Carriers:
    """Looks for constants in front of a value whose division divides the value channel by channel."""

    channels: int
    scope: Scope
    shapes: Shapes

    def find(self, x: ir.Value, users: set[ir.Node], depth: int) -> tuple[_Part, ...] | None:
        """Return the constants to divide, or None where other nodes than these use the value, or it cannot be done."""
        node = x.producer()
        if node is None or depth == 0 or x is not node.outputs[0] or x.is_graph_output():
            return None
        if node.graph is not self.scope.graph or any(u.node not in users for u in x.uses()):
            return None
        if (node.domain.removeprefix("ai.onnx"), node.op_type) in _NORMALIZATIONS:
            return self._normalization(node, x)
        if is_op(node, "Mul"):
            return self._multiplied(node, depth)
        if is_op(node, "Add"):
            return self._added(node, depth)
        found = product(node, self.scope, self.shapes)
        if not isinstance(found, Product) or found.in_attention or not _owns(found) or found.columns != self.channels:
            return None
        weight = _Part(node, 1, found)
        return (weight,) if found.bias is None or found.bias.adder is not None else (weight, _Part(node, 2))

    def _normalization(self, node: ir.Node, x: ir.Value) -> tuple[_Part, ...] | None:
        axis = attribute(node, "axis", -1)
        given = _NORMALIZATIONS[node.domain.removeprefix("ai.onnx"), node.op_type]
        indices = [i for i in given if i < len(node.inputs) and node.inputs[i] is not None]
        if axis not in (-1, (self.shapes.rank(x) or 0) - 1) or not all(
            self._is_vector(node.inputs[i]) for i in indices
        ):
            return None
        return tuple(_Part(node, i) for i in indices)

    def _multiplied(self, node: ir.Node, depth: int) -> tuple[_Part, ...] | None:
        """Find a factor that can be divided: a constant, or a value that only the Mul uses."""
        for index, value in enumerate(node.inputs):
            if self._is_vector(value):
                return (_Part(node, index),)
        for value in node.inputs:
            found = self._before(value, node, depth)
            if found is not None:
                return found
        return None

    def _added(self, node: ir.Node, depth: int) -> tuple[_Part, ...] | None:
        for index, value in enumerate(node.inputs):
            if self._is_vector(value):
                found = self._before(node.inputs[1 - index], node, depth)
                return None if found is None else (*found, _Part(node, index))
        return None

    def _before(self, value: ir.Value | None, node: ir.Node, depth: int) -> tuple[_Part, ...] | None:
        shape = None if value is None else self.shapes.of(value)
        # Broadcast, its channels would not be those of the result.
        if value is None or shape is None or shape[-1:] != (self.channels,) or use_count(value) != 1:
            return None
        return self.find(value, {node}, depth - 1)

    def _is_vector(self, value: ir.Value | None) -> bool:
        array = constant_array(value)
        if array is None or array.dtype != np.float32:
            return False
        return array.size == 1 or array.size == self.channels == array.shape[-1]


def _owns(found: Product) -> bool:
    """Whether nothing else uses the weight, so that it can be changed."""
    values = (found.weight, *(n.outputs[0] for n in found.views))
    return found.tensor.dtype == ir.DataType.FLOAT and all(
        use_count(v) == 1 and not v.is_graph_output() for v in values
    )


# Edits -------------------------------------------------------------------------------------------------------


def _apply(x: ir.Value, items: list[Product], parts: tuple[_Part, ...] | None, s: np.ndarray, names: Names) -> None:
    scope = items[0].scope
    if parts is None:
        builder = Builder(scope, names, _first(items), x.name or "x")
        divided = builder.op("Mul", [x, builder.constant("smoothing", (1 / s).astype(np.float32))])
        divided.type, divided.shape = x.type, x.shape.copy() if x.shape is not None else None
        for item in items:
            item.node.replace_input_with(0, divided)
    for part in parts or ():
        if part.product is None:
            _scale_constant(part, 1 / s, scope, names)
        else:
            _scale_weight(part.product, _per_column(part.product, 1 / s), scope, names)
    for item in items:
        _scale_weight(item, _per_row(item, s), scope, names)


def _first(items: Sequence[Product]) -> ir.Node:
    """Return which of the nodes comes first in their graph."""
    nodes = {p.node for p in items}
    return next(node for node in items[0].scope.graph if node in nodes)


def _scale_weight(item: Product, factor: np.ndarray, scope: Scope, names: Names) -> None:
    """Replace a weight that only this product uses; the Transpose nodes behind it stay."""
    user = item.views[-1] if item.views else item.node
    index = next(i for i, v in enumerate(user.inputs) if v is item.weight)
    name = f"{item.weight.name}/smoothed"
    compute = functools.partial(scaled, item.tensor, factor)
    tensor = deferred.tensor(compute, item.tensor.dtype, item.tensor.shape.numpy(), name)
    user.replace_input_with(index, add_constant(scope, names, name, tensor, user))
    drop_unused_constants([item.weight])


def _scale_constant(part: _Part, factor: np.ndarray, scope: Scope, names: Names) -> None:
    value = part.node.inputs[part.index]
    array = constant_array(value)
    assert value is not None and array is not None, "it is a constant"
    made = (array.astype(np.float64) * factor).astype(array.dtype)
    constant = add_constant(scope, names, f"{value.name}/smoothed", made, part.node)
    part.node.replace_input_with(part.index, constant)
    drop_unused_constants([value])
