"""The calls of the kernel itself, with at least one query and one key."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashlayer.backends.aten.short import is_short, short_backward

# Python's own binding of the operator takes 2 us less than the one in torch.ops.
_FLASH: Any = vars(torch)["_scaled_dot_product_flash_attention_for_cpu"]

# With so few queries in a group of heads the kernel's time is that of reading keys and values, and
# it reads them once for every head; the group as the rows of one head reads them once. In fp32 that
# pays for its reshaping from so many numbers in the keys on; a bf16 product of few rows is slow at
# any length (benchmarks/NOTES.md).
FOLDED_ROWS_MAX = 64
FOLDED_FP32_MIN = 2**18

# From so many keys on (fp32 numbers in an AVX-512 register) the maximum of a row of NaN is NaN.
VECTOR_KEYS = 16

# Numbers of keys gathered at once to compute scores anew: 4 MB.
SCORES_AT_ONCE = 2**20

_HALF = (torch.float16, torch.bfloat16)


def flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    band: Tensor | None = None,
    shares_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    """The kernel, with at least one query and one key.

    ``shares_rows`` says that the queries see other keys as well, in another part, so that ``lse``
    has to be right for a merge also in rows of no weight.
    """
    if causal:
        k, v = _seen(k, q), _seen(v, q)
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads != kv_heads and not causal and band is None and folds(q, k):
        rows = q.reshape(*k.shape[:2], -1, q.shape[3])
        o, lse = flash_forward(rows, k, v, scale, causal, band, shares_rows)
        # Of one kv head a reshape is a view, which forward mode takes for no output.
        reshape = torch.reshape if kv_heads > 1 else torch.ops.aten._unsafe_view.default
        return reshape(o, q.shape), reshape(lse, q.shape[:3])
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    mask = None if band is None else band.to(q.dtype)
    try:
        o, lse = _FLASH(q, k, v, is_causal=causal, attn_mask=mask, scale=scale)
    except RuntimeError:
        if q.dtype not in _HALF or not _lacks_packing(q.dtype):
            raise
        o, lse = _FLASH(
            q.float(),
            k.float(),
            v.float(),
            is_causal=causal,
            attn_mask=None if band is None else band.float(),
            scale=scale,
        )
        o = o.to(q.dtype)
    if q.dtype in _HALF and not lse.max().item() < math.inf:
        # Its exp for half precision turns the NaN of inf - inf into 0.
        o.masked_fill_((lse == torch.inf).unsqueeze(-1), torch.nan)
        lse.masked_fill_(lse == torch.inf, torch.nan)
    few_keys = k.shape[2] < VECTOR_KEYS
    if (few_keys or shares_rows) and lse.count_nonzero().item() < lse.numel():
        _mend_rows_of_lse_0(q, k, o, lse, scale, causal, band)
    return o, lse


@cache
def _lacks_packing(dtype: torch.dtype) -> bool:
    """Whether packing raises "pack_vnni2 is only supported when avx512 is supported".

    The kernel asks the CPU whether it has AMX units for ``dtype``, but the packing is compiled for
    AVX-512 only: ATEN_CPU_CAPABILITY may say less than the CPU has (torch 2.13).
    """
    units = "amx_bf16" if dtype == torch.bfloat16 else "amx_fp16"
    has_units = torch.cpu.get_capabilities().get(units, False)
    return has_units and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


def _mend_rows_of_lse_0(
    q: Tensor,
    k: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    band: Tensor | None,
) -> None:
    """Set ``o`` and ``lse`` of rows that the kernel took to see no key although they do.

    It gives o = 0 and lse = 0 to a row whose running maximum stays -inf. That is a row whose scores
    are all -inf, as a product that overflows is: its lse is -inf, or a merge would weigh it like a
    key of score 0. And it is a row whose scores are all NaN, of fewer keys than a vector register
    holds, for the kernel's scalar maximum ignores NaN: its results are NaN. Any other row of lse 0
    is right, so the rows' scores are computed anew.
    """
    group_size, keys = q.shape[1] // k.shape[1], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)  # the kernel sums in fp32 at the least
    key = torch.arange(keys, device=q.device)
    at_once = max(1, SCORES_AT_ONCE // k[0, 0].numel())
    for rows in (lse == 0).nonzero().split(at_once):  # [n, 3]
        batch, head, row = rows.unbind(1)
        row_keys = k[batch, head // group_size].to(wide)  # [n, Sk, D]
        scores = (row_keys @ q[batch, head, row].to(wide).unsqueeze(-1)).squeeze(-1) * scale
        if causal:
            scores = scores.masked_fill(key > row.unsqueeze(-1), -torch.inf)
        if band is not None:
            scores = scores.masked_fill(band[row] == -torch.inf, -torch.inf)
        largest = scores.amax(dim=-1)  # [n], NaN if one of them is
        right = lse[batch, head, row].masked_fill(largest == -torch.inf, -torch.inf)
        lse[batch, head, row] = right.masked_fill(largest.isnan(), torch.nan)
        o[batch, head, row] = o[batch, head, row].masked_fill(
            largest.isnan().unsqueeze(-1), torch.nan
        )


def folds(q: Tensor, k: Tensor) -> bool:
    """Whether a group of heads is better computed as the rows of one."""
    few_rows = q.shape[1] // k.shape[1] * q.shape[2] <= FOLDED_ROWS_MAX
    return few_rows and (q.dtype == torch.bfloat16 or k.numel() >= FOLDED_FP32_MIN)


def flash_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    band: Tensor | None = None,
    shares_rows: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's backward, with at least one query and one key.

    Short sequences in bf16 take :mod:`flashlayer.backends.aten.short` instead, unless the queries
    see other keys as well (``shares_rows``).
    """
    if dlse is not None and do.dtype == torch.float16:  # which dlse may not fit in
        q, k, v, o = (x.float() for x in (q, k, v, o))
        grads = flash_backward(do.float(), dlse, q, k, v, o, lse, scale, causal, band)
        return grads[0].half(), grads[1].half(), grads[2].half()
    seqlen_k = k.shape[2]
    if causal:
        k, v = _seen(k, q), _seen(v, q)
    if (shares_rows or k.shape[2] < VECTOR_KEYS) and not lse.min().item() > -math.inf:
        # A row whose scores are all -inf: exp(-inf - -inf) is NaN, exp(-inf - inf) is 0.
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    if not shares_rows and is_short(q, k):
        dq, dk, dv = short_backward(do, dlse, q, k, v, scale, causal)
    else:
        dq, dk, dv = _kernel_backward(do, dlse, q, k, v, o, lse, scale, causal, band)
    unseen = seqlen_k - k.shape[2]
    if unseen:
        dk, dv = F.pad(dk, (0, 0, 0, unseen)), F.pad(dv, (0, 0, 0, unseen))
    return dq, dk, dv


