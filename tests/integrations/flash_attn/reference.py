"""The documented semantics of flash_attn, written out in fp64, and what its tests share."""

import itertools
from typing import Any

import torch
from torch import Tensor

B, SQ, SK, H, HKV, D = 2, 5, 9, 4, 2, 16


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    key_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    kept: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, Sq, H, D), lse and probabilities; ``lengths`` are where each row's keys end."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    seqlen_q, seqlen_k = scores.shape[-2:]
    ends = torch.full((len(q),), seqlen_k) if lengths is None else lengths
    i = torch.arange(seqlen_q)[:, None] + (ends - seqlen_q).view(-1, 1, 1, 1)
    j = torch.arange(seqlen_k)
    if alibi_slopes is not None:
        slopes = alibi_slopes.double().reshape(-1, q.shape[2], 1, 1)
        scores = scores - slopes * (i - j).abs()
    hidden = j >= ends.view(-1, 1, 1, 1)
    left, right = window_size
    if causal:
        right = 0
    if left >= 0:
        hidden = hidden | (j < i - left)
    if right >= 0:
        hidden = hidden | (j > i + right)
    if key_mask is not None:
        hidden = hidden | ~key_mask[:, None, None]
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    p = torch.exp(scores - lse.nan_to_num(neginf=0.0)[..., None])
    weights = p if kept is None else p * kept / (1 - dropout_p)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse, p


def qkv(dtype: torch.dtype = torch.float64, heads: int = HKV, seqlen_k: int = SK) -> list[Tensor]:
    shapes = ((B, SQ, H, D), (B, seqlen_k, heads, D), (B, seqlen_k, heads, D))
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


OPTIONS = {
    "plain": {},
    "scale": {"softmax_scale": 0.5},
    "causal": {"causal": True},
    "window": {"window_size": (3, 1)},
    "left_window": {"window_size": (2, -1)},
    "causal_window": {"causal": True, "window_size": (2, 5)},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": torch.rand(H), "causal": True},
    "alibi_batch": {"alibi_slopes": torch.rand(B, H), "deterministic": True},
}


def pack(x: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])


def edges(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def paged(caches: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """Caches (2, B, S, H, D) cut into shuffled pages, unused ones NaN, and the block table."""
    per_row = -(-caches.shape[2] // page)
    padded = torch.nn.functional.pad(
        caches, (0, 0, 0, 0, 0, per_row * page - caches.shape[2]), value=torch.nan
    )
    table = torch.randperm(B * per_row + 2)[: B * per_row].view(B, per_row).int()
    pages = torch.full((2, B * per_row + 2, page, HKV, D), torch.nan, dtype=caches.dtype)
    pages[:, table] = padded.unflatten(2, (per_row, page))
    return pages, table


def rotate(x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """Pairs as complex numbers, turned by the angle."""
    turned, half = x.clone(), len(angle)
    real = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    imaginary = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    pair = torch.complex(x[:, real], x[:, imaginary]) * torch.exp(1j * angle)
    turned[:, real], turned[:, imaginary] = pair.real, pair.imag
    return turned
