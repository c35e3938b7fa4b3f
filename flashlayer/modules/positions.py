"""Positions of tokens, rotary embedding (RoPE) and the slopes of ALiBi."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, base: float, position: Tensor) -> Tensor:
    """Rotary position embedding of ``(..., S, D)`` at positions ``(S,)``; same shape and dtype.

    Angles and rotation are computed in fp32 (fp64 for fp64) whatever the dtype of ``x``: in bf16,
    positions past 256 are no longer distinct.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    exponent = torch.arange(0, x.shape[-1], 2, device=x.device, dtype=dtype) / x.shape[-1]
    angle = position.to(dtype)[:, None] * base**-exponent  # [S, D/2]
    return rotate_pairs(x, angle.cos(), angle.sin())


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the first ``R`` features of ``(..., D)`` in pairs; the rest pass unchanged.

    ``cos`` and ``sin`` of the angles are broadcastable to ``(..., R / 2)``. Pairs are features
    ``2 i`` and ``2 i + 1`` if ``interleaved`` (GPT-J), else ``i`` and ``i + R / 2`` (GPT-NeoX,
    Llama). Computed in fp32 at least.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(dtype), sin.to(dtype)
    half = cos.shape[-1]
    pairs, dim = ((half, 2), -1) if interleaved else ((2, half), -2)
    first, second = x[..., : 2 * half].to(dtype).unflatten(-1, pairs).unbind(dim)
    rotated = torch.stack((first * cos - second * sin, first * sin + second * cos), dim)
    rotated = rotated.flatten(-2).to(x.dtype)
    if 2 * half == x.shape[-1]:
        return rotated
    return torch.cat((rotated, x[..., 2 * half :]), dim=-1)


def token_positions(x: Tensor, cu_seqlens: Tensor | None, first: int) -> Tensor:
    """Position of every token of ``x`` ``(..., S, D)`` in its sequence, ``(S,)``.

    ``first`` is the position of the first token; 0 for packed sequences.
    """
    token = torch.arange(first, first + x.shape[-2], device=x.device)
    return token if cu_seqlens is None else token - cu_seqlens[sequence_ids(token, cu_seqlens)]


def sequence_ids(token: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Index of the packed sequence that each token belongs to; N past the last of N sequences."""
    return torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """The slopes of ALiBi for ``num_heads`` heads, ``(H,)`` fp32 (Press et al., arXiv 2108.12409).

    ``2 ** (-8 n / H)`` for n = 1 to H where H is a power of two; else those of the power of two
    below, and every other one of the power of two above, as in the paper's code.
    """
    power = 2 ** (num_heads.bit_length() - 1)
    slopes = torch.exp2(-8 / power * torch.arange(1, power + 1, device=device))
    odd = 1 + 2 * torch.arange(num_heads - power, device=device)
    return torch.cat((slopes, torch.exp2(-4 / power * odd)))
