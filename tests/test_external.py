"""External data: where it may be, how it is checked, and how it is written and removed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import parser

from onnxopt.errors import ModelError, OutputError
from onnxopt.model import load, model_bytes, save

WEIGHT = np.arange(4096, dtype=np.float32)


def model_proto(*names: str) -> onnx.ModelProto:
    """A chain of additions with these weights."""
    nodes = "".join(f" t{i + 1} = Add(t{i}, {name})" for i, name in enumerate(names))
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[N] t0) => (float[N] t{len(names)}) {{{nodes} }}'
    )
    for name in names:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(WEIGHT, name))
    return proto


def external(folder: Path, **entries: object) -> Path:
    """A model whose weight w lies in weights.bin, with these entries of external data changed."""
    proto = model_proto("w")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.bin").write_bytes(bytes(64) + WEIGHT.tobytes())
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "weights.bin", "offset": 64, "length": WEIGHT.nbytes, **entries}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    return folder / "m.onnx"


def weight(path: Path, name: str = "w") -> np.ndarray:
    """The weight as onnx itself reads it."""
    proto = onnx.load(path)
    return next(onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if t.name == name)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def data_files(folder: Path) -> list[str]:
    return [name for name in names(folder) if name.endswith(".data")]


# ---- loading


def test_external_tensors_stay_external(tmp_path: Path) -> None:
    tensor = load(external(tmp_path)).graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert (str(tensor.location), tensor.offset, tensor.length) == ("weights.bin", 64, WEIGHT.nbytes)
    assert Path(tensor.path) == tmp_path / "weights.bin"
    np.testing.assert_array_equal(tensor.numpy(), WEIGHT)
    assert tensor.tobytes() == WEIGHT.tobytes()


def test_offset_and_length_may_be_left_out(tmp_path: Path) -> None:
    path = external(tmp_path, offset=None, length=None)
    array = load(path).graph.initializers["w"].const_value.numpy()
    np.testing.assert_array_equal(array[16:], WEIGHT[:-16])


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ({"location": "other.bin"}, '"w" has its data in .*other.bin, which does not exist'),
        ({"location": "../weights.bin"}, "only files in the model's folder"),
        ({"location": "sub/../../weights.bin"}, "only files in the model's folder"),
        ({"location": "..\\weights.bin"}, "only files in the model's folder"),
        ({"location": "/etc/passwd"}, "only files in the model's folder"),
        ({"location": "C:\\weights.bin"}, "only files in the model's folder"),
        ({"location": ""}, "no file is named"),
        ({"location": "."}, "is a folder"),
        ({"offset": 65}, "which has only 16448"),
        ({"offset": 1 << 60}, "which has only 16448"),
        ({"offset": -1}, "negative offset"),
        ({"offset": "many"}, "no number"),
        ({"length": 100}, "takes 16384 bytes, but its external data is 100 bytes"),
        ({"length": 1 << 40}, "takes 16384 bytes"),
    ],
)
def test_bad_entries(tmp_path: Path, entries: dict[str, object], complaint: str) -> None:
    folder = tmp_path / "model"
    path = external(folder, **entries)
    (tmp_path / "weights.bin").write_bytes(bytes(1 << 15))
    with pytest.raises(ModelError, match=complaint) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_dimensions_that_do_not_fit_cost_no_memory(tmp_path: Path) -> None:
    path = external(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    for dims, complaint in [([1 << 40], "takes"), ([1 << 40, 1 << 40], "absurd"), ([-1], "negative")]:
        del proto.graph.initializer[0].dims[:]
        proto.graph.initializer[0].dims.extend(dims)
        path.write_bytes(proto.SerializeToString())
        with pytest.raises(ModelError, match=complaint):
            load(path)


def test_truncated_data(tmp_path: Path) -> None:
    path = external(tmp_path)
    os.truncate(tmp_path / "weights.bin", 1000)
    with pytest.raises(ModelError, match="only 1000: it is truncated"):
        load(path)


def test_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside.bin"
    path = external(tmp_path / "model")
    data = path.parent / "weights.bin"
    shutil.move(data, outside)
    data.symlink_to(outside)
    with pytest.raises(ModelError, match="outside the model's folder"):
        load(path)
    data.unlink()
    data.symlink_to(data)
    with pytest.raises(ModelError, match="cannot be read"):
        load(path)
    data.unlink()
    os.link(outside, data)
    np.testing.assert_array_equal(load(path).graph.initializers["w"].const_value.numpy(), WEIGHT)


def test_caches_of_links(tmp_path: Path) -> None:
    """A snapshot folder of links into a folder of blobs, as hubs keep them."""
    real = external(tmp_path / "real")
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for number, name in enumerate(["m.onnx", "weights.bin"]):
        shutil.move(real.parent / name, blobs / f"{number}")
        (snapshot / name).symlink_to(blobs / f"{number}")
    np.testing.assert_array_equal(load(snapshot / "m.onnx").graph.initializers["w"].const_value.numpy(), WEIGHT)


def test_named_pipe_as_data(tmp_path: Path) -> None:
    path = external(tmp_path)
    (tmp_path / "weights.bin").unlink()
    os.mkfifo(tmp_path / "weights.bin")
    with pytest.raises(ModelError, match="not a regular file"):
        load(path)


def test_a_proto_with_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = onnx.load(external(tmp_path), load_external_data=False)
    with pytest.raises(ModelError, match="load the model by its path"):
        load(proto)
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(load(proto).graph.initializers["w"].const_value.numpy(), WEIGHT)


# ---- saving


def test_the_form_is_kept(tmp_path: Path) -> None:
    save(load(external(tmp_path / "e")), tmp_path / "e.onnx")
    (tmp_path / "i.onnx").write_bytes(model_proto("w").SerializeToString())
    save(load(tmp_path / "i.onnx"), tmp_path / "o.onnx")
    assert len(data_files(tmp_path)) == 1
    assert data_files(tmp_path)[0].startswith("e.onnx.")
    for name in ("e.onnx", "o.onnx"):
        np.testing.assert_array_equal(weight(tmp_path / name), WEIGHT)


def test_the_form_can_be_chosen(tmp_path: Path) -> None:
    model = load(external(tmp_path / "e"))
    save(model, tmp_path / "inside.onnx", external_data=False)
    assert data_files(tmp_path) == []
    model = load(tmp_path / "inside.onnx")
    save(model, tmp_path / "out.onnx", external_data=True)
    assert len(data_files(tmp_path)) == 1
    for name in ("inside.onnx", "out.onnx"):
        np.testing.assert_array_equal(weight(tmp_path / name), WEIGHT)


def test_small_tensors_are_embedded(tmp_path: Path) -> None:
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[N] y) <float[1] w = {1}> { y = Add(x, w) }'
    )
    save(load(proto), tmp_path / "o.onnx", external_data=True)
    assert names(tmp_path) == ["o.onnx"]


def test_shared_data_is_written_once(tmp_path: Path) -> None:
    """Tensors that are one object, and tensors at one place of a file."""
    model = load(model_proto("a", "b"))
    model.graph.initializers["b"].const_value = model.graph.initializers["a"].const_value
    save(model, tmp_path / "o.onnx", external_data=True)
    assert (tmp_path / data_files(tmp_path)[0]).stat().st_size == WEIGHT.nbytes
    again = load(tmp_path / "o.onnx")
    folder = tmp_path / "again"
    folder.mkdir()
    save(again, folder / "model.onnx")
    assert (folder / data_files(folder)[0]).stat().st_size == WEIGHT.nbytes
    for name in ("a", "b"):
        np.testing.assert_array_equal(weight(folder / "model.onnx", name), WEIGHT)
    assert model_bytes(again) == sum(path.stat().st_size for path in folder.iterdir())


def test_tensors_are_aligned(tmp_path: Path) -> None:
    proto = model_proto("a", "b", "c")
    for tensor, size in zip(proto.graph.initializer, (1100, 1033, 4099), strict=True):
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(size, size % 100, np.int8), tensor.name))
    save(load(proto), tmp_path / "o.onnx", external_data=True)
    found = load(tmp_path / "o.onnx").graph.initializers
    offsets = [v.const_value.offset for v in found.values()]
    assert offsets == [0, 1152, 4096]
    for value, size in zip(found.values(), (1100, 1033, 4099), strict=True):
        np.testing.assert_array_equal(value.const_value.numpy(), np.full(size, size % 100, np.int8))


def test_the_name_tells_the_content(tmp_path: Path) -> None:
    """The same content under the same name, other content under another."""
    model = load(model_proto("w"))
    save(model, tmp_path / "o.onnx", external_data=True)
    first = data_files(tmp_path)
    inode = (tmp_path / first[0]).stat().st_ino
    save(load(tmp_path / "o.onnx"), tmp_path / "o.onnx")
    assert data_files(tmp_path) == first
    assert (tmp_path / first[0]).stat().st_ino == inode
    model.graph.initializers["w"].const_value = ir.tensor(WEIGHT + 1, name="w")
    save(model, tmp_path / "o.onnx", external_data=True)
    assert len(data_files(tmp_path)) == 1
    assert data_files(tmp_path) != first
    np.testing.assert_array_equal(weight(tmp_path / "o.onnx"), WEIGHT + 1)


def test_the_same_digest_does_not_mean_the_same_content(tmp_path: Path) -> None:
    """Bytes between the samples differ: both models must be right, before and after."""
    elements = 1 << 20
    one = np.zeros(elements, np.uint8)
    two = one.copy()
    two[elements // 2] = 1
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (uint8[N] x) => (uint8[N] y) { y = BitwiseXor(x, w) }'.replace(
            "17", "18"
        )
    )
    model = load(proto_with(proto, one))
    save(model, tmp_path / "o.onnx", external_data=True)
    first = data_files(tmp_path)
    shutil.copy(tmp_path / "o.onnx", tmp_path / "kept.onnx")
    save(load(proto_with(proto, two)), tmp_path / "o.onnx", external_data=True)
    assert len(data_files(tmp_path)) == 2
    assert data_files(tmp_path)[0][:20] == first[0][:20]
    np.testing.assert_array_equal(weight(tmp_path / "kept.onnx"), one)
    np.testing.assert_array_equal(weight(tmp_path / "o.onnx"), two)


def proto_with(proto: onnx.ModelProto, array: np.ndarray) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.graph.initializer.append(onnx.numpy_helper.from_array(array, "w"))
    return copy


def edited(path: Path) -> ir.Model:
    model = load(path)
    old = model.graph.initializers["w"].const_value.numpy()
    model.graph.initializers["w"].const_value = ir.tensor(old + 1, name="w")
    return model


def test_in_place_replaces_own_data_only(tmp_path: Path) -> None:
    path = external(tmp_path)
    for step in range(1, 4):
        save(edited(path), path)
        np.testing.assert_array_equal(weight(path), WEIGHT + step)
        # What somebody else wrote stays; what we wrote before goes.
        assert len(data_files(tmp_path)) == 1
        assert (tmp_path / "weights.bin").exists()


def test_data_that_another_model_uses_stays(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save(load(model_proto("w")), path, external_data=True)
    shutil.copy(path, tmp_path / "copy.onnx")
    save(edited(path), path)
    assert len(data_files(tmp_path)) == 2
    np.testing.assert_array_equal(weight(tmp_path / "copy.onnx"), WEIGHT)


def test_data_stays_when_another_model_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save(load(model_proto("w")), path, external_data=True)
    (tmp_path / "damaged.onnx").write_bytes(path.read_bytes()[:-10])
    save(edited(path), path)
    assert len(data_files(tmp_path)) == 2


def test_going_from_external_to_embedded_removes_the_data(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save(load(model_proto("w")), path, external_data=True)
    model = load(path)
    save(model, path, external_data=False)
    assert names(tmp_path) == ["m.onnx"]
    np.testing.assert_array_equal(weight(path), WEIGHT)
    # The loaded model goes on reading from the file that is gone.
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), WEIGHT)
    save(model, tmp_path / "again.onnx")
    np.testing.assert_array_equal(weight(tmp_path / "again.onnx"), WEIGHT)


def test_data_changed_by_somebody_else_is_noticed(tmp_path: Path) -> None:
    path = external(tmp_path)
    model = load(path)
    with (tmp_path / "weights.bin").open("r+b") as file:
        file.write(b"other")
    os.utime(tmp_path / "weights.bin", ns=(1, 1))
    with pytest.raises(ModelError, match="changed by another program"):
        save(model, tmp_path / "o.onnx")
    assert names(tmp_path) == ["m.onnx", "weights.bin"]
    os.truncate(tmp_path / "weights.bin", 100)
    with pytest.raises(ModelError, match="shorter"):
        model.graph.initializers["w"].const_value.tobytes()


def test_models_that_onnx_ir_loaded(tmp_path: Path) -> None:
    model = ir.load(external(tmp_path))
    save(model, tmp_path / "o.onnx")
    np.testing.assert_array_equal(weight(tmp_path / "o.onnx"), WEIGHT)
    assert len(data_files(tmp_path)) == 1


def test_bodies_and_attributes(tmp_path: Path) -> None:
    """Initializers of bodies become external; large tensors in attributes stay where they are."""
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N] x, bool c) => (float[N] y) '
        "{ k = Constant<value = float[1] {0}>() z = Add(x, k) y = If(c) <then_branch = t () => (a) { a = Add(z, w) }, "
        "else_branch = e () => (b) { b = Identity(z) }> }"
    )
    proto.graph.node[2].attribute[0].g.initializer.append(onnx.numpy_helper.from_array(WEIGHT, "w"))
    proto.graph.node[0].attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(WEIGHT, "k"))
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    save(load(tmp_path / "m.onnx"), tmp_path / "o.onnx", external_data=True)
    assert (tmp_path / data_files(tmp_path)[0]).stat().st_size == WEIGHT.nbytes
    assert onnx.load(tmp_path / "o.onnx", load_external_data=False).graph.node[0].attribute[0].t.raw_data
    save(load(tmp_path / "o.onnx"), tmp_path / "p.onnx", external_data=False)
    saved = onnx.load(tmp_path / "p.onnx").graph.node
    for tensor in (saved[0].attribute[0].t, saved[2].attribute[0].g.initializer[0]):
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), WEIGHT)


@pytest.mark.parametrize("copy_file_range", [True, False], ids=["kernel", "user space"])
def test_copying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy_file_range: bool) -> None:
    """The kernel copies less than it is asked to, or cannot copy at all."""
    elements = 3_000_000
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[N] y) { y = Add(x, w) }'
    )
    array = np.random.default_rng(0).standard_normal(elements).astype(np.float32)
    (tmp_path / "m.onnx").write_bytes(proto_with(proto, array).SerializeToString())
    real: Callable[..., int] = os.copy_file_range

    def reluctant(source: int, target: int, count: int, offset: int) -> int:
        if not copy_file_range or offset > elements:
            raise OSError(18, "Invalid cross-device link")
        return real(source, target, min(count, 100_001), offset)

    monkeypatch.setattr(os, "copy_file_range", reluctant)
    save(load(tmp_path / "m.onnx"), tmp_path / "o.onnx", external_data=True)
    np.testing.assert_array_equal(weight(tmp_path / "o.onnx"), array)


def test_an_existing_folder_in_the_way_of_the_data(tmp_path: Path) -> None:
    model = load(model_proto("w"))
    save(model, tmp_path / "o.onnx", external_data=True)
    name = data_files(tmp_path)[0]
    (tmp_path / name).unlink()
    (tmp_path / "o.onnx").unlink()
    (tmp_path / name).mkdir()
    save(model, tmp_path / "o.onnx", external_data=True)
    np.testing.assert_array_equal(weight(tmp_path / "o.onnx"), WEIGHT)


def test_renaming_the_model_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if target.suffix == ".onnx":
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OutputError, match="Input/output error"):
        save(load(model_proto("w")), tmp_path / "o.onnx", external_data=True)
    assert names(tmp_path) == []
