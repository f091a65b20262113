"""The user's data: every form, lazily, and what is said about data that does not fit."""

from __future__ import annotations

import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.errors import DataError
from onnxopt.feeds import load_data, load_labels


def model(inputs: str) -> ir.Model:
    return ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => (float y) {{ y = Constant<value_float = 1.0>() }}'
    )


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


IMAGES = model("float[batch, 1, 2, 2] image")


def test_samples_lie_along_the_first_axis(tmp_path: Path) -> None:
    images = np.arange(20, dtype=np.float32).reshape(5, 1, 2, 2)
    data = load_data(npz(tmp_path / "d.npz", image=images), IMAGES)
    assert len(data) == 5
    assert data.name == str(tmp_path / "d.npz")
    assert data.notes == ()
    for _ in range(2):
        found = list(data)
        assert [f["image"].shape for f in found] == [(1, 1, 2, 2)] * 5
        np.testing.assert_array_equal(np.concatenate([f["image"] for f in found]), images)
    assert len(data.take(2)) == len(list(data.take(2))) == 2
    assert len(data.take(9)) == len(list(data.take(9))) == 5
    assert len(data.take(4).take(3)) == 3


def test_compressed_archives_too(tmp_path: Path) -> None:
    images = np.arange(20, dtype=np.float32).reshape(5, 1, 2, 2)
    np.savez_compressed(tmp_path / "d.npz", image=images)
    found = np.concatenate([f["image"] for f in load_data(tmp_path / "d.npz", IMAGES)])
    np.testing.assert_array_equal(found, images)


def test_arrays_stored_by_columns(tmp_path: Path) -> None:
    images = np.asfortranarray(np.arange(20, dtype=np.float32).reshape(5, 1, 2, 2))
    found = [f["image"] for f in load_data(npz(tmp_path / "d.npz", image=images), IMAGES)]
    np.testing.assert_array_equal(np.concatenate(found), images)
    assert all(f.flags.c_contiguous for f in found)


@pytest.mark.parametrize(
    ("declared", "stored", "sample", "count"),
    [
        ("float[batch, 3]", (6, 3), (1, 3), 6),
        ("float[?, 3]", (6, 3), (1, 3), 6),
        ("float[1, 3]", (6, 3), (1, 3), 6),
        ("float[2, 3]", (6, 3), (2, 3), 3),
        ("float[6, 3]", (6, 3), (6, 3), 1),
        ("float[2, 3]", (7, 3), (2, 3), 3),
        ("float[4, 3]", (6, 4, 3), (4, 3), 6),
        ("float[seq, 3]", (6, 3), (6, 3), 1),
        ("float[seq, 3]", (5, 6, 3), (6, 3), 5),
        ("float[batch, 3]", (5, 6, 3), (6, 3), 5),
        ("float", (4,), (), 4),
        ("float", (), (), 1),
        ("float[batch, a, b]", (4, 9, 2), (1, 9, 2), 4),
        ("float[batch, 0]", (4, 0), (1, 0), 4),
    ],
)
def test_how_an_array_fills_an_input(
    declared: str, stored: tuple[int, ...], sample: tuple[int, ...], count: int, tmp_path: Path
) -> None:
    array = np.random.default_rng(0).random(stored, dtype=np.float32)
    data = load_data(npz(tmp_path / "d.npz", x=array), model(f"{declared.replace('?', 'd0')} x"))
    assert len(data) == count
    found = [f["x"] for f in data]
    assert [f.shape for f in found] == [sample] * count
    flat = np.concatenate([f.reshape(-1) for f in found])
    np.testing.assert_array_equal(flat, array.reshape(-1)[: flat.size])


def test_rows_that_do_not_fill_a_batch_are_noted(tmp_path: Path) -> None:
    data = load_data(npz(tmp_path / "d.npz", x=np.zeros((7, 3), np.float32)), model("float[2, 3] x"))
    assert data.notes == (f"{tmp_path / 'd.npz'}, key x: the last 1 rows are left out; the model takes 2 at a time.",)


