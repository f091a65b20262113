"""The whole search in ONNX Runtime, with passes that are there and some that are made up."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

import onnxopt
from onnxopt import registry
from onnxopt.contract import NEEDS_DATA, Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.errors import DataError, UsageError
from onnxopt.search import decision, hunt, lab, pruner
from onnxopt.search.candidates import TIDYING

MODELS = Path(__file__).parents[2] / "models"
CNN = MODELS / "mnist_cnn_bn.onnx"
DATA = {"data": MODELS / "mnist_test.npz", "labels": MODELS / "mnist_test_labels.npy"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coarse(GraphPass):
    """Rounds the weights of convolutions, and drops the last convolution's altogether: fast, and wrong in one layer."""

    name: ClassVar[str] = "quantize-static"
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE
    needs_data: ClassVar[bool] = True

    def skip_reason(self, model: ir.Model, ctx: Context) -> str | None:
        return NEEDS_DATA if ctx.calibration is None else None

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        convolutions = [n for n in model.graph if n.op_type in ("Conv", "FusedConv")]
        for number, node in enumerate(convolutions):
            weight = node.inputs[1]
            assert weight is not None
            assert weight.const_value is not None
            step = 0.002 if number < len(convolutions) - 1 else 10.0

            def apply(node: ir.Node = node, weight: Any = weight, step: float = step) -> None:
                rounded = np.round(weight.const_value.numpy() / step).astype(np.float32) * np.float32(step)
                new = ir.Value(name=f"{weight.name}_coarse", const_value=ir.tensor(rounded))
                new.type, new.shape = weight.type, weight.shape
                model.graph.register_initializer(new)
                node.replace_input_with(1, new)

            yield Edit(Site(self.name, "", node.outputs[0].name or ""), "round", apply)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crashing(Coarse):
    """Crashes as soon as it is run."""

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        raise ZeroDivisionError("no ranges")
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unrunnable(Coarse):
    """Makes a model that ONNX Runtime refuses."""

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        node = next(n for n in model.graph if n.op_type == "MaxPool")

        def apply() -> None:
            node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", [3, 3, 3])

        yield Edit(Site(self.name, "", node.outputs[0].name or ""), "pool", apply)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clipping(Coarse):
    """Bounds the input, which shows only where it is beyond."""

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        node = next(n for n in model.graph if n.op_type in ("Conv", "FusedConv"))

        def apply() -> None:
            bound = ir.Value(name="bound", const_value=ir.tensor(np.array(3.0, np.float32)))
            bound.type, bound.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
            model.graph.register_initializer(bound)
            clip = ir.node("Min", [node.inputs[0], bound], name="clip")
            clip.outputs[0].name = "clip/out"
            model.graph.insert_before(node, clip)
            node.replace_input_with(0, clip.outputs[0])

        yield Edit(Site(self.name, "", node.outputs[0].name or ""), "clip", apply)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure for a moment: these tests are not about precision."""
    optimize = importlib.import_module("onnxopt.ground")
    measure = onnxopt.measure

    def short(*models: Any, **options: Any) -> Any:
        return measure(*models, **(options | {"budget_seconds": 0.2, "memory": False}))

    monkeypatch.setattr(optimize, "measure_models", short)
    monkeypatch.setattr(lab, "measure", short)


def always_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every model take half of the original's time, so that noise decides nothing."""
    measure = lab.measure

    def steady(*models: Any, **options: Any) -> Any:
        return dataclasses.replace(measure(*models, **options), ratio=0.5, low=0.5, high=0.5)

    monkeypatch.setattr(importlib.import_module("onnxopt.ground"), "measure_models", steady)
    monkeypatch.setattr(lab, "measure", steady)


