"""PyTorch's own flash kernel for the CPU (``aten::_scaled_dot_product_flash_attention_for_cpu``).

The fastest path on a CPU. It is wrapped rather than trusted: where it would crash (no keys), be
silently wrong (a strided last dimension, a NaN in keys beyond the causal triangle) or has no
gradient (its LSE) it is put right here; what it can't do is refused.

The kernel knows full and top-left causal attention. Packed sequences, padding masks, windows and
the bottom-right diagonal are several such problems, each a *part*: some queries, and the keys they
see (:mod:`flashlayer.backends.aten.parts`). Parts of the same queries merge by their LSE. What no
part names costs nothing.

The two entry points are custom ops, so a compiled graph holds them whole; outside of one the same
functions are called as they are, since an op made in Python costs more than the kernel does on a
short sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashlayer import online_softmax
from flashlayer.backends.aten.flash import flash_backward, flash_forward, unsee
from flashlayer.backends.aten.parts import is_empty, is_one_part, split
from flashlayer.spec import AttentionExtras, AttentionSpec, Diagonal, Problem

name = "aten"


def refuses(problem: Problem) -> str | None:
    """A reason for all but full, causal and banded attention on the CPU with Dv = D."""
    q, _, v, spec, extras = problem
    if q.device.type != "cpu":
        return f"ATen's flash kernel is wrapped for the CPU only, the tensors are on {q.device}"
    if v.shape[-1] != q.shape[-1]:
        return f"it needs value's head dimension to be query's, got {v.shape[-1]} and {q.shape[-1]}"
    for option in ("alibi_slopes", "sinks", "dropout_seed"):
        if getattr(extras, option) is not None:
            return f"it has no {option}"
    if spec.softcap is not None:
        return "it has no softcap"
    has_band = spec.window_left is not None or spec.window_right is not None
    if has_band and spec.scale <= 0:
        return f"with causal or a window it needs a positive scale, got {spec.scale}"
    if extras.attn_mask is not None:
        return _refuses_mask(problem, has_band)
    return None


def _refuses_mask(problem: Problem, has_band: bool) -> str | None:
    q, k, _, spec, extras = problem
    mask: Any = extras.attn_mask
    if mask.dtype != torch.bool or mask.shape[1] != 1 or mask.shape[2] != 1:
        return "it has no attn_mask but a bool one of shape (B or 1, 1, 1, Sk)"
    if not has_band:
        return None
    if spec.window_left is not None or spec.window_right != 0:
        return "it has no attn_mask together with a window"
    if q.shape[2] != k.shape[2] and spec.diagonal != "top_left":
        return "it has no attn_mask together with a bottom-right diagonal of unlike lengths"
    # Causal positions survive the removal of hidden keys only at the ends. That is for the values
    # of the mask to say, which a traced one has not.
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if traced or type(mask) is not Tensor:
        return "it has no attn_mask together with causal in a traced call"
    edges = mask[:, 0, 0].long().diff(dim=-1).ne_(0).sum(dim=-1)
    starts_hidden = ~mask[:, 0, 0, 0]
    if bool((edges > starts_hidden + 1).any()):
        return "it has no attn_mask together with causal but one that pads at the ends"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
) -> tuple[Tensor, Tensor]:
    """See :class:`flashlayer.spec.Backend`."""
    arguments = (q, k, v, *_flatten(q, k, spec, extras))
    if torch.compiler.is_compiling():
        return _forward_op(*arguments)
    return _forward(*arguments)


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
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    """See :class:`flashlayer.spec.Backend`."""
    arguments = (do, dlse, q, k, v, o, lse, *_flatten(q, k, spec, extras))
    if torch.compiler.is_compiling():
        return *_backward_op(*arguments), None, None
    return *_backward(*arguments), None, None


def _flatten(q: Tensor, k: Tensor, spec: AttentionSpec, extras: AttentionExtras) -> tuple:
    # Of like lengths both diagonals are one; they are where both cu_seqlens are one tensor.
    cu_seqlens = (extras.cu_seqlens_q, extras.cu_seqlens_k)
    alike = q.shape[2] == k.shape[2] if cu_seqlens[0] is None else cu_seqlens[0] is cu_seqlens[1]
    diagonal = "top_left" if alike else spec.diagonal
    band = (spec.window_left, spec.window_right, diagonal)
    return spec.scale, *band, extras.attn_mask, *cu_seqlens


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    diagonal: Diagonal,
    attn_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    whole = attn_mask is None and cu_seqlens_q is None and not is_empty(q, k)
    if whole and is_one_part(window_left, window_right, diagonal):
        o, lse = flash_forward(q, k, v, scale, window_right == 0)
        return o, lse
    o, lse = _results(q)
    o.zero_()
    lse.fill_(-torch.inf)
    shared = not is_one_part(window_left, window_right, diagonal)
    band = AttentionSpec(scale, window_left, window_right, diagonal=diagonal)
    for part in split(q, k, band, attn_mask, cu_seqlens_q, cu_seqlens_k):
        q_part, k_part = part.queries(q), part.keys(k)
        results = flash_forward(q_part, k_part, part.keys(v), scale, part.causal, part.band)
        if shared:
            unsee(q_part, k_part, results[1], scale, part)
        o_part, lse_part = (part.restored(x) for x in results)
        rows = part.batch, slice(None), part.q_rows
        if part.merges:
            before = online_softmax.state_of(o[rows], lse[rows])
            state = online_softmax.merge(before, online_softmax.state_of(o_part, lse_part))
            o_part, lse_part = online_softmax.finalize(state), online_softmax.lse(state)
        o[rows], lse[rows] = o_part, lse_part
    return o, lse


def _backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    diagonal: Diagonal,
    attn_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    whole = attn_mask is None and cu_seqlens_q is None and not is_empty(q, k)
    if whole and is_one_part(window_left, window_right, diagonal):
        grads = flash_backward(do, dlse, q, k, v, o, lse, scale, window_right == 0)
        return _settled(grads[0]), _settled(grads[1]), _settled(grads[2])
    # Where parts share rows, their gradients are summed in fp32 at the least.
    shared = not is_one_part(window_left, window_right, diagonal)
    dtype = torch.promote_types(k.dtype, torch.float32) if shared else k.dtype
    dq, dk, dv = (_empty(x, dtype).zero_() for x in (q, k, v))
    # A row whose scores are all -inf: exp(-inf - -inf) is NaN, exp(-inf - inf) is 0.
    lse = torch.where(lse == -torch.inf, torch.inf, lse)
    band = AttentionSpec(scale, window_left, window_right, diagonal=diagonal)
    for part in split(q, k, band, attn_mask, cu_seqlens_q, cu_seqlens_k):
        grads = flash_backward(
            part.queries(do),
            None if dlse is None else part.queries(dlse),
            part.queries(q),
            part.keys(k),
            part.keys(v),
            part.queries(o),
            part.queries(lse),
            scale,
            part.causal,
            part.band,
            shared,
        )
        for whole, rows, grad in zip(
            (dq, dk, dv), (part.q_rows, part.k_rows, part.k_rows), grads, strict=True
        ):
            whole[part.batch][:, :, rows] += part.restored(grad)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    """The kernel's gradients have the heads of a token together: ``(B, S, H, D)`` transposed."""
    _, heads, seqlen, head_dim = x.shape
    return seqlen * heads * head_dim, head_dim, heads * head_dim, 1


