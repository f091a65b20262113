import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

import onnxopt
from onnxopt import model as models
from onnxopt.analysis.shapes import Shapes
from onnxopt.calibrate.collector import calibration
from onnxopt.cli import cli
from onnxopt.contract import Context, Edit, Refusal
from onnxopt.coupling.analysis import analyse
from onnxopt.coupling.goals import elements, removed
from onnxopt.coupling.removal import Removal
from onnxopt.coupling.selection import rounded
from onnxopt.errors import UsageError
from onnxopt.graph import all_nodes, constant_tensor
from onnxopt.passes.prune.channels import PruneChannels
from onnxopt.removed import Change, Damage, Goal, Width

MODELS = Path(__file__).parents[2] / "models"


def mlp(width=64, **changes):
    """Build a perceptron whose hidden neurons matter the more the later they come."""
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 17]> agraph (float[2,16] x) => (float[2,4] y) '
        "{ a = Gemm(x, w, b) r = Relu(a) y = MatMul(r, v) }"
    )
    rng = np.random.default_rng(0)
    size = np.linspace(0.1, 2, width).astype(np.float32)
    arrays = {
        "w": rng.normal(size=(16, width)).astype(np.float32) * size,
        "b": rng.normal(size=width).astype(np.float32),
        "v": rng.normal(size=(width, 4)).astype(np.float32) * size[:, None],
    }
    for name, array in (arrays | changes).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def found(model, **options):
    ctx = Context(target="portable", seed=0, evaluate=lambda *_: None, shapes=Shapes(model))
    return list(PruneChannels(**options).run(model, ctx))


def optimize(model, spec="prune-channels"):
    result = onnxopt.optimize(model, passes=spec, max_error=float("inf"), measure=False)
    return result.model, result.report.passes[0]


def test_the_weakest_neurons_go():
    model = mlp()
    (edit,) = (item for item in found(model) if isinstance(item, Edit))
    assert (edit.site.output, edit.summary) == ("w", "64 to 32 channels")
    removed = edit.removed
    assert removed.units == removed.channels == Change(64, 32)
    assert removed.widths == (Width("w", "outputs", 64, 32), Width("v", "inputs", 64, 32))
    assert removed.parameters == Change(16 * 64 + 64 + 64 * 4, 16 * 32 + 32 + 32 * 4)
    assert removed.macs == Change(2 * 64 * (16 + 4), 2 * 32 * (16 + 4))
    assert removed.behind == ("y",)
    assert removed.predicted.of == "weights"
    assert 0 < removed.predicted.share < 0.3  # the weakest half
    before = model.graph.initializers["w"].const_value.numpy()
    edit.apply()
    after = model.graph.initializers["w"].const_value.numpy()
    kept = [i for i in range(64) if any(np.array_equal(before[:, i], column) for column in after.T)]
    assert after.shape == (16, 32)
    assert kept == sorted(kept)
    assert np.mean(kept) > 44


def test_what_the_layers_behind_lack_and_what_is_left_of_what_was_asked_is_told(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(1).normal(size=(256, 16)).astype(np.float32))
    result = onnxopt.optimize(
        mlp(),
        passes="prune-channels{ratio=0.25,multiple=4}",
        max_error=float("inf"),
        measure=False,
        data=tmp_path / "x.npz",
    )
    removal, repair = result.report.passes[0].applied
    assert removal.removed.units == Change(64, 48)
    assert repair.fit.layer == "y"
    assert removal.removed.unrepaired == Damage(repair.fit.before, "layers")
    assert removal.removed.measured == Damage(repair.fit.after, "layers")
    assert 0 < repair.fit.after < repair.fit.before
    (goal,) = result.report.reached
    assert (goal.of, goal.asked, goal.reached) == ("channels", 0.75, 0.75)


@pytest.mark.parametrize(
    ("options", "goal"),
    [
        ({}, Goal("channels", 0.5)),
        ({"ratio": 0.25}, Goal("channels", 0.75)),
        ({"params": 0.3}, Goal("parameters", 0.3)),
        ({"latency": 0.8}, Goal("time", 0.8)),
    ],
)
def test_what_is_asked_for(options, goal):
    assert PruneChannels(**options).goal() == goal


