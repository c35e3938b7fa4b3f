"""The tiled algorithm in plain PyTorch: any dtype, any device, O(Sq + Sk) memory.

The kernels' algorithm at a readable size: blocks of queries, tiles of keys, the online softmax in
the forward pass, probabilities recomputed from the LSE in the backward pass (FlashAttention-2,
arXiv 2307.08691, algorithms 1 and 2).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from flashlayer import online_softmax, philox
from flashlayer.masks.intervals import tile_bounds, visible_pairs
from flashlayer.online_softmax import SoftmaxState
from flashlayer.spec import (
    AttentionExtras,
    AttentionSpec,
    KeyBounds,
    Problem,
    accumulation_dtype,
    without_autocast,
)

name = "tiled"
entropy_gradient = True

# Scores computed at once for all batch entries and heads: 4 MB in fp32, about what a CPU's caches
# hold. The best power of two within 15 % for 2, 16 and 64 heads on two cores.
SCORES_AT_ONCE = 2**20


class Block(NamedTuple):
    """Consecutive queries of one sequence: a dense problem's, or one of the packed ones."""

    batch: Tensor  # (B, 1, 1, 1): batch entry, or number of the packed sequence
    start: int  # first position in the sequence
    stop: int
    q_rows: slice  # where the queries are in the tensors
    k_first: int  # where the sequence's keys start in the tensors
    seqlens: tuple[int, int]  # queries and keys of the sequence
    bounds: list[list[KeyBounds]] | None  # of an interval mask: see _interval_bounds


class Tile(NamedTuple):
    """One tile of the score matrix: a block of queries and some of the keys."""

    query: Tensor  # (M, 1): position in the sequence
    key: Tensor  # (1, N): position in the sequence
    k_rows: slice  # where the keys are in the tensors
    mask: Tensor | None  # tile of attn_mask, every dimension full or 1
    visible: Tensor | None  # bool, broadcastable to (B, H, M, N); None if every key is visible


class Scores(NamedTuple):
    """The scores of a tile and what their derivative needs."""

    scores: Tensor  # (B, Hkv, G*M, N), -inf where hidden
    softcap_grad: Tensor | None  # (B, Hkv, G*M, N); None without softcap
    k_tile: Tensor  # (B, Hkv, N, D)
    v_tile: Tensor  # (B, Hkv, N, Dv)
    kept: Tensor | None  # (B, Hkv, G*M, N): 1 / (1 - dropout_p) or 0; None without dropout


def refuses(problem: Problem) -> str | None:
    """None: plain tensor operations cover every call."""
    return None


@without_autocast
def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
) -> tuple[Tensor, ...]:
    """One online-softmax state a block of queries, updated with every tile of visible keys."""
    dtype, heads, kv_heads = accumulation_dtype(q.dtype), q.shape[1], k.shape[1]
    o = q.new_zeros(*q.shape[:3], v.shape[-1])
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=dtype)
    max_scores = lse.clone() if spec.max_scores else None
    entropy = torch.zeros_like(lse) if spec.entropy else None
    for block in _blocks(q, k, extras):
        rows = block.q_rows
        q_rows = _fold(q[:, :, rows], kv_heads).to(dtype)  # [B, Hkv, G*M, D]
        state = _first_state(q_rows, v.shape[-1], extras.sinks, block.stop - block.start)
        t = torch.zeros_like(state.m)
        for tile in _tiles(block, q, spec, extras):
            scores, _, _, v_tile, kept = _scores(q_rows, k, v, block, tile, spec, extras)
            if max_scores is not None:
                largest = _unfold(scores.detach().amax(dim=-1), heads)  # [B, H, M]
                max_scores[:, :, rows] = torch.maximum(max_scores[:, :, rows], largest)
            before, state = state, online_softmax.update(state, scores, v_tile, kept)
            if entropy is not None:
                t = online_softmax.update_weighted_log(t, before, state, scores)
        # Cast before: a copy into a half tensor leaves its tangent in the source's dtype.
        o[:, :, rows] = _unfold(online_softmax.finalize(state), heads).to(o.dtype)
        lse[:, :, rows] = _unfold(online_softmax.lse(state), heads)
        if entropy is not None:
            entropy[:, :, rows] = _unfold(online_softmax.entropy(state, t), heads)
    return o, lse, *spec.asked(max_scores, entropy)


