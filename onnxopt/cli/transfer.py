"""`onnxopt transfer`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxopt.cli import options
from onnxopt.cli.output import show
from onnxopt.cli.progress import drawing
from onnxopt.errors import NothingDoneError, UsageError, VerificationError

if TYPE_CHECKING:
    from rich.console import Console

    from onnxopt.transfer.result import Certificate, Transfer

_EPILOG = """
\b
Examples:
  onnxopt transfer retrained.onnx model.int8.onnx -o retrained.int8.onnx
  onnxopt transfer a.onnx b.onnx --kind feature -o b.with-backbone-of-a.onnx
  onnxopt transfer a.onnx b.onnx --only 'encoder.*' --freeze '*.bias' -o out.onnx
  onnxopt transfer model.onnx --kind structure --seed 1 -o fresh.onnx

Exit codes: 0 done; 1 the models have the same layers and the outputs differ, or nothing corresponds; 2 usage,
unreadable input or unwritable output.
"""
_NAMES_SHOWN = 3


@click.command("transfer", epilog=_EPILOG)
@options.model_argument("src")
@options.model_argument("dst", required=False)
@click.option("--output", "-o", metavar="OUT", type=click.Path(), help="Where DST with SRC's parameters goes.")
@click.option(
    "--kind",
    type=click.Choice(["direct", "feature", "structure"]),
    default="direct",
    show_default=True,
    help="direct: all parameters. feature: all but those of the linear layers that compute the outputs. structure: the "
    "graph of SRC with new random parameters; there is no DST.",
)
@click.option(
    "--only",
    metavar="GLOB",
    multiple=True,
    help="Move only parameters of layers in which a name of DST fits; may be repeated.",
)
@click.option("--freeze", metavar="GLOB", multiple=True, help="Leave parameters of DST alone; may be repeated.")
@click.option("--no-verify", "verify", flag_value=False, default=True, help="Do not run the models and compare.")
@click.option(
    "--allow-difference",
    is_flag=True,
    help="Write OUT even if the models have the same layers and compute something else, as with another activation.",
)
@click.option("--manifest", metavar="JSON", type=click.Path(), help="Write the certificate and the map of parameters.")
@options.running_options
@options.json_option()
@click.option("--verbose", "-v", is_flag=True, help="List every parameter.")
def command(
    src: str,
    dst: str | None,
    output: str | None,
    allow_difference: bool,
    manifest: str | None,
    as_json: bool,
    verbose: bool,
    **settings: Any,
) -> None:
    """Move the parameters of SRC into the graph of DST, and write the result to OUT.

    Layers are matched by their place in the graph, not by name: SRC and DST may come from different exporters, be
    optimized, quantized or retrained. Without --output nothing is written: the report shows what would be.
    """
    from onnxopt.cli.files import destination
    from onnxopt.cli.running import options_of
    from onnxopt.textfile import write_text
    from onnxopt.transfer.run import transfer

    goal = destination(src, output)
    if goal is not None and dst is not None:
        destination(dst, output)
    account = _manifest_file(manifest, src, dst, goal)
    with drawing() as progress:
        result = transfer(
            src,
            dst,
            kind=settings["kind"],
            only=settings["only"],
            freeze=settings["freeze"],
            data=settings["data"],
            seed=settings["seed"],
            shape=settings["shape"],
            verify=settings["verify"],
            options=options_of(settings),
            progress=progress,
        )
    text = _json(result, src, dst)
    if as_json:
        click.echo(text, nl=False)
    else:
        show(lambda console: _render(result, console, verbose=verbose))
    if account is not None:
        write_text(account, text)
    _require(result, allow_difference)
    if goal is not None:
        from onnxopt.cli import written
        from onnxopt.model import save

        save(result.model, goal)
        written().append(str(goal))
        if not as_json:
            click.echo(f"Wrote {goal}.")


def _manifest_file(path: str | None, src: str, dst: str | None, goal: Path | None) -> Path | None:
    from onnxopt.model import check_output

    if path is None:
        return None
    if any(other is not None and Path(path).resolve() == Path(other).resolve() for other in (src, dst, goal)):
        raise UsageError(f"The manifest {path} would overwrite a model.")
    check_output(path)
    return Path(path)


def _require(result: Transfer, allow_difference: bool) -> None:
    """Raise when nothing was moved, or when what should be equal is not."""
    if not any(p.moved for p in result.parameters):
        raise NothingDoneError("No layer of DST certainly corresponds to one of SRC, so nothing was moved.")
    found = result.certificate
    if found is not None and found.verification is not None and not found.verification.ok and not allow_difference:
        raise VerificationError(
            f"The models have the same layers, but with SRC's parameters DST computes something else: {found.reason}. "
            "Nothing was written; --allow-difference writes it all the same."
        )


def _json(result: Transfer, src: str, dst: str | None) -> str:
    from onnxopt.report.json import dump, plain

    return dump(
        {
            "schema": 1,
            "source": src,
            "target": dst,
            "kind": result.kind,
            "coverage": result.coverage,
            "certificate": plain(result.certificate),
            "parameters": plain(result.parameters),
            "unused": list(result.unused),
            "notes": list(result.notes),
        }
    )


def _render(result: Transfer, console: Console, *, verbose: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from onnxopt.transfer.result import STATUSES

    total = sum(p.elements for p in result.parameters) or 1
    if result.certificate is not None:
        console.print(_verdict(result.certificate))
        if result.certificate.rounding is not None and result.certificate.rounding_before is not None:
            from onnxopt.report.words import deviation

            now, before = deviation(result.certificate.rounding), deviation(result.certificate.rounding_before)
            console.print(f"Rounding costs DST {now} of the output's range; with its own parameters it did {before}.")
    moved = [p for p in result.parameters if p.moved]
    verb = "drawn anew" if result.kind == "structure" else "moved"
    console.print(f"{len(moved)} of {len(result.parameters)} parameters {verb}: {result.coverage:.1%} of the numbers.")
    table = Table("match", "parameters", "share", "", box=None, pad_edge=False)
    for status in STATUSES:
        number, elements = result.count(status)
        if number and result.kind != "structure":
            table.add_row(status, str(number), f"{elements / total:.1%}", _aside(result, status))
    if table.row_count:
        console.print(table)
    for note in result.notes:
        console.print(note)
    if result.unused:
        named = ", ".join(result.unused[:_NAMES_SHOWN]) + (", ..." if len(result.unused) > _NAMES_SHOWN else "")
        console.print(f"{len(result.unused)} parameters of SRC were not used: {named}")
    for parameter in result.parameters if verbose else ():
        what = parameter.reason or " ".join(filter(None, (f"from {', '.join(parameter.sources)}", parameter.how)))
        console.print(Text(f"  {parameter.name}: {parameter.status}, {what}"))


def _aside(result: Transfer, status: str) -> str:
    """Say why parameters of a status were not moved, or that outputs confirmed them."""
    found = [p for p in result.parameters if p.status == status]
    if found and all(p.confirmed for p in found):
        return "confirmed by outputs"
    reasons = list(dict.fromkeys(p.reason for p in found if p.reason))
    return reasons[0] + (f" (and {len(reasons) - 1} other reasons)" if len(reasons) > 1 else "") if reasons else ""


def _verdict(found: Certificate) -> Any:
    from rich.text import Text

    from onnxopt.report.words import deviation, sentence

    if found.verdict == "equal":
        return Text("Certified: DST with SRC's parameters computes what SRC computes.", style="bold green")
    worst = deviation(found.verification.worst) if found.verification is not None else ""
    if found.verdict == "close":
        return Text(f"Certified but for rounding: worst deviation {worst} of the output's range.", style="bold green")
    compared = f"{found.layers_equal} of {found.layers_compared} layers compute the same in both models"
    if found.verification is not None:
        first = f" The first layer that differs is {found.first_difference}." if found.first_difference else ""
        return Text(f"Outputs differ: {sentence(found.reason)} {compared}.{first}", style="bold red")
    if found.verdict == "trunk":
        return Text(f"Outputs were not compared, because {found.reason}; {compared}.", style="bold yellow")
    return Text(f"Not certified: {sentence(found.reason)}", style="bold yellow")
