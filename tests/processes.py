"""Several processes that make one process group, under the conditions of every other test."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import torch

from benchmarks import processes
from benchmarks.processes import Work

# What the ranks import before they can work, most of a short test's time: a server imports it once
# and forks a process for each rank. Imports alone start no thread that a fork would lose.
PRELOADED = [
    "torch._dynamo",
    "torch.distributed.tensor.parallel",
    "flashlayer.distributed",
    "pytest",
]


def run_group(work: Work, ranks: int, folder: Path, *arguments: Any) -> list[Any]:
    """:func:`benchmarks.processes.run_group` with memory poisoned as in ``tests/conftest.py``."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    return processes.run_group(
        _poisoned, ranks, folder, work, *arguments, start_method="forkserver"
    )


def _poisoned(rank: int, device: torch.device, work: Work, *arguments: Any) -> Any:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    return work(rank, device, *arguments)
