"""Atomic file writes, and a lock on a run's folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from train import RunError, UsageError

UNFINISHED = ".part"  # suffix of a file that is being written


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces ``path`` once all of it is on the disk.

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
        # torch.save raises RuntimeError; the system's error is its context.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise cannot_write(path, reason) from error


def cannot_write(path: Path, reason: OSError) -> RunError:
    """The error for a full disk, or another reason of the system."""
    return RunError(f"cannot write {path}: {reason.strerror}")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``folder``; it is released when this process ends, too.

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
    """Flush a folder to the disk, so that renames in it survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
