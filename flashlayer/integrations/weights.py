"""Attention weights from the log-sum-exp, as ``nn.MultiheadAttention`` returns them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flashlayer.functional import dropout_keep_mask
from flashlayer.problem import has_autocast
from flashlayer.spec import is_observed

# Attention weights computed at once, over all heads: 16 MB in fp32.
WEIGHTS_AT_ONCE = 2**22


def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    average: bool,
    attn_mask: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor = 0,
) -> Tensor:
    """``exp(score - lse)``, ``(B, H, Sq, Sk)`` or averaged over heads ``(B, Sq, Sk)``.

    Computed a block of queries at a time and recomputed in the backward pass, so the memory besides
    the result is one block of :data:`WEIGHTS_AT_ONCE` elements. The number of blocks depends on
    sizes, so compilers get a custom op.

    Args:
        q: ``(B, H, Sq, D)``.
        k: ``(B, H, Sk, D)``.
        lse: ``(B, H, Sq)`` from :func:`flash_attention` with the same options.
        average: take the mean over the heads.
        attn_mask: as in :func:`flash_attention`.
        causal: top-left.
        dropout_p: probability that a weight is dropped; the rest are divided by ``1 - dropout_p``.
        dropout_seed: the one passed to :func:`flash_attention`.
    """
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    if not is_observed(q):
        return _by_blocks(q, k, lse, attn_mask, dropout_seed, average, causal, dropout_p)
    seed = None
    if dropout_p > 0:
        seed = torch.as_tensor(dropout_seed, dtype=torch.int64, device=q.device)
    return _weights_op(q, k, lse, attn_mask, seed, average, causal, dropout_p)


def _by_blocks(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    dropout_seed: Any,
    average: bool,
    causal: bool,
    dropout_p: float,
) -> Tensor:
    def of_rows(start: int, stop: int, q: Tensor, k: Tensor, lse: Tensor, mask: Any) -> Tensor:
        p, kept = _probabilities(start, stop, q, k, lse, mask, causal, dropout_p, dropout_seed)
        weights = p if kept is None else p * kept
        return (weights.mean(dim=1) if average else weights).to(q.dtype)

    blocks = list(_row_blocks(q, k))
    recompute = len(blocks) > 1 and torch.is_grad_enabled()
    parts: list[Any] = []
    for rows in blocks:
        block = (*rows, q, k, lse, attn_mask)
        if recompute:
            part = checkpoint(of_rows, *block, use_reentrant=False, preserve_rng_state=False)
            parts.append(part)
        else:
            parts.append(of_rows(*block))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _probabilities(
    start: int,
    stop: int,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    dropout_p: float,
    dropout_seed: Any,
) -> tuple[Tensor, Tensor | None]:
    """``exp(score - lse)`` of the queries ``[start, stop)``, and the factors of dropout."""
    q, lse = q[:, :, start:stop], lse[:, :, start:stop]
    # lse is of scores in its own dtype; autocast would compute these in a lower one.
    with _without_autocast(q):
        scores = (q.to(lse.dtype) @ k.to(lse.dtype).mT) * q.shape[-1] ** -0.5  # [B, H, M, Sk]
    if mask is not None:
        mask = _mask_rows(mask, start, stop)
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    if causal:
        query = torch.arange(start, stop, device=q.device)[:, None]
        later = torch.arange(k.shape[2], device=q.device) > query
        scores = scores.masked_fill(later, -torch.inf)
    # A row without a visible key has lse = -inf and only scores of -inf; -inf - -inf is NaN.
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1))
    if dropout_p == 0:
        return p, None
    batch, heads, rows, keys = scores.shape
    kept = dropout_keep_mask(
        batch, heads, rows, keys, dropout_p, dropout_seed, q.device, first_query=start
    )
    return p, kept / ((1 - dropout_p) or 1)


def _mask_rows(mask: Tensor, start: int, stop: int) -> Tensor:
    return mask if mask.shape[2] == 1 else mask[:, :, start:stop]


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    if has_autocast(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _row_blocks(q: Tensor, k: Tensor) -> Iterator[tuple[int, int]]:
    batch, heads, rows, _ = q.shape
    size = max(1, WEIGHTS_AT_ONCE // max(1, batch * heads * k.shape[2]))
    for start in range(0, max(rows, 1), size):
        yield start, min(start + size, rows)


@torch.library.custom_op("flashlayer::attention_weights", mutates_args=())
def _weights_op(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    dropout_seed: Tensor | None,
    average: bool,
    causal: bool,
    dropout_p: float,
) -> Tensor:
    weights = _by_blocks(q, k, lse, attn_mask, dropout_seed, average, causal, dropout_p)
    return weights.contiguous()


@_weights_op.register_fake
def _(q: Tensor, k: Tensor, lse: Tensor, mask: Any, seed: Any, average: bool, *rest: Any) -> Tensor:
    leading = q.shape[:1] if average else q.shape[:2]
    return q.new_empty(*leading, q.shape[2], k.shape[2])


@torch.library.custom_op("flashlayer::attention_weights_backward", mutates_args=())
def _weights_backward_op(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    dropout_seed: Tensor | None,
    average: bool,
    causal: bool,
    dropout_p: float,
    mask_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # dS = P * dP, the derivative of exp(S - lse), by hand: autograd does not record inside an op.
    dq, dlse = torch.empty_like(q), torch.empty_like(lse)
    dk = torch.zeros_like(k, dtype=lse.dtype)
    d_mask = None
    if mask_gradient and attn_mask is not None:
        d_mask = torch.zeros_like(attn_mask, dtype=lse.dtype)
    heads, scale = q.shape[1], q.shape[-1] ** -0.5
    for start, stop in _row_blocks(q, k):
        p, kept = _probabilities(start, stop, q, k, lse, attn_mask, causal, dropout_p, dropout_seed)
        dp = do[..., start:stop, :].to(lse.dtype)
        dp = dp.unsqueeze(1) / heads if average else dp
        ds = p * (dp if kept is None else dp * kept)  # [B, H, M, Sk]
        dq[:, :, start:stop] = ds @ k.to(lse.dtype) * scale
        dk += ds.mT @ q[:, :, start:stop].to(lse.dtype) * scale
        dlse[:, :, start:stop] = -ds.sum(dim=-1)
        if d_mask is not None:
            rows = _mask_rows(d_mask, start, stop)
            rows += ds.sum_to_size(rows.shape)
    grads = dq.contiguous(), dk.to(k.dtype).contiguous(), dlse.contiguous()
    if d_mask is None or attn_mask is None:
        return *grads, q.new_empty(0)
    return *grads, d_mask.to(attn_mask.dtype).contiguous()


@_weights_backward_op.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, lse: Tensor, attn_mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_mask = q.new_empty(0)
    if options[-1] and attn_mask is not None:
        d_mask = attn_mask.new_empty(attn_mask.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), lse.new_empty(lse.shape), d_mask


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.average, ctx.causal, ctx.dropout_p = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    wants_d_mask = ctx.needs_input_grad[3]
    options = (ctx.average, ctx.causal, ctx.dropout_p, wants_d_mask)
    dq, dk, dlse, d_mask = _weights_backward_op(do, *ctx.saved_tensors, *options)
    return dq, dk, dlse, d_mask if wants_d_mask else None, None, None, None, None


_weights_op.register_autograd(_backward, setup_context=_setup_context)
