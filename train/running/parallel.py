"""How a training run is spread over processes.

Ranks form a grid of ``data x context``. Rows of the batch are split along the first axis, the
positions of every sequence along the second. Every rank's loss is the mean over equally many
tokens, so the mean over the ranks is the loss of the whole batch, exactly, and so is its gradient.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flashlayer.distributed import (
    position_ids,
    ring_attention,
    shard_sequence,
    ulysses_attention,
)


@dataclass(frozen=True)
class Parallel:
    """The grid of ranks.

    Attributes:
        data: number of ranks that the rows of a batch are split over.
        context: number of ranks that the positions of every sequence are split over.
        shard: FSDP2: parameters, gradients and optimizer are sharded over all ranks. Else DDP: each
            rank holds all of them.
        attention: across the ranks of a context: ``ring``, or ``ulysses`` where they divide the
            heads.
        placement: which positions a rank of a context holds; ``zigzag`` balances causal attention,
            ``contiguous`` is one range.
        timeout: seconds that a rank waits for the others before it gives the run up.
    """

    data: int = 1
    context: int = 1
    shard: bool = False
    attention: Literal["ring", "ulysses"] = "ring"
    placement: Literal["zigzag", "contiguous"] = "zigzag"
    timeout: float = 600.0

    @property
    def ranks(self) -> int:
        """How many processes that takes."""
        return self.data * self.context

    def grid(self, device: torch.device) -> DeviceMesh:
        """The ranks on a mesh with the dimensions ``data`` and ``context``."""
        return init_device_mesh(
            device.type, (self.data, self.context), mesh_dim_names=("data", "context")
        )


@dataclass(frozen=True)
class SequenceShard:
    """Which positions of every sequence are this rank's, and how it attends to the others.

    Attributes:
        group: the ranks that share a sequence.
        attention: as in :class:`Parallel`.
        placement: likewise.
    """

    group: ProcessGroup
    attention: Literal["ring", "ulysses"]
    placement: Literal["zigzag", "contiguous"]

    def take(self, x: Tensor) -> Tensor:
        """``(B, T) -> (B, S)``, this rank's shard."""
        return shard_sequence(x, group=self.group, placement=self.placement)

    def positions(self, length: int, device: torch.device) -> Tensor:
        """``(S,)``, the positions of the shard."""
        return position_ids(length, group=self.group, placement=self.placement, device=device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """As flash attention with the same options, over the whole sequence."""
        across = {"ring": ring_attention, "ulysses": ulysses_attention}[self.attention]
        # Shards are equally long (train.config checks it), so no lengths need to be exchanged.
        lengths = [q.shape[2]] * self.group.size()
        return across(
            q, k, v, group=self.group, placement=self.placement, lengths=lengths, **options
        )


def own_rows(batch: Tensor, grid: DeviceMesh | None) -> Tensor:
    """This rank's rows of a batch that all ranks have read.

    A batch that can't be split equally, the last of a validation, goes to every rank whole: the
    mean over the ranks is exact then too.
    """
    data = grid["data"] if grid is not None else None
    if data is None or len(batch) % data.size():
        return batch
    return batch.chunk(data.size())[data.get_local_rank()]
