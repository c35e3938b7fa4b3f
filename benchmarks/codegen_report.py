"""The compile ledger as a page to read."""

from __future__ import annotations

from itertools import groupby
from typing import Any

HOW_TO_READ = """\
Written by `python -m benchmarks codegen`; nothing here was run on a GPU.

- **tile**: `BLOCK_M x BLOCK_N`, warps (w) and pipeline stages (s). **regs** a thread; **spill** in
  bytes of stores plus loads; **shared** in KiB of what one block may have.
- **blocks/SM**: how many blocks an SM holds at a time, and what keeps the next one out. A lone
  block of one warp group takes turns between softmax and products; two blocks, or groups, overlap.
- **tensor core**: kind and number of matrix instructions in the kernel. **instr**: all of them.
- **hot loop**: instructions of one warp in one trip of the loop over unmasked tiles, by class:
  MMA / MUFU (exp2) / FMA / ALU (compare, select, integer, conversion) / memory / control (with the
  uniform datapath, which takes issue slots and no lanes).
- **products**: multiply-adds of one trip in units of `BLOCK_M * BLOCK_N * D`. The mathematics needs
  2 in the forward pass, 4 in dK/dV, 3 in dQ, 6 for tangents. More is waste: a padded head
  dimension, or a tile too small for its warps, which then do the same work twice. (In fp32 the
  softmax adds a little.)
- **share of peak**: of the useful products, what the loop can reach, from no overlap of the matrix
  unit with the others to full overlap, and the busiest of the others. It is a bound from counts and
  published rates
  ([chips.py](../chips.py)), not a forecast: memory, latency and barriers are left out. In fp32 the
  peak is that of FFMA.
- **instructions per score**, at the end: those of the hot loop times threads over
  `BLOCK_M * BLOCK_N`, by what they do. **softmax** is all but integer (addresses, counters),
  matrix, memory and control; **least** is what the mathematics needs of it, one instruction each:
  exp2, fma (`scale * s - m`), then forward: max, add (the denominator), 1/2 convert (a pair packed)
  and the accumulator's mul, `D / BLOCK_N`; dK/dV: add and mul (`p * (dp - delta)`), 1 convert (p
  and ds); dQ: the same with 1/2. On sm_100 a mul or add may be on two scores.
- `!` marks what no default tile may do with every option off: spill, have its wgmma serialized, or
  ask for more shared memory than there is.
"""


def _tile(row: dict[str, Any]) -> str:
    size = "x".join(str(row[name]) for name in ("BLOCK_M", "BLOCK_N") if row[name])
    return f"{size} w{row['num_warps']} s{row['num_stages']}"


def _cells(row: dict[str, Any]) -> list[str]:
    share = row["peak_share"]
    spill = f"{row['spill_bytes']} !" if row["spill_bytes"] else "0"
    shared = f"{row['shared_bytes'] / 1024:.0f} of {row['shared_limit'] / 1024:.0f}"
    kinds = " ".join(f"{kind} {count}" for kind, count in row["tensor_core"].items())
    return [
        str(row["head_dim"]),
        row["mask"],
        row["options"] if row["group"] == 1 else f"{row['options']}, group {row['group']}",
        row["kernel"].removesuffix("_kernel"),
        _tile(row),
        str(row["registers"]),
        spill,
        shared + (" !" if row["shared_bytes"] > row["shared_limit"] else ""),
        "" if row["limited_by"] is None else f"{row['blocks_per_sm']} ({row['limited_by']})",
        kinds + (" serialized !" if row["serialized"] else ""),
        "" if row["instructions"] is None else str(row["instructions"]),
        "" if row["loop"] is None else " / ".join(map(str, row["loop"].values())),
        "" if row["products"] is None else f"{row['products']:.2f}",
        ""
        if share is None
        else f"{share['no_overlap']:.0%} to {share['full_overlap']:.0%}, {share['bound']}",
    ]


COLUMNS = (
    "D",
    "mask",
    "options",
    "kernel",
    "tile",
    "regs",
    "spill",
    "shared",
    "blocks/SM",
    "tensor core",
    "instr",
    "hot loop",
    "products",
    "share of peak",
)


# Kinds of instructions that a loop could do without but for the mathematics of the softmax.
SOFTMAX = ("exp2", "fma", "mul", "add", "max", "convert", "select", "shuffle")


def _least(row: dict[str, Any]) -> float:
    """The least of SOFTMAX that the mathematics needs of a score, as HOW_TO_READ says."""
    if row["kernel"] == "forward_kernel":
        return 4.5 + row["head_dim"] / row["BLOCK_N"]
    return {"dkdv_kernel": 5.0, "dq_kernel": 4.5}[row["kernel"]]


def per_score(rows: list[dict[str, Any]]) -> str:
    """Instructions per score of the loops with every option off, half precision, 64 and 128."""
    shown = [
        row
        for row in rows
        if row["per_score"]
        and (row["options"], row["group"]) == ("none", 1)
        and row["head_dim"] in (64, 128)
        and row["dtype"] in ("bf16", "fp16")
    ]
    if not shown:
        return ""
    lines = [
        [
            row["target"],
            *_cells(row)[:2],
            row["kernel"].removesuffix("_kernel"),
            _tile(row),
            *(f"{count:.2f}" for count in row["per_score"].values()),
            f"{sum(row['per_score'][kind] for kind in SOFTMAX):.2f}",
            f"{_least(row):.2f}",
            f"{sum(row['per_score'].values()):.2f}",
        ]
        for row in shown
    ]
    columns = ("target", "D", "mask", "kernel", "tile", *shown[0]["per_score"])
    return f"## Instructions per score\n\n{table((*columns, 'softmax', 'least', 'all'), lines)}"


def table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown(versions: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The whole page; delta, which only streams o and do once, is in the JSON alone."""
    ptxas = ", ".join(f"{target} {version}" for target, version in versions["ptxas"].items())
    page = [f"# Compile ledger\n\nTriton {versions['triton']}; ptxas: {ptxas}.\n\n{HOW_TO_READ}"]
    shown = [row for row in rows if row["kernel"] != "delta_kernel"]
    for (target, dtype), group in groupby(shown, lambda row: (row["target"], row["dtype"])):
        page.append(f"## {target}, {dtype}\n\n{table(COLUMNS, [_cells(row) for row in group])}")
    page.append(per_score(shown))
    return "\n".join(part for part in page if part)