@without_autocast
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
    dentropy: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The same tiles again, with the probabilities recomputed as ``P = exp(S - lse)``.

        dV = P^T dO    dP = dO V^T    dS = P * (dP - delta)    dQ = scale dS K    dK = scale dS^T Q

    ``delta = rowsum(O * dO) - dlse`` (appendix B.4 of arXiv 2205.14135; the second term because
    d lse / d S = P). With the query heads of a group folded into the rows, dK and dV sum over the
    group. Dropout multiplies P in dV and dP by the mask; delta stays the mean of dP under P. The
    gradient of an additive mask is dS. That of the entropy H follows from
    d H / d S = -P * (log P + H): its second term comes with ``dlse``, its first is added to dS.
    """
    dtype, heads, kv_heads = accumulation_dtype(q.dtype), q.shape[1], k.shape[1]
    dq = torch.zeros_like(q)
    dk, dv = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
    d_mask = None
    if extras.attn_mask is not None and extras.wants_mask_gradient(spec):
        d_mask = extras.attn_mask.new_zeros(extras.attn_mask.shape, dtype=dtype)
    delta = q.new_zeros(q.shape[:3], dtype=dtype)
    # lse = -inf is a row without visible keys: exp(-inf - -inf) is NaN, exp(-inf - inf) is 0.
    finite_lse = torch.where(lse == -torch.inf, torch.inf, lse)
    for block in _blocks(q, k, extras):
        rows = block.q_rows
        q_rows, do_rows, o_rows = (
            _fold(x[:, :, rows], kv_heads).to(dtype) for x in (q, do, o)
        )  # [B, Hkv, G*M, D]
        delta_rows = (o_rows * do_rows).sum(dim=-1)  # [B, Hkv, G*M]
        if dlse is not None:
            delta_rows -= _fold(dlse[:, :, rows], kv_heads)
        delta[:, :, rows] = _unfold(delta_rows, heads)
        lse_rows = _fold(finite_lse[:, :, rows], kv_heads)
        dq_rows = torch.zeros_like(q_rows)
        for tile in _tiles(block, q, spec, extras):
            scores, softcap_grad, k_tile, v_tile, kept = _scores(
                q_rows, k, v, block, tile, spec, extras
            )
            log_p = scores.sub_(lse_rows.unsqueeze(-1))  # [B, Hkv, G*M, N]
            of_entropy = None
            if dentropy is not None:
                dentropy_rows = _fold(dentropy[:, :, rows], kv_heads).unsqueeze(-1)
                of_entropy = log_p.clamp_min(online_softmax.LOWEST) * dentropy_rows
            p = log_p.exp_()
            dp = do_rows @ v_tile.mT
            if kept is not None:
                dp *= kept
            if of_entropy is not None:
                dp -= of_entropy
            dv[:, :, tile.k_rows] += (p if kept is None else p * kept).mT @ do_rows
            ds = dp.sub_(delta_rows.unsqueeze(-1)).mul_(p)
            if d_mask is not None:
                d_mask_tile = _mask_tile(d_mask, rows, tile.k_rows)
                d_mask_tile += _by_head(ds, heads).sum_to_size(d_mask_tile.shape)
            if softcap_grad is not None:
                ds *= softcap_grad
            dq_rows += ds @ k_tile
            dk[:, :, tile.k_rows] += ds.mT @ q_rows
        dq[:, :, rows] = _unfold(dq_rows * spec.scale, heads).to(dq.dtype)  # as o in forward
    if d_mask is not None and extras.attn_mask is not None:
        d_mask = d_mask.to(extras.attn_mask.dtype)
    dk, dv = (dk * spec.scale).to(k.dtype), dv.to(v.dtype)
    if dentropy is not None and extras.sinks is not None:  # a sink is one more key
        log_p = extras.sinks.to(dtype)[:, None] - lse
        delta += dentropy * log_p.clamp_min(online_softmax.LOWEST)
    return dq, dk, dv, d_mask, extras.sinks_gradient(lse, delta)


def has_tangents(problem: Problem) -> bool:
    """False: tangents are pushed through :func:`forward` itself."""
    return False


def empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """See :class:`flashlayer.spec.Backend`."""
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    return o, q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


def empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`flashlayer.spec.Backend`."""
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _blocks(q: Tensor, k: Tensor, extras: AttentionExtras) -> Iterator[Block]:
    """The queries of each sequence in blocks."""
    if extras.cu_seqlens_q is None or extras.cu_seqlens_k is None:
        batches = [torch.arange(q.shape[0], device=q.device).view(-1, 1, 1, 1)]
        q_edges, k_edges = [0, q.shape[2]], [0, k.shape[2]]
    else:
        q_edges, k_edges = extras.cu_seqlens_q.tolist(), extras.cu_seqlens_k.tolist()
        batches = torch.arange(len(q_edges) - 1, device=q.device).view(-1, 1, 1, 1, 1).unbind()
    bounds = None if extras.intervals is None else _interval_bounds(extras.intervals, q)
    sequences = zip(batches, pairwise(q_edges), pairwise(k_edges), strict=True)
    for batch, (q_first, q_end), (k_first, k_end) in sequences:
        for start, stop in _ranges(0, q_end - q_first, _block_size(q)):
            q_rows = slice(q_first + start, q_first + stop)
            seqlens = (q_end - q_first, k_end - k_first)
            yield Block(batch, start, stop, q_rows, k_first, seqlens, bounds)


def _interval_bounds(intervals: Tensor, q: Tensor) -> list[list[KeyBounds]]:
    """For every tile of keys and each interval: the queries of all batch entries and heads."""
    bounds = tile_bounds(intervals, _block_size(q)).flatten(0, 1)  # [B*H, tiles, n, 4]
    least, greatest = bounds.amin(dim=0), bounds.amax(dim=0)
    extremes = (least[..., 0], greatest[..., 1], least[..., 2], greatest[..., 3])
    return [[KeyBounds(*x) for x in tile] for tile in torch.stack(extremes, dim=-1).tolist()]


