"""Two custom ops, forward and backward, that enter any backend by its name.

A compiler, ``FakeTensorMode``, a dispatch mode or a tensor subclass gets one op with a schema and a
fake implementation, whatever the backend does inside: loops over sizes, values it reads, kernels.
So one compiled graph serves every length. Other calls skip the op, which costs 20 us of host time
(benchmarks/NOTES.md). A third op refuses a gradient that no backend computes in a graph.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from flashlayer._ops import add_op_namespace_prefix, ops
from flashlayer.backends import aten, tiled, triton
from flashlayer.spec import (
    AttentionExtras,
    AttentionSpec,
    Problem,
    Tensors,
    is_observed,
    is_sharded,
    no_entropy_gradient,
)

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
        self.entropy_gradient: bool = module.entropy_gradient

    def refuses(self, problem: Problem) -> str | None:
        """See :class:`flashlayer.spec.Backend`."""
        return self.module.refuses(problem)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
    ) -> tuple[Tensor, ...]:
        """See :class:`flashlayer.spec.Backend`."""
        if is_observed(q):
            _count_flops()
            if is_sharded(q):
                extras = _sharding().on_mesh(q, k, v, extras)
            o, lse, *more = forward_op(q, k, v, self.name, *flatten(spec, extras))
            return o, lse, *spec.asked(*more)
        return self.module.forward(q, k, v, spec, extras)

    def has_tangents(self, problem: Problem) -> bool:
        """See :class:`flashlayer.spec.Backend`."""
        return self.module.has_tangents(problem)

    def forward_tangents(
        self,
        primals: tuple[Tensor, Tensor, Tensor],
        tangents: Tensors,
        spec: AttentionSpec,
        extras: AttentionExtras,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :class:`flashlayer.spec.Backend`."""
        return self.module.forward_tangents(primals, tangents, spec, extras)

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
        dentropy: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """See :class:`flashlayer.spec.Backend`."""
        if not is_observed(q):
            return _backward(self.module, do, dlse, q, k, v, o, lse, spec, extras, dentropy)
        _count_flops()
        wants_d_mask = extras.wants_mask_gradient(spec)
        spec = replace(spec, mask_gradient=wants_d_mask)
        given = extras
        if is_sharded(q):
            extras = _sharding().on_mesh(q, k, v, extras)
            # A compiler makes plain zeros for an unused output.
            dlse, dentropy = (_sharding().whole(x, q) for x in (dlse, dentropy))
        tensors = (do, dlse, q, k, v, o, lse, dentropy)
        dq, dk, dv, d_mask, d_sinks = backward_op(*tensors, self.name, *flatten(spec, extras))
        if is_sharded(q):
            d_mask = _sharding().as_given(d_mask, given.attn_mask)
            d_sinks = _sharding().as_given(d_sinks, given.sinks)
        return (
            dq,
            dk,
            dv,
            d_mask if wants_d_mask else None,
            d_sinks if extras.sinks is not None else None,
        )

    def refuse_gradient(self, entropy: Tensor, q: Tensor) -> Tensor:
        """The entropy as a result whose gradient raises when a compiled graph asks for it."""
        return refuse_gradient_op(entropy.detach(), q, self.name)


def _sharding() -> Any:
    """The module of DTensor's rules, which loads DTensor's own."""
    from flashlayer.backends import sharding

    return sharding


# All that an op takes besides its tensors: the one place where the schema spells out an option.
_OPTIONS = (
    "str backend, float scale, SymInt? window_left, SymInt? window_right, str diagonal, "
    "float? softcap, float dropout_p, SymInt? max_seqlen_q, SymInt? max_seqlen_k, "
    "bool mask_gradient, bool max_scores, bool entropy, "
    "Tensor? attn_mask, Tensor? alibi_slopes, Tensor? sinks, Tensor? dropout_seed, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? intervals"
)


def flatten(spec: AttentionSpec, extras: AttentionExtras) -> tuple:
    """Spec and extras in the order of the schema, which is that of :data:`_SPEC` and the extras."""
    return *(getattr(spec, name) for name in _SPEC), *extras


_SPEC = (
    "scale",
    "window_left",
    "window_right",
    "diagonal",
    "softcap",
    "dropout_p",
    "max_seqlen_q",
    "max_seqlen_k",
    "mask_gradient",
    "max_scores",
    "entropy",
)


def unflatten(*flat: Any) -> tuple[AttentionSpec, AttentionExtras]:
    """The inverse of :func:`flatten`."""
    spec = AttentionSpec(**dict(zip(_SPEC, flat, strict=False)))
    return spec, AttentionExtras(*flat[len(_SPEC) :])


