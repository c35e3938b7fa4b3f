"""Time, memory and error of every peer at one case, all of them in one process and in turns."""

from __future__ import annotations

import math
import statistics
import subprocess
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import DTYPES, Case, Inputs, draw
from benchmarks.peers import OF_FLASHLAYER, OURS, Refused, Runner
from flashlayer import flash_attention
from flashlayer.testing import FACTORS, GRADIENT_FACTOR, compare, recomputation_noise
from train.measure import PeakMemory, Stopwatch, Yardstick, in_fresh_process, synchronize

# One sample is as many calls as take this long, so that the clock's resolution is no matter. On a
# GPU launches are made ahead of long kernels; a call shorter than its launches takes as long as
# they do, for every peer, as it does for a user.
SAMPLE_SECONDS = {"cpu": 0.02, "cuda": 0.01}
CALLS_MAX = 100

# A peer that takes long is measured in fewer rounds, but in two.
PEER_SECONDS = 5.0
ROUNDS_MIN = 2

WARM_UP_LENGTH = 16  # loads kernels and starts threads, and leaves next to no memory behind

# In a problem as small as this the formula's own error may happen to be next to nothing: the bound
# gets what rounding makes at the least, as in the property tests.
NOISY_LENGTH = 128

# Positions whose results are held against fp64 where a window makes them a problem of their own.
CHECKED_LENGTH = 2048


def sample(runner: Runner, backward: bool, calls: int, device: torch.device) -> dict[str, float]:
    """Seconds of one forward, one backward and both, as medians over ``calls`` in a row."""
    watch = Stopwatch(device)
    moments = []
    for _ in range(calls):
        start = watch.now()
        out = runner.forward()
        middle = watch.now()
        if backward:
            runner.backward(out)
        moments.append((start, middle, watch.now()))
        del out  # before the next one needs its place
    synchronize(device)
    taken = {"forward": [watch.seconds(start, middle) for start, middle, _ in moments]}
    if backward:
        taken["backward"] = [watch.seconds(middle, stop) for _, middle, stop in moments]
        taken["both"] = [watch.seconds(start, stop) for start, _, stop in moments]
    return {phase: statistics.median(seconds) for phase, seconds in taken.items()}


def measure(
    case: Case, names: list[str], rounds: int, memory_limit: int, device: torch.device
) -> dict[str, Any]:
    """One cell of the results.

    In every round each peer takes its turn, in changing order; a ratio is the median over the
    rounds of the peer's time in a round over ours in the same round, so that what slows the machine
    down for a while slows both.
    """
    inputs = draw(case, device)
    judge = Judge(case, inputs)
    results: dict[str, dict[str, Any]] = {}
    runners: dict[str, Runner] = {}
    for name in names:
        try:
            runners[name], results[name] = _try(name, case, inputs, memory_limit, judge, device)
        except Refused as refused:
            results[name] = {"refused": str(refused)}
    calls, turns = {}, {}
    for name, runner in runners.items():
        seconds = sample(runner, case.backward, 1, device)
        once = seconds.get("both", seconds["forward"])
        calls[name] = max(1, min(CALLS_MAX, round(SAMPLE_SECONDS[device.type] / once)))
        turns[name] = max(ROUNDS_MIN, min(rounds, int(PEER_SECONDS / once)))
    turns[OURS] = max(turns.values())
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in runners}
    yardstick = Yardstick(device, DTYPES[case.dtype])
    for index in range(turns[OURS]):
        yardstick.sample()
        order = list(runners) if index % 2 == 0 else list(reversed(runners))
        for name in order:
            if index < turns[name]:
                samples[name].append(sample(runners[name], case.backward, calls[name], device))
    for name, taken in samples.items():
        for phase in taken[0]:
            results[name][phase] = statistics.median(seconds[phase] for seconds in taken)
        results[name]["ratio"] = {
            phase: statistics.median(
                theirs[phase] / ours[phase]
                for theirs, ours in zip(taken, samples[OURS], strict=False)  # the rounds of both
            )
            for phase in taken[0]
        }
    return {
        "case": case,
        "rounds": turns,
        "calls": calls,
        "matmul_flops": yardstick.typical(),
        "peers": results,
    }


def _try(
    name: str,
    case: Case,
    inputs: Inputs,
    memory_limit: int,
    judge: Judge,
    device: torch.device,
) -> tuple[Runner, dict[str, Any]]:
    """Prepare a peer and run it once: does it work, how far off is it, what memory does it take?"""
    try:
        runner = peers.prepare(name, case, inputs, memory_limit)
        tensors = _run(runner, case.backward)
        error = judge.error(name, *tensors)
        del tensors
        result: dict[str, Any] = {"error_over_bound": error}
        if device.type == "cuda":
            memory = PeakMemory(device)
            _run(runner, case.backward)
            result["extra_bytes"] = memory.extra()
    except (RuntimeError, ValueError) as error:  # a kernel that isn't there, refuses or has no room
        if name == OURS:
            raise
        raise Refused(str(error).strip().splitlines()[0]) from error
    return runner, result


def _run(runner: Runner, backward: bool) -> tuple[Tensor, ...]:
    out = runner.forward()
    return (out.detach(), *runner.backward(out)) if backward else (out,)


