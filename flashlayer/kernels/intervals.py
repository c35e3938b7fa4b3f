"""Interval masks in the kernels: which tiles are skipped, and which pairs of a tile are visible.

A loop over tiles of keys (forward, dQ) compares its block of queries with the bounds of many tiles
at once. A loop over tiles of queries (dK/dV) has its keys' intervals at hand, and walks the queries
between their least start and greatest stop. ``COUNT`` is the number of a key's intervals, 0 without
a mask. The bounds are those of FlashMask, Wang et al., arXiv 2410.01359.
"""

import triton
import triton.language as tl

from flashlayer.kernels.arguments import FULL
from flashlayer.kernels.primitives import in_window, visible_interval

# Tiles of keys whose bounds are compared at once. Hidden tiles between visible ones of one scan are
# computed; more scans are more loads that wait for each other.
SCANNED_TILES = tl.constexpr(32)
NO_QUERY = tl.constexpr(2**31 - 1)


@triton.jit
def interval_row(intervals, batch, head, heads):
    """Index of a head's row in the tensors of an :class:`Intervals`."""
    row = tl.full((), 0, tl.int64)
    if intervals is not None:
        if intervals.PER_BATCH:
            row += batch
        if intervals.PER_HEAD:
            row = row * heads + head
    return row


@triton.jit
def num_scans(bounds, COUNT: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many times :func:`scanned_ranges` has to be called for the keys of ``bounds``."""
    scans = 1
    if COUNT != 0:
        tiles = tl.cdiv(bounds[3], BLOCK_N) - bounds[0] // BLOCK_N
        scans = tl.cdiv(tiles, SCANNED_TILES)
    return scans


@triton.jit
def scanned_ranges(
    ranges, intervals, place, scan, bounds, COUNT: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Cut the keys of ``bounds`` into LEFT_EDGE, FULL and RIGHT_EDGE where there are intervals.

    ``ranges`` without an interval mask. With one, those of the next SCANNED_TILES tiles, from the
    first to the last one in which some pair is visible: the first stretch of tiles in which all
    pairs are is FULL, those on both sides of it are RIGHT_EDGE (:func:`edge_start`), which saves
    the registers of a third loop.
    """
    scanned = ranges
    if COUNT != 0:
        first = bounds[0] // BLOCK_N + scan * SCANNED_TILES
        tiles = first + tl.arange(0, SCANNED_TILES)  # [SCANNED_TILES]
        end = tl.cdiv(bounds[3], BLOCK_N)
        exist = tiles < end
        some = tiles < first
        every = tiles < first
        of_head = place.row * tl.cdiv(place.k_length, BLOCK_N) * (4 * COUNT)
        for n in tl.static_range(COUNT):
            at = intervals.bounds_ptr + of_head + (tiles * COUNT + n) * 4
            any_start = tl.load(at, mask=exist, other=place.q_stop)
            all_start = tl.load(at + 1, mask=exist, other=place.q_stop)
            all_stop = tl.load(at + 2, mask=exist, other=0)
            any_stop = tl.load(at + 3, mask=exist, other=0)
            some |= (any_start < place.q_stop) & (any_stop > place.q_start)
            every |= (all_start <= place.q_start) & (all_stop >= place.q_stop)
        every &= (tiles * BLOCK_N >= bounds[1]) & ((tiles + 1) * BLOCK_N <= bounds[2])
        start = tl.min(tl.where(some, tiles, end), 0)
        stop = tl.max(tl.where(some, tiles + 1, start), 0)
        full_start = tl.min(tl.where(every, tiles, stop), 0)
        full_stop = tl.min(tl.where((tiles >= full_start) & (every == 0), tiles, stop), 0)
        full = (full_start * BLOCK_N, full_stop * BLOCK_N)
        scanned = (full, full, (start * BLOCK_N, (stop - full_stop + full_start) * BLOCK_N))
    return scanned


@triton.jit
def edge_start(step, full, COUNT: tl.constexpr, RANGE: tl.constexpr):
    """First key of a tile of a loop over ``step``: in RIGHT_EDGE without the ``full`` range."""
    k_start = step
    if RANGE != FULL and COUNT != 0:
        k_start = tl.where(step < full[0], step, step + full[1] - full[0])
    return k_start


@triton.jit
def key_intervals(intervals, place, window, columns, COUNT: tl.constexpr, head=0):
    """The queries that may attend to each key: one or two pairs ``(start, stop)`` of vectors.

    Cut by ``window``, a key's (exchanged); empty for keys past the last. None without an interval
    mask. ``head`` counts from that of ``place``.
    """
    pairs = None
    if COUNT != 0:
        exist = columns < place.k_length
        first, last = visible_interval(columns, window, place.q_length)
        row = (place.row + head) * (2 * COUNT)
        pairs = ()
        for n in tl.static_range(COUNT):
            at = intervals.ptr + (row + 2 * n) * place.k_length + columns
            start = tl.load(at, mask=exist, other=0)
            stop = tl.load(at + place.k_length, mask=exist, other=0)
            pairs += ((tl.maximum(start, first), tl.minimum(stop, last)),)
    return pairs


@triton.jit
def query_spans(
    intervals, place, window, pairs, columns, bounds, COUNT: tl.constexpr, HEADS: tl.constexpr
):
    """Which keys of a block are visible to some query, and the queries that may attend to one.

    ``bounds`` are the window's keys. Without an interval mask there are no spans. With one, a
    span ``(start, stop)`` for each interval of a key, disjoint, for any of ``HEADS`` query heads;
    ``pairs`` are the first one's.
    """
    spans = ()
    if pairs is None:
        keys = (columns >= bounds[0]) & (columns < bounds[3])
    else:
        keys = columns < 0
        ends = ()
        for n in tl.static_range(len(pairs)):
            start = place.q_length
            stop = 0
            for head in tl.static_range(HEADS):
                of_head = pairs
                if head != 0:
                    of_head = key_intervals(intervals, place, window, columns, COUNT, head)
                exist = of_head[n][0] < of_head[n][1]
                keys |= exist
                start = tl.minimum(start, tl.min(tl.where(exist, of_head[n][0], start), 0))
                stop = tl.maximum(stop, tl.max(tl.where(exist, of_head[n][1], 0), 0))
            ends += ((start, stop),)
        start, stop = ends[0]
        if len(pairs) == 2:
            # The window may have left a key its second interval only, before the first of others.
            start = tl.minimum(start, ends[1][0])
        stop = tl.maximum(start, stop)
        spans = ((start, stop),)
        if len(pairs) == 2:
            second = tl.maximum(stop, ends[1][0])
            spans += ((second, tl.maximum(second, ends[1][1])),)
    return keys, spans


@triton.jit
def span_tiles(spans, BLOCK: tl.constexpr):
    """How many tiles cover the spans, each from its own start."""
    count = tl.cdiv(spans[0][1] - spans[0][0], BLOCK)
    if len(spans) == 2:
        count += tl.cdiv(spans[1][1] - spans[1][0], BLOCK)
    return count


@triton.jit
def span_tile(spans, tile, BLOCK: tl.constexpr):
    """Where a tile of the spans starts, and where its span stops."""
    start, stop = spans[0]
    position = start + tile * BLOCK
    if len(spans) == 2:
        before = tl.cdiv(stop - start, BLOCK)
        in_second = tile >= before
        position = tl.where(in_second, spans[1][0] + (tile - before) * BLOCK, position)
        stop = tl.where(in_second, spans[1][1], stop)
    return position, stop


@triton.jit
def keys_of_block(columns, bounds, pairs, q_start, q_stop):
    """The keys of a tile on an edge that some query of the block may attend to.

    The others are not loaded. ``pairs`` is that of :func:`key_intervals`.
    """
    if pairs is None:
        keys = columns < bounds[3]
    else:
        keys = tl.maximum(pairs[0][0], q_start) < tl.minimum(pairs[0][1], q_stop)
        for n in tl.static_range(1, len(pairs)):
            keys |= tl.maximum(pairs[n][0], q_start) < tl.minimum(pairs[n][1], q_stop)
    return keys


@triton.jit
def visible_pairs(i, j, window, length, pairs, KEY_DIM: tl.constexpr):
    """Whether key ``j`` is visible to query ``i``, by the window and by ``pairs`` if not None.

    ``KEY_DIM`` is the tile's dimension of keys. Along dimension 0 ``i`` and ``j`` are exchanged, as
    :func:`in_window` says.
    """
    if pairs is None:
        visible = in_window(i, j, window, length)
    else:
        queries = j if KEY_DIM == 0 else i
        visible = (queries >= tl.expand_dims(pairs[0][0], 1 - KEY_DIM)) & (
            queries < tl.expand_dims(pairs[0][1], 1 - KEY_DIM)
        )
        for n in tl.static_range(1, len(pairs)):
            visible |= (queries >= tl.expand_dims(pairs[n][0], 1 - KEY_DIM)) & (
                queries < tl.expand_dims(pairs[n][1], 1 - KEY_DIM)
            )
    return visible


@triton.jit(do_not_specialize=("seqlen_k", "tiles"))
def bounds_kernel(
    intervals_ptr, bounds_ptr, seqlen_k, tiles, COUNT: tl.constexpr, BLOCK_N: tl.constexpr
):
    """:func:`flashlayer.masks.intervals.tile_bounds`, one tile of keys in each program.

    ``intervals_ptr`` int32 ``(rows, 2 COUNT, seqlen_k)``, ``bounds_ptr`` int32
    ``(rows, tiles, COUNT, 4)``, both contiguous.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    key = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = key < seqlen_k
    for n in tl.static_range(COUNT):
        at = intervals_ptr + (row * COUNT + n) * 2 * seqlen_k + key
        start = tl.load(at, mask=exists, other=0)
        stop = tl.load(at + seqlen_k, mask=exists, other=0)
        is_empty = start >= stop
        start = tl.where(is_empty, NO_QUERY, start)
        stop = tl.where(is_empty, 0, stop)
        bounds = bounds_ptr + (program * COUNT + n) * 4
        tl.store(bounds, tl.min(start, 0))
        # A key behind the last one changes neither.
        tl.store(bounds + 1, tl.max(tl.where(exists, start, 0), 0))
        tl.store(bounds + 2, tl.min(tl.where(exists, stop, NO_QUERY), 0))
        tl.store(bounds + 3, tl.max(stop, 0))
