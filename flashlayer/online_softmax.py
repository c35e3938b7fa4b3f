r"""The algorithm itself: softmax-weighted averages, one block of keys at a time.

Softmax attention needs, for one query with scores :math:`s_j` and values :math:`v_j`::

    m = max_j s_j        l = sum_j exp(s_j - m)        o = sum_j exp(s_j - m) v_j        out = o / l

which looks like three passes over the keys. It takes one, because the triple ``(m, l, o)`` of a set
of keys can be computed from the triples of any two parts of it: with ``m = max(m_a, m_b)``::

    l = exp(m_a - m) l_a + exp(m_b - m) l_b        o = exp(m_a - m) o_a + exp(m_b - m) o_b

Factoring ``exp(m_a - m)`` out of each term of part a shows it. The rule is associative and
commutative, and the empty set ``(-inf, 0, 0)`` is its neutral element, so blocks may come in any
order, in any grouping, from any device.

Sources: Milakov & Gimelshein, "Online normalizer calculation for softmax" (arXiv 1805.02867),
section 3, for ``m`` and ``l``; Dao, "FlashAttention-2" (arXiv 2307.08691), section 3.1, for ``o``
left unnormalised until the end and for ``lse = m + log(l)``, all that the backward pass needs to
recompute every probability as ``exp(s_j - lse)``.
The chapter in ``docs/chapter`` derives all of it.

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


class SoftmaxState(NamedTuple):
    """What is known about the keys seen so far, for every row (query).

    Attributes:
        m: ``(..., M)`` running maximum of the scores; -inf before the first visible key.
        l: ``(..., M)`` running denominator, ``sum exp(score - m)``.
        o: ``(..., M, Dv)`` running numerator, ``sum exp(score - m) * value``, not yet divided by
            ``l``.
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
    """The state of no keys at all: ``(-inf, 0, 0)``.

    Args:
        rows: shape of the rows, ``(..., M)``.
        value_dim: ``Dv``.
        dtype: dtype of all three tensors; the accumulation happens in it.
        device: their device.
    """
    m = torch.full((*rows,), -torch.inf, dtype=dtype, device=device)
    return SoftmaxState(m, torch.zeros_like(m), m.new_zeros((*rows, value_dim)))


def update(
    state: SoftmaxState, scores: Tensor, value: Tensor, kept: Tensor | None = None
) -> SoftmaxState:
    """The state after one more block of keys.

    Args:
        state: of rows ``(..., M)``.
        scores: ``(..., M, N)``, -inf where a row does not see a key; in the state's dtype.
        value: ``(..., N, Dv)``, in the state's dtype.
        kept: ``(..., M, N)``, factors of dropout: 0 or ``1 / (1 - p)``. They weigh the values only;
            the denominator is that of the full softmax.
    """
    m = scores.amax(dim=-1)  # [..., M]
    p = torch.exp(scores - _finite(m).unsqueeze(-1))  # [..., M, N]
    return merge(state, SoftmaxState(m, p.sum(dim=-1), (p if kept is None else p * kept) @ value))


def state_of(out: Tensor, lse: Tensor) -> SoftmaxState:
    """The state of finished attention, to be merged with others: one value of score ``lse``.

    Args:
        out: ``(..., M, Dv)``, what :func:`finalize` returned, in any dtype.
        lse: ``(..., M)``, what :func:`lse` returned; the state is in its dtype.
    """
    return SoftmaxState(lse, (lse > -torch.inf).to(lse.dtype), out.to(lse.dtype))


def merge(a: SoftmaxState, b: SoftmaxState) -> SoftmaxState:
    """The state of the keys of ``a`` and ``b`` together; associative and commutative."""
    m = torch.maximum(a.m, b.m)
    # `m` is -inf for a row that has seen nothing in either part; -inf - -inf would be NaN.
    a_weight, b_weight = torch.exp(a.m - _finite(m)), torch.exp(b.m - _finite(m))
    return SoftmaxState(
        m,
        a_weight * a.l + b_weight * b.l,
        a_weight.unsqueeze(-1) * a.o + b_weight.unsqueeze(-1) * b.o,
    )


def finalize(state: SoftmaxState) -> Tensor:
    """The output ``(..., M, Dv)``; zero for a row that has seen no key."""
    return state.o / torch.where(state.l == 0, 1, state.l).unsqueeze(-1)


def lse(state: SoftmaxState) -> Tensor:
    """Log-sum-exp of the scores ``(..., M)``, natural logarithm; -inf for a row without keys."""
    return state.m + torch.log(state.l)


def _finite(m: Tensor) -> Tensor:
    """``m`` with -inf, the maximum of nothing, replaced by 0, so that exp(-inf - m) is 0."""
    return torch.where(m == -torch.inf, 0, m)
