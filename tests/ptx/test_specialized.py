"""A producer and a consumer on warps of their own: whole, and without each of its waits."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

from tests.ptx.processes import results


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return results(tmp_path_factory, "specialized", 90)


def test_a_warp_specialised_product_is_right(programs: Any) -> None:
    whole = programs["whole"]
    assert not whole["message"]
    assert whole["error"] < 1e-4  # 512 products of bf16 summed in fp32
    opcodes = set(whole["opcodes"])
    assert {"brx.idx", "setmaxnreg.dec.sync.aligned.u32", "barrier.sync"} <= opcodes


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("no wait for an empty buffer", "more arrivals than the mbarrier"),
        ("no wait for a full buffer", "reads what an asynchronous copy still writes"),
        ("no wait for the product", "a wgmma still reads"),
    ],
)
def test_a_wait_that_is_left_out_is_noticed(programs: Any, program: str, message: str) -> None:
    assert message in programs[program]["message"]
