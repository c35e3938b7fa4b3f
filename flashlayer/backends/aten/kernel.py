"""Calls of the kernel for one piece with at least one query and one key."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashlayer.backends.aten.pieces import Piece
from flashlayer.backends.aten.short import is_short, short_backward, widens

# This binding of the operator is 2 us faster than the one in torch.ops.
_FLASH: Any = vars(torch)["_scaled_dot_product_flash_attention_for_cpu"]
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# The kernel reads keys and values once for each query head, which is most of its time if there are
# few rows. With the heads of a group folded into the rows of one head it reads them once a group.
# Folding reshapes, so in fp32 it pays only from this many numbers in the keys on; a bf16 product of
# few rows is slow at any length (benchmarks/NOTES.md).
FOLDED_ROWS_MAX = 64
FOLDED_FP32_MIN = 2**18

# With fewer keys than fp32 numbers in an AVX-512 register, the kernel's row maximum ignores NaN.
VECTOR_KEYS = 16

# Numbers of keys gathered at once to recompute scores: 4 MB.
GATHERED_AT_ONCE = 2**20

_HALF = (torch.float16, torch.bfloat16)


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, piece: Piece
) -> tuple[Tensor, Tensor]:
    """``o`` and ``lse`` of a piece; the tensors are arranged as the piece says."""
    causal, mask = piece.causal, piece.mask
    _, heads, seqlen_q, _ = q.shape
    _, kv_heads, seqlen_k, _ = k.shape
    if causal and seqlen_k > seqlen_q:
        # The kernel multiplies hidden keys by a probability of 0, and 0 * NaN is NaN.
        k, v, mask = _first_keys(seqlen_q, k, v, mask)
        piece, seqlen_k = piece._replace(mask=mask), seqlen_q
    if heads != kv_heads and not causal and _is_of_keys(mask) and folds(q, k):
        rows = q.reshape(*k.shape[:2], -1, q.shape[3])
        o, lse = flash_forward(rows, k, v, scale, piece)
        # With one kv head reshape returns a view, which forward-mode AD rejects as an output.
        reshape = torch.reshape if kv_heads > 1 else torch.ops.aten._unsafe_view.default
        return reshape(o, q.shape), reshape(lse, q.shape[:3])
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    try:
        o, lse = _FLASH(q, k, v, is_causal=causal, attn_mask=mask, scale=scale)
    except RuntimeError:
        if q.dtype not in _HALF or not _lacks_packing(q.dtype):
            raise
        wide = (x.float() for x in (q, k, v))
        wide_mask = None if mask is None else mask.float()
        o, lse = _FLASH(*wide, is_causal=causal, attn_mask=wide_mask, scale=scale)
        o = o.to(q.dtype)
    if q.dtype in _HALF and not math.isfinite(lse.sum().item()):
        # The kernel's exp for half precision turns the NaN of inf - inf into 0.
        o.masked_fill_((lse == torch.inf).unsqueeze(-1), torch.nan)
        lse.masked_fill_(lse == torch.inf, torch.nan)
    may_be_wrong = piece.shares_rows or mask is not None or seqlen_k < VECTOR_KEYS
    if may_be_wrong and lse.count_nonzero().item() < lse.numel():
        _correct_rows_of_lse_0(q, k, o, lse, scale, piece)
    return o, lse


@cache
def _lacks_packing(dtype: torch.dtype) -> bool:
    """Whether the kernel raises "pack_vnni2 is only supported when avx512 is supported".

    It checks the CPU for AMX units for ``dtype``, but its packing is compiled for AVX-512 only, and
    ATEN_CPU_CAPABILITY may be set below what the CPU has (torch 2.13).
    """
    units = "amx_bf16" if dtype == torch.bfloat16 else "amx_fp16"
    has_units = torch.cpu.get_capabilities().get(units, False)
    return has_units and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


def _correct_rows_of_lse_0(
    q: Tensor, k: Tensor, o: Tensor, lse: Tensor, scale: float, piece: Piece
) -> None:
    """Set ``o`` and ``lse`` of rows that the kernel treats as having no visible key.

    It returns o = 0 and lse = 0 for a row whose running maximum stays -inf. Three kinds of rows get
    there. The mask hides all keys: lse must be -inf. All scores are -inf, as products that
    overflow: lse must be -inf too, or a merge would weigh the row like one key of score 0. Or all
    are NaN, and fewer than a vector register holds: the scalar maximum ignores NaN, and both
    results must be NaN. Any other row of lse 0 is right. To tell them apart, the scores of the rows
    of lse 0 that have a key are recomputed.
    """
    group_size, keys = q.shape[1] // k.shape[1], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)  # what the kernel sums in
    key = torch.arange(keys, device=q.device)
    suspects = (lse == 0).nonzero()  # [n, 3]
    if piece.mask is not None:
        with_keys = [suspects[:0]]
        mask = piece.mask.expand(q.shape[0], q.shape[1], q.shape[2], keys)
        for rows in suspects.split(max(1, GATHERED_AT_ONCE // keys)):
            visible = mask[rows.unbind(1)] != -torch.inf  # [n, Sk]
            if piece.causal:
                visible &= key <= rows[:, 2:]
            has_keys = visible.any(dim=-1)
            lse[rows[~has_keys].unbind(1)] = -torch.inf
            with_keys.append(rows[has_keys])
        suspects = torch.cat(with_keys)
    at_once = max(1, GATHERED_AT_ONCE // k[0, 0].numel())
    for rows in suspects.split(at_once):
        batch, head, row = index = rows.unbind(1)
        row_keys = k[batch, head // group_size].to(wide)  # [n, Sk, D]
        scores = (row_keys @ q[index].to(wide).unsqueeze(-1)).squeeze(-1) * scale  # [n, Sk]
        if piece.causal:
            scores = scores.masked_fill(key > row.unsqueeze(-1), -torch.inf)
        if piece.mask is not None:
            scores = scores.masked_fill(mask[index] == -torch.inf, -torch.inf)
        largest = scores.amax(dim=-1)  # [n]
        is_nan = largest.isnan()
        lse[index] = lse[index].masked_fill(largest == -torch.inf, -torch.inf)
        lse[index] = lse[index].masked_fill(is_nan, torch.nan)
        o[index] = o[index].masked_fill(is_nan.unsqueeze(-1), torch.nan)


def _first_keys(
    count: int, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The first ``count`` keys, values and columns of the mask."""
    if mask is not None and mask.shape[3] > 1:
        mask = mask[..., :count]
    return k[:, :, :count], v[:, :, :count], mask


