"""The pictures of the attention benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.peers import AGAIN, OURS
from benchmarks.report import MIB, share_of_matmul

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {
    OURS: "#D55E00",
    "sdpa": "#0072B2",
    "sdpa-flash": "#56B4E9",
    "sdpa-cudnn": "#009E73",
    "sdpa-efficient": "#CC79A7",
    "sdpa-math": "#E69F00",
    "standard": "black",
    "flex": "#999999",
    "flash_attn": "#F0E442",
    "aten": "#332288",
    "tiled": "#117733",
    "triton": "#882255",
}
PLAIN = FuncFormatter(lambda y, _: f"{y:,g}")
MARKERS = dict(zip(COLOURS, "os^vD<xP*hp+", strict=True))


# Of series that are no peers.
SERIES = ("#D55E00", "#0072B2", "#009E73", "black")


def draw(folder: Path, results: dict[str, Any]) -> None:
    """``speed.png``, ``matmul_share.png`` and, where memory was measured, ``memory.png``."""
    panels: dict[tuple[str, int, bool], list[dict[str, Any]]] = {}
    for cell in results["cells"]:
        case = cell["case"]
        if case.group == "length":
            panels.setdefault((case.dtype, case.head_dim, case.causal), []).append(cell)
    panels = {key: cells for key, cells in panels.items() if len(cells) > 1}
    if panels:
        _by_length(
            folder / "speed.png",
            panels,
            _tokens_per_second,
            "thousand tokens per second",
            "Forward + backward of one attention layer",
            log=True,
        )
        _by_length(
            folder / "matmul_share.png",
            panels,
            lambda cell, name: _percent(share_of_matmul(cell, name, "both")),
            "% of a large matmul's FLOP/s",
            "Share of the machine's matmul speed, forward + backward",
            log=False,
        )
    if results["memory"]:
        _memory(folder / "memory.png", results["memory"])


def _tokens_per_second(cell: dict[str, Any], name: str) -> float | None:
    case, seconds = cell["case"], cell["peers"][name].get("both")
    return None if seconds is None else case.batch * case.seqlen / seconds / 1e3


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _by_length(path: Path, panels: dict, value: Any, unit: str, title: str, *, log: bool) -> None:
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.2 * columns, 3.9 * rows + 0.8), dpi=120, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    handles: dict[str, Any] = {}
    for axes, ((dtype, head_dim, causal), cells) in zip(grid.flat, panels.items(), strict=False):
        for name in reversed([name for name in cells[0]["peers"] if name != AGAIN]):
            points = [(cell["case"].seqlen, value(cell, name)) for cell in cells]
            points = [point for point in points if point[1] is not None]
            if points:
                handles[name] = line(axes, name, points)
        batch_tokens = cells[0]["case"].batch * cells[0]["case"].seqlen
        axes.set_title(
            f"{dtype}, D = {head_dim}, {'causal' if causal else 'full'}, "
            f"{cells[0]['case'].heads} heads, {batch_tokens:,} tokens",
            fontsize=11,
        )
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(PLAIN)
            axes.yaxis.set_minor_formatter(PLAIN)
            axes.tick_params(axis="y", which="minor", labelsize=7)
        else:
            axes.set_ylim(bottom=0)
        axes.set_ylabel(unit)
        lengths(axes, [cell["case"].seqlen for cell in cells])
    figure.suptitle(title, fontsize=14)
    order = [name for name in COLOURS if name in handles]
    figure.legend(
        [handles[name] for name in order], order, loc="outside lower center", ncols=len(order)
    )
    figure.savefig(path)


def _memory(path: Path, memory: dict[str, Any]) -> None:
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    points: dict[str, list[tuple[int, float]]] = {}
    for row in memory["rows"]:
        points.setdefault(row["peer"], []).append((row["length"], row["extra_bytes"] / MIB))
    for name, its_points in points.items():
        line(axes, name, its_points).set_label(name)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(PLAIN)
    axes.set_ylabel("peak beyond the inputs (MiB)")
    case = memory["case"]
    axes.set_title(
        f"Memory of one forward + backward: {case.heads} heads of {case.head_dim}, causal, "
        f"{case.dtype}"
    )
    lengths(axes, sorted({length for its in points.values() for length, _ in its}))
    axes.legend()
    figure.savefig(path)


def line(axes: Axes, name: str, points: list[tuple[int, float]]) -> Any:
    """The curve of one peer."""
    ours = name == OURS
    (line,) = axes.plot(
        *zip(*points, strict=True),
        color=COLOURS[name],
        marker=MARKERS[name],
        # Where the curves coincide all of them are seen: ours is the wide pale one below.
        linewidth=6 if ours else 1.6,
        markersize=12 if ours else 6,
        alpha=0.6 if ours else 1.0,
        zorder=2 if ours else 3,
    )
    return line


def lengths(axes: Axes, lengths: list[int]) -> None:
    """The axis of the lengths."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xlabel("sequence length (tokens)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def context_memory(path: Path, results: dict[str, Any]) -> None:
    """Memory of a rank by the number of ranks, and the line of 1/ranks."""
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    rows: dict[str, list[tuple[int, float]]] = {}
    for row in results["calls"]:
        rows.setdefault(row["call"], []).append((row["ranks"], row["extra_bytes"] / MIB))
    for (name, points), colour, marker in zip(rows.items(), SERIES, "osd", strict=False):
        axes.plot(*zip(*points, strict=True), label=name, color=colour, marker=marker, linewidth=2)
    first = next(iter(rows.values()))
    ranks = [count for count, _ in first]
    # Through the first point with messages, of which one process has none.
    count, memory = next((point for point in first if point[0] > 1), first[0])
    slope = [memory * count / other for other in ranks]
    axes.plot(ranks, slope, ":", color="gray", linewidth=2, label="1 / ranks")
    lengths(axes, ranks)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(PLAIN)
    axes.set_xlabel("processes that share the sequence")
    axes.set_ylabel("peak of a process beyond its inputs (MiB)")
    axes.set_title(
        f"Forward + backward of {results['problem']['length']:,} positions: memory of each process"
    )
    axes.legend()
    figure.savefig(path)


