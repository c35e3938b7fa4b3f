"""What the accuracy rule allows beyond the formula's own error, and where that comes from.

The functions take q, k, v and the gradients of out and lse in fp64, and the options of
:func:`flashlayer.flash_attention` (or ``flash_attention_varlen``), floating tensors in fp64 too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashlayer.functional import flash_attention, flash_attention_varlen

UNIT = 2.0**-24  # one rounding to fp32, relative


def recomputation_noise(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, dlse: Tensor, **options: Any
) -> dict[str, float]:
    """The least that rounding does to each result, in units of the dtype's epsilon.

    Any algorithm that stores lse and recomputes P rounds a score and lse (a relative error of P
    as large as they are), and takes dS as the difference of dP and delta, each rounded. The formula
    escapes both where it saves P, for instance where a row sees one key: P = 1 and dS = 0 exactly.
    """
    if q.numel() == 0 or k.numel() == 0:
        return {}
    kv_heads = k.shape[1]
    q, k, v, do, dlse, p, lse = _probabilities(q, k, v, do, dlse, **options)
    scale = _scale(q, options)
    scores = (scale * (q.abs() @ k.abs().mT)).amax(dim=-1, keepdim=True)  # [B, H, Sq, 1]
    lse_size = torch.where(lse.isfinite(), lse.abs(), 0)
    p = p * (4 + scores + lse_size.unsqueeze(-1))
    survival = 1 - options.get("dropout_p", 0.0)
    do = do / survival if survival else do * 0
    dp = do.abs() @ v.abs().mT  # [B, H, Sq, Sk]
    ds = p * (dp + dp.amax(dim=-1, keepdim=True) + dlse.abs().unsqueeze(-1))
    noise = {
        "out": _largest(p @ v.abs()) / (survival or 1.0),
        "lse": _largest(4 + scores.squeeze(-1) + lse_size),
        **_gradient_errors(scale, kv_heads, q, k, do, p, ds),
    }
    if options.get("sinks") is not None:
        p_sink = torch.exp(options["sinks"][:, None] - lse).nan_to_num(0.0)
        ds_sink = p_sink * (4 + lse_size) * (dp.amax(dim=-1) + dlse.abs())  # [B, H, Sq]
        noise["dsinks"] = _largest((ds_sink + ds.sum(dim=-1)).sum(dim=(0, 2)))
    mask = options.get("attn_mask")
    if isinstance(mask, Tensor):
        noise["dattn_mask"] = _largest(ds.sum_to_size(mask[(None,) * (4 - mask.ndim)].shape))
    return noise


class Exponential(NamedTuple):
    """How far the exponential of ATen's CPU flash kernel may be from e^x, relatively."""

    forward: float  # of exp(score - maximum), at 0
    forward_slope: float  # added for each unit that the score is below the maximum
    backward: float  # of exp(score - lse)


# Without vectors both passes call the C library's expf: 1/2 ulp and a little, measured 6.0e-8.
_SCALAR = Exponential(1.02 * UNIT, 0.0, 1.02 * UNIT)
# With them the forward pass in fp32 has exp_u20, 2^n (1 + r (c1 + ... + r^4 c5)) with
# r = x - n ln 2. The polynomial is off by 9.19e-8 on [-ln 2 / 2, ln 2 / 2] and rounded once; its
# ln 2 is the fp32 number, 1.905e-9 too large, n times. Measured: 1.51e-7 + 2.75e-9 |x|. The
# backward pass has Sleef's expf, which promises 1 ulp; measured 8.0e-8.
_VECTOR = Exponential(9.19e-8 + UNIT, 2.75e-9, 2 * UNIT)
# The forward pass in half precision has fexp_u20, a cubic polynomial of the fraction of x log2(e)
# written into the mantissa: off by 1.0652e-4 and by half of 64, the spacing of fp32 near
# 127 * 2^23. The argument is rounded twice, log2(e) is 1.34e-8 too small.
_VECTOR_HALF = Exponential(1.0652e-4 + 32 * 2.0**-23, 2 * UNIT + 1.34e-8, 2 * UNIT)
_DEFAULT, _AVX = (_SCALAR, _SCALAR), (_VECTOR, _VECTOR_HALF)
# By ATen's CPU capability, in fp32 and in half precision.
EXPONENTIALS = {"DEFAULT": _DEFAULT, "AVX2": _AVX, "AVX512": _AVX}
# On other processors nothing was measured; ATen's source promises 20 ulp of exp_u20.
_UNMEASURED = (Exponential(40 * UNIT, 0.0, 2 * UNIT), _VECTOR_HALF)


def aten_exponential(dtype: torch.dtype) -> Exponential:
    """The exponential of ATen's kernel for ``dtype`` under this process's CPU capability."""
    single, half = EXPONENTIALS.get(torch.backends.cpu.get_cpu_capability(), _UNMEASURED)
    return single if dtype == torch.float32 else half


