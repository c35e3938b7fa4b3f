"""The whole option table of the contract on both targets, with three versions of Triton.

``pytest -m slow tests/ptx`` runs it, two CPU hours, and writes what came out into
``benchmarks/results/compiled.md``. Other versions than the installed one come from pip, into the
user's cache folder; where that can't be, their tests are skipped.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.ptx import report
from tests.ptx.cases import TABLE, names
from tests.ptx.processes import INSTALLED, installed, results

VERSIONS = ("3.6.0", "3.7.1", "3.9.0")
TARGETS = (80, 90)
RUNS = [(triton, arch) for triton in VERSIONS for arch in TARGETS]


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``table(triton, arch)``: the results by case."""

    def run(triton: str, arch: int) -> dict[str, dict[str, Any]]:
        which = INSTALLED if triton == version("triton") else triton
        if which != INSTALLED:
            try:
                installed(triton)
            except OSError as error:
                pytest.skip(f"Triton {triton} can't be installed: {error}")
        return results(tmp_path_factory, "table", arch, which)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("triton", "arch"), RUNS)
def test_the_option_table_keeps_the_accuracy_rule(table: Any, triton: str, arch: int) -> None:
    found = table(triton, arch)
    assert list(found) == names(arch, TABLE)
    wrong = {}
    for case, result in found.items():
        assert result["triton"] == triton
        if not result["passed"]:
            wrong[case] = result["message"]
        elif result["unfenced"]:
            wrong[case] = str(result["unfenced"])
    assert not wrong, "\n".join(f"{case}: {message}" for case, message in wrong.items())
    assert all(result["executed"] > 0 for result in found.values())


@pytest.mark.slow
def test_the_results_are_written(table: Any) -> None:
    """Last of this file: by then every run has been made, or can't be."""
    found = []
    for triton, arch in RUNS:
        try:
            found += table(triton, arch).values()
        except pytest.skip.Exception:
            continue
    report.write(found)
    assert report.TABLE_PATH.read_text().count("\n| sm_") == len(
        {(r["arch"], r["triton"]) for r in found}
    )


def test_the_report_says_what_was_run_and_nothing_else(tmp_path: Path) -> None:
    base = {"arch": 90, "triton": "3.7.1", "runs": 4, "passed": True, "executed": 2_000_000}
    results = [
        base
        | {
            "case": "bf16 causal",
            "errors": {"out": 0.25, "lse": 0.5, "dq": 0.125, "dk": 0.0, "dv": 0.75},
            "unfenced": {"dq_kernel": "CTA 0, warp 1 multiplies what was written without a fence"},
        },
        base | {"case": "bf16 full", "errors": {}, "unfenced": {}, "passed": False},
        base | {"case": "bf16 causal", "triton": "3.9.0", "errors": {"out": 0.5}, "unfenced": {}},
    ]
    path = tmp_path / "compiled.md"
    report.write(results, path)
    text = path.read_text()
    assert "| sm_90 | 3.7.1 | 2 | 4 | 1 | 1 | 0.75 | 4.0 million |" in text
    assert "Triton 3.7.1 / 3.9.0" in text
    assert "| bf16 causal | 0.50 / 0.50 | 0.75 /  | 0.12* /  |  |  |  |" in text
    assert "| bf16 full" + " | failed / -" * 6 + " |" in text
    assert "| bf16 softcap | - / - |" in text
    assert "## sm_80" not in text
