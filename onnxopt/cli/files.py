"""Where commands write: checked before the long run, written as a whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from onnxopt.errors import UsageError


def destination(source: str, output: str | None, *, in_place: bool) -> Path | None:
    """Return where the model goes, or None when nothing is to be written.

    A link that is overwritten in place stays: the file it points to is replaced.

    Raises:
        UsageError: If the options contradict each other, or the input would be overwritten without `--in-place`.
        OutputError: If nothing can be written there.
    """
    from onnxopt.model import check_output

    if in_place and output is not None:
        raise UsageError("Give either --output or --in-place, not both.")
    if output is not None and _same(Path(output), Path(source)):
        raise UsageError(f"{output} is the input itself; use --in-place to overwrite it.")
    path = os.path.realpath(source) if in_place and Path(source).is_symlink() else source if in_place else output
    if path is None:
        return None
    check_output(path)
    return Path(path)


def patch_file(path: str | None, *models: Path | None) -> Path | None:
    """Return where the patch goes.

    Args:
        path: The path as given.
        *models: What it must not overwrite.

    Raises:
        UsageError: If it is the path of a model.
        OutputError: If nothing can be written there.
    """
    from onnxopt.model import check_output

    if path is None:
        return None
    if any(model is not None and _same(Path(path), model) for model in models):
        raise UsageError(f"The patch {path} would overwrite the model.")
    check_output(path)
    return Path(path)


def report_files(paths: tuple[str, ...], *models: Path | None) -> tuple[Path, ...]:
    """Return where the reports go.

    Args:
        paths: The paths as given.
        *models: What they must not overwrite.

    Raises:
        UsageError: If a name ends in something else than .json and .html, or is that of a model.
        OutputError: If nothing can be written there.
    """
    from onnxopt.model import check_output

    found = tuple(Path(p) for p in paths)
    for path in found:
        if path.suffix.lower() not in (".json", ".html"):
            raise UsageError(f"The report {path} must end in .json or .html.")
        if any(model is not None and _same(path, model) for model in models):
            raise UsageError(f"The report {path} would overwrite the model.")
        check_output(path)
    return found


def _same(first: Path, second: Path) -> bool:
    if first.exists() and second.exists():
        return first.samefile(second)
    return first.resolve() == second.resolve()
