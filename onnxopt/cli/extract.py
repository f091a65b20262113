"""`onnxopt extract`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from onnxopt.cli import options
from onnxopt.cli.certificate import conclude, manifest_file, manifest_option
from onnxopt.cli.files import destination
from onnxopt.cli.progress import drawing
from onnxopt.errors import UsageError

if TYPE_CHECKING:
    from onnxopt.graft.cut import Cut

_EPILOG = """
\b
Examples:
  onnxopt extract model.onnx --from relu_3 --to relu_6 -o part.onnx
  onnxopt extract model.onnx --nodes "/encoder/layer.3/*" -o layer.onnx
  onnxopt extract model.onnx --block 3 -o block.onnx --manifest block.json
  onnxopt extract model.onnx --backbone -o backbone.onnx

The part is run alone on the values that MODEL computes at its boundary, with the runtime's optimizations off, and must
compute what MODEL computes there. Without --output nothing is written: the certificate shows what would be.

Exit codes: 0 done, and OUT was written if one was named; 1 the part cannot be cut out, or does not compute the same
(OUT is not written); 2 usage, unreadable input or unwritable output; 130 interrupted.
"""


@click.command("extract", epilog=_EPILOG)
@options.model_argument()
@click.option(
    "--from",
    "inputs",
    metavar="T,...",
    multiple=True,
    help="Tensors that the part begins with; may be repeated. Names that hold a comma need a --from of their own.",
)
@click.option("--to", "outputs", metavar="T,...", multiple=True, help="Tensors that it ends with; may be repeated.")
@click.option("--nodes", metavar="GLOB", help="The nodes whose name, or the name of an output, fits.")
@click.option("--block", metavar="N", type=click.IntRange(), help="A block, counted from 0; -1 is the last.")
@click.option("--backbone", is_flag=True, help="Everything in front of the last pooling, or of the last linear layer.")
@click.option("--in", "body", metavar="PATH", help="The part lies in this body of an If, Loop or Scan: node.attribute.")
@click.option("--output", "-o", metavar="OUT", type=click.Path(), help="Where the part goes.")
@manifest_option()
@options.running_options
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
def command(model: str, output: str | None, manifest: str | None, quiet: bool, **settings: Any) -> None:
    """Cut a part out of MODEL, with all that it needs, and prove that it computes the same alone."""
    cut = _cut(model, settings)
    target = destination(model, output)
    record = manifest_file(manifest, target, model)

    from onnxopt.cli.running import options_of
    from onnxopt.graft.extraction import extract

    with drawing() as progress:
        done = extract(
            model,
            cut,
            data=settings["data"],
            seed=settings["seed"],
            shape=settings["shape"],
            options=options_of(settings),
            progress=progress,
        )
    conclude(done.model, done.certificate, target, record, quiet=quiet)


def _cut(model: str, settings: dict[str, Any]) -> Cut:
    """Return the cut that the options mean.

    Raises:
        UsageError: If they mean none, or more than one.
    """
    from onnxopt.graft.cut import Backbone, Block, Inside, Nodes, Plain, Tensors

    inputs, outputs = _names(settings["inputs"]), _names(settings["outputs"])
    cuts: list[Plain] = []
    if inputs or outputs:
        if not inputs or not outputs:
            raise UsageError(f"--{'to' if inputs else 'from'} is missing: a part lies between --from and --to.")
        cuts.append(Tensors(inputs, outputs))
    if settings["nodes"] is not None:
        cuts.append(Nodes(settings["nodes"]))
    if settings["block"] is not None:
        cuts.append(Block(settings["block"]))
    if settings["backbone"]:
        cuts.append(Backbone())
    if len(cuts) != 1:
        raise UsageError("Give one of --from with --to, --nodes, --block and --backbone to say what is cut out.")
    return cuts[0] if settings["body"] is None else Inside(cuts[0], settings["body"])


def _names(given: tuple[str, ...]) -> tuple[str, ...]:
    if len(given) > 1:
        return given
    return tuple(filter(None, (n.strip() for text in given for n in text.split(","))))
