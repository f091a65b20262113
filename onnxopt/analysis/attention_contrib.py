"""Attention as operators of ONNX Runtime: with its projections inside, with grouped heads, with heads alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.attention import Heads
from onnxopt.analysis.attention_masks import LOWEST, Bias, added_bias, row_factor, stretched
from onnxopt.analysis.attention_site import (
    Inputs,
    Site,
    Written,
    arranged,
    cut_inputs,
    flat_inputs,
    flat_steps,
    list_of_sizes,
    mixed_inputs,
    operands,
    tail_from,
)
from onnxopt.analysis.layout import Step
from onnxopt.analysis.masks import CERTAIN, Term, is_key_padding
from onnxopt.analysis.projections import Packed, packed
from onnxopt.graph import attribute, constant_ints, is_op
from onnxopt.rewrite import Builder

MICROSOFT = "com.microsoft"


def with_projections(site: Site) -> Written | str:
    """Write the attention and the projections of its inputs as com.microsoft.Attention."""
    found = site.found
    if site.heads is None or found.groups != 1 or found.queries != found.keys:
        return "com.microsoft.Attention needs as many heads and positions in K and V as in Q"
    tail = tail_from(site, lambda r: r.flat)
    if tail is None or not isinstance(found.size, int) or not isinstance(found.value_size, int):
        return "constants cannot express how the result is arranged"
    parts = packed(operands(site), site.dead(tail.value), site.shapes)
    if isinstance(parts, str):
        return parts
    mask = _contrib_mask(site)
    if isinstance(mask, str):
        return mask
    attributes: dict[str, object] = {"num_heads": site.heads, "scale": found.scale, **mask.attributes}
    if found.value_size != found.size:
        sizes = [site.heads * found.size] * 2 + [site.heads * found.value_size]
        attributes["qkv_hidden_sizes"] = sizes

    def build(builder: Builder) -> ir.Value:
        x = builder.layout(parts.x, parts.steps)
        weight, bias = _packed_weights(parts, builder)
        inputs = [x, weight, bias, mask.padding(builder), None, mask.bias(builder)]
        made = builder.op("Attention", _trimmed(inputs), attributes, domain=MICROSOFT)
        return builder.layout(mask.finish(builder, made), tail.steps)

    return Written("com.microsoft.Attention", tail.value, build)


def _packed_weights(parts: Packed, builder: Builder) -> tuple[ir.Value, ir.Value | None]:
    weight = parts.weight if parts.weight is not None else builder.tensor("qkv_weight", parts.weight_tensor())
    if parts.weight is not None or not parts.has_bias:
        return weight, parts.bias
    return weight, builder.constant("qkv_bias", parts.bias_array())


def _trimmed(inputs: Sequence[ir.Value | None]) -> list[ir.Value | None]:
    """Leave out missing inputs at the end."""
    kept = list(inputs)
    while kept[-1] is None:
        kept.pop()
    return kept


@dataclasses.dataclass(frozen=True, slots=True)
class _ContribMask:
    """The masks for an operator of ONNX Runtime.

    Attributes:
        site: The attention.
        attributes: What is said about them in attributes.
        whole: The masks as one tensor, or None.
        keys: A condition on keys alone, or None.
        zeroed: Rows masked in full become 0 after the operator.
    """

    site: Site
    attributes: dict[str, object]
    whole: Bias | None = None
    keys: Term | None = None
    zeroed: Term | None = None

    def bias(self, builder: Builder) -> ir.Value | None:
        """Return the input attention_bias."""
        return None if self.whole is None else self.whole.build(builder)

    def padding(self, builder: Builder) -> ir.Value | None:
        """Return the input key_padding_mask."""
        if self.keys is None:
            return None
        keys = self.keys

        def make(builder: Builder) -> ir.Value:
            condition = builder.op("Not", [keys.condition]) if keys.inverted else keys.condition
            assert condition is not None
            flat = builder.layout(condition, [Step("Squeeze", (1, 2), ())])
            return builder.op("Cast", [flat], {"to": ir.DataType.INT32})

        return self.site.keep(("padding", keys.condition, keys.inverted), make, builder)

    def finish(self, builder: Builder, result: ir.Value) -> ir.Value:
        """Set rows of batch x queries x features to 0 that are masked in full."""
        if self.zeroed is None:
            return result
        return builder.op("Mul", [result, row_factor(self.site, self.zeroed, builder, flat=True)])


def _contrib_mask(site: Site) -> _ContribMask | str:
    """Return how the masks are given to an operator of ONNX Runtime."""
    if site.causal and not site.guarded:
        return _ContribMask(site, {"unidirectional": 1, "mask_filter_value": LOWEST})
    terms, zeroed = site.terms, None
    if site.guarded:
        t = terms[0]
        if len(terms) > 1 or t.condition is None or t.fill != -math.inf or len(t.shape) != 4 or t.shape[1] != 1:
            return "a guard turns the NaN of rows masked in full into 0"
        zeroed = t
        terms = (dataclasses.replace(t, fill=LOWEST, value=None, low=LOWEST),)
        site = dataclasses.replace(site, terms=terms)
    certain = len(terms) == 1 and math.isfinite(terms[0].fill) and terms[0].fill <= CERTAIN
    if certain and is_key_padding(terms[0], site.found.batch, site.found.keys):
        return _ContribMask(site, {"mask_filter_value": terms[0].fill}, keys=terms[0], zeroed=zeroed)
    if zeroed is not None:
        fits = stretched(site)
        whole = fits if isinstance(fits, str) else Bias(site, terms, (None,), None, fits)
    else:
        whole = added_bias(site)  # type: ignore[assignment]
    return whole if isinstance(whole, str) else _ContribMask(site, {}, whole=whole, zeroed=zeroed)


def multi_head(site: Site) -> Written | str:
    """Write the attention as com.microsoft.MultiHeadAttention."""
    found = site.found
    if site.heads is None or found.groups != 1:
        return "com.microsoft.MultiHeadAttention needs as many heads in K and V as in Q"
    tail = tail_from(site, lambda r: r.flat)
    flat = flat_inputs(site)
    mixed = mixed_inputs(site)
    ways = [way for way in (flat, mixed) if way is not None]
    if tail is None or not ways:
        return "constants cannot express how Q, K, V or the result are arranged"
    inputs = min(ways, key=lambda way: way.cost)
    if site.causal and found.queries != found.keys:
        return "com.microsoft.MultiHeadAttention hides later keys only where there are as many as queries"
    mask = _contrib_mask(site)
    if isinstance(mask, str):
        return mask
    attributes = {"num_heads": site.heads, "scale": found.scale, **mask.attributes}

    def build(builder: Builder) -> ir.Value:
        operands = inputs.build(builder)
        wanted = [*operands, None, mask.padding(builder), mask.bias(builder)]
        made = builder.op("MultiHeadAttention", _trimmed(wanted), attributes, domain=MICROSOFT)
        return builder.layout(mask.finish(builder, made), tail.steps)

    return Written("com.microsoft.MultiHeadAttention", tail.value, build)


def grouped_query(site: Site) -> Written | str:
    """Write the attention as com.microsoft.GroupQueryAttention, rotary embeddings included."""
    found, name = site.found, "com.microsoft.GroupQueryAttention"
    if site.heads is None or site.kv_heads is None or found.queries != found.keys:
        return f"{name} needs as many positions in K and V as in Q"
    if not isinstance(found.size, int) or found.size % 8 or found.size != found.value_size:
        return f"{name} needs heads of one size, a multiple of 8"
    if site.guarded:
        return "a guard turns the NaN of rows masked in full into 0"
    bias = None if site.causal or not site.terms else added_bias(site)
    tail = tail_from(site, lambda r: r.flat)
    if isinstance(bias, str) or tail is None:
        return bias if isinstance(bias, str) else "constants cannot express how the result is arranged"
    rotary = _rotary(site)
    if rotary is not None:
        query, key = (
            dataclasses.replace(o, near=h, root=h) for o, h in zip(operands(site), rotary.heads, strict=False)
        )
        site = dataclasses.replace(site, found=dataclasses.replace(found, query=query, key=key))
    inputs = _joint_inputs(site, tail.value)
    if inputs is None:
        return "constants cannot express how Q, K and V are arranged"
    attributes: dict[str, object] = {
        "num_heads": site.heads,
        "kv_num_heads": site.kv_heads,
        "scale": found.scale,
        "causal": int(site.causal),
        "do_rotary": int(rotary is not None),
        "rotary_interleaved": int(rotary is not None and rotary.interleaved),
    }

    def build(builder: Builder) -> ir.Value:
        operands: list[ir.Value | None] = list(inputs.build(builder))
        operands += [None] * (5 - len(operands))
        caches: list[ir.Value | None] = [None, None] if rotary is None else [rotary.cos, rotary.sin]
        wanted = [
            *operands,
            *_lengths(site, builder),
            *caches,
            None,
            None if bias is None else bias.build(builder),
        ]
        made = builder.op("GroupQueryAttention", _trimmed(wanted), attributes, domain=MICROSOFT)
        return builder.layout(made, tail.steps)

    return Written(name, tail.value, build)


def _joint_inputs(site: Site, result: ir.Value) -> Inputs | None:
    """Return Q, K and V side by side where they are computed together or can be, else each by itself."""
    cut, near = cut_inputs(site), arranged(site, flat_steps)
    if cut is not None and cut.joint is not None:
        joint = cut.joint
        return Inputs(0, lambda b: [joint])
    parts = packed(operands(site), site.dead(result), site.shapes)
    if isinstance(parts, str):
        return near

    def build(builder: Builder) -> list[ir.Value]:
        weight, bias = _packed_weights(parts, builder)
        made = builder.op("MatMul", [builder.layout(parts.x, parts.steps), weight])
        return [made if bias is None else builder.op("Add", [made, bias])]

    return Inputs(1, build)


def _lengths(site: Site, builder: Builder) -> list[ir.Value]:
    """Return for each sequence its length less 1, and the common length, as int32."""
    batch, keys = site.found.batch, site.found.keys

    def lengths(builder: Builder) -> ir.Value:
        if isinstance(batch, int) and isinstance(keys, int):
            return builder.constant("lengths", np.full(batch, keys - 1, np.int32))
        last = builder.op("Sub", [list_of_sizes([keys], site, builder), builder.ints("one", [1])])
        each = builder.op("Expand", [last, list_of_sizes([batch], site, builder)])
        return builder.op("Cast", [each], {"to": ir.DataType.INT32})

    def total(builder: Builder) -> ir.Value:
        if isinstance(keys, int):
            return builder.constant("length", np.array(keys, np.int32))
        one = builder.layout(list_of_sizes([keys], site, builder), [Step("Squeeze", (0,), ())])
        return builder.op("Cast", [one], {"to": ir.DataType.INT32})

    return [
        site.keep(("lengths", batch, keys), lengths, builder),
        site.keep(("length", keys), total, builder),
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class _Rotary:
    """The rotary embedding of Q and K: what is rotated, and by which angles."""

    heads: tuple[Heads, Heads]
    cos: ir.Value
    sin: ir.Value
    interleaved: bool


def _rotary(site: Site) -> _Rotary | None:
    """Return the same rotary embedding of both Q and K by position, as GroupQueryAttention has it inside."""
    nodes: list[ir.Node] = []
    rotated: list[Heads] = []
    for operand in operands(site)[:2]:
        node = operand.near.view.source.producer()
        if node is None or not is_op(node, "RotaryEmbedding", domain=MICROSOFT) or len(node.inputs) != 4:
            return None
        source, position = node.inputs[0], node.inputs[1]
        # Only from position 0 on, and only whole heads, in a tensor whose features are the heads side by side.
        flat = operand.near.view.shape
        if source is None or constant_ints(position) != (0,) or len(flat) != 3:
            return None
        size = attribute(node, "rotary_embedding_dim", 0)
        if size not in (0, site.found.size) or attribute(node, "scale", 1.0) != 1.0 or flat_steps(operand.near) != ():
            return None
        nodes.append(node)
        seen = dataclasses.replace(operand.near.view, source=source)
        rotated.append(dataclasses.replace(operand.near, view=seen))
    first, second = nodes
    cos, sin = first.inputs[2], first.inputs[3]
    if cos is None or sin is None or second.inputs[2] is not cos or second.inputs[3] is not sin:
        return None
    if attribute(first, "interleaved", 0) != attribute(second, "interleaved", 0):
        return None
    return _Rotary((rotated[0], rotated[1]), cos, sin, bool(attribute(first, "interleaved", 0)))
