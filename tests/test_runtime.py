"""Sessions: how models are handed over, typed values, providers, and what failures say."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from onnxopt import model as models
from onnxopt import runtime
from onnxopt.errors import RuntimeFailure, UsageError
from onnxopt.runtime import RunOptions, evaluate_node, open_session
from onnxopt.session.loaded import ValueInfo

LARGE = 5000
"""Elements of an initializer that does not go into the session's proto."""


def parse(text: str, opset: int = 21) -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}')


def add_initializer(model: ir.Model, name: str, array: np.ndarray | ir.TensorProtocol) -> ir.Model:
    """Give a value that the nodes use a constant, as a pass would; a new one when no node uses it."""
    tensor = ir.tensor(array, name=name)
    used = [v for node in model.graph for v in node.inputs if v is not None and v.name == name]
    value = used[0] if used else ir.Value(name=name)
    value.const_value, value.dtype, value.shape = tensor, tensor.dtype, ir.Shape(tensor.shape)
    model.graph.register_initializer(value)
    return model


def with_weight(array: np.ndarray, nodes: str = "y = Add(x, w)") -> ir.Model:
    return add_initializer(
        parse(f"g (float{list(array.shape)} x) => (float{list(array.shape)} y) {{ {nodes} }}"), "w", array
    )


def saved(model: ir.Model, folder: Path, name: str = "model.onnx") -> Path:
    """Write a model with its weights as external data."""
    folder.mkdir(exist_ok=True, parents=True)
    ir.save(model, folder / name, external_data=f"{name}.data", size_threshold_bytes=0)
    return folder / name


def result(model: ir.Model, optimized: bool = False, **feed: object) -> np.ndarray:
    with open_session(model, optimized=optimized) as session:
        return next(iter(session.run(feed).values()))


def test_runs_a_model_and_leaves_it_alone() -> None:
    weight = np.arange(LARGE, dtype=np.float32)
    model = with_weight(weight)
    before = ir.to_proto(model).SerializeToString()
    x = np.ones(LARGE, np.float32)
    for optimized in (False, True):
        np.testing.assert_array_equal(result(model, optimized, x=x), weight + 1)
    assert ir.to_proto(model).SerializeToString() == before


def test_the_runtime_collects_no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr("onnxruntime.disable_telemetry_events", lambda: asked.append(True))
    test_runs_a_model_and_leaves_it_alone()
    assert asked


def test_runs_a_path(tmp_path: Path) -> None:
    path = saved(with_weight(np.arange(LARGE, dtype=np.float32)), tmp_path)
    with open_session(str(path), optimized=True) as session:
        assert session.run({"x": np.zeros(LARGE, np.float32)})["y"][7] == 7
    with pytest.raises(RuntimeFailure, match=r"There is no model file .*nothing\.onnx"):
        open_session(tmp_path / "nothing.onnx", optimized=True)


def test_describes_inputs_and_outputs() -> None:
    with open_session(parse("g (float[N, 3] x) => (float[N, 3] y) { y = Neg(x) }"), optimized=False) as session:
        assert session.inputs == (ValueInfo("x", "tensor(float)", ("N", 3)),)
        assert session.outputs[0].name == "y"
        assert session.load_seconds > 0