def register(monkeypatch: pytest.MonkeyPatch, **passes: type[GraphPass]) -> None:
    """Have passes of this module found under names with `_` for `-`; only they and quantize-weights are proposed."""
    made_up = {name.replace("_", "-"): cls for name, cls in passes.items()}
    entries = {key: registry.Entry(key, f"{__name__}:{cls.__name__}", "") for key, cls in made_up.items()}
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    monkeypatch.setattr(registry, "BUILTIN", registry.BUILTIN | entries)
    registry.entries.cache_clear()
    propose, wanted = hunt.propose, {"quantize-weights", *TIDYING, *made_up}

    def some(*arguments: Any, **options: Any) -> list[Any]:
        return [p for p in propose(*arguments, **options) if set(p.names) <= wanted]

    monkeypatch.setattr(hunt, "propose", some)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    registry.entries.cache_clear()


def statuses(report: onnxopt.Report) -> dict[str, str]:
    assert report.search is not None
    return {c.name: c.status for c in report.search.candidates}


def test_the_best_within_the_budget_is_found_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    report = onnxopt.optimize(CNN, target="cpu", max_drop=0.01, objective="size", **DATA).report
    search = report.search
    assert search is not None
    assert (search.winner.name, search.winner.status) == ("8-bit weights", "winner")
    assert (report.recipe, report.pipeline.split(",")[-1]) == ("search", "strip-metadata")
    assert report.metric == search.winner.metric
    assert report.metric is not None
    assert report.metric.high <= 0.01
    assert report.metric.labelled
    assert search.samples == 1000, "nothing learns, so all samples judge"
    assert search.metric_reason == "the labels are whole numbers"
    assert report.after.bytes < 0.3 * report.before.bytes
    assert report.verification is not None
    assert report.verification.ok
    quantized, shortened, _ = report.passes[-3:]
    assert (quantized.name, shortened.name) == ("quantize-weights", "shorten-names")
    assert quantized.applied
    assert shortened.applied


def test_a_guilty_layer_stays_in_float_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, quantize_static=Coarse)
    monkeypatch.setattr(decision, "GAIN", 10.0)
    report = onnxopt.optimize(CNN, target="cpu", max_drop=0.02, **DATA).report
    assert report.search is not None
    (relieved,) = [c for c in report.search.candidates if c.in_float]
    assert relieved.name == "static int8, 1 layer in float"
    assert statuses(report)["static int8"] == "over budget"
    assert "causes" in relieved.in_float[0].reason
    assert relieved.status in ("winner", "kept")
    assert (report.search.samples, report.search.calibration_samples) == (872, 128)


@pytest.mark.parametrize(("made_up", "reason"), [(Crashing, "ZeroDivisionError: no ranges"), (Unrunnable, "MaxPool")])
def test_a_candidate_that_cannot_be_is_reported_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, made_up: type[GraphPass], reason: str
) -> None:
    register(monkeypatch, quantize_static=made_up)
    report = onnxopt.optimize(CNN, target="cpu", max_drop=0.02, **DATA).report
    assert report.search is not None
    failed = next(c for c in report.search.candidates if c.name == "static int8")
    assert failed.status == "failed"
    assert reason in failed.reason
    assert report.search.winner.status == "winner"


def test_when_everything_misses_the_budget_the_lossless_result_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, quantize_static=Coarse)
    result = onnxopt.optimize(CNN, target="cpu", max_error=1e-9, data=MODELS / "mnist_calibration.npz")
    report = result.report
    assert report.search is not None
    assert report.search.winner.name == "keep fp32"
    assert report.recipe == "lossless"
    assert set(statuses(report).values()) == {"winner", "over budget"}
    assert report.verification is not None
    assert report.verification.mode == "exact"
    assert not any(p.name.startswith("quantize") for p in report.passes)


