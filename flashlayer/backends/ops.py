"""The two custom ops through which any backend is entered where something looks at the call.

A compiler, ``FakeTensorMode``, a dispatch mode or a tensor subclass sees one op with a schema and a
fake implementation, whatever the backend does inside: loops over sizes, values it reads, kernels.
So one compiled graph serves every length. Elsewhere the backend's functions are called as they are,
since an op made in Python costs the host 20 us more (benchmarks/NOTES.md).
"""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from flashlayer.backends import aten, tiled, triton
from flashlayer.spec import AttentionExtras, AttentionSpec, Problem, is_observed

# Modules, typed as what they fulfil and not as what they are.
_MODULES: dict[str, Any] = {module.name: module for module in (triton, aten, tiled)}


class Entrance:
    """A :class:`flashlayer.spec.Backend`: ``module`` itself, or the ops where a call is observed.

    Args:
        module: a module of this package that has a backward of its own.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.name: str = module.name

    def refuses(self, problem: Problem) -> str | None:
        """See :class:`flashlayer.spec.Backend`."""
        return self.module.refuses(problem)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
    ) -> tuple[Tensor, Tensor]:
        """See :class:`flashlayer.spec.Backend`."""
        if is_observed(q):
            _count_flops()
            return forward_op(q, k, v, self.name, *flatten(spec, extras))
        return self.module.forward(q, k, v, spec, extras)

    def backward(
        self,
        do: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        spec: AttentionSpec,
        extras: AttentionExtras,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """See :class:`flashlayer.spec.Backend`."""
        if not is_observed(q):
            return self.module.backward(do, dlse, q, k, v, o, lse, spec, extras)
        _count_flops()
        wants_d_mask = extras.wants_mask_gradient(spec)
        spec = replace(spec, mask_gradient=wants_d_mask)
        tensors = (do, dlse, q, k, v, o, lse)
        dq, dk, dv, d_mask, d_sinks = backward_op(*tensors, self.name, *flatten(spec, extras))
        return (
            dq,
            dk,
            dv,
            d_mask if wants_d_mask else None,
            d_sinks if extras.sinks is not None else None,
        )


def flatten(spec: AttentionSpec, extras: AttentionExtras) -> tuple:
    """Spec and extras as the schema of the ops carries them, one value after the other."""
    return (
        spec.scale,
        spec.window_left,
        spec.window_right,
        spec.diagonal,
        spec.softcap,
        spec.dropout_p,
        spec.max_seqlen_q,
        spec.max_seqlen_k,
        spec.mask_gradient,
        *extras,
    )


def unflatten(*flat: Any) -> tuple[AttentionSpec, AttentionExtras]:
    """The inverse of :func:`flatten`."""
    (
        scale,
        window_left,
        window_right,
        diagonal,
        softcap,
        dropout_p,
        max_seqlen_q,
        max_seqlen_k,
        mask_gradient,
        *extras,
    ) = flat
    spec = AttentionSpec(
        scale=scale,
        window_left=window_left,
        window_right=window_right,
        diagonal=diagonal,
        softcap=softcap,
        dropout_p=dropout_p,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        mask_gradient=mask_gradient,
    )
    return spec, AttentionExtras(*extras)


@torch.library.custom_op("flashlayer::forward", mutates_args=())
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    backend: str,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    diagonal: str,
    softcap: float | None,
    dropout_p: float,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    mask_gradient: bool,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``(o, lse)``: :meth:`flashlayer.spec.Backend.forward` of the backend of that name."""
    spec, extras = unflatten(
        scale,
        window_left,
        window_right,
        diagonal,
        softcap,
        dropout_p,
        max_seqlen_q,
        max_seqlen_k,
        mask_gradient,
        attn_mask,
        alibi_slopes,
        sinks,
        dropout_seed,
        cu_seqlens_q,
        cu_seqlens_k,
    )
    module = _MODULES[backend]
    o, lse = module.forward(q, k, v, _for_these_sizes(q, k, spec, extras), extras)
    expected_o, expected_lse = module.empty_results(q, v)
    return _settled(o, expected_o), _settled(lse, expected_lse)