@pytest.mark.parametrize(
    "dtype",
    [
        *("float16", "float64", "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
        *("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "int4", "uint4"),
    ],
)
@pytest.mark.parametrize("rows", [3, 9999], ids=["embedded", "injected"])
def test_weights_of_every_type(dtype: str, rows: int) -> None:
    numbers = np.arange(rows * 3).reshape(rows, 3) % 7
    array = numbers.astype(getattr(ml_dtypes, dtype, dtype))
    model = parse(f"g (float[3] x) => (float[{rows}, 3] y) {{ z = Cast<to = 1>(w) y = Add(x, z) }}")
    add_initializer(model, "w", array)
    expected = numbers != 0 if dtype == "bool" else numbers
    np.testing.assert_array_equal(result(model, x=np.zeros(3, np.float32)), expected.astype(np.float32))


@pytest.mark.parametrize("shape", [(0, 3), (), (0,)])
def test_weights_of_unusual_shape(shape: tuple[int, ...]) -> None:
    model = with_weight(np.zeros(shape, np.float32))
    assert result(model, x=np.ones(shape, np.float32)).shape == shape


def test_weights_that_are_not_contiguous() -> None:
    weight = np.arange(LARGE * 2, dtype=np.float32).reshape(2, LARGE).T
    np.testing.assert_array_equal(result(with_weight(weight), x=np.zeros((LARGE, 2), np.float32)), weight)


def test_weights_of_strings() -> None:
    words = np.array(["a", "b", "ü"] * 2000, object)
    model = parse("g (int64[K] x) => (string[K] y) { y = Gather(w, x) }")
    add_initializer(model, "w", ir.StringTensor([w.encode() for w in words], shape=ir.Shape([6000]), name="w"))
    assert result(model, x=np.array([2, 0])).tolist() == ["ü", "a"]


def test_an_unused_weight_is_no_obstacle() -> None:
    model = with_weight(np.ones(LARGE, np.float32), "y = Neg(x)")
    assert not model.graph.initializers["w"].uses()
    assert result(model, x=np.ones(LARGE, np.float32))[0] == -1


def test_a_weight_only_dead_code_uses_is_no_obstacle() -> None:
    model = with_weight(np.ones(LARGE, np.float32), "y = Neg(x) dead = Neg(w)")
    assert result(model, x=np.ones(LARGE, np.float32))[0] == -1


def test_a_weight_can_be_an_output() -> None:
    model = with_weight(np.ones(LARGE, np.float32), "y = Neg(x)")
    model.graph.outputs.append(model.graph.initializers["w"])
    with open_session(model, optimized=True) as session:
        assert session.run({"x": np.ones(LARGE, np.float32)})["w"].sum() == LARGE


def test_an_initializer_that_is_an_input_can_be_overridden() -> None:
    model = with_weight(np.ones(LARGE, np.float32))
    model.graph.inputs.append(model.graph.initializers["w"])
    x = np.zeros(LARGE, np.float32)
    assert result(model, x=x)[0] == 1
    assert result(model, x=x, w=x + 5)[0] == 5


def test_initializers_need_not_be_inputs_in_old_models() -> None:
    model = with_weight(np.ones(LARGE, np.float32))
    model.ir_version = 3
    model.opset_imports[""] = 9
    assert result(model, x=np.zeros(LARGE, np.float32))[0] == 1
    assert model.ir_version == 3


def test_external_data_of_several_folders(tmp_path: Path) -> None:
    """The runtime reads from one folder only."""
    one = models.load(saved(with_weight(np.arange(LARGE, dtype=np.float32)), tmp_path / "one"))
    two = models.load(saved(with_weight(np.ones(LARGE, np.float32)), tmp_path / "two"))
    model = parse("g (float[5000] x) => (float[5000] y) { z = Add(x, a) y = Add(z, b) }")
    add_initializer(model, "a", one.graph.initializers["w"].const_value)
    add_initializer(model, "b", two.graph.initializers["w"].const_value)
    assert result(model, x=np.zeros(LARGE, np.float32))[10] == 11


def test_external_data_that_was_replaced_is_not_read(tmp_path: Path) -> None:
    """The loaded model keeps its weights, whatever happens to the file."""
    path = saved(with_weight(np.ones(LARGE, np.float32)), tmp_path)
    model = models.load(path)
    data = tmp_path / "model.onnx.data"
    shutil.copy(data, tmp_path / "other")
    (tmp_path / "other").write_bytes(np.full(LARGE, 9, np.float32).tobytes())
    (tmp_path / "other").replace(data)
    assert result(model, x=np.zeros(LARGE, np.float32))[0] == 1
    data.unlink()
    assert result(model, x=np.zeros(LARGE, np.float32))[0] == 1


@pytest.mark.parametrize("external", [False, True])
def test_weights_in_nested_graphs(external: bool, tmp_path: Path) -> None:
    model = parse(
        "g (bool c, float[5000] x) => (float[5000] y) { y = If(c) <then_branch = t () => (float[5000] a) "
        "<float w = {3}> { a = Add(x, w) }, else_branch = e () => (float[5000] b) { b = Neg(x) }> }"
    )
    weight = model.graph[0].attributes["then_branch"].as_graph().initializers["w"]
    weight.const_value = ir.tensor(np.arange(LARGE, dtype=np.float32), name="w")
    weight.shape = ir.Shape([LARGE])
    if external:
        other = models.load(saved(with_weight(np.arange(LARGE, dtype=np.float32)), tmp_path))
        weight.const_value = other.graph.initializers["w"].const_value
    x = np.zeros(LARGE, np.float32)
    assert result(model, c=np.array(True), x=x)[9] == 9
    if external:
        (tmp_path / "model.onnx.data").unlink()
        assert result(model, c=np.array(True), x=x)[9] == 9


def test_a_weight_that_a_nested_graph_shares() -> None:
    model = parse(
        "g (bool c, float[5000] x) => (float[5000] y) { y = If (c) <then_branch = t () => (float[5000] a) "
        "<float v = {3}> { a = Add(x, v) }, else_branch = e () => (float[5000] b) { b = Add(x, w) }> }"
    )
    tensor = ir.tensor(np.arange(LARGE, dtype=np.float32))
    weight = ir.Value(name="w", const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape([LARGE]))
    model.graph.register_initializer(weight)
    model.graph[0].attributes["else_branch"].as_graph()[0].replace_input_with(1, weight)
    inner = model.graph[0].attributes["then_branch"].as_graph().initializers["v"]
    inner.const_value, inner.shape = tensor, ir.Shape([LARGE])
    for branch in (True, False):
        assert result(model, c=np.array(branch), x=np.zeros(LARGE, np.float32))[9] == 9


@pytest.mark.parametrize("external", [False, True])
def test_weights_in_functions(external: bool, tmp_path: Path) -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
        g (float[5000] x) => (float[5000] y) { y = own.F(x) }
        <domain: "own", opset_import: ["" : 21]>
        F (x) => (y) { w = Constant <value = float[1] {1}> () y = Add(x, w) }"""
    )
    constant = next(iter(model.functions.values()))[0]
    tensor: ir.TensorProtocol = ir.tensor(np.arange(LARGE, dtype=np.float32))
    if external:
        other = models.load(saved(with_weight(np.arange(LARGE, dtype=np.float32)), tmp_path))
        tensor = other.graph.initializers["w"].const_value
    constant.attributes["value"] = ir.AttrTensor("value", tensor)
    x = np.zeros(LARGE, np.float32)
    assert result(model, x=x)[9] == 9
    if external:
        (tmp_path / "model.onnx.data").unlink()
        assert result(model, x=x)[9] == 9


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4"])
def test_inputs_and_outputs_that_numpy_lacks(dtype: str) -> None:
    element = ir.DataType.from_numpy(np.dtype(getattr(ml_dtypes, dtype)))
    model = parse(
        f"g (float[3] x, {element.name.lower()}[3] q) => (float[3] y, {element.name.lower()}[3] z) "
        f"{{ y = Cast<to = 1>(q) z = Cast<to = {element.value}>(x) }}"
    )
    q = np.array([1, 2, 3]).astype(getattr(ml_dtypes, dtype))
    with open_session(model, optimized=False) as session:
        outputs = session.run({"x": np.array([3, 4, 5], np.float32), "q": q})
        session.bind({"x": np.array([3, 4, 5], np.float32), "q": q}).run()
        with pytest.raises(RuntimeFailure, match=rf'input "q" is of type float32, but {element.name.lower()}'):
            session.run({"x": np.zeros(3, np.float32), "q": np.zeros(3, np.float32)})
    assert list(outputs) == ["y", "z"]
    np.testing.assert_array_equal(outputs["y"], [1, 2, 3])
    assert outputs["z"].dtype == q.dtype
    np.testing.assert_array_equal(outputs["z"].astype(np.float32), [3, 4, 5])


def test_an_empty_output_that_numpy_lacks() -> None:
    model = parse("g (float[N] x) => (bfloat16[N] y) { y = Cast<to = 16>(x) }")
    assert result(model, x=np.zeros(0, np.float32)).shape == (0,)


def test_outputs_that_numpy_lacks_need_numeric_inputs() -> None:
    model = parse(
        "g (string[2] s, float[2] x) => (string[2] t, bfloat16[2] y) { t = Identity(s) y = Cast<to = 16>(x) }"
    )
    with open_session(model, optimized=False) as session, pytest.raises(RuntimeFailure, match='input "s"'):
        session.run({"s": np.array(["a", "b"]), "x": np.zeros(2, np.float32)})


def test_strings_and_booleans() -> None:
    model = parse("g (string[N] s, bool[N] b) => (string[N] t, bool[N] c) { t = Identity(s) c = Not(b) }")
    with open_session(model, optimized=False) as session:
        feed = {"s": np.array(["a", "ü"], object), "b": np.array([True, False])}
        outputs = session.run(feed)
        session.bind(feed).run()
    assert outputs["t"].tolist() == ["a", "ü"]
    assert outputs["c"].tolist() == [False, True]


def test_sequences() -> None:
    model = parse("g (seq(float[N]) s, float[N] x) => (seq(float[N]) t) { t = SequenceInsert(s, x) }")
    with open_session(model, optimized=False) as session:
        feed = {"s": [np.zeros(2, np.float32)], "x": np.ones(2, np.float32)}
        outputs = session.run(feed)
        session.bind(feed).run()
    assert [a.tolist() for a in outputs["t"]] == [[0, 0], [1, 1]]


def test_optionals() -> None:
    model = parse(
        "g (optional(float[N]) o) => (bool h, optional(float[N]) p) { h = OptionalHasElement(o) p = Identity(o) }"
    )
    with open_session(model, optimized=False) as session:
        full = session.run({"o": np.ones(2, np.float32)})
        assert full["h"]
        assert full["p"].tolist() == [1, 1]
        assert session.run({"o": None}) == {"h": False, "p": None}
        assert session.run({}) == {"h": False, "p": None}


def test_bound_feeds_run() -> None:
    model = with_weight(np.ones(LARGE, np.float32))
    with open_session(model, optimized=True) as session:
        binding = session.bind({"x": np.ones(LARGE, np.float32)})
        binding.run()
        binding.run()


@pytest.mark.parametrize("declared", ["float[1, N]", "float[2, 3, 5]", "float[N, M, K]", "float"])
def test_bound_feeds_run_again_where_an_output_is_declared_wrongly(declared: str) -> None:
    model = parse(f"g (float[2, 3, 4] x) => ({declared} y, float[2, 3, 4] z) {{ y = Neg(x) z = Exp(x) }}")
    with open_session(model, optimized=True) as session:
        binding = session.bind({"x": np.ones((2, 3, 4), np.float32)})
        for _ in range(3):
            binding.run()


def test_a_bound_feed_that_fails_says_why() -> None:
    model = parse("g (float[N] x, float[M] y) => (float[K] z) { [sum] z = Add(x, y) }")
    with open_session(model, optimized=False) as session:
        binding = session.bind({"x": np.ones(2, np.float32), "y": np.ones(3, np.float32)})
        with pytest.raises(RuntimeFailure, match=r'Add \(node "sum"\) failed'):
            binding.run()


def test_placement_names_the_nodes() -> None:
    model = parse("g (float[N] x) => (float[N] y) { [first] z = Neg(x) [second] y = Exp(z) }")
    with open_session(model, optimized=False) as session:
        assert session.placement() == {"CPUExecutionProvider": ("Neg first", "Exp second")}


def test_a_closed_session_says_so() -> None:
    session = open_session(parse("g (float[N] x) => (float[N] y) { y = Neg(x) }"), optimized=False)
    session.close()
    session.close()
    with pytest.raises(RuntimeFailure, match="closed"):
        session.run({"x": np.zeros(1, np.float32)})


# ------------------------------------------------------------------------------------------------ options


def test_threads_are_checked() -> None:
    with pytest.raises(UsageError, match="at least 1, not 0"):
        RunOptions(threads=0)


@pytest.mark.parametrize("name", ["cpu", "CPU", "CPUExecutionProvider", "cpuexecutionprovider"])
def test_providers_have_short_and_full_names(name: str) -> None:
    model = parse("g (float[N] x) => (float[N] y) { y = Neg(x) }")
    with open_session(model, RunOptions(provider=name), optimized=False) as session:
        assert session.provider == "CPUExecutionProvider"


def test_an_unknown_provider_is_named_with_the_nearest() -> None:
    model = parse("g (float[N] x) => (float[N] y) { y = Neg(x) }")
    with pytest.raises(UsageError, match=r'no execution provider "cuda12"\. Did you mean "cuda"\?'):
        open_session(model, RunOptions(provider="cuda12"), optimized=False)


@pytest.mark.parametrize("name", ["dml", "directml", "DmlExecutionProvider"])
def test_an_unavailable_provider_lists_the_others(name: str) -> None:
    if "DmlExecutionProvider" in runtime.available_providers():
        pytest.skip("DirectML is there")
    with pytest.raises(UsageError, match=r"has no provider dml, only .*cpu; install onnxruntime-directml in the place"):
        open_session(parse("g (float[N] x) => (float[N] y) { y = Neg(x) }"), RunOptions(provider=name), optimized=False)


def test_nodes_that_fall_back_are_an_error_unless_allowed() -> None:
    if "AzureExecutionProvider" not in runtime.available_providers():
        pytest.skip("this build has no provider that takes no nodes")
    model = parse("g (float[N] x) => (float[K] y) { [neg] z = Neg(x) [exp] e = Exp(z) s = Shape(x) y = Reshape(e, s) }")
    options = RunOptions(provider="azure")
    with pytest.raises(RuntimeFailure, match=r"1 of 4 nodes would run on the cpu instead of azure: Exp exp"):
        open_session(model, options, optimized=False)
    with open_session(model, RunOptions(provider="azure", allow_fallback=True), optimized=False) as session:
        assert set(session.placement()) == {"CPUExecutionProvider"}
        session.bind({"x": np.ones(3, np.float32)}).run()


def test_a_session_that_falls_back_is_an_error_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA whose libraries are missing: ONNX Runtime warns and goes on with the CPU."""
    import onnxruntime

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    original = onnxruntime.InferenceSession

    def without_cuda(*arguments: object, providers: list[str], **rest: object) -> object:
        assert providers == ["CUDAExecutionProvider", "CPUExecutionProvider"]
        return original(*arguments, providers=["CPUExecutionProvider"], **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", without_cuda)
    model = parse("g (float[N] x) => (float[N] y) { y = Neg(x) }")
    with pytest.raises(RuntimeFailure, match="could not start the provider cuda and fell back to cpu"):
        open_session(model, RunOptions(provider="cuda"), optimized=False)
    with open_session(model, RunOptions(provider="cuda", allow_fallback=True), optimized=False) as session:
        session.bind({"x": np.ones(3, np.float32)}).run()
    with pytest.raises(UsageError, match="could not start the provider cuda and fell back to cpu"):
        runtime.run_options("cuda")
    assert runtime.run_options("cuda", allow_fallback=True).provider == "cuda"


def test_a_provider_that_starts_is_there() -> None:
    """Whether it takes the nodes of a model is another question."""
    name = next((p for p in runtime.available_providers() if p != "CPUExecutionProvider"), None)
    if name is None:
        pytest.skip("this build has no other provider than cpu")
    assert runtime.run_options(name, 2, ["lib.so"]) == RunOptions(name, 2, ("lib.so",))


def test_available_providers() -> None:
    assert "CPUExecutionProvider" in runtime.available_providers()


@pytest.mark.parametrize("kind", ["missing", "no library"])
def test_a_custom_op_library_that_cannot_be_loaded(kind: str, tmp_path: Path) -> None:
    library = tmp_path / "libown.so"
    if kind != "missing":
        library.write_bytes(b"no library")
    with pytest.raises(RuntimeFailure, match=r"The custom-op library .*libown\.so cannot be loaded: \S"):
        open_session(
            parse("g (float[N] x) => (float[N] y) { y = Neg(x) }"),
            RunOptions(custom_ops=(str(library),)),
            optimized=False,
        )


def test_a_missing_runtime_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeFailure, match=r'not installed; pip install "onnxopt\[cpu\]"'):
        runtime.available_providers()


# ------------------------------------------------------------------------------------------------ failures


def failure(model: ir.Model, **feed: object) -> str:
    with pytest.raises(RuntimeFailure) as caught:
        result(model, **feed)
    message = str(caught.value)
    for noise in ("onnxruntime_src", ".cc:", ".h:", "ONNXRuntimeError", "onnxruntime::", "\n"):
        assert noise not in message
    assert message.endswith(".")
    return message


def test_a_missing_kernel_is_named() -> None:
    model = parse("g (bfloat16[N] x) => (bfloat16[N] y) { [round] y = Ceil(x) }")
    assert failure(model, x=np.zeros(1)) == (
        "ONNX Runtime cannot load the model: there is no kernel on the provider cpu for Ceil (version 13, inputs "
        'bfloat16) of the node "round".'
    )


def test_an_unknown_operator_is_named() -> None:
    assert failure(parse("g (float[N] x) => (float[N] y) { [n] y = Foo(x) }"), x=0) == (
        'ONNX Runtime cannot load the model: Foo (node "n") is not known in this opset.'
    )


def test_an_unknown_domain_points_to_custom_ops() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21, "own" : 1]> g (float[N] x) => (float[N] y) { y = own.Foo(x) }'
    )
    assert "Foo of the domain own is neither a known operator nor a function" in failure(model, x=0)
    assert "--custom-ops" in failure(model, x=0)


