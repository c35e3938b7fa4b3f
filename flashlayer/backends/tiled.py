"""The tiled algorithm in plain PyTorch: any dtype, any device, O(Sq + Sk) memory.

It is the kernels' algorithm at a readable size: blocks of queries, tiles of keys, the online
softmax going forward and the probabilities recomputed from the LSE going back (FlashAttention-2,
arXiv 2307.08691, algorithms 1 and 2).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flashlayer import online_softmax
from flashlayer.spec import AttentionExtras, AttentionSpec, Problem

name = "tiled"

# Scores computed at once: one square tile for each batch entry and head, 4 MB in fp32, about what a
# CPU's caches hold. The best power of two within 15 % for 2, 16 and 64 heads on two cores.
SCORES_AT_ONCE = 2**20


class Tile(NamedTuple):
    """One tile of the score matrix: a block of queries, a block of keys, the mask between them."""

    q_block: slice
    k_block: slice
    visible: Tensor | None  # bool [M, N]; None where every query of the block sees every key


def refuses(problem: Problem) -> str | None:
    """None: plain tensor operations cover every call."""
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
) -> tuple[Tensor, Tensor]:
    """One online-softmax state a block of queries, updated with every tile of keys it sees."""
    kv_heads, dtype = k.shape[1], _accumulation_dtype(q)
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=dtype)
    block_size = _block_size(q)
    for q_block in _blocks(0, q.shape[2], block_size):
        q_rows = _fold(q[:, :, q_block], kv_heads).to(dtype)  # [B, Hkv, G*M, D]
        state = online_softmax.init_state(
            q_rows.shape[:-1], v.shape[-1], dtype=dtype, device=q.device
        )
        for tile in _tiles(spec, q_block, block_size, q.shape[2], k.shape[2], q.device):
            k_tile, v_tile = (x[:, :, tile.k_block].to(dtype) for x in (k, v))  # [B, Hkv, N, D]
            state = online_softmax.update(state, _scores(q_rows, k_tile, tile, spec), v_tile)
        o[:, :, q_block] = _unfold(online_softmax.finalize(state), q.shape[1])
        lse[:, :, q_block] = _unfold(online_softmax.lse(state), q.shape[1])
    return o, lse


def backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    extras: AttentionExtras,
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    """The same tiles again, with the probabilities recomputed as ``P = exp(S - lse)``.

        dV = P^T dO        dP = dO V^T        dS = P * (dP - delta)        dQ = scale dS K        dK
        = scale dS^T Q

    ``delta = rowsum(O * dO) - dlse`` (appendix B.4 of arXiv 2205.14135, and d lse / d S = P for the
    second term). Folding the query heads of a group into the rows makes dK and dV sum over the
    group by themselves.
    """
    kv_heads, dtype = k.shape[1], _accumulation_dtype(q)
    dq = torch.empty_like(q)
    dk, dv = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
    block_size = _block_size(q)
    for q_block in _blocks(0, q.shape[2], block_size):
        q_rows, do_rows, o_rows = (
            _fold(x[:, :, q_block], kv_heads).to(dtype) for x in (q, do, o)
        )  # [B, Hkv, G*M, D]
        delta = (o_rows * do_rows).sum(dim=-1)  # [B, Hkv, G*M]
        if dlse is not None:
            delta -= _fold(dlse[:, :, q_block], kv_heads)
        # A row that sees no key has lse = -inf and only scores of -inf: +inf makes their exp(S -
        # lse) 0, not NaN.
        lse_rows = _fold(lse[:, :, q_block], kv_heads)
        lse_rows = torch.where(lse_rows == -torch.inf, torch.inf, lse_rows)
        dq_rows = torch.zeros_like(q_rows)
        for tile in _tiles(spec, q_block, block_size, q.shape[2], k.shape[2], q.device):
            k_tile, v_tile = (x[:, :, tile.k_block].to(dtype) for x in (k, v))  # [B, Hkv, N, D]
            p = _scores(q_rows, k_tile, tile, spec).sub_(lse_rows.unsqueeze(-1)).exp_()
            dv[:, :, tile.k_block] += p.transpose(-2, -1) @ do_rows
            dp = do_rows @ v_tile.transpose(-2, -1)  # [B, Hkv, G*M, N]
            ds = dp.sub_(delta.unsqueeze(-1)).mul_(p)
            dq_rows += ds @ k_tile
            dk[:, :, tile.k_block] += ds.transpose(-2, -1) @ q_rows
        dq[:, :, q_block] = _unfold(dq_rows * spec.scale, q.shape[1])
    return dq, (dk * spec.scale).to(k.dtype), dv.to(v.dtype), None, None


def _scores(q_rows: Tensor, k_tile: Tensor, tile: Tile, spec: AttentionSpec) -> Tensor:
    """``[B, Hkv, G*M, N]``: scaled, and -inf where the row does not see the key."""
    scores = (q_rows @ k_tile.transpose(-2, -1)).mul_(spec.scale)
    if tile.visible is not None:
        by_group = scores.unflatten(-2, (-1, tile.visible.shape[0]))  # [B, Hkv, G, M, N]
        by_group.masked_fill_(~tile.visible, -torch.inf)
    return scores


def _tiles(
    spec: AttentionSpec,
    q_block: slice,
    block_size: int,
    seqlen_q: int,
    seqlen_k: int,
    device: torch.device,
) -> Iterator[Tile]:
    """The tiles a block of queries has to visit; those it does not see are never made."""
    bounds = spec.key_bounds(q_block.start, q_block.stop, seqlen_q, seqlen_k)
    for k_block in _blocks(bounds.any_start, bounds.any_stop, block_size):
        visible = None
        if k_block.start < bounds.all_start or k_block.stop > bounds.all_stop:
            visible = spec.visible(
                q_block.start, q_block.stop, k_block.start, k_block.stop, seqlen_q, seqlen_k, device
            )
        yield Tile(q_block, k_block, visible)


def _blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    for block_start in range(start, stop, size):
        yield slice(block_start, min(block_start + size, stop))


def _block_size(q: Tensor) -> int:
    """Queries and keys a tile: a power of two from 64 to 512, as :data:`SCORES_AT_ONCE` allows."""
    scores_per_head = SCORES_AT_ONCE // max(1, q.shape[0] * q.shape[1])
    return next((size for size in (512, 256, 128) if size * size <= scores_per_head), 64)


def _accumulation_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """``(B, H, M, ...)`` to ``(B, Hkv, G*M, ...)``: a group's query heads become rows."""
    return x.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _unfold(x: Tensor, heads: int) -> Tensor:
    """The inverse of :func:`_fold`."""
    group_size = heads // x.shape[1]
    return x.unflatten(2, (group_size, -1)).flatten(1, 2)