def _is_of_keys(mask: Tensor | None) -> bool:
    """Whether all heads and queries of a batch entry have one mask."""
    return mask is None or mask.shape[1] == mask.shape[2] == 1


def folds(q: Tensor, k: Tensor) -> bool:
    """Whether folding a group of heads into the rows of one head is faster."""
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
    piece: Piece,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv`` of a piece; the tensors are arranged as the piece says."""
    is_masked = piece.shares_rows or piece.mask is not None
    dlse_exceeds = dlse is not None and do.dtype == torch.float16  # its range
    if dlse_exceeds or widens(q, k, is_masked):
        if piece.mask is not None:
            piece = piece._replace(mask=piece.mask.float())
        dtype = q.dtype
        do, q, k, v, o = (x.float() for x in (do, q, k, v, o))
        grads = flash_backward(do, dlse, q, k, v, o, lse, scale, piece)
        dq, dk, dv = (x.to(dtype) for x in grads)
        return dq, dk, dv
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    hidden_keys = max(seqlen_k - seqlen_q, 0) if piece.causal else 0
    if hidden_keys:
        k, v, mask = _first_keys(seqlen_q, k, v, piece.mask)
        piece, seqlen_k = piece._replace(mask=mask), seqlen_q
    if (is_masked or seqlen_k < VECTOR_KEYS) and not math.isfinite(lse.sum().item()):
        # In a row whose scores are all -inf, exp(-inf - -inf) is NaN but exp(-inf - inf) is 0.
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    if not is_masked and is_short(q, k):
        dq, dk, dv = short_backward(do, dlse, q, k, v, scale, piece.causal)
    else:
        if dlse is not None:
            # The kernel computes dS = P * (dO V^T - rowsum(O * dO)) and takes no dlse, which adds
            # P * dlse. One more column adds it: dlse in dO times 1 in V, and 0 in O keeps the
            # rowsum. Q and K have 0 there.
            q, k, o = F.pad(q, (0, 1)), F.pad(k, (0, 1)), F.pad(o, (0, 1))
            v = F.pad(v, (0, 1), value=1.0)
            do = torch.cat((do, dlse.unsqueeze(-1).to(do.dtype)), dim=-1)
        if not do.stride(-1) == q.stride(-1) == k.stride(-1) == v.stride(-1) == o.stride(-1) == 1:
            do, q, k, v, o = map(_unit_stride, (do, q, k, v, o))
        dq, dk, dv = _FLASH_BACKWARD(
            do, q, k, v, o, lse, 0.0, piece.causal, attn_mask=piece.mask, scale=scale
        )
        if dlse is not None:  # drop the column; keep the kernel's layout (B, S, H, D)
            columns = (x[..., :-1].transpose(1, 2) for x in (dq, dk, dv))
            dq, dk, dv = (x.contiguous().transpose(1, 2) for x in columns)
    if hidden_keys:
        dk, dv = (F.pad(x, (0, 0, 0, hidden_keys)) for x in (dk, dv))
    return dq, dk, dv


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
