"""How the custom ops act on sharded tensors (``torch.distributed.tensor.DTensor``).

Attention of one batch entry or head needs no other, so a shard of either is computed where it is:
data parallelism (``Shard(0)``) and tensor parallelism (``Shard(1)``) communicate nothing. A shard
of the sequence would need the other ranks' keys.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from flashlayer._ops import ops
from flashlayer.spec import AttentionExtras

_BATCH, _HEADS, _SEQUENCE = 0, 1, 2

Placements = list[Placement | None]


def on_mesh(q: DTensor, k: Tensor, v: Tensor, extras: AttentionExtras) -> AttentionExtras:
    """The extras as DTensors, a plain tensor as one that is the same on every rank.

    Raises:
        TypeError: key or value is not a DTensor.
        ValueError: a tensor is sharded over its sequence or its head dimension, or over more ranks
            than divide the heads.
    """
    _register()
    tensors = {"query": q, "key": k, "value": v}
    for name, x in tensors.items():
        if not isinstance(x, DTensor):
            raise TypeError(f"query is a DTensor, so {name} must be one, got {type(x).__name__}")
    head_ranks = max(_head_ranks(name, x) for name, x in tensors.items())
    for name, x in tensors.items():
        heads = x.shape[_HEADS]
        if heads % head_ranks and not _shares_head(x):
            raise ValueError(
                f"the heads are sharded over {head_ranks} ranks, which must divide {name}'s {heads}"
            )
    return AttentionExtras(*(whole(x, q) for x in extras))


def whole(x: Tensor | None, q: DTensor) -> Tensor | None:
    """A plain tensor, which is the same on every rank, as a DTensor of ``q``'s mesh."""
    if x is None or isinstance(x, DTensor):
        return x
    mesh = q.device_mesh
    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _head_ranks(name: str, x: DTensor) -> int:
    """Over how many ranks the heads are sharded."""
    ranks = 1
    for mesh_dim, placement in enumerate(x.placements):
        if not isinstance(placement, Shard):
            continue
        if placement.dim == _SEQUENCE:
            raise ValueError(
                f"{name} must be sharded over the batch or the heads, got a shard of the sequence: "
                "flashlayer.distributed.ring_attention computes one"
            )
        if placement.dim > _SEQUENCE:
            raise ValueError(
                f"{name} must be sharded over the batch or the heads, got a shard of the head "
                "dimension"
            )
        if placement.dim == _HEADS:
            ranks *= x.device_mesh.size(mesh_dim)
    return ranks


def _shares_head(x: Any) -> bool:
    """Whether all query heads use the one head of a key that is not sharded over it."""
    return x.shape[_HEADS] == 1 and Shard(_HEADS) not in x.placements


def as_given(grad: Tensor, x: Tensor | None) -> Tensor:
    """The gradient of ``x`` as a plain tensor if ``x`` is one: the sum over the ranks."""
    if x is None or isinstance(x, DTensor) or not isinstance(grad, DTensor):
        return grad
    return grad.full_tensor()


@functools.cache
@torch.compiler.assume_constant_result  # Dynamo calls it and does not trace it
def _register() -> None:
    """Tell DTensor the rule of both ops."""
    register_sharding(ops.forward.default)(_forward_rule)
    register_sharding(ops.backward.default)(_backward_rule)


class _Way(NamedTuple):
    """Where a call is computed: placements of its tensors over one dimension of the mesh."""

    q: Placement
    kv: Placement
    extras: dict[str, Placement | None]
    splits: bool  # the work, so that what is whole on every rank gets a part of its gradient each

    def arguments(self, tensors: Placements, options: tuple) -> Placements:
        """Those of all arguments of an op; an option that is no tensor has none."""
        return [*tensors, *[None] * (len(options) - len(self.extras)), *self.extras.values()]

    def gradient(self, placement: Placement | None) -> Placement:
        """That of a gradient; one that is not asked for is a tensor without elements."""
        if placement is None:
            return Replicate()
        return Partial() if self.splits and placement == Replicate() else placement


def _forward_rule(q: Any, k: Any, v: Any, *options: Any) -> list[tuple[Placements, Placements]]:
    """Placements of ``(o, lse, max_scores, entropy)`` and of the arguments, per way."""
    flags = options[: -len(AttentionExtras._fields)][-2:]
    return [
        (
            [way.q, way.q, *(way.q if asked else Replicate() for asked in flags)],
            way.arguments([way.q, way.kv, way.kv], options),
        )
        for way in _ways(k, options)
    ]


def _backward_rule(
    do: Any, dlse: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, dentropy: Any, *options: Any
) -> list[tuple[Placements, Placements]]:
    """Placements of ``(dq, dk, dv, d_mask, d_sinks)`` and of the arguments, per way."""
    rules: list[tuple[Placements, Placements]] = []
    for way in _ways(k, options):
        of_kv = way.gradient(way.kv)
        of_extras = (way.gradient(way.extras[name]) for name in ("attn_mask", "sinks"))
        of_dlse, of_dentropy = (None if x is None else way.q for x in (dlse, dentropy))
        tensors = [way.q, of_dlse, way.q, way.kv, way.kv, way.q, way.q, of_dentropy]
        rules.append(([way.q, of_kv, of_kv, *of_extras], way.arguments(tensors, options)))
    return rules


def _ways(k: Any, options: tuple) -> list[_Way]:
    """On every rank all of it; batch entries; heads."""
    names = AttentionExtras._fields
    extras = dict(zip(names, options[-len(names) :], strict=True))

    def placements(dim: int | None) -> dict[str, Placement | None]:
        return {name: _placement(name, x, dim) for name, x in extras.items()}

    ways = [_Way(Replicate(), Replicate(), placements(None), splits=False)]
    if extras["dropout_seed"] is not None:
        # Dropout is a function of the position in the whole tensor, which a shard does not know.
        return ways
    if extras["cu_seqlens_q"] is None:
        ways.append(_Way(Shard(_BATCH), Shard(_BATCH), placements(_BATCH), splits=True))
    of_kv = Replicate() if k.shape[_HEADS] == 1 else Shard(_HEADS)
    ways.append(_Way(Shard(_HEADS), of_kv, placements(_HEADS), splits=True))
    return ways


def _placement(name: str, x: Any, dim: int | None) -> Placement | None:
    """Of an extra, where batch entries or heads are sharded."""
    if x is None:
        return None
    if name == "sinks":
        dim = 0 if dim == _HEADS else None  # (H,)
    if dim is None or name.startswith("cu_seqlens") or x.shape[dim] == 1:
        return Replicate()
    return Shard(dim)
