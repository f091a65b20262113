"""What the function of an operator knows about the node it computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import onnx_ir as ir


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """A node to be computed.

    Attributes:
        node: The node.
        opset: Version of the node's operator set.
        attributes: Its attributes as plain values; tensors and graphs are those of onnx_ir.
        run_body: Runs a graph the node carries: graph and inputs in, outputs out.
    """

    node: ir.Node
    opset: int
    attributes: Mapping[str, Any]
    run_body: Callable[[ir.Graph, Sequence[Any]], list[Any]]

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or the default when it is absent."""
        return self.attributes.get(name, default)

    def wants(self, index: int) -> bool:
        """Whether the node has an output of this number with a name."""
        return index < len(self.node.outputs) and bool(self.node.outputs[index].name)


Operator: TypeAlias = Callable[..., Any]
"""Takes a Call and the inputs (None for one left out); gives the output, or a tuple of them."""
