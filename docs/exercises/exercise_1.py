"""Exercises of notebook 1, Softmax and its overflow.

Replace each ``raise NotImplementedError``, then: python -m pytest docs/exercises/test_exercise_1.py
"""

from torch import Tensor


def safe_softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension, without ``torch.softmax``.

    Any finite scores are right; a row of nothing but -inf gives zeros, since it has nothing to
    weigh. The rows may be of very different size.
    """
    raise NotImplementedError


def log_softmax(scores: Tensor) -> Tensor:
    """The logarithm of the softmax over the last dimension, without ``torch.log_softmax``.

    It is finite wherever the score is, even if the weight itself underflows to 0.
    """
    raise NotImplementedError


def sigmoid(x: Tensor) -> Tensor:
    """``1 / (1 + exp(-x))`` by ``torch.exp`` and arithmetic, for any finite x.

    It must be differentiable as well: autograd runs through what you write, and no gradient may be
    NaN.
    """
    raise NotImplementedError
