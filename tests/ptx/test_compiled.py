"""The kernels as Triton compiles them for sm_80 and sm_90, forward and backward, in ``make test``.

Every case is judged by the accuracy rule. Asynchronous operations take effect as late as their
waits allow, warps run in random order, the race check is on, and memory that no kernel writes is
NaN. ``tests/ptx/test_table.py`` runs the whole option table.
"""

from __future__ import annotations

import math
from importlib.metadata import version
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.ptx.cases import QUICK, names
from tests.ptx.processes import results

TARGETS = (80, 90)
Result = dict[str, Any]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``compiled(arch)``: the results by case."""
    return lambda arch: results(tmp_path_factory, "quick", arch)


CASES = [(arch, name) for arch in TARGETS for name in names(arch, QUICK)]


@pytest.mark.parametrize(("arch", "case"), CASES, ids=str)
def test_compiled_kernels_keep_the_accuracy_rule(compiled: Any, arch: int, case: str) -> None:
    result = compiled(arch)[case]
    assert result["passed"], result["message"]
    assert result["executed"] > 0
    expected = {"out", "lse", "dq", "dk", "dv"}
    if "max and entropy" in case:
        expected = {"lse", "max_scores", "entropy"}
    elif "tangents" in case:
        expected = {"out", "lse", "out_tangent", "lse_tangent"}
    assert result["errors"].keys() >= expected
    assert all(0 <= ratio <= 1 for ratio in result["errors"].values())


def opcodes(result: Result, kernel: str) -> set[str]:
    return set(result["kernels"][kernel])


def has(codes: set[str], start: str) -> bool:
    return any(code.startswith(start) for code in codes)


KERNELS = ("forward_kernel", "dkdv_kernel", "dq_kernel")


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_cases_cross_the_instructions_of_sm_80(compiled: Any, kernel: str) -> None:
    codes = opcodes(compiled(80)["bf16 causal GQA"], kernel)
    assert has(codes, "mma.sync.aligned.m16n8k16.row.col.f32.bf16")
    assert has(codes, "ldmatrix.sync.aligned.m8n8.x4.shared")
    assert has(codes, "cp.async.cg.shared.global")
    assert "cp.async.wait_group" in codes
    assert has(
        opcodes(compiled(80)["tf32 causal"], kernel), "mma.sync.aligned.m16n8k8.row.col.f32.tf32"
    )
    assert has(opcodes(compiled(80)["fp64 causal"], kernel), "mma.sync.aligned.m8n8k4.row.col.f64")
    exact = opcodes(compiled(80)["fp32 sinks"], kernel)
    assert "fma.rn.f32" in exact
    assert not has(exact, "mma")


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_cases_cross_the_instructions_of_sm_90(compiled: Any, kernel: str) -> None:
    if version("triton").startswith("3.6."):
        pytest.skip("with Triton 3.6 all tiles that can go through descriptors there")
    plain = opcodes(compiled(90)["bf16 causal GQA"], kernel)
    assert has(plain, "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16")
    assert has(plain, "cp.async.cg.shared.global")
    assert has(plain, "fence.proxy.async")
    described = opcodes(compiled(90)["bf16 TMA causal"], kernel)
    assert has(described, "cp.async.bulk.tensor.4d.shared::cta.global")
    assert has(described, "mbarrier.try_wait.parity")


def test_masks_have_a_gradient_of_their_own(compiled: Any) -> None:
    for arch in TARGETS:
        result = compiled(arch)["fp16 D96 everything"]
        assert "dmask_kernel" in result["kernels"]
        assert result["errors"].keys() >= {"dattn_mask", "dsinks"}
        assert not math.isnan(sum(result["errors"].values()))
