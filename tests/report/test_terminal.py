from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from onnxopt.contract import AppliedEdit, DroppedEdit, Site
from onnxopt.removed import Change, Damage
from onnxopt.report.data import Report
from onnxopt.report.terminal import OUTPUTS, render, to_text

Make = Callable[..., Report]


def flat(text: str) -> str:
    return " ".join(text.split())


def test_the_headline_says_it_all(report: Report) -> None:
    assert flat(to_text(report)).startswith(
        "encoder.onnx: 1,234 -> 1,190 nodes, 1.85 -> 1.85 MB, verified (worst deviation 2.1e-07 of the output's "
        "range), 1.12x faster (95% interval 1.09 to 1.15)"
    )


@pytest.mark.parametrize("width", [60, 80, 100, 120])
@pytest.mark.parametrize("verbose", [False, True])
def test_no_line_is_wider_than_the_terminal(report: Report, width: int, verbose: bool) -> None:
    lines = to_text(report, width=width, verbose=verbose).splitlines()
    assert max(cell_len(line) for line in lines) <= width


@pytest.mark.parametrize("width", [80, 120])
def test_long_names_are_folded_in_the_middle_and_shown_in_full_when_asked(report: Report, width: int) -> None:
    name = report.passes[2].applied[0].site.output
    short, full = (to_text(report, width=width, verbose=v) for v in (False, True))
    assert name[:10] in short and name[-10:] in short and "..." in short
    assert name in "".join(line[4 : 4 + (width - 6) * 9 // 20].strip() for line in full.splitlines())


def test_nothing_is_cut_off_with_an_ellipsis(report: Report) -> None:
    assert "…" not in to_text(report, width=60)


def test_plain_text_has_no_escapes_and_no_trailing_blanks(report: Report) -> None:
    text = to_text(report)
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_a_terminal_gets_colours(report: Report) -> None:
    stream = io.StringIO()
    render(report, Console(file=stream, width=80, force_terminal=True, color_system="standard"))
    assert "\x1b[1;31mdropped" in stream.getvalue()


def test_str_is_the_report(report: Report) -> None:
    assert str(report) == to_text(report)


@pytest.mark.parametrize(
    "expected",
    [
        "kept fold-constants 34 edits 34 ms",
        "and 32 more (--verbose lists them)",
        "unchanged remove-identities nothing to do, 2 near misses 12 ms",
        "kept merge-common-subexpressions 1 edit, 1 dropped 12 ms",
        "(in If_3.then_branch)",
        "dropped /bad_output_0 same as /x. output logits deviates by 3.4e-02.",
        "skipped fuse-conv-bn the model has no BatchNormalization. 12 ms",
        "crashed with ValueError: no.",
        "12 edits taken back, because they make it slower: 1.20 times the original's latency (95% interval 1.15 to 1.24)",
        "Why near misses were left alone: --verbose. Where: onnxopt explain models/encoder.onnx -p remove-identities",
        "Nodes 1,234 1,190 -44 (-3.6%)",
        "Parameters 462,346 461,962 -384 (-0.1%)",
        "File size 1.85 MB 1.85 MB -1.54 kB (-0.1%)",
        "Worst deviation - 2.1e-07 of the output's range",
        "Latency 1.23 ms 1.10 ms ratio 0.893 (95%: 0.870 to 0.917)",
        "Load time 8.10 ms 6.20 ms -23.5%",
        "Peak memory 52.1 MB 51.8 MB -0.6%",
        "compared with the runtime's optimizations off, over 3 sets of generated inputs (seed 0), batch = 1 and 2",
        "logits 1.2e-06 2.1e-07 1.0e-05 1.000000 ok",
        "with the runtime's optimizations on the deviation is 3.0e-07.",
        "Zeros alone bring no speed in this runtime.",
        "1 thread on Example CPU, 2 cores, Linux 6.1 on x86_64; onnxopt 0.1.0, onnxruntime 1.32.0, Python 3.11.7",
        "median of 212 rounds, original and result in turn; ran 1,190 nodes on CPUExecutionProvider",
        "Took 6.72 s: load 120 ms, passes 500 ms, measure 6.10 s",
    ],
)
def test_what_is_said(report: Report, expected: str) -> None:
    assert expected in flat(to_text(report, width=140))


def test_verbose_lists_every_edit_and_near_miss(report: Report) -> None:
    text = to_text(report, verbose=True)
    assert "/Slice_33_output_0" in text
    assert "near miss, 2 times: Dropout in training mode." in text
    assert "logits: first difference at [0, 3]." in text


def test_what_is_missing_is_said_loudly(make: Make) -> None:
    text = flat(
        to_text(
            make(
                verification=None,
                not_verified="input x needs data",
                measurement=None,
                not_measured="measuring was turned off",
            ),
            width=140,
        )
    )
    assert (
        "NOT VERIFIED, NOT MEASURED NOT VERIFIED: input x needs data. NOT MEASURED: measuring was turned off." in text
    )


def test_a_failed_verification_is_said_loudly(make: Make, logits: Any) -> None:
    bad = dataclasses.replace(logits, ok=False, relative=0.5, first_index=(0, 3))
    reason = "output logits deviates by 5.0e-01"
    text = to_text(make(verification={"ok": False, "reason": reason, "outputs": (bad,), "worst": 0.5}))
    assert "FAILED VERIFICATION: output logits deviates by 5.0e-01." in text
    assert "differs" in text
    assert "logits: first difference at [0, 3]." in text


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ({"ratio": 1.2, "low": 1.1, "high": 1.3, "verdict": "slower"}, "1.20x slower (95% interval 1.10 to 1.30)"),
        (
            {"ratio": 1.0, "low": 0.97, "high": 1.04, "verdict": "no difference shown"},
            "no difference in speed shown (95% interval 0.96 to 1.03 times as fast)",
        ),
    ],
)
def test_speed(make: Make, measured: dict[str, Any], expected: str) -> None:
    assert expected in flat(to_text(make(measurement=measured)))


