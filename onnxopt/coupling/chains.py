"""Rule for chains of layout nodes that merge an axis with one of unknown size on their way and part them again.

Exporters write K^T of an attention as (batch, heads, length, width) -> (batch * heads, length, width) -> its transpose
-> (batch, heads, width, length). In between, a head is no range of an axis whose size is known; from end to end it is.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxopt.analysis.layout import LAYOUT_OPS, Rearrangement, rearrangement
from onnxopt.coupling.builder import Builder, label
from onnxopt.coupling.rewrites import SetSizes
from onnxopt.coupling.sizes import element
from onnxopt.graph import is_op, only_use

_LONGEST = 6


def parted_again(builder: Builder, start: ir.Node) -> list[ir.Node] | None:
    """Return the shortest chain from a node on that leaves each of its input's axes whole, or None."""
    chain = [start]
    while len(chain) < _LONGEST:
        node = only_use(chain[-1].outputs[0])
        if node is None or not is_op(node, *LAYOUT_OPS) or node.inputs[0] is not chain[-1].outputs[0]:
            return None
        if node.graph is not start.graph:
            return None
        chain.append(node)
        found = rearrangement(chain, builder.known)
        if found is not None and all(len(axis) <= 1 for axis in (*found.before, *found.after)):
            return chain
    return None


def follow_chain(builder: Builder, chain: list[ir.Node]) -> None:
    """Tie the axes at both ends of a chain, and make the sizes given on the way follow.

    The nodes behind the first one need no rule of their own any more.
    """
    data, output = chain[0].inputs[0], chain[-1].outputs[0]
    whole = rearrangement(chain, builder.known)
    assert data is not None and whole is not None, "the chain was read before"
    places = {axis[0]: place for place, axis in enumerate(whole.before) if axis}
    for place, axis in enumerate(whole.after):
        if axis:
            builder.tie(data, places[axis[0]], output, place)
    for count, node in enumerate(chain, start=1):
        if is_op(node, "Reshape"):
            part = rearrangement(chain[:count], builder.known)
            assert part is not None, "a chain is readable as far as its longer ones"
            _follow_sizes(builder, node, data, part)
    builder.followed.update(chain)


def _follow_sizes(builder: Builder, node: ir.Node, data: ir.Value, part: Rearrangement) -> None:
    """Make the sizes that a Reshape of the chain is given follow the axes of the chain's input."""
    axis_of = {factor: place for place, axis in enumerate(part.before) for factor in axis}
    written: list[tuple[int, int]] = []
    for place, factors in enumerate(part.after):
        sized = [factor for factor in factors if part.sizes[factor] != 1]
        known = any(isinstance(part.sizes[factor], int) for factor in sized)
        found = element(node.inputs[1], place, builder.known)
        if isinstance(found, tuple) and len(found) == len(sized) == 1:
            builder.tie(*found[0], data, axis_of[sized[0]])
        elif isinstance(found, tuple) or (known and found != -1 and (found is None or len(sized) != 1)):
            computed = found if isinstance(found, tuple) else ()
            for value, axis in (*((data, axis_of[factor]) for factor in sized), *computed):
                builder.freeze(value, axis, f"its size is computed in front of {label(node)}")
        elif known and found != -1:
            written.append((place, axis_of[sized[0]]))
    places, axes = tuple(p for p, _ in written), tuple(a for _, a in written)
    builder.rewrites.append(SetSizes(node, (data,), 1, places, axes))
