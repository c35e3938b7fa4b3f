"""Checked calls, remembered: a short call of a known signature takes half the time.

A call of 16 tokens took 18 us with its plan, 34 us without, and 9 us in SDPA; with a window 18 and
41 us (benchmarks/NOTES.md). Calls with dropout, or optional tensors other than a mask, have none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashlayer.spec import NO_EXTRAS, AttentionExtras, AttentionSpec, Problem


class Plan(NamedTuple):
    """The resolved options of a call, and the backend chosen for it."""

    spec: AttentionSpec
    backend: Any


# By signature. Generation makes a new signature for every token, so the number is bounded.
PLANS_MAX = 4096
PLANS: dict[Any, Plan] = {}


def find(
    signature: tuple | None, query: Tensor, key: Tensor, value: Tensor, mask: Any
) -> tuple[Any, Problem] | None:
    """The backend and the problem of a call whose signature has a plan."""
    plan = PLANS.get(signature)
    if plan is None:
        return None
    extras = NO_EXTRAS if mask is None else AttentionExtras(mask)
    return plan.backend, Problem(query, key, value, plan.spec, extras)


def store(signature: tuple, spec: AttentionSpec, backend: Any) -> None:
    """Remember what a call with this signature resolves to."""
    if len(PLANS) >= PLANS_MAX:
        PLANS.clear()
    tracked = signature[-1]
    # No call with a signature is observed, so an untracked one needs no custom op. The backward
    # pass of a tracked one may be.
    PLANS[signature] = Plan(spec, backend if tracked else getattr(backend, "module", backend))


def signature(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    window_size: Any,
    diagonal: str,
    scale: float | None,
    softcap: float | None,
    backend: str,
    attn_mask: Any,
) -> tuple | None:
    """All that the checks of a call and the choice of its backend depend on; None for no plan.

    A mask must be a tensor in the form that backends get: 4-D, without dimensions of stride 0.

    Under ``torch.compile`` there is none: it would guard on a dict. ``True == 1.0`` would hit the
    entry of a float and skip the type error, so numbers must be exactly float, and the sides of a
    window exactly int.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or not (
            type(query) is type(key) is type(value) is Tensor
            and query.layout is key.layout is value.layout is torch.strided
            and (scale is None or type(scale) is float)
            and (softcap is None or type(softcap) is float)
            and type(backend) is type(diagonal) is str
            and type(causal) is bool
            and (window_size == (None, None) or _is_window(window_size))
        )
    ):
        return None
    try:
        shapes = (query.shape, key.shape, value.shape)
    except RuntimeError:  # a nested tensor of the strided layout; the checks name it
        return None
    on_cpu = query.is_cpu and key.is_cpu and value.is_cpu
    devices: Any = on_cpu or (query.device, key.device, value.device)
    device_type = "cpu" if on_cpu else devices[0].type
    if device_type == "meta":
        return None
    autocast = torch._C._is_any_autocast_enabled() and (
        torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type)
    )
    tracked = query.requires_grad or key.requires_grad or value.requires_grad
    mask = None
    if attn_mask is not None:
        if (
            type(attn_mask) is not Tensor
            or attn_mask.is_nested
            or attn_mask.layout is not torch.strided
            or attn_mask.ndim != 4
            or 0 in attn_mask.stride()
            or torch._C._are_functorch_transforms_active()
        ):
            return None
        tracked = tracked or attn_mask.requires_grad
        mask = attn_mask.shape, attn_mask.dtype, attn_mask.device, attn_mask.requires_grad
    tracked = tracked and torch.is_grad_enabled()
    return (
        *shapes,
        query.dtype,
        key.dtype,
        value.dtype,
        devices,
        causal,
        window_size,
        diagonal,
        scale,
        softcap,
        backend,
        mask,
        autocast,
        tracked,
    )


def _is_window(window_size: Any) -> bool:
    if type(window_size) is not tuple or len(window_size) != 2:
        return False
    left, right = window_size
    return (left is None or type(left) is int) and (right is None or type(right) is int)
