"""What the kernels compile to, for chips this machine need not have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent.parent
SMALL_AMPERE = (
    101376  # bytes of shared memory on sm_86, sm_89 and sm_120, which share sm_80's tiles
)


def ledger(tmp_path: Path, *arguments: str) -> list[dict]:
    """In a process of its own: this one may have imported the kernels for the interpreter."""
    out = tmp_path / "ledger.json"
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.codegen", "--out", str(out), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(out.read_text())["rows"]


def check(rows: list[dict], instruction: str) -> None:
    assert {row["kernel"] for row in rows} == {
        "forward_kernel",
        "delta_kernel",
        "dkdv_kernel",
        "dq_kernel",
    }
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert not row["serialized"], row
        assert row["shared_bytes"] <= row["shared_limit"], row
        if row["kernel"] != "delta_kernel":
            assert row["tensor_core"].get(instruction), row


def test_sm_90(tmp_path: Path) -> None:
    arguments = ("--targets", "sm_90", "--dtypes", "bf16", "--head-dims", "64", "128")
    check(ledger(tmp_path, *arguments), "wgmma")


@pytest.mark.parametrize(
    ("target", "instruction"), [("sm_80", "mma"), ("sm_100", "tcgen05"), ("gfx942", "mfma")]
)
def test_other_chips(tmp_path: Path, target: str, instruction: str) -> None:
    arguments = ("--dtypes", "fp16", "--head-dims", "128", "--masks", "causal")
    rows = ledger(tmp_path, "--targets", target, *arguments)
    check(rows, instruction)
    if target == "sm_80":
        assert all(row["shared_bytes"] <= SMALL_AMPERE for row in rows)


def test_wide_types(tmp_path: Path) -> None:
    arguments = ("--dtypes", "fp32", "fp64", "--head-dims", "64", "--masks", "causal")
    for row in ledger(tmp_path, "--targets", "sm_80", *arguments):
        assert row["spill_bytes"] == 0, row
        assert row["shared_bytes"] <= SMALL_AMPERE, row


def test_refuses_to_compile_interpreted_kernels(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.codegen"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert "TRITON_INTERPRET" in process.stderr
