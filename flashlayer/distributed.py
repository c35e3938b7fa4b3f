"""Attention over a sequence that is sharded over the ranks of a process group.

Two ways, the same results as :func:`flashlayer.flash_attention` on the whole sequence:

* :func:`ring_attention`: queries stay, keys and values travel round the ring, and each rank merges
  what it gets by the LSE, exactly as tiles merge within one call. Any number of ranks and heads.
* :func:`ulysses_attention`: two all-to-all exchanges turn shards of the sequence into shards of the
  heads and back. Less traffic on many ranks, but the ranks must divide the heads.

A *placement* says which positions a rank holds. ``"contiguous"``: rank r the r-th stretch, of any
length. ``"zigzag"``: the sequence is cut into ``2 N`` stretches for ``N`` ranks, and rank r holds
the r-th from either end; with causal attention the last rank of a contiguous placement has N times
the work of the first, here all have the same.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flashlayer import backends, online_softmax
from flashlayer.functional import flash_attention
from flashlayer.online_softmax import SoftmaxState
from flashlayer.problem import build_problem
from flashlayer.spec import AttentionExtras, AttentionSpec, Problem, WindowSize

Placement = Literal["contiguous", "zigzag"]

# By rank: the positions it holds, as one or two stretches in the order of its shard.
Layout = tuple[tuple[range, ...], ...]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _between_graphs(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A compiled model calls ``function`` between its graphs: Dynamo traces no such exchange."""
    # torch.compiler.disable, but that it loads the compiler at the first call and not here.
    return vars(torch)["_disable_dynamo"](function)


