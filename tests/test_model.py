"""Loading and saving: what is read, what is refused, and that files appear whole or not at all."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, parser

from onnxopt.errors import ModelError, OutputError
from onnxopt.model import check_output, load, model_bytes, save
from onnxopt.proto.tensors import EmbeddedTensor

SMALL = """<ir_version: 8, opset_import: ["": 17], producer_name: "test", metadata_props: ["b": "1", "a": "2"]>
    g (float[N, 3] x) => (float[N, 3] y) <float[3] w = {1, 2, 3}> { t = Add(x, w)  y = Relu(t) }"""


def small() -> onnx.ModelProto:
    return parser.parse_model(SMALL)


def with_weight(elements: int = 4096) -> onnx.ModelProto:
    """A model with one weight that is large enough to stay in its file."""
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[N] y) { y = Add(x, w) }'
    )
    weight = np.arange(elements, dtype=np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return proto


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(folder: Path, proto: onnx.ModelProto, name: str = "m.onnx") -> Path:
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


# ---- loading


def test_load_accepts_paths_protos_and_models(tmp_path: Path) -> None:
    path = write(tmp_path, small())
    by_path, by_text, by_proto = load(path), load(str(path)), load(small())
    assert [n.op_type for n in by_path.graph] == [n.op_type for n in by_text.graph] == ["Add", "Relu"]
    assert by_proto.metadata_props == {"b": "1", "a": "2"}
    assert load(by_proto) is by_proto


def test_load_does_not_change_the_proto() -> None:
    proto = parser.parse_model(
        '<ir_version: 3, opset_import: ["": 9]> g (float[3] x, float[3] w) => (float[3] y)'
        " <float[3] w = {1, 2, 3}> { y = Add(x, w) }"
    )
    before = proto.SerializeToString()
    model = load(proto)
    save_target = model.clone()
    save_target.graph.outputs[0].doc_string = "changed"
    assert proto.SerializeToString() == before


def test_large_weights_stay_in_the_file(tmp_path: Path) -> None:
    tensor = load(write(tmp_path, with_weight())).graph.initializers["w"].const_value
    assert isinstance(tensor, EmbeddedTensor)
    array = tensor.numpy()
    assert array.shape == (4096,)
    assert not array.flags.writeable
    np.testing.assert_array_equal(array, np.arange(4096, dtype=np.float32))
    assert tensor.tobytes() == array.tobytes()


def test_arrays_are_aligned(tmp_path: Path) -> None:
    """Data lies at any offset of a protobuf; what is aligned is a view of the file, what is not is a copy."""
    views = 0
    for padding in range(4):
        proto = with_weight()
        proto.doc_string = proto.graph.initializer[0].name = "n" * (padding + 1)
        proto.graph.node[0].input[1] = proto.graph.initializer[0].name
        model = load(write(tmp_path, proto))
        array = next(iter(model.graph.initializers.values())).const_value.numpy()
        assert array.flags.aligned
        np.testing.assert_array_equal(array, np.arange(4096))
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        views += isinstance(getattr(owner.base, "obj", owner.base), mmap.mmap)
    assert views == 1


@pytest.mark.parametrize("suffix", [".onnxtxt", ".textproto", ".json"])
def test_text_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    save(load(small()), path)
    again = load(path)
    assert [n.op_type for n in again.graph] == ["Add", "Relu"]
    np.testing.assert_array_equal(again.graph.initializers["w"].const_value.numpy(), [1, 2, 3])


def test_text_formats_hold_large_weights_too(tmp_path: Path) -> None:
    source = load(write(tmp_path, with_weight()))
    save(source, tmp_path / "m.textproto")
    array = load(tmp_path / "m.textproto").graph.initializers["w"].const_value.numpy()
    np.testing.assert_array_equal(array, np.arange(4096, dtype=np.float32))


def test_the_garbage_collector_is_as_it_was(tmp_path: Path) -> None:
    path = write(tmp_path, small())
    for switch, expected in ((gc.disable, False), (gc.enable, True)):
        switch()
        try:
            save(load(path), tmp_path / "o.onnx")
            assert gc.isenabled() is expected
        finally:
            gc.enable()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "a PNG image"),
        (b"hello world, this is a readme\n" * 5, "text"),
        (b"<!DOCTYPE html><html>not found</html>", "a web page"),
        (b"  <html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(50), "a ZIP archive"),
        (b"\x1f\x8b\x08" + bytes(50), "gzip"),
        (bytes(4) + b"ORTM" + bytes(20), "ORT format"),
        (bytes(4) + b"TFL3" + bytes(20), "TensorFlow Lite"),
        (b"\x40\x00\x00\x00\x00\x00\x00\x00" + b'{"a":1}', "safetensors"),
        (bytes(100), "not an ONNX model"),
        (b"\xff" * 64, "not an ONNX model"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=complaint) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load(tmp_path / "nothing.onnx")
    with pytest.raises(ModelError, match="is a folder"):
        load(tmp_path)


def test_named_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="not a regular file"):
        load(tmp_path / "pipe")


@pytest.mark.parametrize("elements", [3, 4096])
def test_truncated_at_every_length(tmp_path: Path, elements: int) -> None:
    whole = with_weight(elements).SerializeToString()
    path = tmp_path / "m.onnx"
    for length in range(1, len(whole), max(1, len(whole) // 150)):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            load(path)


def test_truncated_says_so(tmp_path: Path) -> None:
    whole = with_weight().SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="truncated or damaged"):
        load(path)


def test_random_damage_never_escapes(tmp_path: Path) -> None:
    """A flipped byte may go unnoticed, but whatever is noticed is a ModelError."""
    whole = with_weight(300).SerializeToString()
    rng = np.random.default_rng(0)
    path = tmp_path / "m.onnx"
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for position in rng.integers(0, len(whole), 3):
            damaged[position] = rng.integers(0, 256)
        # The structure is at both ends; the weight is in the middle.
        damaged[int(rng.integers(0, 60))] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(damaged)
        try:
            model = load(path)
        except ModelError:
            refused += 1
        else:
            for value in model.graph.initializers.values():
                value.const_value.numpy()
    assert refused > 100


def test_text_that_does_not_parse(tmp_path: Path) -> None:
    for suffix in (".onnxtxt", ".textproto", ".json"):
        path = tmp_path / f"m{suffix}"
        path.write_text("certainly { not a model")
        with pytest.raises(ModelError, match="cannot be parsed"):
            load(path)


# ---- saving


PEAK = """
import sys
from pathlib import Path
from onnxopt.model import load, model_bytes, save

