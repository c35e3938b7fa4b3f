"""Attention written down naively, and how the kernels' results are held against it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashlayer.backends import triton as backend
from flashlayer.spec import AttentionExtras, AttentionSpec
from flashlayer.testing import FACTORS, GRADIENT_FACTOR, compare

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Inputs(NamedTuple):
    """One problem and the gradients that come back to it."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    dlse: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(x if x is None else x.to(dtype) for x in self))


def draw(
    batch: int = 1,
    heads: int = 2,
    kv_heads: int | None = None,
    seqlen_q: int = 70,
    seqlen_k: int | None = None,
    head_dim: int = 16,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Random inputs; keys as queries and value as key where not given."""
    kv_heads, seqlen_k = kv_heads or heads, seqlen_q if seqlen_k is None else seqlen_k
    value_dim = value_dim or head_dim
    shapes = (
        (batch, heads, seqlen_q, head_dim),
        (batch, kv_heads, seqlen_k, head_dim),
        (batch, kv_heads, seqlen_k, value_dim),
        (batch, heads, seqlen_q, value_dim),
    )
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    dlse = torch.randn(batch, heads, seqlen_q, dtype=lse_dtype, device=DEVICE)
    return Inputs(*(torch.randn(s, dtype=dtype, device=DEVICE) for s in shapes), dlse)


def run_kernels(x: Inputs, spec: AttentionSpec) -> dict[str, Tensor]:
    """Forward and backward through the backend's own entry points."""
    extras = AttentionExtras()
    o, lse = backend.forward(x.q, x.k, x.v, spec, extras)
    dq, dk, dv, *_ = backend.backward(x.do, x.dlse, x.q, x.k, x.v, o, lse, spec, extras)
    return {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def run_naively(x: Inputs, spec: AttentionSpec) -> dict[str, Tensor]:
    """The formula in the dtype of ``x``, by autograd; keys that nobody sees count as 0."""
    heads, seqlen_q, seqlen_k = *x.q.shape[1:3], x.k.shape[2]
    visible = spec.visible(0, seqlen_q, 0, seqlen_k, seqlen_q, seqlen_k, x.q.device)
    seen = visible.any(0)[:, None]
    q, k, v = (leaf.detach().clone().requires_grad_() for leaf in x[:3])
    group = heads // k.shape[1]
    keys, values = (torch.where(seen, y, 0).repeat_interleave(group, 1) for y in (k, v))
    scores = (q @ keys.mT * spec.scale).masked_fill(~visible, -torch.inf)
    row_sees = visible.any(1)
    # A row of -inf alone would give NaN: it becomes a row of zeros whose result is not used.
    safe = torch.where(row_sees[:, None], scores, 0)
    lse = torch.where(row_sees, safe.logsumexp(-1), -torch.inf)
    o = torch.where(row_sees[:, None], safe.softmax(-1) @ values, 0)
    outputs, gradients = (o,), (x.do,)
    if x.dlse is not None:
        outputs, gradients = (o, lse), (x.do, x.dlse.to(lse.dtype))
    dq, dk, dv = torch.autograd.grad(outputs, (q, k, v), gradients)
    return {"o": o.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def error_ratios(x: Inputs, spec: AttentionSpec) -> dict[str, float]:
    """Each result's error as a fraction of the error it is allowed."""
    actual = run_kernels(x, spec)
    same_dtype = run_naively(x, spec)
    reference = run_naively(x.to(torch.float64), spec)
    ratios = {}
    for name, result in actual.items():
        assert result.shape == reference[name].shape, name
        factor = FACTORS.get("out" if name == "o" else name, GRADIENT_FACTOR)
        ratios[name] = compare(result, same_dtype[name], reference[name], factor).ratio
    return ratios


def assert_accurate(x: Inputs, spec: AttentionSpec) -> None:
    """Every output and gradient within its bound."""
    ratios = error_ratios(x, spec)
    assert max(ratios.values()) <= 1, f"error as a multiple of its bound: {ratios}"