def _kernel_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    band: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    head_dim = q.shape[3]
    if dlse is not None:
        # The kernel computes dS = P * (dO V^T - rowsum(O * dO)) and knows no dlse, which adds P *
        # dlse. One more column does it: with 1 in every value and dlse in dO it adds dlse to dO
        # V^T; with 0 in O, nothing to the rowsum. The column is 0 in q and k, and its gradients are
        # dropped.
        q, k, o = F.pad(q, (0, 1)), F.pad(k, (0, 1)), F.pad(o, (0, 1))
        v = F.pad(v, (0, 1), value=1.0)
        do = torch.cat((do, dlse.unsqueeze(-1).to(do.dtype)), dim=-1)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _unit_stride(do),
        _unit_stride(q),
        _unit_stride(k),
        _unit_stride(v),
        _unit_stride(o),
        lse,
        0.0,
        causal,
        attn_mask=band if band is None else band.to(q.dtype),
        scale=scale,
    )
    if dlse is not None:  # a copy without the column, in the kernel's own layout (B, S, H, D)
        dq, dk, dv = (
            x[..., :head_dim].transpose(1, 2).contiguous().transpose(1, 2) for x in (dq, dk, dv)
        )
    return dq, dk, dv


def _seen(x: Tensor, q: Tensor) -> Tensor:
    """The keys or values that some query of a causal problem sees.

    The kernel multiplies the others by a probability of 0, and 0 * NaN is NaN.
    """
    return x if x.shape[2] <= q.shape[2] else x[:, :, : q.shape[2]]


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
