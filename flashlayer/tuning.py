"""Opt-in: measure tile sizes on this GPU instead of taking them from the table."""

from __future__ import annotations

import functools
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from flashlayer.backends import triton as backend
from flashlayer.problem import problem_of_options
from flashlayer.spec import Problem

ROUNDS = 20
HEAD_START_CYCLES = 2_000_000  # a millisecond at 2 GHz; a backward pass is launched in a third
FAR_BEHIND = 1.25  # a candidate whose least time is so many times the best median is out
Results = tuple[Tensor, ...]


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
    means the same bucket: device, dtype, head dimensions, bounded sides of the window, the kind of
    mask and a dense one's element size, and lengths rounded up to a power of two. A decoding step
    whose keys are split has the bucket of its parts.

    Candidates are all rows of the table for this dtype, of any chip and head dimension, each with
    its number of stages and one more or less, from sm_90 on also with tensor descriptors (TMA).
    Those that do not fit the chip are skipped, and those that are far behind are not timed to the
    end. For a causal mask the fastest then runs against itself with its programs in the order of
    their work (``heaviest_first``). This compiles a hundred kernels and takes minutes.

    On Hopper, calls in half precision with a head dimension of 64 or 128 and no option but a causal
    mask have more candidates: warp-specialised kernels that were executed on an emulator and never
    timed. Each is held against the plain kernel first: outputs may differ by ``4 eps`` of the
    largest value, the LSE by ``2^-16 (1 + largest)``, gradients by ``4 eps`` of the row's
    largest element and the rounding of fp32 sums, and every round must give the same bits. Where
    one is chosen, calls of the bucket that it can't compute take tiles of the table.

    Args:
        query: ``(B, H, Sq, D)``; tensors and options as in :func:`flashlayer.flash_attention`.
        key: ``(B, Hkv, Sk, D)``.
        value: ``(B, Hkv, Sk, Dv)``.
        backward: also tune dK/dV and dQ.
        path: a JSON file of results; buckets in it are not measured again, others are added. Where
            it says ``dense``, without the size, an earlier version wrote it: that is not used.
        **options: those of :func:`flashlayer.flash_attention`; ``return_lse`` and ``backend`` make
            no difference.

    Returns:
        For each kernel (``"forward"``, ``"dkdv"``, ``"dq"``) its ``BLOCK_M``, ``BLOCK_N``,
        ``num_warps``, ``num_stages``, ``descriptors``, ``specialized``, ``takes_turns`` and
        ``heaviest_first``.

    Raises:
        ValueError: the Triton backend can't compute this call.
        TypeError: as in :func:`flashlayer.flash_attention`.

    Warns:
        RuntimeWarning: a warp-specialised kernel gave another result and is left out.

    Example:
        >>> chosen = flashlayer.tune(q, k, v, causal=True, path="tiles.json")  # doctest: +SKIP
    """
    problem = problem_of_options("tune", query, key, value, options)
    q, k, v, spec, extras = problem
    problem = Problem(q.detach(), k.detach(), v.detach(), spec, extras)
    reason = backend.refuses(problem)
    if reason is not None:
        raise ValueError(f"there is nothing to tune: backend 'triton' can't compute this: {reason}")
    from flashlayer.kernels.tiles import TileConfig

    known: dict[str, dict[str, Any]] = {}
    if path is not None and Path(path).exists():
        known = json.loads(Path(path).read_text(encoding="utf-8"))
    chosen = {}
    for kernel in ("forward", "dkdv", "dq") if backward else ("forward",):
        launched = backend.as_launched(kernel, problem)
        q, _, v, spec, extras = launched
        bucket = backend.bucket(kernel, q, v, spec, extras)
        name = " ".join(str(part) for part in bucket)
        if name not in known:
            known[name] = asdict(_fastest(kernel, bucket, launched))
        chosen[kernel] = known[name]
        backend.TUNED[bucket] = TileConfig(**known[name])
    if path is not None:
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(known[name])}" for name in known)
        Path(path).write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    return chosen


def _fastest(kernel: str, bucket: tuple, problem: Problem) -> Any:
    """The candidate with the smallest median time."""
    q, k, v, spec, extras = problem
    before = backend.TUNED.pop(bucket, None)
    run: Callable[[], Any] = functools.partial(backend.whole_forward, *problem)
    agree: Callable[..., bool] = functools.partial(_outputs_agree, v)
    expected: Any = run()
    if kernel != "forward":
        o, lse = expected
        # Not ones, whose columns a kernel might mix up.
        do = torch.empty_like(o).normal_(generator=torch.Generator(o.device).manual_seed(0))
        run = functools.partial(_gradients, do, q, k, v, o, lse, spec, extras)
        agree = functools.partial(_gradients_agree, do, q, k, v, spec.scale)
        expected = run()
    agree = functools.partial(agree, expected)
    try:
        fastest = _race(backend.candidate_tiles(kernel, problem), run, bucket, q.device, agree)
        if spec.window_right is not None:
            # The table's too: a specialised kernel that does not repeat its results leaves it.
            table = backend.table_tiles(kernel, q, v, spec, extras)
            three = dict.fromkeys([fastest, replace(fastest, heaviest_first=True), table])
            fastest = _race(list(three), run, bucket, q.device, agree)
        return fastest
    finally:
        backend.TUNED.pop(bucket, None)
        if before is not None:
            backend.TUNED[bucket] = before


def _gradients(*arguments: Any) -> Results:
    """dq, dk and dv."""
    do, *tensors = arguments
    return backend.backward(do, None, *tensors)[:3]


def _race(
    candidates: list[Any],
    run: Callable[[], Any],
    bucket: tuple,
    device: torch.device,
    agree: Callable[[Results], bool],
) -> Any:
    """The candidate with the smallest median time; they are timed in turns."""
    from triton.runtime.errors import OutOfResources, PTXASError

    times: dict[Any, list[float]] = {}
    firsts: dict[Any, Results] = {}  # of specialised candidates: every round must repeat them
    for candidate in candidates:
        backend.TUNED[bucket] = candidate
        try:
            found: Any = run()  # compiles
        except (OutOfResources, PTXASError):
            continue
        if candidate.specialized:
            if not agree(found):
                _warn(candidate, "differs from the plain kernel")
                continue
            firsts[candidate] = found
        times[candidate] = []
    for _ in range(ROUNDS):
        for candidate in list(times):
            backend.TUNED[bucket] = candidate
            seconds, found = _timed(run, device)
            times[candidate].append(seconds)
            if candidate in firsts and not _same_bits(found, firsts[candidate]):
                _warn(candidate, "does not repeat its results")
                del times[candidate]
        limit = FAR_BEHIND * min(median(each) for each in times.values())
        times = {candidate: each for candidate, each in times.items() if min(each) <= limit}
    return min(times, key=lambda candidate: median(times[candidate]))


def _outputs_agree(v: Tensor, expected: Results, found: Results) -> bool:
    """Whether ``(o, lse)`` of two forward kernels are equal but for rounding; see :func:`tune`.

    An output is a mean of values. Its weights are rounded to the dtype and so is it, each by
    ``eps / 2``: ``2 eps`` of the largest value for two kernels. The rounding of scores, which
    matters for logits in the thousands, may take as much again.
    """
    o_bound = 4 * torch.finfo(v.dtype).eps * _largest(v)
    lse_bound = 2**-16 * (1 + _largest(expected[1]))
    return _all_close(found, expected, (o_bound, lse_bound))


def _gradients_agree(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, expected: Results, found: Results
) -> bool:
    """Whether ``(dq, dk, dv)`` of two kernels are equal but for rounding.

    A row is a sum of terms of either sign, each rounded to the dtype by ``eps / 2``: the errors add
    up like a random walk, and so does the sum. Of normal tensors of 17 to 2,048 tokens a kernel's
    largest error is ``0.93 eps`` of its row's largest element, so ``1.9 eps`` for two. Where
    ``dp - delta`` cancels, as with a single visible key, a row is the rounding of fp32 sums. And in
    fp16 the smallest weights are subnormal.
    """
    limits = torch.finfo(q.dtype)
    noise = 2**-22 * scale * q.shape[3] * _largest(do) * _largest(v)
    subnormal = limits.smallest_normal * limits.eps * q.shape[2] * (q.shape[1] // k.shape[1])
    floors = (noise * _largest(k), noise * _largest(q), subnormal * _largest(do))
    bounds = [
        4 * limits.eps * _finite_sizes(x.float()).amax(-1, keepdim=True) + floor
        for x, floor in zip(expected, floors, strict=True)
    ]
    return _all_close(found, expected, bounds)


def _all_close(found: Results, expected: Results, bounds: Sequence[float | Tensor]) -> bool:
    """Whether every element is within its bound, or as little finite as expected."""
    return all(
        bool((((x.float() - y.float()).abs() <= bound) | (x == y) | (x.isnan() & y.isnan())).all())
        for x, y, bound in zip(found, expected, bounds, strict=True)
    )


def _largest(x: Tensor) -> float:
    """Of the finite elements' sizes."""
    return _finite_sizes(x).max().item()


def _finite_sizes(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x.abs(), 0)


def _same_bits(found: Results, first: Results) -> bool:
    return all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        for x, y in zip(found, first, strict=True)
    )


def _warn(candidate: Any, what: str) -> None:
    warnings.warn(
        f"the warp-specialised kernel {what} on this chip and is left out: {candidate}",
        RuntimeWarning,
        stacklevel=4,
    )


def _timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that a run takes, and its results.

    A GPU sleeps first, so that the launches queue up behind it: launching takes Python longer than
    a short kernel runs, and an idle GPU would be timed waiting for it.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):  # events are recorded on the current one
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HEAD_START_CYCLES)
            start.record()
            results = run()
            stop.record()
            stop.synchronize()
        return start.elapsed_time(stop) / 1000, results
    begin = time.perf_counter()
    results = run()
    return time.perf_counter() - begin, results
