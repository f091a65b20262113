"""Blocks left out, and what is left fitted."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from onnxopt.allocation.blocks import Contest, leave_out
from onnxopt.analysis.blocks import residual_blocks
from onnxopt.analysis.shapes import Shapes
from onnxopt.calibrate.collector import calibration
from onnxopt.calibrate.watched import Watched
from onnxopt.cli import cli
from onnxopt.contract import NEEDS_DATA, Context, Edit, Refusal
from onnxopt.errors import UsageError
from onnxopt.graph import copied
from onnxopt.passes.prune.layers import NOT_FINITE, PruneLayers
from onnxopt.removed import Change, Width
from onnxopt.repair.outputs import OutputError
from onnxopt.runtime import RunOptions, open_session

SIZE, BLOCKS = 16, 4


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def network(strengths: tuple[float, ...] = (1.0, 0.01, 1.0, 0.3)) -> onnx.ModelProto:
    """Return a network of residual blocks that do more or less, each Add(a, Gemm(Relu(Gemm(a))))."""
    body, arrays = ["a0 = Gemm(x, first)"], {"first": random(SIZE, SIZE) / 4}
    for i, strength in enumerate(strengths):
        body += [
            f"h{i} = Gemm(a{i}, u{i})",
            f"r{i} = Relu(h{i})",
            f"o{i} = Gemm(r{i}, v{i})",
            f"a{i + 1} = Add(a{i}, o{i})",
        ]
        arrays[f"u{i}"] = random(SIZE, SIZE, seed=10 + i) / 4
        arrays[f"v{i}"] = random(SIZE, SIZE, seed=20 + i) / 4 * np.float32(strength)
    body.append(f"y = Gemm(a{len(strengths)}, last)")
    arrays["last"] = random(SIZE, 5, seed=1)
    text = f"agraph (float[n,{SIZE}] x) => (float[n,5] y) {{ {' '.join(body)} }}"
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return onnx.shape_inference.infer_shapes(proto)


FEEDS = [{"x": random(8, SIZE, seed=i)} for i in range(32)]


def context(model: ir.Model, feeds: list[dict[str, np.ndarray]] | None) -> Context:
    return Context(
        target="portable",
        seed=0,
        evaluate=lambda node, inputs, opset: None,
        shapes=Shapes(model),
        calibration=None if feeds is None else calibration(feeds, real=True),
    )


def apply(model: ir.Model, deny: tuple[str, ...] = (), **options: object) -> list[tuple[str, str]]:
    done = []
    for found in PruneLayers(**options).run(model, context(model, FEEDS)):  # type: ignore[arg-type]
        if isinstance(found, Edit) and found.site.output not in deny:
            found.apply()
            done.append((found.site.output, found.summary))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return done


def error(original: ir.Model, model: ir.Model) -> float:
    observer = OutputError(["y"])
    fresh = [{"x": random(8, SIZE, seed=100 + i)} for i in range(16)]
    calibration(fresh, real=True).observe_both(original, model, [observer])
    return observer.error


def test_the_block_that_does_least_goes() -> None:
    model = ir.from_proto(network())
    (done,) = apply(model, repair=False)
    assert done[0] == "a2"
    assert done[1].startswith("block from a1 on left out (Gemm, Gemm; 512 weights): outputs deviate by ")
    assert done[1].endswith("% before repair")
    assert [n.outputs[0].name for n in model.graph][:8] == ["a0", "h0", "r0", "o0", "a1", "h2", "r2", "o2"]


def test_what_goes_with_a_block_is_told() -> None:
    model = ir.from_proto(network())
    found = next(item for item in PruneLayers(repair=False).run(model, context(model, FEEDS)) if isinstance(item, Edit))
    removed = found.removed
    assert removed is not None
    assert (removed.name, removed.unit, removed.units) == ("a1 to a2", "residual block", Change(1, 0))
    assert removed.widths == (Width("u1", "outputs", SIZE, 0), Width("v1", "outputs", SIZE, 0))
    assert removed.parameters.gone == 2 * SIZE * SIZE
    assert removed.macs.gone == 2 * SIZE * SIZE  # for one sample
    assert removed.unrepaired is not None
    assert removed.unrepaired.of == "outputs"
    assert f"outputs deviate by {removed.unrepaired.share:.1%}" in found.summary
    assert removed.measured is None


def test_what_is_left_makes_up_for_it() -> None:
    original = ir.from_proto(network())
    plain, repaired = original.clone(), original.clone()
    assert [output for output, _ in apply(plain, count=2, repair=False)] == ["a2", "a4"]
    done = apply(repaired, count=2)
    assert [output for output, summary in done if "left out" in summary] == ["a2", "a4"]
    # The layer in front takes over the part of the block behind it.
    assert any(output == "o0" and summary.startswith("weights fitted") for output, summary in done)
    assert error(original, repaired) < 0.7 * error(original, plain)


def test_a_block_that_must_stay_is_passed_over() -> None:
    model = ir.from_proto(network())
    assert [output for output, _ in apply(model, deny=("a2",), repair=False)] == ["a4"]


def test_no_more_than_there_are() -> None:
    model = ir.from_proto(network())
    assert len(apply(model, count=9, repair=False)) == BLOCKS


def test_outputs_are_compared_by_their_power() -> None:
    observer = OutputError(["a", "b"])
    observer.add([np.array([3.0, 4.0]), np.ones(2)], [np.array([3.0, 0.0]), np.ones(2)])
    observer.add([np.zeros(2), np.ones(2)], [np.zeros(2), np.ones(2)])
    assert observer.error == pytest.approx(0.4)
    observer.add([np.ones(2), np.ones(2)], [np.ones(2), np.full(2, np.nan)])
    assert not np.isfinite(observer.error)


def test_most_blocks_are_tried_on_few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    values = Watched.values

    def noting(self: Watched, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        shown.append("original" if self is original else "trial")
        return values(self, feed)

    model = ir.from_proto(network())
    ctx = context(model, FEEDS)
    assert ctx.calibration is not None
    show = ctx.calibration.observe_beside(model, ["y"])
    original = show._reference  # type: ignore[attr-defined]
    monkeypatch.setattr(Watched, "values", noting)
    blocks = residual_blocks(model, ctx.shapes)
    ranking = Contest(model, blocks, ["y"], show, 32).ranked()
    first, error = next(ranking)
    assert first.end.name == "a2"
    # All on 8 samples, the best quarter, which is one of four, on the other 24; the original once for each.
    assert (shown.count("original"), shown.count("trial")) == (32, BLOCKS * 8 + 24)
    whole = OutputError(["y"])
    trial = copied(model)
    leave_out(trial, first)
    show(trial, [whole], range(32))
    assert error == pytest.approx(whole.error)
    del shown[:]
    second, _ = next(ranking)
    assert second.end.name == "a4"
    assert shown == ["trial"] * 24  # tried on the others when it is its turn


def test_a_block_that_cannot_be_judged_stays() -> None:
    proto = network((1.0, 1.0))
    for tensor in proto.graph.initializer:
        if tensor.name == "first":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full((SIZE, SIZE), np.nan, np.float32), "first"))
    model = ir.from_proto(proto)
    found = list(PruneLayers(repair=False).run(model, context(model, FEEDS)))
    assert [(item.site.output, item.reason) for item in found if isinstance(item, Refusal)] == [
        ("a1", NOT_FINITE),
        ("a2", NOT_FINITE),
    ]
    assert not any(isinstance(item, Edit) for item in found)


def test_of_an_output_that_was_all_zero_everything_is_lost() -> None:
    observer = OutputError(["a", "b"])
    observer.add([np.zeros(2), np.zeros(2)], [np.zeros(2), np.full(2, 1e30)])
    assert observer.error == 0.5


def test_it_says_why_it_does_not_apply() -> None:
    model = ir.from_proto(network())
    assert PruneLayers().skip_reason(model, context(model, None)) == NEEDS_DATA
    assert PruneLayers().skip_reason(model, context(model, FEEDS)) is None
    straight = ir.from_proto(network(()))
    reason = PruneLayers().skip_reason(straight, context(straight, FEEDS))
    assert reason == "it has no residual block that could be left out"
    chosen = network()
    chosen.graph.node.append(onnx.helper.make_node("ArgMax", ["y"], ["best"]))
    chosen.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("best", onnx.TensorProto.INT64, [1, 5]))
    no_floats = ir.from_proto(onnx.shape_inference.infer_shapes(chosen))
    reason = PruneLayers().skip_reason(no_floats, context(no_floats, FEEDS))
    assert reason == "no output holds floating-point numbers, which trials could be compared by"


@pytest.mark.parametrize("options", [{"count": 0}, {"samples": 0}])
def test_numbers_below_one_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="is 0; use 1 or more"):
        PruneLayers(**options)  # type: ignore[arg-type]


def test_from_the_command_line(tmp_path) -> None:  # type: ignore[no-untyped-def]
    onnx.save(network(), tmp_path / "in.onnx")
    np.savez(tmp_path / "data.npz", x=random(64, SIZE))
    arguments = ["optimize", "in.onnx", "-o", "out.onnx", "--passes", "prune-layers{count=2}", "--data", "data.npz"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        result = CliRunner().invoke(cli, [*arguments, "--max-error", "0.9", "--no-measure"], prog_name="onnxopt")
    assert result.exit_code == 0, result.output
    assert "prune-layers" in result.output
    made = onnx.load(tmp_path / "out.onnx")
    assert sum(node.op_type == "Gemm" for node in made.graph.node) == 2 + 2 * (BLOCKS - 2)
    session = open_session(ir.from_proto(made), RunOptions(), optimized=True)
    assert session.run({"x": random(1, SIZE)})["y"].shape == (1, 5)
