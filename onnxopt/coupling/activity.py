"""How much the units of a group matter, by what the model computes with on data."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnxopt.contract import Calibration
from onnxopt.coupling.analysis import Coupling, Group, Member
from onnxopt.coupling.builder import Sink
from onnxopt.coupling.importance import Scores, index_norms
from onnxopt.coupling.stored import stored
from onnxopt.numeric.channel_moments import ChannelMoments

Activity = Mapping[tuple[ir.Value, int], ChannelMoments]
"""Value and axis of its channels -> what was seen."""


def observe(model: ir.Model, coupling: Coupling, calibration: Calibration) -> Activity:
    """Run the model on data and look at what weights are multiplied by.

    Args:
        model: The model that was analysed; it is not changed.
        coupling: The analysis.
        calibration: The data.
    """
    found: dict[tuple[ir.Value, int], ChannelMoments] = {}
    for sink in coupling.sinks:
        place = multiplied(sink)
        if place is None or place in found or place[0].graph is not model.graph or place[0].is_initializer():
            continue
        size = coupling.size(*place)
        if size is not None:
            found[place] = ChannelMoments(size, place[1])
    observers: dict[str, list[ChannelMoments]] = {}
    for (value, _), moments in found.items():
        observers.setdefault(value.name or "", []).append(moments)
    calibration.observe(model, observers)
    return found


def multiplied(sink: Sink) -> tuple[ir.Value, int] | None:
    """Return the value, and its axis, that the weight of a sink is multiplied by.

    For the state of a recurrent layer these are the outputs of all steps.
    """
    if sink.other is not None:
        value = sink.node.inputs[sink.other[0]]
        return None if value is None else (value, sink.other[1])
    if sink.later is None or not sink.node.outputs[sink.later[0]].name:
        return None
    return sink.node.outputs[sink.later[0]], sink.later[1]


def activation(group: Group, coupling: Coupling, activity: Activity) -> Scores | None:
    """Return the energy that each unit brings into the sums behind it, (units,); None where nothing was seen.

    It is the variance of what a weight is multiplied by times the squared norm of its slice (Sun et al., "Wanda", 2023,
    for whole channels); the mean is left out because a bias can make up for it. Every layer that consumes the units
    counts alike.
    """
    total: Scores = np.zeros(group.units)
    seen = False
    consumers = {(member.value, member.axis): member for member in group.members if member.consumes}
    for sink in coupling.sinks:
        weight = sink.node.inputs[sink.index]
        member = None if weight is None else consumers.get(stored(weight, sink.axis))
        place = multiplied(sink)
        moments = None if place is None else activity.get(place)
        if member is None or moments is None or not moments.usable or moments.size % len(member.units):
            continue
        scores = _energy(member, moments, group.units)
        if np.isfinite(scores).all() and scores.mean() > 0:
            total += scores / scores.mean()
            seen = True
    return total if seen else None


def _energy(member: Member, moments: ChannelMoments, units: int) -> Scores:
    # Each group of a convolution takes its own inputs with the same indexes of the weight.
    energy = index_norms(member) * moments.variance.reshape(-1, len(member.units)).sum(axis=0)
    inside = member.units >= 0
    return np.bincount(member.units[inside], energy[inside], minlength=units).astype(np.float64)
