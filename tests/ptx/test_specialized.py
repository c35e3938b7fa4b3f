"""The warp-specialised kernels for Hopper, as Triton compiles them, in ``make test``.

Each case runs twice, with asynchronous operations late and early and two orders of the warps.
``tests/ptx/test_table.py`` runs more of them, with four orders and three versions of Triton.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.ptx.cases import BACKWARD_QUICK, SPECIALIZED_QUICK, TABLE, names
from tests.ptx.faults import Fault
from tests.ptx.processes import INSTALLED, ROOT, environment, locked, results, shared_folder
from tests.ptx.specialized import DKDV_FAULTS, DQ_FAULTS, SPECIALIZED_FAULTS
from tests.ptx.test_faults import check

CASES = names(90, SPECIALIZED_QUICK)
GRADIENTS = names(90, BACKWARD_QUICK)
BACKWARD = ("hopper_dkdv_kernel", "hopper_dq_kernel")


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The results by case."""
    return results(tmp_path_factory, "specialized", 90)


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``planted(suite)``: the results by fault."""
    return lambda suite: results(tmp_path_factory, suite, 90)


@pytest.mark.parametrize("case", CASES)
def test_the_warp_specialised_kernel_keeps_the_accuracy_rule(programs: Any, case: str) -> None:
    result = programs[case]
    assert result["passed"], result["message"]
    assert result["runs"] == 2
    assert result["errors"].keys() == {"out", "lse"}
    assert all(0 <= ratio <= 1 for ratio in result["errors"].values())
    (kernel,) = result["kernels"]  # the plain one has not run
    assert kernel == "hopper_forward_kernel"


@pytest.mark.parametrize("case", GRADIENTS)
def test_their_gradients_keep_the_accuracy_rule(programs: Any, case: str) -> None:
    result = programs[case]
    assert result["passed"], result["message"]
    assert result["runs"] == 2
    assert result["errors"].keys() == {"out", "lse", "dq", "dk", "dv"}
    assert all(0 <= ratio <= 1 for ratio in result["errors"].values())
    assert result["kernels"].keys() == {"forward_kernel", "delta_kernel", *BACKWARD}


def test_the_cases_cross_their_instructions(programs: Any) -> None:
    ran = [(case, "hopper_forward_kernel") for case in CASES]
    for case, kernel in [*ran, *((case, kernel) for case in GRADIENTS for kernel in BACKWARD)]:
        codes = set(programs[case]["kernels"][kernel])
        assert {"brx.idx", "setmaxnreg.dec.sync.aligned.u32", "barrier.sync"} <= codes
        assert {"mbarrier.try_wait.parity.shared::cta.b64", "elect.sync"} <= codes
        assert any(code.startswith("wgmma.mma_async") for code in codes)
        assert not any(code.startswith("cp.async.cg") for code in codes)
        # The statistics of the queries that dQ holds are loaded once.
        assert kernel == "hopper_dq_kernel" or not any(c.startswith("ld.global") for c in codes)


def test_the_table_has_every_variant_of_the_kernel() -> None:
    drawn = [case for case in TABLE if case.specialized]
    variants = set()
    for case in drawn:
        q, _, _, options = case.draw()
        assert case.specialized is not None
        variants.add((q.dtype, q.shape[-1], options.get("causal", False), case.specialized[1]))
    assert len(variants) == 16
    assert len(drawn) >= 40


def test_the_table_has_every_variant_of_the_backward_kernels() -> None:
    drawn = [case for case in TABLE if case.specialized_backward]
    variants = set()
    for case in drawn:
        q, _, _, options = case.draw()
        causal = options.get("causal", False)
        variants.add((q.dtype, q.shape[-1], causal, case.specialized_backward))
    assert len(variants) == 16
    assert len(drawn) >= 40


EVERY = [*SPECIALIZED_FAULTS, *DKDV_FAULTS, *DQ_FAULTS]
QUICK = [fault for fault in EVERY if not fault.slow]
SLOW = [fault for fault in EVERY if fault.slow]
for_this_text = pytest.mark.skipif(
    not version("triton").startswith("3.7."),
    reason="the faults are written for the text of Triton 3.7",
)


@for_this_text
@pytest.mark.parametrize("fault", QUICK, ids=lambda fault: fault.name)
def test_a_fault_planted_into_it_is_noticed(planted: Any, fault: Fault) -> None:
    check(fault, planted("specialized-faults")[fault.name])


@for_this_text
@pytest.mark.slow
@pytest.mark.parametrize("fault", SLOW, ids=lambda fault: fault.name)
def test_another_fault_planted_into_it_is_noticed(planted: Any, fault: Fault) -> None:
    check(fault, planted("slow-faults")[fault.name])


def test_eight_kinds_of_fault_are_planted() -> None:
    """Those of the forward kernel in ``make test``."""
    assert len([fault for fault in SPECIALIZED_FAULTS if not fault.slow]) >= 8
    assert len(DKDV_FAULTS) >= 8
    assert len(DQ_FAULTS) >= 8
    assert len({fault.name for fault in EVERY}) == len(EVERY)
    assert all(fault.shows for fault in EVERY)


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``tuned(command)``: what :mod:`tests.ptx.tuned` printed, run once for all workers."""
    folder = shared_folder(tmp_path_factory) / "ptx-tuned"
    folder.mkdir(exist_ok=True)

    def run(command: str) -> dict[str, Any]:
        out = folder / f"{command}.json"
        with locked(folder / f"{command}-lock"):
            if not out.exists():
                process = subprocess.run(
                    [sys.executable, "-m", "tests.ptx.tuned", command, str(folder / "tiles")],
                    cwd=ROOT,
                    env=environment(folder.parent / f"ptx-cache-{INSTALLED}"),
                    capture_output=True,
                    text=True,
                )
                assert process.returncode == 0, process.stderr[-3000:]
                out.write_text(process.stdout)
        return json.loads(out.read_text())

    return run


