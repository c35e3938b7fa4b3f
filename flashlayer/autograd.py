"""The ``autograd.Function`` over any backend: it saves, calls and returns.

The first derivative is the backend's own. What no flash kernel has, the second derivative and
forward mode, comes from pushing tangents through the tiled algorithm, which is plain PyTorch: a
tangent is one more tensor of the primal's size, so memory stays O(Sq + Sk).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashlayer.spec import NO_EXTRAS, AttentionExtras, AttentionSpec, Backend, Problem

# Of torch's older vmap, which keeps its tensors to itself.
_is_batched: Any = vars(torch._C)["_functorch"].is_legacy_batchedtensor
_add_batch_dim, _remove_batch_dim = (vars(torch)[f"_{act}_batch_dim"] for act in ("add", "remove"))

# Gradients, tangents and saved tensors: a Tensor, or None where an option is off.
Tensors = tuple[Any, ...]


# Not a tuple, which torch.func would take apart; not frozen, which costs as much as the rest of it.
@dataclass(slots=True)
class Call:
    """What the Functions need besides tensors."""

    backend: Backend
    tiled: Backend  # what tangents are pushed through
    spec: AttentionSpec


def attend(backend: Backend, tiled: Backend, problem: Problem) -> tuple[Tensor, Tensor]:
    """``o`` and ``lse`` of a problem by ``backend``, with every derivative there is.

    A compiled graph takes the first derivative only: Dynamo traces no Function that has more. A
    call that nothing differentiates or transforms is the backend's forward alone.

    Raises:
        NotImplementedError: packed sequences under a transform of ``torch.func`` inside
            ``torch.compile``.
    """
    q, k, v, spec, extras = problem
    # Options that are off are no arguments: a short call feels each of them.
    leaves = (q, k, v) if extras is NO_EXTRAS else (q, k, v, *extras)
    compiling = torch.compiler.is_compiling()
    if _is_transformed():
        if not compiling:
            return TransformableAttention.apply(Call(backend, tiled, spec), *leaves)
        # Dynamo's Function drops tangents without a word; PyTorch's own operations keep them.
        if extras.cu_seqlens_q is not None:
            raise NotImplementedError(
                "packed sequences have no torch.func transform or forward mode inside "
                "torch.compile: use backend='standard' there"
            )
        return tiled.forward(q, k, v, spec, extras)
    tracked = q.requires_grad or k.requires_grad or v.requires_grad
    if extras is not NO_EXTRAS:
        tracked = tracked or any(x is not None and x.requires_grad for x in extras)
    if not (tracked and torch.is_grad_enabled()):
        return backend.forward(q, k, v, spec, extras)
    call = Call(backend, tiled, spec)
    if compiling:
        # Dynamo refuses one tensor in two places.
        k, v = k.view_as(k), v.view_as(v)
        if extras.cu_seqlens_k is not None:
            extras = extras._replace(cu_seqlens_k=extras.cu_seqlens_k.view_as(extras.cu_seqlens_k))
        return FlashAttentionFunction.apply(call, q, k, v, *extras)
    return _apply_untransformed(call, *leaves)


def _is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is going on."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _unbatched(method: Callable[..., Tensors]) -> Callable[..., Tensors]:
    """Run a Function's method once for each element of a hidden batch dimension.

    ``torch.autograd.grad(is_grads_batched=True)``, ``jacobian(vectorize=True)`` and ``gradcheck``
    with ``check_batched_grad`` vmap the derivatives by torch's older vmap, which neither calls a
    Function's ``vmap`` nor takes in-place operations on what it has not batched.
    """

    @functools.wraps(method)
    def each(ctx: Any, *args: Any) -> Tensors:
        for x in args:
            if isinstance(x, Tensor) and _is_batched(x):
                break
        else:
            return method(ctx, *args)
        in_dims = tuple(0 if isinstance(x, Tensor) and _is_batched(x) else None for x in args)
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        # A tensor that only an outer level has batched comes out with one element, for all.
        args = tuple(
            x if dim is None else _remove_batch_dim(x, level, 1, 0)
            for x, dim in zip(args, in_dims, strict=True)
        )
        sizes = {len(x) for x, dim in zip(args, in_dims, strict=True) if dim == 0}
        size = max(sizes - {1}, default=1)
        args = tuple(
            x if dim is None or len(x) == size else x.expand(size, *x.shape[1:])
            for x, dim in zip(args, in_dims, strict=True)
        )
        outputs, _ = _map(functools.partial(method, ctx), size, in_dims, args)
        return tuple(
            None if output is None else _add_batch_dim(output, 0, level) for output in outputs
        )

    return each


class FlashAttentionFunction(torch.autograd.Function):
    """``apply(call, q, k, v, *extras) -> (o, lse)``, once differentiable.

    Only q, k, v, the extras, o and lse are kept for the backward pass, nothing of size Sq x Sk.
    """

    @staticmethod
    def forward(call: Call, q: Tensor, k: Tensor, v: Tensor, *extras: Any) -> tuple[Tensor, Tensor]:
        """Call the backend."""
        return call.backend.forward(q, k, v, call.spec, _as_extras(extras))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        """Keep what the derivatives need."""
        ctx.call = inputs[0]
        ctx.save_for_backward(*inputs[1:], *output)
        # An unused output's gradient stays None: most calls have no dlse, and pay nothing for it.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> Tensors:
        """Call the backend's backward."""
        q, k, v, *extras, o, lse = ctx.saved_tensors
        if do is None:
            do = torch.zeros_like(o)
        call = ctx.call
        grads = call.backend.backward(do, dlse, q, k, v, o, lse, call.spec, _as_extras(extras))
        return None, *_by_input(grads, extras)


