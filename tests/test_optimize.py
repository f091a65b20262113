"""The whole way through, with passes that are wrong, that crash and that are slow, and on real models."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnxopt
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.errors import DataError, UsageError
from onnxopt.pipeline import Pipeline, make_pass

MODELS = Path(__file__).parent.parent / "models"
CNN = MODELS / "mnist_cnn_bn.onnx"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrong(GraphPass):
    """Turns every Relu into LeakyRelu, which is wrong wherever something is negative."""

    name = "wrong"
    guarantee = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        for node in model.graph:
            if node.op_type == "Relu":

                def apply(node: ir.Node = node) -> None:
                    node.op_type = "LeakyRelu"

                yield Edit(Site(self.name, "", node.outputs[0].name or ""), "Relu to LeakyRelu", apply)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crashing(GraphPass):
    """Takes a node apart and then falls over."""

    name = "crashing"
    guarantee = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        node = next(n for n in model.graph if n.op_type == "Conv")

        def apply() -> None:
            node.replace_input_with(1, None)
            raise ZeroDivisionError("nothing to divide by")

        yield Edit(Site(self.name, "", node.outputs[0].name or ""), "break it", apply)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slow(GraphPass):
    """Has the first activation sent through many needless, and exact, multiplications of matrices."""

    name = "slow"
    guarantee = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        node = next(n for n in model.graph if n.op_type == "Relu")
        if model.graph.initializers.get("slow/unit") is not None:
            return

        def apply() -> None:
            tensor = ir.tensor(np.eye(28, dtype=np.float32), name="slow/unit")
            unit = ir.Value(name="slow/unit", const_value=tensor)
            unit.type, unit.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([28, 28])
            model.graph.register_initializer(unit)
            value = node.inputs[0]
            for i in range(40):
                extra = ir.node("MatMul", [value, unit], name=f"slow/{i}")
                extra.outputs[0].name = f"slow/{i}/out"
                model.graph.insert_before(node, extra)
                value = extra.outputs[0]
            node.replace_input_with(0, value)

        yield Edit(Site(self.name, "", node.outputs[0].name or ""), "multiply by one, often", apply)


def good() -> list[GraphPass]:
    return [make_pass(n, {}) for n in ("fold-constants", "remove-identities", "fuse-conv-bn", "remove-dead-code")]


def pipeline(*extra: GraphPass) -> Pipeline:
    return Pipeline((*extra, *good()))


def content(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def test_wrong_and_crashing_passes_are_blamed_and_leave_no_trace() -> None:
    without = onnxopt.optimize(CNN, passes=pipeline(), measure=False)
    result = onnxopt.optimize(CNN, passes=pipeline(Wrong(), Crashing()), measure=False)
    assert content(result.model) == content(without.model)
    wrong, crashing = result.report.passes[:2]
    assert wrong.status == crashing.status == "dropped"
    assert all("deviates" in d.reason for d in wrong.dropped)
    assert crashing.dropped[0].reason == "crashed with ZeroDivisionError: nothing to divide by"
    assert crashing.dropped[0].site.output in {
        n.outputs[0].name for n in onnxopt.load(CNN).graph if n.op_type == "Conv"
    }
    assert result.report.verification is not None
    assert result.report.verification.ok


def test_a_slow_pass_is_named_with_its_interval_and_taken_out() -> None:
    without = onnxopt.optimize(CNN, passes=pipeline(), measure=False)
    result = onnxopt.optimize(CNN, passes=pipeline(Slow()))
    (slow,) = result.report.slow_passes
    assert slow.name == "slow"
    assert 1 < slow.low <= slow.ratio <= slow.high
    assert content(result.model) == content(without.model)
    assert result.report.measurement is not None
    assert result.report.measurement.verdict != "slower"


@pytest.mark.parametrize("name", ["mnist_cnn.onnx", "mnist_cnn_bn.onnx"])
def test_lossless_keeps_what_a_real_model_computes(name: str, tmp_path: Path) -> None:
    result = onnxopt.optimize(MODELS / name, data=MODELS / "mnist_calibration.npz", measure=False)
    assert result.report.verification is not None
    assert result.report.verification.ok
    assert result.report.after.nodes <= result.report.before.nodes
    onnxopt.save(result.model, tmp_path / "out.onnx")
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)
    again = onnxopt.optimize(tmp_path / "out.onnx", measure=False)
    assert again.report.applied == 0, "a second run finds nothing"


def test_a_path_a_proto_and_a_model_are_the_same() -> None:
    results = [
        onnxopt.optimize(source, verify=False, measure=False) for source in (CNN, onnx.load(CNN), onnxopt.load(CNN))
    ]
    assert len({content(r.model) for r in results}) == 1


def test_the_given_model_is_not_changed() -> None:
    model = onnxopt.load(CNN)
    before = content(model)
    onnxopt.optimize(model, passes="fuse-conv-bn,quantize-weights", verify=False, measure=False)
    assert content(model) == before


def test_raising_the_opset_is_verified_and_reported() -> None:
    result = onnxopt.optimize(CNN, opset=21, measure=False)
    assert result.report.opset[1] == 21
    assert result.report.verification is not None
    assert result.report.verification.ok


def test_a_budget_of_error_limits_lossy_passes() -> None:
    free = onnxopt.optimize(CNN, passes="quantize-weights", measure=False)
    assert free.report.verification is not None
    tight = onnxopt.optimize(CNN, passes="quantize-weights", max_error=1e-9, measure=False)
    assert tight.report.verification is not None
    assert tight.report.verification.worst <= 1e-9 < free.report.verification.worst
    assert tight.report.passes[0].dropped


def test_a_budget_of_accuracy_is_judged_on_labels() -> None:
    options = {"data": MODELS / "mnist_calibration.npz", "labels": MODELS / "mnist_calibration_labels.npy"}
    kept = onnxopt.optimize(CNN, passes="prune-weights{ratio=0.2}", max_drop=0.02, measure=False, **options)
    assert kept.report.metric is not None
    assert kept.report.metric.drop <= 0.02
    assert kept.report.passes[0].applied
    harsh = onnxopt.optimize(CNN, passes="prune-weights{ratio=0.97}", max_drop=0.02, measure=False, **options)
    assert harsh.report.metric is not None
    assert harsh.report.metric.drop <= 0.02
    assert harsh.report.passes[0].dropped


def test_a_recipe_beside_a_budget_is_run_and_not_searched() -> None:
    assert onnxopt.optimize(CNN, verify=False, measure=False).report.recipe == "lossless"
    report = onnxopt.optimize(CNN, recipe="small", max_error=0.1, measure=False).report
    assert (report.recipe, report.search) == ("small", None)


def test_fixed_shapes_are_written_and_run_shapes_are_not() -> None:
    fixed = onnxopt.optimize(CNN, fix_shape={"batch": 2}, measure=False)
    assert list(fixed.model.graph.inputs[0].shape or ()) == [2, 1, 28, 28]
    run = onnxopt.optimize(CNN, shape={"batch": 2}, measure=False)
    assert str((run.model.graph.inputs[0].shape or [None])[0]) == "batch"


def test_a_model_the_runtime_cannot_run_is_still_optimized_and_said_so() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17, "acme" : 1]> g (float[2] x) => (float[2] y) { a = Identity(x) b = acme.Turbo(a) y = Identity(b) }'
    )
    result = onnxopt.optimize(model)
    assert result.report.verification is None
    assert "Turbo" in result.report.not_verified
    assert "Turbo" in result.report.not_measured
    assert result.report.after.nodes == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "lossless", "passes": "fuse-conv-bn"}, "either recipe or passes"),
        ({"target": "cpo"}, 'Did you mean "cpu"'),
        ({"threads": 0}, "threads must be at least 1"),
        ({"max_error": -1.0}, "max_error must be at least 0"),
        ({"max_error": float("nan")}, "max_error must be at least 0"),
        ({"max_drop": 0.1}, "max_drop needs real inputs"),
        ({"labels": "l.npy"}, "labels needs real inputs"),
        ({"fix_shape": {"bach": 1}}, "batch"),
        ({"shape": {"bach": 1}}, "batch"),
    ],
)
def test_options_that_cannot_be_are_said_in_a_sentence(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        onnxopt.optimize(CNN, **options)  # type: ignore[arg-type]


def test_data_that_does_not_fit_is_said_in_a_sentence(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", picture=np.zeros((2, 1, 28, 28), np.float32))
    with pytest.raises(DataError, match="image"):
        onnxopt.optimize(CNN, data=tmp_path / "d.npz")
