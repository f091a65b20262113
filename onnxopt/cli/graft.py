"""`onnxopt graft`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

import click

from onnxopt.cli import options
from onnxopt.cli.certificate import conclude, manifest_file, manifest_option
from onnxopt.cli.files import destination
from onnxopt.cli.progress import drawing
from onnxopt.errors import UsageError

if TYPE_CHECKING:
    from onnxopt.graft.transplant import Grafted

_EPILOG = """
\b
A CUT is one of:
  "a,b->c,d"     from tensors to tensors, by name
  "nodes:GLOB"   the nodes whose name, or the name of an output, fits
  "block:N"      a block, counted from 0; block:-1 is the last
  "backbone"     everything in front of the last pooling, or of the last linear layer
  "CUT in PATH"  any of these within the body of an If, Loop or Scan, such as "block:1 in If_0.then_branch"

\b
Examples:
  onnxopt graft host.onnx donor.onnx --replace block:3 --with block:3 -o out.onnx
  onnxopt graft host.onnx donor.onnx --replace "pooled->logits" --with "features->scores" -o out.onnx
  onnxopt graft m.onnx m.onnx --after relu_6 --with block:2 --repeat 2 -o deeper.onnx
  onnxopt graft host.onnx fp16.onnx --replace backbone --with backbone --adapters allow -o out.onnx

The donor's part is run alone on the values that it reads in HOST, and must compute what it computes there; what does
not depend on it must be as it was. A graft that fails this is not written.

Exit codes: 0 done, and OUT was written if one was named; 1 it cannot be done, needs an adapter that is not allowed, or
cannot be proven (OUT is not written); 2 usage, unreadable input or unwritable output; 130 interrupted.
"""


@click.command("graft", epilog=_EPILOG)
@options.model_argument("host")
@options.model_argument("donor")
@click.option("--replace", metavar="CUT", help="The part of HOST to replace.")
@click.option("--after", metavar="T", help="Instead of replacing: the tensor of HOST behind which to insert.")
@click.option("--with", "with_", metavar="CUT", required=True, help="The part of DONOR to put there.")
@click.option(
    "--repeat",
    metavar="N",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="So many copies in a row.",
)
@click.option(
    "--adapters",
    type=click.Choice(["ask", "allow", "none"]),
    default="ask",
    show_default=True,
    help="Whether nodes may be put in where types or shapes do not agree; ask refuses where there is no terminal.",
)
@click.option("--output", "-o", metavar="OUT", type=click.Path(), help="Where the result goes.")
@manifest_option()
@options.running_options
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
def command(
    host: str,
    donor: str,
    adapters: Literal["ask", "allow", "none"],
    output: str | None,
    manifest: str | None,
    quiet: bool,
    **settings: Any,
) -> None:
    """Put a part of DONOR into HOST, and prove what it computes there."""
    target = destination(host, output)
    if target is not None:
        destination(donor, output)
    record = manifest_file(manifest, target, host, donor)
    if (settings["replace"] is None) == (settings["after"] is None):
        raise UsageError("Give either --replace, a part of HOST, or --after, a tensor of it.")

    from onnxopt.graft.reasons import RefusedError

    try:
        done = _graft(host, donor, "allow" if adapters == "allow" else "none", settings)
    except RefusedError as refused:
        if refused.reason != "adapter" or adapters != "ask" or not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise
        click.echo(str(refused), err=True)
        if not click.confirm("Put it in?", err=True):
            raise
        done = _graft(host, donor, "allow", settings)
    conclude(done.model, done.certificate, target, record, quiet=quiet)


def _graft(host: str, donor: str, adapters: Literal["allow", "none"], settings: dict[str, Any]) -> Grafted:
    from onnxopt.cli.running import options_of
    from onnxopt.graft.transplant import graft

    with drawing() as progress:
        return graft(
            host,
            donor,
            replace=settings["replace"],
            after=settings["after"],
            with_=settings["with_"],
            repeat=settings["repeat"],
            adapters=adapters,
            data=settings["data"],
            seed=settings["seed"],
            shape=settings["shape"],
            options=options_of(settings),
            progress=progress,
        )
