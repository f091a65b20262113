from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from click.testing import Result

from onnxopt import measure, registry
from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.search.state import FORMAT

if TYPE_CHECKING:
    import onnx_ir as ir

Invoke = Callable[..., Result]
FAST = "--no-measure"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrong(GraphPass):
    """Double the weights, and claim that nothing changes."""

    name = "wrong"
    guarantee = Guarantee.EXACT

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        import onnx_ir as ir

        weight = model.graph.initializers["w"]
        if weight.metadata_props.get("doubled"):
            return

        def apply() -> None:
            assert weight.const_value is not None
            weight.const_value = ir.tensor(weight.const_value.numpy() * 2, name="w")
            weight.metadata_props["doubled"] = "yes"

        yield Edit(Site(self.name, "", "w"), "doubled", apply)


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the wrong pass."""
    known = dict(registry.entries())
    known["wrong"] = registry.Entry("wrong", "elsewhere:Wrong", "Doubles.", "other")
    load = registry.load
    monkeypatch.setattr(registry, "entries", lambda: known)
    monkeypatch.setattr(registry.entries, "cache_clear", lambda: None, raising=False)
    monkeypatch.setattr(registry, "load", lambda name: Wrong if name == "wrong" else load(name))


def names_in(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def nodes(path: Path) -> list[str]:
    return [n.op_type for n in onnx.load(path).graph.node]


def test_the_main_job(invoke: Invoke, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brief = functools.partial(measure, budget_seconds=0.3)
    monkeypatch.setattr(importlib.import_module("onnxopt.ground"), "measure_models", brief)
    out = tmp_path / "out.onnx"
    done = invoke("optimize", model, "-o", out)
    assert done.exit_code == 0, done.stderr
    assert "model.onnx: 2 -> 1 node" in done.stdout
    assert "verified (outputs are equal)" in done.stdout
    assert "Latency" in done.stdout and "NOT " not in done.stdout
    assert f"Written to {out}." in done.stdout.replace("\n", "")
    assert nodes(out) == ["MatMul"]
    assert all(line.startswith("[") for line in done.stderr.splitlines()), "only progress, and only on a slow machine"


def test_without_an_output_nothing_is_written(invoke: Invoke, model: Path) -> None:
    done = invoke("optimize", model, FAST)
    assert done.exit_code == 0
    assert "Nothing was written; name a file with -o to keep the result." in done.stdout
    assert names_in(model.parent) == {"model.onnx"}
    assert nodes(model) == ["Identity", "MatMul"]


def test_in_place(invoke: Invoke, model: Path) -> None:
    assert invoke("optimize", model, "--in-place", FAST).exit_code == 0
    assert nodes(model) == ["MatMul"]
    assert names_in(model.parent) == {"model.onnx"}


def test_in_place_writes_through_a_link(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.onnx"
    link.symlink_to(model)
    assert invoke("optimize", link, "--in-place", FAST).exit_code == 0
    assert link.is_symlink()
    assert nodes(model) == ["MatMul"]
    assert names_in(model.parent) == {"model.onnx"}


def test_the_input_is_not_overwritten_by_accident(invoke: Invoke, model: Path) -> None:
    before = model.read_bytes()
    link = model.with_name("link.onnx")
    link.symlink_to(model)
    for output in (model, model.parent / ".." / "models" / "model.onnx", link):
        done = invoke("optimize", model, "-o", output, FAST)
        assert done.exit_code == 2
        assert "is the input itself; use --in-place to overwrite it." in done.stderr
    assert model.read_bytes() == before


def test_reports_are_written_in_both_forms(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    out, page, data = tmp_path / "o.onnx", tmp_path / "r.html", tmp_path / "r.json"
    done = invoke("optimize", model, "-o", out, "--report", page, "--report", data, FAST)
    assert done.exit_code == 0, done.stderr
    content = json.loads(data.read_text())
    assert content["output"] == str(out)
    assert content["headline"].startswith("model.onnx: 2 -> 1 node")
    assert page.read_text().startswith("<!doctype html>")
    assert data.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    assert names_in(tmp_path) == {"models", "o.onnx", "r.html", "r.json"}


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("name", ["report.txt", "report", "report.json.gz"])
def test_a_report_of_unknown_form_is_refused_before_the_run(invoke: Invoke, model: Path, name: str) -> None:
    done = invoke("optimize", model, "--report", model.parent / name)
    assert done.exit_code == 2
    assert "must end in .json or .html." in done.stderr


def test_a_report_does_not_overwrite_the_model(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = invoke("optimize", model, "-o", out, "--report", out, FAST)
    assert done.exit_code == 2
    assert "would overwrite the model." in done.stderr
    assert not out.exists()


def test_quiet_prints_nothing_but_warnings(
    invoke: Invoke, model: Path, model_proto: onnx.ModelProto, tmp_path: Path
) -> None:
    done = invoke("optimize", model, "-q", FAST)
    assert (done.exit_code, done.output) == (0, "")
    model_proto.graph.node[0].op_type = "Frobnicate"
    model.write_bytes(model_proto.SerializeToString())
    done = invoke("optimize", model, "-q", FAST)
    assert done.stdout == ""
    assert done.stderr.startswith("Warning: NOT VERIFIED: ONNX Runtime cannot load the model: ")
    assert invoke("optimize", model, "-q", FAST, "--no-verify").output == ""


def test_a_wrong_pass_is_dropped_and_reported(invoke: Invoke, model: Path, tmp_path: Path, wrong: None) -> None:
    out, alone = tmp_path / "o.onnx", tmp_path / "alone.onnx"
    done = invoke("optimize", model, "-o", out, "-p", "remove-identities,wrong", FAST)
    assert done.exit_code == 0, done.stderr
    assert "dropped w" in done.stdout
    assert invoke("optimize", model, "-o", alone, "-p", "remove-identities", FAST).exit_code == 0
    assert out.read_bytes() == alone.read_bytes()


def test_strict_turns_a_dropped_edit_into_a_failure(invoke: Invoke, model: Path, tmp_path: Path, wrong: None) -> None:
    out, data = tmp_path / "o.onnx", tmp_path / "r.json"
    done = invoke("optimize", model, "-o", out, "-p", "remove-identities,wrong", FAST, "--strict", "--report", data)
    assert done.exit_code == 1
    assert done.stderr == f"Error: 1 edit was dropped, and --strict is given. {out} was not written.\n"
    assert "dropped w" in done.stdout
    assert not out.exists()
    assert json.loads(data.read_text())["dropped"] == 1


def test_strict_wants_a_verified_result(
    invoke: Invoke, model: Path, model_proto: onnx.ModelProto, tmp_path: Path
) -> None:
    model_proto.graph.node[0].op_type = "Frobnicate"
    model.write_bytes(model_proto.SerializeToString())
    out = tmp_path / "o.onnx"
    assert invoke("optimize", model, "-o", out, FAST).exit_code == 0
    out.unlink()
    done = invoke("optimize", model, "-o", out, FAST, "--strict")
    assert done.exit_code == 1
    assert "could not be verified, which --strict needs" in done.stderr
    assert not out.exists()


def test_a_budget_wants_a_verified_result(invoke: Invoke, model: Path, model_proto: onnx.ModelProto) -> None:
    model_proto.graph.node[0].op_type = "Frobnicate"
    model.write_bytes(model_proto.SerializeToString())
    done = invoke("optimize", model, "-r", "small", "--max-error", "1%", FAST)
    assert done.exit_code == 1
    assert "could not be verified, which a budget needs" in done.stderr


def test_a_lossy_pass_without_a_budget_is_applied_and_its_deviation_reported(
    invoke: Invoke, model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "r.json"
    done = invoke(
        "optimize",
        model,
        "-p",
        "quantize-weights{min_elements=1}",
        FAST,
        "--report",
        data,
        "-o",
        tmp_path / "o.onnx",
    )
    assert done.exit_code == 0, done.stderr
    assert json.loads(data.read_text())["verification"]["worst"] > 0


def test_a_budget_that_is_missed_drops_the_edit(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "r.json"
    done = invoke(
        "optimize", model, "-p", "quantize-weights{min_elements=1}", "--max-error", "1e-9", FAST, "--report", data
    )
    assert done.exit_code == 0, done.stderr
    assert json.loads(data.read_text())["dropped"] == 1


def test_options_reach_the_run(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    data, feeds = tmp_path / "r.json", tmp_path / "feeds.npz"
    np.savez(feeds, x=np.ones((3, 64), np.float32))
    arguments = ["--threads", 2, "--seed", 7, "--target", "cpu", "--opset", 18, "--fix-shape", "batch=1"]
    done = invoke("optimize", model, FAST, "--report", data, "--data", feeds, *arguments, "-o", tmp_path / "o.onnx")
    assert done.exit_code == 0, done.stderr
    content = json.loads(data.read_text())
    assert content["environment"]["threads"] == 2
    assert content["target"] == "cpu"
    assert content["opset"] == [17, 18]
    assert str(feeds) in content["data"]
    saved = onnx.load(tmp_path / "o.onnx")
    assert saved.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--strict", "--no-verify"], "--strict asks for a verified result"),
        (["--in-place", "-o", "x.onnx"], "Give either --output or --in-place, not both."),
        (["-p", "fuse-conv"], 'Did you mean "fuse-conv-bn"?'),
        (["-p", "prune-weights{ratoi=1}"], 'Did you mean "ratio"?'),
        (["-p", "quantize-weights{mode=}"], 'of the pass "quantize-weights" must be'),
        (["-p", "fuse-conv-bn{"], "is not closed"),
        (["-p", ""], "The pipeline is empty"),
        (["-r", "losless"], 'Did you mean "lossless"?'),
        (["-r", "absent.toml"], "Cannot read the recipe absent.toml"),
        (["-r", "small", "-p", "fuse-conv-bn"], "Give either --recipe or --passes, not both."),
        (["--target", "gpu"], "'cuda'"),
        (["--threads", "0"], "x>=1"),
        (["--max-error", "-1"], "must be 0 or more"),
        (["--max-error", "nan"], "must be 0 or more"),
        (["--max-drop", "0.5%"], "--max-drop needs real inputs to score the model on; give them with --data."),
        (["--metric", "top1"], "--metric needs real inputs to score the model on; give them with --data."),
        (["--labels", "labels.npy"], "--labels needs real inputs to score the model on; give them with --data."),
        (["--max-drop", "5"], "ambiguous"),
        (["--shape", "batch"], "AXIS=N"),
        (["--fix-shape", "nonesuch=1"], "nonesuch"),
        (["--provider", "cdua"], "cdua"),
        (["--data", "absent.npz"], "absent.npz"),
        (["--opset", "999"], "999"),
        (["--recpe", "small"], "--recipe"),
    ],
)
def test_bad_options_are_told_in_a_sentence(
    invoke: Invoke,
    model: Path,
    tmp_path: Path,
    arguments: list[str],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("optimize", model, *arguments, FAST)
    assert done.exit_code == 2, done.output
    assert complaint in done.stderr
    assert "Traceback" not in done.output and "Internal error" not in done.output
    assert names_in(tmp_path) == {"models"}


def test_progress_says_nothing_in_a_short_run(invoke: Invoke, model: Path) -> None:
    assert invoke("optimize", model, FAST).stderr == ""


def test_colours_are_for_terminals(invoke: Invoke, model: Path) -> None:
    assert "\x1b" not in invoke("optimize", model, FAST).stdout


def test_a_pass_of_another_package(invoke: Invoke, model: Path, wrong: Any) -> None:
    done = invoke("passes", "wrong")
    assert "Double the weights, and claim that nothing changes." in done.output
    assert "It has no options." in done.output


# ---------------------------------------------------------------------------------------------------- search


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure for a moment only."""
    short = functools.partial(_shortly, measure)
    monkeypatch.setattr(importlib.import_module("onnxopt.ground"), "measure_models", short)
    monkeypatch.setattr(importlib.import_module("onnxopt.search.lab"), "measure", short)


