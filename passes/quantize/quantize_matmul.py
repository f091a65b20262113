"""Compute products with constant matrices from weights of 2, 4 or 8 bits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.matrices import Matrix, grams, matrices, portions
from onnxopt.analysis.products import Product
from onnxopt.analysis.shapes import Shapes
from onnxopt.analysis.weights import dtype_name
from onnxopt.contract import NEEDS_DATA, Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.errors import UsageError
from onnxopt.graph import (
    Names,
    attribute,
    constant_array,
    drop_unused_constants,
    first_output,
    remove_unused,
    replace_value,
    use_count,
)
from onnxopt.numeric import gptq, nbits
from onnxopt.numeric.gram import Gram
from onnxopt.numeric.grids import value_range
from onnxopt.numeric.nbits import Array, BlockGrid, Spec
from onnxopt.rewrite import Builder

MICROSOFT = "com.microsoft"
BLOCKS = (16, 32, 64, 128, 256)
ROUNDS_INPUTS = 4
"""The accuracy level at which the CPU rounds the inputs to 8 bits as well; exact levels take 3 to 7 times as long."""

LEAST_INPUTS, LEAST_OUTPUTS = 64, 32
"""Matrices that are narrower ran at 0.2 to 1.0 times the speed of a plain product, whatever the number of rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeMatMul(GraphPass):
    """Compute MatMul, Gemm and attention projections from weights of few bits, as MatMulNBits of ONNX Runtime.

    A product with one row, as in generating text, waits for its weights, so smaller ones make it faster: 768 x 768 by
    3.7 times with 4 bits in blocks of 128, 3072 x 768 by 5.3 times. With 128 rows the factor is 0.9 to 1.8. On the
    CPU the inputs are rounded to 8 bits per block on the way.

    A matrix that is also a lookup table, as tied embeddings are, is stored once for both: Gather becomes
    GatherBlockQuantized. An attention that multiplies with its own weight becomes MatMulNBits and MultiHeadAttention.

    Attributes:
        bits: Bits of a weight. 8 hardly changes results, 4 with method "gptq" often passes, 2 seldom does, and runs no
            faster than 4. CUDA has no 2.
        block: Inputs that share a scale: 16, 32, 64, 128 or 256. Larger ones are faster and smaller, less accurate.
        method: "rtn" rounds to nearest. "mse" takes the range of each block that makes its square error smallest.
            "gptq" makes up for the error of each weight in those that follow, by what it learns from data; on MiniLM
            with 4 bits it halves the error of the outputs or better.
        symmetric: Whether 0.0 is always the middle level. Stores no zero points, which saves up to 2% of the size, and
            is less accurate; the speed is the same.
        min_elements: Matrices with fewer elements stay as they are.
    """

    name: ClassVar[str] = "quantize-matmul"
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE

    bits: Literal[4, 8, 2] = 4
    block: int = 128
    method: Literal["mse", "rtn", "gptq"] = "mse"
    symmetric: bool = False
    min_elements: int = 16384

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: If one cannot be used.
        """
        for option, allowed in (("bits", (2, 4, 8)), ("block", BLOCKS), ("method", ("rtn", "mse", "gptq"))):
            if getattr(self, option) not in allowed:
                words = ", ".join(str(a) for a in allowed[:-1])
                raise UsageError(
                    f'quantize-matmul: {option} is "{getattr(self, option)}"; use {words} or {allowed[-1]}.'
                )
        if self.min_elements < 1:
            raise UsageError(f"quantize-matmul: min_elements is {self.min_elements}; use 1 or more.")

    def wants_data(self) -> bool:
        """Whether the method learns from data."""
        return self.method == "gptq"

    def skip_reason(self, model: ir.Model, ctx: Context) -> str | None:
        """Return why the pass does not apply."""
        if ctx.target == "portable":
            return (
                "MatMulNBits is an operator of ONNX Runtime, and the target is portable; "
                "use quantize-weights, or target cpu or cuda"
            )
        if self.bits == 2 and ctx.target == "cuda":
            return "MatMulNBits has no 2 bits on CUDA; use bits=4"
        return NEEDS_DATA if self.method == "gptq" and ctx.calibration is None else None

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield one edit per matrix."""
        names = functools.cache(lambda: Names(model))
        kept = []
        for matrix in matrices(model, ctx.shapes):
            if matrix.tensor.size < self.min_elements:
                continue
            reason = self._reason(matrix, ctx)
            if reason:
                yield Refusal(self._site(matrix), reason)
            else:
                kept.append(matrix)
        learning = ctx.calibration if self.method == "gptq" else None
        for portion in portions(kept) if learning else [kept]:
            seen = grams(portion, model, learning) if learning else {}
            for matrix in portion:
                gram = seen.get(matrix.value)
                apply = functools.partial(_apply, self, matrix, gram, ctx.target, names)
                yield Edit(self._site(matrix), self._summary(matrix, gram), apply)

    def spec(self, dtype: ir.DataType) -> Spec:
        """Return the kind of grid that the options ask for, with scales of this type."""
        clip: Literal["none", "mse"] = "none" if self.method == "rtn" else "mse"
        return Spec(self.bits, self.block, self.symmetric, clip, scale_dtype=dtype.numpy())

    def _site(self, matrix: Matrix) -> Site:
        return Site(self.name, matrix.user.scope.path, first_output(matrix.user.node))

    def _reason(self, matrix: Matrix, ctx: Context) -> str:
        """Return why the matrix must stay as it is, or nothing."""
        dtype, types = matrix.tensor.dtype, [ir.DataType.FLOAT]
        if ctx.target == "cuda":
            types.append(ir.DataType.FLOAT16)
        if matrix.locked:
            return matrix.locked
        if dtype not in types:
            return f"MatMulNBits of {dtype_name(dtype)} is not used for target {ctx.target}"
        if matrix.unread:
            return matrix.unread[0].reason
        for product in matrix.products:
            if reason := _unfit(product, ctx.shapes):
                return reason
        if matrix.others:
            return "another node uses the weight in a way that needs floating-point numbers"
        return self._shape_reason(matrix, ctx) or _content_reason(matrix)

    def _shape_reason(self, matrix: Matrix, ctx: Context) -> str:
        outputs, inputs = matrix.outputs, matrix.inputs
        if len({p.transposed for p in matrix.products}) > 1:
            return "the weight is multiplied with both ways round"
        if inputs < LEAST_INPUTS or outputs < LEAST_OUTPUTS:
            return f"a product of {inputs} inputs and {outputs} outputs is faster as it is"
        if inputs % self.block and ctx.target == "cuda":
            return f"{inputs} inputs are not a whole number of blocks of {self.block}"
        if matrix.lookups and (inputs % self.block or not matrix.products[0].transposed):
            return "the weight is also a lookup table whose rows are not a whole number of blocks"
        return ""

    def _summary(self, matrix: Matrix, gram: Gram | None) -> str:
        outputs, inputs = matrix.outputs, matrix.inputs
        method = "mse" if self.method == "gptq" and gram is None else self.method
        shared = ", shared with a lookup" if matrix.lookups else ""
        return (
            f"{inputs} x {outputs} to {self.bits} bits in blocks of {self.block} by {method}{shared}, "
            f"{matrix.tensor.nbytes:,} to {self._stored_bytes(matrix):,} bytes"
        )

    def _stored_bytes(self, matrix: Matrix) -> int:
        outputs, inputs = matrix.outputs, matrix.inputs
        blocks = -(-inputs // self.block)
        offsets = 0 if self.symmetric else -(-blocks * self.bits // 8)
        return int(outputs * (blocks * (self.block * self.bits // 8 + matrix.tensor.dtype.itemsize) + offsets))


def _unfit(product: Product, shapes: Shapes) -> str:
    """Return why MatMulNBits cannot take over a product, or nothing."""
    if shapes.rank(product.x) is None:
        return "the number of axes of the input is not known"
    if product.alpha != 1.0:
        return f"the {product.node.op_type} scales its result"
    return _attention_reason(product.node) if product.in_attention else ""


def _attention_reason(node: ir.Node) -> str:
    used = [v for v in node.outputs[1:] if use_count(v) or v.is_graph_output()]
    if used or any(v is not None for v in (*node.inputs[4:5], *node.inputs[6:])):
        return "the Attention keeps past keys and values"
    return "the Attention rotates its queries and keys" if attribute(node, "do_rotary", 0) else ""


def _content_reason(matrix: Matrix) -> str:
    low, high = value_range(matrix.tensor.numpy())
    return "" if np.isfinite(low) and np.isfinite(high) else "the weight holds NaN or infinity"


@dataclasses.dataclass(frozen=True, slots=True)
class _Packed:
    """A matrix in the form that MatMulNBits reads.

    Attributes:
        flat: Codes as (outputs, bytes), for lookups.
        cubic: The same codes as (outputs, blocks, bytes).
    """

    flat: ir.Value | None
    cubic: ir.Value | None
    scales: ir.Value
    zero_points: ir.Value | None
    outputs: int
    inputs: int


def _apply(options: QuantizeMatMul, matrix: Matrix, gram: Gram | None, target: str, names: Callable[[], Names]) -> None:
    constant = matrix.value.producer()
    first = constant if constant is not None else next(iter(matrix.scope.graph))
    builder = Builder(matrix.scope, names(), first, matrix.value.name or "weight")
    packed = _pack(options, matrix, gram, builder)
    for lookup in matrix.lookups:
        here = Builder(lookup.scope, names(), lookup.node, first_output(lookup.node))
        _replace(lookup.node, lookup.node.outputs[0], _gather(options, packed, lookup.node, here))
    for product in matrix.products:
        last = product.result.producer()
        assert last is not None, "a product is computed by a node"
        here = Builder(product.scope, names(), last, product.result.name or first_output(product.node))
        _replace(last, product.result, _multiply(options, packed, product, target, here))
    drop_unused_constants([matrix.value])


def _replace(node: ir.Node, old: ir.Value, new: ir.Value) -> None:
    replace_value(old, new)
    remove_unused(node)


def _pack(options: QuantizeMatMul, matrix: Matrix, gram: Gram | None, builder: Builder) -> _Packed:
    outputs, inputs = matrix.outputs, matrix.inputs
    weight = matrix.tensor.numpy()
    codes, grid = _quantize(weight if matrix.products[0].transposed else weight.T, options, gram, matrix.tensor.dtype)
    data = nbits.pack(codes, options.bits)
    cubic_shape = (outputs, grid.scale.shape[1], -1)
    flat = cubic = None
    if matrix.lookups:
        flat = builder.constant(f"{options.bits}bits", data)
    else:
        cubic = builder.constant(f"{options.bits}bits", data.reshape(cubic_shape))
    scales = builder.constant("scales", grid.scale)
    zero_points = None
    if not options.symmetric:
        zero_points = builder.constant("zero_points", nbits.pack(grid.zero_point, options.bits))
    if flat is not None:
        cubic = builder.op("Reshape", [flat, builder.ints("blocks", cubic_shape)])
        cubic.dtype, cubic.shape = ir.DataType.UINT8, ir.Shape(data.reshape(cubic_shape).shape)
    return _Packed(flat, cubic, scales, zero_points, outputs, inputs)


def _quantize(weight: Array, options: QuantizeMatMul, gram: Gram | None, dtype: ir.DataType) -> tuple[Array, BlockGrid]:
    spec = options.spec(dtype)
    if gram is not None:
        rounded = gptq.quantize(weight, gram.total, spec)
        return rounded.codes, rounded.grid
    grid = nbits.fit(weight, spec)
    return nbits.encode(weight, grid), grid


def _gather(options: QuantizeMatMul, packed: _Packed, node: ir.Node, builder: Builder) -> ir.Value:
    inputs = [packed.flat, node.inputs[1], packed.scales]
    if packed.zero_points is not None:
        inputs.append(packed.zero_points)
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": options.block, "bits": options.bits}
    result = builder.op("GatherBlockQuantized", inputs, attributes, domain=MICROSOFT)
    result.dtype = packed.scales.dtype
    return result


def _multiply(options: QuantizeMatMul, packed: _Packed, product: Product, target: str, builder: Builder) -> ir.Value:
    inputs = [product.node.inputs[0], packed.cubic, packed.scales]
    optional = [packed.zero_points, None, _bias(product, builder)]
    while optional and optional[-1] is None:
        optional.pop()
    attributes = {"K": packed.inputs, "N": packed.outputs, "bits": options.bits, "block_size": options.block}
    if target == "cpu":
        attributes["accuracy_level"] = ROUNDS_INPUTS
    result = builder.op("MatMulNBits", [*inputs, *optional], attributes, domain=MICROSOFT)
    result.dtype = packed.scales.dtype
    return result if product.node.op_type != "Attention" else _attend(result, product, packed.outputs, builder)


def _bias(product: Product, builder: Builder) -> ir.Value | None:
    """Return the bias as a vector, or None without one and where a Sum adds it together with more."""
    bias = product.bias
    if bias is None or (bias.adder is not None and len(bias.adder.inputs) != 2):
        return None
    vector = bias.array(product.columns)
    stored = constant_array(bias.value)
    if bias.factor == 1.0 and stored is not None and stored.shape == vector.shape:
        return bias.value
    return builder.constant("bias", np.ascontiguousarray(vector))


def _attend(projected: ir.Value, product: Product, channels: int, builder: Builder) -> ir.Value:
    """Add the attention between projected queries, keys and values."""
    node = product.node
    sizes = attribute(node, "qkv_hidden_sizes", (channels // 3,) * 3)
    parts = builder.split(projected, -1, sizes, 3)
    for part in parts:
        part.dtype = projected.dtype
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    added = node.inputs[5] if len(node.inputs) > 5 else None
    names = ("num_heads", "scale", "unidirectional", "mask_filter_value")
    attributes = {name: node.attributes[name].value for name in names if name in node.attributes}
    inputs = [*parts, None, mask, added]
    while inputs[-1] is None:
        inputs.pop()
    result = builder.op("MultiHeadAttention", inputs, attributes, domain=MICROSOFT)
    result.dtype = projected.dtype
    return result
