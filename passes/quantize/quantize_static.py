"""Compute convolutional nets with 8-bit integers."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.apart import Step, apart, hard_activations, is_integer
from onnxopt.analysis.int8 import (
    POOLS_INTEGERS,
    Between,
    Layer,
    activated,
    averaged_channels,
    between,
    is_global_average,
    layer,
    repeated,
    worthwhile,
)
from onnxopt.contract import NEEDS_DATA, Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.errors import UsageError
from onnxopt.graph import (
    Names,
    Scope,
    add_constant,
    attribute,
    constant_array,
    constant_tensor,
    drop_unused_constants,
    first_output,
    insert_before,
    is_op,
    make_node,
    remove_node,
    replace_value,
    scopes,
)
from onnxopt.integers.copies import pool, repeat
from onnxopt.integers.pairs import Pairs
from onnxopt.integers.seen import Seen
from onnxopt.integers.windows import separate_windows
from onnxopt.integers.windows import write as write_windows
from onnxopt.numeric import adjacent, grids
from onnxopt.numeric.grids import Array, Grid
from onnxopt.numeric.means import mean_response
from onnxopt.rewrite import Builder

METHODS = ("auto", "minmax", "percentile", "entropy", "mse")
LARGEST = 127
"""The largest integer of a weight."""
CLIP_BY_INPUTS = 11
"""From this opset on, Clip takes its bounds as inputs."""
MAX_BIAS = 2.0**30
"""Integers of a bias stay below this, so that the sum they are added to stays within 32 bits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeStatic(GraphPass):
    """Compute Conv and Gemm, and what lies between them, with 8-bit integers whose ranges were learnt from data.

    The model keeps its operators; QuantizeLinear and DequantizeLinear stand around them, which ONNX Runtime merges
    into 8-bit kernels on the CPU. Activations become uint8 with a zero point, weights int8, with a scale per output
    channel for the target "cpu" or from opset 13 on, biases int32, which for "cpu" the runtime makes itself. The few
    weights whose products could exceed the 16 bits in which x86-64 processors without VNNI add up pairs of them are
    made smaller, so that every processor computes the same.

    Where a layer's output passes through pooling, layout nodes, Add, Mul, Concat, Sigmoid or LeakyRelu on its way to
    another layer, these are computed with integers too. Concat and what hands elements on have one grid on both sides,
    so that it is a copy; a multiple of a value is the same integers on another grid. What has no fast 8-bit kernel is
    written as what has one: AveragePool as a depthwise convolution, a Resize that repeats elements as Gathers, a
    ConvTranspose whose windows do not overlap as Conv and a change of order, FusedConv, HardSigmoid and HardSwish as
    their parts.

    Matrix products are left to quantize-dynamic, which is as fast and more accurate. Other ConvTransposes stay in
    floating point.

    Attributes:
        ranges: Which part of the values seen on the calibration data the levels reach. "minmax": all of it.
            "percentile": all but 0.002% at each end. "entropy": where the Kullback-Leibler divergence is least.
            "mse": where the mean square of the rounding error is least. "auto": "percentile".
        correct_bias: Make up, in the bias, for what rounding the weights adds to the mean of each output channel on
            the calibration data. On PP-OCR's text reader with 16 images it lowered the characters that are wrong
            because of the 8 bits from 3.9 in a hundred to 0.5.
    """

    name: ClassVar[str] = "quantize-static"
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE
    needs_data: ClassVar[bool] = True

    ranges: Literal["auto", "minmax", "percentile", "entropy", "mse"] = "auto"
    correct_bias: bool = True

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: If one cannot be used.
        """
        if self.ranges not in METHODS:
            raise UsageError(f'quantize-static: ranges is "{self.ranges}"; use {", ".join(METHODS)}.')

    def skip_reason(self, model: ir.Model, ctx: Context) -> str | None:
        """Return why no layer can be computed with integers, or None."""
        opset = next(scopes(model)).opset
        if ctx.target == "cuda":
            return "ONNX Runtime's CUDA provider has no 8-bit kernels for QuantizeLinear and DequantizeLinear to become"
        if opset < 10:
            return f"QuantizeLinear exists from opset 10 on, and this model has {opset}; raise it with --opset 13"
        return NEEDS_DATA if ctx.calibration is None else None

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per FusedConv, per layer, and per node between layers that became integers, last to first."""
        main = next(scopes(model))
        names = Names(model)
        for node in main.graph:
            steps = apart(node, main)
            if steps is not None:
                summary = f"FusedConv into {', '.join(step.op for step in steps)}"
                site = Site(self.name, "", first_output(node))
                yield Edit(site, summary, functools.partial(_take_apart, node, steps, main, names))
        for node, steps in hard_activations(main, ctx.shapes, ctx.target):
            summary = f"{node.op_type} into {', '.join(step.op for step in steps)}"
            site = Site(self.name, "", first_output(node))
            yield Edit(site, summary, functools.partial(_take_apart, node, steps, main, names))
        known = functools.partial(is_integer, main=main, shapes=ctx.shapes, target=ctx.target)
        for node, size in separate_windows(main, ctx.shapes, known):
            summary = "ConvTranspose into Conv and the order of its windows"
            site = Site(self.name, "", first_output(node))
            yield Edit(site, summary, functools.partial(write_windows, node, size, main, ctx.shapes, names))
        layers: list[Layer] = []
        for scope in scopes(model):
            for node in scope.graph:
                found = layer(node, scope, ctx.shapes)
                if isinstance(found, str):
                    yield Refusal(Site(self.name, scope.path, first_output(node)), found)
                elif found is not None:
                    layers.append(found)
        if not layers or ctx.calibration is None:
            return
        others = [b for node in main.graph if (b := between(node, main, ctx.shapes, ctx.target)) is not None]
        seen = Seen(layers, others, "percentile" if self.ranges == "auto" else self.ranges)
        if self.correct_bias:
            seen.watch_means(layers)
        ctx.calibration.observe(model, seen.observers)
        graph = _Graph(main, names, seen, ctx)
        for item in layers:
            yield self._layer(item, graph)
        chosen = worthwhile(others, graph.pairs.is_rounded)
        for other in reversed(chosen):
            # Nodes are seen after those that use them: one that was left out takes those that fed only it along.
            if any(graph.pairs.is_rounded(v) for v in other.results):
                yield self._between(other, graph)
        for node in main.graph:
            if is_op(node, "AveragePool") and graph.surrounds(node):
                site = Site(self.name, "", first_output(node))
                yield Edit(
                    site, "AveragePool in float32, where it is faster", functools.partial(graph.keep_float, node)
                )

    def _layer(self, item: Layer, graph: _Graph) -> Edit | Refusal:
        site = Site(self.name, "", first_output(item.node))
        values = (item.source, item.result) if item.node.op_type == "Conv" else (item.source,)
        reason = "its weight or bias holds NaN or infinity" if not _is_finite(item) else _first_reason(values, graph)
        if reason is not None:
            return Refusal(site, reason)
        tensor = constant_tensor(item.weight)
        assert tensor is not None, "layers have constant weights"
        sizes = ",".join(str(size) for size in tensor.shape)
        granularity = "channel" if graph.pairs.per_channel else "tensor"
        low, high = graph.pairs.range(item.source)
        summary = f"{item.node.op_type} with [{sizes}] weights in int8 per {granularity}, input {low:.4g} to {high:.4g}"
        return Edit(site, summary, functools.partial(graph.quantize_layer, item))

    def _between(self, item: Between, graph: _Graph) -> Edit | Refusal:
        site = Site(self.name, "", first_output(item.node))
        reason = _first_reason([*(v for _, v in item.sources), *item.results], graph)
        if reason is not None:
            return Refusal(site, reason)
        summary = f"{item.node.op_type} between layers in uint8"
        return Edit(site, summary, functools.partial(graph.quantize_between, item))


