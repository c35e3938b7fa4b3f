"""Exercises of notebook 3, The update rule derived.

Replace each ``raise NotImplementedError``, then: python -m pytest docs/exercises/test_exercise_3.py
"""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor


class State(NamedTuple):
    """``m (M,)``, ``l (M,)`` and ``o (M, Dv)`` of some keys, for M queries."""

    m: Tensor
    l: Tensor
    o: Tensor


def merge(a: State, b: State) -> State:
    """The state of the keys of both. A query may have seen no key in a, in b, or in either."""
    raise NotImplementedError


def merge_outputs(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """The attention over all keys, from finished attention over each of two parts of them.

    ``out (M, Dv)`` is the average of a part's values, ``lse (M,)`` the logarithm of the sum of the
    exponentials of its scores, of any size. A part in which a query saw nothing has ``out = 0`` and
    ``lse = -inf``; one that saw nothing in either gets 0.
    """
    raise NotImplementedError


def streaming_entropy(blocks: Iterable[Tensor]) -> Tensor:
    """The entropy ``- sum p log p`` of the softmax weights p of each row, in one pass.

    A block is ``scores (M, N)``, finite; N differs from block to block. Returns ``(M,)``.

    Hint: write ``log p`` with m and l. One more sum is needed; which rule does it obey?
    """
    raise NotImplementedError
