"""The ways to compute attention, and the choice between them.

A backend is a module that fulfils :class:`flashlayer.spec.Backend`; none imports another. All but
``standard``, which PyTorch differentiates, are entered through :mod:`flashlayer.backends.ops`.
"""

from __future__ import annotations

from typing import Any

import torch

from flashlayer.backends import aten, standard, tiled, triton
from flashlayer.backends.ops import Entrance
from flashlayer.spec import Problem

# A module is typed as what it fulfils and not as what it is.
BACKENDS: dict[str, Any] = {module.name: Entrance(module) for module in (triton, aten, tiled)}
BACKENDS[standard.name] = standard


def select(name: str, problem: Problem) -> Any:
    """The backend called ``name``, or for ``"auto"`` the fastest that can compute ``problem``.

    Raises:
        TypeError: ``name`` is not a string.
        ValueError: there is no such backend, or it refuses; the message says why.
    """
    check_name(name)
    if name == "auto":
        for candidate in _by_speed(problem):
            if BACKENDS[candidate].refuses(problem) is None:
                return BACKENDS[candidate]
    reason = BACKENDS[name].refuses(problem)
    if reason is not None:
        raise ValueError(f"backend {name!r} can't compute this call: {reason}")
    return BACKENDS[name]


def check_name(name: str) -> None:
    """Raise the errors of :func:`select` that depend on the name alone."""
    if not isinstance(name, str):
        raise TypeError(f"backend must be a string, got {type(name).__name__}")
    if name != "auto" and name not in BACKENDS:
        known = ", ".join(repr(known) for known in ("auto", *BACKENDS))
        raise ValueError(f"backend must be one of {known}, got {name!r}")


def _by_speed(problem: Problem) -> tuple[str, ...]:
    q, k, v, spec, extras = problem
    if q.device.type != "cpu":
        return ("triton", "tiled", "standard")
    # On the CPU Triton is its interpreter: right, but thousands of times slower than the rest. The
    # rest is read off benchmarks/results/cpu-2-cores/backends, and a test holds it against them.
    is_half = q.dtype == torch.float16
    has_window = spec.window_left is not None or spec.window_right not in (None, 0)
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if is_half and tracked and not has_window:
        return ("tiled", "standard")  # ATen's fp16 backward takes several times as long
    # A bf16 product of one row is the slowest thing ATen's kernel does; the formula's scores are as
    # few as the keys then: 5 times as fast at 16k keys (attention.md in the folder above that one).
    # A group of heads gives the kernel more rows. With a mask the formula copies keys and values,
    # which takes as long again several times over.
    one_row = q.shape[2] == 1 and q.shape[1] == k.shape[1]
    is_plain = extras.cu_seqlens_q is None and extras.attn_mask is None
    is_plain = is_plain and not (spec.max_scores or spec.entropy)  # the formula's are in bf16
    if one_row and q.dtype == torch.bfloat16 and is_plain:
        return ("standard", "aten", "tiled")
    return ("aten", "tiled", "standard")
