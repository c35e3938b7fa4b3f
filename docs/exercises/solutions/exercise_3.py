"""Solutions of exercise_3.py."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """``m (M,)``, ``l (M,)`` and ``o (M, Dv)`` of some keys, for M queries."""

    m: Tensor
    l: Tensor
    o: Tensor


def merge(a: State, b: State) -> State:
    """Where both are empty any finite number will do for the maximum they are shifted by."""
    m = torch.maximum(a.m, b.m)
    shift = torch.where(m == -torch.inf, 0, m)
    a_weight, b_weight = torch.exp(a.m - shift), torch.exp(b.m - shift)
    return State(
        m,
        a_weight * a.l + b_weight * b.l,
        a_weight[:, None] * a.o + b_weight[:, None] * b.o,
    )


def merge_outputs(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """A finished part is a part of one key, with score lse and value out."""

    def state(out: Tensor, lse: Tensor) -> State:
        return State(lse, (lse > -torch.inf).to(lse.dtype), out)

    merged = merge(state(out_a, lse_a), state(out_b, lse_b))
    return merged.o / torch.where(merged.l == 0, 1, merged.l)[:, None]


def streaming_entropy(blocks: Iterable[Tensor]) -> Tensor:
    """With p = e^(s - m) / l the entropy is log l - t / l, where t = sum e^(s - m) (s - m).

    t isn't like o, since its terms hold m outside of the exponential as well: of a new maximum m'
    the sum of e^(s - m') (s - m') is rescale * (t + (m - m') l).
    """
    m, l, t = torch.tensor(-torch.inf), torch.tensor(0.0), torch.tensor(0.0)
    for scores in blocks:
        m_new = torch.maximum(m, scores.amax(dim=1))
        rescale, shifted = torch.exp(m - m_new), scores - m_new[:, None]
        p = torch.exp(shifted)
        moved = torch.where(l == 0, 0, (m - m_new) * l)  # before the first block m is -inf
        t = rescale * (t + moved) + (p * shifted).sum(dim=1)
        m, l = m_new, rescale * l + p.sum(dim=1)
    return torch.log(l) - t / l
