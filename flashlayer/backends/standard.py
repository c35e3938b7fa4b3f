"""Standard attention: the formula as it is written, O(Sq * Sk) memory.

The oracle that every other backend is tested against: it has its own masking, shares no code with
them except the dropout mask, and is differentiated by PyTorch's autograd, never by our backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashlayer import philox
from flashlayer.spec import AttentionExtras, AttentionSpec, Problem, is_sharded, without_autocast

name = "standard"
backward = None  # PyTorch's autograd differentiates `forward`


class Pairs(NamedTuple):
    """Positions and visibility of all pairs of a query and a key; they broadcast together."""

    batch: Tensor  # (B, 1, 1, 1), packed (1, 1, Tq, 1): batch entry, or number of the sequence
    query: Tensor  # (Sq, 1): position in its sequence
    key: Tensor  # (1, Sk): position in its sequence
    distance: Tensor  # (Sq, Sk): i + offset - j
    visible: Tensor | None  # bool, (Sq, Sk) or the mask's shape; None if every key is visible
    in_sequence: Tensor | None  # bool, (Sq, 1), packed only: the query belongs to a sequence


def refuses(problem: Problem) -> str | None:
    """A reason for sharded tensors; the formula covers every other call."""
    if is_sharded(problem.query):
        return "its operations mix positions, which are plain tensors, with DTensors"
    return None


@without_autocast
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    extras: AttentionExtras,
    return_lse: bool = True,
) -> tuple[Tensor | None, ...]:
    """``dropout(softmax(scores)) v``, every step in the dtype of the inputs.

    The LSE is another pass over the scores, so it is computed only if asked for, as the rest.
    """
    group_size = q.shape[1] // k.shape[1]
    if group_size > 1:
        k, v = k.repeat_interleave(group_size, dim=1), v.repeat_interleave(group_size, dim=1)
    if k.shape[2] == 0:
        q, k, v, extras = _with_hidden_key(q, k, v, extras)
    pairs = _pairs(q, k, spec, extras)
    if pairs.in_sequence is not None:
        q = torch.where(pairs.in_sequence, q, 0)  # a token past the last sequence may hold NaN
    live_rows, visible_keys = _live(spec, extras, pairs)
    if visible_keys is not None:
        # 0 * NaN is NaN: zero the keys hidden from every query, for the products of both passes.
        k, v = torch.where(visible_keys, k, 0), torch.where(visible_keys, v, 0)
    scores = (q @ k.transpose(-2, -1)) * spec.scale  # [B, H, Sq, Sk]
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if extras.alibi_slopes is not None:
        slopes = extras.alibi_slopes[:, :, None, None]  # [B or 1, H, 1, 1]
        slopes = slopes.to(torch.promote_types(slopes.dtype, scores.dtype))
        if extras.cu_seqlens_q is not None and slopes.shape[0] > 1:  # packed: for each token
            slopes = slopes[pairs.batch.flatten(), :, 0].permute(2, 1, 0).unsqueeze(-1)
        scores = scores - (slopes * pairs.distance.abs()).to(scores.dtype)
    if extras.attn_mask is not None and extras.attn_mask.dtype != torch.bool:
        scores = scores + extras.attn_mask.to(scores.dtype)
    if pairs.visible is not None:
        scores = scores.masked_fill(~pairs.visible, -torch.inf)
    if live_rows is not None:
        # softmax(-inf, ..., -inf) and its derivative are NaN: make such rows finite here, overwrite
        # their results below.
        scores = torch.where(live_rows, scores, 0)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    max_scores = entropy = None
    if spec.max_scores:
        max_scores = scores.detach().amax(dim=-1).to(wide)
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
        lse = torch.logsumexp(scores.to(wide), dim=-1)
    if spec.entropy:
        log_p = torch.log_softmax(scores.to(wide), dim=-1)
        # p log p is 0 where p is; its derivative is not finite there.
        there = log_p > -torch.inf
        entropy = torch.where(there, -log_p.exp() * torch.where(there, log_p, 0), 0).sum(dim=-1)
    if live_rows is not None:
        o, live_rows = torch.where(live_rows, o, 0), live_rows.squeeze(-1)
        lse = None if lse is None else torch.where(live_rows, lse, -torch.inf)
        entropy = None if entropy is None else torch.where(live_rows, entropy, 0)
        max_scores = None if max_scores is None else torch.where(live_rows, max_scores, -torch.inf)
    return o, lse, *spec.asked(max_scores, entropy)


def _with_hidden_key(
    q: Tensor, k: Tensor, v: Tensor, extras: AttentionExtras
) -> tuple[Tensor, Tensor, Tensor, AttentionExtras]:
    """A call without keys as one of a key that no query sees: softmax of nothing has no derivative.

    ``q`` becomes 0: it reaches no result, whatever it holds.
    """
    hidden = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=q.device)
    q, (k, v) = torch.where(hidden, q, 0), (pad(x, (0, 0, 0, 1)) for x in (k, v))
    mask = extras.attn_mask
    if mask is not None and mask.dtype != torch.bool:  # may have a gradient
        hidden = pad(mask.expand(*mask.shape[:3], 0), (0, 1), value=-torch.inf)
    return q, k, v, extras._replace(attn_mask=hidden, intervals=None)


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
        # Tokens past the last sequence belong to none, and no key is visible to them.
        in_sequence = (q_sequence < len(q_lengths))[:, None]
        same_sequence = (q_sequence[:, None] == k_sequence) & in_sequence
        batch = q_sequence.clamp(max=max(len(q_lengths) - 1, 0)).view(1, 1, -1, 1)
        offset = (k_lengths - q_lengths)[batch.flatten()][:, None] if len(q_lengths) else 0
    if spec.diagonal == "top_left":
        offset = 0
    query, key = query[:, None], key[None, :]
    distance = query + offset - key
    conditions = []
    if spec.window_left is not None:
        conditions.append(distance <= spec.window_left)
    if spec.window_right is not None:
        conditions.append(distance >= -spec.window_right)
    if same_sequence is not None:
        conditions.append(same_sequence)
    mask = extras.attn_mask
    if mask is not None:
        conditions.append(mask if mask.dtype == torch.bool else mask != -torch.inf)
    if extras.intervals is not None:
        starts, stops = extras.intervals[:, :, ::2, None], extras.intervals[:, :, 1::2, None]
        conditions.append(((query >= starts) & (query < stops)).any(dim=2))  # of [B, H, n, Sq, Sk]
    visible = conditions[0] if conditions else None
    for condition in conditions[1:]:
        visible = visible & condition
    return Pairs(batch, query, key, distance, visible, in_sequence)


def _unpack(token: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each token its sequence and its position there; for each sequence its length."""
    cu_seqlens = cu_seqlens.long()
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    return sequence, token - cu_seqlens[sequence], cu_seqlens.diff()


