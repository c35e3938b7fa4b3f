"""Speed, memory and error of attention against what a user would pick instead.

    python -m benchmarks attention --device cpu --suite quick
    python -m benchmarks attention --device cuda --suite full

Writes ``attention.json``, ``attention.md`` and the plots into ``--out``. Everything that matters is
a ratio within one run on one machine, so two runs compare though two machines don't.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, peers, plots, report
from benchmarks.cases import DTYPES, SUITES, Case
from train.measure import machine

# Peers that store the scores are left out where those would take more than this share of memory.
MEMORY_SHARE = 0.4
CPU_MEMORY_LIMIT = 2 * 2**30

MEMORY_CASE = Case("memory", "fp32", batch=1, heads=4, seqlen=1024, head_dim=64)
MEMORY_LENGTHS = {
    "quick": {
        peers.OURS: [1024, 2048, 4096, 8192, 16384],
        peers.DEFAULT: [1024, 4096, 16384],
        peers.STANDARD: [1024, 2048, 4096],
    },
    "smoke": {peers.OURS: [64, 128]},
}
MEMORY_LENGTHS["full"] = MEMORY_LENGTHS["quick"]


def main(argv: list[str]) -> int:
    """Run a suite; 1 if a result of ours is off by more than the tests' rule allows."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks attention", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--suite", choices=SUITES, default="quick")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: the suite's own")
    parser.add_argument("--groups", nargs="+", help="only the cases of these groups")
    parser.add_argument(
        "--peers", nargs="+", help=f"instead of the usual ones; also {', '.join(peers.FORCED)}"
    )
    parser.add_argument("--rounds", type=int, default=7, help="samples of each peer and cell")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="start no cell later than this; says which"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/attention"))
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device")

    started = time.monotonic()
    cases = SUITES[args.suite].in_dtypes(args.dtypes)
    cases = [case for case in cases if args.groups is None or case.group in args.groups]
    results = describe(argv, device)
    print(f"{len(cases)} cells on {results['machine']['device']}", flush=True)
    memory_limit = CPU_MEMORY_LIMIT
    if device.type == "cuda":
        memory_limit = int(MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory)
    names = [peers.OURS, *args.peers] if args.peers else peers.names(device, args.suite)
    if args.groups is None and args.suite in MEMORY_LENGTHS:
        results["memory"] = measure_memory(args.suite, device)
    for case in cases:
        if time.monotonic() - started > 60 * args.minutes:
            results["skipped"].append(f"{case.group}: {case.name} {case.dtype}")
            continue
        cell = measure.measure(case, names, args.rounds, memory_limit, device)
        results["cells"].append(cell)
        print(report.cell_line(cell), flush=True)
    results["seconds"] = time.monotonic() - started
    write(args.out, results)
    print(f"{results['seconds']:.0f} s; {args.out / 'attention.md'}")
    worst = max(
        (cell["peers"][peers.OURS]["error_over_bound"] for cell in results["cells"]), default=0
    )
    return int(worst > 1)


def describe(argv: list[str], device: torch.device) -> dict[str, Any]:
    """All that is known before the first cell."""
    results: dict[str, Any] = {
        "command": " ".join(("python -m benchmarks attention", *argv)),
        "machine": machine(device),
        "clocks": None,
        "memory": None,
        "cells": [],
        "skipped": [],
    }
    if device.type == "cuda":
        results["clocks"] = measure.clocks()
        results["machine"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return results


def measure_memory(suite: str, device: torch.device) -> dict[str, Any]:
    """Memory by length, and the line through ours."""
    lengths = MEMORY_LENGTHS[suite]
    rows = measure.memory_by_length(MEMORY_CASE, lengths, device)
    ours = [row["extra_bytes"] for row in rows if row["peer"] == peers.OURS]
    fit = measure.fit_line(lengths[peers.OURS], ours)
    print(report.fit_line(fit), flush=True)
    return {"case": MEMORY_CASE, "rows": rows, "fit": fit}


def write(folder: Path, results: dict[str, Any]) -> None:
    """The JSON, the table and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, default=asdict)
    (folder / "attention.json").write_text(text + "\n", encoding="utf-8")
    (folder / "attention.md").write_text(report.markdown(results), encoding="utf-8")
    plots.draw(folder, results)
