"""Where commands write: checked before the long run, written as a whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from onnxopt.errors import OutputError, UsageError


def destination(source: str, output: str | None, *, in_place: bool | None = None) -> Path | None:
    """Return where the model goes, or None when nothing is to be written.

    A link that is overwritten in place stays: the file it points to is replaced.

    Args:
        source: The input.
        output: The path that was given, if any.
        in_place: Whether the input is to be replaced; None where the command has no such option.

    Raises:
        UsageError: If the options contradict each other, or the input would be overwritten without `--in-place`.
        OutputError: If nothing can be written there, or what is there is no model.
    """
    from onnxopt.model import check_output

    if in_place and output is not None:
        raise UsageError("Give either --output or --in-place, not both.")
    if output is not None:
        check_output(output)
    if output is not None and _same(Path(output), Path(source)):
        other = "give another name" if in_place is None else "use --in-place to overwrite it"
        raise UsageError(f"{output} is the input itself; {other}.")
    path = os.path.realpath(source) if in_place and Path(source).is_symlink() else source if in_place else output
    if path is None:
        return None
    check_output(path)
    _require_model(Path(path))
    return Path(path)


def _require_model(path: Path) -> None:
    """Raise an OutputError for an existing file that is no model: what is named by mistake must not be lost."""
    from onnxopt.proto.formats import may_be_a_model

    # a link is replaced, and what it points to stays
    if path.is_file() and not path.is_symlink() and not may_be_a_model(path):
        raise OutputError(f"{path} exists and is no ONNX model; give another name, or remove it first.")


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
    check_output(path)
    if any(model is not None and _same(Path(path), model) for model in models):
        raise UsageError(f"The patch {path} would overwrite the model.")
    _require_model(Path(path))
    return Path(path)


def check_state(path: str) -> None:
    """Check before the search that what it knows can be written.

    Raises:
        OutputError: If it cannot.
    """
    from onnxopt.model import check_output

    check_output(path)


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
        check_output(path)
        if any(model is not None and _same(path, model) for model in models):
            raise UsageError(f"The report {path} would overwrite the model.")
    return found


def _same(first: Path, second: Path) -> bool:
    """Whether two paths lead to one file; the second may be one that cannot be looked up, which loading reports."""
    try:
        second.exists()
    except OSError:
        return False
    if first.exists() and second.exists():
        return first.samefile(second)
    return first.resolve() == second.resolve()
