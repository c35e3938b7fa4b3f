"""The examples under the README's "Swap it in", each run as a program of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
