"""Content: which tensors are equal, and how little is read to tell."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from onnxopt.analysis.contents import Content


def content(array, **options):
    return Content(ir.tensor(array, **options))


def external(path, array, offset=0):
    data = array.tobytes()
    with path.open("ab") as file:
        file.seek(0, 2)
        offset = file.tell()
        file.write(data)
    dtype = ir.DataType.from_numpy(array.dtype)
    return ir.ExternalTensor(
        path.name, offset, len(data), dtype, shape=ir.Shape(array.shape), name="w", base_dir=path.parent
    )


BIG = np.random.default_rng(0).standard_normal(3_000_000).astype(np.float32)
ALMOST = BIG.copy()
ALMOST[1_000_000] += 1


def test_equal_means_equal_to_the_bit():
    assert content(BIG) == content(BIG.copy())
    assert hash(content(BIG)) == hash(content(BIG.copy()))
    assert content(BIG) != content(ALMOST)
    assert content(np.float32(0.0)) != content(np.float32(-0.0))
    nan = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert content(nan[:1]) == content(nan[:1].copy())
    assert content(nan[:1]) != content(nan[1:])


def test_type_and_shape_count():
    assert content(np.zeros(4, np.float32)) != content(np.zeros(4, np.int32))
    assert content(np.zeros(4, np.float32)) != content(np.zeros((2, 2), np.float32))
    assert content(np.zeros(4, np.float16)) != content(np.zeros(4, ml_dtypes.bfloat16))
    assert content(np.zeros(0, np.float32)) == content(np.zeros(0, np.float32))


@pytest.mark.parametrize("where", [0, 63, 99], ids=["front", "middle", "end"])
def test_four_bit_tensors_are_told_apart(where):
    # Packed they take 50 bytes, unpacked 100: more than one sample holds.
    first = np.zeros(100, ml_dtypes.int4)
    second = first.copy()
    second[where] = 1
    assert content(first) == content(first.copy())
    assert content(first) != content(second)


def test_strings():
    first, second = (
        ir.StringTensor([t.encode() for t in text], shape=ir.Shape([2])) for text in (["ab", "c"], ["a", "bc"])
    )
    assert Content(first) == Content(ir.StringTensor([b"ab", b"c"], shape=ir.Shape([2])))
    assert Content(first) != Content(second)


def test_external_data_equals_the_same_data_in_memory(tmp_path):
    path = tmp_path / "weights"
    first, second, third = external(path, BIG), external(path, BIG), external(path, ALMOST)
    assert Content(first) == Content(second) == content(BIG)
    assert Content(first) != Content(third)


def test_different_samples_settle_it_without_reading_on(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    first, second = Content(external(path, BIG)), Content(external(path, BIG[::-1].copy()))
    monkeypatch.setattr(ir.ExternalTensor, "tofile", lambda *_: pytest.fail("read in full"))
    assert first != second
