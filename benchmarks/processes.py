"""Several processes that make one process group: bounded in time, never a fixed port."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# No group takes half as long on a busy machine; a hang ends here.
TIME_LIMIT = 180.0

Work = Callable[..., Any]  # (rank, device, *arguments) -> what torch.save can write


def run_group(
    work: Work, ranks: int, folder: Path, *arguments: Any, start_method: str = "spawn"
) -> list[Any]:
    """What ``work(rank, device, *arguments)`` returned on each of ``ranks`` processes, by rank.

    With NCCL where there is a GPU for every rank, else with gloo on the CPU. An exception in one
    process ends them all and is raised here with its traceback.

    Args:
        work: a function at the top of a module.
        ranks: number of processes.
        folder: an empty folder; the ranks meet in a file there.
        *arguments: passed on to ``work``.
        start_method: of ``multiprocessing``, ``"spawn"`` or ``"forkserver"``. A forked process
            starts with its server's modules and memory: sooner, but its peak memory isn't its own.

    Raises:
        TimeoutError: the processes have not ended after ``TIME_LIMIT`` seconds.
    """
    on_gpus = torch.cuda.device_count() >= ranks
    context: Any = mp.start_processes(  # pyright: ignore[reportPrivateImportUsage]
        _worker,
        args=(work, ranks, folder, on_gpus, arguments),
        nprocs=ranks,
        join=False,
        start_method=start_method,
    )
    deadline = time.monotonic() + TIME_LIMIT
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{ranks} processes did not end in {TIME_LIMIT:.0f} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
                process.join()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def _worker(
    rank: int, work: Work, ranks: int, folder: Path, on_gpus: bool, arguments: tuple
) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpus else "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=TIME_LIMIT / 2),
    )
    torch.save(work(rank, device, *arguments), folder / f"{rank}.pt")
    dist.barrier()
    # gloo's threads can abort the interpreter's own end after all work is done.
    os._exit(0)
