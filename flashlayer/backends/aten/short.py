"""The gradients of short sequences in bf16, by matrix products.

ATen's backward pass takes as long for a short bf16 sequence as for one several times its length:
its blocks are larger than the problem. A score matrix that fits a cache needs no online softmax.
For a few heads at a time, so that memory stays O(S),

    P = softmax(scale Q K^T)    dV = P^T dO    dP = dO V^T
    dS = P * (dP - rowsum(P * dP) + dlse)    dQ = scale dS K    dK = scale dS^T Q

The scores are fp32 as in the kernel: rounding a score to bf16 would be an error of the probability
that grows with the score. The other products are bf16 with fp32 sums. The gradients are as close
to fp64 as the kernel's (benchmarks/NOTES.md).

With a few thousand scores a bf16 product takes longer to start than to compute; the kernel in fp32
(:func:`widens`) is faster then than ten operations and than itself in bf16.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Where products were measured to be faster (benchmarks/NOTES.md): up to how many queries and keys,
# and from how many rows of all heads on. With fewer rows the overhead of ten operations exceeds the
# kernel's time. With AMX the kernel packs its blocks, which costs a short sequence more.
LIMITS: tuple[tuple[int, int], ...] = ((192, 1536),)
LIMITS_AMX = ((160, 64), *LIMITS)

# With AMX: up to so many scores of all heads, or of a masked call so many queries and keys,
# the kernel is faster in fp32. A mask has no products.
WIDENED_SCORES_MAX = 2**16
WIDENED_MASKED_MAX = 128

# Scores computed at once: 14 MB in five matrices.
SCORES_AT_ONCE = 2**20

_SOFTMAX_BACKWARD = torch.ops.aten._softmax_backward_data.out


def is_short(q: Tensor, k: Tensor) -> bool:
    """Whether :func:`short_backward` is faster for a call without a mask on this machine."""
    if q.dtype != torch.bfloat16:
        return False
    batch, heads, seqlen_q, _ = q.shape
    length, rows = max(seqlen_q, k.shape[2]), batch * heads * seqlen_q
    return any(length <= length_max and rows >= rows_min for length_max, rows_min in _limits())


def widens(q: Tensor, k: Tensor, has_mask: bool) -> bool:
    """Whether the kernel's backward pass is faster in fp32 for this bf16 call on this machine."""
    if q.dtype != torch.bfloat16 or not _has_amx():
        return False
    batch, heads, seqlen_q, _ = q.shape
    if has_mask and max(seqlen_q, k.shape[2]) <= WIDENED_MASKED_MAX:
        return True
    return batch * heads * seqlen_q * k.shape[2] <= WIDENED_SCORES_MAX


@cache
def _has_amx() -> bool:
    """Whether ATen computes bf16 products by AMX units."""
    has_units = torch.cpu.get_capabilities().get("amx_bf16", False)
    return has_units and torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")


@cache
def _limits() -> tuple[tuple[int, int], ...]:
    """Those of this CPU; none where bf16 products have no instructions: not measured."""
    if _has_amx():
        return LIMITS_AMX
    return LIMITS if torch.cpu.get_capabilities().get("avx512_bf16", False) else ()


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
    scores, p_wide = mask.new_empty(2, at_once, rows, keys).unbind(0)
    p, dp, ds = q.new_empty(3, at_once, rows, keys).unbind(0)
    for start in range(0, kv_heads, at_once):
        stop = min(start + at_once, kv_heads)
        if stop - start < at_once:
            scores, p_wide, p, dp, ds = (x[: stop - start] for x in (scores, p_wide, p, dp, ds))
        q_h, k_h, v_h, do_h, dq_h, dk_h, dv_h = (
            x[start:stop] for x in (q_rows, k_rows, v_rows, do_rows, dq, dk, dv)
        )
        k_wide = k_h.float().mT
        torch.baddbmm(mask, q_h.float(), k_wide, beta=int(causal), alpha=scale, out=scores)
        p.copy_(torch.softmax(scores, dim=-1, out=p_wide))
        torch.bmm(p.mT, do_h, out=dv_h)
        torch.bmm(do_h, v_h.mT, out=dp)
        _SOFTMAX_BACKWARD(dp, p, -1, q.dtype, grad_input=ds)
        if dlse is not None:
            ds.addcmul_(p, dlse_rows[start:stop])
        torch.baddbmm(q_h, ds, k_h, beta=0, alpha=scale, out=dq_h)
        torch.baddbmm(k_h, ds.mT, q_h, beta=0, alpha=scale, out=dk_h)
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)
