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


def ledger(tmp_path: Path, *arguments: str) -> dict[str, list[dict]]:
    """In a process of its own: this one may have imported the kernels for the interpreter."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks", "codegen", "--out", str(tmp_path), "--jobs", "1"]
    process = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads((tmp_path / "codegen.json").read_text())


def check(
    rows: list[dict],
    instruction: str | None,
    kernels: tuple[str, ...] = ("forward_kernel", "delta_kernel", "dkdv_kernel", "dq_kernel"),
) -> None:
    """The rules of the ledger; ``instruction`` multiplies the matrices, if any has to."""
    assert {row["kernel"] for row in rows} == set(kernels)
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert not row["serialized"], row
        assert row["shared_bytes"] <= row["shared_limit"], row
        assert row["blocks_per_sm"] != 0, row
        if row["target"] == "sm_80":
            assert row["shared_bytes"] <= SMALL_AMPERE, row
        if instruction is not None and row["kernel"] != "delta_kernel":
            assert row["tensor_core"].get(instruction), row


def check_loops(rows: list[dict]) -> None:
    """The hot loop does the products that the mathematics has, and no more."""
    products = {"forward_kernel": 2, "dkdv_kernel": 4, "dq_kernel": 3, "tangent_kernel": 6}
    for row in rows:
        if row["kernel"] != "delta_kernel":
            assert row["products"] == products[row["kernel"]], row
            assert 0 < row["peak_share"]["no_overlap"] < row["peak_share"]["full_overlap"] <= 1, row


@pytest.mark.parametrize("head_dim", ["64", "128"])
def test_default_tiles_and_loops_on_sm_90(tmp_path: Path, head_dim: str) -> None:
    arguments = ("--targets", "sm_90", "--dtypes", "bf16", "--head-dims", head_dim)
    rows = ledger(tmp_path, *arguments, "--options", "none")["rows"]
    assert {row["mask"] for row in rows} == {"full", "causal"}
    check(rows, "wgmma")
    check_loops(rows)


@pytest.mark.parametrize(
    ("target", "instruction", "head_dims"),
    [
        ("sm_80", "mma", ["64", "128"]),
        pytest.param("sm_80", "mma", ["256"], marks=pytest.mark.slow),
        pytest.param("sm_90", "wgmma", ["256"], marks=pytest.mark.slow),
        ("sm_100", "tcgen05", ["64", "128"]),
        pytest.param("sm_100", "tcgen05", ["256"], marks=pytest.mark.slow),
        ("gfx942", "mfma", ["64", "128"]),
        pytest.param("gfx942", "mfma", ["256"], marks=pytest.mark.slow),
    ],
)
def test_default_tiles(tmp_path: Path, target: str, instruction: str, head_dims: list[str]) -> None:
    arguments = ("--targets", target, "--dtypes", "bf16", "--head-dims", *head_dims)
    check(ledger(tmp_path, *arguments, "--options", "none")["rows"], instruction)


@pytest.mark.slow
def test_half_precision(tmp_path: Path) -> None:
    """fp16 compiles like bf16: the tile table doesn't tell them apart."""
    arguments = ("--targets", "sm_90", "--dtypes", "fp16", "--head-dims", "128")
    rows = ledger(tmp_path, *arguments, "--masks", "causal", "--options", "none")["rows"]
    check(rows, "wgmma")


def test_the_warp_specialised_kernels(tmp_path: Path) -> None:
    """At the head dimension that leaves them fewer registers."""
    arguments = ("--targets", "sm_90", "--dtypes", "bf16", "--head-dims", "128")
    rows = ledger(tmp_path, *arguments, "--masks", "causal", "--options", "specialized")["rows"]
    assert len(rows) == 3
    check(rows, "wgmma", ("hopper_forward_kernel", "hopper_dkdv_kernel", "hopper_dq_kernel"))


def test_tangents(tmp_path: Path) -> None:
    arguments = ("--targets", "sm_80", "sm_90", "--dtypes", "bf16", "--head-dims", "64", "128")
    rows = ledger(tmp_path, *arguments, "--masks", "causal", "--options", "tangents")["rows"]
    for target, instruction in (("sm_80", "mma"), ("sm_90", "wgmma")):
        check([x for x in rows if x["target"] == target], instruction, ("tangent_kernel",))
    check_loops(rows)


def test_wide_types(tmp_path: Path) -> None:
    arguments = ("--targets", "sm_80", "--dtypes", "fp32", "fp64", "--head-dims", "64")
    check(ledger(tmp_path, *arguments, "--masks", "causal", "--options", "none")["rows"], None)


def test_numbers_from_inside_the_softmax(tmp_path: Path) -> None:
    """They take registers, for which the tiles leave room; no exponential is taken twice."""
    arguments = ("--targets", "sm_100", "--dtypes", "bf16", "--head-dims", "128")
    rows = ledger(tmp_path, *arguments, "--masks", "causal", "--options", "return_aux")["rows"]
    check(rows, "tcgen05")
    (forward,) = (row for row in rows if row["kernel"] == "forward_kernel")
    assert forward["per_score"]["exp2"] < 1.2


def test_refuses_to_compile_interpreted_kernels(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks", "codegen"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert "TRITON_INTERPRET" in process.stderr
