"""Every Python example of the README and of the site's pages, each run as a program of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flashlayer

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Examples that must be on these pages, by the heading above them.
EXPECTED = {
    README: [
        "The layer",
        "The layer 1",
        "Hugging Face transformers",
        "Anything on SDPA",
        "nn.MultiheadAttention",
        "Code written for flash_attn",
        "Unit-test gradients",
    ],
    ROOT / "docs" / "index.md": [
        "The layer",
        "Hugging Face transformers",
        "Anything on SDPA",
        "nn.MultiheadAttention",
        "Code written for flash_attn",
        "Unit-test gradients",
    ],
    ROOT / "docs" / "parallel.md": ["A sequence over several processes", "Sharded tensors"],
}
# What every rank of a program on several processes prints.
PRINTED = {
    "ring.py": "(1, 512, 64) of (1, 1024, 64)",
    "shards.py": "(1, 2, 100, 64) of (1, 4, 100, 64)",
}


def examples(page: Path) -> dict[str, str]:
    """Every python block of a page, by the heading above it."""
    found: dict[str, str] = {}
    heading, number = "", 0
    # A comment in a block begins like a heading, so blocks are matched as a whole.
    for match in re.finditer(
        r"```(\w*)[^\n]*\n(.*?)```|^#+ ([^\n]*)$", page.read_text(), re.M | re.S
    ):
        language, block, title = match.groups()
        if title is not None:
            heading, number = title, 0
        elif language == "python":
            found[f"{heading} {number}" if number else heading] = block
            number += 1
    return found


def parameters() -> list:
    """Each distinct example once, under the first page that has it."""
    blocks = {}
    for page in PAGES:
        if page.name == "graphs.md":  # tests/test_export.py runs it
            continue
        for heading, block in examples(page).items():
            blocks.setdefault(block, f"{page.relative_to(ROOT)}: {heading}")
    return [pytest.param(block, id=name) for block, name in blocks.items()]


@pytest.mark.parametrize("example", parameters())
def test_example_runs(example: str, tmp_path: Path) -> None:
    # A comment in the first line says where an example runs on several processes.
    torchrun = re.match(r"# (\w+\.py); run it with: torchrun (.*) \1\n", example)
    # torch compiles its own forward-mode formulas with the jit it has deprecated.
    allowed = "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
    command = [sys.executable, "-W", "error", "-W", allowed, "-c", example]
    if torchrun is not None:
        program = tmp_path / torchrun[1]
        program.write_text(example)
        # Standalone: torchrun meets on a free port of its own choice.
        options = torchrun[2].split()
        command = [sys.executable, "-m", "torch.distributed.run", *options, str(program)]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    if torchrun is not None:
        for rank in range(2):
            assert f"rank {rank}: {PRINTED[torchrun[1]]}" in result.stdout


@pytest.mark.parametrize("page", EXPECTED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_examples_are_found(page: Path) -> None:
    assert list(examples(page)) == EXPECTED[page]


def test_the_front_page_shows_the_examples_of_the_readme() -> None:
    readme = set(examples(README).values())
    assert readme >= set(examples(ROOT / "docs" / "index.md").values())


def test_readme_is_at_most_140_lines() -> None:
    assert len(README.read_text().splitlines()) <= 140


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path = target.split("#")[0]
        if path and not re.match(r"\w+:", path):
            assert (page.parent / path).exists(), target


def test_online_softmax_is_as_long_as_the_chapter_says() -> None:
    lines = Path(flashlayer.online_softmax.__file__).read_text().splitlines()
    page = (ROOT / "docs" / "chapter" / "index.md").read_text()
    assert f"(../../flashlayer/online_softmax.py), {len(lines)} lines" in page
