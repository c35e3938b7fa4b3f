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
    parts = parts_of(q, k, v, spec, extras, splits)
    results = forward(*parts)
    if extras.cu_seqlens_q is not None:
        values, scores, *more = (x.unflatten(2, (-1, splits)) for x in results)
    else:
        # [B, H, 1, parts, Dv] and [B, H, 1, parts]
        results = (x.unflatten(1, q.shape[:2]).movedim(0, 3) for x in results)
        values, scores, *more = _with_rest(forward, q, k, v, parts.spec, splits, tuple(results))
    scores = scores.unsqueeze(-2)  # [B, H, Sq, 1, parts]: every query has values of its own
    rows = scores.shape[:-1]
    state = online_softmax.init_state(
        rows, value_dim=v.shape[3], dtype=scores.dtype, device=q.device
    )
    state = online_softmax.update(state, scores, values.to(scores.dtype))
    entropies = more[-1].unsqueeze(-2) if spec.entropy else None
    if extras.sinks is not None:
        sink = extras.sinks.to(scores.dtype).view(-1, 1, 1).expand(rows)
        if extras.cu_seqlens_q is not None:  # tokens past the last sequence have no sink
            token = torch.arange(q.shape[2], device=q.device)
            sink = torch.where(token[:, None] < extras.cu_seqlens_q[-1], sink, -torch.inf)
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


def parts_of(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras, splits: int
) -> Problem:
    """All parts as one problem, which :func:`split_forward` gives to its ``forward``.

    Dense parts are the batch, batch and heads the heads; what is left over is one more part. A
    packed sequence becomes ``splits`` sequences: its query repeated, its keys in even parts.
    """
    spec = replace(spec, window_right=None)
    cu_q, cu_k = extras.cu_seqlens_q, extras.cu_seqlens_k
    if cu_q is None or cu_k is None:
        length = k.shape[2] // splits
        q_parts = q.flatten(0, 1).expand(splits, -1, -1, -1)  # [parts, B H, 1, D]
        k_parts, v_parts = (_as_parts(x, splits, length) for x in (k, v))
        return Problem(q_parts, k_parts, v_parts, spec, NO_EXTRAS)
    part = torch.arange(splits, device=q.device)
    cut = []
    for cu_seqlens in (cu_q.long() * splits, cu_k.long()):
        starts = cu_seqlens[:-1, None] + cu_seqlens.diff()[:, None] * part // splits
        cut.append(torch.cat((starts.flatten(), cu_seqlens[-1:])).int())
    spec = replace(spec, max_seqlen_k=-(-(spec.max_seqlen_k or 0) // splits))
    packing = AttentionExtras(cu_seqlens_q=cut[0], cu_seqlens_k=cut[1])
    return Problem(q.repeat_interleave(splits, dim=2), k, v, spec, packing)


def _as_parts(x: Tensor, splits: int, length: int) -> Tensor:
    """A view ``(parts, B Hkv, length, D)``."""
    return x[:, :, : splits * length].unflatten(2, (splits, length)).movedim(2, 0).flatten(1, 2)


def _with_rest(
    forward: Forward,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    splits: int,
    parts: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """The results of the even parts with those of the keys left over, as one more part."""
    start = k.shape[2] // splits * splits
    if start == k.shape[2]:
        return parts
    rest = forward(q, k[:, :, start:], v[:, :, start:], spec, NO_EXTRAS)
    return tuple(torch.cat((x, y.unsqueeze(3)), dim=3) for x, y in zip(parts, rest, strict=True))
