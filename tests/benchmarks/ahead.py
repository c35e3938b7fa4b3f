"""Compiles calls ahead, then makes them as on the chip: is anything compiled anew?

The last line that it prints is JSON.

A process of its own, with a ``TRITON_CACHE_DIR`` of its own and without ``TRITON_INTERPRET``:
``python -m tests.benchmarks.ahead --groups speed --first 1``.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import triton

from benchmarks import gpu_problems, gpu_stages, peers
from benchmarks.cases import DTYPES, Case, draw
from benchmarks.gpu import Compiler
from flashlayer import testing
from flashlayer.backends import split_keys
from tests.ptx import driver

CPU = torch.device("cpu")


def problem(make: gpu_problems.Draw, dtype: torch.dtype) -> None:
    q, k, v, options = make(dtype, CPU, False)
    testing.run("triton", q, k, v, *gpu_problems.gradients(q, v), **options)


def case(case: Case) -> None:
    runner = peers.prepare("triton", case, draw(case, CPU), memory_limit=2**62)
    out = runner.forward()
    if case.backward:
        runner.backward(out)


def real_calls(groups: list[str]) -> Iterator[tuple[str, Callable[[], None]]]:
    """What the stages call, at the size of the chip."""
    if "kernels" in groups:
        for name, make in gpu_problems.PROBLEMS.items():
            for dtype in ("bf16", "fp16"):
                yield f"{name} {dtype}", partial(problem, make, DTYPES[dtype])
    if "speed" in groups:
        for each in gpu_stages.speed_cases(rehearsal=False):
            yield each.name, partial(case, each)
    if "options" in groups:
        for each in gpu_stages.option_cases(rehearsal=False):
            yield f"{each.group}: {each.name}", partial(case, each)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--groups", nargs="+", required=True)
    parser.add_argument("--first", type=int, help="only so many calls of each group")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    first = [] if args.first is None else ["--first", str(args.first)]
    compiler = Compiler(
        "sm_90", os.cpu_count() or 1, folder.parent / "ahead.json", "--groups", *args.groups, *first
    )
    for group in args.groups:
        compiler.wait(group, 3600)
    groups = compiler.groups
    print(compiler.line())
    compiler.end()
    compiled, anew = set(os.listdir(folder)), {}
    patches = (
        (driver._Launcher, "__call__", lambda *args: None),
        (driver.Device, "load_binary", lambda *args: (None, "", 0, 0, 1024)),
        (split_keys, "num_splits", lambda q, *_: 7 if q.shape[2] == 1 else 1),
    )
    with ExitStack() as stack:
        stack.enter_context(driver.emulated(90))
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        for name, call in list(real_calls(args.groups))[: args.first]:
            before = set(os.listdir(folder))
            call()
            anew |= {name: len(set(os.listdir(folder)) - before)}
    found = {"triton": triton.__version__, "groups": groups, "compiled": len(compiled)}
    print(json.dumps(found | {"anew": anew}))


if __name__ == "__main__":
    main()
