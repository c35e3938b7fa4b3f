"""Decoding: one query over many keys, split over the keys and merged by LSE (Flash-Decoding).

A step of one token has only B * Hkv programs, too few to fill a GPU. Its keys are cut into parts
that run side by side and are merged by their LSE. The query heads that share a kv head are the
queries of one sequence, so that each key is loaded once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flashlayer.spec import NO_EXTRAS, AttentionExtras, AttentionSpec, Problem

# Keys are split until there are this many programs, into parts no shorter than MIN_SPLIT keys.
PROGRAMS_TO_FILL_A_GPU = 256
MIN_SPLIT = 256

Forward = Callable[[Tensor, Tensor, Tensor, AttentionSpec, AttentionExtras], tuple[Tensor, ...]]


def num_splits(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
) -> int:
    """How many parts to split the keys into; 1 for a call that is not split.

    Args:
        q: ``(B, H, Sq, D)``; packed ``(1, H, T, D)``, with ``spec.max_seqlen_q`` and ``_k`` known.
        k: ``(B, Hkv, Sk, D)``.
        v: ``(B, Hkv, Sk, Dv)``.
        spec: options. A window and ALiBi count positions from the end of all keys: not split.
        extras: tensors of the options; a mask and dropout are not split either.
    """
    cu_seqlens = extras.cu_seqlens_q
    packed = cu_seqlens is not None
    longest_q = spec.max_seqlen_q if packed else q.shape[2]
    if q.is_cpu or longest_q != 1 or q.numel() == 0:
        return 1
    whole = (extras.attn_mask, extras.intervals, extras.alibi_slopes, extras.dropout_seed)
    plain = all(x is None for x in whole)
    # Aligned at the end, all keys of a packed sequence are visible to its one query.
    aligned = packed and spec.diagonal == "bottom_right"
    if not plain or spec.window_left is not None or not (spec.window_right is None or aligned):
        return 1
    if cu_seqlens is not None:
        # Of one query each: those beyond the queries are empty, as two of three in a kvcache are.
        longest_k, sequences = spec.max_seqlen_k or 0, min(len(cu_seqlens) - 1, q.shape[2])
    elif any(x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1) for x in (k, v)):
        return 1  # batch and heads can't be viewed as one dimension
    else:
        longest_k, sequences = k.shape[2], q.shape[0]
    wanted = PROGRAMS_TO_FILL_A_GPU // max(1, sequences * k.shape[1])
    return max(1, min(wanted, longest_k // MIN_SPLIT))


def split_forward(
    forward: Forward,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    extras: AttentionExtras,
    splits: int,
) -> tuple[Tensor, ...]:
    """The results of ``forward`` for ``splits`` parts of the keys of each sequence of one query.

    Args:
        forward: a backend's.
        q: as :func:`num_splits`'s, as all tensors and options.
        k: likewise.
        v: likewise.
        spec: likewise.
        extras: likewise; sinks are left for whoever merges the parts.
        splits: number of parts.

    Returns:
        Outputs ``(B, Hkv, group, Sq, parts, Dv)``, LSE ``(B, Hkv, group, Sq, parts)`` and the other
        results that ``spec`` asks for, likewise, where ``group`` is the number of query heads that
        share a kv head. All lie in memory in the same order.
    """
    parts = parts_of(q, k, v, spec, extras, splits)
    results = (x.contiguous() for x in forward(*parts))
    batch, kv_heads, seqlen, _ = k.shape
    group = q.shape[1] // kv_heads
    if extras.cu_seqlens_q is not None:  # [1, Hkv, T parts group, Dv] and [1, Hkv, T parts group]
        return tuple(x.unflatten(2, (-1, splits, group)).movedim(4, 2) for x in results)
    # [parts, B Hkv, group, Dv] and [parts, B Hkv, group]
    arranged = tuple(x.unflatten(1, (batch, kv_heads)).movedim(0, 3).unsqueeze(3) for x in results)
    done = parts.key.shape[2] * splits
    if done == seqlen:
        return arranged
    # The keys that are left over are one more part.
    grouped = q.reshape(batch, kv_heads, group, -1)
    rest = forward(grouped, k[:, :, done:], v[:, :, done:], parts.spec, NO_EXTRAS)
    rest = (x.unsqueeze(3).unsqueeze(3) for x in rest)
    return tuple(torch.cat(pair, dim=4).contiguous() for pair in zip(arranged, rest, strict=True))


def parts_of(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras, splits: int
) -> Problem:
    """All parts as one problem, which :func:`split_forward` gives to its ``forward``.

    The query heads that share a kv head are the queries of one sequence. Dense parts are the batch,
    batch and kv heads the heads; what is left over is one more part. A packed sequence becomes
    ``splits`` sequences: its queries repeated, its keys in even parts.
    """
    spec = replace(spec, window_right=None)
    cu_q, cu_k = extras.cu_seqlens_q, extras.cu_seqlens_k
    kv_heads = k.shape[1]
    grouped = q.unflatten(1, (kv_heads, -1)).movedim(2, 3)  # [B, Hkv, Sq, group, D]
    if cu_q is None or cu_k is None:
        length = k.shape[2] // splits
        q_parts = grouped.squeeze(2).flatten(0, 1).expand(splits, -1, -1, -1)
        k_parts, v_parts = (_as_parts(x, splits, length) for x in (k, v))
        return Problem(q_parts, k_parts, v_parts, spec, NO_EXTRAS)
    group = grouped.shape[3]
    part = torch.arange(splits, device=q.device)
    cut = []
    for cu_seqlens in (cu_q.long() * (splits * group), cu_k.long()):
        starts = cu_seqlens[:-1, None] + cu_seqlens.diff()[:, None] * part // splits
        cut.append(torch.cat((starts.flatten(), cu_seqlens[-1:])).int())
    longest_k = -(-(spec.max_seqlen_k or 0) // splits)
    spec = replace(spec, max_seqlen_q=group, max_seqlen_k=longest_k)
    packing = AttentionExtras(cu_seqlens_q=cut[0], cu_seqlens_k=cut[1])
    repeated = grouped.unsqueeze(3).expand(-1, -1, -1, splits, -1, -1).flatten(2, 4)
    return Problem(repeated, k, v, spec, packing)


def _as_parts(x: Tensor, splits: int, length: int) -> Tensor:
    """A view ``(parts, B Hkv, length, D)``."""
    return x[:, :, : splits * length].unflatten(2, (splits, length)).movedim(2, 0).flatten(1, 2)