def test_types_that_do_not_fit_are_reported() -> None:
    message = failure(parse("g (float[2] x, int64[2] y) => (float[2] z) { [n] z = Add(x, y) }"), x=0, y=0)
    assert "Type parameter (T) of Optype (Add) bound to different types" in message


def test_a_node_that_fails_is_named() -> None:
    model = parse("g (float[N] x, float[M] y) => (float[K] z) { [sum] z = Add(x, y) }")
    message = failure(model, x=np.ones(2, np.float32), y=np.ones(3, np.float32))
    assert message == (
        'ONNX Runtime cannot run the model: Add (node "sum") failed: Attempting to broadcast an axis by a dimension '
        "other than 1. 2 by 3."
    )


def test_a_missing_input_is_named() -> None:
    model = parse("g (float[N, 3] x, float[3] y) => (float[N, 3] z) { z = Add(x, y) }")
    message = failure(model, y=np.ones(3, np.float32))
    assert message == 'The input "x" (tensor(float), shape [N, 3]) is missing; the feed has y.'


def test_an_unknown_input_is_named_with_the_nearest() -> None:
    model = parse("g (float[N] pixels) => (float[N] y) { y = Neg(pixels) }")
    message = failure(model, pixels=np.ones(3, np.float32), pixel=np.ones(3, np.float32))
    assert message == 'The model has no input "pixel". Did you mean "pixels"? It has pixels.'


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.ones(3, np.float32), 'input "x" has 1 dimensions, but 2 are expected.'),
        (np.ones((2, 4), np.float32), 'input "x" has size 4 along axis 1, but 3 is expected.'),
        (np.ones((2, 3)), "an input is a tensor(double), but a tensor(float) is expected."),
    ],
)
def test_an_input_that_does_not_fit(array: np.ndarray, expected: str) -> None:
    model = parse("g (float[N, 3] x) => (float[N, 3] y) { y = Neg(x) }")
    assert failure(model, x=array) == f"ONNX Runtime cannot run the model: {expected}"


