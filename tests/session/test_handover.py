"""What goes into the proto of a session and what does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from onnxopt import model as models
from onnxopt.session import handover

LARGE = 5000


def model_with(**weights: np.ndarray) -> ir.Model:
    sums = "".join(f" s{i} = Add({'x' if i == 0 else f's{i - 1}'}, {name})" for i, name in enumerate(weights))
    model = ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[N] s{len(weights) - 1}) {{{sums} }}'
    )
    values = {v.name: v for node in model.graph for v in node.inputs if v is not None}
    for name, array in weights.items():
        values[name].const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(values[name])
    return model


def locations(proto: bytes) -> dict[str, str]:
    """Initializer -> where its data is; empty for data inside the proto."""
    graph = onnx.ModelProto.FromString(proto).graph
    return {t.name: t.external_data[0].value if t.external_data else "" for t in graph.initializer}


def test_large_arrays_stay_out_of_the_proto() -> None:
    model = model_with(w=np.zeros(LARGE, np.float32), s=np.zeros(1, np.float32))
    parts = handover.prepare(model)
    assert list(parts.injected) == ["w"]
    assert parts.folder is None
    assert len(parts.proto) < 1000
    assert locations(parts.proto)["s"] == ""


def test_external_data_stays_where_it_is(tmp_path: Path) -> None:
    ir.save(
        model_with(w=np.zeros(LARGE, np.float32)),
        tmp_path / "m.onnx",
        external_data="m.data",
        size_threshold_bytes=0,
    )
    model = models.load(tmp_path / "m.onnx")
    model.graph.register_initializer(
        ir.Value(name="new", const_value=ir.tensor(np.zeros(LARGE, np.float32), name="new"))
    )
    model.graph[0].replace_input_with(0, model.graph.initializers["new"])
    parts = handover.prepare(model)
    assert parts.folder == str(tmp_path)
    assert list(parts.injected) == ["new"]
    assert locations(parts.proto)["w"] == "m.data"


def test_weights_inside_the_model_file_stay_there(tmp_path: Path) -> None:
    ir.save(model_with(w=np.zeros(LARGE, np.float32)), tmp_path / "m.onnx")
    parts = handover.prepare(models.load(tmp_path / "m.onnx"))
    assert parts.folder == str(tmp_path)
    assert not parts.injected
    assert locations(parts.proto) == {"w": "m.onnx"}


def test_a_link_out_of_the_folder_is_not_left_to_the_runtime(tmp_path: Path) -> None:
    """Caches of model hubs link the files of a model into a folder of blobs; the runtime refuses to follow."""
    (tmp_path / "blobs").mkdir()
    ir.save(
        model_with(w=np.ones(LARGE, np.float32)),
        tmp_path / "blobs" / "m.onnx",
        external_data="m.data",
        size_threshold_bytes=0,
    )
    (tmp_path / "snapshot").mkdir()
    for name in ("m.onnx", "m.data"):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    parts = handover.prepare(models.load(tmp_path / "snapshot" / "m.onnx"))
    assert parts.folder is None
    assert list(parts.injected) == ["w"]


def test_initializers_of_old_models_are_no_inputs_of_the_session() -> None:
    model = model_with(w=np.zeros(LARGE, np.float32), s=np.zeros(1, np.float32))
    model.ir_version = 3
    proto = onnx.ModelProto.FromString(handover.prepare(model).proto)
    assert proto.ir_version >= 4
    assert [v.name for v in proto.graph.input] == ["x"]


def test_unused_initializers_are_dropped() -> None:
    model = model_with(w=np.zeros(LARGE, np.float32))
    model.graph.register_initializer(ir.Value(name="unused", const_value=ir.tensor(np.zeros(LARGE, np.float32))))
    parts = handover.prepare(model)
    assert set(locations(parts.proto)) == {"w"}
    assert "unused" in model.graph.initializers


def test_the_weights_are_not_copied() -> None:
    weight = np.zeros(LARGE, np.float32)
    parts = handover.prepare(model_with(w=weight))
    assert np.shares_memory(parts.injected["w"].numpy(), weight)
