"""Taking out what makes a model slower, with a stopwatch that says what the test wants."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import onnx_ir as ir
import pytest

from onnxopt import manager, slowness
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark(GraphPass):
    """Renames the node that makes one output, so that the stopwatch can see who was there.

    Attributes:
        output: The output whose node is renamed.
    """

    name = "mark"
    guarantee = Guarantee.APPROXIMATE

    output: str = ""

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        for node in list(model.graph):
            if node.outputs[0].name == self.output and node.name != "marked":

                def apply(node: ir.Node = node) -> None:
                    node.name = "marked"

                yield Edit(Site(self.name, "", self.output), "marked", apply)


@dataclasses.dataclass(frozen=True)
class Timing:
    ratio: float
    verdict: str

    @property
    def low(self) -> float:
        return self.ratio - 0.01

    @property
    def high(self) -> float:
        return self.ratio + 0.01

    def sentence(self) -> str:
        return f"{self.ratio:.2f}x"


MODEL = ir.from_onnx_text(
    '<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] d) { a = Relu(x) b = Relu(a) c = Relu(b) d = Relu(c) }'
)
PASSES = [Mark(output=o) for o in "abcd"]


def settle(cost: Callable[[set[str]], float]) -> slowness.Settled:
    """Run the marks under a stopwatch that charges for what is marked."""
    ctx = Context("portable", 0, lambda node, inputs, opset: None, Shapes(MODEL))

    def run(denials: manager.Denials, verified: bool) -> manager.Outcome:
        return manager.run(MODEL, PASSES, ctx, None, denials=denials)

    def measure(model: ir.Model) -> Timing:
        ratio = cost({n.outputs[0].name or "" for n in model.graph if n.name == "marked"})
        return Timing(ratio, "slower" if ratio > 1.02 else "faster" if ratio < 0.98 else "no difference shown")

    return slowness.settle(run(manager.Denials(), True), PASSES, run, measure)  # type: ignore[arg-type]


def marked(settled: slowness.Settled) -> set[str]:
    return {n.outputs[0].name or "" for n in settled.outcome.model.graph if n.name == "marked"}


@pytest.mark.parametrize("slow", "abcd")
def test_the_slow_pass_is_named_with_its_interval_and_the_others_stay(slow: str) -> None:
    settled = settle(lambda there: 1.3 if slow in there else 0.9)
    assert marked(settled) == set("abcd") - {slow}
    (named,) = settled.slow_passes
    assert (named.spec, named.ratio, named.low, named.high, named.edits) == (
        f"mark{{output={slow}}}",
        1.3,
        1.29,
        1.31,
        1,
    )
    assert settled.measurement.verdict == "faster"
    report = settled.outcome.passes["abcd".index(slow)]
    assert report.status == "dropped"
    assert report.reason == "measured slower: 1.30x"


def test_several_slow_passes_go_one_after_the_other() -> None:
    settled = settle(lambda there: 1 + 0.2 * len(there & set("bd")))
    assert marked(settled) == {"a", "c"}
    assert [s.spec for s in settled.slow_passes] == ["mark{output=b}", "mark{output=d}"]


def test_nothing_is_taken_out_of_a_model_that_is_not_slower() -> None:
    settled = settle(lambda there: 1.0)
    assert marked(settled) == set("abcd")
    assert settled.slow_passes == ()


def test_a_slowdown_that_does_not_show_twice_is_noise() -> None:
    readings = iter([1.3, 1.0])
    settled = settle(lambda there: next(readings))
    assert marked(settled) == set("abcd")
    assert settled.measurement.verdict == "no difference shown"
