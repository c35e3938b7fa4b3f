"""The mask itself, and what is computed on intervals: union, intersection, complement."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Intervals a key. The kernels compare a query with every one of them.
INTERVALS_MAX = 2

_assert_async: Any = vars(torch)["_assert_async"]


@dataclass(frozen=True, init=False, repr=False, eq=False)
class IntervalMask:
    """Which queries may attend to each key, as at most two half-open intervals of queries.

    Query ``i`` may attend to key ``j`` when ``start <= i < stop`` in one of the key's intervals.
    Positions are rows and columns of the score matrix, from 0. The mask is applied together with
    ``causal`` and ``window_size``. It can't be changed.

    Args:
        intervals: int32 or int64 ``(2, Sk)``, ``(B, 2, Sk)`` or ``(B, H, 2, Sk)``: a start and a
            stop for each key. With 4 in place of 2: start, stop, start, stop. ``B`` and ``H`` may
            be 1. A stop that is not greater than its start is no interval.
        seqlen_q: ``Sq``; no interval may end after it.
        hidden: the intervals are those of the queries that may *not* attend to the key
            (FlashMask's columns).

    Attributes:
        intervals: int32 ``(B or 1, H or 1, 2 or 4, Sk)``; of each key ascending and apart.
        seqlen_q: ``Sq``.

    Raises:
        TypeError: ``intervals`` is not an integer tensor.
        ValueError: its shape does not fit, an interval leaves the sequence, or a key would need
            more than two.

    Example:
        >>> mask = IntervalMask(torch.tensor([[0, 1, 2], [3, 3, 3]]), seqlen_q=3)  # causal
        >>> mask.materialize()[0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [1, 1, 1]], dtype=torch.int32)
    """

    intervals: Tensor
    seqlen_q: int
    _kind: str

    # torch.fx and dataclasses.replace make a mask of its fields: `_kind` is an argument too.
    def __init__(
        self, intervals: Tensor, seqlen_q: int, *, hidden: bool = False, _kind: str = "intervals"
    ) -> None:
        if not isinstance(intervals, Tensor) or intervals.dtype not in (torch.int32, torch.int64):
            kind = intervals.dtype if isinstance(intervals, Tensor) else type(intervals).__name__
            raise TypeError(f"intervals must be an int32 or int64 tensor, got {kind}")
        if not 2 <= intervals.ndim <= 4 or intervals.shape[-2] not in (2, 4):
            raise ValueError(
                "intervals must be (2 or 4, keys) with (batch,) or (batch, heads) before, "
                f"got {tuple(intervals.shape)}"
            )
        if not isinstance(seqlen_q, (int, torch.SymInt)) or isinstance(seqlen_q, bool):
            raise TypeError(f"seqlen_q must be an int, got {type(seqlen_q).__name__}")
        if intervals.ndim == 3:
            intervals = intervals[:, None]
        intervals = intervals[(None,) * (4 - intervals.ndim)]
        require(
            ((intervals >= 0) & (intervals <= seqlen_q)).all(),
            f"intervals must be from 0 to seqlen_q={seqlen_q}, got a start or stop outside",
        )
        starts, stops = canonical(intervals[:, :, ::2], intervals[:, :, 1::2])
        if hidden:
            starts, stops = canonical(*_complement(starts, stops, seqlen_q))
        self._set(joined(*two_at_most(starts, stops)), seqlen_q, _kind)

    @classmethod
    def made(cls, intervals: Tensor, seqlen_q: int, kind: str) -> IntervalMask:
        """Of ``(B or 1, H or 1, 2 or 4, Sk)`` that are valid by construction."""
        mask = cls.__new__(cls)
        mask._set(intervals, seqlen_q, kind)
        return mask

    def _set(self, intervals: Tensor, seqlen_q: int, kind: str) -> None:
        attributes = {
            "intervals": intervals.to(torch.int32).contiguous(),
            "seqlen_q": seqlen_q,
            "_kind": kind,
        }
        for name, value in attributes.items():
            object.__setattr__(self, name, value)

    @property
    def seqlen_k(self) -> int:
        """``Sk``."""
        return self.intervals.shape[-1]

    @property
    def device(self) -> torch.device:
        """Where the intervals are."""
        return self.intervals.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> IntervalMask:
        """The same mask on another device."""
        moved = self.intervals.to(device, non_blocking=non_blocking)
        return self.made(moved, self.seqlen_q, self._kind)

    def materialize(self) -> Tensor:
        """The dense mask, O(Sq * Sk): bool ``(B or 1, H or 1, Sq, Sk)``, True = may attend."""
        return visible_pairs(self.intervals, torch.arange(self.seqlen_q, device=self.device))

    def crop(self, queries: slice | Sequence[slice], keys: slice | Sequence[slice]) -> IntervalMask:
        """The mask of some queries and keys, whose positions count from the first ones again.

        Args:
            queries: ``slice(start, stop)`` with ``0 <= start <= stop <= Sq``: the last steps of a
                decoded sequence, a shard of a ring. Or several that ascend, which are put one
                behind the other: an interval of queries is one interval among them too.
            keys: likewise, up to ``Sk``.

        Raises:
            ValueError: a slice leaves the sequence or has a step, or they don't ascend.
        """
        q_cuts = _cuts("queries", queries, self.seqlen_q)
        columns = [self.intervals[..., slice(*cut)] for cut in _cuts("keys", keys, self.seqlen_k)]
        intervals = columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)
        # For each end the number of queries before it among those that stay.
        parts = [(intervals - start).clamp(0, stop - start) for start, stop in q_cuts]
        cropped = functools.reduce(operator.add, parts)
        cropped = joined(*canonical(cropped[:, :, ::2], cropped[:, :, 1::2]))
        return self.made(cropped, sum(stop - start for start, stop in q_cuts), self._kind)

    def narrow_heads(self, first: int, count: int) -> IntervalMask:
        """The mask of the query heads ``[first, first + count)``; one for all heads stays."""
        if self.intervals.shape[1] == 1:
            return self
        return self.made(self.intervals.narrow(1, first, count), self.seqlen_q, self._kind)

    def __and__(self, other: IntervalMask) -> IntervalMask:
        """The mask of the pairs that both masks allow.

        Raises:
            ValueError: the lengths or devices differ, or a key would need more than two intervals.
        """
        if not isinstance(other, IntervalMask):
            return NotImplemented
        lengths = [(mask.seqlen_q, mask.seqlen_k) for mask in (self, other)]
        if lengths[0] != lengths[1]:
            raise ValueError(
                "masks that are combined must have the same (queries, keys), "
                f"got {lengths[0]} and {lengths[1]}"
            )
        if self.device != other.device:
            raise ValueError(
                "masks that are combined must be on one device, "
                f"got {self.device} and {other.device}"
            )
        a, b = (mask.intervals.unflatten(2, (-1, 2)) for mask in (self, other))  # [B, H, n, 2, Sk]
        a, b = a[:, :, :, None], b[:, :, None]  # every interval of one with every one of the other
        starts = torch.maximum(a[..., 0, :], b[..., 0, :]).flatten(2, 3)
        stops = torch.minimum(a[..., 1, :], b[..., 1, :]).flatten(2, 3)
        both = joined(*two_at_most(*canonical(starts, stops)))
        return self.made(both, self.seqlen_q, f"{self._kind} & {other._kind}")

    def __repr__(self) -> str:
        """What it was made of, and its sizes."""
        batch, heads, ends, keys = self.intervals.shape
        where = "" if self.device.type == "cpu" else f", device='{self.device}'"
        return (
            f"IntervalMask({self._kind}: {self.seqlen_q} queries, {keys} keys, batch={batch}, "
            f"heads={heads}, intervals={ends // 2}{where})"
        )


def visible_pairs(intervals: Tensor, rows: Tensor) -> Tensor:
    """Bool ``(B or 1, H or 1, M, N)``: whether query ``rows[m]`` may attend to key ``n``.

    Args:
        intervals: ``(B or 1, H or 1, 2 or 4, N)``.
        rows: ``(M,)``, positions of queries.
    """
    i = rows[:, None]
    visible = None
    for start, stop in zip(
        intervals[:, :, ::2, None].unbind(2), intervals[:, :, 1::2, None].unbind(2), strict=True
    ):  # [B, H, 1, N]
        within = (start <= i) & (i < stop)
        visible = within if visible is None else visible | within
    assert visible is not None
    return visible


def tile_bounds(intervals: Tensor, size: int) -> Tensor:
    """Queries that may attend to the keys of each tile: int32 ``(B or 1, H or 1, tiles, n, 4)``.

    ``any_start, all_start, all_stop, any_stop``, as :class:`flashlayer.spec.KeyBounds`, of each
    of the ``n`` intervals: the queries ``[any_start, any_stop)`` include all that may attend to
    some key of the tile by that interval, ``[all_start, all_stop)`` may attend to all of them.

    Args:
        intervals: ``(B or 1, H or 1, 2 n, Sk)``.
        size: keys a tile, from key 0 on; the last tile may have fewer.
    """
    seqlen_k = intervals.shape[3]
    tiles = -(-seqlen_k // size)
    padded = torch.arange(tiles * size, device=intervals.device)
    # [B, H, n, tiles, size]; the last key again behind the end, which changes no minimum
    intervals = intervals[..., padded.clamp(max=seqlen_k - 1)].unflatten(3, (tiles, size))
    starts, stops = intervals[:, :, ::2], intervals[:, :, 1::2]
    is_empty = starts >= stops
    starts = torch.where(is_empty, torch.iinfo(torch.int32).max, starts)
    stops = torch.where(is_empty, 0, stops)
    bounds = (starts.amin(-1), starts.amax(-1), stops.amin(-1), stops.amax(-1))
    return torch.stack(bounds, dim=-1).transpose(2, 3).contiguous()


def require(condition: Tensor, message: str) -> None:
    """Raise ValueError unless the () bool is True; in a compiled graph it becomes an assertion."""
    if torch.compiler.is_compiling():
        _assert_async(condition, message)
    elif not bool(condition):
        raise ValueError(message)


def require_two(count: Tensor, first_key: int = 0) -> None:
    """Raise unless no key has more than two intervals; ``count`` (B, H, Sk)."""
    too_many = count > INTERVALS_MAX
    if torch.compiler.is_compiling():
        _assert_async(~too_many.any(), "a key has more than two intervals of queries")
    elif bool(too_many.any()):
        batch, head, key = (int(index) for index in too_many.nonzero()[0])
        raise ValueError(
            f"an IntervalMask has at most {INTERVALS_MAX} intervals of queries for each key, key "
            f"{first_key + key} of batch entry {batch}, head {head} needs "
            f"{int(count[batch, head, key])}: pass its bool tensor as attn_mask instead"
        )


def two_at_most(starts: Tensor, stops: Tensor) -> tuple[Tensor, Tensor]:
    """Of canonical intervals those that are there; one or two columns."""
    count = (starts < stops).sum(dim=2)
    require_two(count)
    columns = min(starts.shape[2], INTERVALS_MAX)
    if columns == INTERVALS_MAX and not torch.compiler.is_compiling():
        columns = max(1, int(count.max())) if count.numel() else 1
    return starts[:, :, :columns], stops[:, :, :columns]


def canonical(starts: Tensor, stops: Tensor) -> tuple[Tensor, Tensor]:
    """The same intervals ascending, merged where they touch; empty ones are (0, 0), at the end.

    Args:
        starts: ``(B, H, n, Sk)``.
        stops: likewise.
    """
    if starts.shape[2] == 1:
        is_interval = starts < stops
        return torch.where(is_interval, starts, 0), torch.where(is_interval, stops, 0)
    nowhere = torch.iinfo(starts.dtype).max
    is_empty = starts >= stops
    starts, order = torch.where(is_empty, nowhere, starts).sort(dim=2)
    stops = torch.where(is_empty, nowhere, stops).gather(2, order)
    reach = stops.cummax(dim=2).values
    begins = torch.cat(
        (torch.ones_like(is_empty[:, :, :1]), starts[:, :, 1:] > reach[:, :, :-1]), 2
    )
    group = begins.cumsum(dim=2) - 1
    starts = torch.full_like(starts, nowhere).scatter_reduce(2, group, starts, "amin")
    stops = torch.zeros_like(stops).scatter_reduce(2, group, stops, "amax")
    is_empty = starts == nowhere
    return torch.where(is_empty, 0, starts), torch.where(is_empty, 0, stops)


def _cuts(name: str, cuts: slice | Sequence[slice], length: int) -> list[tuple[int, int]]:
    """``(start, stop)`` of slices that ascend within a sequence."""
    slices = [cuts] if isinstance(cuts, slice) else list(cuts)
    edges = [
        (0 if cut.start is None else cut.start, length if cut.stop is None else cut.stop)
        for cut in slices
    ]
    last = 0
    for (start, stop), cut in zip(edges, slices, strict=True):
        if not last <= start <= stop <= length or cut.step not in (None, 1):
            raise ValueError(
                f"{name} must be a slice within 0 to {length}, or several that ascend, got {cuts}"
            )
        last = stop
    if not edges:
        raise ValueError(f"{name} must be at least one slice, got none")
    return edges


def _complement(starts: Tensor, stops: Tensor, seqlen_q: int) -> tuple[Tensor, Tensor]:
    """The queries outside canonical intervals: one interval more, some of them empty."""
    is_empty = starts == stops
    starts, stops = (torch.where(is_empty, seqlen_q, x) for x in (starts, stops))
    edge = torch.zeros_like(starts[:, :, :1])
    return torch.cat((edge, stops), dim=2), torch.cat((starts, edge + seqlen_q), dim=2)


def joined(starts: Tensor, stops: Tensor) -> Tensor:
    """``(B, H, n, Sk)`` each as ``(B, H, 2 n, Sk)``."""
    return torch.stack((starts, stops), dim=3).flatten(2, 3)
