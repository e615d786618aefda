"""Files that are either complete or not there, whenever the process or the machine stops."""

from __future__ import annotations

import contextlib
import os
import sys
import weakref
from pathlib import Path
from typing import IO, ClassVar

from typing_extensions import Buffer

_TEMPORARY = ".tmp"


def write_file(path: Path, *parts: Buffer) -> None:
    """Write a file, or replace it, as one indivisible change that survives a power failure.

    Args:
        path: of the file.
        parts: its content, one after the other.

    Raises:
        OSError: if that fails; the file is as before then, and nothing is left over.
    """
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make the names of the files in a folder survive a power failure, where a system can."""
    with contextlib.suppress(OSError):  # Windows and some network file systems refuse
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_file(path: Path) -> None:
    """Remove a file that nothing names any more, if it is there."""
    with contextlib.suppress(PermissionError):  # Windows, if a reader has it mapped: later then
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, pattern: str, named: set[str]) -> None:
    """Remove what a killed writer left of a pattern: temporary files, and those without a name."""
    for path in [*folder.glob(pattern), *folder.glob(f"{pattern}{_TEMPORARY}")]:
        if path.name not in named:
            remove_file(path)


class FileLock:
    """A lock that the operating system releases when the process ends, however it ends.

    Record locks belong to the process, so that forked workers of a data loader do not hold them on.
    Within a process they do not exclude, which `_held` does.

    Raises:
        BlockingIOError: if the file is locked already.
    """

    _held: ClassVar[dict[Path, int]] = {}

    def __init__(self, path: Path) -> None:
        path = path.resolve()
        if self._held.get(path) == os.getpid():
            raise BlockingIOError(f"{path} is locked by this process")
        file = path.open("a")
        try:
            _lock(file)
        except BaseException:
            file.close()
            raise
        self._held[path] = os.getpid()
        self.release = weakref.finalize(self, self._release, path, file)
        """Release the lock; also when the object is collected, and harmless twice."""

    @classmethod
    def _release(cls, path: Path, file: IO[str]) -> None:
        file.close()
        cls._held.pop(path, None)


def _lock(file: IO[str]) -> None:
    if sys.platform != "win32":
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
