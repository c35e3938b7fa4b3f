"""The ``autograd.Function`` over any backend: it saves, calls and returns.

The first derivative is the backend's own; what no flash kernel has is in
:mod:`flashlayer.transforms`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashlayer import transforms
from flashlayer.spec import (
    NO_EXTRAS,
    Backend,
    Call,
    Problem,
    Tensors,
    as_extras,
    in_input_order,
    no_entropy_gradient,
)


def attend(backend: Any, tiled: Backend, problem: Problem) -> tuple[Tensor, ...]:
    """``o``, ``lse`` and what else the spec asks for, differentiable in every way they can be.

    A compiled graph takes the first derivative only: Dynamo traces no Function that has more. A
    call that nothing differentiates or transforms is the backend's forward alone.
    """
    q, k, v, spec, extras = problem
    # Omit unused extras: each argument slows a short call.
    leaves = (q, k, v) if extras is NO_EXTRAS else (q, k, v, *extras)
    compiling = torch.compiler.is_compiling()
    if transforms.is_transformed():
        if compiling:
            return transforms.forward_in_graph(tiled, problem)
        call = Call(backend, tiled, spec)
        dual = transforms.with_tangents(call, leaves)
        return TransformableAttention.apply(call, *leaves) if dual is None else dual
    tracked = q.requires_grad or k.requires_grad or v.requires_grad
    if extras is not NO_EXTRAS:
        tracked = tracked or any(x is not None and x.requires_grad for x in extras)
    if not (tracked and torch.is_grad_enabled()):
        return backend.forward(q, k, v, spec, extras)
    call = Call(backend, tiled, spec)
    if compiling:
        # Dynamo rejects aliased inputs.
        k, v = k.view_as(k), v.view_as(v)
        if extras.cu_seqlens_k is not None:
            extras = extras._replace(cu_seqlens_k=extras.cu_seqlens_k.view_as(extras.cu_seqlens_k))
        results = FlashAttentionFunction.apply(call, q, k, v, *extras)
        if spec.entropy and not backend.entropy_gradient:
            results = *results[:-1], backend.refuse_gradient(results[-1], q)
        return results
    return _apply_untransformed(call, *leaves)


class FlashAttentionFunction(torch.autograd.Function):
    """``apply(call, q, k, v, *extras) -> (o, lse[, max_scores][, entropy])``, once differentiable.

    Only q, k, v, the extras, o, lse and the entropy are kept for the backward pass, nothing of size
    Sq x Sk.
    """

    @staticmethod
    def forward(call: Call, q: Tensor, k: Tensor, v: Tensor, *extras: Any) -> tuple[Tensor, ...]:
        """Call the backend."""
        return call.backend.forward(q, k, v, call.spec, as_extras(extras))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        """Keep what the derivatives need."""
        ctx.call = call = inputs[0]
        o, lse, *more = output
        ctx.save_for_backward(*inputs[1:], *more[call.spec.max_scores :], o, lse)
        if call.spec.max_scores:
            ctx.mark_non_differentiable(more[0])
        # An unused output's gradient stays None: most calls have no dlse, and pay nothing for it.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None, *more: Tensor | None) -> Tensors:
        """Call the backend's backward."""
        q, k, v, *extras, o, lse = ctx.saved_tensors
        if do is None:
            do = torch.zeros_like(o)
        call, options = ctx.call, {}
        if call.spec.entropy:
            *extras, entropy = extras
            dlse, options = _entropy_gradient(call, dlse, more[-1], entropy)
        args = do, dlse, q, k, v, o, lse, call.spec, as_extras(extras)
        if torch._C._len_torch_function_stack() > 0:
            # A mode such as sdpa.override would be entered by every operation of the backend.
            with torch._C.DisableTorchFunction():
                grads = call.backend.backward(*args, **options)
        else:
            grads = call.backend.backward(*args, **options)
        return None, *in_input_order(grads, extras)


def _entropy_gradient(
    call: Call, dlse: Tensor | None, dentropy: Tensor | None, entropy: Tensor
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """``dlse`` and ``dentropy`` as a backend takes them.

    Raises:
        NotImplementedError: the backend takes none.
    """
    if dentropy is None:
        return dlse, {}
    if not call.backend.entropy_gradient:
        if torch.compiler.is_compiling():  # zeros: attend detaches this entropy
            return dlse, {}
        raise NotImplementedError(no_entropy_gradient(call.backend.name))
    shift = -dentropy * entropy
    return shift if dlse is None else dlse + shift, {"dentropy": dentropy}


class TransformableAttention(FlashAttentionFunction):
    """The same with every transform of ``torch.func``: twice differentiable, jvp, vmap."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        """Keep the inputs for forward mode as well."""
        FlashAttentionFunction.setup_context(ctx, inputs, output)
        if transforms.is_transformed():
            ctx.save_for_forward(*inputs[1:])

    @staticmethod
    @transforms.unbatched
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None, *more: Tensor | None) -> Tensors:
        """Call the backend's backward, through a Function where it may be differentiated again."""
        if torch.is_grad_enabled() or transforms.is_transformed():
            return None, *transforms.gradients(ctx.call, do, dlse, more, *ctx.saved_tensors)
        return FlashAttentionFunction.backward(ctx, do, dlse, *more)

    @staticmethod
    @transforms.unbatched
    def jvp(ctx: Any, _call: None, *tangents: Tensor | None) -> Tensors:
        """The tangents of o and lse."""
        return transforms.forward_tangents(ctx.call, ctx.saved_tensors, tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensors, tuple[int | None, ...]]:
        """One call for each element of the mapped dimension."""
        return transforms.map_batch(TransformableAttention.apply, info.batch_size, in_dims, args)


# ``apply`` without its preparations for torch.func: half the time of a short call.
_untransformed: Any = super(torch.autograd.Function, TransformableAttention)
_apply_untransformed = _untransformed.apply
