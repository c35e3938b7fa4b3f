"""Problems that together launch every kernel, and whether their results are right."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.stages import Context, Result
from flashlayer import masks, testing
from flashlayer.masks import IntervalMask

RUNS = 3  # of each problem, bitwise equal

Problem = tuple[Tensor, Tensor, Tensor, dict[str, Any]]  # q, k, v and the options
Draw = Callable[[torch.dtype, torch.device, bool], Problem]  # the last: of toy size

TOY_LENGTH, TOY_COLUMNS = 40, 16


def _dense(heads: int, kv_heads: int, q: int, k: int, dim: int, **options: Any) -> Draw:
    """A problem; options that hold tensors are functions of its heads and lengths, and of randn."""

    def make(dtype: torch.dtype, device: torch.device, toy: bool) -> Problem:
        batch, h, hkv, rows, keys, columns = 2, heads, kv_heads, q, k, dim
        if toy:
            batch, h, hkv, columns = 1, min(2, heads // kv_heads), 1, TOY_COLUMNS
            rows, keys = (min(TOY_LENGTH, -(-length // 24)) for length in (q, k))
        torch.manual_seed(0)
        normal = partial(torch.randn, device=device, dtype=dtype)
        tensors = (
            normal(batch, h, rows, columns),
            normal(batch, hkv, keys, columns),
            normal(batch, hkv, keys, columns),
        )
        made = {n: x(h, rows, keys, normal) if callable(x) else x for n, x in options.items()}
        return *tensors, made

    return make


def _packed(dtype: torch.dtype, device: torch.device, toy: bool) -> Problem:
    torch.manual_seed(0)
    lengths = (20, 0, 5, 9) if toy else (700, 0, 129, 300)
    edges = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    q, k, v = (
        torch.randn(sum(lengths), h, TOY_COLUMNS if toy else 64, device=device, dtype=dtype)
        for h in ((2, 1, 1) if toy else (8, 2, 2))
    )
    return q, k, v, {"cu_seqlens_q": edges, "max_seqlen_q": max(lengths), "causal": True}


def _documents(heads: int, rows: int, keys: int, normal: Callable[..., Tensor]) -> IntervalMask:
    return masks.documents(torch.arange(rows) * 5 // rows).to(normal(1).device)


# Together they launch every kernel, and every option once.
PROBLEMS: dict[str, Draw] = {
    "causal D128, 4 heads a kv head": _dense(8, 2, 1000, 1000, 128, causal=True),
    "full D64, ragged ends": _dense(4, 4, 333, 517, 64),
    "packed causal D64": _packed,
    "every option D96": _dense(
        4,
        2,
        300,
        333,
        96,
        causal=True,
        window_size=(200, 0),
        softcap=20.0,
        dropout_p=0.2,
        dropout_seed=7,
        attn_mask=lambda h, q, k, normal: normal(1, h, q, k),
        sinks=lambda h, q, k, normal: normal(h),
        alibi_slopes=lambda h, q, k, normal: normal(h, dtype=torch.float32).abs(),
    ),
    "documents D128": _dense(4, 4, 1024, 1024, 128, causal=True, attn_mask=_documents),
    "one query, 8,192 keys": _dense(32, 8, 1, 8192, 128),
}


def gradients(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Random ones of the output and of lse, dense or packed."""
    rows = q.shape[:-1] if q.ndim == 4 else (q.shape[1], q.shape[0])
    do = torch.randn(*q.shape[:-1], v.shape[-1], device=q.device, dtype=q.dtype)
    return do, torch.randn(rows, device=q.device)


def check(make: Draw, dtype: torch.dtype, context: Context) -> Result:
    """Hold one problem against fp64 by the accuracy rule, and its repetitions against the first.

    Raises:
        AssertionError: a result is off by more than its bound, or differs from the first run's.
    """
    q, k, v, options = make(dtype, torch.device(context.device), context.rehearsal)
    do, dlse = gradients(q, v)
    first = testing.assert_attention_close(
        "triton", q, k, v, grad_out=do, grad_lse=dlse, with_noise=context.rehearsal, **options
    )
    runs = 2 if context.rehearsal else RUNS
    for _ in range(runs - 1):
        for name, result in testing.run("triton", q, k, v, do, dlse, **options).items():
            if not torch.equal(result, first[name]):
                raise AssertionError(f"{name} differs between two runs")
    return {"within_rule": sorted(first), "bitwise_equal_runs": runs}
