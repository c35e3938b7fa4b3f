"""Positions of each rank's shard, and the visible pairs of two shards as rectangles."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from flashlayer.masks import IntervalMask
from flashlayer.problem import build_problem, check_intervals
from flashlayer.spec import AttentionSpec, Problem, WindowSize

Placement = Literal["contiguous", "zigzag"]

# By rank: the positions of its shard, as one or two ranges in the order of the shard.
Layout = tuple[tuple[range, ...], ...]

# Ranges of queries and of keys with a visible pair between them; None without a mask: any may have.
VisibleRanges = frozenset[tuple[range, range]] | None

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def graph_break(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Graph break: Dynamo can't trace communication."""
    # torch.compiler.disable without its import of the compiler.
    return vars(torch)["_disable_dynamo"](function)


@graph_break
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
        dim: the sequence dimension: 1 for tokens ``(B, T)`` and features ``(B, T, E)``, 2 for heads
            ``(B, H, T, D)``.
        placement: ``"contiguous"``: N ranges, the first ``T % N`` of them longer by one.
            ``"zigzag"``: rank r holds ranges r and ``2 N - 1 - r`` of 2 N equal ones.

    Raises:
        ValueError: unknown ``placement``; 2 N doesn't divide T for ``"zigzag"``; this process is
            not in ``group``.
    """
    rank, ranks, length = rank_in(group), dist.get_world_size(group), x.shape[dim]
    if placement == "zigzag" and length % (2 * ranks):
        raise ValueError(
            f"placement 'zigzag' over {ranks} ranks needs a sequence that {2 * ranks} divides, "
            f"got {length}: pad it"
        )
    lengths = tuple(length // ranks + (rank < length % ranks) for rank in range(ranks))
    ranges = make_layout(lengths, placement)[rank]
    return torch.cat([x.narrow(dim, r.start, len(r)) for r in ranges], dim)


@graph_break
def unshard_sequence(
    x: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    dim: int = 1,
    placement: Placement = "contiguous",
) -> Tensor:
    """The whole sequence on every rank, gathered from the shards; has no gradient.

    The inverse of :func:`shard_sequence`, with its arguments and errors; ``x`` ``(..., S, ...)`` is
    this rank's shard. Shards may differ in length; ValueError if they don't fit each other.
    """
    lengths = _gather_lengths(x, dim, group)
    layout = make_layout(lengths, placement)
    # all_gather needs shards of one size: move the sequence first and pad it.
    rows = x.detach().movedim(dim, 0)
    padded = rows.new_zeros(max(lengths), *rows.shape[1:])
    padded[: len(rows)] = rows
    shards = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(shards, padded, group=group)
    gathered = torch.cat([shard[:length] for shard, length in zip(shards, lengths, strict=True)])
    return gathered[layout_positions(layout, x.device).argsort()].movedim(0, dim)


@graph_break
def position_ids(
    length: int,
    *,
    group: dist.ProcessGroup | None = None,
    placement: Placement = "contiguous",
    lengths: Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Positions in the whole sequence of the ``length`` tokens of this rank's shard, ``(S,)``.

    ``lengths`` are those of all shards, by rank; every shard is as long as this one if None, and
    ValueError if they don't fit ``length``. Else as :func:`shard_sequence`.
    """
    rank = rank_in(group)
    lengths = _check_own_length(length, group, lengths)
    return layout_positions((make_layout(lengths, placement)[rank],), device)


@graph_break
def shard_lengths(x: Tensor, *, group: dist.ProcessGroup | None = None, dim: int = 1) -> list[int]:
    """The lengths of all shards by rank, for ``lengths=``: one small exchange.

    ``x`` ``(..., S, ...)`` is this rank's shard. ValueError if the shards differ in another
    dimension or this process is not in ``group``.
    """
    return list(_gather_lengths(x, dim, group))


def check_shards(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Problem:
    """Check the arguments as one call on this rank's shard."""
    problem = build_problem(query, key, value, **options)
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"query and key must be shards of one sequence, "
            f"got lengths {query.shape[2]} and {key.shape[2]}"
        )
    return problem


def rank_in(group: dist.ProcessGroup | None) -> int:
    """This process's rank in ``group``, or a ValueError."""
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not in group")
    return rank


def agreed_layout(
    problem: Problem,
    group: dist.ProcessGroup | None,
    placement: Placement,
    lengths: Sequence[int] | None,
) -> Layout:
    """The layout of all shards; without ``lengths`` their sizes are gathered and compared."""
    q, k, v = problem[:3]
    rank_in(group)
    if lengths is None:
        sizes = [q.shape[2], q.shape[0], q.shape[1], k.shape[1], k.shape[3], v.shape[3]]
        return make_layout(_gather_sizes(sizes, q.device, group), placement)
    return make_layout(_check_own_length(q.shape[2], group, lengths), placement)


_met: WeakSet[dist.ProcessGroup] = WeakSet()


