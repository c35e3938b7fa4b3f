"""Exercises of notebook 6, The backward pass.

Replace each ``raise NotImplementedError``, then: python -m pytest docs/exercises/test_exercise_6.py
"""

from torch import Tensor


def softmax_backward(p: Tensor, dp: Tensor) -> Tensor:
    """The gradient of the scores, from softmax's result ``p`` and its gradient ``dp``.

    Both are ``(M, N)``; the softmax is over the last dimension. Build no Jacobian.
    """
    raise NotImplementedError


def softcap_backward(scores: Tensor, ds: Tensor, softcap: float) -> Tensor:
    """The gradient before a softcap, from the gradient ``ds`` after it.

    ``scores`` are what the softcap returned, ``softcap * tanh(x / softcap)``; x itself is gone.
    """
    raise NotImplementedError


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of attention without a mask, from what the forward pass keeps.

    Args:
        q: ``(M, D)``; k and v are ``(N, D)``.
        k: see q.
        v: see q.
        out: ``(M, D)``, the output.
        lse: ``(M,)``, the log-sum-exp of the scaled scores.
        do: ``(M, D)``, the gradient of the output.
        dlse: ``(M,)``, the gradient of the log-sum-exp.
        scale: factor on ``q k^T``.
    """
    raise NotImplementedError


def key_block_gradients(
    start: int,
    stop: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    do: Tensor,
    scale: float,
    block_m: int,
) -> tuple[Tensor, Tensor]:
    """What one program of ``dkdv_kernel`` computes: dk and dv of the keys ``[start, stop)``.

    Attention is causal, query i sees the keys 0 to i; q, k, v and do are ``(S, D)``, lse and delta
    ``(S,)``. Take ``block_m`` queries at a time, and none of those that see no key of the block. No
    tensor on the way may be larger than q or a tile of ``block_m`` times ``stop - start`` scores,
    whichever is larger.
    """
    raise NotImplementedError