@_between_graphs
def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    placement: Placement = "contiguous",
    lengths: Sequence[int] | None = None,
    causal: bool = False,
    window_size: WindowSize = (None, None),
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Self-attention over the whole sequence, of which every rank of ``group`` holds a shard.

    Each rank attends from its own queries to one rank's keys at a time. While it computes, the next
    keys arrive. The outputs of these hops merge by their LSE (:mod:`flashlayer.online_softmax`). In
    the backward pass keys and values travel once more and the sums of their gradients travel with
    them, until they are home. A hop that no rank needs, because the window ends before it, is left
    out: nothing is sent for it. Memory per rank is that of its shard, of the keys of two hops and,
    in the backward pass, of their gradients: O(S / N).

    Traffic: with N ranks, S positions a rank and h hops (h = N but for windows) each rank sends::

        forward    (h - 1) * B * Hkv * S * (D + Dv) elements of key's dtype
        backward   the same, and h times B * Hkv * S * (D + Dv) elements of the gradients' sums,
                   fp32 (fp64 for fp64); nothing where h = 1

    on average where the shards differ in length. Query heads don't travel: GQA divides the traffic
    by ``H / Hkv``.

    Every rank must make the same calls in the same order, forward and backward: a rank whose loss
    leaves its output out would keep the others waiting. The gradient of ``sinks``, which every rank
    holds, is that of the rank's own queries, as with any replicated parameter: sum it over the
    group.

    Args:
        query: ``(B, H, S, D)``, this rank's shard; fp16, bf16, fp32 or fp64.
        key: ``(B, Hkv, S, D)``, likewise; ``H`` must be a multiple of ``Hkv``.
        value: ``(B, Hkv, S, Dv)``, likewise.
        group: the process group, with a backend that can send point to point (gloo, NCCL); the
            default group if None.
        placement: which positions a shard is, see :func:`shard_sequence`. ``"zigzag"`` balances
            causal attention.
        lengths: the shards' lengths ``S`` by rank. If None they are gathered, and other sizes
            checked to be alike: one small exchange, which on a GPU waits for it.
        causal: as in :func:`flashlayer.flash_attention`, in positions of the whole sequence.
        window_size: likewise.
        scale: likewise.
        softcap: likewise.
        sinks: ``(H,)``, the same on every rank.
        return_lse: also return the log-sum-exp.
        backend: what computes a hop, as in :func:`flashlayer.flash_attention`; not ``"standard"``.

    Returns:
        ``out`` ``(B, H, S, Dv)``, the shard of the output; with ``return_lse`` also ``lse``
        ``(B, H, S)``. Both are differentiable, once.

    Raises:
        TypeError: as :func:`flashlayer.flash_attention`.
        ValueError: likewise; this process is not in ``group``; the shards don't fit each other or
            the placement.

    Sources: Liu, Zaharia & Abbeel, "Ring Attention with Blockwise Transformers" (arXiv 2310.01889),
    section 3; Brandon et al., "Striped Attention" (arXiv 2311.09431), for the imbalance of causal
    work and its cure by placement.

    Example:
        >>> q, k, v = (shard_sequence(x, dim=2, placement="zigzag") for x in (q, k, v))
        >>> out = ring_attention(q, k, v, causal=True, placement="zigzag")
    """
    problem = _check(query, key, value, causal, window_size, scale, softcap, sinks)
    layout = _agreed_layout(problem, group, placement, lengths)
    ring = Ring(
        group=group,
        rank=dist.get_rank(group),
        layout=layout,
        spec=_global_spec(problem, causal, window_size),
        backend=backend,
    )
    if backend != "auto":  # which refuses nothing
        ring.check_backend(problem)
    out, lse = RingAttention.apply(ring, problem.query, problem.key, problem.value, sinks)
    return (out, lse) if return_lse else out


@_between_graphs
def ulysses_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    placement: Placement = "contiguous",
    lengths: Sequence[int] | None = None,
    causal: bool = False,
    window_size: WindowSize = (None, None),
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """What :func:`ring_attention` computes, by exchanging the sharded sequence for sharded heads.

    An all-to-all exchange gives each rank the whole sequence of ``H / N`` query and ``Hkv / N`` kv
    heads; it attends on its own, and a second exchange brings the outputs back.

    Traffic: with N ranks and S positions a rank, each rank sends::

        forward    (N - 1) / N * B * S * ((H + Hkv) * D + (Hkv + H) * Dv) elements of query's dtype,
                   and with ``return_lse`` (N - 1) / N * B * S * H of lse's
        backward   the same

    so a sequence of fixed length ``N * S`` costs a rank 1 / N of it, where the ring's traffic stays
    the same. Memory is that of the whole sequence for ``1 / N`` of the heads.

    Args:
        query: ``(B, H, S, D)``, this rank's shard; N must divide ``H``.
        key: ``(B, Hkv, S, D)``, likewise; N must divide ``Hkv``.
        value: ``(B, Hkv, S, Dv)``, likewise.
        group: the process group, with a backend that has all-to-all; the default group if None.
        placement: as in :func:`ring_attention`; every placement is balanced here.
        lengths: as in :func:`ring_attention`.
        causal: likewise.
        window_size: likewise.
        scale: likewise.
        softcap: likewise.
        sinks: likewise; the gradient is that of the heads that this rank computed, sum it over the
            group.
        return_lse: likewise.
        backend: as in :func:`flashlayer.flash_attention`.

    Returns:
        As :func:`ring_attention`.

    Raises:
        TypeError: as :func:`ring_attention`.
        ValueError: likewise, and where the ranks do not divide the heads.

    Source: Jacobs et al., "DeepSpeed Ulysses" (arXiv 2309.14509), section 3.
    """
    problem = _check(query, key, value, causal, window_size, scale, softcap, sinks)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    for name, heads in (("query", query.shape[1]), ("key and value", key.shape[1])):
        if heads % ranks:
            raise ValueError(
                f"ulysses_attention needs heads that {ranks} ranks divide, {name} has {heads}: "
                f"use ring_attention"
            )
    layout = _agreed_layout(problem, group, placement, lengths)
    sizes = tuple(sum(map(len, stretches)) for stretches in layout)
    position = _positions(layout, query.device)  # of what arrives, in the order of the ranks
    q, k, v = (
        AllToAll.apply(group, sizes, True, x) for x in (problem.query, problem.key, problem.value)
    )
    if placement != "contiguous":
        q, k, v = (x[:, :, position.argsort()] for x in (q, k, v))
    out, lse = flash_attention(
        q,
        k,
        v,
        causal=causal,
        window_size=window_size,
        scale=scale,
        softcap=softcap,
        sinks=None if sinks is None else sinks.chunk(ranks)[rank],
        return_lse=True,
        backend=backend,
    )
    if placement != "contiguous":
        out, lse = out[:, :, position], lse[:, :, position]
    out = AllToAll.apply(group, sizes, False, out)
    if not return_lse:
        return out
    return out, AllToAll.apply(group, sizes, False, lse.unsqueeze(-1)).squeeze(-1)


@_between_graphs
def shard_sequence(
    x: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    dim: int = 1,
    placement: Placement = "contiguous",
) -> Tensor:
    """This rank's shard of a sequence that every rank holds; differentiable.

    Args:
        x: ``(..., T, ...)``, the same on every rank of ``group``.
        group: the process group; the default group if None.
        dim: the dimension that is the sequence: 1 for tokens ``(B, T)`` and features ``(B, T, E)``,
            2 for heads ``(B, H, T, D)``.
        placement: ``"contiguous"``: N stretches, the first ``T % N`` of them longer by one.
            ``"zigzag"``: rank r holds stretches r and ``2 N - 1 - r`` of 2 N equal ones.

    Raises:
        ValueError: ``placement`` is none of these; 2 N doesn't divide T for ``"zigzag"``; this
            process is not in ``group``.
    """
    rank, ranks, length = _rank_in(group), dist.get_world_size(group), x.shape[dim]
    if placement == "zigzag" and length % (2 * ranks):
        raise ValueError(
            f"placement 'zigzag' over {ranks} ranks needs a sequence that {2 * ranks} divides, "
            f"got {length}: pad it"
        )
    lengths = tuple(length // ranks + (rank < length % ranks) for rank in range(ranks))
    layout = _layout(lengths, placement)
    return torch.cat([x.narrow(dim, part.start, len(part)) for part in layout[rank]], dim)


@_between_graphs
def unshard_sequence(
    x: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    dim: int = 1,
    placement: Placement = "contiguous",
) -> Tensor:
    """The whole sequence on every rank, gathered from their shards; has no gradient.

    Args:
        x: ``(..., S, ...)``, this rank's shard; shards may differ in length.
        group: as in :func:`shard_sequence`.
        dim: likewise.
        placement: likewise.

    Raises:
        ValueError: as :func:`shard_sequence`, and where the shards don't fit each other.
    """
    lengths = _gather_lengths(x, dim, group)
    layout = _layout(lengths, placement)
    # Shards of one size, as all_gather wants them: the sequence first, and padded.
    rows = x.detach().movedim(dim, 0)
    padded = rows.new_zeros(max(lengths), *rows.shape[1:])
    padded[: len(rows)] = rows
    shards = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(shards, padded, group=group)
    gathered = torch.cat([shard[:length] for shard, length in zip(shards, lengths, strict=True)])
    return gathered[_positions(layout, x.device).argsort()].movedim(0, dim)


@_between_graphs
def position_ids(
    length: int,
    *,
    group: dist.ProcessGroup | None = None,
    placement: Placement = "contiguous",
    lengths: Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Positions in the whole sequence of the ``length`` tokens that this rank holds, ``(S,)``.

    Args:
        length: ``S``, tokens of this rank's shard.
        group: as in :func:`shard_sequence`.
        placement: likewise.
        lengths: those of all shards, by rank; every shard is as long as this one if None.
        device: where the result is made.

    Raises:
        ValueError: as :func:`shard_sequence`, and ``lengths`` that don't fit ``length``.
    """
    rank = _rank_in(group)
    lengths = _own_length_checked(length, group, lengths)
    return _positions((_layout(lengths, placement)[rank],), device)


