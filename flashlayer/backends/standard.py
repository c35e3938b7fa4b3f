"""Standard attention: the formula as it is written, O(Sq * Sk) memory.

It is differentiated by PyTorch's autograd. This is the oracle every other backend is judged by: it
defines masking by itself, shares no code with what it judges (but the dropout mask, which is a
definition) and never goes through our backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashlayer import philox
from flashlayer.spec import AttentionExtras, AttentionSpec, Problem

name = "standard"
backward = None  # PyTorch's autograd differentiates `forward`


class Pairs(NamedTuple):
    """What the formula needs to know of each pair of a query and a key; all broadcast together."""

    batch: Tensor  # (B, 1, 1, 1), packed (1, 1, Tq, 1): which sequence
    query: Tensor  # (Sq, 1): position of the query in its sequence
    key: Tensor  # (1, Sk): position of the key in its sequence
    distance: Tensor  # (Sq, Sk): position of the key minus the position the query stands at
    visible: Tensor | None  # bool, (Sq, Sk) or the mask's shape; None if all see everything
    in_sequence: Tensor | None  # bool, (Sq, 1): packed, whether the query belongs to a sequence


def refuses(problem: Problem) -> str | None:
    """None: the formula covers every call."""
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    extras: AttentionExtras,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """``dropout(softmax(scores)) v``, every step in the dtype of the inputs.

    The LSE costs a pass over the scores of its own, so it is computed only where it is asked for.
    """
    group_size = q.shape[1] // k.shape[1]
    if group_size > 1:
        k, v = k.repeat_interleave(group_size, dim=1), v.repeat_interleave(group_size, dim=1)
    pairs = _pairs(q, k, spec, extras)
    if pairs.in_sequence is not None:
        q = torch.where(pairs.in_sequence, q, 0)  # a token past the last sequence may hold NaN
    row_sees_a_key, key_is_seen = _seen(spec, extras, pairs)
    if key_is_seen is not None:
        # 0 * NaN is NaN: what no query sees is taken out before it meets a product, in both passes.
        k, v = torch.where(key_is_seen, k, 0), torch.where(key_is_seen, v, 0)
    scores = (q @ k.transpose(-2, -1)) * spec.scale  # [B, H, Sq, Sk]
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if extras.alibi_slopes is not None:
        slopes = extras.alibi_slopes[:, :, None, None]  # [B or 1, H, 1, 1]
        slopes = slopes.to(torch.promote_types(slopes.dtype, scores.dtype))
        if extras.cu_seqlens_q is not None and slopes.shape[0] > 1:  # packed: one for each token
            slopes = slopes[pairs.batch.flatten(), :, 0].permute(2, 1, 0).unsqueeze(-1)
        scores = scores - (slopes * pairs.distance.abs()).to(scores.dtype)
    if extras.attn_mask is not None and extras.attn_mask.dtype != torch.bool:
        scores = scores + extras.attn_mask.to(scores.dtype)
    if pairs.visible is not None:
        scores = scores.masked_fill(~pairs.visible, -torch.inf)
    if row_sees_a_key is not None:
        # softmax(-inf, ..., -inf) is NaN, and so is its derivative: such a row becomes a finite
        # one here, and its results are overwritten below.
        scores = torch.where(row_sees_a_key, scores, 0)
    if extras.sinks is not None:
        sinks = extras.sinks.to(scores.dtype).view(1, -1, 1, 1)
        scores = torch.cat((scores, sinks.expand(*scores.shape[:3], 1)), dim=-1)
    probabilities = torch.softmax(scores, dim=-1)
    if extras.sinks is not None:
        probabilities = probabilities[..., :-1]
    if extras.dropout_seed is not None:
        head = torch.arange(q.shape[1], device=q.device).view(-1, 1, 1)
        kept = philox.keep_mask(
            extras.dropout_seed, pairs.batch, head, pairs.query, pairs.key, spec.dropout_p
        )
        survival = 1 - spec.dropout_p
        probabilities = torch.where(kept, probabilities, 0) / (survival or 1)
    o = probabilities @ v
    lse = None
    if return_lse:
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = torch.logsumexp(scores.to(lse_dtype), dim=-1)
    if row_sees_a_key is not None:
        o = torch.where(row_sees_a_key, o, 0)
        lse = None if lse is None else torch.where(row_sees_a_key.squeeze(-1), lse, -torch.inf)
    return o, lse


def _pairs(q: Tensor, k: Tensor, spec: AttentionSpec, extras: AttentionExtras) -> Pairs:
    query = torch.arange(q.shape[2], device=q.device)
    key = torch.arange(k.shape[2], device=q.device)
    same_sequence = in_sequence = None
    if extras.cu_seqlens_q is None or extras.cu_seqlens_k is None:
        batch = torch.arange(q.shape[0], device=q.device).view(-1, 1, 1, 1)
        offset = k.shape[2] - q.shape[2]
    else:
        q_sequence, query, q_lengths = _unpack(query, extras.cu_seqlens_q)
        k_sequence, key, k_lengths = _unpack(key, extras.cu_seqlens_k)
        # A token past the last sequence belongs to none, and sees none of its kind.
        in_sequence = (q_sequence < len(q_lengths))[:, None]
        same_sequence = (q_sequence[:, None] == k_sequence) & in_sequence
        batch = q_sequence.clamp(max=max(len(q_lengths) - 1, 0)).view(1, 1, -1, 1)
        offset = (k_lengths - q_lengths)[batch.flatten()][:, None] if len(q_lengths) else 0
    if spec.diagonal == "top_left":
        offset = 0
    query, key = query[:, None], key[None, :]
    distance = key - (query + offset)
    conditions = []
    if spec.window_left is not None:
        conditions.append(distance >= -spec.window_left)
    if spec.window_right is not None:
        conditions.append(distance <= spec.window_right)
    if same_sequence is not None:
        conditions.append(same_sequence)
    mask = extras.attn_mask
    if mask is not None:
        conditions.append(mask if mask.dtype == torch.bool else mask != -torch.inf)
    visible = conditions[0] if conditions else None
    for condition in conditions[1:]:
        visible = visible & condition
    return Pairs(batch, query, key, distance, visible, in_sequence)


def _unpack(token: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each token its sequence and its position in it; and the length of each sequence."""
    cu_seqlens = cu_seqlens.long()
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    return sequence, token - cu_seqlens[sequence], cu_seqlens.diff()


