"""Files that tensors refer to, and writing to files."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from onnxopt.errors import ModelError

_CHUNK = 1 << 20
# What copy_file_range answers where the file systems cannot do it.
_NO_KERNEL_COPY = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV}


class DataFile:
    """An open file that tensors refer to. It stays readable when its path is replaced or removed.

    Attributes:
        path: Where it was opened.
        size: Its size in bytes.
    """

    def __init__(self, path: Path) -> None:
        """Open a regular file.

        Raises:
            OSError: If it cannot be opened.
            ModelError: If it is no regular file.
        """
        self._fd = -1
        # Without O_NONBLOCK a named pipe would wait for a writer.
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise ModelError(f"{path} is {kind}.")
        self.path = path
        self.size = status.st_size
        self._stamp = (status.st_size, status.st_mtime_ns)
        self._map: mmap.mmap | None = None

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def require_unchanged(self) -> None:
        """Raise a ModelError when somebody has written into the file since it was opened."""
        status = os.fstat(self._fd)
        if (status.st_size, status.st_mtime_ns) != self._stamp:
            raise ModelError(f"{self.path} was changed by another program after it was loaded; load it again.")

    def is_at(self, path: Path) -> bool:
        """Whether a path leads to this very file, and nobody has written into it since it was opened."""
        try:
            found = path.stat()
        except OSError:
            return False
        return os.path.samestat(found, os.fstat(self._fd)) and (found.st_size, found.st_mtime_ns) == self._stamp

    def mapped(self) -> mmap.mmap:
        """Return the whole file, mapped into memory read-only. It must not be empty."""
        if self._map is None:
            self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        return self._map

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of the file, without mapping them.

        Raises:
            ModelError: If the file has become shorter.
        """
        pieces = []
        while length:
            piece = os.pread(self._fd, length, offset)
            if not piece:
                raise ModelError(f"{self.path} became shorter after it was loaded; load it again.")
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def chunks(self, offset: int, length: int) -> Iterator[bytes]:
        """Yield bytes of the file in pieces of at most 1 MiB."""
        for start in range(offset, offset + length, _CHUNK):
            yield self.read(start, min(_CHUNK, offset + length - start))

    def copy_to(self, target: int, offset: int, length: int) -> None:
        """Append bytes of the file to an open regular file, inside the kernel where it can.

        Args:
            target: The file descriptor, positioned where to write.
            offset: First byte to copy.
            length: How many.
        """
        end = offset + length
        if sys.platform == "linux":
            offset = self._copy_in_kernel(target, offset, end)
        for chunk in self.chunks(offset, end - offset):
            write_all(target, chunk)

    def _copy_in_kernel(self, target: int, offset: int, end: int) -> int:
        """Return how far the copy came: to `end`, or to where the kernel would not go on."""
        while offset < end:
            try:
                copied = os.copy_file_range(self._fd, target, min(1 << 30, end - offset), offset)
            except OSError as error:
                if error.errno in _NO_KERNEL_COPY:
                    break
                raise
            if not copied:
                break
            offset += copied
        return offset


def write_all(target: int, data: bytes | memoryview) -> None:
    """Write all the bytes to a file descriptor."""
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]
