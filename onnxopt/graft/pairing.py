"""Which boundary value of one part belongs to which of the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.analysis.dims import Dim
from onnxopt.analysis.shapes import Shapes
from onnxopt.graft.interface import Adapter, Slot
from onnxopt.graft.reasons import RefusedError

Element = int | tuple[int, int]
"""An element of a list of sizes: a number, or (which input, which of its axes)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """A boundary value that is a list of sizes of other boundary values, or a single one.

    Attributes:
        elements: Its elements.
        scalar: Whether it is a single number and no list.
    """

    elements: tuple[Element, ...]
    scalar: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """What a boundary value of the donor is given.

    Attributes:
        donor: Position of the value among the donor's.
        host: Position among the host's; None where it is computed from the sizes of others.
        adapters: What lies in between.
        sizes: What it is computed from, where it has no counterpart.
    """

    donor: int
    host: int | None
    adapters: tuple[Adapter, ...] = ()
    sizes: Sizes | None = None


@dataclasses.dataclass(frozen=True)
class Side:
    """The boundary values of one part, on the way in or out.

    Attributes:
        values: The values.
        slots: What each is.
        named: Whether the user named them, so that their order means something.
        own: How many of them are the part's own; the others may be read as well.
    """

    values: tuple[ir.Value, ...]
    slots: tuple[Slot, ...]
    named: bool
    own: int


SeenValues = Callable[[], tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]] | None]
"""Returns the values of the host and of the donor on the same inputs, where both take them."""


def pair_in_order(host: Side, donor: Side, what: str) -> list[Link]:
    """Pair values that were named, in order.

    Raises:
        RefusedError: If there are not as many.
    """
    if host.own != donor.own:
        raise RefusedError(
            "boundary",
            f"The host's cut has {host.own} {what}s and the donor's {donor.own}; name as many on both "
            f"sides, in the same order. {_listing(host, donor)}",
        )
    return [Link(i, i) for i in range(len(donor.slots))]


def pair_inputs(
    host: Side,
    donor: Side,
    host_shapes: Shapes,
    donor_shapes: Shapes,
    *,
    first: bool,
    same_model: bool,
    seen: SeenValues,
) -> tuple[list[Link], list[int]]:
    """Find for each input of the donor's part what it gets in the host, where there is evidence.

    Values belong together where they are the same value of one model, inputs of the model under one name, lists of
    the same sizes, or equal on the same inputs; and those that are left, if there is one on each side. A list of
    sizes without a counterpart is computed.

    Args:
        host: What goes into the host's part, and whatever else of the host may be read.
        donor: What goes into the donor's part.
        host_shapes: What is known about shapes of the host.
        donor_shapes: What is known about shapes of the donor.
        first: Whether the first values belong together, as those of two blocks do.
        same_model: Whether host and donor are the same model.
        seen: Returns the values on the same inputs.

    Returns:
        The pairs, and the positions of the donor's values without a counterpart.
    """
    links = [Link(0, 0)] if first else []
    free = list(range(len(links), len(host.slots)))
    missing: list[int] = []
    wanted = [sizes_of(v, donor.values, donor_shapes) for v in donor.values]
    held = [sizes_of(v, host.values, host_shapes) for v in host.values]
    for i in range(len(links), len(donor.slots)):
        sizes = wanted[i] if first else None
        chosen = next((j for j in free if _is_same(host, j, donor, i, same_model=same_model)), None)
        if chosen is None and sizes is not None:
            chosen = next((j for j in free if held[j] == sizes and host.slots[j].type == donor.slots[i].type), None)
        if chosen is None and sizes is not None and all(isinstance(e, int) or e[0] == 0 for e in sizes.elements):
            links.append(Link(i, None, sizes=sizes))
        elif chosen is not None:
            links.append(Link(i, chosen))
        else:
            missing.append(i)
    for i in list(missing):
        chosen = _equal(host, donor.slots[i], seen)
        if chosen is not None:
            links.append(Link(i, chosen))
            missing.remove(i)
    left = [j for j in range(host.own) if all(link.host != j for link in links)]
    if not first and len(missing) == 1 and len(left) == 1:
        links.append(Link(missing.pop(), left[0]))
    return sorted(links, key=lambda link: link.donor), missing


def no_counterpart(host: Side, donor: Side, missing: int) -> RefusedError:
    """Return the refusal for a value of the donor without a counterpart."""
    needed = donor.slots[missing]
    return RefusedError(
        "boundary",
        f'The donor\'s part needs "{needed.name}" ({needed}), and nothing shows which value '
        f'of the host that is; name the tensors of both cuts, as "a,b->c". {_listing(host, donor)}',
    )


def _is_same(host: Side, j: int, donor: Side, i: int, *, same_model: bool) -> bool:
    """Whether two values are one, or inputs that are called the same."""
    if host.slots[j].name != donor.slots[i].name or host.slots[j].type != donor.slots[i].type:
        return False
    return same_model or (host.values[j].is_graph_input() and donor.values[i].is_graph_input())


def _equal(host: Side, slot: Slot, seen: SeenValues) -> int | None:
    """Return the first of the host's values that is the donor's on the same inputs."""
    values = seen()
    if values is None:
        return None
    on_host, on_donor = values
    return next(
        (
            j
            for j, other in enumerate(host.slots)
            if other.type == slot.type
            and all(_close(h[other.name], d[slot.name]) for h, d in zip(on_host, on_donor, strict=True))
        ),
        None,
    )


def _close(one: Any, other: Any) -> bool:
    if not isinstance(one, np.ndarray) or not isinstance(other, np.ndarray):
        return False
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype.kind != "f":
        return bool(np.array_equal(one, other))
    return bool(np.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True))


def pair_outputs(host: Side, donor: Side) -> tuple[list[Link], list[int]]:
    """Find for each output of the host's part what the donor computes in its place.

    Returns:
        The pairs, and the positions of the host's values that nobody replaces: its own nodes go on computing them.

    Raises:
        RefusedError: If an output of the model would be left out.
    """
    links = [Link(i, i) for i in range(min(len(host.slots), len(donor.slots)))]
    kept = list(range(len(links), len(host.slots)))
    for i in kept:
        if host.values[i].is_graph_output():
            raise RefusedError(
                "boundary",
                f'The host\'s part computes the output "{host.slots[i].name}", for which the donor has nothing; name '
                f"the tensors of both cuts. {_listing(host, donor)}",
            )
    return links, kept


def sizes_of(value: ir.Value, inputs: Sequence[ir.Value], shapes: Shapes) -> Sizes | None:
    """Return a list of sizes in terms of the axes of inputs; None when it is something else."""
    if shapes.dtype(value) != ir.DataType.INT64:
        return None
    content = shapes.content(value)
    if content is None:
        return None
    scalar = not isinstance(content, tuple)
    items: tuple[Dim | None, ...] = content if isinstance(content, tuple) else (content,)
    axes: dict[Dim, tuple[int, int]] = {}
    for i, other in enumerate(inputs):
        if other is not value:
            for axis, dim in enumerate(shapes.of(other) or ()):
                if not isinstance(dim, int):
                    axes.setdefault(dim, (i, axis))
    elements: list[Element] = []
    for item in items:
        if isinstance(item, int):
            elements.append(item)
        elif item is not None and item in axes:
            elements.append(axes[item])
        else:
            return None
    return Sizes(tuple(elements), scalar)


def _listing(host: Side, donor: Side) -> str:
    one = ", ".join(f"{s.name} {s}" for s in host.slots[: host.own])
    other = ", ".join(f"{s.name} {s}" for s in donor.slots)
    return f"Host: {one}. Donor: {other}."