def _take_apart(node: ir.Node, steps: list[Step], scope: Scope, names: Names) -> None:
    """Put nodes that have 8-bit kernels in the place of one that has none."""
    (old,) = node.outputs
    value: ir.Value | None = None
    for step in steps:
        inputs = [*step.inputs] if value is None else [value, *step.inputs]
        attributes = dict(step.attributes)
        if step.op != "Clip" or scope.opset >= CLIP_BY_INPUTS:
            base = f"{old.name}/{step.op}"
            inputs += [add_constant(scope, names, base, np.asarray(b, np.float32), node) for b in step.numbers]
        else:
            attributes |= dict(zip(("min", "max"), step.numbers, strict=False))
        made = make_node(names, step.op, inputs, attributes, like=old)
        insert_before(node, made)
        value = made.outputs[0]
    assert value is not None, "there are steps"
    replace_value(old, value)
    remove_node(node)


def _is_finite(item: Layer) -> bool:
    values = [item.weight] if item.bias is None else [item.weight, item.bias]
    arrays = [constant_array(v) for v in values]
    return all(bool(np.isfinite(bound).all()) for a in arrays if a is not None for bound in grids.value_range(a))


def _first_reason(values: Iterable[ir.Value], graph: _Graph) -> str | None:
    return next((r for v in values if (r := graph.reason(v)) is not None), None)