def test_memory_that_is_not_known_is_left_out(make: Make) -> None:
    assert "Peak memory" not in to_text(make(measurement={"candidate_peak_mb": None}))


def test_a_ratio_that_is_not_that_of_the_latencies_shown_is_explained(make: Make) -> None:
    """Of 2.02 ms and 1.97 ms a reader expects 0.975; the rounds, each by its fastest runs, say 0.893."""
    told = "the ratio is the median of the rounds' ratios, each of its fastest runs"
    assert told in flat(to_text(make(measurement={"baseline_ms": 2.02, "candidate_ms": 1.97})))
    assert told not in flat(to_text(make()))


def test_axes_without_a_name_are_called_so(make: Make) -> None:
    text = flat(to_text(make(verification={"shapes": (("?", (64, 96)), ("batch", (1, 2)))})))
    assert ", axes without a name = 64 and 96, batch = 1 and 2" in text


def test_nodes_on_another_provider_are_named(make: Make) -> None:
    names = tuple(f"Add add_{i}" for i in range(7))
    text = flat(to_text(make(measurement={"elsewhere": names, "provider": "cuda"})))
    assert (
        "7 nodes run elsewhere than on cuda: Add add_0, Add add_1, Add add_2, Add add_3, Add add_4 and 2 more." in text
    )


def test_the_metric_is_shown(make: Make) -> None:
    text = flat(to_text(make(metric={})))
    assert "top1 0.978 -> 0.977" in text
    assert "top1 0.978 0.977 drop 0.001 (95%: -0.002 to 0.004)" in text
    assert "top1 was computed on 1,000 samples against labels." in text


def test_a_metric_without_an_interval(make: Make) -> None:
    text = to_text(make(metric={"low": float("-inf"), "high": float("inf")}))
    assert "drop 0.001" in text and "inf" not in text.split("drop 0.001")[1].split("\n")[0]


def test_one_of_each_is_singular(make: Make, report: Report) -> None:
    one = dataclasses.replace(report.passes[2], refusals=(("why", 1),), dropped=())
    text = flat(to_text(make(passes=(one,), after=dataclasses.replace(report.after, nodes=1))))
    assert "1,234 -> 1 node," in text
    assert "1 edit, 1 near miss" in text


