"""Fetching, thinning out and counting, on a suite of a few lines. No network."""

import hashlib
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.suites import source
from tests.suites.__main__ import ROOT, main
from tests.suites.source import Source, fetch
from train import UsageError

TESTS = """
import pytest, torch

@pytest.mark.parametrize("length", [1, 2, 1000])
@pytest.mark.parametrize("number", range(40))
def test_many(number, length):
    assert length < 1000
    assert torch.ones(2, device="cuda").to("cuda:0").cuda().device.type == where

def test_not_for_us():
    raise AssertionError

def test_wrong():
    assert torch.cuda.get_device_capability() == (0, 0)
"""

PROGRAM = """
import sys, pytest, torch
from tests.suites.devices import pretend_gpu
from tests.suites.source import Source
from tests.suites.suite import Plugin, Suite

def adapt(module):
    module.where = "cuda" if torch.cuda.is_available() else "cpu"

suite = Suite(
    source=Source("", "", "theirs-1.0"),
    files=(),
    replace=pretend_gpu,
    not_applicable={"*test_not_for_us": "no such thing"},
    too_large=lambda parameters: parameters.get("length", 0) > 10,
    adapt=adapt,
)
suite.replace()
arguments = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir=.", "test_it.py"]
sys.exit(pytest.main(arguments, plugins=[Plugin(suite, int(sys.argv[1]))]))
"""


def run(folder: Path, cases: int) -> tuple[int, str]:
    (folder / "test_it.py").write_text(TESTS)
    program = [sys.executable, "-c", PROGRAM, str(cases)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    result = subprocess.run(
        program, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    return result.returncode, result.stdout


def test_counts_and_status(tmp_path: Path) -> None:
    status, output = run(tmp_path, cases=7)
    lines = [line.strip() for line in output.splitlines()]
    assert status == 1, output
    assert "7  passed" in lines
    assert "1  skipped: not applicable: no such thing" in lines
    assert "1  failed" in lines
    assert "113  left out: beyond 7 a function, or too large for a CPU" in lines


def archive(folder: Path) -> Source:
    inside = folder / "theirs-1.0"
    inside.mkdir()
    (inside / "test_it.py").write_text(TESTS)
    packed = folder / "theirs.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(inside, arcname=inside.name)
    digest = hashlib.sha256(packed.read_bytes()).hexdigest()
    return Source(packed.as_uri(), digest, "theirs-1.0")


def test_an_archive_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    published = archive(tmp_path)
    folder = fetch(published)
    assert (folder / "test_it.py").read_text() == TESTS
    (tmp_path / "theirs.tar.gz").unlink()
    assert fetch(published) == folder
    assert list(source.cache().iterdir()) == [folder]


def test_another_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    published = archive(tmp_path)
    with pytest.raises(UsageError, match="has sha256"):
        fetch(Source(published.url, "0" * 64, published.folder))
    (tmp_path / "theirs.tar.gz").unlink()
    with pytest.raises(UsageError, match="--source takes a folder"):
        fetch(published)
    assert list(source.cache().iterdir()) == []


def test_a_folder_without_the_suite_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["flash_attn", "--source", str(tmp_path)])
    assert "does not hold flash_attn" in capsys.readouterr().err
