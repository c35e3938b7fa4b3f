"""The pictures of the training proof, drawn for someone who has never seen the project."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from train.proof.verdict import CANDIDATE, CONTROL, REFERENCE, ArmRun

MIB = 2**20

# Okabe and Ito's colours, which colour-blind readers tell apart. The curves coincide: a wide pale
# line lies under a narrower one, and that under dots, so that all of them are seen.
LINES: dict[str, dict[str, Any]] = {
    REFERENCE: {"color": "#56B4E9", "linewidth": 7, "alpha": 0.7},
    CANDIDATE: {"color": "#D55E00", "linewidth": 2.2},
    CONTROL: {"color": "black", "linewidth": 1.4, "linestyle": (0, (1, 3))},
}
OTHER_LINE: dict[str, Any] = {"color": "#009E73", "linewidth": 1.4, "linestyle": (0, (6, 6))}
MARKERS: dict[str, dict[str, Any]] = {
    REFERENCE: {"marker": "o", "markersize": 15},
    CANDIDATE: {"marker": "s", "markersize": 8},
    CONTROL: {"marker": "x", "markersize": 6},
}
OTHER_MARKER: dict[str, Any] = {"marker": "+", "markersize": 10}


def loss(path: Path, runs: dict[str, ArmRun]) -> None:
    """Training and validation loss of every arm over the steps."""
    figure, axes = _canvas()
    for arm, run in runs.items():
        style = LINES.get(arm, OTHER_LINE)
        axes.plot(
            run.column("step"), run.column("train_loss"), label=f"{arm}, training batch", **style
        )
    for arm, run in runs.items():
        steps, losses = run.validations()
        colour = LINES.get(arm, OTHER_LINE)["color"]
        axes.plot(
            [0, *steps],
            [run.initial_val_loss, *losses],
            label=f"{arm}, held-out text",
            linestyle="none",
            markeredgecolor="white" if arm != CONTROL else colour,
            color=colour,
            zorder=3,
            **MARKERS.get(arm, OTHER_MARKER),
        )
    axes.set_title("The same GPT trained once per attention: equal curves lie on top of each other")
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(ncols=2, fontsize=11)
    _save(figure, path)


def loss_gap(path: Path, runs: dict[str, ArmRun], bound: float) -> None:
    """Distance of every arm's training loss from standard's, and the bound of the verdict."""
    figure, axes = _canvas()
    reference = runs[REFERENCE].column("train_loss")
    for arm, run in runs.items():
        if arm == REFERENCE:
            continue
        gap = np.abs(run.column("train_loss") - reference)
        largest = np.maximum.accumulate(gap)
        colour = LINES.get(arm, OTHER_LINE)["color"]
        steps = run.column("step")
        axes.plot(
            steps, np.where(gap > 0, gap, np.nan), ".", color=colour, alpha=0.45, markersize=5
        )
        axes.plot(
            steps,
            np.where(largest > 0, largest, np.nan),
            color=colour,
            linewidth=2.2,
            label=f"|{arm} - standard|, largest so far",
        )
    axes.axhline(bound, color="#CC79A7", linewidth=2, linestyle="--")
    axes.annotate(
        f"bound of the verdict: {bound:.1e}", (0.01, bound), xycoords=("axes fraction", "data"),
        xytext=(0, 5), textcoords="offset points", color="#A0457A", fontsize=12,
    )  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(top=30 * axes.get_ylim()[1])  # room for the legend above everything
    axes.set_title("How far the loss of each arm is from standard's (control: rounding alone)")
    axes.set_xlabel("training step (dots: that step; steps with identical losses have no dot)")
    axes.set_ylabel("gap in training loss (nats per token)")
    axes.legend(fontsize=12, loc="upper right")
    _save(figure, path)


def memory(path: Path, layer: dict[str, Any]) -> None:
    """Extra memory and time of one layer against sequence length, flash and standard."""
    figure = Figure(figsize=(12, 5.4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = layer["lengths"]
    _growth(
        left,
        rows,
        {arm: [row["extra_bytes"][arm] / MIB for row in rows] for arm in (REFERENCE, CANDIDATE)},
    )
    left.set_title("Extra memory")
    left.set_ylabel("peak beyond the inputs (MiB)")
    _growth(
        right,
        rows,
        {arm: [1e3 * row["seconds"][arm] for row in rows] for arm in (REFERENCE, CANDIDATE)},
    )
    right.set_title("Time")
    right.set_ylabel("milliseconds")
    figure.suptitle(
        f"One attention layer, forward + backward: batch {layer['batch']}, {layer['heads']} heads "
        f"of width {layer['head_dim']}, {layer['dtype']}",
        fontsize=14,
    )
    _save(figure, path)


def _growth(axes: Axes, rows: list[dict[str, Any]], values: dict[str, list[float]]) -> None:
    """One quantity against length, both logarithmic, with the arms' ratio at the longest."""
    lengths = [row["length"] for row in rows]
    for arm, marker in ((REFERENCE, "o"), (CANDIDATE, "s")):
        axes.plot(
            lengths,
            values[arm],
            marker=marker,
            color=LINES[arm]["color"],
            linewidth=2.5,
            markersize=8,
        )
        axes.annotate(
            arm,
            (lengths[-1], values[arm][-1]),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            fontsize=13,
            annotation_clip=False,
        )
    high, low = values[REFERENCE][-1], values[CANDIDATE][-1]
    all_positive = min(map(min, values.values())) > 0  # else no logarithm shows them
    if all_positive:
        axes.annotate(
            "",
            (lengths[-1], low),
            (lengths[-1], high),
            arrowprops={"arrowstyle": "<->", "color": "gray"},
        )
        axes.annotate(
            f"{high / low:.1f}x",
            (lengths[-1], (high * low) ** 0.5),
            xytext=(10, 0),
            textcoords="offset points",
            ha="left",
            va="center",
            fontsize=14,
            fontweight="bold",
            annotation_clip=False,
        )
    axes.set_xscale("log", base=2)
    if all_positive:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlabel("sequence length (tokens)")
    axes.grid(alpha=0.3)


