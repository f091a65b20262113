"""What a candidate's passes report becomes a reason."""

from __future__ import annotations

from typing import Any

import pytest

from onnxopt.contract import AppliedEdit, DroppedEdit, PassReport, Site
from onnxopt.manager import Outcome
from onnxopt.search.candidates import Proposal
from onnxopt.search.lab import IdlePassError, NothingToDoError, _require_edits
from onnxopt.trial import Denials

SITE = Site("p", "", "y")
EDIT = (AppliedEdit(SITE, "done"),)


def done(name: str, **changes: Any) -> PassReport:
    plain = {"status": "unchanged", "reason": "", "applied": (), "dropped": (), "refusals": ()}
    return PassReport(name=name, spec=name, guarantee="approximate", seconds=0.0, **(plain | changes))


def outcome(*passes: PassReport) -> Any:
    return Outcome(None, passes, Denials())  # type: ignore[arg-type]


STATIC = Proposal("static int8", "quantize-static,quantize-weights")


def test_helpers_may_be_idle_and_what_a_candidate_is_about_may_not() -> None:
    _require_edits(outcome(done("quantize-static", applied=EDIT), done("quantize-weights")), STATIC)
    with pytest.raises(IdlePassError, match="^quantize-weights finds nothing to do$"):
        _require_edits(outcome(done("quantize-weights")), Proposal("8-bit weights", "quantize-weights"))
    smoothed = Proposal("smoothed", "smooth-activations,quantize-dynamic,quantize-weights")
    with pytest.raises(IdlePassError, match="^smooth-activations finds nothing to do$"):
        _require_edits(outcome(done("smooth-activations"), done("quantize-dynamic", applied=EDIT)), smoothed)


@pytest.mark.parametrize(
    ("changes", "reason", "applies"),
    [
        ({"status": "skipped", "reason": "it needs real inputs"}, "does not apply: it needs real inputs", False),
        ({"status": "dropped", "reason": "crashed with ValueError"}, "crashed with ValueError", True),
        ({"status": "dropped", "dropped": (DroppedEdit(SITE, "x", "crashed in apply"),)}, "crashed in apply", True),
        ({"refusals": (("too small", 2), ("shared", 5))}, "finds nothing to do: shared", False),
    ],
)
def test_the_reason_is_that_of_the_pass(changes: dict[str, Any], reason: str, applies: bool) -> None:
    with pytest.raises(IdlePassError if applies else NothingToDoError, match=f"^quantize-static {reason}$") as caught:
        _require_edits(outcome(done("quantize-static", **changes), done("quantize-weights", applied=EDIT)), STATIC)
    assert isinstance(caught.value, NothingToDoError) is not applies
