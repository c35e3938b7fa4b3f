"""Ulysses: all-to-all between shards of the sequence and shards of the heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashlayer.auxiliary import AuxOutput, AuxRequest, as_output, as_request
from flashlayer.distributed.layout import (
    Placement,
    agreed_layout,
    check_mask,
    check_shards,
    graph_break,
    layout_positions,
)
from flashlayer.functional import flash_attention
from flashlayer.masks import IntervalMask
from flashlayer.spec import WindowSize


@graph_break
def ulysses_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    placement: Placement = "contiguous",
    lengths: Sequence[int] | None = None,
    attn_mask: IntervalMask | None = None,
    causal: bool = False,
    window_size: WindowSize = (None, None),
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    return_aux: AuxRequest | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput]:
    """What :func:`ring_attention` computes, by exchanging the sharded sequence for sharded heads.

    An all-to-all exchange gives each rank the whole sequence of ``H / N`` query and ``Hkv / N`` kv
    heads; it computes their attention, and a second exchange brings the outputs back.

    Traffic: with N ranks and S positions a rank, each rank sends::

        forward    (N - 1) / N * B * S * ((H + Hkv) * D + (Hkv + H) * Dv) elements of query's dtype,
                   and (N - 1) / N * B * S * H of lse's for ``lse`` and each of ``return_aux``
        backward   the same

    so for a sequence of fixed length ``N * S`` the traffic of a rank falls as 1 / N, where the
    ring's stays the same. Memory is that of the whole sequence for ``1 / N`` of the heads.

    Arguments, results and errors are those of :func:`ring_attention`, but: N must divide ``H`` and
    ``Hkv`` (ValueError), the group's backend needs all-to-all, every placement is balanced, any
    ``backend`` of :func:`flashlayer.flash_attention` will do, the entropy has a gradient where the
    backend has one, and the gradient of ``sinks`` is that of the heads that this rank computed: sum
    it over the group as well.

    Source: Jacobs et al., "DeepSpeed Ulysses" (arXiv 2309.14509), section 3.
    """
    options = {"causal": causal, "window_size": window_size, "scale": scale, "softcap": softcap}
    request = as_request(return_aux, return_lse)
    problem = check_shards(query, key, value, sinks=sinks, **options)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    for name, heads in (("query", query.shape[1]), ("key and value", key.shape[1])):
        if heads % ranks:
            raise ValueError(
                f"ulysses_attention needs heads that {ranks} ranks divide, {name} has {heads}: "
                f"use ring_attention"
            )
    layout = agreed_layout(problem, group, placement, lengths)
    mask = check_mask(attn_mask, layout, problem)
    sizes = tuple(sum(map(len, ranges)) for ranges in layout)
    q, k, v = (AllToAll.apply(group, sizes, True, x) for x in problem[:3])
    # The shards arrive in the order of the ranks, which for zigzag is not that of the sequence.
    position = layout_positions(layout, query.device)
    if placement != "contiguous":
        q, k, v = (x[:, :, position.argsort()] for x in (q, k, v))
    sinks = None if sinks is None else sinks.chunk(ranks)[rank]
    mask = None if mask is None else mask.narrow_heads(rank * q.shape[1], q.shape[1])
    options |= {"attn_mask": mask, "sinks": sinks, "backend": backend}
    if return_lse:
        request = AuxRequest(lse=True)
    out, aux = flash_attention(q, k, v, return_aux=request, **options)
    columns = [x for x in aux if x is not None]
    numbers = torch.stack(columns, dim=-1) if columns else None  # [B, H / N, sequence, asked for]
    out, numbers = (
        x if x is None or placement == "contiguous" else x[:, :, position] for x in (out, numbers)
    )
    out = AllToAll.apply(group, sizes, False, out)
    if numbers is None:
        return out if return_aux is None else (out, AuxOutput())
    columns = AllToAll.apply(group, sizes, False, numbers).unbind(dim=-1)
    if return_lse:
        return out, columns[0].contiguous()
    aux = as_output(request, columns[0], columns[request.lse :])
    largest = aux.max_scores
    return out, aux._replace(max_scores=None if largest is None else largest.detach())


class AllToAll(torch.autograd.Function):
    """``apply(group, lengths, to_heads, x)``: sequence shards to head shards, or back.

    ``(B, H, S, D)`` becomes ``(B, H / N, sum of lengths, D)`` in the order of the ranks. The
    gradient takes the opposite exchange.
    """

    @staticmethod
    def forward(
        group: dist.ProcessGroup | None, lengths: tuple[int, ...], to_heads: bool, x: Tensor
    ) -> Tensor:
        """One exchange."""
        ranks, own = len(lengths), lengths[dist.get_rank(group)]
        batch, heads, _, dim = x.shape
        if to_heads:
            heads //= ranks
            sent = x.unflatten(1, (ranks, heads)).movedim(1, 0).flatten()
        else:
            sent = torch.cat([shard.flatten() for shard in x.split(list(lengths), dim=2)])
        # Elements by rank: of its shard of our heads, and of our shard of its heads.
        theirs = [batch * heads * length * dim for length in lengths]
        ours = [batch * heads * own * dim] * ranks
        received_sizes, sent_sizes = (theirs, ours) if to_heads else (ours, theirs)
        received = x.new_empty(sum(received_sizes))
        dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=group)
        if to_heads:
            shards = zip(received.split(theirs), lengths, strict=True)
            return torch.cat([shard.view(batch, heads, n, dim) for shard, n in shards], dim=2)
        return received.view(ranks, batch, heads, own, dim).movedim(0, 1).flatten(1, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        """Keep the direction."""
        ctx.group, ctx.lengths, ctx.to_heads, _ = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, Tensor]:
        """The opposite exchange, itself differentiable."""
        return None, None, None, AllToAll.apply(ctx.group, ctx.lengths, not ctx.to_heads, grad)
