"""Files that are written whole or not at all, in a folder that one process has for itself."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from train import RunError, UsageError

UNFINISHED = ".part"  # how the name of a file ends until all of it is on the disk


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name once all of it is on the disk; until then the old one keeps it.

    Raises:
        RunError: it can't be written; the old file is as it was.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)
        # torch.save tells where it was when the system refused, and not what was refused.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise cannot_write(path, reason) from error


def cannot_write(path: Path, reason: OSError) -> RunError:
    """The one sentence about a disk that is full, or another reason of the system's."""
    return RunError(f"cannot write {path}: {reason.strerror}")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """While it is open, no other process gets to hold ``folder``; it ends with this process.

    Raises:
        UsageError: another one holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{folder} is in use: another process trains this run") from error
        yield
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, as fsync of a file does with what is in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
