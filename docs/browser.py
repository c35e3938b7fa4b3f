"""Headless Chromium, which prints the book and runs the tests of the site's JavaScript."""

from __future__ import annotations

import shutil
import subprocess
import tempfile

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
)


def find_chromium() -> str | None:
    """Path of the first that is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def chromium(*arguments: str) -> str:
    """What Chromium prints to stdout, run with a new profile.

    Raises:
        FileNotFoundError: none is installed.
        subprocess.CalledProcessError: it failed; ``stderr`` says why.
    """
    path = find_chromium()
    if path is None:
        found = f"none of {', '.join(NAMES)} is on the PATH"
        raise FileNotFoundError(f"needs Chromium (Debian: apt-get install chromium): {found}")
    with tempfile.TemporaryDirectory() as profile:
        command = [path, *FLAGS, f"--user-data-dir={profile}", *arguments]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=300
        ).stdout
