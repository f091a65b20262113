"""Which pipelines are worth trying: by what the model contains and what the target has kernels for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from onnxopt.analysis.weights import weights
from onnxopt.pipeline import Pipeline

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnxopt.contract import Target

FEWEST_ELEMENTS = 4096
"""A kind of layer with fewer weights than this in all is not worth a candidate."""

HELPERS = ("smooth-activations", "quantize-weights", "store-float16")
"""Passes that run besides the one a candidate is about: they compute nothing in another precision by themselves."""

_REST = "quantize-weights"
"""What stores the weights that are left over, such as embeddings."""

_BLOCKS = "quantize-matmul{bits=4}"


@dataclasses.dataclass(frozen=True, slots=True)
class Inventory:
    """How many elements of weights a model has, by the kind of layer that uses them."""

    convolution: int
    product: int
    recurrent: int
    table: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.convolution + self.product + self.recurrent + self.table


@dataclasses.dataclass(frozen=True, slots=True)
class Proposal:
    """Something to try.

    Attributes:
        name: What it is, in a few words.
        passes: Lossy passes as a pipeline string; empty for keeping the model as it is.
    """

    name: str
    passes: str

    @property
    def pipeline(self) -> Pipeline:
        """The lossy passes."""
        return Pipeline.parse(self.passes) if self.passes else Pipeline((), "lossless")

    @property
    def learns(self) -> bool:
        """Whether a pass learns from data."""
        return any(p.wants_data() for p in self.pipeline.passes)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the passes."""
        return tuple(filter(None, re.sub(r"\{[^}]*\}", "", self.passes).split(",")))


KEEP = Proposal("keep fp32", "")
"""A candidate like any other."""


def take_inventory(model: ir.Model) -> Inventory:
    """Count the weights of a model by the kind of layer; one that several kinds use counts for each."""
    found = {"convolution": 0, "product": 0, "recurrent": 0, "table": 0}
    for weight in weights(model):
        for kind in {_KINDS[role.node.op_type] for role in weight.roles if role.node.op_type in _KINDS}:
            found[kind] += weight.tensor.size
    return Inventory(**found)


_KINDS = {
    "Conv": "convolution",
    "FusedConv": "convolution",
    "ConvTranspose": "convolution",
    "MatMul": "product",
    "Gemm": "product",
    "FusedGemm": "product",
    "Attention": "product",
    "LSTM": "recurrent",
    "GRU": "recurrent",
    "RNN": "recurrent",
    "Gather": "table",
}


def propose(inventory: Inventory, target: Target, *, learning: bool) -> list[Proposal]:
    """Return what to try, what is likely to win first.

    Args:
        inventory: What the model contains.
        target: What it is for.
        learning: Whether there is data that passes can learn from.
    """
    makers = {"cpu": _for_cpu, "cuda": _for_cuda, "portable": _portable}
    proposals = makers[target](inventory) if inventory.total >= FEWEST_ELEMENTS else ()
    return [KEEP, *(p for p in proposals if learning or not p.learns)]


def _for_cpu(inventory: Inventory) -> Iterator[Proposal]:
    yield from _integers(inventory)
    if inventory.product >= FEWEST_ELEMENTS:
        yield Proposal("8-bit blocks", f"quantize-matmul{{bits=8}},{_REST}")
        yield Proposal("4-bit blocks", f"{_BLOCKS},{_REST}")
        yield Proposal("4-bit blocks, GPTQ", f"quantize-matmul{{bits=4,method=gptq}},{_REST}")
    yield Proposal("8-bit weights", _REST)
    yield Proposal("16-bit weights", "store-float16")


def _integers(inventory: Inventory) -> Iterator[Proposal]:
    """Yield what computes with 8-bit integers."""
    products = inventory.product + inventory.recurrent >= FEWEST_ELEMENTS
    convolutions = inventory.convolution >= FEWEST_ELEMENTS
    if convolutions:
        yield Proposal("static int8", f"quantize-static,{_REST}")
    if products:
        yield from _dynamic(inventory, "dynamic int8", _REST)
    if products and convolutions:
        yield from _dynamic(inventory, "static and dynamic int8", f"quantize-static,{_REST}")


def _dynamic(inventory: Inventory, name: str, rest: str) -> Iterator[Proposal]:
    yield Proposal(name, f"quantize-dynamic,{rest}")
    if inventory.product >= FEWEST_ELEMENTS:
        yield Proposal(f"smoothed {name}", f"smooth-activations,quantize-dynamic,{rest}")


def _portable(inventory: Inventory) -> Iterator[Proposal]:
    yield from _integers(inventory)
    yield Proposal("8-bit weights", _REST)
    yield Proposal("16-bit weights", "store-float16")


def _for_cuda(inventory: Inventory) -> Iterator[Proposal]:
    yield Proposal("float16", "convert-float16")
    if inventory.product >= FEWEST_ELEMENTS:
        yield Proposal("8-bit blocks", f"quantize-matmul{{bits=8}},{_REST}")
        yield Proposal("4-bit blocks", f"{_BLOCKS},{_REST}")
    yield Proposal("8-bit weights", _REST)