class Judge:
    """Standard attention in fp64 and in the case's dtype, on the first heads of one batch entry.

    Heads and batch entries have nothing to do with each other, so what holds for some of them holds
    there for the whole; and one kv head with its queries is small enough for fp64. Of entries of
    unlike lengths it is the second, which is padded.
    """

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.case = case
        self.mask = inputs.mask
        self.group = case.heads // (case.kv_heads or case.heads)
        self.entry = 0 if case.lengths is None else 1
        q_rows, k_rows = case.seqlen, case.keys
        if case.lengths is not None:
            k_rows = case.lengths[self.entry]
            q_rows = k_rows if case.packed else q_rows
        self.rows = (q_rows, q_rows, k_rows, k_rows)  # of o, dq, dk and dv that are compared
        if case.window is not None:
            # Only the next `window` queries see a key, so a beginning stands for itself.
            q_rows = k_rows = min(q_rows, CHECKED_LENGTH + case.window)
            self.rows = (min(q_rows, CHECKED_LENGTH),) * 4
        entry = slice(self.entry, self.entry + 1)
        tensors = (
            inputs.q[entry, : self.group, :q_rows],
            inputs.k[entry, :1, :k_rows],
            inputs.v[entry, :1, :k_rows],
            inputs.do[entry, : self.group, :q_rows],
        )
        self.same_dtype = self._standard(*tensors)
        self.reference = self._standard(*(x.double() for x in tensors))
        self.noise: dict[str, float] = {}
        if k_rows <= NOISY_LENGTH:
            q, k, v, do = (x.double() for x in tensors)
            dlse = torch.zeros(q.shape[:3], dtype=q.dtype, device=q.device)
            self.noise = recomputation_noise(q, k, v, do, dlse, **self._options())

    def _standard(self, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[Tensor, ...]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return flash_attention(q, k, v, backend="standard", **self._options())

        leaves = tuple(x.detach().requires_grad_(self.case.backward) for x in (q, k, v))
        return _run(Runner(attend, leaves, do), self.case.backward)

    def _options(self) -> dict[str, Any]:
        options = {"causal": self.case.causal, "window_size": (self.case.window, None)}
        return options if self.mask is None else options | {"attn_mask": self.mask}

    def error(self, name: str, *tensors: Tensor) -> float:
        """The largest error of o, dq, dk, dv over what the rule allows; right up to 1."""
        shares = []
        for index, tensor in enumerate(tensors):
            rows = self.rows[index]
            heads = self.group if index < 2 else 1
            start, entry = 0, self.entry
            if name in OF_FLASHLAYER and self.case.packed:
                start, entry = sum((self.case.lengths or ())[:entry]), 0
                tensor = tensor.transpose(0, 1).unsqueeze(0)
            actual = tensor[entry, :heads, start : start + rows]
            reference = self.reference[index][0, :, :rows]
            same_dtype = self.same_dtype[index][0, :, :rows]
            factor = FACTORS["out"] if index == 0 else GRADIENT_FACTOR
            noise = self.noise.get(("out", "dq", "dk", "dv")[index], 0.0)
            noise *= torch.finfo(DTYPES[self.case.dtype]).eps
            shares.append(compare(actual, same_dtype, reference, factor, noise).ratio)
        return max(shares)


def memory_by_length(
    case: Case, lengths: dict[str, list[int]], device: torch.device
) -> list[dict[str, Any]]:
    """Bytes beyond the inputs of one forward and backward, by peer."""
    rows = []
    for peer, its_lengths in lengths.items():
        for length in its_lengths:
            arguments = (peer, replace(case, seqlen=length), device)
            # CUDA counts what tensors hold; on the CPU memory that is freed isn't seen to be.
            on_cuda = device.type == "cuda"
            extra = (
                extra_bytes(*arguments) if on_cuda else in_fresh_process(extra_bytes, *arguments)
            )
            rows.append({"peer": peer, "length": length, "extra_bytes": extra})
    return rows


def extra_bytes(peer: str, case: Case, device: torch.device) -> int:
    """The same of one peer at one length, after a warm-up that holds next to nothing."""
    for seqlen in (WARM_UP_LENGTH, case.seqlen):
        sized = replace(case, seqlen=seqlen)
        runner = peers.prepare(peer, sized, draw(sized, device), memory_limit=2**62)
        memory = PeakMemory(device)
        _run(runner, case.backward)
        synchronize(device)
        extra = memory.extra()
    return extra


def fit_line(lengths: list[int], values: list[int]) -> dict[str, float]:
    """``value = base + slope * length`` by least squares, and the exponent of the growth."""
    slope, base = statistics.linear_regression(lengths, values)
    exponent, _ = statistics.linear_regression([*map(math.log, lengths)], [*map(math.log, values)])
    residuals = (
        abs((base + slope * length) / value - 1)
        for length, value in zip(lengths, values, strict=True)
    )
    return {
        "bytes_per_token": slope,
        "base_bytes": base,
        "worst_residual": max(residuals),
        "exponent": exponent,
    }


def clocks() -> dict[str, str]:
    """Driver, clocks and power limit of the GPU, as its own tool tells them."""
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[
        0
    ]
    return dict(zip(fields, (value.strip() for value in line.split(",")), strict=True))
