"""Several processes that make one process group, under the conditions of every other test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks import processes
from benchmarks.processes import Work


def run_group(work: Work, ranks: int, folder: Path, *arguments: Any) -> list[Any]:
    """:func:`benchmarks.processes.run_group` with memory poisoned as in ``tests/conftest.py``."""
    return processes.run_group(_poisoned, ranks, folder, work, *arguments)


def _poisoned(rank: int, device: torch.device, work: Work, *arguments: Any) -> Any:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    return work(rank, device, *arguments)
