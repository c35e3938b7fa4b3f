"""Exercises of notebook 4, Log-sum-exp.

Replace each ``raise NotImplementedError``, then: python -m pytest docs/exercises/test_exercise_4.py
"""

from torch import Tensor


def log_sum_exp(scores: Tensor) -> Tensor:
    """Log of the sum of exp over the last dimension, without ``torch.logsumexp``.

    Any finite scores are right; a row of nothing but -inf gives -inf.
    """
    raise NotImplementedError


def probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """The softmax's probabilities of a tile of scores, from the LSE of the whole rows.

    Args:
        scores: ``(M, N)``, some of the row's scores; -inf where a key is hidden.
        lse: ``(M,)``; -inf for a row that sees no key at all, whose probabilities are 0.
    """
    raise NotImplementedError


def merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Output and LSE of attention to all keys, from those to any number of parts of the keys.

    Args:
        outs: one ``(M, D)`` for each part.
        lses: one ``(M,)`` for each part; a row may have seen no key of a part, then its LSE there
            is -inf. No row has seen none in all of them.
    """
    raise NotImplementedError


def delta(out: Tensor, do: Tensor, dlse: Tensor | None) -> Tensor:
    """What is subtracted from dP in ``ds = p * (dp - delta)``, ``(M,)``.

    Args:
        out: ``(M, D)``.
        do: ``(M, D)``, the gradient that arrives at the output.
        dlse: ``(M,)``, the gradient that arrives at the LSE, or None if nobody used the LSE.
    """
    raise NotImplementedError


def add_sink(out: Tensor, lse: Tensor, sink: float) -> tuple[Tensor, Tensor]:
    """Output and LSE as if the softmax had had one more logit, ``sink``, that brings no value.

    Args:
        out: ``(M, D)``, finished attention without it.
        lse: ``(M,)``; may be as large or small as it likes.
        sink: the logit.
    """
    raise NotImplementedError
