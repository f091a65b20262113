"""What the commands that cut and paste have in common: the manifest, and how they end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxopt.cli.options.values import F
from onnxopt.errors import UsageError
from onnxopt.textfile import write_text

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnxopt.graft.certificate import ExtractCertificate, GraftCertificate


def manifest_option() -> Callable[[F], F]:
    """Add `--manifest`."""
    return click.option(
        "--manifest", metavar="FILE.json", type=click.Path(), help="Also write the certificate, with hashes, to a file."
    )


def manifest_file(path: str | None, target: Path | None, *models: str) -> Path | None:
    """Return where the manifest goes.

    Raises:
        UsageError: If it would overwrite a model, is no .json, or there is no result that it could tell about.
        OutputError: If nothing can be written there.
    """
    from onnxopt.model import check_output

    if path is None:
        return None
    if target is None:
        raise UsageError("--manifest tells about a file that was written: name one with --output.")
    found = Path(path)
    if found.suffix.lower() != ".json":
        raise UsageError(f"The manifest {path} must end in .json.")
    if any(found.resolve() == m.resolve() for m in (target, *map(Path, models))):
        raise UsageError(f"The manifest {path} would overwrite a model.")
    check_output(found)
    return found


def conclude(
    model: ir.Model,
    certificate: ExtractCertificate | GraftCertificate,
    target: Path | None,
    manifest: Path | None,
    *,
    quiet: bool,
) -> None:
    """Write the result and what is known about it, and print that.

    Args:
        model: The result.
        certificate: What is known about it.
        target: Where the result goes; None to write nothing.
        manifest: Where the certificate goes; None to write none.
        quiet: Whether to print nothing.
    """
    from onnxopt import model as models
    from onnxopt.cli import written
    from onnxopt.graft.certificate import files_of
    from onnxopt.report.json import dump, plain
    from onnxopt.report.words import printable

    lines = certificate.words()
    if target is not None:
        models.save(model, target)
        written().append(str(target))
        lines.append(f"Wrote {target}.")
    if manifest is not None and target is not None:
        certificate = dataclasses.replace(certificate, result=files_of(models.load(target)))
        write_text(manifest, dump(plain(certificate)))
        written().append(str(manifest))
        lines.append(f"Wrote {manifest}.")
    if not quiet:
        click.echo("\n".join(map(printable, lines)))
