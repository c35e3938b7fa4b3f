"""Rows of the compile ledger for the warp-specialised kernels, which no tile table names."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from flashlayer.backends.triton import specialized, tiling
from flashlayer.kernels.hopper import CONSUMERS, ROWS
from flashlayer.kernels.tiles import specialized_candidates

# The ledger's name of an option: whether the consumers take turns. Only the forward kernel's may.
VARIANTS = {"specialized": False, "specialized, in turns": True}


def covers(target: str, dtype: str, head_dim: int, *_: Any) -> bool:
    """Whether the kernels are compiled for a case of the ledger."""
    half = dtype in ("bf16", "fp16")
    return target == "sm_90" and half and head_dim in specialized.HEAD_DIMS


def chosen(option: str, head_dim: int) -> AbstractContextManager[Any]:
    """As if :func:`flashlayer.tune` had chosen the first variants that ``option`` names."""
    look_up = tiling.tiles_of

    def tiles_of(kernel: str, *call: Any) -> Any:
        variants = specialized_candidates(kernel, head_dim)
        named = [x for x in variants if x.takes_turns == VARIANTS[option]]
        return named[0] if named else look_up(kernel, *call)

    return mock.patch.object(tiling, "tiles_of", tiles_of)


def shape(kernel: str, config: Any) -> dict[str, int]:
    """Tile sizes and stages of a launch, which are no arguments of their own."""
    held, streamed = CONSUMERS.value * ROWS.value, config.BLOCK
    m, n = (streamed, held) if kernel == "hopper_dkdv_kernel" else (held, streamed)
    return {"BLOCK_M": m, "BLOCK_N": n, "num_stages": config.STAGES}
