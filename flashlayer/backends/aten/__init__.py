"""PyTorch's own flash kernel for the CPU (``aten::_scaled_dot_product_flash_attention_for_cpu``).

The fastest path on a CPU. Where the kernel would crash (no keys), be silently wrong (a strided last
dimension, a NaN in hidden keys) or has no gradient (its LSE), the wrapper corrects it; what the
kernel can't do is refused (:func:`refuses`).

It computes full and top-left causal attention, with an additive mask or without. Anything else is
cut into *pieces* of these (:mod:`flashlayer.backends.aten.pieces`; interval masks in
:mod:`flashlayer.backends.aten.intervals`), each a call of the kernel
(:mod:`flashlayer.backends.aten.kernel`) whose results are merged by their LSE. Masks are made
additive in :mod:`flashlayer.backends.aten.mask`; the gradient of one is computed in
:mod:`flashlayer.backends.aten.mask_gradient`, those of short bf16 sequences in
:mod:`flashlayer.backends.aten.short`.

The kernel's accuracy depends on ``torch.backends.cpu.get_cpu_capability()``. Without vectors
(``DEFAULT``) its exponential is the C library's, exact to half an ulp. Under ``AVX2`` and
``AVX512`` the forward pass is off by up to ``1.5e-7 + 2.7e-9 |x|`` in fp32, where ``x`` is the
score minus the row's maximum, and by up to 1.1e-4 in half precision, which itself rounds to 4.9e-4
or 3.9e-3; in fp64 it is exact. The backward pass recomputes the probabilities from the stored LSE.
:func:`flashlayer.testing.exponential_error` derives what follows for each result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, islice

import torch
from torch import Tensor

from flashlayer import online_softmax
from flashlayer.backends.aten.intervals import interval_pieces
from flashlayer.backends.aten.kernel import flash_backward, flash_forward
from flashlayer.backends.aten.mask import without_hidden_keys
from flashlayer.backends.aten.mask_gradient import masked_backward
from flashlayer.backends.aten.pieces import Piece, split, whole
from flashlayer.spec import (
    AttentionExtras,
    AttentionSpec,
    Problem,
    accumulation_dtype,
    without_autocast,
)

name = "aten"
entropy_gradient = False


def refuses(problem: Problem) -> str | None:
    """A reason for other devices, Dv != D, and options that the kernel can't be made to compute."""
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
    if spec.max_scores or spec.entropy:
        return "its kernel returns no max_scores and no entropy"
    has_window = spec.window_left is not None or spec.window_right is not None
    if has_window and spec.scale <= 0:
        return f"with causal or a window it needs a positive scale, got {spec.scale}"
    return None


@without_autocast
def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
) -> tuple[Tensor, Tensor]:
    """See :class:`flashlayer.spec.Backend`."""
    o, lse = _forward(q, k, v, spec, extras)
    if _hides_keys(extras) and not math.isfinite(o.sum().item()):
        return _forward(q, *without_hidden_keys(q, k, v, spec, extras), spec, extras)
    return o, lse


def _hides_keys(extras: AttentionExtras) -> bool:
    return extras.attn_mask is not None or extras.intervals is not None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
) -> tuple[Tensor, Tensor]:
    piece = whole(q, k, spec, extras)
    if piece is not None:
        return flash_forward(q, k, v, spec.scale, piece)
    o, lse = empty_results(q, v)
    if extras.intervals is not None:  # several pieces of a query, each a rounding of what is stored
        o = o.to(lse.dtype)
    o.zero_()
    lse.fill_(-torch.inf)
    for piece in _pieces(q, k, spec, extras):
        results = flash_forward(piece.queries(q), piece.keys(k), piece.keys(v), spec.scale, piece)
        piece_o, piece_lse = (piece.restore(x) for x in results)
        rows = piece.batch, slice(None), piece.q_rows
        if piece.merges:
            before = online_softmax.state_of(o[rows], lse[rows])
            state = online_softmax.merge(before, online_softmax.state_of(piece_o, piece_lse))
            piece_o, piece_lse = online_softmax.finalize(state), online_softmax.lse(state)
        o[rows], lse[rows] = piece_o, piece_lse
    return o.to(q.dtype), lse


def _pieces(q: Tensor, k: Tensor, spec: AttentionSpec, extras: AttentionExtras) -> Iterator[Piece]:
    if extras.intervals is None or q.numel() == 0 or k.numel() == 0:
        return split(q, k, spec, extras)
    return interval_pieces(q, extras.intervals, spec)


@without_autocast
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:
    """See :class:`flashlayer.spec.Backend`."""
    if not _hides_keys(extras):
        return *_backward(do, dlse, q, k, v, o, lse, spec, extras), None
    call = masked_backward if extras.wants_mask_gradient(spec) else _backward
    dq, dk, dv, d_mask = call(do, dlse, q, k, v, o, lse, spec, extras)
    # dS of a row is NaN if a key that it doesn't see has NaN, and with it all of its dQ.
    if not math.isfinite(dq.sum().item()):
        k, v = without_hidden_keys(q, k, v, spec, extras)
        dq, dk, dv, d_mask = call(do, dlse, q, k, v, o, lse, spec, extras)
    return dq, dk, dv, d_mask, None


def _backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    extras: AttentionExtras,
) -> tuple[Tensor, Tensor, Tensor, None]:
    piece = whole(q, k, spec, extras)
    if piece is not None:
        return *flash_backward(do, dlse, q, k, v, o, lse, spec.scale, piece), None
    pieces = _pieces(q, k, spec, extras)
    first = list(islice(pieces, 1))
    dtype = k.dtype
    if first and first[0].shares_rows:  # as all pieces: sum their gradients in at least fp32
        dtype = torch.promote_types(dtype, torch.float32)
    dq, dk, dv = (_empty(x, dtype).zero_() for x in (q, k, v))
    for piece in chain(first, pieces):
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
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _empty(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Of x's shape in the layout of the kernel's gradients, ``(B, S, H, D)``; not a view."""
    _, heads, seqlen, head_dim = x.shape
    strides = (seqlen * heads * head_dim, head_dim, heads * head_dim, 1)
    return x.new_empty_strided(x.shape, strides, dtype=dtype)


def has_tangents(problem: Problem) -> bool:
    """False: ATen's kernel has none."""
    return False


def empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """See :class:`flashlayer.spec.Backend`."""
    _, heads, seqlen, _ = q.shape
    strides, dtype = (seqlen * heads, 1, heads), accumulation_dtype(q.dtype)
    return torch.empty_like(q), q.new_empty_strided(q.shape[:3], strides, dtype=dtype)


def empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`flashlayer.spec.Backend`."""
    return _empty(q, q.dtype), _empty(k, k.dtype), _empty(v, v.dtype)
