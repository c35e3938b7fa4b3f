"""The layer's tests with other versions than the pinned ones: ``make matrix``, ``nox -s newest``.

Each session makes an environment of its own: the versions of ``constraints.txt``, but for those
that ``VERSIONS`` names. Their torch is the CUDA build, several GB; no GPU is used. What was run and
passed stands in ``docs/limits.md``; the ranges of ``pyproject.toml`` follow from it.
"""

from __future__ import annotations

import re
from pathlib import Path

import nox

ROOT = Path(__file__).parent
VERSIONS = {
    # Triton 3.6.0's interpreter breaks on NumPy 2.4: bounds of loops that are tensors.
    "oldest": {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.23.0", "numpy": "2.3.5"},
    "newest": {"torch": "2.15.0", "triton": "3.9.0", "transformers": "5.24.0"},
}
# The layer, its doors and its compiled kernels. The demo, the pages and the benchmarks are run with
# the pinned versions alone.
ROOMS = ("distributed", "integrations", "kernels", "modules", "suites")
# What compares with files written by the pinned versions, reads the registers that their ptxas
# gives, or looks at the repository alone.
PINNED_ALONE = ("test_architecture", "test_compile", "test_packaging", "test_readme", "test_sweep")
TESTS = (
    *(f"tests/{room}" for room in ROOMS),
    # pytest does not ignore a file that it is given.
    *sorted(
        f"tests/{path.name}"
        for path in (ROOT / "tests").glob("test_*.py")
        if path.stem not in PINNED_ALONE
    ),
    "tests/ptx/test_compiled.py",
)

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True


def _constraints(versions: dict[str, str]) -> str:
    """``constraints.txt`` with other versions of some packages."""
    kept = []
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name = re.split("[=#]", line)[0]
        if name not in versions:
            kept.append(line)
    return "\n".join([*kept, *(f"{name}=={version}" for name, version in versions.items())])


def _tests(session: nox.Session) -> None:
    file = Path(session.create_tmp()) / "constraints.txt"
    file.write_text(_constraints(VERSIONS[session.name]), encoding="utf-8")
    session.install("-c", str(file), "-e", ".[train,test,hf]")
    ignored = (f"--ignore-glob=*/{name}.py" for name in PINNED_ALONE)
    command = ["python", "-m", "pytest", "-n", "auto", "--dist", "worksteal"]
    session.run(*command, *ignored, *TESTS, *session.posargs)


for each in VERSIONS:
    nox.session(_tests, name=each)
