"""The gradients of short sequences in bf16, by matrix products.

ATen's kernel takes as long for the backward pass of a short sequence in bf16 as for one several
times its length: its blocks are larger than the problem, and its products of bf16 slow. Where a
whole score matrix fits a cache there is no need for an online softmax. A few heads at a time,

    P = softmax(scale Q K^T)    dV = P^T dO    dP = dO V^T
    dS = P * (dP - rowsum(P * dP) + dlse)    dQ = scale dS K    dK = scale dS^T Q

so memory stays O(S). The scores are fp32 as the kernel's are, for a score rounded to bf16 would be
an error of the probability that grows with the score; the other products are bf16 with sums in
fp32. What comes out is as close to fp64 as the kernel's gradients are, in a quarter of their time
to all of it (benchmarks/NOTES.md).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Where it was measured to be the faster way: so many queries and keys at most, and so many rows of
# all heads at least, under which starting ten operations takes longer than the kernel.
LENGTH_MAX = 192
ROWS_MIN = 1536

# Scores computed at once: 14 MB in five matrices.
SCORES_AT_ONCE = 2**20


def is_short(q: Tensor, k: Tensor) -> bool:
    """Whether :func:`short_backward` is for this problem, on this machine."""
    batch, heads, seqlen_q, _ = q.shape
    return (
        q.dtype == torch.bfloat16
        and max(seqlen_q, k.shape[2]) <= LENGTH_MAX
        and batch * heads * seqlen_q >= ROWS_MIN
        and _multiplies_bf16()
    )


@cache
def _multiplies_bf16() -> bool:
    """Whether the CPU has instructions for products of bf16; elsewhere nothing was measured."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def short_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv`` of full or top-left causal attention, every query of which sees a key.

    The query heads of a group are rows of one head, so that dK and dV sum over the group by
    themselves.
    """
    kv_heads, keys, head_dim = k.shape[0] * k.shape[1], k.shape[2], k.shape[3]
    q_rows, do_rows = (x.reshape(kv_heads, -1, head_dim) for x in (q, do))  # [B*Hkv, G*Sq, D]
    k_rows, v_rows = (x.reshape(kv_heads, -1, head_dim) for x in (k, v))  # [B*Hkv, Sk, D]
    if dlse is not None:
        dlse_rows = dlse.to(q.dtype).reshape(kv_heads, -1, 1)  # [B*Hkv, G*Sq, 1]
    dq, dk, dv = (torch.empty_like(x) for x in (q_rows, k_rows, v_rows))
    rows = q_rows.shape[1]
    hidden = q.new_zeros(1, 1, 1, dtype=torch.float32)  # what is added to the scores
    if causal:
        hidden = hidden.new_full((q.shape[2], keys), -torch.inf).triu_(1)
        hidden = hidden.repeat(rows // q.shape[2], 1)  # [G*Sq, Sk]
    at_once = max(1, min(kv_heads, SCORES_AT_ONCE // (rows * keys)))
    # One set of matrices serves all: memory that is new to the process costs as much as a product.
    wide = q.new_empty(2, at_once, rows, keys, dtype=torch.float32)
    narrow = q.new_empty(2, at_once, rows, keys)
    for start in range(0, kv_heads, at_once):
        part = slice(start, start + at_once)
        q_part, k_part, v_part, do_part = (x[part] for x in (q_rows, k_rows, v_rows, do_rows))
        (scores, p_wide), (p, dp) = wide[:, : len(q_part)], narrow[:, : len(q_part)]
        torch.baddbmm(
            hidden, q_part.float(), k_part.float().mT, beta=int(causal), alpha=scale, out=scores
        )
        p.copy_(torch.softmax(scores, dim=-1, out=p_wide))
        torch.bmm(p.mT, do_part, out=dv[part])
        torch.bmm(do_part, v_part.mT, out=dp)
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, q.dtype)
        if dlse is not None:
            ds.addcmul_(p, dlse_rows[part])
        torch.baddbmm(q_part, ds, k_part, beta=0, alpha=scale, out=dq[part])
        torch.baddbmm(k_part, ds.mT, q_part, beta=0, alpha=scale, out=dk[part])
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)
