"""Attention over a sequence that is sharded over the ranks of a process group.

Two ways, both with the results of :func:`flashlayer.flash_attention` on the whole sequence:

* :func:`ring_attention`: queries stay, keys and values travel round the ring, and each rank merges
  its partial results by their LSE, as tiles merge within one call. Any number of ranks and heads.
* :func:`ulysses_attention`: two all-to-all exchanges turn shards of the sequence into shards of the
  heads and back. Less traffic on many ranks, but the ranks must divide the heads.

A *placement* says which positions a rank's shard holds. ``"contiguous"``: rank r holds the r-th
range of the sequence; the ranges may differ in length. ``"zigzag"``: the sequence is cut into ``2
N`` equal ranges for ``N`` ranks, and rank r holds the r-th from either end. With causal attention
the last rank of a contiguous placement has N times the work of the first; with zigzag all ranks
have the same.
"""

from flashlayer.distributed.layout import (
    Placement,
    position_ids,
    shard_lengths,
    shard_sequence,
    unshard_sequence,
)
from flashlayer.distributed.ring import ring_attention
from flashlayer.distributed.ulysses import ulysses_attention

__all__ = [
    "Placement",
    "position_ids",
    "ring_attention",
    "shard_lengths",
    "shard_sequence",
    "ulysses_attention",
    "unshard_sequence",
]
