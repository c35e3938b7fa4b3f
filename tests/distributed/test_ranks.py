"""Attention over a sharded sequence against attention over the whole one.

Ring and Ulysses share one group of processes for each number of ranks: starting it costs more than
their calls.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.cases import cases, check_case, run_shard
from tests.distributed.checks import (
    check_documents_leave_each_other_alone,
    check_layer,
    check_layouts_and_errors,
    check_numbers_from_inside_the_softmax,
    run_layer,
)
from tests.distributed.measures import (
    expected_skips,
    expected_traffic,
    measure_memory,
    measure_skips,
    measure_traffic,
)
from tests.processes import run_group

LAYERS = [
    (placement, mask)
    for placement in ("contiguous", "zigzag")
    for mask in (None, "documents", "any")
]


def work(rank: int, device: torch.device) -> dict[str, Any]:
    """All that one group of processes is started for."""
    check_layouts_and_errors(rank, device)
    check_numbers_from_inside_the_softmax(rank, device)
    check_documents_leave_each_other_alone(rank, device)
    return {
        "cases": {
            name: run_shard(case, rank, device)
            for name, case in cases(dist.get_world_size()).items()
        },
        "layers": [run_layer(rank, device, *layer) for layer in LAYERS],
        "traffic": measure_traffic(rank, device),
        "memory": measure_memory(rank, device),
        "skips": measure_skips(rank, device),
    }


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_compute_what_one_process_does(ranks: int, tmp_path: Path) -> None:
    """Outputs, LSE and all gradients by the 2x rule; the layer; traffic; skipped hops; memory."""
    results = run_group(work, ranks, tmp_path)
    for name, case in cases(ranks).items():
        try:
            check_case(case, [result["cases"][name] for result in results])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    for index, layer in enumerate(LAYERS):
        check_layer(*layer, [result["layers"][index] for result in results])
    assert [result["skips"] for result in results] == expected_skips(ranks)
    for result in results:
        assert result["traffic"] == expected_traffic(ranks)
        memory = result["memory"]
        assert memory["steps"] == ranks
        assert memory["alive"] <= 2
        # One tile of scores; the scores of one shard would be 4 times as many.
        assert memory["largest"] <= 512 * 512
