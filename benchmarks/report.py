"""The results as a page of tables."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.cases import Case
from benchmarks.peers import AGAIN, DEFAULT, OURS

PHASES = ("forward", "backward", "both")
MIB = 2**20


def cell_line(cell: dict[str, Any]) -> str:
    """One cell, for the terminal: ours in milliseconds, then the others' time over ours."""
    case, ours = cell["case"], cell["peers"][OURS]
    phases = [phase for phase in PHASES if phase in ours]
    parts = [f"{case.group}: {case.name} {case.dtype}:"]
    parts.append("/".join(f"{1e3 * ours[phase]:.3g}" for phase in phases) + " ms;")
    for name, result in cell["peers"].items():
        if name != OURS and "ratio" in result:
            parts.append(f"{name} x" + "/".join(f"{result['ratio'][p]:.2f}" for p in phases))
    parts.append(f"error/bound {ours['error_over_bound']:.2f}")
    return " ".join(parts)


def fit_line(fit: dict[str, float]) -> str:
    """What the fit says, in words."""
    return (
        f"extra memory = {fit['base_bytes'] / MIB:.1f} MiB + {fit['bytes_per_token']:,.0f} bytes a "
        f"token, off by at most {fit['worst_residual']:.0%}; it grows with the length to the power "
        f"of {fit['exponent']:.2f}"
    )


def share_of_matmul(cell: dict[str, Any], name: str, phase: str) -> float | None:
    """FLOP/s of a peer as a share of the large matrix product's; None where it was not measured."""
    peak = cell["matmul_flops"]
    seconds = cell["peers"][name].get(phase)
    factor = {"forward": 1.0, "backward": 2.5, "both": 3.5}[phase]
    return None if seconds is None else factor * cell["case"].forward_flops / seconds / peak


def scatter_line(cells: list[dict[str, Any]]) -> str | None:
    """How far SDPA is from itself: what no ratio of this run can resolve."""
    gaps = [
        abs(again / cell["peers"][DEFAULT]["ratio"][phase] - 1)
        for cell in cells
        if AGAIN in cell["peers"]
        for phase, again in cell["peers"][AGAIN]["ratio"].items()
    ]
    if not gaps:
        return None
    return (
        f"`{AGAIN}` is SDPA once more, as a peer of its own. It differs from `{DEFAULT}` by "
        f"{statistics.median(gaps):.1%} in the median of {len(gaps)} numbers, by more than 3% in "
        f"{sum(gap > 0.03 for gap in gaps)} of them and by {max(gaps):.0%} at most: so much is the "
        "scatter of a ratio here."
    )


def markdown(results: dict[str, Any]) -> str:
    """The page."""
    machine = results["machine"]
    best: dict[str, float] = {}
    for cell in results["cells"]:
        dtype = cell["case"].dtype
        best[dtype] = max(best.get(dtype, 0.0), cell["matmul_flops"])
    peaks = ", ".join(f"{flops / 1e12:.3g} TFLOP/s in {dtype}" for dtype, flops in best.items())
    lines = [
        "# Attention: speed, memory and error",
        "",
        f"`{results['command']}` on {machine['device']}, {machine['threads']} threads, "
        f"{machine['system']}; torch {machine['torch']}, Python {machine['python']}, flashlayer "
        f"{machine['flashlayer']}; {results['seconds']:.0f} s. A large matrix product: up to "
        f"{peaks or 'not measured'}.",
        "",
    ]
    if results["clocks"]:
        lines += ["; ".join(f"{k} {v}" for k, v in results["clocks"].items()) + ".", ""]
    lines += [
        "Milliseconds are flashlayer's (`backend=\"auto\"`); every other number is a peer's time "
        "over flashlayer's, forward / backward / both: above 1 flashlayer is the faster. Medians "
        "over interleaved rounds in one process. `of matmul` is the share of the matrix product's "
        "speed that flashlayer reaches, forward and backward together. `error` is flashlayer's "
        "largest error against fp64 over what the tests allow: 2 times that of standard attention "
        "in the same dtype, 3 times for gradients.",
        "",
    ]
    scatter = scatter_line(results["cells"])
    lines += [scatter, ""] if scatter else []
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in results["cells"]:
        groups.setdefault(cell["case"].group, []).append(cell)
    for group, cells in groups.items():
        lines += group_table(group, cells)
    if results["memory"]:
        lines += _memory(results["memory"])
    if results["skipped"]:
        lines += ["## Not measured, for want of time", ""]
        lines += [f"- {name}" for name in results["skipped"]] + [""]
    return "\n".join(lines)


def group_table(group: str, cells: list[dict[str, Any]]) -> list[str]:
    """The table of a group's cells, and who refused what."""
    names = [name for name in cells[0]["peers"] if name != OURS]
    names = [name for name in names if any("ratio" in cell["peers"][name] for cell in cells)]
    header = ["case", "dtype", "ms", *names, "of matmul", "error"]
    lines = [f"## {group[0].upper()}{group[1:]}", "", row(header), row(["---"] * len(header))]
    for cell in cells:
        case, ours = cell["case"], cell["peers"][OURS]
        phases = [phase for phase in PHASES if phase in ours]
        share = share_of_matmul(cell, OURS, phases[-1])
        lines.append(
            row(
                [
                    f"B={case.batch} {case.name}",
                    case.dtype,
                    " / ".join(f"{1e3 * ours[phase]:.3g}" for phase in phases),
                    *(_ratios(cell["peers"][name], phases) for name in names),
                    f"{share:.0%}",
                    f"{ours['error_over_bound']:.2f}",
                ]
            )
        )
    refusals = {
        f"- {name}, {cell['case'].name} {cell['case'].dtype}: {cell['peers'][name]['refused']}"
        for cell in cells
        for name in cell["peers"]
        if "refused" in cell["peers"][name]
    }
    return [*lines, "", *sorted(refusals), *([""] if refusals else [])]


def _ratios(result: dict[str, Any], phases: list[str]) -> str:
    if "ratio" not in result:
        return "-"
    return " / ".join(f"{result['ratio'][phase]:.2f}" for phase in phases)


def row(values: list[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(values) + " |"


def _memory(memory: dict[str, Any]) -> list[str]:
    case: Case = memory["case"]
    header = ["length", *dict.fromkeys(row["peer"] for row in memory["rows"])]
    lengths = sorted({row["length"] for row in memory["rows"]})
    found = {(row["peer"], row["length"]): row["extra_bytes"] for row in memory["rows"]}
    lines = [
        "## Memory",
        "",
        f"MiB beyond the inputs that one forward and backward needs at its peak: batch "
        f"{case.batch}, {case.heads} heads of {case.head_dim}, causal, {case.dtype}.",
        "",
        row(header),
        row(["---"] * len(header)),
    ]
    for length in lengths:
        values = (found.get((peer, length)) for peer in header[1:])
        lines.append(
            row([f"{length:,}", *("-" if v is None else f"{v / MIB:.1f}" for v in values)])
        )
    return [*lines, "", f"flashlayer's {fit_line(memory['fit'])}.", ""]
