"""How much of a GPU causal programs keep busy, by the order in which they start: a model, no GPU.

    python -m benchmarks schedule [--targets sm_90] [--tokens 16384]

A multiprocessor holds as many programs of a kernel as the compile ledger says, and takes the next
one when one ends. A program takes as long as the tiles it visits and ``OVERHEAD`` more. The share
is the work over the time until the last one ends, times the programs that the chip holds: 1 where
none ever waits. Memory and caches are not in the model.
"""

from __future__ import annotations

import argparse
import heapq
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks import codegen, report
from flashlayer.backends.triton import tiling
from flashlayer.kernels.tiles import TileConfig
from flashlayer.spec import AttentionSpec

OVERHEAD = 1.5  # an assumption: what a program does before and after its loop, in tiles
WIDTH = 2048  # heads times head dimension, as in the benchmark of attention
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 128)


class Chip(NamedTuple):
    """Multiprocessors and L2 cache, as published for A100, H100 and H200, B200."""

    multiprocessors: int
    l2_bytes: int


CHIPS = {
    "sm_80": Chip(108, 40 * 2**20),
    "sm_90": Chip(132, 50 * 2**20),
    "sm_100": Chip(148, 126 * 2**20),
}


def share(work: list[float], holds: int) -> float:
    """Of the chip's time, where ``holds`` programs run at once and start in the order of a list."""
    ends = [0.0] * holds
    for each in work:
        heapq.heapreplace(ends, ends[0] + each)
    return sum(work) / (max(ends) * holds)


def in_order(work: list[float], heads: int, together: int) -> list[float]:
    """The work of all programs: ``work`` is that of a head's, block 0 first."""
    groups = [heads % together, *[together] * (heads // together)]
    return [each for count in groups for each in work for _ in range(count)]


def rows(target: str, tokens: int) -> list[dict[str, Any]]:
    """Each kernel at each length: shares head by head, and heaviest first."""
    chip, found = CHIPS[target], []
    for head_dim in HEAD_DIMS:
        case = codegen.Case(target, "bf16", head_dim, "causal", 1, "none")
        for row in codegen.run_cases([case]):
            if row["kernel"] == "delta_kernel":
                continue
            tiles = TileConfig(row["BLOCK_M"], row["BLOCK_N"], row["num_warps"], row["num_stages"])
            holds = chip.multiprocessors * row["blocks_per_sm"]
            own, other = tiles.BLOCK_M, tiles.BLOCK_N
            if row["kernel"] == "dkdv_kernel":
                own, other = other, own
            for seqlen in (each for each in LENGTHS if each <= tokens):
                heads = tokens // seqlen * WIDTH // head_dim  # of all entries of the batch
                x = torch.empty(1, heads, seqlen, head_dim, dtype=torch.bfloat16, device="meta")
                ordered = replace(tiles, heaviest_first=True)
                with mock.patch.object(tiling, "_l2_bytes", return_value=chip.l2_bytes):
                    spec = AttentionSpec(1.0, None, 0)
                    together = tiling.heads_together(ordered, spec, heads, None, x, x) or 1
                blocks = -(-seqlen // own)
                work = [OVERHEAD + -(-own * (blocks - i) // other) for i in range(blocks)]
                found.append(
                    {
                        "kernel": row["kernel"],
                        "head_dim": head_dim,
                        "seqlen": seqlen,
                        "heads": heads,
                        "programs": blocks * heads,
                        "held": holds,
                        "head_by_head": share(in_order(work, heads, 1), holds),
                        "heaviest_first": share(in_order(work, heads, together), holds),
                    }
                )
    return found


def main(argv: list[str]) -> int:
    """Print a table for each target."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks schedule", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=CHIPS, default=["sm_90"])
    parser.add_argument("--tokens", type=int, default=16384, help="in all sequences of a batch")
    args = parser.parse_args(argv)
    for target in args.targets:
        table = rows(target, args.tokens)
        print(f"## {target}, {args.tokens} tokens, bf16, causal\n")
        print(report.row([name.replace("_", " ") for name in table[0]]))
        print(report.row(["---"] * len(table[0])))
        for each in table:
            cells = (f"{x:.2f}" if isinstance(x, float) else f"{x}" for x in each.values())
            print(report.row(list(cells)))
        print()
    return 0