def peak():
    (line,) = [l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")]
    return int(line.split()[1]) // 1024

before = peak()
model = load(sys.argv[1])
model.graph.doc_string = "edited"
model_bytes(model)
for external in (None, True, False):
    save(model, sys.argv[2], external_data=external)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("external", [False, True])
def test_weights_do_not_enter_memory(tmp_path: Path, external: bool) -> None:
    """Loading and saving 96 MB in every form takes a fraction of that."""
    path = write(tmp_path, with_weight(24 << 20))
    if external:
        save(load(path), path, external_data=True)
    command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / "o.onnx")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < 24
    assert onnx.numpy_helper.to_array(onnx.load(tmp_path / "o.onnx").graph.initializer[0])[-1] == (24 << 20) - 1


@pytest.mark.parametrize("proto", [small, with_weight], ids=["small", "weight"])
def test_unedited_models_come_out_as_the_same_bytes(tmp_path: Path, proto: Callable[[], onnx.ModelProto]) -> None:
    path = write(tmp_path, proto())
    model = load(path)
    save(model, tmp_path / "o.onnx")
    assert (tmp_path / "o.onnx").read_bytes() == path.read_bytes()
    save(model.clone(), tmp_path / "o.onnx")
    assert (tmp_path / "o.onnx").read_bytes() == path.read_bytes()
    assert model_bytes(model) == path.stat().st_size


def test_unedited_models_keep_what_no_protobuf_library_writes(tmp_path: Path) -> None:
    """Fields out of order and unknown fields survive as long as nothing is edited."""
    proto = small()
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    raw = (
        b"\x3a"
        + bytes([len(graph) & 0x7F | 0x80, len(graph) >> 7])
        + graph
        + proto.SerializeToString()
        + b"\xa0\x1f\x01"
    )
    path = tmp_path / "m.onnx"
    path.write_bytes(raw)
    model = load(path)
    save(model, tmp_path / "o.onnx")
    assert (tmp_path / "o.onnx").read_bytes() == raw
    model.graph.doc_string = "edited"
    save(model, tmp_path / "o.onnx")
    assert onnx.load(tmp_path / "o.onnx").graph.doc_string == "edited"


def test_edits_are_saved(tmp_path: Path) -> None:
    """Also those that change neither the number of nodes nor that of initializers."""
    path = write(tmp_path, with_weight())
    model = load(path)
    next(iter(model.graph)).name = "renamed"
    save(model, tmp_path / "o.onnx")
    assert onnx.load(tmp_path / "o.onnx").graph.node[0].name == "renamed"

    model = load(path)
    model.graph.initializers["w"].const_value = ir.tensor(np.zeros(4096, np.float32), name="w")
    save(model, tmp_path / "o.onnx")
    assert not onnx.numpy_helper.to_array(onnx.load(tmp_path / "o.onnx").graph.initializer[0]).any()