def meet(group: dist.ProcessGroup | None, device: torch.device) -> None:
    """One collective call on the group, the first time.

    NCCL makes a communicator in a group's first call, which all its ranks must join: a rank whose
    first messages are all skipped would not.
    """
    group = dist.group.WORLD if group is None else group
    if group is not None and group not in _met:
        dist.all_reduce(torch.zeros((), device=device), group=group)
        _met.add(group)


def _check_own_length(
    length: int, group: dist.ProcessGroup | None, lengths: Sequence[int] | None
) -> tuple[int, ...]:
    rank, ranks = rank_in(group), dist.get_world_size(group)
    lengths = (length,) * ranks if lengths is None else tuple(map(operator.index, lengths))
    if len(lengths) != ranks or lengths[rank] != length:
        raise ValueError(
            f"lengths must hold one number for each of {ranks} ranks and {length} for rank {rank}, "
            f"got {lengths}"
        )
    return lengths


def _gather_lengths(x: Tensor, dim: int, group: dist.ProcessGroup | None) -> tuple[int, ...]:
    rank_in(group)
    others = [size for axis, size in enumerate(x.shape) if axis != dim % x.ndim]
    return _gather_sizes([x.shape[dim], *others], x.device, group)


def _gather_sizes(
    sizes: list[int], device: torch.device, group: dist.ProcessGroup | None
) -> tuple[int, ...]:
    """The first size of every rank; all other sizes must be the same on every rank."""
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
def make_layout(lengths: tuple[int, ...], placement: Placement) -> Layout:
    """The ranges of positions of every rank, for shards of these lengths."""
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
    ranges = [range(start * half, (start + 1) * half) for start in range(last + 1)]
    return tuple((ranges[rank], ranges[last - rank]) for rank in range(len(lengths)))


def layout_positions(layout: Layout, device: torch.device | str | None) -> Tensor:
    """The positions of these ranks' shards, one after the other."""
    ranges = itertools.chain.from_iterable(layout)
    return torch.cat([torch.arange(r.start, r.stop, device=device) for r in ranges])


def check_mask(mask: object, layout: Layout, problem: Problem) -> IntervalMask | None:
    """The mask of the whole sequence, or an error."""
    if mask is None:
        return None
    if not isinstance(mask, IntervalMask):
        raise TypeError(
            f"attn_mask must be an IntervalMask of the whole sequence, got {type(mask).__name__}: "
            "of a dense mask each rank would have to hold its queries' rows for all keys"
        )
    total = sum(len(r) for ranges in layout for r in ranges)
    check_intervals(mask, problem.query, total, total)
    return mask


class Route(NamedTuple):
    """How far keys travel; the same on every rank, so that all of them send and receive alike."""

    hops: tuple[int, ...]  # the steps: 0, and every number of hops after which a rank needs keys
    last: tuple[int, ...]  # by rank the step in which its keys are needed for the last time
    visible: VisibleRanges = None


# By mask, then by layout and window: reading a mask waits for its device, and the layers of a model
# share it.
_ROUTES: WeakKeyDictionary[IntervalMask, dict[tuple, Route]] = WeakKeyDictionary()


def plan_route(
    mask: IntervalMask | None, layout: Layout, left: int | None, right: int | None
) -> Route:
    """The steps of a ring; without a mask all keys travel equally far."""
    if mask is None:
        hops = visited_hops(layout, left, right)
        return Route(hops, (hops[-1],) * len(layout))
    routes = _ROUTES.setdefault(mask, {})
    arguments = layout, left, right
    if arguments not in routes:
        visible = _visible_ranges(mask, *arguments)
        rank_of = {r: rank for rank, ranges in enumerate(layout) for r in ranges}
        last, hops = [0] * len(layout), {0}
        for queries, keys in visible:
            source = rank_of[keys]
            step = (rank_of[queries] - source) % len(layout)
            last[source] = max(last[source], step)
            hops.add(step)
        routes[arguments] = Route(tuple(sorted(hops)), tuple(last), visible)
    return routes[arguments]


def _visible_ranges(
    mask: IntervalMask, layout: Layout, left: int | None, right: int | None
) -> frozenset[tuple[range, range]]:
    """The pairs of the layout's ranges that mask and window leave, exactly: O(S log N)."""
    ranges = sorted(filter(len, itertools.chain(*layout)), key=lambda r: r.start)
    edges = torch.tensor([r.start for r in ranges], device=mask.device)

    def range_of(position: Tensor) -> Tensor:
        return torch.searchsorted(edges, position, right=True) - 1

    key = torch.arange(mask.seqlen_k, device=mask.device)
    starts, stops = mask.intervals[:, :, ::2].long(), mask.intervals[:, :, 1::2].long()
    if right is not None:
        starts = starts.maximum(key - right)
    if left is not None:
        stops = stops.minimum(key + left + 1)
    # Count at the first range that an interval reaches, and back behind the last: the running sum
    # over the ranges of queries is the number of intervals that reach each.
    row = range_of(key) * (len(ranges) + 1)
    is_interval = starts < stops
    cells = len(ranges) * (len(ranges) + 1)
    begins, ends = (
        torch.bincount((row + range_of(position))[is_interval] + behind, minlength=cells)
        for position, behind in ((starts, 0), (stops - 1, 1))
    )
    by_key = (begins - ends).view(len(ranges), len(ranges) + 1)
    reached = by_key.cumsum(dim=1) > 0  # [keys, queries]
    return frozenset((ranges[q], ranges[k]) for k, q in reached.nonzero().tolist())


