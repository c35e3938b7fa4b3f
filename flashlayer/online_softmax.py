r"""The algorithm itself: softmax-weighted averages, one block of keys at a time.

Softmax attention needs, for one query with scores :math:`s_j` and values :math:`v_j`::

    m = max_j s_j        l = sum_j exp(s_j - m)        o = sum_j exp(s_j - m) v_j        out = o / l

which reads the keys three times. One pass is enough, because the state ``(m, l, o)`` of a set of
keys follows from the states of two subsets that divide it: with ``m = max(m_a, m_b)``::

    l = exp(m_a - m) l_a + exp(m_b - m) l_b        o = exp(m_a - m) o_a + exp(m_b - m) o_b

since ``exp(s_j - m) = exp(m_a - m) exp(s_j - m_a)``. The rule is associative and commutative with
the empty set ``(-inf, 0, 0)`` as neutral element, so blocks of keys may be merged in any order and
grouping.

Sources: Milakov & Gimelshein, "Online normalizer calculation for softmax" (arXiv 1805.02867),
section 3, for ``m`` and ``l``; Dao, "FlashAttention-2" (arXiv 2307.08691), section 3.1, for ``o``
left unnormalised until the end and for ``lse = m + log(l)``, from which the backward pass
recomputes every probability as ``exp(s_j - lse)``. ``docs/chapter`` derives all of it.

Example:
    >>> scores, value = torch.randn(4, 100), torch.randn(100, 8)
    >>> state = init_state((4,), 8, dtype=scores.dtype)
    >>> for block in torch.arange(100).split(32):
    ...     state = update(state, scores[:, block], value[block])
    >>> torch.testing.assert_close(finalize(state), scores.softmax(-1) @ value)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Its exp is 0 in fp64. What stands for log p where p is 0: 0 * -inf would be NaN.
LOWEST = -1000.0


class SoftmaxState(NamedTuple):
    """The state of every row (query) after some of the keys.

    Attributes:
        m: ``(..., M)`` running maximum of the scores; -inf before the first visible key.
        l: ``(..., M)`` running denominator, ``sum exp(score - m)``.
        o: ``(..., M, Dv)`` running numerator, ``sum exp(score - m) * value``.
    """

    m: Tensor
    l: Tensor  # noqa: E741 - the name of both papers
    o: Tensor


def init_state(
    rows: Sequence[int],
    value_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> SoftmaxState:
    """The state before any key: ``(-inf, 0, 0)``.

    Args:
        rows: shape of the rows, ``(..., M)``.
        value_dim: ``Dv``.
        dtype: of all three tensors, and of the accumulation.
        device: of all three tensors.
    """
    m = torch.full((*rows,), -torch.inf, dtype=dtype, device=device)
    return SoftmaxState(m, torch.zeros_like(m), m.new_zeros((*rows, value_dim)))


def update(
    state: SoftmaxState, scores: Tensor, value: Tensor, kept: Tensor | None = None
) -> SoftmaxState:
    """The state after one more block of keys.

    Args:
        state: of rows ``(..., M)``.
        scores: ``(..., M, N)``, -inf where a key is hidden; in the state's dtype.
        value: ``(..., N, Dv)``, in the state's dtype.
        kept: ``(..., M, N)``, dropout factors, 0 or ``1 / (1 - p)``. They multiply the numerator
            only; the denominator is that of the full softmax.
    """
    m = scores.amax(dim=-1)  # [..., M]
    p = torch.exp(scores - _finite(m).unsqueeze(-1))  # [..., M, N]
    return merge(state, SoftmaxState(m, p.sum(dim=-1), (p if kept is None else p * kept) @ value))


def state_of(out: Tensor, lse: Tensor) -> SoftmaxState:
    """A state from finished attention, to be merged with others: one value of score ``lse``.

    Args:
        out: ``(..., M, Dv)``, from :func:`finalize`, in any dtype.
        lse: ``(..., M)``, from :func:`lse`; the state is in its dtype.
    """
    return SoftmaxState(lse, (lse > -torch.inf).to(lse.dtype), out.to(lse.dtype))


def merge(a: SoftmaxState, b: SoftmaxState) -> SoftmaxState:
    """The state of the keys of ``a`` and ``b`` together; associative and commutative."""
    m = torch.maximum(a.m, b.m)
    # m is -inf for a row without a visible key in a and b; -inf - -inf would be NaN.
    a_weight, b_weight = torch.exp(a.m - _finite(m)), torch.exp(b.m - _finite(m))
    return SoftmaxState(
        m,
        a_weight * a.l + b_weight * b.l,
        a_weight.unsqueeze(-1) * a.o + b_weight.unsqueeze(-1) * b.o,
    )


def finalize(state: SoftmaxState) -> Tensor:
    """The output ``(..., M, Dv)``; 0 for a row without a visible key."""
    return state.o / torch.where(state.l == 0, 1, state.l).unsqueeze(-1)


def lse(state: SoftmaxState) -> Tensor:
    """Log-sum-exp of the scores ``(..., M)``, natural log; -inf for a row without a visible key."""
    result = state.m + torch.log(torch.where(state.l == 0, 1, state.l))
    # A constant there: m may be a sink of -inf, which has a tangent.
    return torch.where(state.m == -torch.inf, -torch.inf, result)


def update_weighted_log(
    t: Tensor, before: SoftmaxState, after: SoftmaxState, scores: Tensor
) -> Tensor:
    """``t = sum exp(score - m) * (score - m)``, for :func:`entropy`, after one more block of keys.

    With the maximum the logarithms change too: ``t = exp(m_a - m) (t_a + (m_a - m) l_a) + ...``.

    Args:
        t: ``(..., M)``, of the keys before; 0 for none.
        before: the state of these keys.
        after: the state after :func:`update` with ``scores``.
        scores: ``(..., M, N)``, -inf where a key is hidden.
    """
    m = _finite(after.m)
    shift, logs = before.m - m, scores - m.unsqueeze(-1)
    rescaled = torch.exp(shift) * (t + shift.clamp_min(LOWEST) * before.l)
    return rescaled + (torch.exp(logs) * logs.clamp_min(LOWEST)).sum(dim=-1)


def entropy(state: SoftmaxState, t: Tensor) -> Tensor:
    """Entropy of the probabilities ``(..., M)`` in nats; 0 for a row without a visible key.

    Args:
        state: of all keys.
        t: of all keys, from :func:`update_weighted_log`.
    """
    l = torch.where(state.l == 0, 1, state.l)  # noqa: E741 - as in the state
    return torch.log(l) - t / l


def merge_entropies(entropies: Tensor, lses: Tensor, lse: Tensor) -> Tensor:
    """Entropy ``(..., M)`` of keys of which parts are finished: the grouping property of entropy.

    A part has the probability ``w = exp(lse_part - lse)`` and adds ``w (entropy_part - log w)``.

    Args:
        entropies: ``(..., M, parts)``.
        lses: ``(..., M, parts)``, of each part.
        lse: ``(..., M)``, of all parts together.
    """
    log_w = lses - _finite(lse).unsqueeze(-1)
    log_w = log_w.clamp(LOWEST, 0)  # 0 but for rounding where one part has it all
    return (torch.exp(log_w) * (entropies - log_w)).sum(dim=-1)


def _finite(m: Tensor) -> Tensor:
    """``m`` with -inf replaced by 0, so that exp(-inf - m) is 0 and not NaN."""
    return torch.where(m == -torch.inf, 0, m)
