"""Decoding: one query over many keys, split over the keys and merged by LSE (Flash-Decoding).

A step of one token has only B * H programs, too few to fill a GPU. Its keys are cut into parts that
run side by side; a finished part is one key of score ``lse`` and value ``o``, so the parts are
merged by one more step of the online softmax (:mod:`flashlayer.online_softmax`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flashlayer import online_softmax
from flashlayer.spec import NO_EXTRAS, AttentionExtras, AttentionSpec

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
    if q.is_cpu or longest_q != 1:
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
    wanted = PROGRAMS_TO_FILL_A_GPU // max(1, sequences * q.shape[1])
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
    """The results of ``forward`` for sequences of one query, from ``splits`` parts of each.

    Args:
        forward: a backend's.
        q: as :func:`num_splits`'s, as all tensors and options.
        k: likewise.
        v: likewise.
        spec: likewise.
        extras: likewise.
        splits: number of parts.
    """
    spec = replace(spec, window_right=None)
    cu_q, cu_k = extras.cu_seqlens_q, extras.cu_seqlens_k
    if cu_q is not None and cu_k is not None:
        values, scores, *more = _packed_parts(forward, q, k, v, spec, (cu_q, cu_k), splits)
    else:
        values, scores, *more = _dense_parts(forward, q, k, v, spec, splits)
    scores = scores.unsqueeze(-2)  # [B, H, Sq, 1, parts]: every query has values of its own
    rows = scores.shape[:-1]
    state = online_softmax.init_state(
        rows, value_dim=v.shape[3], dtype=scores.dtype, device=q.device
    )
    state = online_softmax.update(state, scores, values.to(scores.dtype))
    entropies = more[-1].unsqueeze(-2) if spec.entropy else None
    if extras.sinks is not None:
        sink = extras.sinks.to(scores.dtype).view(-1, 1, 1).expand(rows)
        if cu_q is not None:  # tokens past the last sequence have no sink
            token = torch.arange(q.shape[2], device=q.device)
            sink = torch.where(token[:, None] < cu_q[-1], sink, -torch.inf)
        state = online_softmax.merge(
            state, online_softmax.state_of(torch.zeros_like(state.o), sink)
        )
        if entropies is not None:  # one more part, of one key
            scores = torch.cat((scores, sink.unsqueeze(-1)), dim=-1)
            entropies = torch.cat((entropies, torch.zeros_like(sink).unsqueeze(-1)), dim=-1)
    o, lse = online_softmax.finalize(state), online_softmax.lse(state)
    max_scores = more[0].amax(dim=-1) if spec.max_scores else None
    if entropies is not None:
        entropies = online_softmax.merge_entropies(entropies, scores, lse).squeeze(-1)
    return o.squeeze(-2).to(q.dtype), lse.squeeze(-1), *spec.asked(max_scores, entropies)


def _dense_parts(
    forward: Forward,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    splits: int,
) -> tuple[Tensor, ...]:
    """Parts as the batch, batch and heads as the heads; the keys left over are one more part."""
    batch, heads = q.shape[:2]
    length = k.shape[2] // splits
    q_parts = q.flatten(0, 1).expand(splits, -1, -1, -1)  # [parts, B H, 1, D]
    results = forward(
        q_parts, _as_parts(k, splits, length), _as_parts(v, splits, length), spec, NO_EXTRAS
    )
    # [B, H, 1, parts, Dv] and [B, H, 1, parts]
    parts = tuple(x.unflatten(1, (batch, heads)).movedim(0, 3) for x in results)
    if splits * length < k.shape[2]:
        k_rest, v_rest = (x[:, :, splits * length :] for x in (k, v))
        rest = forward(q, k_rest, v_rest, spec, NO_EXTRAS)
        parts = tuple(
            torch.cat((x, y.unsqueeze(3)), dim=3) for x, y in zip(parts, rest, strict=True)
        )
    return parts


def _as_parts(x: Tensor, splits: int, length: int) -> Tensor:
    """A view ``(parts, B Hkv, length, D)``."""
    return x[:, :, : splits * length].unflatten(2, (splits, length)).movedim(2, 0).flatten(1, 2)


def _packed_parts(
    forward: Forward,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    edges: tuple[Tensor, Tensor],
    splits: int,
) -> tuple[Tensor, ...]:
    """Every sequence as ``splits`` sequences: its query repeated, its keys in even parts."""
    part = torch.arange(splits, device=q.device)
    cut = []
    for cu_seqlens in (edges[0].long() * splits, edges[1].long()):
        starts = cu_seqlens[:-1, None] + cu_seqlens.diff()[:, None] * part // splits
        cut.append(torch.cat((starts.flatten(), cu_seqlens[-1:])).int())
    spec = replace(spec, max_seqlen_k=-(-(spec.max_seqlen_k or 0) // splits))
    parts = AttentionExtras(cu_seqlens_q=cut[0], cu_seqlens_k=cut[1])
    results = forward(q.repeat_interleave(splits, dim=2), k, v, spec, parts)
    return tuple(x.unflatten(2, (-1, splits)) for x in results)