def _shortly(timed: Callable[..., Any], *models: Any, **options: Any) -> Any:
    return timed(*models, **(options | {"budget_seconds": 0.1, "memory": False}))


@pytest.mark.usefixtures("quick")
def test_a_budget_alone_starts_a_search(invoke: Invoke, tmp_path: Path) -> None:
    """On a real model, with labels; what was remembered meanwhile is gone afterwards."""
    models = Path(__file__).parents[2] / "models"
    out, data = tmp_path / "small.onnx", tmp_path / "report.json"
    done = invoke(
        "optimize", models / "mnist_cnn_bn.onnx", "-o", out, "--target", "cpu", "--max-drop", "3%", "--objective", "size",
        "--data", models / "mnist_calibration.npz", "--labels", models / "mnist_calibration_labels.npy", "--report", data,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    content = json.loads(data.read_text())
    assert content["search"]["objective"] == "size"
    assert content["search"]["candidates"][0]["status"] == "winner"
    assert content["after"]["bytes"] < content["before"]["bytes"] / 3
    assert "keep fp32" in done.stdout
    assert names_in(tmp_path) == {"small.onnx", "report.json"}


@pytest.mark.usefixtures("quick")
def test_an_interrupted_search_goes_on(
    invoke: Invoke, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = importlib.import_module("onnxopt.search.lab").RuntimeLab
    out, data = tmp_path / "out.onnx", tmp_path / "report.json"
    arguments = ["optimize", model, "-o", out, "--max-error", "10%", "--report", data]
    with monkeypatch.context() as patched:
        patched.setattr(lab, "measure", _interrupt)
        assert invoke(*arguments).exit_code != 0
    remembered = out.with_name("out.onnx.search.json")
    assert remembered.exists()
    assert not out.exists()
    monkeypatch.setattr(lab, "examine", _interrupt)
    assert invoke(*arguments).exit_code == 0
    assert json.loads(data.read_text())["search"]["resumed"] >= 1
    assert not remembered.exists()


def _interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("quick")
def test_a_named_state_file_stays(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    done = invoke("optimize", model, "--max-error", "10%", "--state", state)
    assert done.exit_code == 0, done.stderr
    assert json.loads(state.read_text())["format"] == FORMAT


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--objective", "size"], "objective is about the search within a budget"),
        (["--state", "s.json", "-r", "small", "--max-error", "1%"], "state is about the search"),
        (["--max-error", "1%", FAST], "A budget alone asks for a search"),
        (["--max-error", "1%", "--no-verify"], "A budget alone asks for a search"),
    ],
)
def test_what_contradicts_a_search(invoke: Invoke, model: Path, arguments: list[str], complaint: str) -> None:
    done = invoke("optimize", model, *arguments)
    assert done.exit_code == 2
    assert complaint in done.stderr.replace("\n", " ")


NO_CUDA = "The installed ONNX Runtime has no provider cuda, only "


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the provider cuda away, should it be here."""
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])


def test_a_target_that_is_not_here_is_told_in_the_headline(
    invoke: Invoke, model: Path, tmp_path: Path, no_cuda: None
) -> None:
    """Times on a CPU would be taken for those of the GPU that was asked for."""
    out, report = tmp_path / "o.onnx", tmp_path / "r.json"
    done = invoke("optimize", model, "--target", "cuda", "-o", out, "--report", report)
    told = " ".join(done.stdout.split())
    assert done.exit_code == 0
    assert "NOT VERIFIED ON CUDA, only on the cpu (outputs are equal), NOT MEASURED" in told
    assert "the target cuda is not here, and times on the cpu tell nothing of it" in told
    assert "The result is for cuda and could only be compared on the cpu." in told
    assert "install onnxruntime-gpu (onnxopt[gpu] brings it)" in told
    assert json.loads(report.read_text())["measurement"] is None
    quiet = invoke("optimize", model, "--target", "cuda", "--report", tmp_path / "r.html", "-q", FAST)
    assert quiet.stderr.startswith("Warning: NOT VERIFIED ON CUDA: outputs were compared on the cpu alone.")
    page = (tmp_path / "r.html").read_text()
    assert "not verified on cuda" in page and ">verified<" not in page
    assert "NOT VERIFIED ON" not in invoke("optimize", model, "--target", "cpu", FAST).stdout


def test_a_target_is_timed_elsewhere_where_the_user_says_so(
    invoke: Invoke, model: Path, quick: None, no_cuda: None
) -> None:
    told = " ".join(invoke("optimize", model, "--target", "cuda", "--provider", "cpu").stdout.split())
    assert "NOT VERIFIED ON CUDA, only on the cpu (outputs are equal), on the cpu " in told
    assert "NOT MEASURED" not in told and NO_CUDA not in told


def test_a_search_does_not_take_the_times_of_another_target(
    invoke: Invoke, model: Path, tmp_path: Path, no_cuda: None
) -> None:
    """On a CPU float16 is slow, which says nothing of a GPU."""
    done = invoke("optimize", model, "--target", "cuda", "--max-error", "1%", "-o", tmp_path / "o.onnx")
    assert done.exit_code == 2
    assert f"A search times its candidates on the target. {NO_CUDA}" in done.stderr
    assert names_in(tmp_path) == {"models"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["optimize", "MODEL", "-o", "OUT"],
        ["optimize", "MODEL", "-o", "OUT", "--target", "cuda", "--allow-fallback"],
        ["optimize", "MODEL", "-o", "OUT", "--no-verify", FAST],
        ["quantize", "MODEL", "-o", "OUT", "--mode", "weights"],
        ["transfer", "MODEL", "MODEL", "-o", "OUT"],
        ["graft", "MODEL", "MODEL", "-o", "OUT", "--replace", "a->y", "--with", "a->y"],
        ["extract", "MODEL", "-o", "OUT", "--from", "a", "--to", "y"],
        ["merge-trunk", "MODEL", "MODEL", "-o", "OUT"],
        ["verify", "MODEL", "MODEL"],
        ["bench", "MODEL"],
        ["head", "MODEL", "-o", "OUT", "--data", "absent.npz"],
        ["advise", "MODEL", "--data", "absent.npz"],
    ],
)
def test_a_provider_that_is_named_has_to_be_here(
    invoke: Invoke, model: Path, tmp_path: Path, no_cuda: None, arguments: list[str]
) -> None:
    """First of all, so that nobody waits for it, and nothing is written that could not be run as asked."""
    paths = {"MODEL": model, "OUT": tmp_path / "out.onnx"}
    done = invoke(*(paths.get(a, a) for a in arguments), "--provider", "cuda")
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith(f"Error: {NO_CUDA}cpu; install onnxruntime-gpu")
    assert done.stdout == "" and names_in(tmp_path) == {"models"}
