"""PyTorch's own flash kernel for the CPU (``aten::_scaled_dot_product_flash_attention_for_cpu``).

The fastest path on a CPU. It is wrapped rather than trusted: where it would crash (no keys), be
silently wrong (a strided last dimension, a NaN in keys beyond the causal triangle) or has no
gradient (its LSE) it is put right here; what it can't do is refused.

The kernel knows full and top-left causal attention. Packed sequences, padding masks, windows and
the bottom-right diagonal are several such problems, each a *part*: some queries, and the keys they
see (:mod:`flashlayer.backends.aten.parts`). Parts of the same queries merge by their LSE. What no
part names costs nothing.

How exact the kernel is depends on ``torch.backends.cpu.get_cpu_capability()``. Without vectors
(``DEFAULT``) its exponential is the C library's, right to half an ulp. Under ``AVX2`` and
``AVX512`` that of the forward pass is off by up to ``1.5e-7 + 2.7e-9 |x|`` in fp32, where ``x`` is
the score less the row's maximum, and by up to 1.1e-4 in half precision, which rounds to 4.9e-4 or
3.9e-3; fp64 has an exact one. The backward pass computes the probabilities anew from the stored
LSE. ``tests/tolerance.py`` derives what follows for each result.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashlayer import online_softmax
from flashlayer.backends.aten.flash import flash_backward, flash_forward
from flashlayer.backends.aten.parts import is_empty, split
from flashlayer.spec import AttentionExtras, AttentionSpec, Problem, is_observed

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
    is_one_part = _is_one_part(spec, extras)
    if is_one_part and extras.attn_mask is extras.cu_seqlens_q is None and not is_empty(q, k):
        return flash_forward(q, k, v, spec.scale, spec.window_right == 0)
    o, lse = empty_results(q, v)
    o.zero_()
    lse.fill_(-torch.inf)
    for part in split(q, k, _banded(spec, is_one_part), extras):
        results = flash_forward(
            part.queries(q),
            part.keys(k),
            part.keys(v),
            spec.scale,
            part.causal,
            part.band,
            not is_one_part,
        )
        o_part, lse_part = (part.restored(x) for x in results)
        rows = part.batch, slice(None), part.q_rows
        if part.merges:
            before = online_softmax.state_of(o[rows], lse[rows])
            state = online_softmax.merge(before, online_softmax.state_of(o_part, lse_part))
            o_part, lse_part = online_softmax.finalize(state), online_softmax.lse(state)
        o[rows], lse[rows] = o_part, lse_part
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
    is_one_part = _is_one_part(spec, extras)
    if is_one_part and extras.attn_mask is extras.cu_seqlens_q is None and not is_empty(q, k):
        return (
            *flash_backward(do, dlse, q, k, v, o, lse, spec.scale, spec.window_right == 0),
            None,
            None,
        )
    # Where parts share rows, their gradients are summed in fp32 at the least.
    dtype = k.dtype if is_one_part else torch.promote_types(k.dtype, torch.float32)
    dq, dk, dv = (_empty(x, dtype).zero_() for x in (q, k, v))
    for part in split(q, k, _banded(spec, is_one_part), extras):
        grads = flash_backward(
            part.queries(do),
            None if dlse is None else part.queries(dlse),
            part.queries(q),
            part.keys(k),
            part.keys(v),
            part.queries(o),
            part.queries(lse),
            spec.scale,
            part.causal,
            part.band,
            not is_one_part,
        )
        for whole, rows, grad in zip(
            (dq, dk, dv), (part.q_rows, part.k_rows, part.k_rows), grads, strict=True
        ):
            whole[part.batch][:, :, rows] += part.restored(grad)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _is_one_part(spec: AttentionSpec, extras: AttentionExtras) -> bool:
    """Whether a stretch of queries and keys is a problem that the kernel knows as it stands.

    That is full and top-left causal attention. Packed sequences that share their boundaries are of
    like lengths, for which both diagonals are one.
    """
    if spec.window_left is not None:
        return False
    if spec.window_right is None:
        return True
    alike = extras.cu_seqlens_q is not None and extras.cu_seqlens_q is extras.cu_seqlens_k
    return spec.window_right == 0 and (spec.diagonal == "top_left" or alike)


def _banded(spec: AttentionSpec, is_one_part: bool) -> AttentionSpec:
    """The spec as the parts read it: the diagonal of a stretch that is one part is top-left."""
    return replace(spec, diagonal="top_left") if is_one_part else spec


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    """The kernel's gradients have the heads of a token together: ``(B, S, H, D)`` transposed."""
    _, heads, seqlen, head_dim = x.shape
    return seqlen * heads * head_dim, head_dim, heads * head_dim, 1


def _empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Of x's shape, laid out as the kernel lays out gradients; not a view of anything."""
    return x.new_empty_strided(x.shape, _strides(x), dtype=dtype or x.dtype)


def empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """See :class:`flashlayer.spec.Backend`."""
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    _, heads, seqlen, _ = q.shape
    strides = (seqlen * heads, 1, heads)
    return torch.empty_like(q), q.new_empty_strided(q.shape[:3], strides, dtype=lse_dtype)


def empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`flashlayer.spec.Backend`."""
    return _empty(q), _empty(k), _empty(v)