def test_a_model_from_the_future() -> None:
    assert "max supported IR version" in failure(_with_ir_version(99), x=0)


def _with_ir_version(version: int) -> ir.Model:
    model = parse("g (float[N] x) => (float[N] y) { y = Neg(x) }")
    model.ir_version = version
    return model


def test_an_initializer_without_data() -> None:
    model = with_weight(np.ones(3, np.float32))
    model.graph.initializers["w"].const_value = None
    assert 'initializer "w" has no data' in failure(model, x=np.zeros(3, np.float32))


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(RuntimeFailure, match=r"cannot load .*bad\.onnx: .*parsing failed"):
        open_session(path, optimized=False)


# ------------------------------------------------------------------------------------------------ evaluate_node


def first_node(text: str, opset: int = 18) -> ir.Node:
    return parse(text, opset).graph[0]


def test_evaluates_a_node() -> None:
    node = first_node("g (float[2] x, float[2] y) => (float[2] z) { z = Add(x, y) }")
    a = np.array([1, 2], np.float32)
    (computed,) = evaluate_node(node, [a, a], 18) or []
    np.testing.assert_array_equal(computed, a * 2)


def test_evaluates_in_the_given_opset() -> None:
    """Softmax over all axes from 1 on before opset 13, over the last since."""
    node = first_node("g (float[1, 2, 2] x) => (float[1, 2, 2] z) { z = Softmax(x) }", 11)
    x = np.zeros((1, 2, 2), np.float32)
    for opset, value in ((11, 0.25), (13, 0.5)):
        (computed,) = evaluate_node(node, [x], opset) or []
        np.testing.assert_allclose(computed, value)


