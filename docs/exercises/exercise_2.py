"""Exercises of notebook 2, Online softmax.

Replace each ``raise NotImplementedError``, then: python -m pytest docs/exercises/test_exercise_2.py
"""

from collections.abc import Iterable, Iterator, MutableSequence, Sequence

from torch import Tensor


def online_normaliser(scores: Iterator[float]) -> tuple[float, float]:
    """The maximum m of a stream of scores and ``l = sum exp(score - m)``.

    The stream can be read once, and there is no room to keep it. Scores may be -inf (masked), also
    the first. Of no visible score the answer is ``(-inf, 0)``.
    """
    raise NotImplementedError


def streaming_attention(blocks: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The average of the values under the softmax of *all* scores, from a stream of blocks.

    A block is ``scores (M, N)`` of M queries, all finite, and ``values (N, Dv)``; N differs from
    block to block. There is at least one block. Returns ``(M, Dv)``.
    """
    raise NotImplementedError


def softmax_in_two_passes(scores: Sequence[float], weights: MutableSequence[float]) -> None:
    """Write the softmax of ``scores`` into ``weights``: each score read twice, each weight once.

    The scores are finite; there is at least one. No weight is read.
    """
    raise NotImplementedError