@_between_graphs
def shard_lengths(x: Tensor, *, group: dist.ProcessGroup | None = None, dim: int = 1) -> list[int]:
    """The lengths of all shards by rank, for ``lengths=``: one small exchange.

    Args:
        x: ``(..., S, ...)``, this rank's shard.
        group: as in :func:`shard_sequence`.
        dim: likewise.

    Raises:
        ValueError: the shards differ in another dimension; this process is not in ``group``.
    """
    return list(_gather_lengths(x, dim, group))


class Hop(NamedTuple):
    """Another rank's keys, and what of them this rank's queries see."""

    distance: int  # how many ranks on from their own rank the keys are
    following: int | None  # the next hop's distance
    key: Tensor
    value: Tensor
    pieces: list[Piece]


class Piece(NamedTuple):
    """Some of a rank's queries against some of the keys that it got, with a top-left band."""

    q_rows: slice
    k_rows: slice
    window_size: WindowSize


@dataclass(frozen=True)
class Ring:
    """One call on one rank: where the shards are, and what is computed between them.

    Attributes:
        group: the process group.
        rank: this process in it.
        layout: where the shards are.
        spec: the options, with the band in positions of the whole sequence.
        backend: what computes a piece.
    """

    group: dist.ProcessGroup | None
    rank: int
    layout: Layout
    spec: AttentionSpec
    backend: str

    @property
    def distances(self) -> tuple[int, ...]:
        """The hops: at distance t, rank r attends to the keys of rank r - t."""
        return _distances(self.layout, self.spec.window_left, self.spec.window_right)

    def source(self, distance: int) -> int:
        """The rank whose keys are here at this distance."""
        return (self.rank - distance) % len(self.layout)

    def length(self, rank: int) -> int:
        """Positions that a rank holds."""
        return sum(map(len, self.layout[rank]))

    def problem(self, piece: Piece, q: Tensor, k: Tensor, v: Tensor) -> Problem:
        """One piece as a call of its own. The sinks are no key of any piece."""
        # Autocast has had its say at the door; the backward pass may run under another.
        with torch.autocast(q.device.type, enabled=False):
            return build_problem(
                q[:, :, piece.q_rows],
                k[:, :, piece.k_rows],
                v[:, :, piece.k_rows],
                window_size=piece.window_size,
                diagonal="top_left",
                scale=self.spec.scale,
                softcap=self.spec.softcap,
            )

    def hops(self, k: Tensor, v: Tensor) -> Iterator[Hop]:
        """One hop after the other, this rank's own keys first.

        While the caller computes one, the keys of the next travel. Two buffers take turns, so
        keys of two hops are all there ever is.
        """
        distances, band = self.distances, (self.spec.window_left, self.spec.window_right)
        own = self.layout[self.rank]
        longest = max(self.length(rank) for rank in range(len(self.layout)))
        here = coming = k.new_empty(0)
        if len(distances) > 1:
            here, coming = (_empty_pack(longest, k, v, k.dtype) for _ in range(2))
            for mine, packed in zip((k, v), _unpack(here, k.shape[2], k, v), strict=True):
                packed.copy_(mine)
        for distance, following in itertools.zip_longest(distances, distances[1:]):
            source, works = self.source(distance), []
            if following is not None:
                sizes = (
                    _packed_size(self.length(rank), k, v)
                    for rank in (source, self.source(following))
                )
                sent, received = (x[:n] for x, n in zip((here, coming), sizes, strict=True))
                works = self.shift(sent, received, following - distance)
            keys = (k, v) if distance == 0 else _unpack(here, self.length(source), k, v)
            yield Hop(distance, following, *keys, _pieces(own, self.layout[source], *band))
            _wait(works)
            here, coming = coming, here

    def check_backend(self, problem: Problem) -> None:
        """Refuse what the backend can't compute before anything is sent."""
        q, k, v = problem[:3]
        band = self.spec.window_left, self.spec.window_right
        for distance in self.distances:
            source = self.source(distance)
            shape = *k.shape[:2], self.length(source)
            k_like, v_like = (x.new_empty(()).expand(*shape, x.shape[3]) for x in (k, v))
            for piece in _pieces(self.layout[self.rank], self.layout[source], *band):
                check_part(self.problem(piece, q, k_like, v_like), self.backend)

    def shift(self, send: Tensor, receive: Tensor, by: int) -> list[dist.Work]:
        """Post: ``send`` goes ``by`` ranks on, ``receive`` is filled from as many ranks back."""
        ranks = len(self.layout)
        ends = (
            (dist.isend, send, (self.rank + by) % ranks),
            (dist.irecv, receive, (self.rank - by) % ranks),
        )
        operations = [
            dist.P2POp(operation, tensor, group=self.group, group_peer=peer)
            for operation, tensor, peer in ends
            if tensor.numel() > 0
        ]
        return dist.batch_isend_irecv(operations) if operations else []


