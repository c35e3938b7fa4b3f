"""All gradients of a call whose float mask has one, by matrix products.

ATen's backward pass returns no gradient of the mask, which is dS. Computing dS besides would
recompute the scores and dP, so all five products are computed here, for a block of queries and all
their keys at a time:

    P = exp(scale Q K^T + mask - lse)    dV = P^T dO    dP = dO V^T
    dS = P * (dP - rowsum(O * dO) + dlse)    dQ = scale dS K    dK = scale dS^T Q
    d_mask = dS, summed over the dimensions in which the mask is broadcast

Everything is fp32, or fp64. That takes 0.5 to 0.8 of the time of tiles that are square, and as long
as ATen's backward pass and dS one after the other (benchmarks/NOTES.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashlayer.backends.aten.mask import BLOCK_MIN, added, blocks
from flashlayer.spec import AttentionExtras, AttentionSpec, accumulation_dtype

# Scores computed at once, 4 MB in each of two matrices in fp32, and the most queries of a block.
SCORES_AT_ONCE = 2**20
BLOCK_MAX = 256


def masked_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    extras: AttentionExtras,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``dq, dk, dv, d_mask``."""
    mask, dtype = extras.attn_mask, accumulation_dtype(q.dtype)
    assert mask is not None
    kv_heads, seqlen_k = k.shape[1], k.shape[2]
    group = q.shape[1] // kv_heads
    dq = torch.zeros_like(q)
    dk, dv, d_mask = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (k, v, mask))
    if q.numel() == 0 or k.numel() == 0:
        return dq, dk.to(k.dtype), dv.to(v.dtype), d_mask.to(mask.dtype)
    # lse = -inf is a row without keys: exp(-inf - -inf) is NaN, exp(-inf - inf) is 0.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    rows = max(BLOCK_MIN, min(BLOCK_MAX, SCORES_AT_ONCE // (group * max(1, seqlen_k))))
    heads_at_once = max(1, SCORES_AT_ONCE // (group * min(rows, q.shape[2]) * seqlen_k))
    for block in blocks(q, k, spec, extras, rows, 1):
        own = added(block, spec, extras, q.dtype)
        for first in range(0, kv_heads, heads_at_once):
            kv = slice(first, min(first + heads_at_once, kv_heads))
            heads = slice(kv.start * group, kv.stop * group)
            q_at, kv_at = (0, heads, block.q_rows), (0, kv, block.k_rows)
            entry = block.batch
            q_rows, do_rows, o_rows, lse_rows = (
                x[entry][q_at].to(dtype) for x in (q, do, o, lse)
            )  # [n*G, M, D], lse [n*G, M]
            delta = (do_rows * o_rows).sum(dim=-1)  # [n*G, M]
            if dlse is not None:
                delta -= dlse[entry][q_at]
            k_rows, v_rows = (x[entry][kv_at].to(dtype) for x in (k, v))  # [n, N, D]
            folded = [x.reshape(len(k_rows), -1, x.shape[-1]) for x in (q_rows, do_rows)]
            q_folded, do_folded = folded  # [n, G*M, D]
            p = q_folded @ k_rows.mT  # [n, G*M, N]
            by_head = p.view(len(q_rows), q_rows.shape[1], -1)  # [n*G, M, N]
            mask_rows = own[0] if own.shape[1] == 1 else own[0, heads]
            torch.add(mask_rows, by_head, alpha=spec.scale, out=by_head)
            by_head.sub_(lse_rows.unsqueeze(-1)).exp_()
            dv[entry][kv_at] += p.mT @ do_folded
            ds = do_folded @ v_rows.mT  # [n, G*M, N]
            ds_by_head = ds.view_as(by_head)
            ds_by_head.sub_(delta.unsqueeze(-1)).mul_(by_head)
            d_mask_rows = block.of(d_mask)[0]
            if d_mask_rows.shape[0] > 1:
                d_mask_rows = d_mask_rows[heads]
            d_mask_rows += ds_by_head.sum_to_size(d_mask_rows.shape)
            dq[entry][q_at] = (ds @ k_rows).mul_(spec.scale).view_as(q_rows)
            dk[entry][kv_at] += (ds.mT @ q_folded).mul_(spec.scale)
    return dq, dk.to(k.dtype), dv.to(v.dtype), d_mask.to(mask.dtype)
