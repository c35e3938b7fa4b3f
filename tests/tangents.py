"""Forward mode of any backend, and how its results are held against the formula's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashlayer import flash_attention, flash_attention_varlen
from flashlayer.testing import accuracy

NAMES = ("out", "lse", "out_tangent", "lse_tangent")


def push(
    name: str, primals: Sequence[Tensor], tangents: Sequence[Tensor | None], **options: Any
) -> dict[str, Tensor]:
    """``out``, ``lse`` and their tangents by the backend ``name``; a tangent of None is zero."""
    given = [x is not None for x in tangents]
    attention = flash_attention_varlen if "cu_seqlens_q" in options else flash_attention

    def attend(*inputs: Tensor) -> Any:
        inputs = iter(inputs)
        tensors = [
            next(inputs) if is_given else x for is_given, x in zip(given, primals, strict=True)
        ]
        return attention(*tensors, return_lse=True, backend=name, **options)

    directions = tuple(x for x in tangents if x is not None)
    points = tuple(x for is_given, x in zip(given, primals, strict=True) if is_given)
    results = torch.func.jvp(attend, points, directions)
    return dict(zip(NAMES, (*results[0], *results[1]), strict=True))


def check(
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    backend: str = "triton",
    **options: Any,
) -> dict[str, Tensor]:
    """A backend's results, held against the formula in fp64 by the accuracy rule."""
    wide = [[None if x is None else x.double() for x in tensors] for tensors in (primals, tangents)]
    actual = push(backend, primals, tangents, **options)
    same_dtype = push("standard", primals, tangents, **options)
    reference = push("standard", *wide, **options)
    for name, result in actual.items():
        factor = accuracy.FACTORS.get(name, accuracy.GRADIENT_FACTOR)
        accuracy.assert_accurate(name, result, same_dtype[name], reference[name], factor)
    return actual