class RingAttention(torch.autograd.Function):
    """``apply(ring, q, k, v, sinks) -> (o, lse)``, once differentiable.

    Only this rank's q, k, v, o and lse are kept for the backward pass.
    """

    @staticmethod
    def forward(
        ring: Ring, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attend to the keys of one hop after the other, and merge."""
        state = online_softmax.init_state(
            q.shape[:3], v.shape[3], dtype=_accumulation_dtype(q), device=q.device
        )
        if sinks is not None:  # one key whose value is 0
            state = online_softmax.state_of(state.o, state.m.copy_(sinks[:, None]))
        for hop in ring.hops(k, v):
            for piece in hop.pieces:
                part = attend_part(ring.problem(piece, q, hop.key, hop.value), ring.backend)
                _merge_rows(state, piece.q_rows, online_softmax.state_of(*part))
        return online_softmax.finalize(state).to(q.dtype), online_softmax.lse(state)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        """Keep what the derivatives need."""
        ctx.ring, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """The same hops again."""
        return None, *RingGradient.apply(ctx.ring, do, dlse, *ctx.saved_tensors)


class RingGradient(torch.autograd.Function):
    """``apply(ring, do, dlse, q, k, v, sinks, o, lse)``: dq, dk, dv, d_sinks; no derivative."""

    @staticmethod
    def forward(
        ring: Ring,
        do: Tensor | None,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        o: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """One hop after the other; the sums of dK and dV travel a hop behind their keys."""
        do = torch.zeros_like(o) if do is None else do
        dtype = _accumulation_dtype(q)
        dq = torch.zeros_like(q, dtype=dtype)
        # Sums of dK and dV: over this hop, and what the hops before it on other ranks have sent.
        sums = arriving = k.new_empty(0, dtype=dtype)
        works: list[dist.Work] = []
        for hop in ring.hops(k, v):
            length = hop.key.shape[2]
            hop_sums = _empty_pack(length, k, v, dtype).zero_()
            dk, dv = _unpack(hop_sums, length, k, v)
            for piece in hop.pieces:
                rows, keys = piece.q_rows, piece.k_rows
                dq_part, dk_part, dv_part = part_gradients(
                    ring.problem(piece, q, hop.key, hop.value),
                    ring.backend,
                    do[:, :, rows],
                    None if dlse is None else dlse[:, :, rows],
                    o[:, :, rows],
                    lse[:, :, rows],
                )
                dq[:, :, rows] += dq_part
                dk[:, :, keys] += dk_part
                dv[:, :, keys] += dv_part
            _wait(works)
            sums = hop_sums if hop.distance == 0 else hop_sums.add_(arriving)
            # On with the keys; after the last hop home, round the rest of the ring.
            by = (0 if hop.following is None else hop.following) - hop.distance
            if by != 0:
                arriving = _empty_pack(ring.length(ring.source(hop.distance + by)), k, v, dtype)
                works = ring.shift(sums, arriving, by)
        if len(ring.distances) > 1:
            _wait(works)
            sums = arriving
        dk, dv = _unpack(sums, k.shape[2], k, v)
        d_sinks = _d_sinks(sinks, o, lse, do, dlse)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_sinks

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        """Nothing to keep."""

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> None:
        """Refuse.

        Raises:
            NotImplementedError: always; a second derivative would be silently wrong otherwise.
        """
        raise NotImplementedError("ring_attention has no second derivative; use ulysses_attention")


class AllToAll(torch.autograd.Function):
    """``apply(group, lengths, to_heads, x)``: shards of the sequence to those of heads, or back.

    ``(B, H, S, D)`` becomes ``(B, H / N, sum of lengths, D)`` in the order of the ranks. The
    gradient makes the opposite way.
    """

    @staticmethod
    def forward(
        group: dist.ProcessGroup | None, lengths: tuple[int, ...], to_heads: bool, x: Tensor
    ) -> Tensor:
        """One exchange."""
        ranks, own = len(lengths), lengths[dist.get_rank(group)]
        if to_heads:
            batch, heads, _, dim = x.shape
            heads //= ranks
            sent = x.unflatten(1, (ranks, heads)).movedim(1, 0).flatten()
        else:
            batch, heads, _, dim = x.shape
            sent = torch.cat([part.flatten() for part in x.split(list(lengths), dim=2)])
        # By rank: what goes to, or comes from, it; its positions of our heads.
        theirs = [batch * heads * length * dim for length in lengths]
        ours = [batch * heads * own * dim] * ranks
        sizes = (theirs, ours) if to_heads else (ours, theirs)
        received = x.new_empty(sum(sizes[0]))
        dist.all_to_all_single(received, sent, *sizes, group=group)
        if to_heads:
            parts = zip(received.split(theirs), lengths, strict=True)
            return torch.cat([part.view(batch, heads, n, dim) for part, n in parts], dim=2)
        return received.view(ranks, batch, heads, own, dim).movedim(0, 1).flatten(1, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        """Keep the way."""
        ctx.group, ctx.lengths, ctx.to_heads, _ = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, Tensor]:
        """The opposite exchange, itself differentiable."""
        return None, None, None, AllToAll.apply(ctx.group, ctx.lengths, not ctx.to_heads, grad)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    window_size: WindowSize,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Problem:
    """The arguments as one call on this rank's shard would check them."""
    problem = build_problem(
        query,
        key,
        value,
        causal=causal,
        window_size=window_size,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
    )
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"query and key must be shards of one sequence, "
            f"got lengths {query.shape[2]} and {key.shape[2]}"
        )
    return problem


