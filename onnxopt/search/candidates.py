"""Which pipelines are worth trying: by what the model contains and what the target has kernels for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from onnxopt.analysis.weights import weights
from onnxopt.graph import all_nodes, is_op, scopes
from onnxopt.pipeline import Pipeline

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnxopt.allocation.forecast import Goal
    from onnxopt.contract import Target
    from onnxopt.report.data import Objective

FEWEST_ELEMENTS = 4096
"""A kind of layer with fewer weights than this in all is not worth a candidate."""

TIDY = "strip-metadata"
"""What ends every candidate: of layers that are written anew, the exporter's notes say nothing true any more."""

SMALLEST = f"shorten-names,{TIDY}"
"""What ends them where size is what counts."""

TIDYING = ("shorten-names", "strip-metadata")
"""Passes that change nothing that is computed. There may be nothing for them to do."""

HELPERS = ("smooth-activations", "quantize-weights", "store-float16")
"""Passes that run besides the one a candidate is about: they compute nothing in another precision by themselves."""

_REST = "quantize-weights"
"""What stores the weights that are left over, such as embeddings."""

_BLOCKS = "quantize-matmul{bits=4}"

_CORRECTED = "{correct_bias=true}"
"""Where a candidate learns from data anyway."""


@dataclasses.dataclass(frozen=True, slots=True)
class Inventory:
    """How many elements of weights a model has, by the kind of layer that uses them, and whether it contains GELU."""

    convolution: int
    product: int
    recurrent: int
    table: int
    gelu: bool = False

    @property
    def total(self) -> int:
        """All of them."""
        return self.convolution + self.product + self.recurrent + self.table


@dataclasses.dataclass(frozen=True, slots=True)
class Proposal:
    """Something to try.

    Attributes:
        name: What it is, in a few words.
        passes: What runs on the lossless result, as a pipeline string; empty for keeping that as it is.
        first: What runs on the original, before the lossless passes, as a pipeline string; empty for nothing.
    """

    name: str
    passes: str
    first: str = ""

    @property
    def spec(self) -> str:
        """Its lossy passes as a pipeline string; empty for keeping the lossless result as it is."""
        return ",".join(filter(None, (self.first, self.passes)))

    @property
    def pipeline(self) -> Pipeline:
        """The passes that run on the lossless result."""
        return Pipeline.parse(self.passes) if self.passes else Pipeline((), "lossless")

    def whole(self, lossless: Pipeline) -> Pipeline:
        """Return all that runs on the original, lossless passes included."""
        first = Pipeline.parse(self.first).passes if self.first else ()
        passes = (*first, *lossless.passes, *self.pipeline.passes)
        return Pipeline(passes, "search" if self.spec else "lossless")

    @property
    def learns(self) -> bool:
        """Whether a pass learns from data."""
        return any(p.wants_data() for p in self.pipeline.passes)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the passes."""
        return tuple(filter(None, re.sub(r"\{[^}]*\}", "", self.passes).split(",")))


KEEP = Proposal("keep as given", "")
"""A candidate like any other; see `keeping`."""

PRUNED = Proposal("pruned", "", "prune-channels{importance=loss}")
"""What stands for all that prunes where none of it can be made."""


def pruned(proposal: Proposal, left: float, goal: Goal, objective: Objective) -> Proposal:
    """Return a candidate with channels removed before everything else.

    Args:
        proposal: What is done to what is left; `KEEP` for nothing.
        left: The part of the time, or of the parameters, that is to be left.
        goal: Of which of them.
        objective: What counts; see `propose`.
    """
    name = f"pruned to {left:.0%} of the {'time' if goal == 'latency' else 'parameters'}"
    end = SMALLEST if objective == "size" else TIDY
    return Proposal(
        f"{name}, {proposal.name}" if proposal.passes else name,
        proposal.passes or end,
        f"prune-channels{{{goal}={left:g},importance=loss}}",
    )


def keeping(model: ir.Model) -> str:
    """Return what keeping a model is called: "keep fp32" where float32 is all that it computes with."""
    quantizes = any(node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear") for node in all_nodes(model))
    constants = [v.const_value for scope in scopes(model) for v in scope.graph.initializers.values()]
    types = {t.dtype.name for t in constants if t is not None and len(t.shape) > 1} - {"INT64", "INT32", "BOOL"}
    return "keep fp32" if types == {"FLOAT"} and not quantizes else KEEP.name


def take_inventory(model: ir.Model) -> Inventory:
    """Count the weights of a model by the kind of layer; one that several kinds use counts for each."""
    found = {"convolution": 0, "product": 0, "recurrent": 0, "table": 0}
    for weight in weights(model):
        for kind in {_KINDS[role.node.op_type] for role in weight.roles if role.node.op_type in _KINDS}:
            found[kind] += weight.tensor.size
    gelu = any(is_op(n, "Erf", "Gelu") or is_op(n, "Gelu", domain="com.microsoft") for n in all_nodes(model))
    return Inventory(**found, gelu=gelu)


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


def propose(
    inventory: Inventory,
    target: Target,
    *,
    learning: bool,
    objective: Objective = "latency",
) -> list[Proposal]:
    """Return what to try, what is likely to win first.

    Args:
        inventory: What the model contains.
        target: What it is for.
        learning: Whether there is data that passes can learn from.
        objective: What counts: for size, names are shortened too.
    """
    makers = {"cpu": _for_cpu, "cuda": _for_cuda, "portable": _portable}
    proposals = makers[target](inventory) if inventory.total >= FEWEST_ELEMENTS else ()
    end = SMALLEST if objective == "size" else TIDY
    tidied = (dataclasses.replace(p, passes=f"{p.passes},{end}") for p in proposals)
    return [KEEP, *(p for p in tidied if learning or not p.learns)]


def _for_cpu(inventory: Inventory) -> Iterator[Proposal]:
    yield from _integers(inventory)
    yield from _without_gelu(inventory)
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
        yield _with("static int8", ("quantize-static",))
    if products:
        yield from _dynamic(inventory, "dynamic int8", ("quantize-dynamic",))
    if products and convolutions:
        yield from _dynamic(inventory, "static and dynamic int8", (f"quantize-dynamic{_CORRECTED}", "quantize-static"))


def _without_gelu(inventory: Inventory) -> Iterator[Proposal]:
    """Yield the plain form of all that computes with 8-bit integers, with GELU in such a form too."""
    if inventory.gelu and inventory.convolution >= FEWEST_ELEMENTS:
        *_, plain = (p for p in _integers(inventory) if "smooth" not in p.name)
        yield Proposal(f"{plain.name}, GELU by sigmoid", f"approximate-gelu,{plain.passes}")


def _dynamic(inventory: Inventory, name: str, passes: tuple[str, ...]) -> Iterator[Proposal]:
    yield _with(name, passes)
    if inventory.product >= FEWEST_ELEMENTS:
        learnt = tuple(f"{p}{_CORRECTED}" if p == "quantize-dynamic" else p for p in passes)
        yield _with(f"smoothed {name}", ("smooth-activations", *learnt))


def _with(name: str, passes: tuple[str, ...]) -> Proposal:
    return Proposal(name, ",".join((*passes, _REST)))


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