def scaling(path: Path, results: dict[str, Any]) -> None:
    """Compute and transfer of a hop by shard, and the share of time computed by ring."""
    figure = Figure(figsize=(14, 5.8), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    shards = [row["length"] for row in results["hops"]]
    cluster = results["cluster"]
    for phase, colour in (("forward", SERIES[0]), ("backward", SERIES[1])):
        for what, style, label in (
            ("compute", "-", "computing"),
            ("near", ":", f"sending, {cluster['near'] / 1e9:,.0f} GB/s in a node"),
            ("far", "--", f"sending, {cluster['far'] / 1e9:,.0f} GB/s between nodes"),
        ):
            values = [1e3 * row[f"{phase}_{what}"] for row in results["hops"]]
            left.plot(shards, values, style, color=colour, linewidth=2, label=f"{phase}: {label}")
    lengths(left, shards[::2])
    left.set_yscale("log")
    left.yaxis.set_major_formatter(PLAIN)
    left.set_xlabel("positions a GPU")
    left.set_ylabel("milliseconds of one hop")
    left.set_title("A hop is hidden where its solid line is above the others")
    left.legend(fontsize=9)
    rings: dict[int, list[dict[str, Any]]] = {}
    for row in results["rings"]:
        rings.setdefault(row["tokens"], []).append(row)
    for (tokens, rows), colour, marker in zip(rings.items(), SERIES, "osd^", strict=False):
        right.plot(
            [row["ranks"] for row in rows],
            [100 * row["busy_both"] for row in rows],
            color=colour,
            marker=marker,
            linewidth=2,
            label=f"{tokens:,} tokens",
        )
    ranks = sorted({row["ranks"] for row in results["rings"]})
    lengths(right, ranks)
    right.set_ylim(0, 105)
    right.set_xlabel("GPUs in the ring")
    right.set_ylabel("% of the time that a GPU computes, both passes")
    right.set_title("The longer the sequence, the more GPUs it keeps busy")
    right.legend()
    layer = results["layer"]
    figure.suptitle(
        f"A model, not a measurement: causal zigzag ring, {layer['heads']} heads on "
        f"{layer['kv_heads']} kv heads of {layer['head_dim']}",
        fontsize=14,
    )
    figure.savefig(path)