def _global_spec(problem: Problem, causal: bool, window_size: WindowSize) -> AttentionSpec:
    """The spec with its band again: an edge that hides nothing in a shard may do so between two."""
    left, right = window_size
    return replace(problem.spec, window_left=left, window_right=0 if causal else right)


def _rank_in(group: dist.ProcessGroup | None) -> int:
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not in group")
    return rank


def _agreed_layout(
    problem: Problem,
    group: dist.ProcessGroup | None,
    placement: Placement,
    lengths: Sequence[int] | None,
) -> Layout:
    """Where the shards are; without ``lengths`` their sizes are gathered and compared."""
    q, k, v = problem[:3]
    _rank_in(group)
    if lengths is None:
        sizes = [q.shape[2], q.shape[0], q.shape[1], k.shape[1], k.shape[3], v.shape[3]]
        return _layout(_gather_sizes(sizes, q.device, group), placement)
    return _layout(_own_length_checked(q.shape[2], group, lengths), placement)


def _own_length_checked(
    length: int, group: dist.ProcessGroup | None, lengths: Sequence[int] | None
) -> tuple[int, ...]:
    rank, ranks = _rank_in(group), dist.get_world_size(group)
    lengths = (length,) * ranks if lengths is None else tuple(map(operator.index, lengths))
    if len(lengths) != ranks or lengths[rank] != length:
        raise ValueError(
            f"lengths must hold one number for each of {ranks} ranks and {length} for rank {rank}, "
            f"got {lengths}"
        )
    return lengths


