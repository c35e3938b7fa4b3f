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

from flashlayer import online_softmax, philox
from flashlayer.online_softmax import SoftmaxState
from flashlayer.spec import AttentionExtras, AttentionSpec, Problem

name = "tiled"

# Scores computed at once: one square tile for each batch entry and head, 4 MB in fp32, about what a
# CPU's caches hold. The best power of two within 15 % for 2, 16 and 64 heads on two cores.
SCORES_AT_ONCE = 2**20


class Sequence(NamedTuple):
    """One stretch of queries and the keys it may see: all of a dense problem, or a packed part."""

    batch: Tensor  # (B, 1, 1, 1): which batch entry, or which packed sequence
    q_start: int
    k_start: int
    seqlen_q: int
    seqlen_k: int


class Tile(NamedTuple):
    """One tile of the score matrix: a block of queries, a block of keys, the mask between them."""

    query: Tensor  # (M, 1): positions in the sequence
    key: Tensor  # (1, N)
    k_rows: slice  # where the keys are in the tensors
    mask: Tensor | None  # tile of attn_mask, every dimension full or 1
    visible: Tensor | None  # bool, broadcastable to (B, H, M, N); None where everything is seen


class Scores(NamedTuple):
    """The scores of a tile and what their derivative needs."""

    scores: Tensor  # (B, Hkv, G*M, N), -inf where hidden
    slope: Tensor | None  # (B, Hkv, G*M, N): derivative of the softcap; None without one
    k_tile: Tensor  # (B, Hkv, N, D)
    v_tile: Tensor  # (B, Hkv, N, Dv)
    kept: Tensor | None  # (B, Hkv, G*M, N): 1 / (1 - dropout_p) or 0; None without dropout