def test_several_inputs_walk_together(tmp_path: Path) -> None:
    path = npz(
        tmp_path / "d.npz",
        ids=np.arange(12).reshape(4, 3),
        state=np.arange(8, dtype=np.float32).reshape(4, 2, 1),
        rate=np.array(16000),
        shared=np.array([[7]], np.float32),
    )
    declared = model("int64[batch, seq] ids, float[2, 1] state, int64 rate, float[batch, 1] shared")
    found = list(load_data(path, declared))
    assert [f["ids"].tolist() for f in found] == [[[0, 1, 2]], [[3, 4, 5]], [[6, 7, 8]], [[9, 10, 11]]]
    assert [f["state"].tolist() for f in found] == [[[0], [1]], [[2], [3]], [[4], [5]], [[6], [7]]]
    assert [f["rate"].item() for f in found] == [16000] * 4
    assert [f["shared"].tolist() for f in found] == [[[7]]] * 4


def test_groups_have_a_shape_of_their_own(tmp_path: Path) -> None:
    groups = {f"{i}/gpu_0/ids": np.arange(i + 1)[None] for i in (10, 2, 1)}
    declared = model("int64[batch, seq] ids")
    declared.graph.inputs[0].name = "gpu_0/ids"
    data = load_data(npz(tmp_path / "d.npz", **groups), declared)
    assert len(data) == 3
    assert [f["gpu_0/ids"].shape for f in data] == [(1, 2), (1, 3), (1, 11)]


def test_a_name_with_a_slash_is_no_group(tmp_path: Path) -> None:
    declared = model("float[batch, 2] x")
    declared.graph.inputs[0].name = "0/x"
    assert len(load_data(npz(tmp_path / "d.npz", **{"0/x": np.zeros((3, 2), np.float32)}), declared)) == 3


