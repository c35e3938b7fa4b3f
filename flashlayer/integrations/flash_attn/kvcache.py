"""``flash_attn_with_kvcache``, and attention to paged keys."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from flashlayer.functional import flash_attention_varlen
from flashlayer.integrations.flash_attn.checks import (
    Cache,
    WindowSize,
    attention_options,
    check_cache_arguments,
    check_cache_lengths,
    check_rotary,
    raises_runtime_error,
)
from flashlayer.integrations.flash_attn.layers.rotary import apply_rotary_emb
from flashlayer.modules.positions import sequence_ids


@raises_runtime_error
@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append new keys and values to a cache, in place, and attend to all of it. No gradient.

    A contiguous cache is read in place; a slice of a longer buffer, a paged cache and one that is
    indexed by ``cache_batch_idx`` are copied for the call, O(B * capacity).

    ``q`` ``(B, Sq, H, D)`` attends to the first ``cache_seqlens`` positions, an int or ``(B,)``,
    all if None, and to the new ones. ``k_cache`` and ``v_cache`` are ``(B, capacity, Hkv, D)``, or
    with ``block_table`` ``(B, blocks of a sequence)`` pages ``(blocks, page, Hkv, D)``.
    ``cache_batch_idx`` ``(B,)`` is the cache row of each query, ``cache_leftpad`` ``(B,)`` the
    number of positions to ignore at the start of each row.

    ``k`` and ``v`` ``(B, Snew, Hkv, D)`` are written to the cache from position ``cache_seqlens``
    on. ``rotary_cos`` and ``rotary_sin`` ``(positions, R / 2)`` need ``k``: they rotate it, and
    ``q``, by position before that. With ``causal`` or a window query ``i`` is at position
    ``cache_seqlens + i``, else every query at ``cache_seqlens``. ``rotary_interleaved`` pairs
    features 0 and 1 rather than ``i`` and ``i + R / 2``.

    ``num_splits`` is ignored; the rest is described in ``flash_attn_interface``'s docstring.

    Returns:
        ``(B, Sq, H, D)``; with ``return_softmax_lse`` also ``(B, H, Sq)``.

    Raises:
        ValueError: an argument that another one needs is missing, the cache or the block table is
            too short, or an index is out of range; a RuntimeError as well.
    """
    cache = Cache(k_cache, v_cache, cache_batch_idx, cache_leftpad, block_table)
    check_cache_arguments(q, cache, k, v, (rotary_cos, rotary_sin), cache_seqlens)
    batch, seqlen_q, heads, head_dim = q.shape
    page = k_cache.shape[1]
    capacity = page if block_table is None else page * block_table.shape[1]
    filled = capacity if cache_seqlens is None else cache_seqlens
    if not isinstance(filled, Tensor):
        filled = torch.full((batch,), filled, device=q.device)
    filled = filled.long()
    stop = filled if k is None else filled + k.shape[1]
    check_cache_lengths(cache, filled, stop)
    options = attention_options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    if k is not None and v is not None:
        if rotary_cos is not None and rotary_sin is not None:
            by_position = causal or options["window_size"] != (None, None)
            last = torch.maximum(stop, filled + seqlen_q) if by_position else stop
            check_rotary(rotary_cos, rotary_sin, last, head_dim)
            rotary = (rotary_cos, rotary_sin, rotary_interleaved, False, filled)
            k = apply_rotary_emb(k, *rotary)
            if by_position:
                q = apply_rotary_emb(q, *rotary)
            else:  # every query at one position: rotate them as heads of one token
                q = apply_rotary_emb(q.flatten(1, 2).unsqueeze(1), *rotary).view_as(q)
        _write(cache, k, v, filled)
    if block_table is not None:
        used = _used_blocks(block_table, stop, page)
        k_cache, v_cache = (x[used].flatten(1, 2) for x in (k_cache, v_cache))
    elif cache_batch_idx is not None:
        k_cache, v_cache = k_cache[cache_batch_idx], v_cache[cache_batch_idx]
    # The cache rows as packed sequences, three a row: what is before the first valid position and
    # after the last are sequences without queries.
    row = torch.arange(batch, device=q.device)
    start = torch.zeros_like(stop) if cache_leftpad is None else cache_leftpad
    k_edges = torch.stack((torch.zeros_like(stop), start, stop), dim=1) + capacity * row[:, None]
    q_edges = torch.stack((row, row, row + 1), dim=1) * seqlen_q
    if alibi_slopes is not None and alibi_slopes.ndim == 2:
        options["alibi_slopes"] = alibi_slopes.repeat_interleave(3, dim=0)
    out, lse = flash_attention_varlen(
        q.flatten(0, 1),
        k_cache.flatten(0, 1),
        v_cache.flatten(0, 1),
        cu_seqlens_q=_closed(q_edges, batch * seqlen_q),
        cu_seqlens_k=_closed(k_edges, batch * capacity),
        max_seqlen_q=seqlen_q,
        max_seqlen_k=capacity,
        return_lse=True,
        **options,
    )
    out = out.reshape(batch, seqlen_q, heads, -1)
    lse = lse.view(heads, batch, seqlen_q).transpose(0, 1).contiguous()
    return (out, lse) if return_softmax_lse else out


def _write(cache: Cache, k: Tensor, v: Tensor, filled: Tensor) -> None:
    """Write the new keys and values after the ``filled`` positions of each row, in place."""
    position = filled[:, None] + torch.arange(k.shape[1], device=k.device)  # [B, Snew]
    if cache.block_table is not None:
        page = cache.k.shape[1]
        row, position = cache.block_table.long().gather(1, position // page), position % page
    elif cache.batch_idx is not None:
        row = cache.batch_idx[:, None]
    else:
        row = torch.arange(len(k), device=k.device)[:, None]
    for held, new in ((cache.k, k), (cache.v, v)):
        # Inference tensors are written in inference mode; Dynamo can't trace is_inference().
        inference = not torch.compiler.is_compiling() and held.is_inference()
        with torch.inference_mode() if inference else nullcontext():
            held[row, position] = new


def packed_pages(pages: Tensor, block_table: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``(blocks, page, Hkv, D)`` to the packed ``(Tk, Hkv, D)``."""
    page, per_row = pages.shape[1], block_table.shape[1]
    # Without values to read, take as many tokens as the table holds; those past the last sequence
    # are ignored.
    readable = not isinstance(cu_seqlens, FakeTensor) and not torch.compiler.is_compiling()
    tokens = int(cu_seqlens[-1]) if readable else page * block_table.numel()
    token = torch.arange(tokens, device=pages.device)
    sequence = sequence_ids(token, cu_seqlens)
    inside = sequence < block_table.shape[0]
    sequence = torch.where(inside, sequence, 0)
    position = torch.where(inside, token - cu_seqlens[sequence], 0)
    used = _used_blocks(block_table, cu_seqlens.diff(), page)
    return pages[used[sequence, (position // page).clamp(max=per_row - 1)], position % page]


def _used_blocks(block_table: Tensor, lengths: Tensor, page: int) -> Tensor:
    """The table with 0 past the pages of a sequence, where it may hold any number."""
    start = page * torch.arange(block_table.shape[1], device=block_table.device)
    return torch.where(start < lengths[:, None], block_table, 0)


def _closed(edges: Tensor, total: int) -> Tensor:
    """``cu_seqlens`` from the starts of the sequences and the end of the last one."""
    return torch.cat((edges.flatten(), edges.new_full((1,), total))).to(torch.int32)