def test_nothing_to_change(make: Make, report: Report) -> None:
    text = to_text(make(passes=(report.passes[1],), slow_passes=(), after=report.before))
    assert text.startswith("encoder.onnx: nothing to change, 1,234 nodes, 1.85 MB,")


def test_edits_that_were_all_dropped_are_not_nothing_to_change(make: Make, report: Report) -> None:
    dropped = dataclasses.replace(report.passes[2], applied=(), status="dropped")
    assert len(dropped.dropped) == 1
    text = to_text(make(passes=(dropped,), slow_passes=(), after=report.before))
    assert text.startswith("encoder.onnx: nothing changed, 1 edit dropped, 1,234 nodes, 1.85 MB,")


def test_a_result_that_was_made_without_passes_lists_none(make: Make) -> None:
    assert "Passes" in to_text(make()) and "Passes" not in to_text(make(passes=(), slow_passes=()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"opset": (24, 21)}, "opset 24 -> 21"),
        ({"fixed_axes": (("batch", 1), ("x:2", 8))}, "batch fixed to 1, x:2 fixed to 8"),
        ({"opset": (24, 21), "fixed_axes": (("batch", 1),)}, "batch fixed to 1, opset 24 -> 21"),
    ],
)
def test_what_was_asked_for_is_a_change(change: dict[str, Any], said: str, make: Make, report: Report) -> None:
    text = flat(to_text(make(passes=(report.passes[1],), slow_passes=(), after=report.before, **change)))
    assert text.startswith(f"encoder.onnx: {said}, 1,234 -> 1,234 nodes, 1.85 -> 1.85 MB,")
    if "fixed_axes" in change:
        assert "Axis batch dynamic 1 fixed" in text


def test_opset_is_shown_when_it_changed(make: Make) -> None:
    assert "Opset" not in to_text(make())
    assert "Opset 13 17" in flat(to_text(make(opset=(13, 17))))


def test_only_the_worst_of_many_outputs_are_listed(make: Make, logits: Any) -> None:
    outputs = tuple(
        dataclasses.replace(logits, name=f"output_{i:03d}", relative=i * 1e-9, ok=i != 5) for i in range(100)
    )
    shown = to_text(make(verification={"outputs": outputs}))
    assert "output_099" in shown and "output_005" in shown and "output_000" not in shown
    assert len(set(re.findall(r"output_\d{3}", shown))) == OUTPUTS
    assert "and 92 outputs that deviate less" in shown
    assert "output_000" in to_text(make(verification={"outputs": outputs}), verbose=True)


def test_hostile_names_are_harmless(make: Make, report: Report, logits: Any) -> None:
    evil = "[bold red]x[/]\x1b[2J\u202e\n[/link]"
    site = Site("fold-constants", evil, evil)
    hostile = dataclasses.replace(
        report.passes[0],
        reason=evil,
        applied=(AppliedEdit(site, evil),),
        dropped=(DroppedEdit(site, evil, evil),),
        refusals=((evil, 1),),
    )
    outputs = (dataclasses.replace(logits, name=evil, note=evil, kind="string"),)
    stream = io.StringIO()
    render(
        make(
            model=f"/tmp/{evil}",
            recipe=evil,
            data=evil,
            notes=(evil,),
            passes=(hostile,),
            verification={"outputs": outputs, "notes": (evil,), "shapes": ((evil, (1,)),)},
            measurement={"elsewhere": (evil,)},
            metric={"name": evil},
        ),
        Console(file=stream, width=120, force_terminal=False),
        verbose=True,
    )
    text = stream.getvalue()
    assert "[bold red]x[/]" in text
    assert "\x1b" not in text and "\u202e" not in text
    assert r"\x1b[2J\u202e" in text


def test_passes_that_found_nothing_are_named_together_unless_all_is_asked_for(report: Report) -> None:
    idle = (dataclasses.replace(report.passes[0], name=f"idle-{i}", status="unchanged", applied=()) for i in range(4))
    longer = dataclasses.replace(report, passes=(*report.passes, *idle))
    assert "idle-0, idle-1, idle-2, idle-3" in flat(to_text(longer))
    verbose = flat(to_text(longer, verbose=True))
    assert "idle-0, idle-1" not in verbose
    assert all(f"unchanged idle-{i}" in verbose for i in range(4))


