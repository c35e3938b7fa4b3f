"""How a call with an interval mask is cut into pieces.

In most interval masks the starts and the stops of neighbouring keys are equal or one apart. Such a
*stretch* of keys is a shape that the kernel computes without a mask:

====================  ============================================================
starts, stops         the visible pairs
====================  ============================================================
equal, equal          a rectangle: full attention
one apart, equal      the queries from a diagonal on: causal, top-left
equal, one apart      the queries up to a diagonal: the same with both reversed
one apart, one apart  a window
====================  ============================================================

Documents, a prefix, chunks, global tokens and a window are a few stretches. Where there are many,
blocks of queries are computed with the keys that they reach and a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from flashlayer.backends.aten.mask import additive, visible_intervals
from flashlayer.backends.aten.pieces import Piece, window_pieces
from flashlayer.masks.intervals import joined, visible_pairs
from flashlayer.spec import AttentionSpec

# Stretches are computed one by one if their queries are at most so many times the call's, and if
# each has so many keys on average: every piece merges its queries' results with what is there.
ROWS_MAX = 4
KEYS_MIN = 32

# Queries of a block with a mask.
BLOCK = 256

# Steps between two keys that no stretch has: others than 0 and 1, and between keys of no query.
NEITHER, EMPTY = -1, -2


class Stretch(NamedTuple):
    """Keys ``[k_start, k_stop)``; the first is visible to the queries ``[q_start, q_stop)``."""

    k_start: int
    k_stop: int
    q_start: int
    q_stop: int
    starts_step: int  # from one key to the next, 0 or 1
    stops_step: int

    def last(self) -> int:
        """The stop of the last key."""
        return self.q_stop + (self.k_stop - 1 - self.k_start) * self.stops_step


def interval_pieces(q: Tensor, intervals: Tensor, spec: AttentionSpec) -> Iterator[Piece]:
    """The pieces of a call with at least one query and one key; each visible pair is in one."""
    starts, stops = visible_intervals(intervals, spec, q.shape[2])
    entries = [(starts[n : n + 1], stops[n : n + 1]) for n in range(len(intervals))]
    # Causal pieces need a positive scale.
    uncut = intervals.shape[1] > 1 or spec.scale <= 0
    cut = [None if uncut else _stretches(*entry, q.shape[2]) for entry in entries]
    shares = any(stretches is None or _overlap(stretches) for stretches in cut)
    for index, (entry, stretches) in enumerate(zip(entries, cut, strict=True)):
        batch = slice(index, index + 1) if len(entries) > 1 else slice(None)
        if stretches is None:
            yield from _blocks(batch, *entry, q)
            continue
        earlier: list[Stretch] = []
        for stretch in stretches:
            merges = shares and any(
                x.q_start < stretch.last() and stretch.q_start < x.last() for x in earlier
            )
            for piece in _pieces(batch, stretch, spec, q.dtype):
                yield piece._replace(merges=piece.merges or merges, shares_rows=shares)
            earlier.append(stretch)


def _overlap(stretches: list[Stretch]) -> bool:
    """Whether a query is in pieces of two of them, or in two pieces of a window."""
    rows = sorted((x.q_start, x.last()) for x in stretches)
    windows = any(x.starts_step == x.stops_step == 1 for x in stretches)
    return windows or any(after < stop for (_, stop), (after, _) in pairwise(rows))


def _stretches(starts: Tensor, stops: Tensor, seqlen_q: int) -> list[Stretch] | None:
    """The stretches of ``(1, 1, n, Sk)``, None if they are too many."""
    found: list[Stretch] = []
    for start, stop in zip(starts[0, 0], stops[0, 0], strict=True):
        column = _column_stretches(start, stop)
        if column is None:
            return None
        found += column
    return found if sum(x.last() - x.q_start for x in found) <= ROWS_MAX * seqlen_q else None


def _column_stretches(start: Tensor, stop: Tensor) -> list[Stretch] | None:
    """The stretches of one interval a key, ``(Sk,)`` each."""
    keys, exists = len(start), start < stop
    by_start, by_stop = start.diff(), stop.diff()  # from each key to the next one
    is_regular = (by_start >= 0) & (by_start <= 1) & (by_stop >= 0) & (by_stop <= 1)
    step = torch.where(is_regular & exists[1:] & exists[:-1], 2 * by_start + by_stop, NEITHER)
    step = torch.where(exists[1:] | exists[:-1], step, EMPTY)
    edges = torch.cat((step.new_zeros(min(1, len(step))), step.diff().nonzero().flatten() + 1))
    limit = 4 + keys // KEYS_MIN
    if len(edges) + int((step == NEITHER).sum()) > 2 * limit:
        return None
    spans: list[tuple[int, int, int]] = []  # first key, last key + 1, step
    key = 0
    firsts, kinds = edges.tolist(), step[edges].tolist()
    afters: list[int] = [*firsts[1:], keys - 1] if firsts else []
    for after, kind in zip(afters, kinds, strict=True):
        # The steps of this kind end at key `after`, which may begin the next stretch.
        if kind == NEITHER:
            spans += [(single, single + 1, 0) for single in range(key, after)]
            key = after
        else:
            spans += [] if kind == EMPTY else [(key, after + 1, kind)]
            key = after + 1
    if key < keys:
        spans.append((key, keys, 0))
    at = [span[0] for span in spans]
    ends = zip(spans, start[at].tolist(), stop[at].tolist(), strict=True)
    found = [
        Stretch(k_start, k_stop, q_start, q_stop, *divmod(kind, 2))
        for (k_start, k_stop, kind), q_start, q_stop in ends
        if q_start < q_stop
    ]
    return found if len(found) <= limit else None


def _pieces(
    batch: slice, stretch: Stretch, spec: AttentionSpec, dtype: torch.dtype
) -> Iterator[Piece]:
    """A stretch as pieces."""
    keys = stretch.k_stop - stretch.k_start
    rows = slice(stretch.q_start, stretch.last())
    piece = Piece(batch, rows, slice(stretch.k_start, stretch.k_stop), shares_rows=True)
    steps = (stretch.starts_step, stretch.stops_step)
    if keys == 1 or steps == (0, 0):
        yield piece
    elif steps == (1, 0):
        yield piece._replace(causal=True)
    elif steps == (0, 1):
        yield piece._replace(causal=True, is_flipped=True)
    else:
        # As many queries as keys are a window. Of the others behind them, the last keys have one
        # each up to a diagonal.
        left = stretch.q_stop - stretch.q_start - 1
        window = replace(spec, window_left=left, window_right=0, diagonal="top_left")
        if keys <= left:
            yield from window_pieces(piece, window, dtype)
            return
        yield from window_pieces(piece.cut(0, keys, 0, keys), window, dtype)
        if left > 0:
            rest = (keys, keys + left, keys - left, keys)
            yield piece.cut(*rest, causal=True, is_flipped=True)


def _blocks(batch: slice, starts: Tensor, stops: Tensor, q: Tensor) -> Iterator[Piece]:
    """Blocks of queries with the keys that they reach and a mask."""
    seqlen_q = q.shape[2]
    for start in range(0, seqlen_q, BLOCK):
        rows = torch.arange(start, min(start + BLOCK, seqlen_q), device=starts.device)
        reached = ((starts < start + len(rows)) & (stops > start)).flatten(0, 2).any(dim=0)
        keys = reached.nonzero().flatten()
        if len(keys) == 0:
            continue
        first, last = int(keys[0]), int(keys[-1]) + 1
        # Few keys far apart are gathered.
        index = slice(first, last) if 2 * len(keys) > last - first else keys
        visible = visible_pairs(joined(starts[..., index], stops[..., index]), rows)
        mask = None if bool(visible.all()) else additive(visible, q.dtype)
        q_rows = slice(start, start + len(rows))
        yield Piece(batch, q_rows, index, mask=mask, shares_rows=True)