def exponential_error(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    dlse: Tensor,
    *,
    dtype: torch.dtype,
    **options: Any,
) -> dict[str, float]:
    """The largest error that ATen's exponential makes in each result, to first order.

    For a kernel that computes in ``dtype``. With ``theta`` the relative error of exp(score - max),

        delta out = sum_j P_j theta_j (v_j - out)    delta lse = sum_j P_j theta_j

    The backward pass computes P = exp(score - lse) anew. Its relative error ``rho`` is that of the
    exponential and those of its argument: of lse (theta's, and the rounding of max + log(sum)), of
    the score, which another matrix product sums anew, and of their difference. With
    dS = P (dP - delta), where delta = sum_j P_j dP_j - dlse comes from out and so has its error,

        delta dV = (P rho)^T dO    delta dS = dS rho - P sum_j P_j theta_j (dP_j - delta - dlse)
    """
    if q.numel() == 0 or k.numel() == 0:
        return {}
    kv_heads = k.shape[1]
    q, k, v, do, dlse, p, lse = _probabilities(q, k, v, do, dlse, **options)
    scale, exp = _scale(q, options), aten_exponential(dtype)
    lse = torch.where(lse.isfinite(), lse, 0).unsqueeze(-1)  # [B, H, Sq, 1]
    log_p = torch.where(p > 0, p.log(), 0)  # [B, H, Sq, Sk]
    log_sum = -torch.where(p > 0, log_p, -torch.inf).amax(dim=-1, keepdim=True)  # lse - max
    log_sum = torch.where(log_sum.isfinite(), log_sum, 0)
    p_theta = p * (exp.forward + exp.forward_slope * (log_p + log_sum).abs())
    lse_error = p_theta.sum(dim=-1, keepdim=True) + UNIT * (lse.abs() + log_sum)
    rho = exp.backward + lse_error + scale * _sum_noise(q, k) + UNIT * log_p.abs()
    dp = do @ v.mT  # [B, H, Sq, Sk]
    dp = dp - (p * dp).sum(dim=-1, keepdim=True)
    ds = rho * (p * (dp + dlse.unsqueeze(-1))).abs()
    ds = ds + p * (p_theta * dp.abs()).sum(dim=-1, keepdim=True)
    out = p @ v
    return {
        "out": _largest(p_theta @ v.abs() + p_theta.sum(dim=-1, keepdim=True) * out.abs()),
        "lse": _largest(lse_error),
        **_gradient_errors(scale, kv_heads, q, k, do, p * rho, ds),
    }


def _gradient_errors(
    scale: float, kv_heads: int, q: Tensor, k: Tensor, do: Tensor, p: Tensor, ds: Tensor
) -> dict[str, float]:
    """The largest errors of dq, dk and dv, from those of P and dS, ``p`` and ``ds``."""
    dk, dv = (
        x.unflatten(1, (kv_heads, -1)).sum(dim=2)  # over the query heads of a kv head
        for x in (ds.mT @ q.abs(), p.mT @ do.abs())
    )
    return {
        "dq": scale * _largest(ds @ k.abs()),
        "dk": scale * _largest(dk),
        "dv": _largest(dv),
    }


def _sum_noise(q: Tensor, k: Tensor) -> Tensor:
    """How far two sums of the products q_d k_d in fp32 may be apart, ``(B, H, Sq, Sk)``.

    Each rounding of a partial sum is uniform within half an ulp, 0.72 ``UNIT`` of it on average,
    so its deviation is 0.42 ``UNIT``; those of two sums are independent. Taken 5 times, for there
    are thousands of scores.
    """
    partial, squares = torch.zeros(2, *q.shape[:-1], k.shape[-2], dtype=q.dtype, device=q.device)
    for q_d, k_d in zip(q.unbind(-1), k.unbind(-1), strict=True):
        partial = partial + q_d.unsqueeze(-1) * k_d.unsqueeze(-2)
        squares = squares + partial.square()
    return 5 * 0.42 * UNIT * (2 * squares).sqrt()


def _probabilities(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, dlse: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    """The tensors, P and lse as ``(B, H, S, ...)``, keys and values repeated for their heads."""
    plain = {name: option for name, option in options.items() if name != "sinks"}
    plain |= {"dropout_p": 0.0, "return_lse": True, "backend": "standard"}
    eye = torch.eye(k.shape[-2 if k.ndim == 4 else 0], dtype=q.dtype, device=q.device)
    if q.ndim == 3:
        eye = eye.unsqueeze(1).expand(-1, k.shape[1], -1)  # (Tk, Hkv, Tk)
        p, lse = flash_attention_varlen(q, k, eye, **plain)  # P @ identity
        q, k, v, do, p = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v, do, p))
        lse, dlse = lse.unsqueeze(0), dlse.unsqueeze(0)
    else:
        p, lse = flash_attention(q, k, eye.expand(*k.shape[:-1], -1), **plain)
    if options.get("sinks") is not None:
        with_sink = torch.logaddexp(lse, options["sinks"][:, None])
        p = p * torch.exp(lse - with_sink).nan_to_num(0.0).unsqueeze(-1)
        lse = with_sink
    group_size = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group_size, dim=1) for x in (k, v))
    # Keys and values that no row sees may be NaN: they count as 0.
    k, v = (torch.where(p.any(dim=-2).unsqueeze(-1), x, 0) for x in (k, v))
    return q, k, v, do, dlse, p, lse


def _scale(q: Tensor, options: dict[str, Any]) -> float:
    scale = options.get("scale")
    return q.shape[-1] ** -0.5 if scale is None else abs(scale)


def _largest(x: Tensor) -> float:
    return x.max().item() if x.numel() else 0.0