@pytest.mark.parametrize(
    "array",
    [
        np.array(["a", "b"], object),
        np.array(["a", "b"]),
        np.array([1, 2]).astype(ml_dtypes.bfloat16),
        np.zeros((0, 3), np.float32),
        np.array(5),
        np.array([True, False]),
        np.arange(LARGE, dtype=np.float64),
    ],
    ids=lambda a: str(a.dtype),
)
def test_evaluates_every_type(array: np.ndarray) -> None:
    (computed,) = evaluate_node(first_node("g (float x) => (float z) { z = Identity(x) }"), [array], 21) or []
    assert computed.shape == array.shape
    assert computed.tolist() == array.tolist()


def test_evaluates_with_inputs_left_out() -> None:
    node = first_node("g (float[3] x, float hi) => (float[3] z) { z = Clip(x, , hi) }")
    (computed,) = evaluate_node(node, [np.array([1, 2, 3], np.float32), None, np.array(2, np.float32)], 18) or []
    assert computed.tolist() == [1, 2, 2]


def test_evaluates_all_outputs() -> None:
    node = first_node("g (float[4] x) => (float[2] a, float[2] b) { a, b = Split<num_outputs = 2>(x) }")
    computed = evaluate_node(node, [np.arange(4, dtype=np.float32)], 18)
    assert computed is not None
    assert [c.tolist() for c in computed] == [[0, 1], [2, 3]]


