"""Fills Triton's cache with the kernels of ``python -m benchmarks gpu``, in parallel processes.

    python -m benchmarks gpu_compile --target sm_90 --jobs 14 --out compile.json

The calls of the stages are made on CPU tensors, with a driver that only names the chip: Triton
specialises and compiles each launch as on the chip, under the same cache key, and launches nothing.
So no process needs a CUDA context, which would take its turns on the GPU that others measure.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime import driver

from benchmarks import gpu_problems, gpu_stages, peers
from benchmarks.cases import DTYPES, Case, draw
from benchmarks.codegen import TARGETS, NamedDevice
from benchmarks.stages import save
from flashlayer import testing
from flashlayer.backends import split_keys
from flashlayer.backends import triton as backend
from flashlayer.backends.triton import launch, tiling
from flashlayer.problem import build_problem

CPU = torch.device("cpu")
SHRUNK = 2048  # kernels are the same at every length, and short inputs are soon drawn


@contextlib.contextmanager
def compiling(target: str, failed: list[str]) -> Iterator[None]:
    """Compile what flashlayer would launch on ``target``; ``failed`` gets what raised."""
    run = triton.JITFunction.run

    def warm(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        try:
            run(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:  # of one candidate: tuning passes over some that fail
            sizes = {n: kwargs.get(n) for n in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")}
            message = str(error).strip().partition("\n")[0]
            failed.append(f"{self.__name__} {sizes}: {type(error).__name__}: {message}")

    splits = lambda q, *_: 2 if q.shape[2] == 1 else 1  # noqa: E731
    patches = (
        (triton.JITFunction, "run", warm),
        (backend, "refuses", lambda problem: None),
        (launch, "launching", lambda q: contextlib.nullcontext()),
        (tiling, "target", lambda device: target),
        (split_keys, "num_splits", splits),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        before = driver._active
        driver.set_active(NamedDevice(target))  # type: ignore[arg-type]
        stack.callback(driver.set_active, before)  # type: ignore[arg-type]
        yield


def _problem(make: gpu_problems.Draw, dtype: torch.dtype) -> None:
    q, k, v, options = make(dtype, CPU, False)
    testing.run("triton", q, k, v, *gpu_problems.gradients(q, v), **options)


def _case(case: Case, tiles: dict[str, Any] | None = None) -> None:
    """A forward and a backward pass, with the table's tiles or those of each kernel."""
    runner = peers.prepare("triton", case, draw(case, CPU), memory_limit=2**62)
    chosen = contextlib.nullcontext()
    if tiles is not None:
        table = tiling.tiles_of
        chosen = mock.patch.object(
            tiling, "tiles_of", lambda kernel, *call: tiles.get(kernel) or table(kernel, *call)
        )
    with chosen:
        out = runner.forward()
        if case.backward:
            runner.backward(out)


def _shrunk(cases: list[Case]) -> list[Case]:
    """One short case for all lengths of a kernel."""
    return list(dict.fromkeys(replace(x, batch=1, heads=2, seqlen=SHRUNK) for x in cases))


def _tile_rows(case: Case, target: str) -> list[dict[str, Any]]:
    """Tiles of each kernel: every candidate of each is in one of the rows.

    Those that start the heaviest blocks first come last: one of them is tried a kernel.
    """
    x = torch.empty(1, 1, SHRUNK, case.head_dim, dtype=DTYPES[case.dtype])
    problem = build_problem(x, x, x, causal=case.causal)
    with mock.patch.object(tiling, "target", return_value=target):
        candidates = {
            kernel: backend.candidate_tiles(kernel, problem) for kernel in ("forward", "dkdv", "dq")
        }
    rows = [
        {kernel: tiles for kernel, tiles in zip(candidates, row, strict=True) if tiles is not None}
        for row in itertools.zip_longest(*candidates.values())
    ]
    if case.causal:
        rows += [
            {kernel: replace(tiles, heaviest_first=True) for kernel, tiles in row.items()}
            for row in rows
        ]
    return rows


@cache
def calls(target: str) -> dict[str, list[Callable[[], None]]]:
    """What to compile for each stage."""
    speed = _shrunk(gpu_stages.speed_cases(rehearsal=False))
    return {
        "kernels": [
            partial(_problem, make, DTYPES[dtype])
            for make in gpu_problems.PROBLEMS.values()
            for dtype in ("bf16", "fp16")
        ],
        "speed": [partial(_case, case) for case in speed],
        "tiles": [partial(_case, case, row) for case in speed for row in _tile_rows(case, target)],
        "options": [partial(_case, case) for case in gpu_stages.option_cases(rehearsal=False)],
    }


def compile_call(target: str, group: str, index: int) -> tuple[str, float, list[str]]:
    """Group, seconds and failures of one call."""
    torch.set_num_threads(1)
    failed: list[str] = []
    began = time.monotonic()
    with compiling(target, failed):
        calls(target)[group][index]()
    return group, time.monotonic() - began, failed


def main(argv: list[str]) -> int:
    """Compile group by group; the file says how far it is."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu_compile", description=str(__doc__).partition("\n")[0]
    )
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--groups", nargs="+", default=["kernels", "speed", "tiles", "options"])
    parser.add_argument("--first", type=int, help="only so many calls of each group")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    os.nice(10)  # what is measured meanwhile comes first
    tasks = {group: range(len(calls(args.target)[group]))[: args.first] for group in args.groups}
    record: dict[str, Any] = {
        "target": args.target,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "jobs": args.jobs,
        "groups": {
            group: {"calls": len(indices), "done": 0, "cpu_seconds": 0.0, "failed": []}
            for group, indices in tasks.items()
        },
    }
    save(args.out, record)
    began = time.monotonic()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.gpu_compile"])
    with ProcessPoolExecutor(args.jobs, context) as pool:
        futures = [
            pool.submit(compile_call, args.target, group, index)
            for group, indices in tasks.items()
            for index in indices
        ]
        for future in as_completed(futures):
            group, seconds, failed = future.result()
            found = record["groups"][group]
            found["done"] += 1
            found["cpu_seconds"] += seconds
            found["failed"] += failed
            found["after_seconds"] = record["seconds"] = time.monotonic() - began
            save(args.out, record)
    return 0