def test_inputs_and_outputs_of_the_model_are_named_as_reasons():
    refusals = {item.site.output: item.reason for item in found(mlp()) if isinstance(item, Refusal)}
    assert refusals == {"w": "its inputs stay: it is an input of the model"}


def test_a_layer_that_is_too_narrow_is_left_alone():
    refusals = [item.reason for item in found(mlp(width=4)) if isinstance(item, Refusal)]
    assert "its 4 channels are too few to remove any" in refusals


@pytest.mark.parametrize(
    ("wanted", "width", "multiple", "left"),
    [
        (32, 64, 16, 32),
        (45, 64, 16, 48),
        (22.4, 32, 16, 24),
        (12, 24, 16, 12),
        (6, 8, 8, 6),
        (0.5, 64, 1, 4),
        (5, 3, 8, 3),
    ],
)
def test_widths(wanted, width, multiple, left):
    assert rounded(wanted, width, multiple, 4) == left


@pytest.mark.parametrize(
    ("options", "message"),
    [({"params": 1.5}, "params is 1.5"), ({"params": 0.5, "ratio": 0.5}, "ratio and params are given"), ({"ratio": 0.0}, "ratio is 0.0"), ({"ratio": 1.0}, "ratio is 1.0"), ({"multiple": 0}, "multiple is 0"),
     ({"importance": "age"}, "importance is"), ({"min_channels": 0}, "min_channels is 0")],
)  # fmt: skip
def test_options(options, message):
    with pytest.raises(UsageError, match=message):
        PruneChannels(**options)


def test_weights_that_are_not_numbers_do_not_stop_it():
    weights = np.full((16, 64), np.nan, np.float32)
    edits = [item for item in found(mlp(w=weights)) if isinstance(item, Edit)]
    assert [edit.summary for edit in edits] == ["64 to 32 channels"]


def two_layers(bias):
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 17]> agraph (float[2,16] x) => (float[2,16] y) '
        "{ a = MatMul(x, w) b = Add(a, c) d = MatMul(b, v) y = Add(d, e) }"
    )
    rng = np.random.default_rng(0)
    for name, shape in {"w": (16, 16), "v": (16, 16)}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    for node in proto.graph.node:
        node.input[:] = [bias.get(name, name) for name in node.input]
    for name in sorted(set(bias.values())):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(16, np.float32), name))
    return ir.from_proto(proto)


def test_vectors_that_layers_share_are_copied_where_that_frees_channels():
    model, report = optimize(two_layers({"c": "zeros", "e": "zeros"}))
    assert [edit.summary for edit in report.applied] == [
        "small constants that nodes share (1): a copy for each, to be cut on its own",
        "16 to 8 channels",
    ]
    assert list(model.graph.initializers["w"].const_value.shape) == [16, 8]
    _, alone = optimize(two_layers({"c": "c", "e": "e"}))
    assert [edit.summary for edit in alone.applied] == ["16 to 8 channels"]


def test_layers_that_share_a_vector_through_an_identity_are_pruned_apart():
    text = """(float[2,16] x) => (float[2,4] y) {
        a = Gemm(x, w, zeros) r = Relu(a) same = Identity(zeros) c = Gemm(r, v, same) s = Relu(c) y = MatMul(s, u) }"""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 17]> agraph {text}')
    rng = np.random.default_rng(0)
    for name, shape in {"w": (16, 32), "v": (32, 32), "u": (32, 4), "zeros": (32,)}.items():
        array = rng.normal(size=shape).astype(np.float32) * (name != "zeros")
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model, report = optimize(ir.from_proto(proto))
    assert [(edit.site.output, edit.summary) for edit in report.applied] == [
        ("zeros", "small constants that nodes share (1): a copy for each, to be cut on its own"),
        ("w", "32 to 16 channels"),
        ("v", "32 to 16 channels"),
    ]
    assert {node.op_type for node in model.graph} == {"Gemm", "MatMul", "Relu"}


def calibrated(model, feeds):
    data = calibration(feeds, real=True)
    return Context(target="portable", seed=0, evaluate=lambda *_: None, shapes=Shapes(model), calibration=data)


