"""Solutions of exercise_2.py."""

import math
from collections.abc import Iterable, Iterator, MutableSequence, Sequence

import torch
from torch import Tensor


def online_normaliser(scores: Iterator[float]) -> tuple[float, float]:
    """A masked score adds nothing; leaving it out keeps -inf - -inf from happening."""
    m, l = -math.inf, 0.0
    for score in scores:
        if score > -math.inf:
            m_new = max(m, score)
            m, l = m_new, l * math.exp(m - m_new) + math.exp(score - m_new)
    return m, l


def streaming_attention(blocks: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """One state for each query, each with a maximum of its own."""
    m, l, o = torch.tensor(-torch.inf), torch.tensor(0.0), torch.tensor(0.0)
    for scores, values in blocks:
        m_new = torch.maximum(m, scores.amax(dim=1, keepdim=True))  # [M, 1]
        rescale, p = torch.exp(m - m_new), torch.exp(scores - m_new)
        m = m_new
        l = l * rescale + p.sum(dim=1, keepdim=True)
        o = o * rescale + p @ values
    return o / l


def softmax_in_two_passes(scores: Sequence[float], weights: MutableSequence[float]) -> None:
    """The first pass is the normaliser, the second writes."""
    m, l = online_normaliser(scores[i] for i in range(len(scores)))
    for i in range(len(scores)):
        weights[i] = math.exp(scores[i] - m) / l
