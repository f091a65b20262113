"""Decides what the features of a new head are and where it goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from onnxopt.analysis.task import class_scores, main_output
from onnxopt.analysis.weights import FLOATS
from onnxopt.errors import ModelError, UsageError
from onnxopt.feeds import Data
from onnxopt.graph import attribute, constant_tensor, copied, is_op
from onnxopt.heads.attach import append_head, name_classes, replace_head
from onnxopt.heads.features import first_of, value_named, values_of
from onnxopt.heads.locate import Head, find_head, is_layer, weight_shape
from onnxopt.heads.pooling import pool
from onnxopt.probe.classifier import Linear
from onnxopt.registry import nearest
from onnxopt.runtime import RunOptions


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """Where a new head goes.

    Attributes:
        trunk: A copy of the model that also computes the features, one vector per sample.
        features: Their name in the trunk.
        source: Name of the value of the model that they are made of.
        dtype: Their element type.
        replaces: The operator of the old head, which the new one takes the place and form of; empty when a head is
            appended.
        output: Name of the output that holds the new scores.
        activation: "Softmax", "LogSoftmax" or "": what the output holds.
        notes: What was decided, each in a sentence.
    """

    trunk: ir.Model
    features: str
    source: str
    dtype: ir.DataType
    replaces: str
    output: str
    activation: str
    notes: tuple[str, ...]


def plan(model: ir.Model, data: Data, options: RunOptions, at: str | None) -> Plan:
    """Find the features.

    Args:
        model: It is not changed.
        data: Its first sample is run, to see how many axes the features have.
        options: How to run the model.
        at: Name of the value to use as features; None for what goes into the old head.

    Raises:
        UsageError: If there is no value of the name.
        ModelError: If nothing can serve as features.
        RuntimeFailure: If the model does not run.
    """
    found = find_head(model) if at is None else "chosen"
    if isinstance(found, Head):
        return _of_head(model, found, first_of(model, found.features.name or "", data, options))
    if at is None:
        value = _embedding(model)
        notes = [f'{found[:1].upper()}{found[1:]}, so the output "{value.name}" itself is the features.']
    else:
        value, notes = _named(model, at), []
    array = first_of(model, value.name or "", data, options)
    scores = class_scores(model) is not None
    head = find_head(model)
    activation = head.activation if isinstance(head, Head) else ""
    output = main_output(model)
    name = output.name if scores and output is not None and output.name else "logits"
    return _appended(model, value.name or "", array, name, _single(activation), notes)


def written(
    source: ir.Model, planned: Plan, fitted: Linear, classes: Sequence[str]
) -> tuple[ir.Model, list[str], set[str]]:
    """Return the model with the new head, what else was changed, and the outputs that depend on the head."""
    notes: list[str] = []
    changed = {planned.output}
    if planned.replaces:
        model = copied(source)
        found = find_head(model)
        assert isinstance(found, Head), "the plan has found a head in the same graph"
        changed = {v.name or "" for v in found.outputs}
        notes = replace_head(model, found, fitted)
    else:
        model = copied(planned.trunk)
        vectors = value_named(model, planned.features)
        append_head(model, vectors, fitted, planned.dtype, activation=planned.activation, name=planned.output)
    name_classes(model, classes)
    return model, notes, changed


def inlined(model: ir.Model) -> ir.Model:
    """Return a copy without functions: a head may be inside one."""
    copy = copied(model)
    if copy.functions:
        InlinePass()(copy)
    return copy


def earlier(model: ir.Model, most: int = 2) -> list[str]:
    """Return what linear layers before the head take, the nearest first: other features to classify by.

    What the first layer takes is left out; it is the input.

    Args:
        model: The model.
        most: How many at most.
    """
    head = find_head(model)
    value: ir.Value | None = head.features if isinstance(head, Head) else _embedding(model)
    names: list[str] = []
    while value is not None and (node := value.producer()) is not None and len(names) <= most:
        value = next((v for v in node.inputs if v is not None and constant_tensor(v) is None), None)
        if is_layer(node) and value is not None:
            names.append(value.name or "")
    return names[: min(most, len(names) - 1)] if names else []


def _of_head(model: ir.Model, head: Head, first: np.ndarray) -> Plan:
    """Plan to replace a head, or, where it has a class for every position, to append one."""
    name = head.features.name or ""
    output = main_output(model)
    assert output is not None and output.name
    flatten, why = _form(head, first)
    if why:
        return _appended(model, name, first, output.name, _single(head.activation), [why])
    trunk = copied(model)
    vectors, how = pool(trunk, value_named(trunk, name), first.ndim, _dtype(first), flatten=flatten)
    notes = [f'Features are "{name}", {how}.'] if how and how != "flattened" else []
    kind = head.node.op_type if head.bias is None else "MatMul and Add"
    activation = _single(head.activation)
    return Plan(trunk, vectors.name or "", name, _dtype(first), kind, output.name, activation, tuple(notes))


def _form(head: Head, first: np.ndarray) -> tuple[bool, str]:
    """Return whether positions are kept side by side, and why a head of this form cannot be replaced by its like."""
    if not is_op(head.node, "Conv"):
        fits = first.ndim == 2
        return False, "" if fits else "The old head had scores for every token; the new one has them for every sample."
    kernel = weight_shape(head.node)[2:]
    plain = not any(attribute(head.node, "pads", ())) and attribute(head.node, "auto_pad", "NOTSET") != "SAME_UPPER"
    if plain and first.ndim == 4 and kernel == first.shape[2:]:
        return True, ""
    unit = all(k == 1 for k in kernel) and all(s == 1 for s in attribute(head.node, "strides", (1,)))
    if plain and first.ndim == 4 and unit and head.pooled:
        return False, ""
    return False, "The old head had scores for every position; the new one has them for every sample."


def _appended(model: ir.Model, name: str, first: np.ndarray, output: str, activation: str, notes: list[str]) -> Plan:
    """Plan to put a head behind features.

    Raises:
        ModelError: If no vector per sample can be made of the value.
    """
    trunk = copied(model)
    if _dtype(first) not in FLOATS:
        raise ModelError(f'"{name}" holds no floating-point numbers; choose other features with --at.')
    try:
        vectors, how = pool(trunk, value_named(trunk, name), first.ndim, _dtype(first), flatten=False)
    except ValueError as error:
        raise ModelError(f'"{name}" cannot serve as features: {error}; choose others with --at.') from error
    if how:
        notes = [*notes, f'Features are {how} of "{name}".']
    return Plan(trunk, vectors.name or "", name, _dtype(first), "", output, activation, tuple(notes))


def _embedding(model: ir.Model) -> ir.Value:
    """Return the output to classify by: the first with one vector per sample, else the first of floating point.

    Raises:
        ModelError: If there is none.
    """
    floating = [v for v in model.graph.outputs if v.dtype in FLOATS and v.producer() is not None]
    if not floating:
        raise ModelError("The model has no floating-point output to use as features; choose a value with --at.")
    return next((v for v in floating if v.shape is not None and len(v.shape) == 2), floating[0])


def _named(model: ir.Model, name: str) -> ir.Value:
    values = {v.name: v for v in values_of(model)}
    if name not in values:
        near = nearest(name, [n for n in values if n])
        raise UsageError(f'The main graph has no value "{name}".{near}')
    return values[name]


def _dtype(array: np.ndarray) -> ir.DataType:
    return ir.DataType.from_numpy(array.dtype)


def _single(activation: str) -> str:
    """Return the activation for one class per sample."""
    return "Softmax" if activation == "Sigmoid" else activation
