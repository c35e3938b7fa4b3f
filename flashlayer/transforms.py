"""What no flash kernel's backward pass has: the second derivative, forward mode and vmap.

The tangents of o and lse come from the backend's own kernel where it has one for the call. All else
is pushed through the tiled algorithm, which is plain PyTorch: a tangent is one more tensor of the
primal's size, so memory stays O(Sq + Sk).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

from flashlayer.spec import (
    Backend,
    Call,
    Problem,
    TangentBackend,
    Tensors,
    as_extras,
    in_input_order,
    is_observed,
)

# Of torch's older vmap, whose tensors have no public interface.
_is_batched: Any = vars(torch._C)["_functorch"].is_legacy_batchedtensor
_add_batch_dim, _remove_batch_dim = (vars(torch)[f"_{act}_batch_dim"] for act in ("add", "remove"))


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is going on."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def unbatched(method: Callable[..., Tensors]) -> Callable[..., Tensors]:
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
        outputs, _ = map_batch(functools.partial(method, ctx), size, in_dims, args)
        return tuple(
            None if output is None else _add_batch_dim(output, 0, level) for output in outputs
        )

    return each


def forward_in_graph(tiled: Backend, problem: Problem) -> tuple[Tensor, ...]:
    """A backend's results under a transform inside ``torch.compile``, from plain operations.

    Dynamo drops the tangents of a Function without an error.

    Raises:
        NotImplementedError: packed sequences.
    """
    if problem.extras.cu_seqlens_q is not None:
        raise NotImplementedError(
            "packed sequences have no torch.func transform or forward mode inside "
            "torch.compile: use backend='standard' there"
        )
    return tiled.forward(*problem)


def gradients(
    call: Call, do: Tensor | None, dlse: Tensor | None, more: Tensors, *saved: Any
) -> Tensors:
    """Differentiable gradients of q, k, v and the extras; ``saved`` ends with o and lse.

    Raises:
        NotImplementedError: the gradient of an entropy, the last of ``more``, is asked for.
    """
    *tensors, o, lse = saved
    if call.spec.entropy:
        if more[-1] is not None:
            raise NotImplementedError(
                "the gradient of the entropy is not differentiable and has no torch.func "
                "transform: use backend='standard'"
            )
        tensors.pop()
    call = _without_auxiliary(call)
    do = torch.zeros_like(o) if do is None else do
    grads = FlashAttentionBackward.apply(call, do, dlse, o.detach(), lse.detach(), *tensors)
    return in_input_order(grads, tensors[3:])


def with_tangents(call: Call, tensors: Tensors) -> tuple[Tensor, Tensor] | None:
    """``o`` and ``lse`` with the tangents that q, k and v give them, in one pass over the keys.

    None where the backend has no kernel for it, or where the tangents are not those of the
    innermost transform: a Function then finds them at their own level.
    """
    levels = _functorch_levels()
    if forward_ad._current_level < 0 or (levels and levels[-1] != TransformType.Jvp):
        return None
    primals, tangents = _unpacked(tensors)
    batched = any(x is not None and _is_batched(x) for x in (*primals, *tangents))
    if batched or not _has_kernel(call, primals, tangents):
        return None
    o, lse, o_tangent, lse_tangent = AttentionWithTangents.apply(call, *tangents[:3], *primals)
    return forward_ad.make_dual(o, o_tangent), forward_ad.make_dual(lse, lse_tangent)


def forward_tangents(call: Call, primals: Tensors, tangents: Tensors) -> Tensors:
    """Tangents of o, lse and entropy in the direction of those of q, k, v and the extras."""
    primals, _ = _unpacked(primals)  # saved inputs may still carry the very tangents they came with
    if _has_kernel(call, primals, tangents):
        return AttentionWithTangents.apply(call, *tangents[:3], *primals)[2:]
    o, lse, *more = _push(_tiled_forward(call), primals, tangents)
    if call.spec.max_scores:
        more[0] = None
    return o, lse, *more


def _without_auxiliary(call: Call) -> Call:
    spec = dataclasses.replace(call.spec, max_scores=False, entropy=False)
    return dataclasses.replace(call, spec=spec)


def _functorch_levels() -> list[TransformType]:
    """The transforms of torch.func that are going on, the innermost last."""
    return [level.key() for level in get_interpreter_stack() or ()]


def _unpacked(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Primals and tangents of the innermost level."""
    pairs = [(x, None) if x is None else forward_ad.unpack_dual(x) for x in tensors]
    primals, tangents = zip(*pairs, strict=True)
    return primals, tangents


