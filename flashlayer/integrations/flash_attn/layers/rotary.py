"""``flash_attn.layers.rotary``: rotary position embedding in flash_attn's layout."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotate the first ``R`` features of every head by the token's position (arXiv 2104.09864).

    Args:
        x: ``(B, S, H, D)``; with ``cu_seqlens`` packed, ``(T, H, D)``.
        cos: ``(positions, R / 2)``, a table by position.
        sin: likewise.
        interleaved: pair features 0 and 1, 2 and 3 and so on (GPT-J) rather than ``i`` and ``i + R
            / 2`` (GPT-NeoX).
        inplace: write the result into ``x``.
        seqlen_offsets: position of each sequence's first token, an int or ``(B,)``.
        cu_seqlens: ``(N + 1,)``, boundaries of packed sequences.
        max_seqlen: not needed; there for the signature.

    Returns:
        As ``x``; computed in fp32 at least.
    """
    if cu_seqlens is None:
        position = torch.arange(x.shape[1], device=x.device)  # [S]
        if isinstance(seqlen_offsets, Tensor):
            position = position + seqlen_offsets[:, None]  # [B, S]
        else:
            position = position + seqlen_offsets
    else:
        token = torch.arange(x.shape[0], device=x.device)
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
        sequence = sequence.clamp(max=len(cu_seqlens) - 2)
        position = token - cu_seqlens[sequence]  # [T]
        if isinstance(seqlen_offsets, Tensor):
            position = position + seqlen_offsets[sequence]
        else:
            position = position + seqlen_offsets
    rotated = apply_rotary_emb_torch(x, cos[position], sin[position], interleaved)
    return x.copy_(rotated) if inplace else rotated


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """The same with the angles of every token: ``cos`` and ``sin`` ``(..., S, R / 2)``.

    Args:
        x: ``(..., S, H, D)``.
        cos: broadcastable to ``x`` without its heads.
        sin: likewise.
        interleaved: as in :func:`apply_rotary_emb`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table.to(dtype).unsqueeze(-2) for table in (cos, sin))  # [..., S, 1, R/2]
    half = cos.shape[-1]
    head, rest = x[..., : 2 * half].to(dtype), x[..., 2 * half :]
    pairs = (half, 2) if interleaved else (2, half)
    first, second = head.unflatten(-1, pairs).unbind(-1 if interleaved else -2)
    rotated = torch.stack(
        (first * cos - second * sin, first * sin + second * cos), dim=-1 if interleaved else -2
    ).flatten(-2)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)