def test_a_folder_holds_samples_in_natural_order(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        npz(tmp_path / f"s{number}.npz", image=np.full((1, 1, 2, 2), number, np.float32))
    npz(tmp_path / "t.npz", **{f"{i:04}/image": np.full((2, 1, 2, 2), i, np.float32) for i in (20, 21)})
    (tmp_path / "readme.txt").write_text("not data")
    data = load_data(tmp_path, IMAGES)
    assert len(data) == 5
    assert [f["image"].flat[0] for f in data] == [1, 2, 10, 20, 21]
    assert [len(f["image"]) for f in data] == [1, 1, 1, 2, 2]


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.npz files"):
        load_data(tmp_path, IMAGES)


def test_memory_holds_one_sample_at_a_time(tmp_path: Path) -> None:
    path = npz(tmp_path / "d.npz", x=np.zeros((200, 50_000), np.float32))
    data = load_data(path, model("float[batch, 50000] x"))
    tracemalloc.start()
    for _ in data:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000, "of 40 MB"


@pytest.mark.parametrize(
    ("stored", "declared", "noted"),
    [
        (np.array([[1.5, -2.0]]), "float", "x: float64 converted to float."),
        (np.array([[1.5, -2.0]], np.float32), "float16", "x: float32 converted to float16."),
        (np.array([[1.5, -2.0]], np.float32), "bfloat16", "x: float32 converted to bfloat16."),
        (np.array([[1.5, -2.0]], np.float32), "double", "x: float32 converted to double."),
        (np.array([[1, 2]], np.int32), "int64", "x: int32 converted to int64."),
        (np.array([[1, 2]]), "int32", "x: int64 converted to int32."),
        (np.array([[1, 2]]), "uint8", "x: int64 converted to uint8."),
        (np.array([[1, 2]], np.uint8), "float", "x: uint8 converted to float."),
        (np.array([[True, False]]), "int64", "x: bool converted to int64."),
        (np.array([[1, 2]]), "int64", None),
        (np.array([["a", "ü"]]), "string", None),
        (np.array([[b"a", b"b"]]), "string", None),
    ],
)
def test_safe_conversions_are_made_and_noted(
    stored: np.ndarray, declared: str, noted: str | None, tmp_path: Path
) -> None:
    data = load_data(npz(tmp_path / "d.npz", x=stored), model(f"{declared}[batch, 2] x"))
    assert data.notes == (() if noted is None else (noted,))
    (feed,) = data
    assert feed["x"].dtype == (object if declared == "string" else ir.DataType[declared.upper()].numpy())
    expected = [[s.decode() if isinstance(s, bytes) else s for s in row] for row in stored.tolist()]
    assert feed["x"].tolist() == expected


def test_bfloat16_is_stored_as_raw_bytes(tmp_path: Path) -> None:
    stored = np.array([[1, 2]]).astype(ml_dtypes.bfloat16)
    (feed,) = load_data(npz(tmp_path / "d.npz", x=stored), model("bfloat16[batch, 2] x"))
    np.testing.assert_array_equal(feed["x"], stored)


@pytest.mark.parametrize(
    ("stored", "declared"),
    [
        (np.array([[1.5, 2.0]]), "int64"),
        (np.array([[1, 2]]), "float"),
        (np.array([[1, 2]]), "bool"),
        (np.array([["a", "b"]]), "float"),
        (np.array([[1, 2]]), "string"),
        (np.array([[1j, 2]]), "float"),
    ],
)
def test_unsafe_conversions_are_refused(stored: np.ndarray, declared: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"d\.npz, key x: .* cannot be converted to {declared} safely"):
        load_data(npz(tmp_path / "d.npz", x=stored), model(f"{declared}[batch, 2] x"))


def test_integers_that_do_not_fit_are_refused_when_they_are_read(tmp_path: Path) -> None:
    data = load_data(npz(tmp_path / "d.npz", x=np.array([[1, 2], [3, 300]])), model("uint8[batch, 2] x"))
    samples = iter(data)
    next(samples)
    with pytest.raises(DataError, match="values outside 0 to 255 do not fit"):
        next(samples)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"imag": np.zeros((1, 1, 2, 2))}, r'd\.npz: the model has no input "imag"\. Did you mean "image"\?'),
        ({"0000/imag": np.zeros((1, 1, 2, 2))}, r'd\.npz, sample 0000: the model has no input "imag"'),
        (
            {"image": np.zeros((3, 2, 2))},
            r"key image: an array of shape \[3, 2, 2\] does not fit float \[batch, 1, 2, 2\]",
        ),
        ({"image": np.zeros((3, 1, 2, 3))}, r"shape \[3, 1, 2, 3\] does not fit"),
        ({"0000/image": np.zeros((1, 3, 2, 2))}, r"key 0000/image: an array of shape \[1, 3, 2, 2\] does not fit"),
        ({"image": np.zeros((0, 1, 2, 2))}, r"key image: an array of shape \[0, 1, 2, 2\] holds no samples"),
        ({}, "holds no arrays"),
    ],
)
def test_data_that_does_not_fit(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_data(npz(tmp_path / "d.npz", **arrays), IMAGES)


@pytest.mark.parametrize("prefix", ["", "0000/"])
def test_a_missing_input_is_named(prefix: str, tmp_path: Path) -> None:
    path = npz(tmp_path / "d.npz", **{f"{prefix}a": np.zeros((1, 2), np.float32)})
    with pytest.raises(DataError, match=r'there is no array for the input "b" \(int64 \[n, 3\]\)'):
        load_data(path, model("float[n, 2] a, int64[n, 3] b"))


def test_arrays_with_different_numbers_of_samples(tmp_path: Path) -> None:
    path = npz(tmp_path / "d.npz", a=np.zeros((4, 2), np.float32), b=np.zeros((3, 2), np.float32))
    with pytest.raises(DataError, match=r"key b has 3 samples, but a has 4"):
        load_data(path, model("float[n, 2] a, float[n, 2] b"))


def test_inputs_with_a_default_may_be_left_out(tmp_path: Path) -> None:
    declared = model("float[n, 1] x, float[1] w = {1}, optional(float[2]) o")
    assert list(next(iter(load_data(npz(tmp_path / "d.npz", x=np.zeros((1, 1), np.float32)), declared)))) == ["x"]


def test_sequences_need_a_function(tmp_path: Path) -> None:
    with pytest.raises(DataError, match='input "s" is no tensor; give such inputs with module:function'):
        load_data(npz(tmp_path / "d.npz", s=np.zeros(2)), model("seq(float[2]) s"))


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    path = npz(tmp_path / "d.npz", image=np.array([{"a": 1}], object))
    with pytest.raises(DataError, match=r"key image: an array of Python objects is a pickle"):
        load_data(path, IMAGES)


@pytest.mark.parametrize("keep", [0, 10, 200, -30])
def test_a_truncated_archive(keep: int, tmp_path: Path) -> None:
    path = npz(tmp_path / "d.npz", image=np.zeros((50, 1, 2, 2), np.float32))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"d\.npz cannot be read; it is damaged or no \.npz"):
        load_data(path, IMAGES)