def test_the_hint_names_no_pass_where_several_had_near_misses(report: Report) -> None:
    passes = tuple(dataclasses.replace(p, refusals=(("no", 1),)) for p in report.passes[:2])
    assert "models/encoder.onnx -p PASS" in to_text(dataclasses.replace(report, passes=passes), width=140)


def test_groups_that_were_removed_are_listed_with_what_they_save_and_cost(removals: Report) -> None:
    text = flat(to_text(removals))
    assert "conv1.weight 64 -> 48 -3.2% -20.0% 2.1% 50.0% -> 3.4%" in text
    assert "Gone: 80.0% of the channels that could go, 50.0% of the parameters, 20.0% of the multiply-adds." in text
    assert "asked for 85.0% of the time, reached 86.2% (95% interval 84.0% to 88.0%)." in text
    assert "Expected: how far the outputs deviate" in text
    assert "Measured: how far the worst layer behind is off" in text
    assert "blocks of 16 channels" in text


def test_a_goal_that_was_not_measured_is_said_to_be_so(removals: Report, make: Make) -> None:
    goal = dataclasses.replace(removals.reached[0], reached=None, low=None, high=None)
    text = flat(to_text(make(passes=removals.passes, reached=(goal,))))
    assert "asked for 85.0% of the time; the result was not measured." in text


def test_only_the_groups_that_save_most_are_listed_unless_all_are_asked_for(removals: Report, make: Make) -> None:
    done = removals.passes[-1]
    edits = [
        dataclasses.replace(edit, removed=_saving(edit.removed, i)) for i in range(12) for edit in done.applied[:1]
    ]
    found = make(passes=(dataclasses.replace(done, applied=tuple(edits)),))
    text, verbose = (to_text(found, verbose=v) for v in (False, True))
    assert "group11 " in text and "group3 " not in text
    assert "and 4 groups that save less (--verbose lists them)" in text
    assert "group3 " in verbose and "that save less" not in verbose


def _saving(removed: Any, parameters: int) -> Any:
    return dataclasses.replace(removed, name=f"group{parameters}", parameters=Change(1000, 1000 - parameters))


@pytest.mark.parametrize("width", [60, 80, 100])
def test_the_table_of_what_was_removed_fits_with_its_names(removals: Report, width: int) -> None:
    text = to_text(removals, width=width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    assert re.search(r"conv1.weight +(-3.2%|64 -> 48)", text)


def test_what_was_expected_of_all_groups_stands_beside_how_far_the_result_is_off(removals: Report, make: Make) -> None:
    output = dataclasses.replace(removals.verification.outputs[0], lost=0.048)
    done = removals.passes[-1]
    first = done.applied[0]
    text = to_text(make(passes=(done,), verification={"outputs": (output,)}))
    assert "Outputs of the result deviate by 4.8%, root of the lost part of their power." in flat(text)
    two = tuple(dataclasses.replace(first, removed=_expecting(first.removed, share)) for share in (0.03, 0.04))
    text = to_text(make(passes=(dataclasses.replace(done, applied=two),), verification={"outputs": (output,)}))
    assert "deviate by 4.8%, root of the lost part of their power; expected of these groups together: 5.0%." in flat(
        text
    )


def test_it_is_said_when_what_was_expected_was_too_hopeful(removals: Report, make: Make) -> None:
    done = removals.passes[-1]
    edit = dataclasses.replace(done.applied[0], removed=_expecting(done.applied[0].removed, 0.02))
    for lost, told in ((0.0401, True), (0.04, False), (0.001, False)):
        output = dataclasses.replace(removals.verification.outputs[0], lost=lost)
        text = to_text(make(passes=(dataclasses.replace(done, applied=(edit,)),), verification={"outputs": (output,)}))
        assert ("expected of these groups together: 2.0%. That was too hopeful: " in flat(text)) is told


def _expecting(removed: Any, share: float) -> Any:
    return dataclasses.replace(removed, predicted=Damage(share, "outputs"))