def refuses(problem: Problem) -> str | None:
    """None: plain tensor operations cover every call."""
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
) -> tuple[Tensor, Tensor]:
    """One online-softmax state a block of queries, updated with every tile of keys it sees."""
    dtype, heads, kv_heads = _accumulation_dtype(q), q.shape[1], k.shape[1]
    o = q.new_zeros(*q.shape[:3], v.shape[-1])
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=dtype)
    for sequence in _sequences(q, k, extras):
        for start, stop in _blocks(0, sequence.seqlen_q, _block_size(q)):
            rows = slice(sequence.q_start + start, sequence.q_start + stop)
            q_rows = _fold(q[:, :, rows], kv_heads).to(dtype)  # [B, Hkv, G*M, D]
            state = _first_state(q_rows, v.shape[-1], extras.sinks, stop - start)
            for tile in _tiles(sequence, start, stop, q, spec, extras):
                tile_scores = _scores(q_rows, k, v, tile, sequence, spec, extras)
                state = online_softmax.update(
                    state, tile_scores.scores, tile_scores.v_tile, tile_scores.kept
                )
            o[:, :, rows] = _unfold(online_softmax.finalize(state), heads)
            lse[:, :, rows] = _unfold(online_softmax.lse(state), heads)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The same tiles again, with the probabilities recomputed as ``P = exp(S - lse)``.

        dV = P^T dO    dP = dO V^T    dS = P * (dP - delta)    dQ = scale dS K    dK = scale dS^T Q

    ``delta = rowsum(O * dO) - dlse`` (appendix B.4 of arXiv 2205.14135; d lse / d S = P gives the
    second term). Folding the query heads of a group into the rows makes dK and dV sum over the
    group by themselves. With dropout P in dV and dP are multiplied by the mask, and delta, which
    is the mean of dP under P, still is that. dS is the gradient of an additive mask as it stands.
    """
    dtype, heads, kv_heads = _accumulation_dtype(q), q.shape[1], k.shape[1]
    dq = torch.zeros_like(q)
    dk, dv = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
    d_mask = None
    if extras.attn_mask is not None and extras.wants_mask_gradient(spec):
        d_mask = extras.attn_mask.new_zeros(extras.attn_mask.shape, dtype=dtype)
    delta = q.new_zeros(q.shape[:3], dtype=dtype)
    # A row that sees no key has lse = -inf and only scores of -inf: +inf makes their exp(S - lse)
    # 0, not NaN.
    finite_lse = torch.where(lse == -torch.inf, torch.inf, lse)
    for sequence in _sequences(q, k, extras):
        for start, stop in _blocks(0, sequence.seqlen_q, _block_size(q)):
            rows = slice(sequence.q_start + start, sequence.q_start + stop)
            q_rows, do_rows, o_rows = (
                _fold(x[:, :, rows], kv_heads).to(dtype) for x in (q, do, o)
            )  # [B, Hkv, G*M, D]
            delta_rows = (o_rows * do_rows).sum(dim=-1)  # [B, Hkv, G*M]
            if dlse is not None:
                delta_rows -= _fold(dlse[:, :, rows], kv_heads)
            delta[:, :, rows] = _unfold(delta_rows, heads)
            lse_rows = _fold(finite_lse[:, :, rows], kv_heads)
            dq_rows = torch.zeros_like(q_rows)
            for tile in _tiles(sequence, start, stop, q, spec, extras):
                scores, slope, k_tile, v_tile, kept = _scores(
                    q_rows, k, v, tile, sequence, spec, extras
                )
                p = scores.sub_(lse_rows.unsqueeze(-1)).exp_()  # [B, Hkv, G*M, N]
                dp = do_rows @ v_tile.transpose(-2, -1)
                if kept is not None:
                    dp *= kept
                dv[:, :, tile.k_rows] += (p if kept is None else p * kept).mT @ do_rows
                ds = dp.sub_(delta_rows.unsqueeze(-1)).mul_(p)
                if d_mask is not None:
                    d_mask_tile = _mask_tile(d_mask, rows, tile.k_rows)
                    d_mask_tile += _by_head(ds, heads).sum_to_size(d_mask_tile.shape)
                if slope is not None:
                    ds *= slope
                dq_rows += ds @ k_tile
                dk[:, :, tile.k_rows] += ds.transpose(-2, -1) @ q_rows
            dq[:, :, rows] = _unfold(dq_rows * spec.scale, heads)
    if d_mask is not None and extras.attn_mask is not None:
        d_mask = d_mask.to(extras.attn_mask.dtype)
    dk, dv = (dk * spec.scale).to(k.dtype), dv.to(v.dtype)
    return dq, dk, dv, d_mask, extras.sinks_gradient(lse, delta)


def empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """See :class:`flashlayer.spec.Backend`."""
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    return o, q.new_empty(q.shape[:3], dtype=_accumulation_dtype(q))


def empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`flashlayer.spec.Backend`."""
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _scores(
    q_rows: Tensor,
    k: Tensor,
    v: Tensor,
    tile: Tile,
    sequence: Sequence,
    spec: AttentionSpec,
    extras: AttentionExtras,
) -> Scores:
    """Scale, softcap, ALiBi, additive mask, hard mask, in this order; and the dropout factors."""
    k_tile, v_tile = (x[:, :, tile.k_rows].to(q_rows.dtype) for x in (k, v))  # [B, Hkv, N, D]
    heads = q_rows.shape[1] * (q_rows.shape[2] // tile.query.shape[0])
    if tile.mask is not None and tile.visible is not None:
        # A key that no query of the tile sees may hold anything, and 0 * NaN is NaN.
        seen = tile.visible.any(dim=-2).expand(q_rows.shape[0], heads, -1)  # [B, H, N]
        seen = seen.unflatten(1, (q_rows.shape[1], -1)).any(dim=2).unsqueeze(-1)  # [B, Hkv, N, 1]
        k_tile, v_tile = torch.where(seen, k_tile, 0), torch.where(seen, v_tile, 0)
    scores = (q_rows @ k_tile.transpose(-2, -1)).mul_(spec.scale)
    slope = kept = None
    if spec.softcap is not None:
        capped = torch.tanh(scores / spec.softcap)
        scores, slope = spec.softcap * capped, 1 - capped.square()
    by_head = _by_head(scores, heads)  # [B, H, M, N], a view
    if extras.alibi_slopes is not None:
        slopes = extras.alibi_slopes.to(scores.dtype)
        if len(slopes) > 1:
            slopes = slopes[sequence.batch.flatten()]
        diagonal = tile.query + spec.offset(sequence.seqlen_q, sequence.seqlen_k)
        by_head.sub_(slopes[:, :, None, None] * (diagonal - tile.key).abs())
    if tile.mask is not None and tile.mask.dtype != torch.bool:
        by_head.add_(tile.mask)
    if tile.visible is not None:
        by_head.masked_fill_(~tile.visible, -torch.inf)
    if extras.dropout_seed is not None:
        head = torch.arange(heads, device=scores.device).view(-1, 1, 1)
        keep = philox.keep_mask(
            extras.dropout_seed, sequence.batch, head, tile.query, tile.key, spec.dropout_p
        )
        survival = 1 - spec.dropout_p
        kept = (keep.to(scores.dtype) / (survival or 1)).view_as(scores)
    return Scores(scores, slope, k_tile, v_tile, kept)


def _sequences(q: Tensor, k: Tensor, extras: AttentionExtras) -> Iterator[Sequence]:
    if extras.cu_seqlens_q is None or extras.cu_seqlens_k is None:
        batch = torch.arange(q.shape[0], device=q.device).view(-1, 1, 1, 1)
        yield Sequence(batch, 0, 0, q.shape[2], k.shape[2])
        return
    q_edges, k_edges = extras.cu_seqlens_q.tolist(), extras.cu_seqlens_k.tolist()
    for index in range(len(q_edges) - 1):
        batch = torch.full((1, 1, 1, 1), index, device=q.device)
        yield Sequence(
            batch,
            q_edges[index],
            k_edges[index],
            q_edges[index + 1] - q_edges[index],
            k_edges[index + 1] - k_edges[index],
        )


def _tiles(
    sequence: Sequence,
    start: int,
    stop: int,
    q: Tensor,
    spec: AttentionSpec,
    extras: AttentionExtras,
) -> Iterator[Tile]:
    """The tiles the queries ``[start, stop)`` have to visit; those they do not see are not made."""
    seqlens = sequence.seqlen_q, sequence.seqlen_k
    bounds = spec.key_bounds(start, stop, *seqlens)
    query = torch.arange(start, stop, device=q.device)[:, None]
    q_rows = slice(sequence.q_start + start, sequence.q_start + stop)
    for k_start, k_stop in _blocks(bounds.any_start, bounds.any_stop, _block_size(q)):
        k_rows = slice(sequence.k_start + k_start, sequence.k_start + k_stop)
        visible = mask = None
        if k_start < bounds.all_start or k_stop > bounds.all_stop:
            visible = spec.visible(start, stop, k_start, k_stop, *seqlens, q.device)
        if extras.attn_mask is not None:
            mask = _mask_tile(extras.attn_mask, q_rows, k_rows)
            attended = mask if mask.dtype == torch.bool else mask != -torch.inf
            attended = attended.expand(-1, -1, stop - start, k_stop - k_start)
            visible = attended if visible is None else visible & attended
        key = torch.arange(k_start, k_stop, device=q.device)[None, :]
        yield Tile(query, key, k_rows, mask, visible)


def _mask_tile(mask: Tensor, q_rows: slice, k_rows: slice) -> Tensor:
    """A view; dimensions of size 1 stay, a mask is never expanded."""
    mask = mask if mask.shape[2] == 1 else mask[:, :, q_rows]
    return mask if mask.shape[3] == 1 else mask[:, :, :, k_rows]


def _first_state(
    q_rows: Tensor, value_dim: int, sinks: Tensor | None, block_rows: int
) -> SoftmaxState:
    """The state of no keys; with a sink, that of one key whose score is the sink and value 0."""
    state = online_softmax.init_state(
        q_rows.shape[:-1], value_dim, dtype=q_rows.dtype, device=q_rows.device
    )
    if sinks is None:
        return state
    sink_rows = sinks.to(q_rows.dtype).unflatten(0, (q_rows.shape[1], -1))  # [Hkv, G]
    m = sink_rows.repeat_interleave(block_rows, dim=1).expand_as(state.m)  # [B, Hkv, G*M]
    return SoftmaxState(m, (m > -torch.inf).to(m.dtype), state.o)


def _blocks(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for block_start in range(start, stop, size):
        yield block_start, min(block_start + size, stop)


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


def _by_head(scores: Tensor, heads: int) -> Tensor:
    """``(B, Hkv, G*M, N)`` as ``(B, H, M, N)``: a view, since scores are contiguous."""
    batch, kv_heads, rows, keys = scores.shape
    return scores.view(batch, heads, kv_heads * rows // heads, keys)
