"""``flash_attn.layers.rotary``: rotary position embedding in flash_attn's layout."""

from __future__ import annotations

import torch
from torch import Tensor

from flashlayer.modules.positions import rotate_pairs, sequence_ids


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
        max_seqlen: ignored; there for the signature.

    Returns:
        As ``x``; computed in fp32 at least.
    """
    offsets = seqlen_offsets
    if cu_seqlens is None:
        position = torch.arange(x.shape[1], device=x.device)  # [S]
        if isinstance(offsets, Tensor):
            offsets = offsets[:, None]  # [B, 1]
    else:
        token = torch.arange(x.shape[0], device=x.device)
        sequence = sequence_ids(token, cu_seqlens).clamp(max=len(cu_seqlens) - 2)
        position = token - cu_seqlens[sequence]  # [T]
        if isinstance(offsets, Tensor):
            offsets = offsets[sequence]
    position = position + offsets
    rotated = apply_rotary_emb_torch(x, cos[position], sin[position], interleaved)
    return x.copy_(rotated) if inplace else rotated


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """The same of ``x`` ``(..., S, H, D)`` with the angles of every token.

    ``cos`` and ``sin`` ``(..., S, R / 2)`` are broadcastable to ``x`` without its heads.
    """
    return rotate_pairs(x, cos.unsqueeze(-2), sin.unsqueeze(-2), interleaved)
