"""The one ``autograd.Function``: it saves, calls the backend it was given, and returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashlayer.spec import AttentionExtras, AttentionSpec, Backend


class FlashAttentionFunction(torch.autograd.Function):
    """Attention whose backward recomputes the probabilities from the saved LSE.

    The backward is left open to autograd: a second derivative goes through the operations of the
    tiled backward, and raises at the custom ops of the other backends, which have none. It is never
    silently dropped, as ``once_differentiable`` would drop the part that comes through q, k and v.

    ``apply(backend, spec, q, k, v, *extras) -> (o, lse)``; only q, k, v, the extras, o and lse are
    kept for the backward pass, nothing of size Sq x Sk.
    """

    @staticmethod
    def forward(
        backend: Backend,
        spec: AttentionSpec,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *extras: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Call the backend."""
        return backend.forward(q, k, v, spec, AttentionExtras(*extras))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        """Keep what the backward needs."""
        ctx.backend, ctx.spec, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)
        # An unused output's gradient stays None: most calls have no dlse, and then nothing is spent
        # on it.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Call the backend's backward."""
        q, k, v, *extras, o, lse = ctx.saved_tensors
        if do is None:
            do = torch.zeros_like(o)
        dq, dk, dv, d_mask, d_sinks = ctx.backend.backward(
            do, dlse, q, k, v, o, lse, ctx.spec, AttentionExtras(*extras)
        )
        return None, None, dq, dk, dv, d_mask, None, d_sinks
