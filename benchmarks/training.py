"""A whole training step of a GPT by length of its context: time, memory, and who runs out of it.

    python -m benchmarks training --device cpu
    python -m benchmarks training --device cuda

On a GPU the model is GPT-2 small in bf16, up to 65,536 tokens of context; on a CPU it is the
demo's GPT. Every arm has the same weights and the same batch, so their losses are compared in the
same run. Writes ``training.json``, ``training.md`` and ``training.png`` into ``--out``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.report import MIB, row
from train.measure import PeakMemory, in_fresh_process, interleaved, machine, synchronize
from train.model import GPT, GPTConfig

OURS, ARMS = "flash", ("flash", "sdpa", "standard")

# Of one layer's scores in fp32 standard attention holds about so many at once, and one of every
# other layer until its backward pass.
SCORES_HELD = 4
CPU_MEMORY_LIMIT = 6 * 2**30


@dataclass(frozen=True)
class Setup:
    """What is trained.

    Attributes:
        gpt: the model; its context and attention are those of the cell.
        contexts: lengths to train at.
        tokens: of a step, where the context is not longer than that.
        recompute_from: activations are recomputed block by block from this context on.
        rounds: timed steps of each arm.
    """

    gpt: GPTConfig
    contexts: tuple[int, ...]
    tokens: int
    recompute_from: int
    rounds: int = 7

    def batch(self, context: int) -> int:
        """Sequences a step."""
        return max(1, self.tokens // context)

    def score_bytes(self, context: int) -> int:
        """What standard attention holds of scores on a CPU, in fp32."""
        one = 4 * self.batch(context) * self.gpt.n_head * context**2
        return (SCORES_HELD + self.gpt.n_layer - 1) * one


SETUPS = {
    "cpu": Setup(GPTConfig(), (256, 1024, 4096), tokens=4096, recompute_from=2**30),
    "cuda": Setup(
        GPTConfig(vocab_size=50304, n_layer=12, n_head=12, n_embd=768),
        (1024, 8192, 16384, 65536),
        tokens=16384,
        recompute_from=32768,
    ),
}


def main(argv: list[str]) -> int:
    """Measure every context; 1 if the arms' losses disagree by more than their rounding."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks training", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--device", choices=tuple(SETUPS), default="cpu")
    parser.add_argument("--contexts", nargs="+", type=int, help="instead of the usual ones")
    parser.add_argument("--tokens", type=int, help="tokens of a step")
    parser.add_argument("--rounds", type=int, help="timed steps of each arm")
    parser.add_argument("--out", type=Path, default=Path("runs/training"))
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    changes = {
        name: value
        for name in ("contexts", "tokens", "rounds")
        if (value := getattr(args, name)) is not None
    }
    setup = replace(SETUPS[args.device], **changes)
    results: dict[str, Any] = {
        "command": " ".join(("python -m benchmarks training", *argv)),
        "machine": machine(device),
        "clocks": measure.clocks() if device.type == "cuda" else None,
        "setup": asdict(setup),
        "cells": [],
    }
    for context in setup.contexts:
        cell = measure_context(setup, context, device)
        results["cells"].append(cell)
        print(cell_line(cell), flush=True)
    write(args.out, results)
    print(args.out / "training.md")
    return int(any(cell["loss_gap"] > cell["loss_bound"] for cell in results["cells"]))


def measure_context(setup: Setup, context: int, device: torch.device) -> dict[str, Any]:
    """One cell: every arm by itself for its memory, then those that fit in turns for their time."""
    arms: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        needed = setup.score_bytes(context) if arm == "standard" and device.type == "cpu" else 0
        if needed > CPU_MEMORY_LIMIT:
            arms[arm] = {"refused": f"its scores need about {needed / 2**30:.0f} GiB"}
        else:
            arms[arm] = in_fresh_process(one_step, setup, arm, context, device)
    fitting = [arm for arm in ARMS if "refused" not in arms[arm]]
    seconds = in_fresh_process(step_seconds, setup, fitting, context, device)
    for arm in fitting:
        arms[arm]["seconds"] = seconds[arm]
    losses = [arms[arm]["loss"] for arm in fitting]
    # Rounding of a mean over thousands of tokens. The proof is train.proof.verdict.
    bound = 1e-2 if device.type == "cuda" else 1e-5
    return {
        "context": context,
        "batch": setup.batch(context),
        "recomputed": context >= setup.recompute_from,
        "arms": arms,
        "loss_gap": max(losses, default=0.0) - min(losses, default=0.0),
        "loss_bound": bound,
    }


def one_step(setup: Setup, arm: str, context: int, device: torch.device) -> dict[str, Any]:
    """Loss and peak memory of a step in a process of its own, or that there is no room for it."""
    try:
        step, loss = prepare(setup, arm, context, device)
        memory = PeakMemory(device)
        step()
        return {"loss": float(loss()), "extra_bytes": memory.extra()}
    except torch.OutOfMemoryError:
        total = torch.cuda.get_device_properties(device).total_memory
        return {"refused": f"out of memory on a device of {total / 2**30:.0f} GiB"}