@functools.lru_cache(maxsize=64)
def visited_hops(layout: Layout, left: int | None, right: int | None) -> tuple[int, ...]:
    """0, and every number of hops after which a key is visible to some rank's queries."""
    ranks = range(len(layout))
    return tuple(
        hops
        for hops in ranks
        if hops == 0
        or any(rectangles(layout[rank], layout[rank - hops], left, right) for rank in ranks)
    )


class Rectangle(NamedTuple):
    """Rows of one shard's queries and of one shard's keys, with a top-left window between them."""

    q_rows: slice
    k_rows: slice
    window_size: WindowSize


def rectangles(
    queries: tuple[range, ...],
    keys: tuple[range, ...],
    left: int | None,
    right: int | None,
    visible: VisibleRanges = None,
) -> list[Rectangle]:
    """Rectangles that hold every visible pair of two shards' positions exactly once.

    Those of ranges that are not ``visible`` to each other are left out.
    """

    def may_see(pair: tuple[range, range]) -> bool:
        return visible is None or pair in visible

    if queries == keys and left is None and right == 0:
        # A shard's ranges ascend, so causal within the shard is causal in the sequence.
        whole = slice(0, sum(map(len, queries)))
        needed = whole.stop > 0 and any(map(may_see, itertools.product(queries, keys)))
        return [Rectangle(whole, whole, (None, 0))] if needed else []
    found: list[Rectangle] = []
    q_edges, k_edges = ([0, *itertools.accumulate(map(len, ranges))] for ranges in (queries, keys))
    for q_range, q_start in zip(queries, q_edges, strict=False):
        row: list[Rectangle] = []
        for k_range, k_start in zip(keys, k_edges, strict=False):
            found_here = _visible_rectangle(q_range, k_range, left, right)
            if found_here is not None and may_see((q_range, k_range)):
                q_rows, k_rows, window_size = found_here
                q_rows, k_rows = _shifted(q_rows, q_start), _shifted(k_rows, k_start)
                row.append(Rectangle(q_rows, k_rows, window_size))
        found = _joined(found + _joined(row))
    return found


def _visible_rectangle(
    queries: range, keys: range, left: int | None, right: int | None
) -> Rectangle | None:
    """The smallest rectangle around the visible pairs, its window counted from its own corner.

    Queries without a visible key, and keys visible to no query, are cut off, so both sides of the
    window are at least 0.
    """
    offset = queries.start - keys.start
    q_start, q_stop, k_start, k_stop = 0, len(queries), 0, len(keys)
    if right is not None:
        q_start, k_stop = max(0, -(offset + right)), min(k_stop, q_stop + offset + right)
    if left is not None:
        k_start, q_stop = max(0, offset - left), min(q_stop, k_stop - offset + left)
    if q_start >= q_stop or k_start >= k_stop:
        return None
    offset += q_start - k_start
    spec = AttentionSpec(
        scale=1.0,
        window_left=None if left is None else left - offset,
        window_right=None if right is None else right + offset,
        diagonal="top_left",
    ).without_idle_edges(q_stop - q_start, k_stop - k_start)
    window_size = spec.window_left, spec.window_right
    return Rectangle(slice(q_start, q_stop), slice(k_start, k_stop), window_size)


def _joined(found: list[Rectangle]) -> list[Rectangle]:
    """Merge neighbours without a window whose union is a rectangle."""
    joined: list[Rectangle] = []
    for rectangle in found:
        last = joined[-1] if joined else rectangle
        if last.window_size == rectangle.window_size == (None, None):
            same_q, same_k = last.q_rows == rectangle.q_rows, last.k_rows == rectangle.k_rows
            if same_q and last.k_rows.stop == rectangle.k_rows.start:
                rows = slice(last.k_rows.start, rectangle.k_rows.stop)
                joined[-1] = last._replace(k_rows=rows)
                continue
            if same_k and last.q_rows.stop == rectangle.q_rows.start:
                rows = slice(last.q_rows.start, rectangle.q_rows.stop)
                joined[-1] = last._replace(q_rows=rows)
                continue
        joined.append(rectangle)
    return joined


def _shifted(rows: slice, by: int) -> slice:
    return slice(rows.start + by, rows.stop + by)
