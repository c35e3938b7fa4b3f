"""Starts :mod:`tests.ptx.child` once for all tests, and all workers of pytest-xdist."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
INSTALLED = "installed"  # Triton's version in this environment


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of a run: theirs lie in it."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for other processes that do the same."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def environment(cache: Path, triton: str = INSTALLED) -> dict[str, str]:
    """Of a process that compiles: a Triton cache of its own, and no interpreter."""
    variables = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    search = [str(installed(triton))] if triton != INSTALLED else []
    return variables | {
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join([*search, str(ROOT)]),
        "OMP_NUM_THREADS": "1",
    }


def results(
    factory: pytest.TempPathFactory, suite: str, arch: int, triton: str = INSTALLED
) -> dict[str, dict[str, Any]]:
    """What a suite gave on a target, by the name of the case or fault; run by who asks first."""
    folder = shared_folder(factory) / f"ptx-{suite}-{arch}-{triton}"
    folder.mkdir(exist_ok=True)
    out = folder / "results.jsonl"
    with locked(folder / "lock"):
        if not (folder / "finished").exists():
            # The plain suites of a version share their compiled kernels.
            cache = folder / "cache" if suite == "native" else folder.parent / f"ptx-cache-{triton}"
            command = [sys.executable, "-m", "tests.ptx.child", "--suite", suite]
            process = subprocess.run(
                [*command, "--arch", str(arch), "--out", str(out)],
                cwd=ROOT,
                env=environment(cache, triton),
                capture_output=True,
                text=True,
            )
            failed = f"status {process.returncode}\n{process.stderr}"
            (folder / "finished").write_text(failed if process.returncode else "")
    failure = (folder / "finished").read_text()
    if failure:
        raise RuntimeError(f"tests.ptx.child on sm_{arch} ended with:\n{failure[-3000:]}")
    return {r.get("case"): r for r in map(json.loads, out.read_text().splitlines())}


def installed(version: str) -> Path:
    """Where Triton's ``version`` lies, installed by pip beside the environment on first use.

    Raises:
        OSError: If pip can't fetch it.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "flashlayer-tests"
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    folder = cache / f"triton-{version}-{python}"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / "lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache) as fresh:
                pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
                process = subprocess.run(
                    [*pip, "--disable-pip-version-check", "--target", fresh, f"triton=={version}"],
                    capture_output=True,
                    text=True,
                )
                if process.returncode != 0:
                    raise OSError(process.stderr.strip()[-500:])
                # Renamed when complete: an install that was interrupted starts again.
                Path(fresh).rename(folder)
                Path(fresh).mkdir()
    return folder
