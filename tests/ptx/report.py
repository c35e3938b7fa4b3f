"""Writes ``benchmarks/results/compiled.md`` from the results of the option table.

python -m tests.ptx.report results.jsonl ...
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.ptx.cases import TABLE, names

TABLE_PATH = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "compiled.md"

# Which kernel a tensor comes from.
TENSORS = {
    "forward": ("out", "lse", "max_scores", "entropy"),
    "dkdv": ("dk", "dv"),
    "dq": ("dq",),
    "dmask": ("dattn_mask",),
    "delta": ("dsinks",),
    "tangents": ("out_tangent", "lse_tangent"),
}
HEAD = """# Compiled kernels, executed

Written by `python -m tests.ptx.report`, which `pytest -m slow tests/ptx` calls: the PTX that Triton
compiles, run on a CPU by the emulator in `tests/ptx`, forward and
backward, through the library's own launch code. No GPU took part, and no ptxas.

Every cell is **error over bound**: the largest error against standard attention in fp64, over what
the accuracy rule allows (2 times the error of standard attention in the same dtype, 3 times for
gradients, plus rounding). Above 1 is a failure. A case that ran more than once gave the same bits:
the first run has asynchronous operations as late as their waits allow, the second as early as
possible and the warps in another random order; four are every combination. Memory that no kernel
writes held NaN, and every access to shared memory was checked for races.

`*`: right, but a wgmma reads what cp.async or st wrote without the `fence.proxy.async` that the ISA
asks for, in the kernel that is marked. The emulator has one memory for both; on a chip the product
may read what was there before.
"""


def write(results: Iterable[dict[str, Any]], path: Path = TABLE_PATH) -> None:
    """The table of these results: what was run and nothing else.

    Args:
        results: of the suite ``table``, see :mod:`tests.ptx.child`.
        path: the file.
    """
    by_run: dict[tuple[int, str], dict[str, dict[str, Any]]] = {}
    for result in results:
        by_run.setdefault((result["arch"], result["triton"]), {})[result["case"]] = result
    lines = [HEAD, *_summary(by_run)]
    for arch in sorted({arch for arch, _ in by_run}):
        versions = sorted(version for a, version in by_run if a == arch)
        lines += _cases(arch, versions, [by_run[arch, version] for version in versions])
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _summary(by_run: dict[tuple[int, str], dict[str, dict[str, Any]]]) -> list[str]:
    lines = [
        "| target | Triton | cases | runs of each | right | without a fence | largest "
        "| instructions of warps |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (arch, version), results in sorted(by_run.items()):
        largest = max((max(r["errors"].values(), default=0) for r in results.values()), default=0)
        counts = [
            len(results),
            min(r["runs"] for r in results.values()),
            sum(r["passed"] for r in results.values()),
            sum(bool(r["unfenced"]) for r in results.values()),
        ]
        executed = sum(r["executed"] for r in results.values())
        cells = [f"sm_{arch}", version, *counts, f"{largest:.2f}", f"{executed / 1e6:.1f} million"]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def _cases(arch: int, versions: Sequence[str], runs: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["", f"## sm_{arch}", ""]
    lines += [f"Triton {' / '.join(versions)}; `-` was not run.", ""]
    lines += [
        f"| case | {' | '.join(TENSORS)} |",
        "| --- |" + " --- |" * len(TENSORS),
    ]
    for case in names(arch, TABLE):
        found = [run.get(case) for run in runs]
        cells = [_cell(kernel, found) for kernel in TENSORS]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return lines


def _cell(kernel: str, found: Sequence[dict[str, Any] | None]) -> str:
    """One kernel's largest error over its bound, by version; empty where none had to run."""
    cells = []
    for result in found:
        if result is None:
            cells.append("-")
            continue
        errors = [result["errors"][t] for t in TENSORS[kernel] if t in result["errors"]]
        marked = f"{kernel}_kernel" in result["unfenced"]
        if not result["passed"]:
            cells.append("failed")
        elif errors:
            cells.append(f"{max(errors):.2f}" + "*" * marked)
        else:
            cells.append("")
    return " / ".join(cells) if any(cells) else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    paths = parser.parse_args().results
    write(json.loads(line) for path in paths for line in path.read_text().splitlines())


if __name__ == "__main__":
    main()
