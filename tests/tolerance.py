"""How a result is judged: by the error that the formula itself makes in the same dtype."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashlayer import flash_attention, flash_attention_varlen

# max|ours - ref| <= factor * max|standard in the same dtype - ref| + floor
FACTORS = {"out": 2, "lse": 2}
GRADIENT_FACTOR = 3

Results = dict[str, Tensor]

UNIT = 2.0**-24  # one rounding to fp32, relative


class Exponential(NamedTuple):
    """How far the exponential of ATen's CPU flash kernel may be from e^x, relatively.

    Attributes:
        forward: of exp(score - maximum), at 0.
        forward_slope: what is added for each unit that the score is below the maximum.
        backward: of exp(score - lse).
    """

    forward: float
    forward_slope: float
    backward: float


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
# Of fp32 and of half precision. tests/test_capabilities.py holds the kernel against it.
EXPONENTIALS = {"DEFAULT": _DEFAULT, "AVX2": _AVX, "AVX512": _AVX}
# On other processors nothing was measured; ATen's source promises 20 ulp of exp_u20.
_UNMEASURED = (Exponential(40 * UNIT, 0.0, 2 * UNIT), _VECTOR_HALF)


def aten_exponential(dtype: torch.dtype) -> Exponential:
    """The exponential of ATen's kernel for ``dtype`` under this process's capability."""
    single, half = EXPONENTIALS.get(torch.backends.cpu.get_cpu_capability(), _UNMEASURED)
    return single if dtype == torch.float32 else half


def run(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, dlse: Tensor, *, backend: str, **options: Any
) -> Results:
    """Forward, and backward through out and lse, to every input that has a gradient."""
    attend = flash_attention_varlen if "cu_seqlens_q" in options else flash_attention
    leaves = {"q": q, "k": k, "v": v}
    for name in ("attn_mask", "sinks"):
        if options.get(name) is not None and options[name].is_floating_point():
            leaves[name] = options[name]
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    options |= {name: leaf for name, leaf in leaves.items() if name in options}
    out, lse = attend(
        leaves["q"], leaves["k"], leaves["v"], return_lse=True, backend=backend, **options
    )
    # A row without keys has lse = -inf, a constant: it has no gradient to pass on.
    dlse = torch.where(lse.isfinite(), dlse, 0)
    grads = torch.autograd.grad((out, lse), tuple(leaves.values()), (do, dlse))
    results = {"out": out.detach(), "lse": lse.detach()}
    return results | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_matches_standard(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: str,
    with_noise: bool = False,
    **options: Any,
) -> Results:
    """Run ``backend`` and hold all it returns against standard attention in fp64.

    ``with_noise`` adds :func:`recomputation_noise` to the bounds; for drawn problems, among which
    are those where the formula's own error happens to be exactly zero. The bounds of the backend
    ``aten`` have :func:`exponential_error` added, and those of no other backend.
    """
    do = torch.randn(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
    rows = q.shape[:-1] if q.ndim == 4 else (q.shape[1], q.shape[0])
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    dlse = torch.randn(rows, dtype=lse_dtype, device=q.device)
    tensors = (q, k, v, do, dlse)
    wide_options = {
        name: option.double()
        if isinstance(option, Tensor) and option.is_floating_point() and name != "alibi_slopes"
        else option
        for name, option in options.items()
    }
    actual = run(*tensors, backend=backend, **options)
    same_dtype = run(*tensors, backend="standard", **options)
    reference = run(*(x.double() for x in tensors), backend="standard", **wide_options)
    wide = [x.double() for x in tensors]
    noise = recomputation_noise(*wide, **wide_options) if with_noise else {}
    exponential = {}
    if backend == "aten" and q.dtype != torch.float64:
        exponential = exponential_error(*wide, dtype=q.dtype, **wide_options)
    for name, expected in reference.items():
        assert_accurate(
            name,
            actual[name],
            same_dtype[name],
            expected,
            FACTORS.get(name, GRADIENT_FACTOR),
            noise.get(name, 0.0) * torch.finfo(q.dtype).eps + exponential.get(name, 0.0),
        )
    return actual


def recomputation_noise(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, dlse: Tensor, **options: Any
) -> dict[str, float]:
    """What rounding does to each result at the least, in units of the dtype's epsilon.

    Any algorithm that stores lse and recomputes P rounds a score and lse (a relative error of P
    as large as they are), and takes dS as the difference of dP and delta, each rounded. The formula
    escapes both where it saves P, for instance where a row sees one key: P = 1 and dS = 0 exactly.
    """
    if q.numel() == 0 or k.numel() == 0:
        return {}
    kv_heads = k.shape[1]
    q, k, v, do, dlse, p, lse = _probabilities(q, k, v, do, dlse, **options)
    scale = abs(options.get("scale", q.shape[-1] ** -0.5))
    scores = (scale * (q.abs() @ k.abs().mT)).amax(dim=-1, keepdim=True)  # [B, H, Sq, 1]
    lse_size = torch.where(lse.isfinite(), lse.abs(), 0)
    p = p * (4 + scores + lse_size.unsqueeze(-1))
    survival = 1 - options.get("dropout_p", 0.0)
    do = do / survival if survival else do * 0
    dp = do.abs() @ v.abs().mT  # [B, H, Sq, Sk]
    ds = p * (dp + dp.amax(dim=-1, keepdim=True) + dlse.abs().unsqueeze(-1))
    noise = {
        "out": _biggest(p @ v.abs()) / (survival or 1.0),
        "lse": _biggest(4 + scores.squeeze(-1) + lse_size),
        "dq": scale * _biggest(ds @ k.abs()),
        "dk": scale * _biggest(_grouped(ds.mT @ q.abs(), kv_heads)),
        "dv": _biggest(_grouped(p.mT @ do.abs(), kv_heads)),
    }
    if options.get("sinks") is not None:
        p_sink = torch.exp(options["sinks"][:, None] - lse).nan_to_num(0.0)
        ds_sink = p_sink * (4 + lse_size) * (dp.amax(dim=-1) + dlse.abs())  # [B, H, Sq]
        noise["dsinks"] = _biggest((ds_sink + ds.sum(dim=-1)).sum(dim=(0, 2)))
    if options.get("attn_mask") is not None:
        noise["dattn_mask"] = _biggest(ds.sum_to_size(_four(options["attn_mask"]).shape))
    return noise


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
    """The largest error that ATen's exponential can make in each result, to first order.

    The tensors in fp64, for a kernel that computes in ``dtype``. With ``theta`` the
    relative error of exp(score - max),

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
    scale = abs(options.get("scale", q.shape[-1] ** -0.5))
    exp = aten_exponential(dtype)
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
        "out": _biggest(p_theta @ v.abs() + p_theta.sum(dim=-1, keepdim=True) * out.abs()),
        "lse": _biggest(lse_error),
        "dq": scale * _biggest(ds @ k.abs()),
        "dk": scale * _biggest(_grouped(ds.mT @ q.abs(), kv_heads)),
        "dv": _biggest(_grouped((p * rho).mT @ do.abs(), kv_heads)),
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
    plain |= {"dropout_p": 0.0}
    if q.ndim == 3:
        eye = torch.eye(len(k), dtype=q.dtype, device=q.device).unsqueeze(1)  # (Tk, 1, Tk)
        eye = eye.expand(-1, k.shape[1], -1)
        p, lse = flash_attention_varlen(q, k, eye, return_lse=True, backend="standard", **plain)
        q, k, v, do, p = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v, do, p))
        lse, dlse = lse.unsqueeze(0), dlse.unsqueeze(0)
    else:
        eye = torch.eye(k.shape[-2], dtype=q.dtype, device=q.device).expand(*k.shape[:-1], -1)
        p, lse = flash_attention(q, k, eye, return_lse=True, backend="standard", **plain)
    if options.get("sinks") is not None:
        with_sink = torch.logaddexp(lse, options["sinks"][:, None])
        p = p * torch.exp(lse - with_sink).nan_to_num(0.0).unsqueeze(-1)
        lse = with_sink
    group_size = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group_size, dim=1) for x in (k, v))
    # Keys that no row sees may hold anything, they take no part.
    k, v = (torch.where(p.any(dim=-2).unsqueeze(-1), x, 0) for x in (k, v))
    return q, k, v, do, dlse, p, lse