def _empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Of x's shape, laid out as the kernel lays out gradients; not a view of anything."""
    return x.new_empty_strided(x.shape, _strides(x), dtype=dtype or x.dtype)


def _settled(x: Tensor) -> Tensor:
    """``x`` in the layout of :func:`_empty`, which it has but for the odd case."""
    return x if x.stride() == _strides(x) else _empty(x).copy_(x)


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    _, heads, seqlen, _ = q.shape
    strides = (seqlen * heads, 1, heads)
    return torch.empty_like(q), q.new_empty_strided(q.shape[:3], strides, dtype=lse_dtype)


@torch.library.custom_op("flashlayer::aten_forward", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    diagonal: str,
    attn_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tensors = (attn_mask, cu_seqlens_q, cu_seqlens_k)
    band: tuple[Any, Any, Any] = (window_left, window_right, diagonal)
    o, lse = _forward(q, k, v, scale, *band, *tensors)
    expected = _results(q)  # the kernel's own layout but where q had to be copied or folded for it
    o, lse = (
        actual if actual.stride() == fake.stride() else fake.copy_(actual)
        for actual, fake in zip((o, lse), expected, strict=True)
    )
    return o, lse


@_forward_op.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _results(q)


@torch.library.custom_op("flashlayer::aten_backward", mutates_args=())
def _backward_op(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    diagonal: str,
    attn_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (attn_mask, cu_seqlens_q, cu_seqlens_k)
    band: tuple[Any, Any, Any] = (window_left, window_right, diagonal)
    return _backward(do, dlse, q, k, v, o, lse, scale, *band, *tensors)


@_backward_op.register_fake
def _(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q), _empty(k), _empty(v)