class TransformableAttention(FlashAttentionFunction):
    """The same with every transform of ``torch.func``: twice differentiable, jvp, vmap."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        """Keep the inputs for forward mode as well."""
        FlashAttentionFunction.setup_context(ctx, inputs, output)
        if _is_transformed():
            ctx.save_for_forward(*inputs[1:])

    @staticmethod
    @_unbatched
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> Tensors:
        """Call the backend's backward, itself differentiable where someone may ask for that."""
        if not torch.is_grad_enabled() and not _is_transformed():
            return FlashAttentionFunction.backward(ctx, do, dlse)
        *tensors, o, lse = ctx.saved_tensors
        if do is None:
            do = torch.zeros_like(o)
        grads = FlashAttentionBackward.apply(ctx.call, do, dlse, o.detach(), lse.detach(), *tensors)
        return None, *_by_input(grads, tensors[3:])

    @staticmethod
    @_unbatched
    def jvp(ctx: Any, _call: None, *tangents: Tensor | None) -> Tensors:
        """Push the tangents of q, k, v and the extras through the tiled forward."""
        return _push(_tiled_forward(ctx.call), ctx.saved_tensors, tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensors, tuple[int | None, ...]]:
        """One call for each element of the mapped dimension."""
        return _map(TransformableAttention.apply, info.batch_size, in_dims, args)


# ``apply`` without its preparations for ``torch.func``: half the time of a short call.
_untransformed: Any = super(torch.autograd.Function, TransformableAttention)
_apply_untransformed = _untransformed.apply