def _gather_lengths(x: Tensor, dim: int, group: dist.ProcessGroup | None) -> tuple[int, ...]:
    _rank_in(group)
    others = [size for axis, size in enumerate(x.shape) if axis != dim % x.ndim]
    return _gather_sizes([x.shape[dim], *others], x.device, group)


def _gather_sizes(
    sizes: list[int], device: torch.device, group: dist.ProcessGroup | None
) -> tuple[int, ...]:
    """The first size on every rank; all others must be the same everywhere."""
    own = torch.tensor(sizes, device=device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    by_rank = [tensor.tolist() for tensor in gathered]
    if any(sizes[1:] != by_rank[0][1:] for sizes in by_rank):
        raise ValueError(
            f"shards may differ in length only, but the ranks hold (length, other sizes ...) = "
            f"{by_rank}"
        )
    return tuple(sizes[0] for sizes in by_rank)


@functools.lru_cache(maxsize=64)
def _layout(lengths: tuple[int, ...], placement: Placement) -> Layout:
    if placement == "contiguous":
        edges = [0, *itertools.accumulate(lengths)]
        return tuple((range(*edge),) for edge in itertools.pairwise(edges))
    if placement != "zigzag":
        raise ValueError(f"placement must be 'contiguous' or 'zigzag', got {placement!r}")
    if len(set(lengths)) > 1 or lengths[0] % 2:
        raise ValueError(
            f"placement 'zigzag' needs shards of one even length, got lengths {list(lengths)}"
        )
    half, last = lengths[0] // 2, 2 * len(lengths) - 1
    stretches = [range(start * half, (start + 1) * half) for start in range(last + 1)]
    return tuple((stretches[rank], stretches[last - rank]) for rank in range(len(lengths)))


def _positions(layout: Layout, device: torch.device | str | None) -> Tensor:
    """The positions of these ranks' shards, one after the other."""
    stretches = itertools.chain.from_iterable(layout)
    return torch.cat([torch.arange(part.start, part.stop, device=device) for part in stretches])


@functools.lru_cache(maxsize=64)
def _distances(layout: Layout, left: int | None, right: int | None) -> tuple[int, ...]:
    """Distance 0, and every other at which some rank sees a key: the same list on every rank."""
    ranks = len(layout)
    return tuple(
        distance
        for distance in range(ranks)
        if distance == 0
        or any(_pieces(layout[rank], layout[rank - distance], left, right) for rank in range(ranks))
    )


def _pieces(
    queries: tuple[range, ...], keys: tuple[range, ...], left: int | None, right: int | None
) -> list[Piece]:
    """What queries at these positions see of keys at those: all pairs in the band, each once."""
    if queries == keys and left is None and right == 0:
        # Stretches are in order, so causal is the same in the shard as in the sequence.
        whole = slice(0, sum(map(len, queries)))
        return [Piece(whole, whole, (None, 0))] if whole.stop else []
    pieces: list[Piece] = []
    q_edges, k_edges = (
        [0, *itertools.accumulate(len(part) for part in parts)] for parts in (queries, keys)
    )
    for q_part, q_start in zip(queries, q_edges, strict=False):
        row: list[Piece] = []
        for k_part, k_start in zip(keys, k_edges, strict=False):
            piece = _visible_part(q_part, k_part, left, right)
            if piece is not None:
                q_rows, k_rows, window_size = piece
                row.append(Piece(_moved(q_rows, q_start), _moved(k_rows, k_start), window_size))
        pieces = _joined(pieces + _joined(row))
    return pieces


def _visible_part(queries: range, keys: range, left: int | None, right: int | None) -> Piece | None:
    """The rectangle that holds what one stretch sees of another, with the band in its own rows.

    Queries that see none of the keys and keys that none of the queries see are cut off, which also
    makes both sides of the band at least 0 from the rectangle's own corner.
    """
    # The position of query 0, counted from key 0.
    offset = queries.start - keys.start
    q_start, q_stop, k_start, k_stop = 0, len(queries), 0, len(keys)
    if right is not None:
        q_start, k_stop = max(0, -(offset + right)), min(k_stop, q_stop + offset + right)
    if left is not None:
        k_start, q_stop = max(0, offset - left), min(q_stop, k_stop - offset + left)
    if q_start >= q_stop or k_start >= k_stop:
        return None
    offset += q_start - k_start
    band = AttentionSpec(
        scale=1.0,
        window_left=None if left is None else left - offset,
        window_right=None if right is None else right + offset,
        diagonal="top_left",
    ).without_idle_edges(q_stop - q_start, k_stop - k_start)
    window_size = band.window_left, band.window_right
    return Piece(slice(q_start, q_stop), slice(k_start, k_stop), window_size)


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours without a band as one piece, where they make a rectangle."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else piece
        if last.window_size == piece.window_size == (None, None):
            same_q, same_k = last.q_rows == piece.q_rows, last.k_rows == piece.k_rows
            if same_q and last.k_rows.stop == piece.k_rows.start:
                rows = slice(last.k_rows.start, piece.k_rows.stop)
                joined[-1] = last._replace(k_rows=rows)
                continue
            if same_k and last.q_rows.stop == piece.q_rows.start:
                rows = slice(last.q_rows.start, piece.q_rows.stop)
                joined[-1] = last._replace(q_rows=rows)
                continue
        joined.append(piece)
    return joined


def _moved(rows: slice, by: int) -> slice:
    return slice(rows.start + by, rows.stop + by)


def _merge_rows(state: SoftmaxState, rows: slice, part: SoftmaxState) -> None:
    """Merge ``part``, of some rows only, into ``state`` in place."""
    before = SoftmaxState(*(x[:, :, rows] for x in state))
    for old, new in zip(before, online_softmax.merge(before, part), strict=True):
        old.copy_(new)


def _d_sinks(
    sinks: Tensor | None, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None
) -> Tensor | None:
    if sinks is None:
        return None
    delta = (o.to(lse.dtype) * do).sum(dim=-1)
    if dlse is not None:
        delta -= dlse
    return AttentionExtras(sinks=sinks).sinks_gradient(lse, delta)


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def _packed_size(length: int, k: Tensor, v: Tensor) -> int:
    """Elements of the keys and values of ``length`` positions, which are one message."""
    return k.shape[0] * k.shape[1] * length * (k.shape[3] + v.shape[3])


def _empty_pack(length: int, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    return k.new_empty(_packed_size(length, k, v), dtype=dtype)


def _unpack(packed: Tensor, length: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The message's keys and values, as views; it may be longer."""
    batch, kv_heads, _, dim = k.shape
    stop, edge = _packed_size(length, k, v), batch * kv_heads * length * dim
    keys, values = packed[:edge], packed[edge:stop]
    return keys.view(batch, kv_heads, length, dim), values.view(batch, kv_heads, length, v.shape[3])


def _accumulation_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def attend_part(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """``o`` and ``lse`` over one part of the keys, outside of autograd; merge parts by their LSE.

    Args:
        problem: the part's queries and keys, from :func:`build_problem`.
        backend: as in :func:`flash_attention`.
    """
    chosen = _with_backward(problem, backend)
    return chosen.forward(*problem)


def part_gradients(
    problem: Problem, backend: str, do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv`` that one part of the keys contributes; the whole gradient is their sum.

    The probabilities are ``exp(score - lse)`` and ``delta`` is ``rowsum(o * do) - dlse``: with the
    output and the LSE over *all* keys they are those of the whole softmax, so a part needs nothing
    of the others.

    Args:
        problem: as :func:`attend_part`'s.
        backend: likewise.
        do: gradient of the output.
        dlse: gradient of the LSE, or None.
        o: output over all keys.
        lse: LSE over all keys.
    """
    q, k, v, spec, extras = problem
    chosen = _with_backward(problem, backend)
    # The kernels read lse without strides, and a part's rows may be a slice.
    lse = lse.contiguous()
    dq, dk, dv, _, _ = chosen.backward(do, dlse, q, k, v, o, lse, spec, extras)
    return dq, dk, dv


def check_part(problem: Problem, backend: str) -> None:
    """Raise what :func:`attend_part` would raise, from shapes alone.

    Raises:
        ValueError: the backend refuses, or has no backward of its own.
    """
    _with_backward(problem, backend)


def _with_backward(problem: Problem, backend: str) -> Any:
    """A backend whose backward takes ``o`` and ``lse``; PyTorch's autograd knows one call only."""
    chosen = backends.select(backend, problem)
    if chosen.backward is not None:
        return chosen
    if backend == "auto":
        return backends.BACKENDS["tiled"]
    raise ValueError(f"backend {backend!r} can't compute a part: it has no backward of its own")
