"""What a run of the training proof leaves in its folder, and says on the terminal."""

import csv
import json
import math
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from train import measure
from train.proof import plots
from train.proof.verdict import CANDIDATE, REFERENCE, ArmRun

COLUMNS: tuple[str, ...] = (
    "arm",
    "step",
    "train_loss",
    "val_loss",
    "grad_norm",
    "tokens_per_second",
    "peak_memory_bytes",
)
MIB = 2**20


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the versions."""
    return {
        **measure.machine(device),
        **{package: version(package) for package in ("torch", "lightning", "datasets")},
    }


def arm_line(arm: str, result: dict[str, Any]) -> str:
    """One arm, for the terminal."""
    return (
        f"{arm:<9} train {result['final_train_loss']:.4f}  val {result['final_val_loss']:.4f}  "
        f"{result['tokens_per_second']:>8,.0f} tokens/s  peak "
        f"{result['peak_memory_bytes'] / MIB:>6,.0f} MiB  {result['seconds']:>4.0f} s"
    )


def layer_line(row: dict[str, Any]) -> str:
    """One length of the layer study, for the terminal."""
    arms = "  ".join(
        f"{arm} {1e3 * row['seconds'][arm]:>8,.1f} ms {row['extra_bytes'][arm] / MIB:>7,.1f} MiB"
        for arm in (REFERENCE, CANDIDATE)
    )
    return f"layer at {row['length']:>6}  {arms}"


def closing_lines(summary: dict[str, Any], folder: Path) -> str:
    """The verdict, for the terminal."""
    failed = [
        f"  failed: {_check_words(check)}" for check in summary["checks"] if not check["passed"]
    ]
    return "\n".join(
        [
            f"verdict: {summary['verdict']}  (loss gap flash "
            f"{_number(summary['flash_gap']['max'])}, control "
            f"{_number(summary['control_gap']['max'])}, bound {_number(summary['loss_bound'])}; "
            f"training speed {summary['speed']['flash_over_standard']:.2f}x standard's)",
            *failed,
            f"report: {folder / 'report.md'}",
        ]
    )


def write(folder: Path, summary: dict[str, Any], runs: dict[str, ArmRun]) -> None:
    """Write every file; all are complete before the first is put in its place."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as name:
        unfinished = Path(name)
        _write_metrics(unfinished / "metrics.csv", runs)
        # JSON has no NaN: write null.
        (unfinished / "summary.json").write_text(
            json.dumps(_finite(summary), indent=2, allow_nan=False) + "\n"
        )
        plots.loss(unfinished / "loss.png", runs)
        plots.loss_gap(unfinished / "loss_gap.png", runs, summary["loss_bound"])
        plots.memory(unfinished / "memory.png", summary["layer"])
        (unfinished / "report.md").write_text(_page(summary))
        for file in unfinished.iterdir():
            os.replace(file, folder / file.name)