def test_equal_weights_of_another_file_are_not_taken_for_this_one(tmp_path: Path) -> None:
    one, two = load(write(tmp_path, with_weight(), "1.onnx")), load(write(tmp_path, with_weight(), "2.onnx"))
    changed = with_weight()
    changed.graph.initializer[0].raw_data = bytes(4096 * 4)
    three = load(write(tmp_path, changed, "3.onnx"))
    one.graph.initializers["w"].const_value = three.graph.initializers["w"].const_value
    save(one, tmp_path / "o.onnx")
    assert not onnx.numpy_helper.to_array(onnx.load(tmp_path / "o.onnx").graph.initializer[0]).any()
    save(two, tmp_path / "o.onnx")
    assert onnx.numpy_helper.to_array(onnx.load(tmp_path / "o.onnx").graph.initializer[0]).any()


def test_save_over_the_input(tmp_path: Path) -> None:
    path = write(tmp_path, with_weight())
    model = load(path)
    model.graph.doc_string = "again"
    save(model, path)
    save(model, path)
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), np.arange(4096))
    assert onnx.load(path).graph.doc_string == "again"
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(onnx.load(path).graph.initializer[0]), np.arange(4096))
    assert names(tmp_path) == ["m.onnx"]


def test_a_file_that_was_overwritten_in_place_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, with_weight())
    model = load(path)
    with path.open("r+b") as file:
        file.seek(200)
        file.write(b"other")
    os.utime(path, ns=(1, 1))
    with pytest.raises(ModelError, match="written|changed"):
        save(model, tmp_path / "o.onnx")
    assert names(tmp_path) == ["m.onnx"]


def test_permissions_and_links(tmp_path: Path) -> None:
    path = write(tmp_path, small())
    path.chmod(0o640)
    (tmp_path / "link.onnx").symlink_to(path)
    model = load(tmp_path / "link.onnx")
    model.graph.doc_string = "new"
    save(model, tmp_path / "link.onnx")
    assert not (tmp_path / "link.onnx").is_symlink()
    assert onnx.load(path).graph.doc_string == ""
    save(model, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    old = os.umask(0o027)
    try:
        save(model, tmp_path / "new.onnx")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "new.onnx").stat().st_mode) == 0o640


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    model = load(small())
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    for path, complaint in [
        (tmp_path / "none" / "o.onnx", "no folder"),
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "o.onnx", "no folder"),
        (tmp_path / "pipe", "not a regular file"),
        (Path("/dev/null"), "not a regular file"),
        (tmp_path / ("n" * 300), "cannot be written"),
    ]:
        with pytest.raises(OutputError, match=complaint):
            save(model, path)
        with pytest.raises(OutputError, match=complaint):
            check_output(path)
    with pytest.raises(OutputError, match="exists already"):
        save(model, tmp_path / "file", overwrite=False)
    assert names(tmp_path) == ["file", "pipe"]
    assert Path("/dev/null").is_char_device()