def test_a_truncated_array(tmp_path: Path) -> None:
    path = npz(tmp_path / "d.npz", image=np.zeros((50, 1, 2, 2), np.float32))
    with zipfile.ZipFile(path) as archive:
        content = archive.read("image.npy")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("image.npy", content[:-4])
    with pytest.raises(DataError, match="key image: the array is truncated"):
        load_data(path, IMAGES)


def test_a_corrupted_array(tmp_path: Path) -> None:
    path = npz(tmp_path / "d.npz", image=np.arange(4000, dtype=np.float32).reshape(1000, 1, 2, 2))
    content = bytearray(path.read_bytes())
    content[9000] ^= 255
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"d\.npz cannot be read"):
        list(load_data(path, IMAGES))


def test_something_that_is_no_array(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("image.npy", b"hello")
    with pytest.raises(DataError, match="cannot be read"):
        load_data(tmp_path / "d.npz", IMAGES)


def test_no_such_data() -> None:
    with pytest.raises(DataError, match=r"There is no data nothing\.npz; give an \.npz, a folder"):
        load_data("nothing.npz", IMAGES)


# ---------------------------------------------------------------------------------------------- functions

SOURCE = """
import numpy as np

def images():
    for i in range(3):
        yield {"image": np.full((1, 1, 2, 2), i, np.float64)}

def late():
    import own_sibling
    yield {"image": own_sibling.IMAGE}

def none(): return []
def lists(): return [{"s": [[1.0, 2.0], [3.0, 4.0]], "o": None}]
def number(): return 5
def numbers(): return [5]
def unknown(): return [{"imag": 1}]
def missing(): return [{}]
def wrong_shape(): return [{"image": np.zeros((1, 2))}]
def wrong_type(): return [{"image": np.zeros((1, 1, 2, 2), complex)}]
def later(): return [{"image": np.zeros((1, 1, 2, 2))}, {"image": np.zeros((1, 2))}]
def failing():
    raise KeyError("oops")
thing = 5
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_samples.py").write_text(SOURCE)
    (tmp_path / "own_sibling.py").write_text("import numpy as np\nIMAGE = np.ones((1, 1, 2, 2), np.float32)")
    monkeypatch.chdir(tmp_path)
    for name in ("own_samples", "own_sibling"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_a_function_yields_samples(project: Path) -> None:
    before = list(sys.path)
    data = load_data("own_samples:images", IMAGES)
    assert len(data) == 3
    for _ in range(2):
        assert [f["image"].flat[0] for f in data] == [0, 1, 2]
    assert next(iter(data))["image"].dtype == np.float32
    assert len(list(data.take(2))) == 2
    assert sys.path == before


def test_a_function_may_import_its_neighbours_late(project: Path) -> None:
    assert len(load_data("own_samples:late", IMAGES)) == 1


def test_a_function_can_yield_lists_and_nothing(project: Path) -> None:
    (feed,) = load_data("own_samples:lists", model("seq(float[2]) s, optional(float[2]) o"))
    assert [a.tolist() for a in feed["s"]] == [[1, 2], [3, 4]]
    assert feed["s"][0].dtype == np.float32
    assert feed["o"] is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_samples:none", "yields no samples"),
        ("own_samples:number", "own_samples:number raised TypeError"),
        ("own_samples:numbers", "sample 0: a dict of input names and arrays is expected, not int"),
        ("own_samples:unknown", r'sample 0: the model has no input "imag"\. Did you mean "image"\?'),
        ("own_samples:missing", r'sample 0: there is no value for the input "image" \(float \[batch, 1, 2, 2\]\)'),
        ("own_samples:wrong_shape", r'sample 0, input "image": an array of shape \[1, 2\] does not fit'),
        ("own_samples:wrong_type", 'sample 0, input "image": complex128 cannot be converted to float safely'),
        ("own_samples:failing", "own_samples:failing raised KeyError: 'oops'"),
        ("own_samples:thing", "the module own_samples has no function thing"),
        ("own_samples:nothing", "the module own_samples has no function nothing"),
        ("own_other:nothing", "importing the module raised ModuleNotFoundError"),
    ],
)
def test_functions_that_do_not_work(name: str, message: str, project: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_data(name, IMAGES)


def test_a_later_sample_that_does_not_fit(project: Path) -> None:
    data = load_data("own_samples:later", IMAGES)
    with pytest.raises(DataError, match=r'sample 1, input "image": an array of shape'):
        list(data)


# ---------------------------------------------------------------------------------------------- labels


def test_labels(tmp_path: Path) -> None:
    labels = np.array([3, 1, 2])
    np.save(tmp_path / "l.npy", labels)
    np.savez(tmp_path / "l.npz", labels)
    for name in ("l.npy", "l.npz"):
        np.testing.assert_array_equal(load_labels(tmp_path / name), labels)


def test_labels_that_cannot_be_used(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", a=np.zeros(2), b=np.zeros(2))
    np.save(tmp_path / "pickle.npy", np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "scalar.npy", np.array(5))
    (tmp_path / "text.npy").write_text("1 2 3")
    for name, message in [
        ("two.npz", "holds 2 arrays"),
        ("pickle.npy", "without pickles"),
        ("scalar.npy", "one entry per sample"),
        ("text.npy", "cannot be read"),
        ("nothing.npy", "There is no file of labels"),
    ]:
        with pytest.raises(DataError, match=message):
            load_labels(tmp_path / name)


@settings(deadline=None, max_examples=50)
@given(
    rows=st.integers(1, 5),
    rest=st.lists(st.integers(0, 3), max_size=3),
    dtype=st.sampled_from(["f4", ">f4", "f8", "i8", "i4", "u1", "?", "U3", "S2", "c8", "f2"]),
    declared=st.sampled_from(["float", "int64", "bool", "string", "uint8", "double"]),
    group=st.booleans(),
    fortran=st.booleans(),
)
def test_any_archive_is_read_or_refused_in_words(
    rows: int,
    rest: list[int],
    dtype: str,
    declared: str,
    group: bool,
    fortran: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    array = np.ones((rows, *rest)).astype(dtype)
    path = npz(
        tmp_path_factory.mktemp("data") / "d.npz",
        **{"0/x" if group else "x": np.asfortranarray(array) if fortran else array},
    )
    dims = ", ".join(["batch", *map(str, rest)])
    try:
        found = list(load_data(path, model(f"{declared}[{dims}] x")))
    except DataError as error:
        assert "cannot be converted" in str(error)
        return
    assert np.concatenate([f["x"] for f in found]).shape == array.shape
    assert all(f["x"].dtype == ir.DataType[declared.upper()].numpy() for f in found)
