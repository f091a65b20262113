"""The graft as a pass of a pipeline."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import ClassVar, Literal

import onnx_ir as ir

from onnxopt.contract import Context, Edit, GraphPass, Guarantee, Refusal, Site
from onnxopt.errors import ModelError, UsageError
from onnxopt.graft.reasons import RefusedError
from onnxopt.graft.transplant import graft


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graft(GraphPass):
    """Put a part of another model in the place of a part of this one.

    Unlike other passes it opens a file and runs models: it brings its own proof that the part computes here what it
    computes in the donor, as `onnxopt graft` does. The result is the reference for the passes behind it. Cuts of
    several tensors, whose names a pipeline cannot hold, are for `onnxopt graft`.

    Attributes:
        donor: Path of the model that the part is taken from.
        take: The part: block:N, nodes:GLOB, backbone or a->b.
        replace: What it replaces here, in the same form.
        after: Instead of replacing: the tensor behind which it is inserted.
        repeat: How many copies in a row.
        adapters: Whether nodes may be put in where types or shapes do not agree.
    """

    name: ClassVar[str] = "graft"
    guarantee: ClassVar[Guarantee] = Guarantee.REDEFINES

    donor: str = ""
    take: str = ""
    replace: str = ""
    after: str = ""
    repeat: int = 1
    adapters: Literal["none", "allow"] = "none"

    def skip_reason(self, model: ir.Model, ctx: Context) -> str | None:
        """Return that there is nothing to graft, when that is so."""
        if not self.donor or not self.take or bool(self.replace) == bool(self.after):
            return "it needs a donor, what to take from it, and either what it replaces or behind which tensor it goes."
        return None

    def run(self, model: ir.Model, ctx: Context) -> Iterator[Edit | Refusal]:
        """Yield the graft, if it is proven."""
        site = Site(self.name, "", self.after or self.replace)
        try:
            done = graft(
                model,
                self.donor,
                with_=self.take,
                replace=self.replace or None,
                after=self.after or None,
                repeat=self.repeat,
                adapters=self.adapters,
                seed=ctx.seed,
            )
        except (RefusedError, UsageError, ModelError) as refused:
            yield Refusal(site, str(refused))
            return
        yield Edit(site, done.certificate.words()[0].rstrip("."), functools.partial(_become, model, done.model))


def _become(model: ir.Model, other: ir.Model) -> None:
    """Make a model what another is."""
    model.graph = other.graph
    model.ir_version = other.ir_version
    model.functions.clear()
    model.functions.update(other.functions)
