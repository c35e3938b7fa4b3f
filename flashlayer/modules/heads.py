"""Tensor parallelism: which of the layer's heads this process's projections produce."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flashlayer.masks import IntervalMask

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


@dataclass(frozen=True)
class Heads:
    """The heads of one process: ``count`` query heads of the layer's ``total``."""

    total: int
    count: int
    first: int | None  # index of the first one; None if unknown (plain weights of fewer heads)
    # For each query head here, its head among unsharded keys; None: keys sharded like the queries.
    kv_index: list[int] | None
    mesh: DeviceMesh | None  # the ranks that hold the heads; None if the weights are plain tensors
    placements: tuple[Placement, ...]  # of the query projection's weight on ``mesh``

    def share(self, x: Tensor) -> Tensor:
        """``x``, replicated on every rank, with its gradient summed over the ranks.

        Each rank uses it for its own heads only, so the gradient it computes is a partial sum.
        """
        if self.mesh is None or not x.requires_grad or not torch.is_grad_enabled():
            return x
        from torch.distributed.tensor import DTensor, Partial, Replicate

        everywhere = [Replicate()] * self.mesh.ndim
        summed = [Partial() if place.is_shard() else Replicate() for place in self.placements]
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, self.mesh, everywhere)
        return x.redistribute(placements=everywhere).to_local(grad_placements=summed)

    def known_first(self, name: str) -> int:
        """``first``, or an error about ``name``, which is of all heads."""
        if self.first is None:
            raise ValueError(
                f"{name} is about {self.total} heads and q_proj makes {self.count} of them, its "
                f"weight does not say which: shard it with parallelize_module and ColwiseParallel"
            )
        return self.first

    def local(self, x: Tensor, dim: int, name: str) -> Tensor:
        """This rank's heads of ``x``, which has ``total`` of them in dimension ``dim``."""
        return self.share(x).narrow(dim, self.known_first(name), self.count)

    def sinks(self, sinks: Tensor) -> Tensor:
        """This rank's slice of ``(H,)``; sinks that are sharded already stay."""
        if self.mesh is not None and _is_dtensor(sinks):
            dtensor: DTensor = sinks  # pyright: ignore[reportAssignmentType]
            return dtensor.redistribute(placements=self.placements).to_local()
        if len(sinks) == self.count:
            return sinks
        return self.local(sinks, 0, "sinks")

    def mask(self, attn_mask: Tensor | IntervalMask) -> Tensor | IntervalMask:
        """This rank's heads of ``(B, H, S, Sk)``; a mask of its own heads or of size 1 stays."""
        if isinstance(attn_mask, IntervalMask):
            if attn_mask.intervals.shape[1] != self.total:
                return attn_mask
            return attn_mask.narrow_heads(self.known_first("attn_mask"), self.count)
        heads = attn_mask.shape[-3] if attn_mask.ndim >= 3 else 1
        if heads == self.total:
            return self.local(attn_mask, attn_mask.ndim - 3, "attn_mask")
        return self.share(attn_mask) if heads == 1 else attn_mask

    def keys(self, x: Tensor) -> Tensor:
        """``(..., Hkv, S, D)`` reindexed so that query head ``i`` here reads kv head ``i``."""
        if self.kv_index is None:
            return x
        x = self.share(x)
        if len(set(self.kv_index)) == 1:
            return x.narrow(-3, self.kv_index[0], 1)
        return x.index_select(-3, torch.tensor(self.kv_index, device=x.device))

    def normalize(self, norm: nn.Module, x: Tensor) -> Tensor:
        """``norm(x)``, the gradient of its weight summed over the ranks."""
        weight = norm.weight
        if not isinstance(weight, Tensor) or self.mesh is None or _is_dtensor(weight):
            return norm(x)
        return torch.func.functional_call(norm, {"weight": self.share(weight)}, (x,))


def local_heads(
    widths: tuple[int, int, int], q_weight: Any, head_dim: int, num_heads: int, num_kv_heads: int
) -> Heads | None:
    """The heads that projection outputs of these widths hold; None if all of the layer's.

    ``widths`` are the features that ``q_proj``, ``k_proj`` and ``v_proj`` make. A sharded
    ``DTensor`` in ``q_weight`` tells which heads are here.

    Raises:
        ValueError: a width is not a whole number of heads; keys and queries are not sharded over
            the same ranks.
    """
    first, mesh, placements = 0, None, ()
    if _is_dtensor(q_weight) and any(place.is_shard() for place in q_weight.placements):
        mesh, placements = q_weight.device_mesh, q_weight.placements
        # Callers may have divided num_heads by the ranks; the DTensor's shape is global.
        group_size = num_heads // num_kv_heads
        num_heads = q_weight.shape[0] // head_dim
        num_kv_heads = num_heads // group_size
        first = _first_row(q_weight) // head_dim
    names, most = ("q_proj", "k_proj", "v_proj"), (num_heads, num_kv_heads, num_kv_heads)
    for name, width, limit in zip(names, widths, most, strict=True):
        if width % head_dim or not head_dim <= width <= limit * head_dim:
            raise ValueError(
                f"{name} must make 1 to {limit} whole heads of head_dim={head_dim}, "
                f"got {width} features: the ranks must divide the heads"
            )
    count, kv_count, v_count = (width // head_dim for width in widths)
    if kv_count != v_count:
        raise ValueError(f"k_proj and v_proj must make as many heads, got {kv_count} and {v_count}")
    if (count, kv_count) == (num_heads, num_kv_heads):
        return None
    known = mesh is not None and count < num_heads
    kv_index = None
    if count * num_kv_heads != kv_count * num_heads:
        # Queries sharded, keys replicated, as with MQA.
        if kv_count != num_kv_heads or not (known or num_kv_heads == 1):
            raise ValueError(
                f"q_proj makes {count} of {num_heads} heads and k_proj {kv_count} of "
                f"{num_kv_heads}: shard both over the same ranks"
            )
        group_size = num_heads // num_kv_heads
        kv_index = [head // group_size for head in range(first, first + count)]
        kv_index = [0] * count if num_kv_heads == 1 else kv_index
    return Heads(num_heads, count, first if known else None, kv_index, mesh, placements)


def local_features(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The local shards of projection outputs that are ``DTensor``s sharded over the features."""
    if type(q) is Tensor or not _is_dtensor(q):
        return q, k, v
    dtensor: DTensor = q  # pyright: ignore[reportAssignmentType]
    if not any(place.is_shard(q.ndim - 1) or place.is_shard(-1) for place in dtensor.placements):
        return q, k, v
    # RowwiseParallel takes a plain tensor as a local shard, so out_proj gets what it expects.
    q, k, v = (y.to_local() if _is_dtensor(y) else y for y in (q, k, v))  # pyright: ignore
    return q, k, v


def _is_dtensor(x: Any) -> bool:
    if type(x) in (Tensor, nn.Parameter) or not isinstance(x, Tensor):
        return False
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def _first_row(weight: Any) -> int:
    """Global index of the first row of the weight that this rank holds."""
    rows, first = weight.shape[0], 0
    coordinate = weight.device_mesh.get_coordinate()
    for dim, place in enumerate(weight.placements):
        rank, ranks = coordinate[dim], weight.device_mesh.size(dim)
        if place.is_shard(0):
            chunk = -(-rows // ranks)
            first += min(rank * chunk, rows)
            rows = max(0, min(chunk, rows - rank * chunk))
    return first
