"""The suite can fail: faults planted into the compiled text are noticed, each in its own way.

A fault that must not be noticed says why the statement makes no difference.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.ptx.faults import FAULTS, Fault
from tests.ptx.processes import results

ALL = [(arch, fault) for arch, faults in FAULTS.items() for fault in faults]


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``planted(suite, arch)``: the results by fault."""
    return lambda suite, arch: results(tmp_path_factory, suite, arch)


def check(fault: Fault, result: dict[str, Any]) -> None:
    assert result["planted"]
    if not fault.shows:
        assert not result["noticed"], f"{fault.why}; but {result['message']}"
        assert fault.why
        return
    assert result["noticed"], f"nothing came of {result['planted'][0]!r}"
    assert re.search(fault.shows, result["message"]), result["message"]


def names_of(pairs: list[tuple[int, Fault]]) -> list[str]:
    return [f"{arch}-{fault.kernel}-{fault.name}" for arch, fault in pairs]


# What Triton emits changes from one minor version to the next, and so does where a fault finds it.
if not version("triton").startswith("3.7."):
    pytestmark = pytest.mark.skip(reason="the faults are written for the text of Triton 3.7")

QUICK = [pair for pair in ALL if not pair[1].slow]
SLOW = [pair for pair in ALL if pair[1].slow]


@pytest.mark.parametrize(("arch", "fault"), QUICK, ids=names_of(QUICK))
def test_a_planted_fault_is_noticed(planted: Any, arch: int, fault: Fault) -> None:
    check(fault, planted("faults", arch)[fault.name])


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "fault"), SLOW, ids=names_of(SLOW))
def test_another_planted_fault_is_noticed(planted: Any, arch: int, fault: Fault) -> None:
    check(fault, planted("slow-faults", arch)[fault.name])


@pytest.mark.parametrize("arch", FAULTS)
def test_twelve_kinds_of_fault_are_planted_in_make_test(arch: int) -> None:
    noticed = {fault.name for fault in FAULTS[arch] if fault.shows and not fault.slow}
    assert len(noticed) >= 12
    assert len({fault.name for fault in FAULTS[arch]}) == len(FAULTS[arch])


def test_a_fault_whose_statement_is_gone_is_an_error() -> None:
    """And not a fault that nobody notices."""
    fault = Fault("gone", "some_kernel", "no such statement")
    with pytest.raises(ValueError, match="'no such statement' is not in some_kernel"):
        fault.edit([])(".entry some_kernel() { ret; }")
    fault = Fault("gone", "some_kernel", "ret;", after="nowhere")
    with pytest.raises(ValueError, match="'nowhere' is not in some_kernel"):
        fault.edit([])(".entry some_kernel() { ret; }")
    assert fault.edit([])(".entry other_kernel() { ret; }") == ".entry other_kernel() { ret; }"