@torch.library.custom_op(
    add_op_namespace_prefix("forward"),
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, backend: str, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(o, lse, max_scores, entropy)``: :meth:`flashlayer.spec.Backend.forward` of that backend.

    An op returns tensors only: what is not asked for has no elements.
    """
    spec, extras = unflatten(*options)
    results = iter(_MODULES[backend].forward(q, k, v, _for_these_sizes(q, k, spec, extras), extras))
    promised = _results_promised(Layout.of(q), Layout.of(v), backend, spec)
    asked = (True, True, spec.max_scores, spec.entropy)
    o, lse, max_scores, entropy = (
        _settled(next(results) if there else None, layout, q.device)
        for there, layout in zip(asked, promised, strict=True)
    )
    return o, lse, max_scores, entropy


@forward_op.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, backend: str, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_results(q, v, backend, unflatten(*options)[0])


def _empty_results(
    q: Tensor, v: Tensor, backend: str, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    o, lse = _MODULES[backend].empty_results(q, v)
    max_scores, entropy = (
        lse.new_empty(q.shape[:3] if asked else (0,)) for asked in (spec.max_scores, spec.entropy)
    )
    return o, lse, max_scores, entropy


@torch.library.custom_op(
    add_op_namespace_prefix("backward"),
    mutates_args=(),
    schema=(
        "(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
        "Tensor? dentropy, "
        f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def backward_op(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dentropy: Tensor | None,
    backend: str,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(dq, dk, dv, d_mask, d_sinks)``: :meth:`flashlayer.spec.Backend.backward`.

    An op returns tensors only: ``d_mask`` without ``mask_gradient``, and ``d_sinks`` without
    ``sinks``, have no elements.
    """
    spec, extras = unflatten(*options)
    spec = _for_these_sizes(q, k, spec, extras)
    grads = _backward(_MODULES[backend], do, dlse, q, k, v, o, lse, spec, extras, dentropy)
    tensors = (q, k, v, extras.attn_mask, extras.sinks)
    promised = _gradients_promised(*map(Layout.of, tensors), backend, spec)
    dq, dk, dv, d_mask, d_sinks = (
        _settled(grad, layout, q.device) for grad, layout in zip(grads, promised, strict=True)
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
    dentropy: Tensor | None,
    backend: str,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(q, k, v, backend, *unflatten(*options))


def _backward(module: Any, *arguments: Any) -> Any:
    """The module's backward, with ``dentropy``, which is last, if it is given."""
    *plain, dentropy = arguments
    if dentropy is None:
        return module.backward(*plain)
    return module.backward(*plain, dentropy=dentropy)


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, backend: str, spec: AttentionSpec, extras: AttentionExtras
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    mask, sinks = extras.attn_mask, extras.sinks
    d_mask = q.new_empty(0)
    if spec.mask_gradient and mask is not None:
        d_mask = mask.new_empty(mask.shape)
    d_sinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return *_MODULES[backend].empty_gradients(q, k, v), d_mask, d_sinks


@torch.library.custom_op(
    add_op_namespace_prefix("refuse_gradient"),
    mutates_args=(),
    schema="(Tensor entropy, Tensor q, str backend) -> Tensor",
)
def refuse_gradient_op(entropy: Tensor, q: Tensor, backend: str) -> Tensor:
    """The entropy, which is a function of ``q`` to autograd. An op, since Dynamo can't trace it."""
    return entropy.clone()


@refuse_gradient_op.register_fake
def _refuse_gradient_fake(entropy: Tensor, q: Tensor, backend: str) -> Tensor:
    return torch.empty_like(entropy)


def _refuse_gradient(ctx: Any, dentropy: Tensor) -> None:
    raise NotImplementedError(no_entropy_gradient(ctx.backend))


def _keep_backend(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.backend = inputs[2]


refuse_gradient_op.register_autograd(_refuse_gradient, setup_context=_keep_backend)


class Layout(NamedTuple):
    """A tensor without its memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor | None) -> Layout | None:
        """That of ``x``."""
        return None if x is None else cls(x.shape, x.stride(), x.dtype)

    def empty(self, device: torch.device | str) -> Tensor:
        """An uninitialised tensor."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


# What the fake implementations have promised, from meta tensors: real ones would be the results'
# memory once more. torch's meta functions are Python, of 10 to 40 us each, hence the caches.
PROMISES_MAX = 1024


def _on_meta(layout: Layout | None) -> Any:
    return None if layout is None else layout.empty("meta")


@functools.lru_cache(PROMISES_MAX)
def _results_promised(
    q: Layout | None, v: Layout | None, backend: str, spec: AttentionSpec
) -> tuple[Any, ...]:
    return tuple(map(Layout.of, _empty_results(_on_meta(q), _on_meta(v), backend, spec)))


@functools.lru_cache(PROMISES_MAX)
def _gradients_promised(
    q: Layout | None,
    k: Layout | None,
    v: Layout | None,
    attn_mask: Layout | None,
    sinks: Layout | None,
    backend: str,
    spec: AttentionSpec,
) -> tuple[Any, ...]:
    extras = AttentionExtras(attn_mask=_on_meta(attn_mask), sinks=_on_meta(sinks))
    grads = _empty_gradients(_on_meta(q), _on_meta(k), _on_meta(v), backend, spec, extras)
    return tuple(map(Layout.of, grads))


def _settled(actual: Tensor | None, promised: Layout, device: torch.device) -> Tensor:
    """``actual`` in the strides that were promised; what was not asked for has no elements."""
    if actual is None:
        return promised.empty(device)
    if actual.stride() == promised.stride:
        return actual
    return promised.empty(device).copy_(actual)


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
        ops.forward: forward_flops,
        ops.backward: backward_flops,
    }
    for op, formula in formulas.items():
        register_flop_formula(op)(formula)
    return {op: flop_registry[op] for op in formulas}
