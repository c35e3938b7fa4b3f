"""The warp-specialised kernel for Hopper, as Triton compiles it, in ``make test``.

Each case runs twice, with asynchronous operations late and early and two orders of the warps.
``tests/ptx/test_table.py`` runs more of them, with four orders and three versions of Triton.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.ptx.cases import SPECIALIZED_QUICK, TABLE, names
from tests.ptx.processes import results
from tests.ptx.specialized import SPECIALIZED_FAULTS
from tests.ptx.test_faults import check

CASES = names(90, SPECIALIZED_QUICK)


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The results by case."""
    return results(tmp_path_factory, "specialized", 90)


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The results by fault."""
    return results(tmp_path_factory, "specialized-faults", 90)


@pytest.mark.parametrize("case", CASES)
def test_the_warp_specialised_kernel_keeps_the_accuracy_rule(programs: Any, case: str) -> None:
    result = programs[case]
    assert result["passed"], result["message"]
    assert result["runs"] == 2
    assert result["errors"].keys() == {"out", "lse"}
    assert all(0 <= ratio <= 1 for ratio in result["errors"].values())
    (kernel,) = result["kernels"]  # the plain one has not run
    assert kernel == "hopper_forward_kernel"


def test_the_cases_cross_its_instructions(programs: Any) -> None:
    for case in CASES:
        codes = set(programs[case]["kernels"]["hopper_forward_kernel"])
        assert {"brx.idx", "setmaxnreg.dec.sync.aligned.u32", "barrier.sync"} <= codes
        assert {"mbarrier.try_wait.parity.shared::cta.b64", "elect.sync"} <= codes
        assert any(code.startswith("wgmma.mma_async") for code in codes)
        assert not any(code.startswith(("ld.global", "cp.async.cg")) for code in codes)


def test_the_table_has_every_variant_of_the_kernel() -> None:
    drawn = [case for case in TABLE if case.specialized]
    variants = set()
    for case in drawn:
        q, _, _, options = case.draw()
        assert case.specialized is not None
        variants.add((q.dtype, q.shape[-1], options.get("causal", False), case.specialized[1]))
    assert len(variants) == 16
    assert len(drawn) >= 40


@pytest.mark.skipif(
    not version("triton").startswith("3.7."),
    reason="the faults are written for the text of Triton 3.7",
)
@pytest.mark.parametrize("fault", SPECIALIZED_FAULTS, ids=lambda fault: fault.name)
def test_a_fault_planted_into_it_is_noticed(planted: Any, fault: Any) -> None:
    assert fault.shows
    check(fault, planted[fault.name])