def _live(
    spec: AttentionSpec, extras: AttentionExtras, pairs: Pairs
) -> tuple[Tensor | None, Tensor | None]:
    """Bool ``(..., Sq, 1)``, rows with a key or sink; ``(..., Sk, 1)``, keys visible to a query.

    None where that is all of them, so that :func:`forward` skips the guards.
    """
    visible = pairs.visible
    if visible is None:
        return None, None
    rows, keys = visible.any(dim=-1).unsqueeze(-1), visible.any(dim=-2).unsqueeze(-1)
    if extras.attn_mask is extras.intervals is extras.cu_seqlens_q is None:
        all_rows, all_keys = _window_covers(spec, *visible.shape)
        rows, keys = None if all_rows else rows, None if all_keys else keys
    if rows is not None and extras.sinks is not None:
        rows = rows | (extras.sinks > -torch.inf).view(1, -1, 1, 1)
        rows = rows if pairs.in_sequence is None else rows & pairs.in_sequence
    return rows, keys


def _window_covers(spec: AttentionSpec, seqlen_q: int, seqlen_k: int) -> tuple[bool, bool]:
    """Of a dense problem: whether every query has a visible key, and every key a query."""
    offset = seqlen_k - seqlen_q if spec.diagonal == "bottom_right" else 0
    left = seqlen_q + seqlen_k if spec.window_left is None else spec.window_left
    right = seqlen_q + seqlen_k if spec.window_right is None else spec.window_right
    return (
        offset + right >= 0 and seqlen_q - 1 + offset - left < seqlen_k,
        offset - left <= 0 and seqlen_q - 1 + offset + right >= seqlen_k - 1,
    )
