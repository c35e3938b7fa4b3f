"""PyTorch's own flash kernel for the CPU (``aten::_scaled_dot_product_flash_attention_for_cpu``).

The fastest path on a CPU. Where the kernel would crash (no keys), be silently wrong (a strided last
dimension, a NaN in hidden keys) or has no gradient (its LSE), the wrapper corrects it; what the
kernel can't do is refused (:func:`refuses`).

It computes full and top-left causal attention. Anything else is cut into *pieces* of these two
(:mod:`flashlayer.backends.aten.pieces`), each a call of the kernel
(:mod:`flashlayer.backends.aten.kernel`) whose results are merged by their LSE. The gradients of
short bf16 sequences are computed by :mod:`flashlayer.backends.aten.short`.

The kernel's accuracy depends on ``torch.backends.cpu.get_cpu_capability()``. Without vectors
(``DEFAULT``) its exponential is the C library's, exact to half an ulp. Under ``AVX2`` and
``AVX512`` the forward pass is off by up to ``1.5e-7 + 2.7e-9 |x|`` in fp32, where ``x`` is the
score minus the row's maximum, and by up to 1.1e-4 in half precision, which itself rounds to 4.9e-4
or 3.9e-3; in fp64 it is exact. The backward pass recomputes the probabilities from the stored LSE.
:func:`flashlayer.testing.exponential_error` derives what follows for each result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashlayer import online_softmax
from flashlayer.backends.aten.kernel import flash_backward, flash_forward
from flashlayer.backends.aten.pieces import split, whole
from flashlayer.spec import AttentionExtras, AttentionSpec, Problem, accumulation_dtype, is_observed

name = "aten"


def refuses(problem: Problem) -> str | None:
    """A reason for all but full, causal and window attention on the CPU with Dv = D."""
    q, _, v, spec, extras = problem
    if q.device.type != "cpu":
        return f"ATen's flash kernel is wrapped for the CPU only, the tensors are on {q.device}"
    if v.shape[-1] != q.shape[-1]:
        return f"it needs value's head dimension to be query's, got {v.shape[-1]} and {q.shape[-1]}"
    for option in ("alibi_slopes", "sinks", "dropout_seed", "intervals"):
        if getattr(extras, option) is not None:
            return f"it has no {option}"
    if spec.softcap is not None:
        return "it has no softcap"
    has_window = spec.window_left is not None or spec.window_right is not None
    if has_window and spec.scale <= 0:
        return f"with causal or a window it needs a positive scale, got {spec.scale}"
    if extras.attn_mask is not None:
        return _refuses_mask(problem, has_window)
    return None


def _refuses_mask(problem: Problem, has_window: bool) -> str | None:
    q, k, _, spec, extras = problem
    mask: Any = extras.attn_mask
    if mask.dtype != torch.bool or mask.shape[1] != 1 or mask.shape[2] != 1:
        return "it has no attn_mask but a bool one of shape (B or 1, 1, 1, Sk)"
    if not has_window:
        return None
    if spec.window_left is not None or spec.window_right != 0:
        return "it has no attn_mask together with a window"
    if q.shape[2] != k.shape[2] and spec.diagonal != "top_left":
        return "it has no attn_mask together with a bottom-right diagonal of unlike lengths"
    # Removing hidden keys keeps the causal positions of the others only if they are at the ends.
    # That depends on the mask's values, and a traced mask has none.
    if is_observed(mask) or torch._C._are_functorch_transforms_active():
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
    piece = whole(q, k, spec, extras)
    if piece is not None:
        return flash_forward(q, k, v, spec.scale, piece)
    o, lse = empty_results(q, v)
    o.zero_()
    lse.fill_(-torch.inf)
    for piece in split(q, k, spec, extras):
        results = flash_forward(piece.queries(q), piece.keys(k), piece.keys(v), spec.scale, piece)
        piece_o, piece_lse = (piece.restore(x) for x in results)
        rows = piece.batch, slice(None), piece.q_rows
        if piece.merges:
            before = online_softmax.state_of(o[rows], lse[rows])
            state = online_softmax.merge(before, online_softmax.state_of(piece_o, piece_lse))
            piece_o, piece_lse = online_softmax.finalize(state), online_softmax.lse(state)
        o[rows], lse[rows] = piece_o, piece_lse
    return o, lse


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
    piece = whole(q, k, spec, extras)
    if piece is not None:
        dq, dk, dv = flash_backward(do, dlse, q, k, v, o, lse, spec.scale, piece)
        return dq, dk, dv, None, None
    pieces = split(q, k, spec, extras)
    dtype = k.dtype
    if any(piece.shares_rows for piece in pieces):  # sum their gradients in at least fp32
        dtype = torch.promote_types(dtype, torch.float32)
    dq, dk, dv = (_empty(x, dtype).zero_() for x in (q, k, v))
    for piece in pieces:
        grads = flash_backward(
            piece.queries(do),
            None if dlse is None else piece.queries(dlse),
            piece.queries(q),
            piece.keys(k),
            piece.keys(v),
            piece.queries(o),
            piece.queries(lse),
            spec.scale,
            piece,
        )
        rows = (piece.q_rows, piece.k_rows, piece.k_rows)
        for total, index, grad in zip((dq, dk, dv), rows, grads, strict=True):
            total[piece.batch][:, :, index] += piece.restore(grad)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _empty(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Of x's shape in the layout of the kernel's gradients, ``(B, S, H, D)``; not a view."""
    _, heads, seqlen, head_dim = x.shape
    strides = (seqlen * heads * head_dim, head_dim, heads * head_dim, 1)
    return x.new_empty_strided(x.shape, strides, dtype=dtype)


def empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """See :class:`flashlayer.spec.Backend`."""
    _, heads, seqlen, _ = q.shape
    strides, dtype = (seqlen * heads, 1, heads), accumulation_dtype(q.dtype)
    return torch.empty_like(q), q.new_empty_strided(q.shape[:3], strides, dtype=dtype)


def empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`flashlayer.spec.Backend`."""
    return _empty(q, q.dtype), _empty(k, k.dtype), _empty(v, v.dtype)
