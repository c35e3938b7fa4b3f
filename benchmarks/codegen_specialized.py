"""Rows of the compile ledger for the warp-specialised kernel, which no tile table names."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from flashlayer.backends.triton import specialized, tiling
from flashlayer.kernels.hopper import CONSUMERS, ROWS
from flashlayer.kernels.tiles import specialized_candidates

# The ledger's name of an option: whether the consumers take turns.
VARIANTS = {"specialized": False, "specialized, in turns": True}


def covers(target: str, dtype: str, head_dim: int, *_: Any) -> bool:
    """Whether the kernel is compiled for a case of the ledger."""
    half = dtype in ("bf16", "fp16")
    return target == "sm_90" and half and head_dim in specialized.HEAD_DIMS


def chosen(option: str, head_dim: int) -> AbstractContextManager[Any]:
    """As if :func:`flashlayer.tune` had chosen the first variant that ``option`` names."""
    turns = VARIANTS[option]
    config = next(x for x in specialized_candidates(head_dim) if x.takes_turns == turns)
    look_up = tiling.tiles_of

    def tiles_of(kernel: str, *call: Any) -> Any:
        return config if kernel == "forward" else look_up(kernel, *call)

    return mock.patch.object(tiling, "tiles_of", tiles_of)


def shape(config: Any) -> dict[str, int]:
    """Tile sizes and stages of a launch, which are no arguments of their own."""
    return {
        "BLOCK_M": CONSUMERS.value * ROWS.value,
        "BLOCK_N": config.BLOCK_N,
        "num_stages": config.STAGES,
    }
