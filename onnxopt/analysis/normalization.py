"""Reads (x - mean(x)) / sqrt(mean((x - mean(x)) ** 2) + eps), and the same without the mean, in all exporters' forms.

A normalization is a product (`analysis/algebra.py`): one factor to the power -1/2 that is a mean of squares plus a
constant, and the factor that is squared there. Means may be taken of a reshaped x, or lose the axes they reduce and
get them back afterwards, as long as they are over all axes from one on.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnxopt.analysis.algebra import Monomial, monomial, summands
from onnxopt.analysis.dims import Dim
from onnxopt.analysis.shapes import Shapes
from onnxopt.graph import attribute, constant_ints, has_references, is_op

Factors = tuple[tuple[ir.Value, float], ...]

NOT_SQUARES = "the mean is not one of squares"
OTHER_AXES = "the mean is not over the last axes, or the number of axes is unknown"
NO_FACTOR = "what is normalized is not a plain factor of the product"
NO_EPSILON = "what is added to the variance is no positive constant"
COMPUTED_FACTOR = "the variance is multiplied by a computed number"

_SAME_ELEMENTS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")


@dataclasses.dataclass(frozen=True, slots=True)
class Norm:
    """A normalization.

    Attributes:
        x: What is normalized.
        shape: Its shape.
        axes: Over how many of its last axes.
        inverse: What the square root is taken of.
        epsilon: What is added to the variance.
        factor: What the normalized value is multiplied by; not 1 where the variance is multiplied by a constant.
        centred: Whether the mean is subtracted; RMS normalization does not.
        rest: The factors of the product besides, without its coefficient.
    """

    x: ir.Value
    shape: tuple[Dim, ...]
    axes: int
    inverse: ir.Value
    epsilon: float
    factor: float
    centred: bool
    rest: Factors

    @property
    def normalized(self) -> tuple[Dim, ...]:
        """The sizes of the axes that are normalized over."""
        return self.shape[len(self.shape) - self.axes :]


@dataclasses.dataclass(frozen=True, slots=True)
class _Mean:
    """The mean of `operand` over all axes from `lead` on."""

    operand: ir.Value
    lead: int


def read(product: Monomial, shapes: Shapes) -> Norm | str | None:
    """Return the normalization in a product, why a near miss is none, or None."""
    for value, exponent in product.factors:
        total = _under_root(value, exponent, shapes)
        found = None if total is None else _read(product, value, total, shapes)
        if found is not None:
            return found
    return None


def _under_root(value: ir.Value, exponent: float, shapes: Shapes) -> ir.Value | None:
    """Return t when the factor is t to the power -1/2; it may be reshaped after the root was taken."""
    inner = _source(value)
    if exponent == -0.5:
        return inner
    if inner is value or exponent not in (1, -1):
        return None
    root = monomial(inner, shapes)
    if root.coefficient != 1 or len(root.factors) != 1 or root.factors[0][1] * exponent != -0.5:
        return None
    return _source(root.factors[0][0])


def _read(product: Monomial, inverse: ir.Value, total: ir.Value, shapes: Shapes) -> Norm | str | None:
    added = summands(total, shapes)
    variances = [t for t in added.terms if t.sign == 1 and _is_mean(t.value, shapes)]
    if len(variances) != 1:
        return None
    if len(added.terms) != 1 or not added.constant > 0:
        return NO_EPSILON
    variance = monomial(variances[0].value, shapes)
    if len(variance.factors) != 1 or not variance.coefficient > 0:
        return COMPUTED_FACTOR
    mean = _mean(variance.factors[0][0], shapes)
    if mean is None:
        return OTHER_AXES
    square = monomial(_source(mean.operand), shapes)
    if len(square.factors) != 1 or square.coefficient != 1 or square.factors[0][1] != 2:
        return NOT_SQUARES
    squared = square.factors[0][0]
    if not _same_lead(mean.operand, squared, mean.lead, shapes):
        return OTHER_AXES
    centre = _centred(squared, mean.lead, shapes)
    numerator = _numerator(product, squared, centre, mean.lead, shapes)
    if numerator is None:
        return NO_FACTOR
    factor, x = numerator
    shape = shapes.of(x)
    if shape is None:
        return OTHER_AXES
    axes = len(shape) - mean.lead
    if not shapes.same_shape(inverse, (*shape[: mean.lead], *[1] * axes)):
        return OTHER_AXES
    scale = variance.coefficient
    rest = product.without(factor, inverse)
    return Norm(x, shape, axes, total, added.constant / scale, scale**-0.5, centre is not None, rest)


def _is_mean(value: ir.Value, shapes: Shapes) -> bool:
    """Whether a value is a mean, whatever it is multiplied by."""
    factors = monomial(value, shapes).factors
    return sum(e == 1 and is_op(_source(v).producer(), "ReduceMean") for v, e in factors) == 1


def _numerator(
    product: Monomial, squared: ir.Value, centre: ir.Value | None, lead: int, shapes: Shapes
) -> tuple[ir.Value, ir.Value] | None:
    """Return (factor, x): what is squared in the variance, or the same computed another time."""
    if product.exponent(squared) == 1:
        return squared, centre or squared
    if centre is None:
        return None
    for value, exponent in product.factors:
        x = _centred(value, lead, shapes) if exponent == 1 else None
        if x is not None and _source(x) is _source(centre) and _same_lead(x, centre, lead, shapes):
            return value, x
    return None


def _mean(value: ir.Value, shapes: Shapes) -> _Mean | None:
    """Read a mean over all axes from one on, whatever became of the reduced axes."""
    node = _source(value).producer()
    if node is None or not is_op(node, "ReduceMean") or has_references(node) or node.inputs[0] is None:
        return None
    rank = shapes.rank(node.inputs[0])
    axes = attribute(node, "axes")
    if axes is None and len(node.inputs) > 1:
        axes = constant_ints(node.inputs[1])
    if rank is None or not axes:
        return None
    reduced = sorted(a % rank for a in axes)
    lead = rank - len(reduced)
    return _Mean(node.inputs[0], lead) if reduced == list(range(lead, rank)) else None


def _centred(deviation: ir.Value, lead: int, shapes: Shapes) -> ir.Value | None:
    """Return x when the value is x - mean(x) over all axes from `lead` on."""
    node = deviation.producer()
    if node is None or not is_op(node, "Sub") or node.inputs[0] is None or node.inputs[1] is None:
        return None
    x = node.inputs[0]
    mean, shape = _mean(node.inputs[1], shapes), shapes.of(x)
    if mean is None or shape is None or mean.lead != lead or _source(mean.operand) is not _source(x):
        return None
    if not _same_lead(mean.operand, x, lead, shapes):
        return None
    return x if shapes.same_shape(node.inputs[1], (*shape[:lead], *[1] * (len(shape) - lead))) else None


def _same_lead(a: ir.Value, b: ir.Value, lead: int, shapes: Shapes) -> bool:
    """Whether two values with the same elements in the same order agree in their first axes, and have more."""
    if a is b:
        return True
    first, second = shapes.of(a), shapes.of(b)
    if first is None or second is None or min(len(first), len(second)) <= lead:
        return False
    return first[:lead] == second[:lead]


def _source(value: ir.Value) -> ir.Value:
    """Look through nodes that keep all elements in their order."""
    node = value.producer()
    while node is not None and is_op(node, *_SAME_ELEMENTS) and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value
