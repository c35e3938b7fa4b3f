"""What a call returns besides its output: ``return_aux``, in FlexAttention's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class AuxRequest(NamedTuple):
    """Which fields of :class:`AuxOutput` a call is to compute.

    A superset of ``torch.nn.attention.flex_attention.AuxRequest``, which is taken too.

    Attributes:
        lse: the log-sum-exp of the scores.
        max_scores: the largest score.
        entropy: the entropy of the softmax.
    """

    lse: bool = False
    max_scores: bool = False
    entropy: bool = False


class AuxOutput(NamedTuple):
    """Numbers from inside the softmax, one a row; None where not asked for.

    All are ``(B, H, Sq)``, packed ``(H, Tq)``, contiguous, in fp32 (fp64 for fp64 inputs). Scores
    are those in the formula of :func:`flashlayer.flash_attention`: scaled, capped, with ALiBi and
    the additive mask, natural (not base 2), of the visible keys. Dropout makes no difference.

    Attributes:
        lse: ``log(sum_j exp(score_j) + exp(sink))``, the ``lse`` of ``return_lse``; differentiable.
        max_scores: ``max_j score_j``. A sink is no key and not among them. Without a gradient.
            -inf in a row that sees no key, with a sink or without.
        entropy: ``-sum_j p_j log p_j = lse - sum_j p_j score_j`` with ``p_j = exp(score_j - lse)``,
            in nats, from 0 (all on one key) to the log of the number of keys. A sink counts as one
            more key, so that the p add up to 1: ``- p_0 log p_0`` with ``p_0 = exp(sink - lse)`` is
            a term of the sum. 0 in a row that sees no key. Its gradient is computed by the backends
            ``"tiled"`` and ``"standard"``; the others raise NotImplementedError if one is asked
            for.
    """

    lse: Tensor | None = None
    max_scores: Tensor | None = None
    entropy: Tensor | None = None


def as_request(return_aux: Any, return_lse: bool = False) -> AuxRequest:
    """``return_aux`` as a request; nothing is asked for by None.

    Raises:
        TypeError: it is neither None, an :class:`AuxRequest` nor torch's, or holds no bools.
        ValueError: ``return_lse`` is asked for as well.
    """
    if return_aux is None:
        return AuxRequest()
    if not isinstance(return_aux, AuxRequest):
        fields = getattr(return_aux, "_fields", None)
        if type(return_aux).__name__ != "AuxRequest" or not set(fields or "?") <= _FIELDS:
            kind = type(return_aux).__name__
            raise TypeError(f"return_aux must be an AuxRequest or None, got {kind}")
        return_aux = AuxRequest(**return_aux._asdict())
    for name, asked in zip(AuxRequest._fields, return_aux, strict=True):
        if not isinstance(asked, bool):
            raise TypeError(f"return_aux's {name} must be a bool, got {type(asked).__name__}")
    if return_lse:
        raise ValueError(
            "return_lse and return_aux can't both be given: use return_aux=AuxRequest(lse=True)"
        )
    return return_aux


_FIELDS = set(AuxRequest._fields)


def as_output(request: AuxRequest, lse: Tensor, more: Sequence[Tensor]) -> AuxOutput:
    """What was asked for, from a backend's ``lse`` and its ``more`` results."""
    results = iter((lse, *more) if request.lse else more)
    return AuxOutput(*(next(results).contiguous() if asked else None for asked in request))