def step_seconds(
    setup: Setup, arms: list[str], context: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of a step by arm."""
    steps = {arm: prepare(setup, arm, context, device)[0] for arm in arms}
    return interleaved(steps, setup.rounds)


def prepare(
    setup: Setup, arm: str, context: int, device: torch.device
) -> tuple[Callable[[], None], Callable[[], torch.Tensor]]:
    """A function that makes one step, and one that tells the loss before the first."""
    torch.manual_seed(0)
    model = GPT(replace(setup.gpt, context=context, attention=arm)).to(device)
    model.recompute_blocks = context >= setup.recompute_from
    shape = (setup.batch(context), context + 1)
    tokens = torch.randint(setup.gpt.vocab_size, shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    first: list[torch.Tensor] = []

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model.loss(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if not first:
            first.append(loss.detach())
        synchronize(device)

    return step, lambda: first[0]


def cell_line(cell: dict[str, Any]) -> str:
    """One cell, for the terminal."""
    parts = [f"context {cell['context']:,}, batch {cell['batch']}:"]
    for arm, result in cell["arms"].items():
        if "refused" in result:
            parts.append(f"{arm} {result['refused']};")
            continue
        memory = f"{result['extra_bytes'] / MIB:,.0f} MiB"
        parts.append(f"{arm} {1e3 * result['seconds']:,.0f} ms, {memory};")
    return " ".join([*parts, f"losses within {cell['loss_gap']:.1g}"])


def write(folder: Path, results: dict[str, Any]) -> None:
    """The JSON, the table and the plot."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1)
    (folder / "training.json").write_text(text + "\n", encoding="utf-8")
    (folder / "training.md").write_text(markdown(results), encoding="utf-8")
    draw(folder / "training.png", results)


def markdown(results: dict[str, Any]) -> str:
    """The page."""
    gpt, device = results["setup"]["gpt"], results["machine"]
    lines = [
        "# A training step by length of the context",
        "",
        f"`{results['command']}` on {device['device']}, {device['threads']} threads; torch "
        f"{device['torch']}, Python {device['python']}, flashlayer {device['flashlayer']}. A GPT "
        f"of {gpt['n_layer']} layers, {gpt['n_head']} heads, width {gpt['n_embd']} and "
        f"{gpt['vocab_size']:,} tokens; forward, backward and AdamW.",
        "",
    ]
    if results["clocks"]:
        lines += ["; ".join(f"{k} {v}" for k, v in results["clocks"].items()) + ".", ""]
    lines += [
        "Times are medians of steps taken in turns; the numbers in brackets are an arm's time over "
        "flash's. Memory is the peak of one step beyond the model and its batch, in a process of "
        "its own.",
        "",
        row(["context", "batch", *ARMS, *(f"{arm}, MiB" for arm in ARMS), "losses within"]),
        row(["---"] * (3 + 2 * len(ARMS))),
    ]
    for cell in results["cells"]:
        arms = cell["arms"]
        ours = arms[OURS].get("seconds")
        times, memory = [], []
        for arm in ARMS:
            if "refused" in arms[arm]:
                times.append(arms[arm]["refused"])
                memory.append("-")
                continue
            seconds = arms[arm]["seconds"]
            ratio = "" if arm == OURS or ours is None else f" ({seconds / ours:.2f})"
            times.append(f"{1e3 * seconds:,.0f} ms{ratio}")
            memory.append(f"{arms[arm]['extra_bytes'] / MIB:,.0f}")
        context = f"{cell['context']:,}" + (", recomputed" if cell["recomputed"] else "")
        lines.append(row([context, str(cell["batch"]), *times, *memory, f"{cell['loss_gap']:.1g}"]))
    return "\n".join([*lines, ""])


def draw(path: Path, results: dict[str, Any]) -> None:
    """Speed and memory by context."""
    from matplotlib.figure import Figure

    from benchmarks import plots

    figure = Figure(figsize=(11, 4.6), dpi=120, layout="constrained")
    speed, memory = figure.subplots(1, 2)
    for arm in ARMS:
        cells = [cell for cell in results["cells"] if "refused" not in cell["arms"][arm]]
        if not cells:
            continue
        contexts = [cell["context"] for cell in cells]
        tokens = [
            cell["context"] * cell["batch"] / cell["arms"][arm]["seconds"] / 1e3 for cell in cells
        ]
        extra = [cell["arms"][arm]["extra_bytes"] / MIB for cell in cells]
        name = "flashlayer" if arm == OURS else arm
        plots.line(speed, name, list(zip(contexts, tokens, strict=True))).set_label(name)
        plots.line(memory, name, list(zip(contexts, extra, strict=True))).set_label(name)
    for axes, unit, title in (
        (speed, "thousand tokens per second", "Speed of a whole training step"),
        (memory, "peak beyond model and batch (MiB)", "Memory of a whole training step"),
    ):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(plots.PLAIN)
        axes.yaxis.set_minor_formatter(plots.PLAIN)
        axes.tick_params(axis="y", which="minor", labelsize=7)
        axes.set_ylabel(unit)
        axes.set_title(title)
        plots.lengths(axes, [cell["context"] for cell in results["cells"]])
    speed.legend()
    figure.savefig(path)
