"""Where a suite is published, and a local copy of it."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from train import UsageError


@dataclass(frozen=True)
class Source:
    """A published archive."""

    url: str
    sha256: str
    folder: str  # which it unpacks into: name and version


def cache() -> Path:
    """Where suites are kept: below the user's cache folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "flashlayer" / "suites"


def fetch(source: Source) -> Path:
    """The unpacked archive, downloaded unless it is in the cache.

    Raises:
        UsageError: it can't be had, or is not what was published when it was first run.
    """
    folder = cache() / source.folder
    if folder.exists():
        return folder
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as scratch:
        archive = Path(scratch) / "archive"
        try:
            with urlopen(source.url) as response, archive.open("wb") as file:
                shutil.copyfileobj(response, file)
        except URLError as error:
            raise UsageError(
                f"can't download {source.url}: {error.reason}; --source takes a folder with it"
            ) from error
        with archive.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != source.sha256:
            raise UsageError(f"{source.url} has sha256 {found}, expected {source.sha256}")
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        # Whole or not at all, also where two runs fetch it at once.
        (Path(scratch) / source.folder).rename(folder)
    return folder
