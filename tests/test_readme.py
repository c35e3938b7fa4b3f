"""The README's examples, each run as a program of its own: "Swap it in" and several processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flashlayer

README = Path(__file__).parent.parent / "README.md"


def examples() -> dict[str, str]:
    """Every python block of the section, by the heading above it."""
    section = README.read_text().split("\n## Swap it in\n")[1].split("\n## ")[0]
    found = {}
    for part in section.split("\n### ")[1:]:
        heading = part.splitlines()[0]
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", part, flags=re.DOTALL)):
            found[f"{heading} {number}" if number else heading] = block
    return found


@pytest.mark.parametrize("example", examples().values(), ids=examples())
def test_example_runs(example: str) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        capture_output=True,
        text=True,
        cwd=README.parent,
    )
    assert result.returncode == 0, result.stderr


def test_example_over_several_processes_runs(tmp_path: Path) -> None:
    section = README.read_text().split("\n## A sequence over several processes\n")[1]
    program = tmp_path / "ring.py"
    program.write_text(section.split("```python\n")[1].split("```")[0])
    # Standalone: torchrun meets on a free port of its own choice.
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [sys.executable, *command, str(program)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(README.parent), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        assert f"rank {rank}: (1, 512, 64) of (1, 1024, 64)" in result.stdout


def test_online_softmax_is_as_long_as_the_readme_says() -> None:
    lines = Path(flashlayer.online_softmax.__file__).read_text().splitlines()
    assert f"(flashlayer/online_softmax.py), {len(lines)} lines" in README.read_text()
