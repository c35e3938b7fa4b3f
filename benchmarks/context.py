"""A sequence over several processes: memory, bytes sent, and time against the scaling model.

    python -m benchmarks context
    python -m benchmarks context --ranks 1 2 4 --length 16384

One process a rank, with NCCL where there is a GPU for each, else with gloo. Writes
``context.json``, ``context.md`` and ``context_memory.png`` into ``--out``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import plots
from benchmarks.processes import run_group
from benchmarks.scaling import (
    Hop,
    Layer,
    ring_bytes,
    ring_seconds,
    ulysses_bytes,
    window_hops,
)
from benchmarks.traffic import Counted
from flashlayer import distributed, flash_attention, online_softmax
from train.measure import PeakMemory, machine, synchronize
from train.proof.report import table

MIB = 2**20
WARM_UP = 64  # positions of a sequence that loads and connects everything, and is next to nothing

# What each call is: the function, and its options but for the window.
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "ring": ("ring_attention", {"causal": True, "placement": "zigzag"}),
    "ring, window": ("ring_attention", {"causal": True}),
    "ulysses": ("ulysses_attention", {"causal": True}),
}


@dataclass(frozen=True)
class Problem:
    """One layer's attention over a sequence that the ranks share."""

    layer: Layer
    length: int
    window: int
    rounds: int

    def attend(self, call: str) -> Callable[..., Tensor]:
        """The call, with its options."""
        name, options = CALLS[call]
        if "window" in call:
            options = options | {"window_size": (self.window, None)}
        return lambda q, k, v: getattr(distributed, name)(q, k, v, **options)

    def shard(self, length: int, device: torch.device) -> tuple[tuple[Tensor, ...], Tensor]:
        """q, k and v of this rank, and the gradient of its output."""
        ranks = dist.get_world_size()
        heads, kv_heads = self.layer.heads, self.layer.kv_heads
        q, k, v, do = (
            torch.randn(1, h, length // ranks, self.layer.head_dim, device=device)
            for h in (heads, kv_heads, kv_heads, heads)
        )
        return tuple(x.requires_grad_() for x in (q, k, v)), do

    def expected_bytes(self, call: str, ranks: int) -> list[float]:
        """The formula of the call's docstring, forward and backward."""
        length = self.length // ranks
        if call == "ulysses":
            return [*ulysses_bytes(self.layer, length, ranks)]
        hops = window_hops(ranks, length, self.window if "window" in call else None)
        return [*ring_bytes(self.layer, length, hops)]


def measure_call(
    rank: int, device: torch.device, problem: Problem, call: str
) -> dict[str, int | list[int]]:
    """Bytes that this rank sent, and its peak memory beyond the inputs; in a fresh process."""
    attend = problem.attend(call)
    for length in (WARM_UP, problem.length):
        leaves, do = problem.shard(length, device)
        dist.barrier()
        memory = PeakMemory(device)
        with Counted() as forward:
            out = attend(*leaves)
        with Counted() as backward:
            torch.autograd.grad(out, leaves, do)
        synchronize(device)
        extra = memory.extra()
        del out
    return {"extra_bytes": extra, "sent_bytes": [forward.sent, backward.sent]}


def measure_hops(
    rank: int, device: torch.device, problem: Problem
) -> dict[str, dict[str, float] | list[float]]:
    """Seconds of the parts that the model is made of, and of the whole ring.

    All ranks do the same at a time, so that what they share, such as cores, they share here too.
    """
    layer, ranks = problem.layer, dist.get_world_size()
    (q, k, v), do = problem.shard(problem.length, device)
    half = q.shape[2] // 2
    pieces = {"own": (k, v), "other": (k[:, :, :half], v[:, :, :half])}
    found: dict[str, Any] = {}
    for name, (keys, values) in pieces.items():
        causal = name == "own"

        def forward(keys: Tensor = keys, values: Tensor = values, causal: bool = causal) -> Any:
            out, lse = flash_attention(q, keys, values, causal=causal, return_lse=True)
            state = online_softmax.state_of(out.detach(), lse.detach())
            online_softmax.merge(state, state)
            return out

        def backward(out: Tensor) -> None:
            torch.autograd.grad(out, (q, k, v), do)

        found[name] = _seconds(problem.rounds, device, forward, backward)
    elements = layer.kv_heads * q.shape[2] * 2 * layer.head_dim
    found["messages"] = []
    for itemsize in (layer.itemsize, layer.sum_itemsize):
        sent = torch.zeros(elements * itemsize // 4, device=device)
        received = torch.zeros_like(sent)

        def exchange(sent: Tensor = sent, received: Tensor = received) -> None:
            operations = [
                dist.P2POp(dist.isend, sent, (rank + 1) % ranks),
                dist.P2POp(dist.irecv, received, (rank - 1) % ranks),
            ]
            for work in dist.batch_isend_irecv(operations):
                work.wait()

        found["messages"] += _seconds(problem.rounds, device, exchange)
    attend = problem.attend("ring")
    found["ring"] = _seconds(
        problem.rounds,
        device,
        lambda: attend(q, k, v),
        lambda out: torch.autograd.grad(out, (q, k, v), do),
    )
    return found


def _seconds(
    rounds: int, device: torch.device, first: Callable[[], Any], second: Any = None
) -> list[float]:
    """Median seconds of ``first()`` and ``second(its result)``, of the slowest rank a round."""
    taken: list[list[float]] = []
    for _ in range(rounds + 1):
        moments, result = [], None
        for step in (first, second):
            if step is None:
                continue
            dist.barrier()
            start = time.perf_counter()
            result = step() if step is first else step(result)
            synchronize(device)
            moments.append(time.perf_counter() - start)
        slowest = torch.tensor(moments, device=device, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        taken.append(slowest.tolist())
    return [statistics.median(column) for column in zip(*taken[1:], strict=True)]


def predictions(parts: dict[str, Any], ranks: int) -> list[dict[str, float]]:
    """The model's seconds of both phases, from the measured parts: overlapped, and one by one."""
    keys, sums = parts["messages"]
    rows = []
    for phase, own, other, last in zip(
        (0, 1), parts["own"], parts["other"], (0, sums), strict=True
    ):
        traffic = (ranks - 1) * keys + ranks * last
        rows.append(
            {
                "compute": own + (ranks - 1) * other,
                "transfer": traffic,
                "overlapped": ring_seconds(Hop(own, other, keys, last), ranks),
                "one_by_one": own + (ranks - 1) * other + traffic,
                "measured": parts["ring"][phase],
            }
        )
    return rows


def main(argv: list[str]) -> int:
    """Measure; 1 if a rank sent other than the formula says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks context", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--calls", nargs="+", choices=CALLS, default=[*CALLS])
    parser.add_argument("--length", type=int, default=16384, help="of the whole sequence")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--window", type=int, default=2048, help="of the call with a window")
    parser.add_argument("--timed-length", type=int, default=4096, help="where the ring is timed")
    parser.add_argument("--rounds", type=int, default=5, help="of the timing; 0: none")
    parser.add_argument("--out", type=Path, default=Path("runs/context"))
    args = parser.parse_args(argv)
    # fp32, so that shard and sums are of one size and every backend is at hand.
    layer = Layer(args.heads, args.kv_heads, args.head_dim, itemsize=4)
    results = measure_all(
        Problem(layer, args.length, args.window, args.rounds),
        args.ranks,
        args.calls,
        args.timed_length,
    )
    results["command"] = " ".join(("python -m benchmarks context", *argv))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "context.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (args.out / "context.md").write_text(markdown(results), encoding="utf-8")
    plots.context_memory(args.out / "context_memory.png", results)
    print(args.out / "context.md")
    return int(any(row["sent_bytes"] != row["formula_bytes"] for row in results["calls"]))


def measure_all(
    problem: Problem, ranks: list[int], names: list[str], timed_length: int
) -> dict[str, Any]:
    """Every call on every number of ranks, and the parts of a ring where there is one."""
    calls, timed = [], []
    for count in ranks:
        for call in names:
            if call == "ulysses" and problem.layer.kv_heads % count:
                continue  # it takes ranks that divide the heads
            with _memory_given_back():
                by_rank = _group(measure_call, count, problem, call)
            sent = [rank["sent_bytes"] for rank in by_rank]
            calls.append(
                {
                    "call": call,
                    "ranks": count,
                    "extra_bytes": max(rank["extra_bytes"] for rank in by_rank),
                    # The mean over the ranks; the formula is one.
                    "sent_bytes": [sum(phase) / count for phase in zip(*sent, strict=True)],
                    "formula_bytes": problem.expected_bytes(call, count),
                }
            )
            print(_call_line(calls[-1]), flush=True)
        if count > 1 and problem.rounds:
            shorter = Problem(problem.layer, timed_length, problem.window, problem.rounds)
            parts = _group(measure_hops, count, shorter)[0]
            timed.append({"ranks": count, "parts": parts, "phases": predictions(parts, count)})
    return {
        "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "backend": "nccl" if torch.cuda.device_count() >= max(ranks) else "gloo",
        "problem": asdict(problem),
        "timed_length": timed_length,
        "calls": calls,
        "timed": timed,
    }


@contextmanager
def _memory_given_back() -> Iterator[None]:
    """Processes that start meanwhile return what they free to the system at once.

    By itself glibc keeps freed tensors below 32 MiB for later, so that a process grows beyond what
    is in use at any time; how far depends on their sizes, which depend on the ranks.
    """
    name = "MALLOC_MMAP_THRESHOLD_"
    before = os.environ.get(name)
    os.environ[name] = str(2**17)
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _group(work: Any, ranks: int, *arguments: Any) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return run_group(work, ranks, Path(folder), *arguments)


def _times_ranks(row: dict[str, Any]) -> int:
    return row["extra_bytes"] * row["ranks"]


def _call_line(row: dict[str, Any]) -> str:
    sent, formula = (sum(row[name]) / MIB for name in ("sent_bytes", "formula_bytes"))
    return (
        f"{row['call']}, {row['ranks']} ranks: {row['extra_bytes'] / MIB:,.1f} MiB a rank, sent "
        f"{sent:,.1f} MiB, formula {formula:,.1f}"
    )


def markdown(results: dict[str, Any]) -> str:
    """The page."""
    problem, layer = results["problem"], results["problem"]["layer"]
    machine = results["machine"]
    first = {}
    calls = []
    for row in results["calls"]:
        # One process exchanges nothing, and makes no room for it.
        base = first.setdefault(row["call"], row) if row["ranks"] > 1 else None
        calls.append(
            [
                row["call"],
                f"{row['ranks']}",
                f"{row['extra_bytes'] / MIB:,.1f} MiB",
                "-" if base is None else f"{_times_ranks(row) / _times_ranks(base):.2f}",
                *(f"{sent / MIB:,.2f} MiB" for sent in row["sent_bytes"]),
                "equal" if row["sent_bytes"] == row["formula_bytes"] else "**differs**",
            ]
        )
    timed = [
        [
            f"{group['ranks']} ranks, {name}",
            *(
                f"{1e3 * phase[key]:,.1f}"
                for key in ("compute", "transfer", "overlapped", "one_by_one", "measured")
            ),
            f"{phase['measured'] / phase['overlapped']:.2f}",
        ]
        for group in results["timed"]
        for name, phase in zip(("forward", "backward"), group["phases"], strict=True)
    ]
    sequence = (
        f"{layer['heads']} heads on {layer['kv_heads']} kv heads of {layer['head_dim']}, causal, "
        "fp32"
    )
    parts = [
        "# A sequence over several processes",
        f"`{results['command']}` over {results['backend']} on {machine['device']}, one thread a "
        f"process; torch {machine['torch']}, Python {machine['python']}.",
        "## Memory and traffic",
        f"Forward and backward of {problem['length']:,} positions, {sequence}; the window is "
        f"{problem['window']:,}. Memory is the peak beyond the inputs, of the rank that needs "
        "most, each line in fresh processes; `times ranks` is its product with the ranks over that "
        "of the fewest ranks that exchange anything: 1.00 where memory falls as 1/ranks. Sent is "
        "the mean over the ranks, held against the formula in the function's docstring.",
        table(["call", "ranks", "memory a rank", "times ranks", "sent", "backward", ""], calls),
        "![Memory by number of ranks](context_memory.png)",
        "## The model against the clock",
        f"A zigzag ring of {results['timed_length']:,} positions, {sequence}. Milliseconds, "
        f"medians of {problem['rounds']} rounds, all ranks at the same time. The model "
        "(`ring_seconds` in benchmarks/scaling.py) gets the measured times of a hop's computation "
        "and of its messages, each by itself.",
        table(
            [
                "ring",
                "computing",
                "messages",
                "model: overlapped",
                "one after the other",
                "measured",
                "measured / model",
            ],
            timed,
        ),
    ]
    return "\n\n".join(parts) + "\n"