def _biggest(x: Tensor) -> float:
    return x.max().item() if x.numel() else 0.0


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """Sums over the query heads that share a kv head."""
    return x.unflatten(1, (kv_heads, -1)).sum(dim=2)


def _four(mask: Tensor) -> Tensor:
    return mask[(None,) * (4 - mask.ndim)]


def error_bound(same_dtype: Tensor, reference: Tensor, dtype: torch.dtype, factor: float) -> float:
    """The 2x rule: how far from the fp64 reference a result in ``dtype`` may be.

    ``same_dtype`` is what standard attention gives in that dtype.
    """
    if dtype == torch.float64:  # no wider reference: rounding of lse (up to ~500) in exp
        return 1e-12 * max(1.0, reference.abs().max().item())
    rounded = reference.to(dtype)
    floor = 2 * ((rounded + 0.3 - 0.3) - rounded).abs().max().item()
    return factor * (same_dtype - reference).abs().max().item() + floor


def assert_accurate(
    name: str,
    actual: Tensor,
    same_dtype: Tensor,
    reference: Tensor,
    factor: float,
    noise: float = 0.0,
) -> None:
    """The 2x rule for one tensor; the message names it, the errors and the first bad index."""
    assert actual.dtype == same_dtype.dtype, (name, actual.dtype, same_dtype.dtype)
    assert actual.shape == reference.shape, (name, actual.shape, reference.shape)
    dtype = actual.dtype
    # The lse of a row without keys is -inf on both sides; anything else not finite is an error.
    infinite = reference == -torch.inf
    assert torch.equal(actual == -torch.inf, infinite), f"{name}: -inf in the wrong rows"
    actual, same_dtype, reference = (
        torch.where(infinite, 0.0, x.double()) for x in (actual, same_dtype, reference)
    )
    if actual.numel() == 0:
        return
    bound = error_bound(same_dtype, reference, dtype, factor) + noise
    error = (actual - reference).abs()
    bad = ~(error <= bound)  # a NaN is bad
    if bad.any():
        index = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(index)} is {actual[index].item():.8g}, expected "
            f"{reference[index].item():.8g}; {int(bad.sum())} of {bad.numel()} elements are off by "
            f"more than {bound:.3g}, at most by {error.nan_to_num(torch.inf).max().item():.3g}"
        )
