from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxopt
from onnxopt.contract import Guarantee
from onnxopt.errors import ModelError
from onnxopt.patch import KEY, History, apply_patch, cut, write_patch

MODELS = Path(__file__).parent.parent / "models"
EXACT = History("fuse-conv-bn", Guarantee.EXACT)


def linear(path: Path, weight: np.ndarray, extra: dict[str, np.ndarray] | None = None) -> Path:
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        linear (float[N, {weight.shape[0]}] x) => (float[N, {weight.shape[1]}] y) {{ y = MatMul(x, w) }}"""
    )
    for name, array in {"w": weight, **(extra or {})}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, path)
    return path


def weights(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(32, 48)).astype(np.float32)


@pytest.mark.parametrize("passes", ["fuse-conv-bn,remove-dead-code", "quantize-weights", "prune-weights{ratio=0.5}"])
@pytest.mark.parametrize("name", ["mnist_cnn.onnx", "mnist_cnn_bn.onnx"])
def test_a_replayed_patch_is_the_result_to_the_byte(tmp_path: Path, name: str, passes: str) -> None:
    result = onnxopt.optimize(MODELS / name, passes=passes, verify=False, measure=False)
    onnxopt.save(result.model, tmp_path / "result.onnx")
    told = History(result.report.pipeline, Guarantee.APPROXIMATE)
    write_patch(onnxopt.load(MODELS / name), result.model, told, tmp_path / "p")
    again, history = apply_patch(onnxopt.load(MODELS / name), tmp_path / "p")
    onnxopt.save(again, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "result.onnx").read_bytes()
    assert history == told


def test_what_the_original_holds_is_not_in_the_patch(tmp_path: Path) -> None:
    original = onnxopt.load(linear(tmp_path / "m.onnx", weights()))
    write_patch(original, original, EXACT, tmp_path / "p")
    assert (tmp_path / "p").stat().st_size < 1000
    assert onnxopt.load(tmp_path / "p").graph.initializers["w"].const_value.nbytes == 0


def test_a_cut_of_a_weight_is_kept_as_indexes(tmp_path: Path) -> None:
    original = onnxopt.load(linear(tmp_path / "m.onnx", weights()))
    rows, columns = [0, 3, *range(8, 32)], list(range(0, 48, 2))
    result = onnxopt.load(linear(tmp_path / "r.onnx", weights()[np.ix_(rows, columns)]))
    write_patch(original, result, EXACT, tmp_path / "p")
    patch = onnx.load(tmp_path / "p")
    (entry,) = [json.loads(m.value)["stands"][""]["w"] for m in patch.metadata_props if m.key == KEY]
    assert entry[:2] == ["", "w"]
    assert entry[3] == [rows, columns]
    again, _ = apply_patch(original, tmp_path / "p")
    np.testing.assert_array_equal(again.graph.initializers["w"].const_value.numpy(), weights()[np.ix_(rows, columns)])


def test_weights_are_found_under_another_name(tmp_path: Path) -> None:
    original = onnxopt.load(linear(tmp_path / "m.onnx", weights(1), {"spare": weights(2)}))
    result = onnxopt.load(linear(tmp_path / "r.onnx", weights(2)))
    write_patch(original, result, EXACT, tmp_path / "p")
    assert (tmp_path / "p").stat().st_size < 1000
    again, _ = apply_patch(original, tmp_path / "p")
    np.testing.assert_array_equal(again.graph.initializers["w"].const_value.numpy(), weights(2))


def test_new_weights_are_in_the_patch(tmp_path: Path) -> None:
    original = onnxopt.load(linear(tmp_path / "m.onnx", weights(1)))
    result = onnxopt.load(linear(tmp_path / "r.onnx", weights(2)))
    write_patch(original, result, EXACT, tmp_path / "p")
    again, _ = apply_patch(original, tmp_path / "p")
    np.testing.assert_array_equal(again.graph.initializers["w"].const_value.numpy(), weights(2))


@pytest.mark.parametrize(
    ("other", "what"), [(weights(3), "has another initializer"), (np.zeros((2, 2), np.float32), "has another")]
)
def test_a_patch_is_refused_for_another_model(tmp_path: Path, other: np.ndarray, what: str) -> None:
    original = onnxopt.load(linear(tmp_path / "m.onnx", weights()))
    write_patch(original, original, EXACT, tmp_path / "p")
    with pytest.raises(ModelError, match=f"was made for another model: this one {what}"):
        apply_patch(onnxopt.load(linear(tmp_path / "o.onnx", other)), tmp_path / "p")


def test_a_model_is_no_patch(tmp_path: Path) -> None:
    path = linear(tmp_path / "m.onnx", weights())
    with pytest.raises(ModelError, match="is no patch"):
        apply_patch(onnxopt.load(path), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: {**told, "format": 2}, "newer onnxopt"),
        (lambda told: {**told, "guarantee": "none"}, "is damaged"),
        (lambda told: {**told, "stands": {"": {"w": ["", "w"]}}}, "is damaged"),
        (lambda told: {**told, "stands": {"": {"v": told["stands"][""]["w"]}}}, 'no initializer "v"'),
        (lambda told: [], "is damaged"),
        (lambda told: _cut(told, [[0, 99], None]), "does not fit the shape"),
        (lambda told: _cut(told, [[-1], None]), "does not fit the shape"),
        (lambda told: _cut(told, [None]), "does not fit the shape"),
    ],
)
def test_a_damaged_patch_is_refused(tmp_path: Path, change: Callable[[dict], object], message: str) -> None:
    original = onnxopt.load(linear(tmp_path / "m.onnx", weights()))
    write_patch(original, original, EXACT, tmp_path / "p")
    patch = onnx.load(tmp_path / "p")
    for entry in patch.metadata_props:
        if entry.key == KEY:
            entry.value = json.dumps(change(json.loads(entry.value)))
    onnx.save(patch, tmp_path / "p")
    with pytest.raises(ModelError, match=message):
        apply_patch(original, tmp_path / "p")


def _cut(told: dict, kept: list) -> dict:
    return {**told, "stands": {"": {"w": [*told["stands"][""]["w"][:3], kept, False]}}}


@settings(deadline=None)
@given(st.data())
def test_any_cut_of_distinct_values_is_told(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    whole = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(int(np.prod(shape))).reshape(shape)
    kept = [data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True)) for n in shape]
    found = cut(whole, whole[np.ix_(*kept)])
    assert found is not None
    assert [list(range(n)) if k is None else list(k) for k, n in zip(found, shape, strict=True)] == kept


@given(st.data())
def test_a_cut_is_never_wrong(data: st.DataObject) -> None:
    """Repeated values may hide a cut; what is found always gives the part."""
    values = st.integers(0, 3)
    whole = np.array(data.draw(st.lists(values, min_size=12, max_size=12))).reshape(3, 4)
    part = np.array(data.draw(st.lists(values, min_size=4, max_size=4))).reshape(2, 2)
    found = cut(whole, part)
    if found is not None:
        full = [range(n) if k is None else k for k, n in zip(found, whole.shape, strict=True)]
        np.testing.assert_array_equal(whole[np.ix_(*full)], part)


def test_external_data_stays_external(tmp_path: Path) -> None:
    onnxopt.save(onnxopt.load(linear(tmp_path / "m.onnx", weights())), tmp_path / "e.onnx", external_data=True)
    original = onnxopt.load(tmp_path / "e.onnx")
    write_patch(original, original, EXACT, tmp_path / "p")
    again, _ = apply_patch(original, tmp_path / "p")
    onnxopt.save(again, tmp_path / "again.onnx")
    assert list(tmp_path.glob("again.onnx.*.data"))
    assert not list(tmp_path.glob("p.*.data"))


def test_overridable_weights_are_written_whole(tmp_path: Path) -> None:
    model = onnx.load(linear(tmp_path / "m.onnx", weights()))
    model.graph.input.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [32, 48]))
    original = onnxopt.load(model)
    write_patch(original, original, EXACT, tmp_path / "p")
    again, _ = apply_patch(original, tmp_path / "p")
    np.testing.assert_array_equal(again.graph.initializers["w"].const_value.numpy(), weights())
    assert isinstance(again, ir.Model)


def test_weights_that_were_stored_as_fields_come_out_as_the_result_has_them(tmp_path: Path) -> None:
    array = weights()
    model = onnx.load(linear(tmp_path / "m.onnx", array))
    del model.graph.initializer[:]
    model.graph.initializer.append(onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, array.shape, array.ravel()))
    onnx.save(model, tmp_path / "m.onnx")
    original = onnxopt.load(tmp_path / "m.onnx")
    result = onnxopt.load(linear(tmp_path / "r.onnx", array))
    for expected, fields in ((original, array.size), (result, 0)):
        write_patch(original, expected, EXACT, tmp_path / "p")
        assert (tmp_path / "p").stat().st_size < 1000
        again, _ = apply_patch(original, tmp_path / "p")
        onnxopt.save(again, tmp_path / "again.onnx")
        (tensor,) = onnx.load(tmp_path / "again.onnx").graph.initializer
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), array)
        assert len(tensor.float_data) == fields


def test_values_that_occur_twice_do_not_hide_a_cut() -> None:
    whole = np.random.default_rng(0).integers(0, 9000, (60, 70)).astype(np.float32)
    rows, columns = np.arange(0, 60, 3), np.arange(1, 70, 2)
    assert cut(whole, whole[np.ix_(rows, columns)]) == (tuple(rows), tuple(columns))