Points = tuple[list[int], list[float]]

# For runs of any name, in the order they are named; where there are more, again with dashes.
COLOURS = ("#56B4E9", "#D55E00", "black", "#009E73", "#CC79A7", "#E69F00", "#0072B2")


def compare_loss(path: Path, train: dict[str, Points], val: dict[str, Points]) -> None:
    """Training loss as lines and validation loss as dots, of runs of any name."""
    figure, axes = _canvas()
    styles = _styles(train)
    for name, (steps, losses) in train.items():
        axes.plot(steps, losses, label=name, **styles[name])
    for name, (steps, losses) in val.items():
        axes.plot(
            steps,
            losses,
            linestyle="none",
            marker="o",
            markersize=5 + 1.5 * styles[name]["linewidth"],
            markeredgecolor="white",
            color=styles[name]["color"],
            zorder=3,
        )
    if any(steps for steps, _ in val.values()):
        axes.plot([], [], "-", color="gray", label="line: training batch")
        axes.plot([], [], "o", color="gray", label="dot: held-out text")
    axes.set_title("Loss of the runs: equal curves lie on top of each other")
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(fontsize=11, ncols=1 + len(train) // 8)
    _save(figure, path)


def compare_training(
    path: Path, norm: dict[str, Points], speed: dict[str, Points], memory: dict[str, Points]
) -> None:
    """Gradient norm, speed and memory of runs of any name, side by side."""
    figure = Figure(figsize=(15, 5.2), dpi=130, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    styles = _styles(norm)
    memory = {name: (steps, [y / MIB for y in ys]) for name, (steps, ys) in memory.items()}
    for axes, curves, title, unit in (
        (left, norm, "Gradient norm, before clipping", "norm"),
        (middle, speed, "Speed", "tokens per second"),
        (right, memory, "Peak memory so far", "MiB"),
    ):
        for name, (steps, values) in curves.items():
            axes.plot(steps, values, label=name, **styles[name])
        highest = max((y for _, ys in curves.values() for y in ys if np.isfinite(y)), default=None)
        if highest is not None:
            axes.set_ylim(0, 1.15 * highest)
        else:
            axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color="gray")
        axes.set_title(title)
        axes.set_xlabel("training step")
        axes.set_ylabel(unit)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.grid(alpha=0.3)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=min(6, len(styles))
    )
    _save(figure, path)


def _styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A line for every run, the later the narrower."""
    styles = {}
    for index, name in enumerate(names):
        again, colour = divmod(index, len(COLOURS))
        styles[name] = {
            "color": COLOURS[colour],
            "linewidth": max(1.2, 6.5 - 2.6 * index),
            "alpha": 0.7 if index == 0 else 0.9,
            "linestyle": (0, (4, 2 * again)) if again else "-",
        }
    return styles


def _canvas() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(10, 5.8), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.title.set_fontsize(14)
        axes.xaxis.label.set_fontsize(12)
        axes.yaxis.label.set_fontsize(12)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