def _seen(
    spec: AttentionSpec, extras: AttentionExtras, pairs: Pairs
) -> tuple[Tensor | None, Tensor | None]:
    """Bool ``(..., Sq, 1)``, queries that see a key or sink; ``(..., Sk, 1)``, keys that are seen.

    None where that is all of them: then nothing is spent on guarding against the rest.
    """
    visible = pairs.visible
    if visible is None:
        return None, None
    rows, keys = visible.any(dim=-1).unsqueeze(-1), visible.any(dim=-2).unsqueeze(-1)
    if extras.attn_mask is None and extras.cu_seqlens_q is None:  # the band alone: known beforehand
        all_rows, all_keys = _band_covers(spec, *visible.shape)
        rows, keys = None if all_rows else rows, None if all_keys else keys
    if rows is not None and extras.sinks is not None:
        rows = rows | (extras.sinks > -torch.inf).view(1, -1, 1, 1)
        rows = rows if pairs.in_sequence is None else rows & pairs.in_sequence
    return rows, keys


def _band_covers(spec: AttentionSpec, seqlen_q: int, seqlen_k: int) -> tuple[bool, bool]:
    """Whether every query of a dense problem sees a key, and whether every key is seen."""
    offset = seqlen_k - seqlen_q if spec.diagonal == "bottom_right" else 0
    left = seqlen_q + seqlen_k if spec.window_left is None else spec.window_left
    right = seqlen_q + seqlen_k if spec.window_right is None else spec.window_right
    return (
        offset + right >= 0 and seqlen_q - 1 + offset - left < seqlen_k,
        offset - left <= 0 and seqlen_q - 1 + offset + right >= seqlen_k - 1,
    )
