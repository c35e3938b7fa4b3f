"""How a result is judged: by the error that the formula itself makes in the same dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashlayer import flash_attention


class Results(NamedTuple):
    """Everything one call gives, in the order of :data:`FACTORS`."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


# max|ours - ref| <= factor * max|standard in the same dtype - ref| + floor
FACTORS = Results(out=2, lse=2, dq=3, dk=3, dv=3)


def run(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, dlse: Tensor, *, backend: str, **options
) -> Results:
    """Forward, and backward through out and lse."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = flash_attention(q, k, v, return_lse=True, backend=backend, **options)
    # A row without keys has lse = -inf, a constant: it has no gradient to pass on.
    dlse = torch.where(lse.isfinite(), dlse, 0)
    grads = torch.autograd.grad((out, lse), (q, k, v), (do, dlse))
    return Results(out.detach(), lse.detach(), *grads)


def assert_matches_standard(
    q: Tensor, k: Tensor, v: Tensor, *, backend: str, slack: float = 1.0, **options
) -> Results:
    """Run ``backend`` and hold all it returns against standard attention in fp64.

    ``slack`` widens the bounds; only for a limit of code that is not ours, with its reason.
    """
    do = torch.randn(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    dlse = torch.randn(q.shape[:3], dtype=lse_dtype, device=q.device)
    tensors = (q, k, v, do, dlse)
    wide = tuple(x.double() for x in tensors)
    actual = run(*tensors, backend=backend, **options)
    same_dtype = run(*tensors, backend="standard", **options)
    reference = run(*wide, backend="standard", **options)
    for name in Results._fields:
        assert_accurate(
            name,
            getattr(actual, name),
            getattr(same_dtype, name),
            getattr(reference, name),
            slack * getattr(FACTORS, name),
        )
    return actual


def assert_accurate(
    name: str, actual: Tensor, same_dtype: Tensor, reference: Tensor, factor: float
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
    if dtype == torch.float64:  # no wider reference: rounding of lse (up to ~500) in exp
        bound = 1e-12 * max(1.0, reference.abs().max().item())
    else:
        rounded = reference.to(dtype)
        floor = 2 * ((rounded + 0.3 - 0.3) - rounded).abs().max().item()
        bound = factor * (same_dtype - reference).abs().max().item() + floor
    error = (actual - reference).abs()
    bad = ~(error <= bound)  # a NaN is bad
    if bad.any():
        index = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(index)} is {actual[index].item():.8g}, expected "
            f"{reference[index].item():.8g}; {int(bad.sum())} of {bad.numel()} elements are off by "
            f"more than {bound:.3g}, at most by {error.nan_to_num(torch.inf).max().item():.3g}"
        )
