"""Standard attention: the formula as it is written, O(Sq * Sk) memory.

It is differentiated by PyTorch's autograd. This is the oracle every other backend is judged by: it
defines masking by itself, shares no code with what it judges and never goes through our backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashlayer.spec import AttentionExtras, AttentionSpec, Problem

name = "standard"
backward = None  # PyTorch's autograd differentiates `forward`


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
    """``softmax(scale * q k^T) v``, every step in the dtype of the inputs.

    The LSE costs a pass over the scores of its own, so it is computed only where it is asked for.
    """
    group_size = q.shape[1] // k.shape[1]
    if group_size > 1:
        k, v = k.repeat_interleave(group_size, dim=1), v.repeat_interleave(group_size, dim=1)
    visible = _visible(spec, q.shape[2], k.shape[2], q.device)  # [Sq, Sk]
    row_sees_a_key, key_is_seen = _seen(spec, visible)
    if key_is_seen is not None:
        # 0 * NaN is NaN: what no query sees is taken out before it meets a product, in both passes.
        k, v = torch.where(key_is_seen, k, 0), torch.where(key_is_seen, v, 0)
    scores = (q @ k.transpose(-2, -1)) * spec.scale  # [B, H, Sq, Sk]
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    if row_sees_a_key is not None:
        # softmax(-inf, ..., -inf) is NaN, and so is its derivative: such a row becomes a finite one
        # here, and its results are overwritten below.
        scores = torch.where(row_sees_a_key, scores, 0)
    o = torch.softmax(scores, dim=-1) @ v
    lse = None
    if return_lse:
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = torch.logsumexp(scores.to(lse_dtype), dim=-1)
    if row_sees_a_key is not None:
        o = torch.where(row_sees_a_key, o, 0)
        lse = None if lse is None else torch.where(row_sees_a_key[:, 0], lse, -torch.inf)
    return o, lse


def _visible(
    spec: AttentionSpec, seqlen_q: int, seqlen_k: int, device: torch.device
) -> Tensor | None:
    """Bool ``(Sq, Sk)``, True where query i sees key j; None when every query sees every key."""
    if spec.window_left is None and spec.window_right is None:
        return None
    offset = seqlen_k - seqlen_q if spec.diagonal == "bottom_right" else 0
    i = torch.arange(seqlen_q, device=device)[:, None]
    j = torch.arange(seqlen_k, device=device)[None, :]
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if spec.window_left is not None:
        visible &= j >= i + offset - spec.window_left
    if spec.window_right is not None:
        visible &= j <= i + offset + spec.window_right
    return visible


def _seen(spec: AttentionSpec, visible: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Bool ``(Sq, 1)``, which queries see a key, and ``(Sk, 1)``, which keys are seen.

    None where that is all of them: then nothing is spent on guarding against the rest.
    """
    if visible is None:
        return None, None
    seqlen_q, seqlen_k = visible.shape
    offset = seqlen_k - seqlen_q if spec.diagonal == "bottom_right" else 0
    # The leftmost key in the window of the first query and of the last; then the rightmost.
    first_left, last_left = 0, 0
    first_right, last_right = seqlen_k - 1, seqlen_k - 1
    if spec.window_left is not None:
        first_left, last_left = offset - spec.window_left, seqlen_q - 1 + offset - spec.window_left
    if spec.window_right is not None:
        first_right, last_right = (
            offset + spec.window_right,
            seqlen_q - 1 + offset + spec.window_right,
        )
    every_row_sees = first_right >= 0 and last_left < seqlen_k
    every_key_is_seen = first_left <= 0 and last_right >= seqlen_k - 1
    return (
        None if every_row_sees else visible.any(dim=1)[:, None],
        None if every_key_is_seen else visible.any(dim=0)[:, None],
    )
