from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir
import pytest

from onnxopt import registry, runtime
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Silent, Site
from onnxopt.errors import UsageError
from onnxopt.graph import remove_node, replace_value
from onnxopt.pipeline import Pipeline, make_pass
from onnxopt.preview import UNTRIED, preview, survey

TEXT = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2] x) => (float[2] y) { a = Neg(x)  b = Neg(a)  c = Neg(b)  y = Neg(c) }
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(GraphPass):
    """Remove the first pair of Neg, one pair a round; refuse the last Neg."""

    name = "step"
    guarantee = Guarantee.EXACT
    crash: bool = False
    reason: str = ""

    def skip_reason(self, model: ir.Model, ctx: Context) -> str | None:
        return self.reason or None

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        nodes = list(model.graph)
        if len(nodes) > 2:
            first, second, third = nodes[:3]
            source = first.inputs[0]
            assert source is not None

            def apply() -> None:
                replace_value(second.outputs[0], source)
                remove_node(second)
                remove_node(first)

            yield Edit(Site(self.name, "", second.outputs[0].name or ""), f"removed before {third.name}", apply)
        yield Refusal(Site(self.name, "", nodes[-1].outputs[0].name or ""), "it is the last")
        if self.crash:
            raise ValueError("on purpose")


class Lossy(Step):
    """The same, as a lossy pass."""

    name = "lossy"
    guarantee = Guarantee.APPROXIMATE


EMPTY = ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)
CONTEXT = Context(target="portable", seed=0, evaluate=runtime.evaluate_node, shapes=Shapes(EMPTY))


@pytest.fixture
def model() -> ir.Model:
    return ir.from_onnx_text(TEXT)


def test_every_pass_knows_the_shapes_of_its_own_copy(model: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[ir.Model, Context]] = []

    def note(self: Step, model: ir.Model, ctx: Context) -> str:
        seen.append((model, ctx))
        return "seen"

    monkeypatch.setattr(Step, "skip_reason", note)
    preview(model, [Step()], CONTEXT)
    ((copy, ctx),) = seen
    assert copy is not model
    assert ctx.shapes.rank(copy.graph.outputs[0]) == 1
    assert ctx.shapes is not CONTEXT.shapes


def test_edits_of_all_rounds_and_near_misses_of_the_last(model: ir.Model) -> None:
    (done,) = preview(model, [Step()], CONTEXT)
    assert [e.site.output for e in done.edits] == ["b"]
    assert [(r.site.output, r.reason) for r in done.refusals] == [("y", "it is the last")]
    assert (done.guarantee, done.skipped, done.crashed) == ("exact", "", "")


def test_the_model_is_not_changed(model: ir.Model) -> None:
    before = ir.to_proto(model).SerializeToString()
    preview(model, [Step()], CONTEXT)
    survey(model, CONTEXT)
    assert ir.to_proto(model).SerializeToString() == before


def test_a_pass_sees_what_the_one_before_did(model: ir.Model) -> None:
    first, second = preview(model, [Step(), Step()], CONTEXT)
    assert len(first.edits) == 1
    assert second.edits == ()


def test_a_crash_is_told_with_what_came_before(model: ir.Model) -> None:
    (done,) = preview(model, [Step(crash=True)], CONTEXT)
    assert done.crashed == "crashed with ValueError: on purpose"
    assert len(done.edits) == 1


def test_a_pass_that_does_not_apply(model: ir.Model) -> None:
    (done,) = preview(model, [Step(reason="not today")], CONTEXT)
    assert (done.skipped, done.edits, done.refusals) == ("not today", (), ())


def test_survey_tries_every_registered_pass(model: ir.Model) -> None:
    assert [p.name for p in survey(model, CONTEXT)] == list(registry.entries())


def test_survey_does_not_make_lossy_edits(model: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: dict[str, type[GraphPass]] = {"step": Step, "lossy": Lossy}
    monkeypatch.setattr("onnxopt.preview.entries", lambda: passes)
    monkeypatch.setattr(registry, "load", passes.__getitem__)
    monkeypatch.setattr(Lossy, "run", lambda self, model, ctx: iter([Edit(Site("lossy", "", "y"), "", pytest.fail)]))
    step, lossy = survey(model, CONTEXT)
    assert (len(step.edits), len(lossy.edits)) == (1, 1)


def test_survey_tells_what_a_pass_needs(model: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, options: dict[str, str]) -> GraphPass:
        raise UsageError(f"{name} needs an option.")

    monkeypatch.setattr("onnxopt.preview.make_pass", refuse)
    assert survey(model, CONTEXT)[0].skipped == "fold-constants needs an option."


def test_the_spec_is_a_pipeline(model: ir.Model) -> None:
    passes = Pipeline.parse("quantize-weights{min_elements=2}").passes
    assert preview(model, passes, CONTEXT)[0].spec == "quantize-weights{min_elements=2}"


def test_a_preview_does_not_advise_options_it_does_not_have(model: ir.Model) -> None:
    (done,) = preview(model, [make_pass("quantize-static", {})], CONTEXT)
    assert done.skipped == UNTRIED
    assert [name for name, words in ((p.name, p.skipped) for p in survey(model, CONTEXT)) if "force-cal" in words] == []


def test_a_survey_says_how_far_it_is(model: ir.Model) -> None:
    class Log(Silent):
        def __init__(self) -> None:
            self.stages: list[str] = []

        def stage(self, text: str, total: int | None = None) -> None:
            self.stages.append(text)

    log = Log()
    survey(model, CONTEXT, log)
    assert log.stages == [f"trying {name}" for name in registry.entries()]