def test_tune_takes_it_only_where_it_is_right_and_faster(tuned: Any) -> None:
    found = tuned("write")["forward"]
    for result in found.values():
        assert result["launched"] == ["forward_kernel", "hopper_forward_kernel"]
    taken = {name: result["chosen"]["specialized"] for name, result in found.items()}
    assert taken == {"slower": False, "wrong": False, "unstable": False, "faster": True}
    warned = {name: " ".join(result["warnings"]) for name, result in found.items()}
    assert not warned["slower"]
    assert not warned["faster"]
    assert "differs from the plain kernel on this chip and is left out" in warned["wrong"]
    assert "does not repeat its results on this chip and is left out" in warned["unstable"]


def test_tune_takes_a_right_dkdv_and_no_wrong_dq(tuned: Any) -> None:
    found = tuned("write")["gradients"]
    plain = {"forward_kernel", "delta_kernel", "dkdv_kernel", "dq_kernel"}
    assert set(found["launched"]) == plain | set(BACKWARD)
    assert found["chosen"] == {"forward": False, "dkdv": True, "dq": False}
    (warning,) = found["warnings"]
    assert "differs from the plain kernel on this chip and is left out" in warning


def test_a_fresh_process_takes_it_from_the_file(tuned: Any) -> None:
    """Also in a compiled graph; a call of the bucket that it can't compute takes the plain one."""
    tuned("write")
    found = tuned("read")
    shared = ["forward_kernel", "delta_kernel"]
    assert found.pop("gradients") == [*shared, "hopper_dkdv_kernel", "dq_kernel"]
    assert found.pop("gradients of a sum") == [*shared, "dkdv_kernel", "dq_kernel"]
    for call, kernels in found.items():
        other = call in ("softcap", "strided", "longer")
        assert kernels == ["forward_kernel" if other else "hopper_forward_kernel"], call
