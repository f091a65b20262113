"""Text files that are written as a whole or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from onnxopt.errors import OutputError


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is complete or, when something goes wrong, as it was before.

    Raises:
        OutputError: If it cannot be written.
    """
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", encoding="utf-8", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(text)
        temporary.chmod(_permissions(path))
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _permissions(path: Path) -> int:
    """Return the mode the file has, or a new one would get (temporary files are private)."""
    if path.exists():
        return stat.S_IMODE(path.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