def test_a_budget_of_error_is_judged_by_every_sample(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The images that show the difference come late."""
    register(monkeypatch, quantize_static=Clipping)
    images = np.load(MODELS / "mnist_calibration.npz")["image"][:200].copy()
    images[150:] *= 100
    np.savez(tmp_path / "late.npz", image=images)
    report = onnxopt.optimize(CNN, target="cpu", max_error=0.05, data=tmp_path / "late.npz").report
    assert statuses(report)["static int8"] == "over budget"
    assert report.verification is not None
    assert report.verification.worst <= 0.05


def test_without_data_a_budget_of_error_is_judged_by_generated_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, quantize_static=Coarse)
    report = onnxopt.optimize(CNN, target="cpu", max_error=float("inf")).report
    assert report.search is not None
    assert "static int8" not in statuses(report)
    assert "generated inputs" in report.search.notes[0]
    forced = onnxopt.optimize(CNN, target="cpu", max_error=0.5, force_calibration=True).report
    assert "static int8" in statuses(forced)


def test_labels_that_do_not_fit_are_refused_before_anything_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "measure", lambda *models, **options: pytest.fail("something was timed"))
    labels = np.load(DATA["labels"])[:-1]
    with pytest.raises(DataError, match="There are 999 labels for 1000 samples; give one label per sample"):
        onnxopt.optimize(CNN, target="cpu", max_drop=0.01, data=DATA["data"], labels=labels)


def test_a_state_file_saves_evaluations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    register(monkeypatch)
    always_as_fast(monkeypatch)
    options = {"target": "cpu", "max_error": 0.5, "state": tmp_path / "s.json"}
    first = onnxopt.optimize(CNN, **options).report
    monkeypatch.setattr(lab.RuntimeLab, "examine", None)
    second = onnxopt.optimize(CNN, **options).report
    assert second.search is not None
    assert first.search is not None
    assert (first.search.resumed, second.search.resumed) == (0, 1)
    assert second.pipeline == first.pipeline
    with pytest.raises(TypeError):
        onnxopt.optimize(CNN, **(options | {"seed": 1}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "size"}, "objective is about the search"),
        ({"state": "s.json"}, "state is about the search"),
        ({"prune": True, "passes": "fuse-gelu"}, "prune is about the search"),
        ({"prune": True, "max_error": 0.1}, "prune needs real inputs"),
        ({"objective": "size", "recipe": "small", "max_error": 0.1}, "objective is about the search"),
        ({"objective": "speed", "max_error": 0.1}, "objective must be latency or size, not speed"),
        ({"measure": False, "max_error": 0.1}, "have to be measured; name a recipe"),
        ({"verify": False, "max_error": 0.1}, "have to be verified; name a recipe"),
    ],
)
def test_options_that_contradict_the_search(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        onnxopt.optimize(CNN, **options)


def test_a_model_that_does_not_run_is_not_searched() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17, "acme" : 1]> g (float[2] x) => (float[2] y) '
        "{ a = Identity(x) b = acme.Turbo(a) y = Identity(b) }"
    )
    report = onnxopt.optimize(model, max_error=0.1).report
    assert report.search is None
    assert any(n.startswith("Nothing was searched") and "Turbo" in n for n in report.notes)
    assert report.after.nodes == 1


def test_what_is_pruned_competes_with_what_is_quantized(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    register(monkeypatch)
    monkeypatch.setattr(pruner, "LEFT", (0.5,))
    np.savez(tmp_path / "few.npz", image=np.load(MODELS / "mnist_calibration.npz")["image"][:96])
    options = {"target": "cpu", "max_drop": 0.5, "data": tmp_path / "few.npz", "objective": "size"}
    report = onnxopt.optimize(CNN, prune=True, **options).report
    assert report.search is not None
    assert report.search.winner.name == "pruned to 50% of the parameters, 8-bit weights"
    assert report.pipeline.startswith("prune-channels{params=0.5,importance=loss},")
    assert [(p.name, p.status) for p in report.passes if p.guarantee == "approximate"] == [
        ("prune-channels", "kept"),
        ("quantize-weights", "kept"),
    ]
    assert report.after.bytes < 0.55 * report.search.candidates[1].bytes


def test_a_model_without_channels_to_prune_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    register(monkeypatch)
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((8, 1, 80)).astype(np.float32))
    weight = np.random.default_rng(0).standard_normal((80, 80)).astype(np.float32)
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[1,80] x) => (float[1,80] y) { y = MatMul(x, w) }',
        initializers=[ir.tensor(weight, name="w")],
    )
    report = onnxopt.optimize(model, target="cpu", max_drop=0.5, data=tmp_path / "data.npz", prune=True).report
    assert statuses(report)["pruned"] == "not applicable"
