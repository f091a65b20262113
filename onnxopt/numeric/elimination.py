"""In which order units go from the inputs of linear layers, and what is lost when the rest makes up for them.

A layer computes W x. When the inputs in a set S are gone and the weights of the others are chosen by least squares, the
square error of its outputs is tr(W_S ([C^-1]_SS)^-1 W_S^T), where C is the covariance of x, and what is left has the
inverse C^-1 without the part that S explains. (Hassibi and Stork, "Optimal Brain Surgeon", 1992; for whole structures:
Kurtic et al., "ZipLM", 2023.) Always the units go for which this is smallest.

That is the error on the samples that C was learnt from, to which the weights were fitted: with fewer samples than
inputs nothing seems to be lost. What is reported is therefore the error of these weights on other samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

DAMPING = 1e-3
"""Added to the variances, as a part of their mean: what hardly varied must not be trusted."""

STEPS = 128
"""Units go one by one where there are no more of them, and otherwise several at a time."""

JUDGED = 32
"""The error on other samples is worked out so often, and between these counts of units taken to grow evenly."""


@dataclasses.dataclass(frozen=True, slots=True)
class Consumer:
    """A linear layer that sums up units, or several independent ones of the same size.

    Attributes:
        covariance: Of its inputs, (groups, inputs, inputs).
        held: The same of samples held back, (groups, inputs, inputs): mean products of how far inputs are off the mean
            that the covariance is about.
        weight: (groups, outputs, inputs).
        units: (inputs,) the unit of each input; -1 for an input that stays. Each unit has equally many inputs.
    """

    covariance: Array
    held: Array
    weight: Array
    units: Array

    @property
    def spread(self) -> float:
        """Mean square deviation of its outputs on the samples held back, summed up."""
        return _power(self.weight, self.held)


@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    """What is known when all units but a few are gone.

    Attributes:
        units: In the order in which they go.
        lost: (len(units) + 1,) the square error of the consumers' outputs when so many are gone, on samples held back,
            each as a part of their variance there, summed over consumers. Never falls.
        weights: For each consumer its weight when `halfway` units are gone, with zeros for what is gone.
        halfway: How many that is.
    """

    units: Array
    lost: Array
    weights: tuple[Array, ...]
    halfway: int


def eliminate(consumers: Sequence[Consumer], units: int, least: int, halfway: int) -> Order:
    """Work out an order.

    Args:
        consumers: The layers; at least one.
        units: How many units there are.
        least: So many stay, at least one.
        halfway: When so many are gone, weights are taken down.
    """
    states = [_State(consumer, units) for consumer in consumers]
    left = np.arange(units)
    order: list[int] = []
    counts, lost = [0], [0.0]
    weights: tuple[Array, ...] = tuple(consumer.weight for consumer in consumers)
    taken = 0
    while len(left) > least:
        scores = np.sum([state.scores() for state in states], axis=0)
        number = min(-(-units // STEPS), len(left) - least)
        if len(order) < halfway:
            number = min(number, halfway - len(order))
        chosen = np.sort(np.argsort(scores, kind="stable")[:number])
        for state in states:
            state.remove(chosen)
        order += left[chosen[np.argsort(scores[chosen], kind="stable")]].tolist()
        left = np.delete(left, chosen)
        due = len(order) - counts[-1] >= units / JUDGED
        if due or len(order) == halfway or len(left) <= least:
            counts.append(len(order))
            lost.append(max(lost[-1], sum(state.lost() for state in states)))
        if len(order) <= halfway:
            taken, weights = len(order), tuple(state.weight() for state in states)
    damage = np.interp(np.arange(len(order) + 1), counts, lost)
    return Order(np.array(order, np.int64), damage, weights, taken)


def _power(weight: Array, products: Array) -> float:
    return float(np.einsum("goi,goi->", weight @ products, weight))


class _State:
    """What is left of a consumer."""

    def __init__(self, consumer: Consumer, units: int) -> None:
        covariance = np.array(consumer.covariance, np.float64)
        size = covariance.shape[1]
        variance = np.maximum(np.diagonal(covariance, axis1=1, axis2=2), 0)
        mean = variance.mean(axis=1, keepdims=True)
        covariance[:, range(size), range(size)] = variance + np.where(mean > 0, DAMPING * mean, 1.0)
        self._inverse: Array = np.linalg.inv(covariance)
        self._weight = np.array(consumer.weight, np.float64)
        self._consumer, self._spread = consumer, max(consumer.spread, 1e-30)
        self._inputs = np.arange(size)
        # (units, inputs of a unit): where they are among what is left
        self._places = np.stack([np.flatnonzero(consumer.units == unit) for unit in range(units)])

    def scores(self) -> Array:
        """Return the relative square error for each unit that is left, if it goes alone."""
        rows, columns = self._places[:, :, None], self._places[:, None, :]
        blocks = self._inverse[:, rows, columns]
        weights = self._weight[:, :, self._places]
        norms = np.einsum("gonk,gonl->gnkl", weights, weights, optimize=True)
        found = norms / blocks if blocks.shape[-1] == 1 else np.linalg.solve(blocks, norms)
        total: Array = np.trace(found, axis1=2, axis2=3).sum(axis=0) / self._spread
        return np.where(np.isfinite(total), total, np.inf)

    def remove(self, chosen: Array) -> None:
        """Take out units that are left, by their places."""
        gone = self._places[chosen].reshape(-1)
        stays = np.delete(np.arange(len(self._inputs)), gone)
        weight = self._weight[:, :, gone]
        explained = np.linalg.solve(self._inverse[:, gone[:, None], gone], self._inverse[:, gone, :])
        self._weight = self._weight[:, :, stays] - weight @ explained[:, :, stays]
        inverse = self._inverse[:, stays[:, None], stays]
        inverse -= self._inverse[:, stays[:, None], gone] @ explained[:, :, stays]
        self._inverse = inverse
        self._inputs = self._inputs[stays]
        shift = np.cumsum(np.isin(np.arange(len(stays) + len(gone)), gone))
        places = np.delete(self._places, chosen, axis=0)
        self._places = places - shift[places]

    def lost(self) -> float:
        """Return the relative square error on the samples held back."""
        return _power(self.weight() - self._consumer.weight, self._consumer.held) / self._spread

    def weight(self) -> Array:
        """Return the weight as it is, with zeros for what is gone."""
        whole = np.zeros(self._consumer.weight.shape)
        whole[:, :, self._inputs] = self._weight
        return whole
