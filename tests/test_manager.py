"""The manager: fixed points, blame by bisection, crashes, budgets of lossy passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir
import pytest

from onnxopt import manager
from onnxopt.analysis.shapes import Shapes
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.errors import VerificationError
from onnxopt.graph import scopes
from onnxopt.manager import Verdict

CTX = Context(
    target="portable",
    seed=0,
    evaluate=lambda node, inputs, opset: None,
    shapes=Shapes(ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)),
)


def chain(length: int) -> ir.Model:
    nodes = "\n".join(f"v{i + 1} = Relu(v{i})" for i in range(length))
    return ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[2] v0) => (float[2] v{length}) {{ {nodes} }}'
    )


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rename(GraphPass):
    """Turns Relu nodes into another operator; a stand-in for a rewrite.

    Attributes:
        to: The new operator.
        wrong_at: Outputs at which it emits the operator "Wrong" instead.
    """

    name = "rename"
    guarantee = Guarantee.EXACT

    to: str = "Abs"
    wrong_at: str = ""

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        wrong = self.wrong_at.split("+")
        for scope in scopes(model):
            for node in list(scope.graph):
                if node.op_type == "Relu":
                    output = node.outputs[0].name or ""
                    to = "Wrong" if output in wrong else self.to

                    def apply(node: ir.Node = node, to: str = to) -> None:
                        node.op_type = to

                    yield Edit(Site(self.name, scope.path, output), f"Relu to {to}", apply)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossyRename(Rename):
    """The same, promising less."""

    name = "lossy-rename"
    guarantee = Guarantee.APPROXIMATE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crash(Rename):
    """Crashes while applying the edit at v2, leaving half of it behind."""

    name = "crash"

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        for edit in super().run(model, ctx):
            assert isinstance(edit, Edit)

            def apply(edit: Edit = edit) -> None:
                edit.apply()
                if edit.site.output == "v2":
                    raise KeyError("boom")

            yield dataclasses.replace(edit, apply=apply)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrashWhileLooking(Rename):
    """Crashes between two edits."""

    name = "crash-while-looking"

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        yield from list(super().run(model, ctx))[:1]
        raise RuntimeError("lost my way")


class CountingJudge:
    """Calls a model bad when it holds the operator "Wrong" more often than allowed."""

    def __init__(self, allowed: int = 0) -> None:
        self.allowed = allowed
        self.calls = 0
        self.rebased: list[Guarantee] = []

    def __call__(self, model: ir.Model, guarantee: Guarantee) -> Verdict:
        self.calls += 1
        wrong = ops(model).count("Wrong")
        return Verdict(True) if wrong <= self.allowed else Verdict(False, f"{wrong} wrong nodes")

    def equal(self, model: ir.Model, reference: ir.Model) -> Verdict:
        return Verdict(ops(model) == ops(reference), "other operators")

    def rebase(self, model: ir.Model, guarantee: Guarantee) -> None:
        self.rebased.append(guarantee)


def test_green_path_costs_one_verification_and_leaves_the_input_alone() -> None:
    model, judge = chain(5), CountingJudge()
    outcome = manager.run(model, [Rename(), Rename(to="Neg")], CTX, judge)
    assert ops(outcome.model) == ["Abs"] * 5
    assert ops(model) == ["Relu"] * 5
    assert judge.calls == 1
    assert [p.status for p in outcome.passes] == ["kept", "unchanged"]


def test_nothing_to_do_returns_the_given_model_itself() -> None:
    model = chain(2)
    outcome = manager.run(model, [Rename(to="Relu")][:0], CTX)
    assert outcome.model is model


@pytest.mark.parametrize("culprit", [1, 2, 37, 64])
def test_a_wrong_edit_is_found_denied_and_everything_else_kept(culprit: int) -> None:
    judge = CountingJudge()
    outcome = manager.run(chain(64), [Rename(wrong_at=f"v{culprit}")], CTX, judge)
    expected = ["Abs"] * 64
    expected[culprit - 1] = "Relu"
    assert ops(outcome.model) == expected
    (report,) = outcome.passes
    (dropped,) = report.dropped
    assert dropped.site == Site("rename", "", f"v{culprit}")
    assert dropped.reason == "1 wrong nodes"
    assert report.status == "kept"
    assert judge.calls <= 2 + 6 + 1


def test_several_wrong_edits_are_found_one_after_the_other() -> None:
    outcome = manager.run(chain(20), [Rename(wrong_at="v3+v11+v12")], CTX, CountingJudge())
    assert {d.site.output for d in outcome.passes[0].dropped} == {"v3", "v11", "v12"}
    assert ops(outcome.model).count("Relu") == 3


def test_an_exact_pass_that_is_wrong_too_often_is_dropped_whole() -> None:
    wrong = "+".join(f"v{i}" for i in range(2, 12))
    outcome = manager.run(chain(20), [Rename(wrong_at=wrong)], CTX, CountingJudge())
    assert outcome.passes[0].status == "dropped"
    assert "none of it is trusted" in outcome.passes[0].reason
    assert ops(outcome.model) == ["Relu"] * 20


def test_wrong_and_crashing_passes_leave_what_the_others_make() -> None:
    wrong = LossyRename(wrong_at="v1+v2+v3")
    together = manager.run(chain(3), [wrong, CrashWhileLooking(), Rename(to="Neg")], CTX, CountingJudge())
    alone = manager.run(chain(3), [Rename(to="Neg")], CTX, CountingJudge())
    assert [p.status for p in together.passes] == ["dropped", "dropped", "kept"]
    assert together.passes[1].reason == "crashed with RuntimeError: lost my way"
    assert ir.to_proto(together.model) == ir.to_proto(alone.model)


def test_a_crash_while_applying_is_rolled_back_and_named() -> None:
    outcome = manager.run(chain(4), [Crash()], CTX, CountingJudge())
    assert ops(outcome.model) == ["Abs", "Relu", "Abs", "Abs"]
    (dropped,) = outcome.passes[0].dropped
    assert dropped.site == Site("crash", "", "v2")
    assert dropped.reason == "crashed with KeyError: 'boom'"


def test_a_pass_that_crashes_at_every_edit_is_not_tried_at_all_of_them() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class CrashEverywhere(Rename):
        name = "crash-everywhere"
        runs: ClassVar[list[int]] = []

        def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
            self.runs.append(1)
            for edit in super().run(model, ctx):
                assert isinstance(edit, Edit)
                yield dataclasses.replace(edit, apply=lambda: 1 / 0)

    outcome = manager.run(chain(40), [CrashEverywhere(), Rename(to="Neg")], CTX, None)
    assert outcome.passes[0].reason == (
        "5 of its edits crashed, so none of it is trusted; the last crashed with ZeroDivisionError: division by zero"
    )
    assert len(CrashEverywhere.runs) == manager.MAX_GUILTY
    assert set(ops(outcome.model)) == {"Neg"}


def test_crashes_are_survived_without_a_judge() -> None:
    outcome = manager.run(chain(4), [Crash(), Rename(to="Neg")], CTX, None)
    assert ops(outcome.model) == ["Abs", "Neg", "Abs", "Abs"]


def test_lossy_passes_are_judged_alone_and_rebase_the_exact_reference() -> None:
    judge = CountingJudge(allowed=2)
    outcome = manager.run(chain(6), [LossyRename(wrong_at="v2+v4+v6"), Rename()], CTX, judge)
    assert ops(outcome.model).count("Wrong") == 2
    assert [d.site.output for d in outcome.passes[0].dropped] == ["v6"]
    assert judge.rebased == [Guarantee.APPROXIMATE]


class Proven(LossyRename):
    """Every edit says what the model must then equal."""

    name = "proven"

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        done: set[str] = set()
        for edit in list(super().run(model, ctx)):
            assert isinstance(edit, Edit)

            def apply(edit: Edit = edit) -> None:
                edit.apply()
                done.add(edit.site.output)

            def reference() -> ir.Model:
                expected = chain(len(list(model.graph)))
                for node in expected.graph:
                    if node.outputs[0].name in done:
                        node.op_type = self.to
                return expected

            yield dataclasses.replace(edit, apply=apply, reference=reference)


def test_what_differs_from_the_reference_of_its_edits_is_dropped_whatever_the_budget() -> None:
    outcome = manager.run(chain(6), [Proven(wrong_at="v6")], CTX, CountingJudge(allowed=6))
    assert ops(outcome.model) == ["Abs"] * 5 + ["Relu"]
    (dropped,) = outcome.passes[0].dropped
    assert dropped.site.output == "v6"
    assert dropped.reason == "it does not compute what it should: other operators"


def test_edits_that_differ_from_their_reference_are_named_one_by_one_and_the_others_stand() -> None:
    wrong = [f"v{i}" for i in range(2, 16, 2)]
    outcome = manager.run(chain(16), [Proven(wrong_at="+".join(wrong))], CTX, CountingJudge(allowed=16))
    assert len(wrong) > manager.MAX_GUILTY
    assert [d.site.output for d in outcome.passes[0].dropped] == wrong
    assert ops(outcome.model) == ["Abs", "Relu"] * 7 + ["Abs", "Abs"]


def test_after_many_edits_that_differ_the_rest_is_not_said_to_miss_a_budget() -> None:
    wrong = "+".join(f"v{i}" for i in range(1, 40))
    outcome = manager.run(chain(40), [Proven(wrong_at=wrong)], CTX, CountingJudge(allowed=40))
    reasons = {d.reason for d in outcome.passes[0].dropped}
    assert reasons == {
        "it does not compute what it should: other operators",
        "not kept after 25 edits did not compute what they should",
    }


def test_a_lossy_pass_far_beyond_the_budget_keeps_what_fits() -> None:
    wrong = "+".join(f"v{i}" for i in range(1, 40))
    outcome = manager.run(chain(40), [LossyRename(wrong_at=wrong)], CTX, CountingJudge(allowed=3))
    assert ops(outcome.model).count("Wrong") == 3
    reasons = {d.reason for d in outcome.passes[0].dropped}
    assert any(r.startswith("not kept after 5 edits") for r in reasons)


def test_a_model_that_fails_before_any_edit_is_an_error_not_a_culprit() -> None:
    class Never(CountingJudge):
        def __call__(self, model: ir.Model, guarantee: Guarantee) -> Verdict:
            return Verdict(False, "never good")

    with pytest.raises(VerificationError, match="before any edit: never good"):
        manager.run(chain(3), [Rename()], CTX, Never())


def test_denials_of_an_earlier_run_are_respected() -> None:
    first = manager.run(chain(4), [Rename(wrong_at="v2")], CTX, CountingJudge())
    again = manager.run(chain(4), [Rename(wrong_at="v2")], CTX, None, denials=first.denials)
    assert ops(again.model) == ops(first.model)


def test_what_the_user_spares_is_left_alone_and_told() -> None:
    site = Site("rename", "", "v2")
    denials = manager.Denials(spared={site: "as asked"})
    outcome = manager.run(chain(4), [Rename(wrong_at="v2")], CTX, CountingJudge(), denials=denials)
    assert "Wrong" not in ops(outcome.model)
    assert dict(outcome.passes[0].refusals) == {"as asked": 1}
    assert outcome.passes[0].dropped == ()


def test_two_runs_are_the_same() -> None:
    runs = [manager.run(chain(9), [Rename(wrong_at="v5"), Crash()], CTX, CountingJudge()) for _ in range(2)]
    assert ir.to_proto(runs[0].model) == ir.to_proto(runs[1].model)
    assert [p.dropped for p in runs[0].passes] == [p.dropped for p in runs[1].passes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Break(GraphPass):
    """Turns every Relu into the operator "Wrong", then the last of them into "Repaired".

    Attributes:
        unequal_at: Output at which an edit says that the result must equal a model that it does not.
    """

    name = "break"
    guarantee = Guarantee.APPROXIMATE
    repairs = True

    unequal_at: str = ""

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        broken = []
        for node in list(model.graph):
            output = node.outputs[0].name or ""

            def apply(node: ir.Node = node) -> None:
                node.op_type = "Wrong"
                broken.append(node)

            def reference() -> ir.Model:
                unequal = any(node.outputs[0].name == self.unequal_at for node in broken)
                return chain(0 if unequal else len(broken))

            yield Edit(Site(self.name, "", output), "broken", apply, reference=reference)
        for node in broken[-1:]:

            def mend(node: ir.Node = node) -> None:
                node.op_type = "Repaired"

            yield Edit(Site(self.name, "", "mended"), "repaired", mend, repairs=True)


class MendingJudge(CountingJudge):
    """The same; it holds a model for equal to a chain that is as long as the model has the operator "Wrong"."""

    def equal(self, model: ir.Model, reference: ir.Model) -> Verdict:
        return Verdict(ops(model).count("Wrong") == len(ops(reference)), "unequal")


@pytest.mark.parametrize(("allowed", "left"), [(3, 4), (2, 3), (1, 2)])
def test_edits_are_judged_with_what_repairs_them(allowed: int, left: int) -> None:
    outcome = manager.run(chain(4), [Break()], CTX, MendingJudge(allowed))
    assert ops(outcome.model).count("Repaired") == 1
    assert sum(op != "Relu" for op in ops(outcome.model)) == left
    (report,) = outcome.passes
    assert [d.site.output for d in report.dropped] == [f"v{i}" for i in range(left + 1, 5)]


def test_what_an_edit_must_equal_is_compared_before_repairs() -> None:
    outcome = manager.run(chain(4), [Break(unequal_at="v2")], CTX, MendingJudge(9))
    assert ops(outcome.model) == ["Wrong", "Relu", "Wrong", "Repaired"]
    (report,) = outcome.passes
    assert [(d.site.output, d.reason) for d in report.dropped] == [
        ("v2", "it does not compute what it should: unequal")
    ]
