"""Attention weights from the log-sum-exp, as ``nn.MultiheadAttention`` returns them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flashlayer._ops import add_op_namespace_prefix
from flashlayer.functional import dropout_keep_mask
from flashlayer.spec import is_observed, without_autocast

# Attention weights computed at once, over all heads: 16 MB in fp32.
WEIGHTS_AT_ONCE = 2**22


class Options(NamedTuple):
    """What the blocks have in common besides the tensors, in the order of the custom ops."""

    dropout_seed: Any
    average: bool
    causal: bool
    dropout_p: float


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

    ``q`` ``(B, H, Sq, D)``, ``k`` ``(B, H, Sk, D)`` and the options are those of the call of
    :func:`flash_attention` that gave ``lse`` ``(B, H, Sq)``; ``causal`` is top-left.
    """
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    seed: Any = dropout_seed
    if is_observed(q):
        seed = None if dropout_p == 0 else torch.as_tensor(seed, dtype=torch.int64, device=q.device)
        return _weights_op(q, k, lse, attn_mask, seed, average, causal, dropout_p)
    return _by_blocks(q, k, lse, attn_mask, Options(seed, average, causal, dropout_p))


def _by_blocks(q: Tensor, k: Tensor, lse: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    def of_rows(rows: slice, q: Tensor, k: Tensor, lse: Tensor, mask: Tensor | None) -> Tensor:
        p, kept = _probabilities(rows, q, k, lse, mask, options)
        weights = p if kept is None else p * kept
        return (weights.mean(dim=1) if options.average else weights).to(q.dtype)

    tensors = (q, k, lse, mask)
    blocks = _row_blocks(q, k)
    if len(blocks) == 1:
        return of_rows(blocks[0], *tensors)
    if not torch.is_grad_enabled():
        return torch.cat([of_rows(rows, *tensors) for rows in blocks], dim=-2)
    recomputed: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    parts: list[Any] = [checkpoint(of_rows, rows, *tensors, **recomputed) for rows in blocks]
    return torch.cat(parts, dim=-2)


class _Product(torch.autograd.Function):
    """``apply(a, b)``: ``a @ b`` without autocast, and its derivatives, whenever they are taken."""

    generate_vmap_rule = True

    @staticmethod
    @without_autocast
    def forward(a: Tensor, b: Tensor) -> Tensor:
        """The product."""
        return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keep the factors."""
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, Any]:
        """Two products."""
        a, b = ctx.saved_tensors
        return _Product.apply(grad, b.mT), _Product.apply(a.mT, grad)

    @staticmethod
    def jvp(ctx: Any, a_tangent: Tensor, b_tangent: Tensor) -> Any:
        """The product rule."""
        a, b = ctx.saved_tensors
        return _Product.apply(a_tangent, b) + _Product.apply(a, b_tangent)


def _probabilities(
    rows: slice, q: Tensor, k: Tensor, lse: Tensor, mask: Tensor | None, options: Options
) -> tuple[Tensor, Tensor | None]:
    """``exp(score - lse)`` of some queries, and the factors of dropout."""
    q, lse = q[:, :, rows], lse[:, :, rows]
    # lse is of scores in its own dtype; autocast would compute these in a lower one.
    product = _Product.apply(q.to(lse.dtype), k.to(lse.dtype).mT)  # [B, H, M, Sk]
    scores: Tensor = product * q.shape[-1] ** -0.5
    if mask is not None:
        mask = _mask_rows(mask, rows)
        added = mask.dtype != torch.bool
        scores = scores + mask if added else scores.masked_fill(~mask, -torch.inf)
    if options.causal:
        query = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
        later = torch.arange(k.shape[2], device=q.device) > query
        scores = scores.masked_fill(later, -torch.inf)
    # A row without a visible key has lse = -inf and only scores of -inf; -inf - -inf is NaN.
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1))
    dropout_p, seed = options.dropout_p, options.dropout_seed
    if dropout_p == 0:
        return p, None
    batch, heads, count, keys = scores.shape
    sizes = (batch, heads, count, keys)
    kept = dropout_keep_mask(*sizes, dropout_p, seed, q.device, first_query=rows.start)
    return p, kept / ((1 - dropout_p) or 1)


def _mask_rows(mask: Tensor, rows: slice) -> Tensor:
    return mask if mask.shape[2] == 1 else mask[:, :, rows]


def _row_blocks(q: Tensor, k: Tensor) -> list[slice]:
    batch, heads, rows, _ = q.shape
    size = max(1, WEIGHTS_AT_ONCE // max(1, batch * heads * k.shape[2]))
    return [slice(start, min(start + size, rows)) for start in range(0, max(rows, 1), size)]


@torch.library.custom_op(add_op_namespace_prefix("attention_weights"), mutates_args=())
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
    options = Options(dropout_seed, average, causal, dropout_p)
    return _by_blocks(q, k, lse, attn_mask, options).contiguous()


@_weights_op.register_fake
def _(q: Tensor, k: Tensor, lse: Tensor, mask: Any, seed: Any, average: bool, *rest: Any) -> Tensor:
    leading = q.shape[:1] if average else q.shape[:2]
    return q.new_empty(*leading, q.shape[2], k.shape[2])


@torch.library.custom_op(add_op_namespace_prefix("attention_weights_backward"), mutates_args=())
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
    options = Options(dropout_seed, average, causal, dropout_p)
    for rows in _row_blocks(q, k):
        p, kept = _probabilities(rows, q, k, lse, attn_mask, options)
        dp = do[..., rows, :].to(lse.dtype)
        dp = dp.unsqueeze(1) / heads if average else dp
        ds = p * (dp if kept is None else dp * kept)  # [B, H, M, Sk]
        dq[:, :, rows] = _Product.apply(ds, k.to(lse.dtype)) * scale
        dk += _Product.apply(ds.mT, q[:, :, rows].to(lse.dtype)) * scale
        dlse[:, :, rows] = -ds.sum(dim=-1)
        if d_mask is not None:
            d_rows = _mask_rows(d_mask, rows)
            d_rows += ds.sum_to_size(d_rows.shape)
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