class FlashAttentionBackward(torch.autograd.Function):
    """``apply(call, do, dlse, o, lse, q, k, v, *extras) -> gradients``.

    The gradients are those of q, k, v, the mask and the sinks. With ``L = <do, o> + <dlse, lse>``
    they are the gradient of L, so cotangents ``u`` of them ask for the gradient of ``<u, grad L>``:
    with respect to q, k, v, mask and sinks the Hessian times u, the tangent of grad L in the
    direction u; with respect to do and dlse the tangents of o and lse in that direction.
    """

    @staticmethod
    def forward(
        call: Call,
        do: Tensor,
        dlse: Tensor | None,
        o: Tensor,
        lse: Tensor,
        *tensors: Any,
    ) -> Tensors:
        """Call the backend."""
        q, k, v, *extras = tensors
        grads = call.backend.backward(do, dlse, q, k, v, o, lse, call.spec, _as_extras(extras))
        if forward_ad._current_level < 0:
            return grads
        # ATen's gradients are views; PyTorch sets no tangent of other strides on a view.
        return tuple(None if x is None else x.clone() for x in grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensors) -> None:
        """Keep the inputs; o and lse are functions of the rest and are computed anew."""
        ctx.call, do, dlse, _, _, *tensors = inputs
        ctx.save_for_backward(do, dlse, *tensors)
        ctx.save_for_forward(do, dlse, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    @_unbatched
    def backward(ctx: Any, *cotangents: Tensor | None) -> Tensors:
        """The Hessian times the cotangents."""
        do, dlse, *tensors = ctx.saved_tensors
        second = FlashAttentionSecond.apply(
            ctx.call, do, dlse, *tensors, *_by_input(cotangents, tensors[3:])
        )
        d_do, d_dlse, *grads = second
        return None, d_do, d_dlse if dlse is not None else None, None, None, *grads

    @staticmethod
    @_unbatched
    def jvp(ctx: Any, _call: None, *tangents: Tensor | None) -> Tensors:
        """Push the tangents through the tiled forward and backward; forward over reverse mode."""
        do_tangent, dlse_tangent, _, _, *rest = tangents
        do, dlse, *tensors = ctx.saved_tensors
        return _push(
            _tiled_gradient(ctx.call),
            (do, dlse, *tensors),
            (do_tangent, dlse_tangent, *rest),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensors, tuple[int | None, ...]]:
        """One call for each element of the mapped dimension."""
        return _map(FlashAttentionBackward.apply, info.batch_size, in_dims, args)


class FlashAttentionSecond(torch.autograd.Function):
    """``apply(call, do, dlse, *primals, *cotangents)``; has no derivative of its own."""

    @staticmethod
    def forward(call: Call, do: Tensor, dlse: Tensor | None, *tensors: Any) -> Tensors:
        """Tangents of (o, lse) and of the gradients, in the direction of the cotangents."""
        half = len(tensors) // 2
        primals, direction = tensors[:half], tensors[half:]
        d_do, d_dlse = _push(_tiled_forward(call), primals, direction)
        grads = _push(_tiled_gradient(call), (do, dlse, *primals), (None, None, *direction))
        return d_do, d_dlse, *_by_input(grads, primals[3:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensors) -> None:
        """Nothing to keep."""

    @staticmethod
    @_unbatched
    def backward(ctx: Any, *cotangents: Tensor | None) -> Tensors:
        """Refuse.

        Raises:
            NotImplementedError: always; a third derivative would be silently wrong otherwise.
        """
        raise NotImplementedError("attention has no third derivative here; use backend='standard'")

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensors, tuple[int | None, ...]]:
        """One call for each element of the mapped dimension."""
        return _map(FlashAttentionSecond.apply, info.batch_size, in_dims, args)


def _as_extras(extras: Sequence[Any]) -> AttentionExtras:
    """The extras among a Function's arguments, which are none where all are off."""
    return AttentionExtras(*extras) if extras else NO_EXTRAS


def _by_input(grads: Tensors, extras: Sequence[Any]) -> Tensors:
    """From (dq, dk, dv, d_mask, d_sinks) to one for each of q, k, v and the extras, in order."""
    dq, dk, dv, d_mask, d_sinks = grads
    if not extras:
        return dq, dk, dv
    return dq, dk, dv, *AttentionExtras(attn_mask=d_mask, sinks=d_sinks)


def _tiled_forward(call: Call) -> Callable[..., Tensors]:
    def forward(q: Tensor, k: Tensor, v: Tensor, *extras: Tensor | None) -> Tensors:
        return call.tiled.forward(q, k, v, call.spec, _as_extras(extras))

    return forward


def _tiled_gradient(call: Call) -> Callable[..., Tensors]:
    def gradient(do: Tensor, dlse: Tensor | None, *tensors: Any) -> Tensors:
        q, k, v, *rest = tensors
        extras = _as_extras(rest)
        o, lse = call.tiled.forward(q, k, v, call.spec, extras)
        return call.tiled.backward(do, dlse, q, k, v, o, lse, call.spec, extras)

    return gradient


def _push(function: Callable[..., Tensors], primals: Tensors, tangents: Tensors) -> Tensors:
    """The tangents of ``function(*primals)``; a tangent of None is zero."""
    level = forward_ad._current_level
    with forward_ad._set_fwd_grad_enabled(True):
        if level < 0:
            with forward_ad.dual_level():
                return _push_at_this_level(function, primals, tangents)
        return _push_at_this_level(function, primals, tangents)


def _push_at_this_level(
    function: Callable[..., Tensors], primals: Tensors, tangents: Tensors
) -> Tensors:
    duals = []
    for primal, tangent in zip(primals, tangents, strict=True):
        if primal is not None:  # saved inputs may still carry the very tangents they came with
            primal = forward_ad.unpack_dual(primal).primal
        if primal is not None and tangent is not None:
            primal = forward_ad.make_dual(primal, tangent)
        duals.append(primal)
    outputs = function(*duals)
    unpacked = (None if out is None else forward_ad.unpack_dual(out) for out in outputs)
    return tuple(
        None
        if out is None
        else torch.zeros_like(out.primal)
        if out.tangent is None
        else out.tangent
        for out in unpacked
    )


def _map(
    function: Callable[..., Tensors], size: int, in_dims: tuple, args: tuple
) -> tuple[Tensors, tuple[int | None, ...]]:
    """The results of ``function`` for each element of the mapped dimensions, stacked."""
    if size == 0:  # the shapes of one element that is not there
        args = tuple(
            arg if dim is None else arg.new_zeros(arg.movedim(dim, 0).shape[1:]).unsqueeze(dim)
            for arg, dim in zip(args, in_dims, strict=True)
        )
    results = [
        function(
            *(
                arg if dim is None else arg.select(dim, index)
                for arg, dim in zip(args, in_dims, strict=True)
            )
        )
        for index in range(max(size, 1))
    ]
    outputs = zip(*results, strict=True)
    stacked = tuple(None if parts[0] is None else torch.stack(parts)[:size] for parts in outputs)
    return stacked, tuple(None if output is None else 0 for output in stacked)