def _write_metrics(path: Path, runs: dict[str, ArmRun]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for run in runs.values():
            writer.writerows(run.rows)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _page(summary: dict[str, Any]) -> str:
    """report.md: the verdict first, then what it rests on."""
    run, environment = summary["run"], summary["environment"]
    versions = ", ".join(
        f"{name} {environment[name]}" for name in ("flashlayer", "torch", "lightning", "datasets")
    )
    fall = min(arm["val_loss_fall"] for arm in summary["arms"].values())
    parts = [
        f"# {summary['name']}: {summary['verdict']}",
        _headline(summary, fall),
        summary["note"],
        f"The same GPT ({run['parameters'] / 1e6:.3g} million parameters, {run['n_layer']} "
        f"layers, width {run['n_embd']}, {run['n_head']} heads, context {run['context']}) was "
        f"trained once per arm, from the same initial weights on the same batches: {run['steps']} "
        f"steps of {run['batch_size']} x {run['context']} tokens ({run['corpus']}, "
        f"{run['tokenizer']}), precision {run['precision']}. `control` is standard attention with "
        "its sums taken in another order: what it differs from `standard` is rounding and "
        "nothing else.",
        _layouts_words(summary["layouts"]),
        "## Losses\n\n" + _arms_table(summary["arms"]) + "\n\n![Loss of every arm](loss.png)",
        "## Gap to standard\n\n"
        + _gaps_table(summary["gaps"])
        + "\n\n![Gap to standard at every step](loss_gap.png)",
        "## Speed and memory of training\n\n"
        + _speed_table(summary["arms"])
        + "\n\n"
        + _speed_words(summary),
        "## One attention layer, forward and backward\n\n"
        + _layer_table(summary["layer"])
        + "\n\n![Memory and time of one layer](memory.png)",
        "## The verdict\n\n" + summary["rule"] + "\n\n" + _checks_table(summary["checks"]),
        f"## How to reproduce\n\n    {summary['command']}\n\nMade on {environment['device']}, "
        f"{environment['threads']} threads, {environment['system']}, Python "
        f"{environment['python']}, {versions}; seed {run['seed']}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _headline(summary: dict[str, Any], fall: float) -> str:
    failed = [_check_words(check) for check in summary["checks"] if not check["passed"]]
    agree = (
        f"**The proof fails.** What failed: {'; '.join(failed)}."
        if failed
        else "**Flash attention trains this GPT as standard attention does.**"
    )
    longest = summary["layer"]["lengths"][-1]
    time, memory = _ratios(longest)
    return (
        f"{agree} Their losses differ by at most {_number(summary['flash_gap']['max'])}; rounding "
        f"alone (`control`) makes {_number(summary['control_gap']['max'])}, and "
        f"{_number(summary['loss_bound'])} is allowed. Validation loss fell by {fall:.0%}. "
        f"Training ran at {summary['speed']['flash_over_standard']:.2f}x the speed of standard; "
        f"one layer at sequence length {longest['length']:,} is {time:.1f}x as fast and needs "
        f"{_fraction(memory)} of the extra memory."
    )


def _layouts_words(layouts: dict[str, dict[str, Any]]) -> str | None:
    """How the arms on several processes are spread."""
    if not layouts:
        return None
    arms = ", ".join(
        f"`{arm}` ({layout['data']} x {layout['context']}, "
        f"{'FSDP2' if layout['shard'] else 'DDP'}"
        + (f", {layout['attention']}" if layout["context"] > 1 else "")
        + ")"
        for arm, layout in layouts.items()
    )
    return (
        f"Trained on data x context processes: {arms}. They are held to the same bounds as "
        "`flash`. Their speed is that of all processes, their memory that of one."
    )


def _arms_table(arms: dict[str, dict[str, Any]]) -> str:
    rows = [
        [
            arm,
            result["attention"],
            f"{result['final_train_loss']:.6f}",
            f"{result['initial_val_loss']:.6f}",
            f"{result['final_val_loss']:.6f}",
            f"{result['val_loss_fall']:.1%}",
        ]
        for arm, result in arms.items()
    ]
    return table(
        ["arm", "attention", "last training loss", "validation before", "validation after", "fall"],
        rows,
    )


def _gaps_table(gaps: dict[str, dict[str, float]]) -> str:
    keys = ("max", "mean", "grad_norm_max", "grad_norm_mean")
    rows = [
        [f"{arm} - standard", *(_number(values[key]) for key in keys)]
        for arm, values in gaps.items()
    ]
    return table(
        [
            "",
            "largest loss gap",
            "mean loss gap",
            "largest gradient-norm gap",
            "mean gradient-norm gap",
        ],
        rows,
    )


def _speed_table(arms: dict[str, dict[str, Any]]) -> str:
    rows = [
        [
            arm,
            f"{result['tokens_per_second']:,.0f}",
            f"{result['peak_memory_bytes'] / MIB:,.0f} MiB",
            f"{result['extra_memory_bytes'] / MIB:,.0f} MiB",
        ]
        for arm, result in arms.items()
    ]
    return table(
        [
            "arm",
            "tokens/s (median step)",
            "peak memory of the process",
            "of it, since before step 1",
        ],
        rows,
    )


def _speed_words(summary: dict[str, Any]) -> str:
    return (
        "The arms train one after the other, each in a fresh process. With all arms in one "
        f"process, taking turns for {summary['speed']['rounds']} steps each so that a busy "
        "machine slows all of them alike, flash trains at "
        f"**{summary['speed']['flash_over_standard']:.2f}x** the speed of standard (ratio of "
        "medians)."
    )


def _layer_table(layer: dict[str, Any]) -> str:
    rows = []
    for row in layer["lengths"]:
        time, memory = _ratios(row)
        seconds, extra = row["seconds"], row["extra_bytes"]
        rows.append(
            [
                f"{row['length']:,}",
                *(f"{1e3 * seconds[arm]:,.1f} ms" for arm in (REFERENCE, CANDIDATE)),
                f"{time:.1f}x as fast",
                *(f"{extra[arm] / MIB:,.1f} MiB" for arm in (REFERENCE, CANDIDATE)),
                _fraction(memory),
            ]
        )
    head = [
        "length",
        "standard",
        "flash",
        "flash is",
        "standard, extra memory",
        "flash, extra memory",
        "flash / standard",
    ]
    return (
        f"Batch {layer['batch']}, {layer['heads']} heads of width {layer['head_dim']}, "
        f"{layer['dtype']}, causal. Extra memory is the peak beyond the inputs, in a fresh "
        f"process per number; times are medians of {layer['rounds']} interleaved "
        f"rounds.\n\n{table(head, rows)}"
    )


def _checks_table(checks: list[dict[str, Any]]) -> str:
    rows = [
        [
            "pass" if check["passed"] else "**FAIL**",
            check["check"],
            _number(check.get("found")),
            _number(check.get("bound")),
        ]
        for check in checks
    ]
    return table(["", "check", "found", "bound"], rows)


def _check_words(check: dict[str, Any]) -> str:
    found = (
        f": {_number(check['found'])}, bound {_number(check['bound'])}" if "found" in check else ""
    )
    return check["check"] + found


def _ratios(row: dict[str, Any]) -> tuple[float, float]:
    """How many times as fast flash is, and flash's fraction of standard's extra memory."""
    seconds, extra = row["seconds"], row["extra_bytes"]
    return seconds[REFERENCE] / seconds[CANDIDATE], extra[CANDIDATE] / max(1, extra[REFERENCE])


def _fraction(ratio: float) -> str:
    return f"1/{1 / ratio:.0f}" if 0 < ratio < 0.5 else f"{ratio:.2f}x"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table: text in the first column, numbers in the others."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