def _has_kernel(call: Call, primals: Tensors, tangents: Tensors) -> bool:
    """Whether the backend computes tangents in these directions.

    The kernel's tangents have none of their own: if an outer level is forward mode, the tiled
    algorithm is differentiated twice.
    """
    q, k, v, *extras = primals
    return (
        TransformType.Jvp not in _functorch_levels()[:-1]
        and any(x is not None for x in tangents[:3])
        and all(x is None for x in tangents[3:])
        and call.backend.has_tangents(Problem(q, k, v, call.spec, as_extras(extras)))
    )


class AttentionWithTangents(torch.autograd.Function):
    """``apply(call, q', k', v', q, k, v, *extras) -> (o, lse, o', lse')``, in one pass.

    A tangent that is None is zero. Tangents are linear in their direction: with ``L = <u, o'> +
    <w, lse'>`` the gradient with respect to (q', k', v') is that of ``<u, o> + <w, lse>`` with
    respect to (q, k, v), and the gradient with respect to (q, k, v) is the tangent of that one in
    the direction (q', k', v').
    """

    @staticmethod
    def forward(call: Call, *tensors: Any) -> Tensors:
        """Call the backend; where something must see the call, the tiled algorithm."""
        q, k, v, *rest = tensors[3:]
        # PyTorch's formulas make zero tensors that have no memory.
        tangents = tuple(None if x is None or x._is_zerotensor() else x for x in tensors[:3])
        if not is_observed(q):
            backend = cast(TangentBackend, call.backend)
            return backend.forward_tangents((q, k, v), tangents, call.spec, as_extras(rest))
        o, lse = call.backend.forward(q, k, v, call.spec, as_extras(rest))
        directions = *tangents, *(None for _ in rest)
        return o, lse, *_push(_tiled_forward(call), (q, k, v, *rest), directions)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensors) -> None:
        """Keep what the derivatives need."""
        ctx.call = inputs[0]
        ctx.save_for_backward(*inputs[1:], *output[:2])
        ctx.set_materialize_grads(False)

    @staticmethod
    @unbatched
    def backward(
        ctx: Any, do: Tensor | None, dlse: Tensor | None, u: Tensor | None, w: Tensor | None
    ) -> Tensors:
        """The backend's backward for o and lse, and the second derivative for their tangents."""
        q_tangent, k_tangent, v_tangent, *saved = ctx.saved_tensors
        tangents, primals = (q_tangent, k_tangent, v_tangent), saved[:-2]
        grads = of_tangents = (None,) * len(primals)
        if do is not None or dlse is not None:
            grads = gradients(ctx.call, do, dlse, (), *saved)
        if u is not None or w is not None:
            u = torch.zeros_like(saved[-2]) if u is None else u
            of_tangents = gradients(ctx.call, u, w, (), *saved)
            directions = *tangents, *(None for _ in primals[3:])
            results = (x.detach() for x in saved[-2:])
            second = FlashAttentionSecond.apply(ctx.call, u, w, *results, *primals, *directions)[2:]
            grads = _sums(grads, second)
        of_tangents = (
            None if x is None else grad for x, grad in zip(tangents, of_tangents, strict=False)
        )
        return None, *of_tangents, *grads

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensors, tuple[int | None, ...]]:
        """One call for each element of the mapped dimension."""
        return map_batch(AttentionWithTangents.apply, info.batch_size, in_dims, args)


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
        grads = call.backend.backward(do, dlse, q, k, v, o, lse, call.spec, as_extras(extras))
        if forward_ad._current_level < 0:
            return grads
        # ATen's gradients are views; PyTorch sets no tangent of other strides on a view.
        return tuple(None if x is None else x.clone() for x in grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensors) -> None:
        """Keep the inputs."""
        ctx.call = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @unbatched
    def backward(ctx: Any, *cotangents: Tensor | None) -> Tensors:
        """The Hessian times the cotangents."""
        do, dlse, o, lse, *tensors = ctx.saved_tensors
        directions = in_input_order(cotangents, tensors[3:])
        second = FlashAttentionSecond.apply(ctx.call, do, dlse, o, lse, *tensors, *directions)
        d_do, d_dlse, *grads = second
        return None, d_do, d_dlse if dlse is not None else None, None, None, *grads

    @staticmethod
    @unbatched
    def jvp(ctx: Any, _call: None, *tangents: Tensor | None) -> Tensors:
        """Push the tangents through the tiled forward and backward; forward over reverse mode.

        o and lse are functions of the rest and are computed anew.
        """
        do_tangent, dlse_tangent, _, _, *rest = tangents
        do, dlse, _, _, *tensors = ctx.saved_tensors
        return _push(
            _tiled_gradient(ctx.call),
            (do, dlse, *tensors),
            (do_tangent, dlse_tangent, *rest),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensors, tuple[int | None, ...]]:
        """One call for each element of the mapped dimension."""
        return map_batch(FlashAttentionBackward.apply, info.batch_size, in_dims, args)


