"""Opt-in: measure tile sizes on this GPU instead of taking them from the table."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from flashlayer.backends import triton as backend
from flashlayer.problem import build_problem
from flashlayer.spec import Problem

ROUNDS = 20


def tune(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    backward: bool = True,
    path: str | Path | None = None,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Find the fastest tiles for calls like this one; this process uses them from then on.

    Without it tiles come from a table, and a call always runs the same kernels. "Like this one"
    means the same bucket: device, dtype, head dimensions, bounded sides of the window, and lengths
    rounded up to a power of two.

    Candidates are all rows of the table for this dtype, of any chip and head dimension, each with
    its number of stages and one more or less, from sm_90 on also with tensor descriptors (TMA).
    Those that do not fit the chip are skipped. This compiles a hundred kernels and takes minutes.

    Args:
        query: ``(B, H, Sq, D)``; tensors and options as in :func:`flashlayer.flash_attention`.
        key: ``(B, Hkv, Sk, D)``.
        value: ``(B, Hkv, Sk, Dv)``.
        backward: also tune dK/dV and dQ.
        path: a JSON file of results; buckets in it are not measured again, others are added.
        **options: those of :func:`flashlayer.flash_attention`.

    Returns:
        For each kernel (``"forward"``, ``"dkdv"``, ``"dq"``) its ``BLOCK_M``, ``BLOCK_N``,
        ``num_warps``, ``num_stages`` and ``descriptors``.

    Raises:
        ValueError: the Triton backend can't compute this call.
        TypeError: as in :func:`flashlayer.flash_attention`.

    Example:
        >>> chosen = flashlayer.tune(q, k, v, causal=True, path="tiles.json")  # doctest: +SKIP
    """
    problem = build_problem(query.detach(), key.detach(), value.detach(), **options)
    reason = backend.refuses(problem)
    if reason is not None:
        raise ValueError(f"there is nothing to tune: backend 'triton' can't compute this: {reason}")
    from flashlayer.kernels.tiles import TileConfig

    known: dict[str, dict[str, Any]] = {}
    if path is not None and Path(path).exists():
        known = json.loads(Path(path).read_text(encoding="utf-8"))
    chosen = {}
    q, _, v, spec, extras = problem
    for kernel in ("forward", "dkdv", "dq") if backward else ("forward",):
        bucket = backend.bucket(kernel, q, v, spec, extras)
        name = " ".join(str(part) for part in bucket)
        if name not in known:
            known[name] = asdict(_fastest(kernel, bucket, problem))
        chosen[kernel] = known[name]
        backend.TUNED[bucket] = TileConfig(**known[name])
    if path is not None:
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(known[name])}" for name in known)
        Path(path).write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    return chosen


def _fastest(kernel: str, bucket: tuple, problem: Problem) -> Any:
    """The candidate with the smallest median time; they are timed in turns."""
    from triton.runtime.errors import OutOfResources, PTXASError

    q, k, v, spec, extras = problem
    run: Callable[[], Any] = functools.partial(backend.forward, *problem)
    if kernel != "forward":
        o, lse = run()
        tensors = (torch.ones_like(o), None, q, k, v, o, lse)
        run = functools.partial(backend.backward, *tensors, spec, extras)
    before = backend.TUNED.get(bucket)
    times: dict[Any, list[float]] = {}
    try:
        for candidate in backend.candidate_tiles(kernel, problem.query):
            backend.TUNED[bucket] = candidate
            try:
                run()  # compiles
            except (OutOfResources, PTXASError):
                continue
            times[candidate] = []
        for _ in range(ROUNDS):
            for candidate, durations in times.items():
                backend.TUNED[bucket] = candidate
                durations.append(_seconds(run, problem.query.device))
    finally:
        backend.TUNED.pop(bucket, None)
        if before is not None:
            backend.TUNED[bucket] = before
    return min(times, key=lambda candidate: median(times[candidate]))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1000
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
