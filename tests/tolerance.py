"""How a result is judged: by the error that the formula itself makes in the same dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashlayer import flash_attention, flash_attention_varlen

# max|ours - ref| <= factor * max|standard in the same dtype - ref| + floor
FACTORS = {"out": 2, "lse": 2}
GRADIENT_FACTOR = 3

Results = dict[str, Tensor]


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
    slack: float = 1.0,
    with_noise: bool = False,
    **options: Any,
) -> Results:
    """Run ``backend`` and hold all it returns against standard attention in fp64.

    ``slack`` widens the bounds; only for a limit of code that is not ours, with its reason.
    ``with_noise`` adds :func:`recomputation_noise` to them; for drawn problems, among which are
    those where the formula's own error happens to be exactly zero.
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
    noise = (
        recomputation_noise(*(x.double() for x in tensors), **wide_options) if with_noise else {}
    )
    for name, expected in reference.items():
        assert_accurate(
            name,
            actual[name],
            same_dtype[name],
            expected,
            slack * FACTORS.get(name, GRADIENT_FACTOR),
            noise.get(name, 0.0) * torch.finfo(q.dtype).eps,
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
    scale = abs(options.get("scale", q.shape[-1] ** -0.5))
    scores = (scale * (q.abs() @ k.abs().mT)).amax(dim=-1, keepdim=True)  # [B, H, Sq, 1]
    lse_size = torch.where(lse.isfinite(), lse.abs(), 0)
    p = p * (4 + scores + lse_size.unsqueeze(-1))
    survival = 1 - options.get("dropout_p", 0.0)
    do = do / survival if survival else do * 0
    dp = do.abs() @ v.abs().mT  # [B, H, Sq, Sk]
    ds = p * (dp + dp.amax(dim=-1, keepdim=True) + dlse.abs().unsqueeze(-1))

    def biggest(x: Tensor) -> float:
        return x.max().item() if x.numel() else 0.0

    def grouped(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, group_size)).sum(dim=2)

    noise = {
        "out": biggest(p @ v.abs()) / (survival or 1.0),
        "lse": biggest(4 + scores.squeeze(-1) + lse_size),
        "dq": scale * biggest(ds @ k.abs()),
        "dk": scale * biggest(grouped(ds.mT @ q.abs())),
        "dv": biggest(grouped(p.mT @ do.abs())),
    }
    if options.get("sinks") is not None:
        p_sink = torch.exp(options["sinks"][:, None] - lse).nan_to_num(0.0)
        ds_sink = p_sink * (4 + lse_size) * (dp.amax(dim=-1) + dlse.abs())  # [B, H, Sq]
        noise["dsinks"] = biggest((ds_sink + ds.sum(dim=-1)).sum(dim=(0, 2)))
    if options.get("attn_mask") is not None:
        noise["dattn_mask"] = biggest(ds.sum_to_size(_four(options["attn_mask"]).shape))
    return noise


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