def test_write_protection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the system answers, because root may write everywhere."""
    path = write(tmp_path, small())
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda p, mode: Path(p) != path)
        with pytest.raises(OutputError, match="write-protected"):
            save(load(path), path)
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p) != tmp_path)
    with pytest.raises(OutputError, match="folder .* is write-protected"):
        save(load(path), tmp_path / "o.onnx")


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize(
    ("error", "expected"),
    [(OSError(errno.ENOSPC, "No space left on device"), OutputError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["full", "interrupted"],
)
def test_failing_in_the_middle_leaves_everything_as_it_was(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    expected: type[BaseException],
    external: bool,
) -> None:
    path = write(tmp_path, with_weight())
    before = path.read_bytes()
    model = load(path)
    model.graph.doc_string = "edited"
    # After each number of writes and renames once, until saving succeeds.
    for allowed in range(100):
        left = [allowed]

        def limited(function: Callable[..., object], left: list[int] = left) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                if not left[0]:
                    raise error
                left[0] -= 1
                return function(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", limited(os.write))
            patch.setattr(os, "copy_file_range", limited(os.copy_file_range))
            patch.setattr(Path, "replace", limited(Path.replace))
            try:
                save(model, path, external_data=external)
                break
            except expected:
                pass
        assert names(tmp_path) == ["m.onnx"]
        assert path.read_bytes() == before
    assert allowed > 2
    assert onnx.load(path).graph.doc_string == "edited"


def test_a_file_size_limit(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    model = load(write(tmp_path, with_weight(100_000)))
    model.graph.doc_string = "edited"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        for external in (False, True):
            with pytest.raises(OutputError, match="cannot be written: File too large"):
                save(model, tmp_path / "o.onnx", external_data=external)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert names(tmp_path) == ["m.onnx"]


def test_more_than_protobuf_can_hold(tmp_path: Path) -> None:
    """Without two gigabytes: the tensor only says that it has them."""
    model = load(small())
    huge = ir.LazyTensor(lambda: pytest.fail("read"), dtype=ir.DataType.UINT8, shape=ir.Shape([3 << 30]), name="huge")
    model.graph.register_initializer(ir.Value(name="huge", const_value=huge))
    with pytest.raises(OutputError, match="2 GB"):
        save(model, tmp_path / "o.onnx", external_data=False)
    assert model_bytes(model) > 3 << 30
    assert not names(tmp_path)


def test_old_models_get_their_initializers_back_as_inputs(tmp_path: Path) -> None:
    proto = parser.parse_model(
        '<ir_version: 3, opset_import: ["": 9]> g (float[3] w, float[3] x, float[3] v) => (float[3] y)'
        " <float[3] v = {1, 2, 3}, float[3] w = {1, 2, 3}> { t = Add(x, w) y = Add(t, v) }"
    )
    path = write(tmp_path, proto)
    model = load(path)
    assert [v.name for v in model.graph.inputs] == ["x"]
    save(model, tmp_path / "o.onnx")
    assert (tmp_path / "o.onnx").read_bytes() == path.read_bytes()

    model.graph.doc_string = "edited"
    save(model, tmp_path / "o.onnx")
    assert [i.name for i in onnx.load(tmp_path / "o.onnx").graph.input] == ["w", "x", "v"]

    added = ir.tensor(np.ones(3, np.float32), name="new")
    model.graph.register_initializer(
        ir.Value(name="new", const_value=added, type=ir.TensorType(added.dtype), shape=ir.Shape([3]))
    )
    del model.graph.initializers["w"]
    next(iter(model.graph)).replace_input_with(1, model.graph.initializers["new"])
    save(model, tmp_path / "o.onnx")
    saved = onnx.load(tmp_path / "o.onnx")
    assert [i.name for i in saved.graph.input] == ["x", "v", "new"]
    onnx.checker.check_model(saved, full_check=True)


def test_newer_models_keep_overridable_initializers(tmp_path: Path) -> None:
    proto = parser.parse_model(
        '<ir_version: 4, opset_import: ["": 9]> g (float[3] x, float[3] w) => (float[3] y)'
        " <float[3] w = {1, 2, 3}> { y = Add(x, w) }"
    )
    model = load(proto)
    assert [v.name for v in model.graph.inputs] == ["x", "w"]
    assert model.graph.initializers["w"].is_graph_input()


@pytest.mark.parametrize(
    ("dtype", "version"),
    [(ir.DataType.INT4, 10), (ir.DataType.FLOAT8E4M3FN, 9), (ir.DataType.INT2, 13), (ir.DataType.FLOAT, 8)],
)
def test_the_ir_version_is_raised_only_for_what_needs_it(tmp_path: Path, dtype: ir.DataType, version: int) -> None:
    model = load(small())
    tensor = ir.Tensor(np.zeros((4,), dtype.numpy()), dtype=dtype, name="new")
    model.graph.register_initializer(ir.Value(name="new", const_value=tensor))
    save(model, tmp_path / "o.onnx")
    assert onnx.load(tmp_path / "o.onnx").ir_version == version


def test_constants_of_new_nodes_are_streamed(tmp_path: Path) -> None:
    """Weights in memory, in a file and in attributes come out with their data."""
    proto = with_weight()
    constant = helper.make_tensor("c", TensorProto.FLOAT, [2048], np.full(2048, 2, np.float32))
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=constant))
    model = load(write(tmp_path, proto))
    model.graph.register_initializer(ir.Value(name="m", const_value=ir.tensor(np.full(3000, 7, np.int64), name="m")))
    save(model, tmp_path / "o.onnx")
    saved = onnx.load(tmp_path / "o.onnx")
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in saved.graph.initializer}
    np.testing.assert_array_equal(arrays["w"], np.arange(4096))
    np.testing.assert_array_equal(arrays["m"], np.full(3000, 7))
    np.testing.assert_array_equal(
        onnx.helper.get_attribute_value(saved.graph.node[0].attribute[0]).float_data
        or onnx.numpy_helper.to_array(saved.graph.node[0].attribute[0].t),
        np.full(2048, 2),
    )
    assert model_bytes(model) == (tmp_path / "o.onnx").stat().st_size