def _tiles(block: Block, q: Tensor, spec: AttentionSpec, extras: AttentionExtras) -> Iterator[Tile]:
    """The tiles that hold a key visible to the block; the others are skipped."""
    start, stop, seqlens = block.start, block.stop, block.seqlens
    bounds = spec.key_bounds(start, stop, *seqlens)
    query = torch.arange(start, stop, device=q.device)[:, None]
    size = _block_size(q)
    # The bounds of an interval mask are those of tiles that start at multiples of their size.
    first = bounds.any_start if block.bounds is None else bounds.any_start // size * size
    for k_start, k_stop in _ranges(first, bounds.any_stop, size):
        k_rows = slice(block.k_first + k_start, block.k_first + k_stop)
        visible = mask = None
        if k_start < bounds.all_start or k_stop > bounds.all_stop:
            visible = spec.visible(start, stop, k_start, k_stop, *seqlens, q.device)
        if extras.attn_mask is not None:
            mask = _mask_tile(extras.attn_mask, block.q_rows, k_rows)
            unmasked = mask if mask.dtype == torch.bool else mask != -torch.inf
            unmasked = unmasked.expand(-1, -1, stop - start, k_stop - k_start)
            visible = unmasked if visible is None else visible & unmasked
        if block.bounds is not None and extras.intervals is not None:
            tile = block.bounds[k_start // size]
            if not any(x.any_start < stop and start < x.any_stop for x in tile):
                continue
            if not any(x.all_start <= start and stop <= x.all_stop for x in tile):
                allowed = visible_pairs(extras.intervals[..., k_rows], query[:, 0])
                visible = allowed if visible is None else visible & allowed
        key = torch.arange(k_start, k_stop, device=q.device)[None, :]
        yield Tile(query, key, k_rows, mask, visible)


def _scores(
    q_rows: Tensor,
    k: Tensor,
    v: Tensor,
    block: Block,
    tile: Tile,
    spec: AttentionSpec,
    extras: AttentionExtras,
) -> Scores:
    """Scale, softcap, ALiBi, additive mask, hard mask, in this order; and the dropout factors."""
    k_tile, v_tile = (x[:, :, tile.k_rows].to(q_rows.dtype) for x in (k, v))  # [B, Hkv, N, D]
    heads = q_rows.shape[1] * (q_rows.shape[2] // tile.query.shape[0])
    if (
        tile.visible is not None and extras.attn_mask is not extras.intervals
    ):  # one of them is there
        # A key hidden from every query of the tile may hold anything, and 0 * NaN is NaN.
        visible = tile.visible.any(dim=-2).expand(q_rows.shape[0], heads, -1)  # [B, H, N]
        visible = visible.unflatten(1, (q_rows.shape[1], -1)).any(dim=2).unsqueeze(-1)
        k_tile, v_tile = (torch.where(visible, x, 0) for x in (k_tile, v_tile))
    scores = (q_rows @ k_tile.mT).mul_(spec.scale)
    softcap_grad = kept = None
    if spec.softcap is not None:
        tanh_score = torch.tanh(scores / spec.softcap)
        scores, softcap_grad = spec.softcap * tanh_score, 1 - tanh_score.square()
    by_head = _by_head(scores, heads)  # [B, H, M, N], a view
    if extras.alibi_slopes is not None:
        slopes = extras.alibi_slopes.to(scores.dtype)
        if len(slopes) > 1:
            slopes = slopes[block.batch.flatten()]
        distance = tile.query + spec.offset(*block.seqlens) - tile.key
        by_head.sub_(slopes[:, :, None, None] * distance.abs())
    if tile.mask is not None and tile.mask.dtype != torch.bool:
        by_head.add_(tile.mask.to(scores.dtype))
    if tile.visible is not None:
        by_head.masked_fill_(~tile.visible, -torch.inf)
    if extras.dropout_seed is not None:
        head = torch.arange(heads, device=scores.device).view(-1, 1, 1)
        keep = philox.keep_mask(
            extras.dropout_seed, block.batch, head, tile.query, tile.key, spec.dropout_p
        )
        survival = 1 - spec.dropout_p
        kept = (keep.to(scores.dtype) / (survival or 1)).view_as(scores)
    return Scores(scores, softcap_grad, k_tile, v_tile, kept)


def _mask_tile(mask: Tensor, q_rows: slice, k_rows: slice) -> Tensor:
    """A view; dimensions of size 1 stay, so a mask is never expanded."""
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


def _ranges(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def _block_size(q: Tensor) -> int:
    """Queries and keys a tile: a power of two from 64 to 512, as :data:`SCORES_AT_ONCE` allows."""
    scores_per_head = SCORES_AT_ONCE // max(1, q.shape[0] * q.shape[1])
    return next((size for size in (512, 256, 128) if size * size <= scores_per_head), 64)


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
