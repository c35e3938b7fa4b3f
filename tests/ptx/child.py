"""Runs cases in a process of its own, one JSON line each.

    TRITON_CACHE_DIR=folder python -m tests.ptx.child --arch 90 --out results.jsonl

The tests' main process has ``TRITON_INTERPRET=1`` and the real drivers; this one must have neither
that nor a Triton cache that anyone else reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from tests.ptx.cases import BACKWARD_QUICK, BY_NAME, QUICK, SPECIALIZED_QUICK, TABLE, names
from tests.ptx.judge import judge

CASES = {
    "quick": QUICK,
    "table": TABLE,
    "specialized": [*SPECIALIZED_QUICK, *BACKWARD_QUICK],
}
SUITES = (*CASES, "faults", "slow-faults", "specialized-faults", "native")
# (late, seed): asynchronous operations as late as the waits allow, or at once.
TABLE_RUNS = ((True, 0), (False, 1), (True, 1), (False, 0))


def run_suite(
    suite: str, arch: int, only: str, runs: int, folder: Path
) -> Iterator[dict[str, Any]]:
    """The results of one suite, as they come."""
    if suite in CASES:
        for name in names(arch, CASES[suite]):
            if only in name:
                each = TABLE_RUNS[: {"quick": 1, "specialized": 2}.get(suite, runs)]
                verdict = judge(BY_NAME[name], arch, each, without_fences=suite == "table")
                yield dataclasses.asdict(verdict)
    elif suite == "native":
        from tests.ptx.native import native

        for name in names(arch, QUICK):
            if only in name:
                open_device = lambda arch, **options: native(arch, folder, **options)  # noqa: E731
                yield dataclasses.asdict(judge(BY_NAME[name], arch, open_device=open_device))
    else:
        from tests.ptx.faults import FAULTS, plant
        from tests.ptx.specialized import BACKWARD_FAULTS, SPECIALIZED_FAULTS

        specialized = [*SPECIALIZED_FAULTS, *BACKWARD_FAULTS]
        specialized = specialized if arch == 90 and suite != "faults" else []
        plain = FAULTS[arch] if suite != "specialized-faults" else []
        for fault in [*plain, *specialized]:
            if only in fault.name and fault.slow == (suite == "slow-faults"):
                yield plant(fault, arch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, choices=(80, 90), required=True)
    parser.add_argument("--suite", choices=SUITES, default="quick")
    parser.add_argument("--only", default="", help="those whose name contains this")
    parser.add_argument("--runs", type=int, default=len(TABLE_RUNS), help="of each table's case")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") or "TRITON_CACHE_DIR" not in os.environ:
        parser.error("it takes a TRITON_CACHE_DIR of its own and no TRITON_INTERPRET")
    # As in every other test: torch.empty is NaN, and what is not deterministic raises.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)
    results = run_suite(
        arguments.suite,
        arguments.arch,
        arguments.only,
        arguments.runs,
        arguments.out.parent.resolve(),
    )
    with arguments.out.open("w") as out:
        for result in results:
            result |= {"arch": arguments.arch, "triton": triton.__version__}
            out.write(json.dumps(result) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
