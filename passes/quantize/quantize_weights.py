"""Store weights as integers of 8, 4 or 2 bits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.matrices import Matrix, grams, matrices, portions
from onnxopt.analysis.weights import Weight, dtype_name, weights
from onnxopt.contract import NEEDS_DATA, Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.errors import UsageError
from onnxopt.graph import Names, constant_tensor, is_op
from onnxopt.integers import restore
from onnxopt.integers.restore import Codes
from onnxopt.numeric import gptq, grids, nbits
from onnxopt.numeric.gram import Gram
from onnxopt.numeric.layouts import Layout
from onnxopt.numeric.nbits import Spec

OPSETS = {8: 1, 4: 21, 2: 25}
"""Integers of so many bits exist from this opset on."""

FLOAT8_OPSET = 19
"""float8e4m3fn exists from this opset on, and Cast and DequantizeLinear take it."""

NOT_FINITE = "it holds NaN or infinity"
NO_GAIN = "its integers and scales would not take less room than it does"

OVERHEAD_BYTES = 384
"""About what the nodes that restore a weight, and the names of their values, take in a file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeWeights(GraphPass):
    """Store weights as integers with scales, and compute with floating-point numbers as before.

    The file of a float32 model shrinks to about a quarter with 8 bits, to a seventh with 4. Activations are not
    quantized.

    With the default form ONNX Runtime executes what it executed before: on twenty real models its optimized graph
    had the same operators, and the latency was the same within 2%. The price is paid once, at loading, where every
    step of the restoring is computed and held: BERT base loads in 1.3 instead of 1.1 s and needs 1.06 instead of
    0.56 GB meanwhile; with mode "minmax", which has a step more, 1.8 s and 1.49 GB. The other form loads BERT base
    with 0.29 GB. It took 1.1 to 2.0 times as long to run on convolutional models and 0.6 to 1.5 times on
    transformers, some of whose products it computes with activations rounded to 8 bits as well.

    Attributes:
        bits: Bits of a weight: 8, 4 (from opset 21) or 2 (from opset 25).
        block: Matrices get a scale for every so many weights that are summed up, or that lie in a row of a lookup
            table; 0 for one per channel. Needs opset 21 with form "dequantize". Weights of another rank keep a scale
            per channel.
        method: "rtn" rounds to nearest. "mse" takes the range whose square error is smallest. "gptq" makes up for the
            error of each weight of a product in those that follow, by what it learns from data; other weights are
            treated as by "mse".
        mode: "symmetric": int8, 0.0 is integer 0, and the scale is the largest magnitude divided by 127. "minmax":
            uint8 levels from the minimum to the maximum of a channel, with a zero point: the mean square of the
            weight error is 12 to 28% lower, the output error up to a half. "float8": float8e4m3fn, for runtimes that
            want it; its three bits of mantissa made six times the error of int8 in a network for digits. Needs opset
            19, and has neither blocks nor a method.
        granularity: "channel": a scale per output channel of the node that uses the weight, per row for a lookup
            table. "tensor": one scale for the whole weight; coarser.
        min_elements: Weights with fewer elements stay as they are.
        form: "fold": Cast, Sub ("minmax" only) and Mul restore the weight; ONNX Runtime computes them while it
            loads the model. "dequantize": DequantizeLinear restores it. Needs opset 10, per channel 13, for
            float16 and bfloat16 weights 19. ONNX Runtime runs it at every inference, which also costs convolutions
            their faster layout, or merges it with MatMul into MatMulNBits, which gains on large matrices and few
            rows.
    """

    name: ClassVar[str] = "quantize-weights"
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE

    bits: Literal[8, 4, 2] = 8
    block: int = 0
    method: Literal["rtn", "mse", "gptq"] = "rtn"
    mode: Literal["symmetric", "minmax", "float8"] = "symmetric"
    granularity: Literal["channel", "tensor"] = "channel"
    min_elements: int = 1024
    form: Literal["fold", "dequantize"] = "fold"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: If one cannot be used.
        """
        for option, allowed in (
            ("mode", ("symmetric", "minmax", "float8")),
            ("granularity", ("channel", "tensor")),
            ("form", ("fold", "dequantize")),
            ("bits", ("8", "4", "2")),
            ("method", ("rtn", "mse", "gptq")),
        ):
            if str(getattr(self, option)) not in allowed:
                raise UsageError(
                    f'quantize-weights: {option} is "{getattr(self, option)}"; use {" or ".join(allowed)}.'
                )
        if self.block < 0 or self.block == 1:
            raise UsageError(f"quantize-weights: block is {self.block}; use 0 for none, or 2 or more.")
        if self.granularity == "tensor" and (self.block or self.method == "gptq"):
            raise UsageError("quantize-weights: blocks and gptq need granularity=channel.")
        if self.mode == "float8" and (self.bits != 8 or self.block or self.method != "rtn"):
            raise UsageError("quantize-weights: mode=float8 goes with bits=8, block=0 and method=rtn.")
        if self.min_elements < 1:
            raise UsageError(f"quantize-weights: min_elements is {self.min_elements}; use 1 or more.")

    def wants_data(self) -> bool:
        """Return whether the method learns from data."""
        return self.method == "gptq"

    def skip_reason(self, model: ir.Model, ctx: Context) -> str | None:
        """Return why the pass does not apply."""
        return NEEDS_DATA if self.method == "gptq" and ctx.calibration is None else None

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per weight; only its range is computed before."""
        names = Names(model)
        learning = ctx.calibration if self.method == "gptq" else None
        learnable = {m.value: m for m in matrices(model, ctx.shapes) if m.products} if learning else {}
        portion: list[tuple[Weight, Site]] = []
        for weight in weights(model):
            if weight.tensor.size < self.min_elements or _is_vector(weight) or _is_parameter(weight):
                continue
            site = Site(self.name, weight.scope.path, weight.value.name or "")
            reason = self._reason(weight)
            if reason is not None:
                yield Refusal(site, reason)
            elif self.bits != 8 or self.block or self.method != "rtn":
                portion.append((weight, site))
            else:
                yield self._per_channel(weight, site, names)
        if learning is None:
            yield from (self._in_blocks(weight, site, None, None, names) for weight, site in portion)
            return
        sites = {weight.value: (weight, site) for weight, site in portion}
        learnt = [m for v, m in learnable.items() if v in sites]
        for group in portions(learnt):
            seen = grams(group, model, learning)
            for matrix in group:
                weight, site = sites.pop(matrix.value)
                yield self._in_blocks(weight, site, matrix, seen.get(matrix.value), names)
        yield from (self._in_blocks(weight, site, None, None, names) for weight, site in sites.values())

    def _per_channel(self, weight: Weight, site: Site, names: Names) -> Edit | Refusal:
        axis = weight.roles[0].channel_axis if self.granularity == "channel" else None
        low, high = grids.value_range(weight.tensor.numpy(), axis)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            return Refusal(site, NOT_FINITE)
        make = {"symmetric": grids.symmetric, "minmax": grids.asymmetric, "float8": grids.float8}[self.mode]
        grid = make(low, high, axis, self._scale_dtype(weight.tensor.dtype))
        size = _stored_bytes(grid, weight.tensor.size, self.form)
        if size + OVERHEAD_BYTES >= weight.tensor.nbytes:
            return Refusal(site, NO_GAIN)
        summary = (
            f"{weight.description} to {grid.dtype} per {self.granularity}, "
            f"{weight.tensor.nbytes:,} to {size:,} bytes, "
            f"worst weight error {grids.error_bound(low, high, grid):.2%} of its {self.granularity}'s range"
        )
        return Edit(site, summary, functools.partial(self._apply, weight, grid, names))

    def _in_blocks(
        self, weight: Weight, site: Site, matrix: Matrix | None, gram: Gram | None, names: Names
    ) -> Edit | Refusal:
        layout = self._layout(weight)
        if not np.isfinite(grids.value_range(weight.tensor.numpy())).all():
            return Refusal(site, NOT_FINITE)
        if layout.block and self.form == "fold" and weight.tensor.shape[layout.axis or 0] % layout.block:
            size = weight.tensor.shape[layout.axis or 0]
            return Refusal(site, f'its {size} weights are not whole blocks of {layout.block}; use form="dequantize"')
        if matrix is not None and matrix.products[0].transposed != layout.keeps_order:
            gram = None
        stored = self._bytes(layout, weight)
        if stored + OVERHEAD_BYTES >= weight.tensor.nbytes:
            return Refusal(site, NO_GAIN)
        method = "mse" if self.method == "gptq" and gram is None else self.method
        shared = f"in blocks of {layout.block}" if layout.block else f"per {self.granularity}"
        summary = (
            f"{weight.description} to {self._dtype.name.lower()} {shared} by {method}, "
            f"{weight.tensor.nbytes:,} to {stored:,} bytes"
        )
        return Edit(site, summary, functools.partial(self._apply_blocks, weight, layout, gram, names))

    def _layout(self, weight: Weight) -> Layout:
        """Return which elements share a scale."""
        shape, role = tuple(weight.tensor.shape.numpy()), weight.roles[0]
        if self.block and len(shape) == 2:
            summed = role.contraction_axis
            return Layout(shape, 1 - role.channel_axis if summed is None else summed, self.block)
        return Layout(shape, role.channel_axis if self.granularity == "channel" else None)

    def _reason(self, weight: Weight) -> str | None:
        """Return why the weight cannot be quantized, as far as that shows without reading its data, or None."""
        if not weight.roles:
            return "no Conv, ConvTranspose, Gemm, MatMul, RNN, GRU, LSTM or Gather uses it as a weight"
        if weight.locked is not None:
            return weight.locked
        opset, dtype = weight.scope.opset, weight.tensor.dtype
        if opset < OPSETS[self.bits]:
            return f"integers of {self.bits} bits need opset {OPSETS[self.bits]}, and this graph has {opset}"
        if self.mode == "float8" and opset < FLOAT8_OPSET:
            return f"float8e4m3fn needs opset {FLOAT8_OPSET}, and this graph has {opset}"
        if self.form == "fold":
            return None if opset >= 7 else f"Mul broadcasts from opset 7 on, and this graph has {opset}"
        if dtype == ir.DataType.DOUBLE:
            return 'DequantizeLinear makes no float64; use form="fold"'
        needed = 13 if self.granularity == "channel" else 10
        if dtype != ir.DataType.FLOAT:
            needed = 19
        if self.block:
            needed = 21
        if opset < needed:
            shared = "in blocks" if self.block else f"per {self.granularity}"
            return (
                f"DequantizeLinear of {dtype_name(dtype)} {shared} needs opset {needed}, "
                f'and this graph has {opset}; use form="fold" or a higher opset'
            )
        return None

    def _scale_dtype(self, dtype: ir.DataType) -> Any:
        """Return the type of the scale: DequantizeLinear takes the type of its result from it."""
        return dtype.numpy() if self.form == "dequantize" else None

    @property
    def _dtype(self) -> ir.DataType:
        """The type of the integers."""
        return ir.DataType[f"{'INT' if self.mode == 'symmetric' else 'UINT'}{self.bits}"]

    def _bytes(self, layout: Layout, weight: Weight) -> int:
        """Return the bytes of all tensors that take the weight's place."""
        size = weight.tensor.size
        rows = size // (layout.shape[layout.axis or 0] if layout.block else layout.width)
        count = rows * (-(-layout.shape[layout.axis or 0] // layout.block) if layout.block else 1)
        wide = 4 if self.form == "fold" else weight.tensor.dtype.itemsize
        offsets = 0
        if self.mode == "minmax":
            offsets = count * 4 if self.form == "fold" else -(-count * self.bits // 8)
        return int(-(-size * self.bits // 8) + count * wide + offsets)

    def _apply(self, weight: Weight, grid: grids.Grid, names: Names) -> None:
        make = restore.dequantized if self.form == "dequantize" else restore.folded
        restore.put(weight, names, functools.partial(make, grid))

    def _apply_blocks(self, weight: Weight, layout: Layout, gram: Gram | None, names: Names) -> None:
        make = restore.dequantized_blocks if self.form == "dequantize" else restore.folded_blocks
        restore.put(weight, names, functools.partial(make, self._quantize(weight, layout, gram)))

    def _quantize(self, weight: Weight, layout: Layout, gram: Gram | None) -> Codes:
        fold, array = self.form == "fold", weight.tensor.numpy()
        spec = Spec(
            self.bits,
            layout.width,
            self.mode == "symmetric",
            "none" if self.method == "rtn" else "mse",
            # The scales of DequantizeLinear are positive by custom.
            signed_scale=fold,
            scale_dtype=np.float32 if fold else array.dtype,
        )
        rows = layout.rows(array)
        if gram is not None:
            rounded = gptq.quantize(rows, gram.total, spec)
            codes, grid = rounded.codes, rounded.grid
        else:
            grid = nbits.fit(rows, spec)
            codes = nbits.encode(rows, grid)
        return Codes(layout, layout.restore(codes), grid, self._dtype)


def _is_parameter(weight: Weight) -> bool:
    """Whether it holds the scales or zero points of another weight that was quantized before."""
    return not weight.roles and any(_dequantizes(node) for node in weight.value.consumers())


def _dequantizes(node: ir.Node) -> bool:
    if is_op(node, "DequantizeLinear") or is_op(node, "MatMulNBits", "GatherBlockQuantized", domain="com.microsoft"):
        return True
    value = node.inputs[0] if is_op(node, "Mul", "Sub") else None
    while value is not None and is_op(producer := value.producer(), "Cast", "Reshape", "Sub"):
        assert producer is not None, "is_op said that there is one"
        value = producer.inputs[0]
    tensor = constant_tensor(value)
    return tensor is not None and (tensor.dtype.is_integer() or tensor.dtype == ir.DataType.FLOAT8E4M3FN)


def _is_vector(weight: Weight) -> bool:
    """Whether it only has the rank of a weight, as biases and scales that are broadcast do."""
    return not weight.roles and sum(size > 1 for size in weight.tensor.shape.numpy()) < 2


def _stored_bytes(grid: grids.Grid, elements: int, form: str) -> int:
    """Return the bytes of all tensors that take the weight's place."""
    size = elements + grid.scale.nbytes
    if grid.dtype == np.uint8:
        size += grid.zero_point.nbytes if form == "dequantize" else grid.scale.nbytes
    return size
