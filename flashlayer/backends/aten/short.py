"""The gradients of short sequences in bf16, by matrix products.

ATen's backward pass takes as long for a short bf16 sequence as for one several times its length:
its blocks are larger than the problem. A score matrix that fits a cache needs no online softmax.
For a few heads at a time, so that memory stays O(S),

    P = softmax(scale Q K^T)    dV = P^T dO    dP = dO V^T
    dS = P * (dP - rowsum(P * dP) + dlse)    dQ = scale dS K    dK = scale dS^T Q

The scores are fp32 as in the kernel: rounding a score to bf16 would be an error of the probability
that grows with the score. The other products are bf16 with fp32 sums. The gradients are as close to
fp64 as the kernel's, in a quarter of its time to all of it (benchmarks/NOTES.md).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Where this was measured to be faster: at most so many queries and keys, and at least so many rows
# of all heads. With fewer rows the overhead of ten operations exceeds the kernel's time.
LENGTH_MAX = 192
ROWS_MIN = 1536

# Scores computed at once: 14 MB in five matrices.
SCORES_AT_ONCE = 2**20


def is_short(q: Tensor, k: Tensor) -> bool:
    """Whether :func:`short_backward` is faster for this call on this machine."""
    batch, heads, seqlen_q, _ = q.shape
    return (
        q.dtype == torch.bfloat16
        and max(seqlen_q, k.shape[2]) <= LENGTH_MAX
        and batch * heads * seqlen_q >= ROWS_MIN
        and _multiplies_bf16()
    )


@cache
def _multiplies_bf16() -> bool:
    """Whether the CPU has bf16 product instructions; others were not measured."""
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
    """``dq, dk, dv`` of full or top-left causal attention where every query has a visible key.

    The query heads of a group are rows of one head, so that dK and dV sum over the group.
    """
    kv_heads, keys, head_dim = k.shape[0] * k.shape[1], k.shape[2], k.shape[3]
    # [B*Hkv, G*Sq, D] of q and do, [B*Hkv, Sk, D] of k and v
    q_rows, do_rows, k_rows, v_rows = (x.reshape(kv_heads, -1, head_dim) for x in (q, do, k, v))
    dq, dk, dv = (torch.empty_like(x) for x in (q_rows, k_rows, v_rows))
    if dlse is not None:
        dlse_rows = dlse.to(q.dtype).reshape(kv_heads, -1, 1)  # [B*Hkv, G*Sq, 1]
    rows = q_rows.shape[1]
    mask = q.new_zeros(1, 1, 1, dtype=torch.float32)  # added to the scores if causal
    if causal:
        mask = mask.new_full((q.shape[2], keys), -torch.inf).triu_(1)
        mask = mask.repeat(rows // q.shape[2], 1)  # [G*Sq, Sk]
    at_once = max(1, min(kv_heads, SCORES_AT_ONCE // (rows * keys)))
    # Reuse the matrices: writing to memory new to the process takes as long as a product.
    wide = q.new_empty(2, at_once, rows, keys, dtype=torch.float32)
    narrow = q.new_empty(2, at_once, rows, keys)
    for start in range(0, kv_heads, at_once):
        heads = slice(start, start + at_once)
        q_h, k_h, v_h, do_h = (x[heads] for x in (q_rows, k_rows, v_rows, do_rows))
        (scores, p_wide), (p, dp) = wide[:, : len(q_h)], narrow[:, : len(q_h)]
        k_wide = k_h.float().mT
        torch.baddbmm(mask, q_h.float(), k_wide, beta=int(causal), alpha=scale, out=scores)
        p.copy_(torch.softmax(scores, dim=-1, out=p_wide))
        torch.bmm(p.mT, do_h, out=dv[heads])
        torch.bmm(do_h, v_h.mT, out=dp)
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, q.dtype)
        if dlse is not None:
            ds.addcmul_(p, dlse_rows[heads])
        torch.baddbmm(q_h, ds, k_h, beta=0, alpha=scale, out=dq[heads])
        torch.baddbmm(k_h, ds.mT, q_h, beta=0, alpha=scale, out=dk[heads])
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)