def test_neurons_that_data_never_moves_go_first():
    model = mlp(
        w=np.concatenate([np.full((16, 32), 9, np.float32), np.ones((16, 32), np.float32)], axis=1),
        b=np.concatenate([np.full(32, -1000, np.float32), np.zeros(32, np.float32)]),
    )
    rng = np.random.default_rng(0)
    ctx = calibrated(model, [{"x": rng.uniform(0, 1, (2, 16)).astype(np.float32)} for _ in range(4)])
    (edit,) = (e for e in PruneChannels(importance="activation").run(model, ctx) if isinstance(e, Edit))
    edit.apply()
    np.testing.assert_array_equal(model.graph.initializers["b"].const_value.numpy(), np.zeros(32, np.float32))


def test_without_data_activations_say_nothing():
    model = mlp()
    ctx = Context(target="portable", seed=0, evaluate=lambda *_: None, shapes=Shapes(model))
    assert "real inputs" in PruneChannels(importance="activation").skip_reason(model, ctx)
    assert PruneChannels(importance="activation").wants_data()
    assert PruneChannels().skip_reason(model, ctx) is None


def test_activations_of_grouped_convolutions_and_hidden_units():
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 17]> agraph (float[1,3,4,4] x) => (float[16,1,2] y) '
        "{ a = Conv(x, w) b = Conv <group = 2> (a, u) c = Reshape(b, s) h, l = GRU <hidden_size = 6> (c, gw, gr) "
        "q = Squeeze(h, one) y = MatMul(q, v) }"
    )
    rng = np.random.default_rng(0)
    shapes = {"w": (8, 3, 1, 1), "u": (12, 4, 1, 1), "gw": (1, 18, 12), "gr": (1, 18, 6), "v": (6, 2)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    arrays |= {"s": np.array([16, 1, 12]), "one": np.array([1])}
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = ir.from_proto(proto)
    ctx = calibrated(model, [{"x": rng.normal(size=(1, 3, 4, 4)).astype(np.float32)}])
    edits = []
    for item in PruneChannels(importance="activation", min_channels=1, repair=False).run(model, ctx):
        if isinstance(item, Edit):
            item.apply()
            edits.append(item.site.output)
    assert edits == ["w", "gw"]


@pytest.mark.parametrize("fraction", [0.7, 0.4, 0.2])
def test_a_part_of_the_parameters(fraction):
    path = MODELS / "mnist_cnn.onnx"
    model, _ = optimize(path, f"prune-channels{{params={fraction}, multiple=1}}")
    left = parameters(model) / parameters(models.load(path))
    assert 0.9 * fraction < left <= fraction


def test_counted_elements_are_those_that_go():
    model = models.load(MODELS / "mnist_cnn_bn.onnx").clone()
    coupling = analyse(model)
    gone = {group.name: group.units // 3 for group in coupling.groups}
    expected, before = removed(coupling, gone), elements(model)
    removal = Removal(model, coupling)
    for group in coupling.groups:
        removal.remove(group.roots[: group.units // 3])
    assert before - elements(model) == expected


def test_a_part_of_the_time():
    model, asked = mlp(), []

    def timed(key, make):
        asked.append(key)
        return elements(make()) / elements(model)

    ctx = Context(target="portable", seed=0, evaluate=lambda *_: None, shapes=Shapes(model), timed=timed)
    graph_pass = PruneChannels(latency=0.4, multiple=1)
    assert graph_pass.skip_reason(model, ctx) is None
    (edit,) = (item for item in graph_pass.run(model, ctx) if isinstance(item, Edit))
    assert edit.summary == "64 to 24 channels"
    assert len(set(asked)) == len(asked) == 5


def test_a_time_that_cannot_be_reached():
    model = mlp()
    ctx = Context(
        target="portable", seed=0, evaluate=lambda *_: None, shapes=Shapes(model), timed=lambda key, make: 0.9
    )
    *_, last = PruneChannels(latency=0.5).run(model, ctx)
    assert last.reason == "even with the least that may stay it takes more than 50% of the time"
    untimed = Context(target="portable", seed=0, evaluate=lambda *_: None, shapes=Shapes(model))
    assert "latency needs models to be run" in PruneChannels(latency=0.5).skip_reason(model, untimed)


def test_parameters_that_cannot_be_reached():
    *_, last = found(mlp(), params=0.01)
    assert last.reason == "even the least that may stay is more than 1% of the parameters"


def test_the_original_is_not_written_into():
    model = mlp()
    before = {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}
    optimize(model)
    for name, array in before.items():
        np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), array)


def test_a_group_that_is_pruned_wrongly_is_dropped_and_named(monkeypatch):
    remove = Removal.remove

    def wrong(self, roots):
        remove(self, roots)
        if len(roots) == 16:
            weight = self.model.graph.initializers["conv1.weight"]
            weight.const_value = ir.tensor(weight.const_value.numpy() * 2, name=weight.name)

    monkeypatch.setattr(Removal, "remove", wrong)
    model, report = optimize(MODELS / "mnist_cnn.onnx")
    (dropped,) = report.dropped
    assert dropped.site.output == "conv1.weight"
    assert dropped.reason.startswith("it does not compute what it should: ")
    assert [edit.site.output for edit in report.applied] == ["conv2.weight", "conv3.weight", "dense1.weight"]
    assert model.graph.initializers["conv1.weight"].const_value.shape[0] == 32


def test_with_data_what_is_left_is_fitted_and_what_is_wrong_is_still_found(monkeypatch, tmp_path):
    remove = Removal.remove

    def wrong(self, roots):
        remove(self, roots)
        if len(roots) == 24:
            weight = self.model.graph.initializers["conv1.weight"]
            weight.const_value = ir.tensor(weight.const_value.numpy() * 2, name=weight.name)

    images = np.load(MODELS / "mnist_calibration.npz")["image"][:48]
    np.savez(tmp_path / "data.npz", image=images)
    options = {
        "passes": "prune-channels{ratio=0.75}",
        "data": str(tmp_path / "data.npz"),
        "measure": False,
        "max_error": float("inf"),
    }
    monkeypatch.setattr("onnxopt.repair.fit.WORK", 2e9)
    result = onnxopt.optimize(MODELS / "mnist_cnn.onnx", **options)
    fitted = [e.site.output for e in result.report.passes[0].applied if e.summary.startswith("weights fitted")]
    assert fitted == ["getitem_3", "getitem_6", "linear", "logits"]
    assert not result.report.passes[0].dropped
    monkeypatch.setattr(Removal, "remove", wrong)
    report = onnxopt.optimize(MODELS / "mnist_cnn.onnx", **options).report.passes[0]
    (dropped,) = report.dropped
    assert dropped.site.output == "conv1.weight"
    assert dropped.reason.startswith("it does not compute what it should: ")
    assert [edit.site.output for edit in report.applied][:3] == ["conv2.weight", "conv3.weight", "dense1.weight"]


@pytest.mark.parametrize("name", ["mnist_cnn.onnx", "mnist_cnn_bn.onnx"])
def test_real_models_from_the_command_line(tmp_path, name):
    out, told = tmp_path / "pruned.onnx", tmp_path / "report.json"
    arguments = ["optimize", MODELS / name, "-o", out, "--passes", "prune-channels{ratio=0.5}", "--max-error", "inf"]
    result = CliRunner().invoke(cli, [str(a) for a in [*arguments, "--no-measure", "--report", told]])
    assert result.exit_code == 0, result.output
    assert "32 to 16 channels" in result.output
    before, after = (parameters(models.load(path)) for path in (MODELS / name, out))
    assert after < 0.3 * before
    report = json.loads(told.read_text())
    removed = [edit["removed"] for edit in report["passes"][0]["applied"] if edit["removed"]]
    assert removed[0]["parameters"]["before"] == report["before"]["parameters"]
    assert removed[-1]["parameters"]["after"] == report["after"]["parameters"]
    assert [r["units"] for r in removed] == [{"before": 2 * n, "after": n} for n in (16, 32, 32, 64)]
    assert report["reached"][0]["reached"] == 0.5


def parameters(model):
    values = [*model.graph.initializers.values(), *(node.outputs[0] for node in all_nodes(model) if node.outputs)]
    return sum(tensor.size for value in values if (tensor := constant_tensor(value)) is not None)


@pytest.mark.parametrize(("repair", "told"), [(True, "compared with quantization alone"), (False, "repair or train")])
def test_the_report_says_what_to_do_about_outputs_that_move(repair, told):
    caveat = PruneChannels(repair=repair).caveat()
    assert caveat.startswith("prune-channels: outputs move")
    assert told in caveat