@forward_op.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, backend: str, *_: object
) -> tuple[Tensor, Tensor]:
    return _MODULES[backend].empty_results(q, v)


@torch.library.custom_op("flashlayer::backward", mutates_args=())
def backward_op(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    backend: str,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    diagonal: str,
    softcap: float | None,
    dropout_p: float,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    mask_gradient: bool,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(dq, dk, dv, d_mask, d_sinks)``: :meth:`flashlayer.spec.Backend.backward`.

    An op returns tensors only: ``d_mask`` without ``mask_gradient``, and ``d_sinks`` without
    ``sinks``, have no elements.
    """
    spec, extras = unflatten(
        scale,
        window_left,
        window_right,
        diagonal,
        softcap,
        dropout_p,
        max_seqlen_q,
        max_seqlen_k,
        mask_gradient,
        attn_mask,
        alibi_slopes,
        sinks,
        dropout_seed,
        cu_seqlens_q,
        cu_seqlens_k,
    )
    spec = _for_these_sizes(q, k, spec, extras)
    grads = _MODULES[backend].backward(do, dlse, q, k, v, o, lse, spec, extras)
    expected = _empty_gradients(q, k, v, backend, mask_gradient, attn_mask, sinks)
    dq, dk, dv, d_mask, d_sinks = (
        fake if grad is None else _settled(grad, fake)
        for grad, fake in zip(grads, expected, strict=True)
    )
    return dq, dk, dv, d_mask, d_sinks


@backward_op.register_fake
def _backward_fake(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    backend: str,
    *options: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    spec, extras = unflatten(*options)
    return _empty_gradients(q, k, v, backend, spec.mask_gradient, extras.attn_mask, extras.sinks)


def _empty_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    backend: str,
    mask_gradient: bool,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_mask = q.new_empty(0)
    if mask_gradient and attn_mask is not None:
        d_mask = attn_mask.new_empty(attn_mask.shape)
    d_sinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return *_MODULES[backend].empty_gradients(q, k, v), d_mask, d_sinks


def _settled(actual: Tensor, expected: Tensor) -> Tensor:
    """``actual`` in the strides that the fake implementation has promised."""
    return actual if actual.stride() == expected.stride() else expected.copy_(actual)


def _for_these_sizes(
    q: Tensor, k: Tensor, spec: AttentionSpec, extras: AttentionExtras
) -> AttentionSpec:
    """What an observed call left open, since it depends on sizes that a graph keeps symbolic."""
    if extras.cu_seqlens_q is not None:
        return spec
    return spec.without_idle_edges(q.shape[2], k.shape[2])


def _count_flops() -> None:
    """Tell torch's flop counters what the ops cost.

    Not on import, since their module loads Triton. A counter copies the formulas when it is made,
    so those that are counting right now are told as well.
    """
    if torch.compiler.is_compiling() or "torch.utils.flop_counter" not in sys.modules:
        return
    formulas = _register_flop_formulas()
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if counter is not None and hasattr(counter, "flop_registry"):
            counter.flop_registry.update(formulas)


@functools.cache
def _register_flop_formulas() -> dict[Any, Any]:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    # As for PyTorch's own attention: the matrix products alone, hidden keys included. The forward
    # pass has one product of each head dimension, the backward pass three of D and two of Dv.
    def count(q: Any, k: Any, v: Any, d: int, d_v: int) -> int:
        batch, heads, seqlen_q, head_dim = q
        return 2 * batch * heads * seqlen_q * k[2] * (d * head_dim + d_v * v[3])

    def forward_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return count(q, k, v, 1, 1)

    def backward_flops(do: Any, dlse: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return count(q, k, v, 3, 2)

    formulas = {
        torch.ops.flashlayer.forward: forward_flops,
        torch.ops.flashlayer.backward: backward_flops,
    }
    for op, formula in formulas.items():
        register_flop_formula(op)(formula)
    return {op: flop_registry[op] for op in formulas}