def test_evaluates_bodies_that_capture_nothing() -> None:
    node = first_node(
        "g (bool c) => (float[2] y) { y = If(c) <then_branch = t () => (float[2] a) <float[2] w = {1, 2}> { a = Neg(w) }, "
        "else_branch = e () => (float[2] b) <float[2] w = {1, 2}> { b = Identity(w) }> }"
    )
    (computed,) = evaluate_node(node, [np.array(True)], 18) or []
    assert computed.tolist() == [-1, -2]


@pytest.mark.parametrize(
    "text",
    [
        "g (float[2] x) => (float[2] y) { y = RandomNormalLike(x) }",
        "g (float[2] x) => (float[2] y) { y = Bernoulli(x) }",
        "g (float[2] x) => (float[2] y) { y = Unknown(x) }",
        "g (float[2] x) => (seq(float[2]) y) { y = SequenceConstruct(x) }",
        "g (float[2] x) => (float[2] y) { y = Reshape(x, x) }",
    ],
    ids=["random", "random of input", "unknown", "no tensor", "rejected"],
)
def test_does_not_evaluate(text: str) -> None:
    node = first_node(text)
    assert evaluate_node(node, [np.ones(2, np.float32)] * len(node.inputs), 18) is None


def test_does_not_evaluate_bodies_that_capture() -> None:
    node = first_node(
        "g (bool c, float[2] x) => (float[2] y) { y = If(c) <then_branch = t () => (float[2] a) { a = Neg(x) }, "
        "else_branch = e () => (float[2] b) { b = Identity(x) }> }"
    )
    assert evaluate_node(node, [np.array(True)], 18) is None