class FlashAttentionSecond(torch.autograd.Function):
    """``apply(call, do, dlse, o, lse, *primals, *directions) -> (o', lse', *(grad L)')``.

    The tangents of o, lse and ``grad L`` in a direction; L as in :class:`FlashAttentionBackward`.
    They are linear in the direction and have a derivative with respect to it alone, all that the
    double-backward trick of ``torch.autograd.functional.hvp`` needs: the Hessian of L is symmetric,
    so the gradient of ``<a, o'> + <b, lse'> + <w, (grad L)'>`` is that of ``<a, o> + <b, lse>``
    with respect to the primals, and the tangent of ``grad L`` in the direction w.
    """

    @staticmethod
    def forward(
        call: Call, do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, *tensors: Any
    ) -> Tensors:
        """Tangents of (o, lse) and of the gradients."""
        half = len(tensors) // 2
        primals, direction = tensors[:half], tensors[half:]
        d_do, d_dlse = forward_tangents(call, primals, direction)
        grads = _push(_tiled_gradient(call), (do, dlse, *primals), (None, None, *direction))
        return d_do, d_dlse, *in_input_order(grads, primals[3:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensors) -> None:
        """Keep all but the direction."""
        ctx.call = inputs[0]
        fixed = inputs[1 : (len(inputs) + 5) // 2]
        ctx.save_for_backward(*fixed)
        ctx.fixed = sum(isinstance(x, Tensor) for x in fixed)  # each has an edge in the graph
        ctx.set_materialize_grads(False)

    @staticmethod
    @unbatched
    def backward(ctx: Any, a: Tensor | None, b: Tensor | None, *w: Tensor | None) -> Tensors:
        """The gradient with respect to the direction.

        Raises:
            NotImplementedError: another one is needed, which is a third derivative and would be
                silently wrong otherwise.
        """
        if any(_is_needed(node) for node, _ in ctx.next_functions[: ctx.fixed]):
            raise NotImplementedError(
                "attention has no third derivative here; use backend='standard'"
            )
        do, dlse, o, lse, *primals = ctx.saved_tensors
        first = second = (None,) * len(primals)
        if a is not None or b is not None:
            first = gradients(ctx.call, a, b, (), *primals, o, lse)
        if any(x is not None for x in w):
            second = FlashAttentionSecond.apply(ctx.call, do, dlse, o, lse, *primals, *w)[2:]
        constant = (None,) * (5 + len(primals))
        needed = zip(ctx.needs_input_grad[len(constant) :], _sums(first, second), strict=True)
        return *constant, *(grad if is_needed else None for is_needed, grad in needed)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensors, tuple[int | None, ...]]:
        """One call for each element of the mapped dimension."""
        return map_batch(FlashAttentionSecond.apply, info.batch_size, in_dims, args)


def _sums(a: Tensors, b: Tensors) -> Tensors:
    """``a + b``; None is zero."""
    pairs = zip(a, b, strict=True)
    return tuple(y if x is None else x if y is None else x + y for x, y in pairs)


def _is_needed(node: Any) -> bool:
    """Whether the backward pass going on leads to an input's node; needs_input_grad is of all."""
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # of a leaf whose gradient torch.autograd.grad was asked for
        return True


def _tiled_forward(call: Call) -> Callable[..., Tensors]:
    def forward(q: Tensor, k: Tensor, v: Tensor, *extras: Tensor | None) -> Tensors:
        return call.tiled.forward(q, k, v, call.spec, as_extras(extras))

    return forward


def _tiled_gradient(call: Call) -> Callable[..., Tensors]:
    def gradient(do: Tensor, dlse: Tensor | None, *tensors: Any) -> Tensors:
        q, k, v, *rest = tensors
        extras = as_extras(rest)
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


def map_batch(
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