class _Graph:
    """The main graph with what was done to its layers and what lies between them."""

    def __init__(self, scope: Scope, names: Names, seen: Seen, ctx: Context) -> None:
        self._scope = scope
        self._names = names
        self._seen = seen
        self._shapes = ctx.shapes
        self.pairs = Pairs(scope, names, ctx.target, seen.grid, seen.ties.of)

    def reason(self, value: ir.Value) -> str | None:
        """Return why a value has no grid, or None."""
        constant = constant_array(value)
        if constant is not None:
            finite = constant.size and np.isfinite(constant).all()
            return None if finite else f'the constant "{value.name}" is empty or holds NaN or infinity'
        seen = self._seen.histogram(value)
        if not seen.finite:
            return f'"{value.name}" took on NaN or infinity on the calibration data'
        if seen.low > seen.high:
            return f'"{value.name}" held no elements on the calibration data'
        if seen.low == seen.high == 0:
            return f'"{value.name}" was 0 throughout the calibration data, so there is no range to divide into levels'
        if self._seen.is_multiple(value) and not self._seen.has_step(value):
            return f'"{value.name}" is too small or too large for a scale in float32'
        return None

    def quantize_layer(self, item: Layer) -> None:
        """Give a layer integers to compute with."""
        node, weight = item.node, constant_array(item.weight)
        assert weight is not None, "layers have constant weights"
        source = self.pairs.round(item.source)
        convolution = node.op_type == "Conv"
        groups, of_matrix = attribute(node, "group", 1), adjacent.orders_of_matrix(item.channel_axis)
        orders = adjacent.orders_of_convolution(weight.shape, groups) if convolution else of_matrix
        grid = adjacent.fitting_grid(weight, item.channel_axis if self.pairs.per_channel else None, orders)
        step = self._seen.grid(item.source).scale
        rounded = grids.dequantize(adjacent.fitting_integers(weight, grid, orders), grid)
        bias = self._wanted_bias(item, weight, rounded)
        if bias is not None:
            grid = _reaching(grid, bias, step)
            base = item.bias if item.bias is not None else item.weight
            scale = np.asarray(step * grid.scale, np.float32)
            node.resize_inputs(3)
            node.replace_input_with(2, self.pairs.bias(base, bias, scale, of_convolution=convolution))
        node.replace_input_with(0, source)
        integers = adjacent.fitting_integers(weight, grid, orders)
        node.replace_input_with(1, self.pairs.weight(item.weight, integers, grid, plain=convolution))
        drop_unused_constants([item.weight, item.bias])
        # The kernel of Conv makes integers; that of Gemm can make floating-point numbers.
        if convolution:
            self.pairs.round(item.result)

    def _wanted_bias(self, item: Layer, weight: Array, rounded: Array) -> Array | None:
        """Return the bias of a layer whose weight is rounded, one float64 per channel, or None for none."""
        channels = (weight.shape[item.channel_axis],)
        given = constant_array(item.bias)
        bias = None if given is None else np.broadcast_to(given.astype(np.float64).reshape(-1), channels)
        means = self._seen.means(item.source)
        if means is None:
            return bias
        shift = mean_response(weight.astype(np.float64) - rounded, means, item.channel_axis)
        return shift if bias is None else bias + shift

    def quantize_between(self, item: Between) -> None:
        """Give a node between layers integers to compute with."""
        integers = self._handed_on(item)
        if integers is None:
            self._surround(item)
        else:
            self.pairs.adopt(item.results[0], integers)

    def _handed_on(self, item: Between) -> ir.Value | None:
        """Return the integers of a node's result where they are those of its source, in another order or number."""
        node = item.node
        if self._seen.is_multiple(item.results[0]):
            return self.pairs.integers(item.source)
        times = repeated(node, self._scope, self._shapes)
        builder = Builder(self._scope, self._names, node, first_output(node))
        if times:
            return repeat(self.pairs.integers(item.source), self._shapes.of(item.source) or (), times, builder)
        if is_op(node, "MaxPool") and self._scope.opset < POOLS_INTEGERS:
            return pool(self.pairs.integers(item.source), node, builder)
        return None

    def _surround(self, item: Between) -> None:
        for index, value in item.sources:
            item.node.replace_input_with(index, self.pairs.round(value))
        for value in item.results:
            self.pairs.round(value)
        if is_global_average(item.node, self._shapes):
            self._replace(item.node, "GlobalAveragePool", [item.node.inputs[0]], {})
        elif (channels := averaged_channels(item.node, self._shapes)) is not None:
            self._convolve(item.node, channels)

    def _convolve(self, node: ir.Node, channels: int) -> None:
        """Write an AveragePool as a depthwise convolution, which has a faster 8-bit kernel."""
        size = attribute(node, "kernel_shape")
        integers = np.full((channels, 1, *size), LARGEST, np.int8)
        scale = np.asarray(1 / (LARGEST * math.prod(size)), np.float32)
        (output,) = node.outputs
        weight = self.pairs.restored(output, integers, scale, None, None)
        kept = {name: attribute(node, name) for name in ("strides", "pads", "auto_pad") if name in node.attributes}
        attributes = {"kernel_shape": size, "group": channels, **kept}
        self._replace(node, "Conv", [node.inputs[0], weight], attributes)

    def _replace(
        self, node: ir.Node, op_type: str, inputs: list[ir.Value | None], attributes: Mapping[str, Any]
    ) -> None:
        (old,) = node.outputs
        new = make_node(self._names, op_type, inputs, attributes, like=old)
        insert_before(node, new)
        replace_value(old, new.outputs[0])
        rest = node.inputs[1:]
        remove_node(node)
        drop_unused_constants(rest)

    def surrounds(self, node: ir.Node) -> bool:
        """Whether what a node reads and what it computes is rounded to 8 bits."""
        source = node.inputs[0]
        return (
            source is not None and self.pairs.is_restored(source) and self.pairs.is_rounded(activated(node.outputs[0]))
        )

    def keep_float(self, node: ir.Node) -> None:
        """Keep ONNX Runtime from computing a node with integers: it does not look through Max, nor take it out."""
        source = node.inputs[0]
        assert source is not None, "it has an input"
        copy = make_node(self._names, "Max", [source], like=source)
        insert_before(node, copy)
        node.replace_input_with(0, copy.outputs[0])


def _reaching(grid: Grid, bias: Array, step: Array) -> Grid:
    """Widen the scales of a weight until the bias, whose scale is theirs times that of the input, fits 32 bits."""
    needed = np.abs(bias) / (float(step) * MAX_BIAS)
    if grid.axis is None:
        needed = needed.max()
    return dataclasses.replace(grid, scale=np.asarray(np.maximum(grid.scale, needed), grid.scale.dtype))