def test_a_captured_value_is_not_taken_for_an_input() -> None:
    """Whatever it is called."""
    node = first_node(
        "g (bool c, bool in0) => (bool y) { y = If(c) <then_branch = t () => (bool a) { a = Not(in0) }, "
        "else_branch = e () => (bool b) { b = Identity(in0) }> }"
    )
    assert evaluate_node(node, [np.array(True)], 18) is None


def test_does_not_evaluate_bodies_that_are_random() -> None:
    node = first_node(
        "g (bool c) => (float[2] y) { y = If(c) <then_branch = t () => (float[2] a) { a = RandomNormal<shape = [2]>() }, "
        "else_branch = e () => (float[2] b) { b = RandomNormal<shape = [2]>() }> }"
    )
    assert evaluate_node(node, [np.array(True)], 18) is None


def test_does_not_evaluate_calls_of_functions() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21, "own" : 1]> g (float[2] x) => (float[2] y) { y = own.F(x) }
        <domain: "own", opset_import: ["" : 21]> F (x) => (y) { y = Neg(x) }"""
    )
    assert evaluate_node(model.graph[0], [np.ones(2, np.float32)], 21) is None


def test_does_not_evaluate_without_all_inputs() -> None:
    node = first_node("g (float[2] x, float[2] y) => (float[2] z) { z = Add(x, y) }")
    assert evaluate_node(node, [np.ones(2, np.float32), None], 18) is None
