"""The backward kernels: delta, then dK and dV, then dQ; the probabilities are recomputed.

With ``s = scale * q k^T``, ``p = exp(s - lse)`` and ``o = p v``, for gradients ``do`` and ``dlse``:

    dv = p^T do        dp = do v^T        ds = p * (dp - delta)        delta = rowsum(o * do) - dlse
    dq = scale * ds k                     dk = scale * ds^T q

Nothing is accumulated across programs, so there are no atomics and two runs are bitwise equal.
Dao, "FlashAttention-2", arXiv 2307.08691, section 3.1. The options are those of the forward kernel;
the gradient of an additive mask has a kernel of its own, in ``mask_gradient.py``.
"""

import triton
import triton.language as tl

from flashlayer.kernels.arguments import (
    CHANGING,
    FULL,
    LEFT_EDGE,
    RIGHT_EDGE,
    Dropout,
    Place,
    Window,
)
from flashlayer.kernels.intervals import (
    edge_start,
    interval_row,
    key_intervals,
    keys_of_block,
    num_scans,
    query_spans,
    scanned_ranges,
    span_tile,
    span_tiles,
    visible_pairs,
)
from flashlayer.kernels.primitives import (
    LOG2E,
    dot_into,
    dot_rows,
    in_exponent,
    keep_factor,
    key_bounds,
    key_tile_ranges,
    load_bias,
    load_slope,
    load_stream,
    load_tiles,
    log2_ratio,
    mask_pointer,
    modify_scores,
    program_coordinates,
    query_block,
    query_bounds,
    query_offset,
    query_tile_ranges,
    row_index,
    row_pointer,
    scaled,
    sequence,
    store_tiles,
    unmasked_keys,
    zero_tiles,
)


@triton.jit
def load_rows(ptr, rows, valid, other, COPIES: tl.constexpr):
    """One number a row, in a loop that is pipelined.

    Triton 3.6 loads a tile of fewer elements than threads in the layout of its use, in which every
    thread holds all of them: one asynchronous copy of 4 bytes for each. ``COPIES`` of the row, as
    many elements as threads, keep the layout in which each thread copies one; 1 is a plain load.
    """
    if COPIES == 1:
        numbers = tl.load(ptr + rows, mask=valid, other=other)
    else:
        copies = tl.arange(0, COPIES)[:, None] * 0
        numbers = tl.load(ptr + (rows[None, :] + copies), mask=valid[None, :], other=other)
        numbers = tl.max(numbers, 0)
    return numbers


@triton.jit
def probabilities(
    scores, scale, softcap, slope, bias, distance, visible, shift, BASE_2: tl.constexpr
):
    """``p = exp(s - lse)`` of a tile from its raw scores, and the softcap's tanh.

    Either orientation: ``distance`` and the LSE's ``shift`` broadcast to the tile. ``visible`` is a
    tile where an edge of the window crosses it, else None.
    """
    x, tanh_score = modify_scores(scores, scale, softcap, slope, bias, distance)
    MODIFIED: tl.constexpr = softcap is not None or slope is not None or bias is not None
    exponent = log2_ratio(x, shift, scale, MODIFIED, BASE_2)
    if visible is not None:
        exponent = tl.where(visible, exponent, float("-inf"))
    return tl.exp2(exponent), tanh_score


@triton.jit
def score_gradient(p, dp, delta, bias, kept):
    """``ds = p * (dp - delta)``, before the softcap's derivative: the gradient of the mask."""
    if kept is not None:
        dp = dp * kept
    ds = p * (dp - delta)
    if bias is not None:  # a hidden value may hold NaN, and dp with it
        ds = tl.where(bias == float("-inf"), 0.0, ds)
    return ds


@triton.jit
def grouped_step(step, num_tiles, kv_head, GROUP: tl.constexpr):
    """Query head and tile of a loop over the tiles of one query head of a group after another."""
    head = kv_head
    tile = step
    if GROUP != 1:
        head = kv_head * GROUP + step // num_tiles
        tile = step % num_tiles
    return head, tile


@triton.jit
def softcap_grad(tanh_score):
    """Derivative of ``softcap * tanh(s / softcap)``."""
    return 1.0 - tanh_score * tanh_score


@triton.jit(do_not_specialize=CHANGING)
def delta_kernel(
    o,
    do,
    lse_ptr,
    dlse_ptr,
    statistics,
    heads,
    seqlen_q,
    BLOCK_M: tl.constexpr,
    BASE_2: tl.constexpr,
):
    """``delta = rowsum(o * do) - dlse`` and the LSE's shift: a block of queries of one head each.

    ``o``, ``do`` :class:`Strided`; lse, dlse (or None) ``(B, heads, seqlen_q)``, contiguous, as
    ``statistics``, a :class:`RowStatistics`.
    """
    block, head, batch = program_coordinates(tl.cdiv(seqlen_q, BLOCK_M), heads, None)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    valid = rows < seqlen_q
    at = (batch, head, 0)
    o_ptr = row_pointer(o, at)
    do_ptr = row_pointer(do, at)
    o_tile = load_tiles(o_ptr, o, rows, valid)  # [BLOCK_M, value_dim]
    do_tile = load_tiles(do_ptr, do, rows, valid)  # [BLOCK_M, value_dim]
    ACC_DTYPE: tl.constexpr = lse_ptr.dtype.element_ty
    delta = tl.zeros((BLOCK_M,), ACC_DTYPE)
    for d in tl.static_range(len(o_tile)):
        delta += tl.sum(o_tile[d].to(ACC_DTYPE) * do_tile[d].to(ACC_DTYPE), 1)
    row = row_index(heads, seqlen_q, at)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row + rows, mask=valid, other=0.0)
    tl.store(statistics.delta_ptr + row + rows, delta, mask=valid)
    lse = tl.load(lse_ptr + row + rows, mask=valid, other=0.0)
    shift = lse * LOG2E if BASE_2 else lse
    shift = tl.where(lse == float("-inf"), float("inf"), shift)
    tl.store(statistics.shift_ptr + row + rows, shift, mask=valid)


@triton.jit(do_not_specialize=CHANGING)
def dkdv_kernel(
    q,
    k,
    v,
    do,
    q_descriptor,
    do_descriptor,
    dk,
    dv,
    statistics,
    kv_heads,
    seqlen_q,
    seqlen_k,
    num_blocks,
    heads_together,
    scale: tl.float64,
    offset,
    window_left,
    window_right,
    softcap: tl.float64,
    threshold: tl.int64,
    keep_scale: tl.float64,
    extras,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """One block of keys of one kv head per program: dK and dV, summed over its ``GROUP`` heads.

    Arguments as in the forward kernel; do like o, dk like k, dv like v. The tiles are transposed:
    keys down, queries across.
    """
    block, kv_head, batch = program_coordinates(num_blocks, kv_heads, heads_together)
    entry, q_begin, k_begin, q_length, k_length = sequence(
        batch, extras.packing, seqlen_q, seqlen_k
    )
    if extras.packing is not None and block >= tl.cdiv(k_length, BLOCK_N):
        return
    window = Window(window_left, window_right, query_offset(offset, q_length, k_length))
    exchanged = Window(window_right, window_left, -window.offset)  # a key's: constant in the loop
    dropout = Dropout(extras.seed_ptr, threshold, keep_scale)
    ACC_DTYPE: tl.constexpr = statistics.delta_ptr.dtype.element_ty
    INPUT_PRECISION: tl.constexpr = FLAGS.INPUT_PRECISION
    heads = kv_heads * FLAGS.GROUP
    BASE_2: tl.constexpr = FLAGS.BASE_2
    gradient_scale = tl.full((), scale, ACC_DTYPE)
    scale = in_exponent(scale, ACC_DTYPE, BASE_2)
    softcap = in_exponent(softcap, ACC_DTYPE, BASE_2) if FLAGS.SOFTCAP else None

    k_at = (entry, kv_head, k_begin)
    k_ptr = row_pointer(k, k_at)
    v_ptr = row_pointer(v, k_at)
    k_start = block * BLOCK_N
    k_stop = tl.minimum(k_start + BLOCK_N, k_length)
    columns = k_start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    # A key that no query may attend to counts as 0: its p is 0, and 0 * NaN would be NaN.
    bounds = key_bounds(0, q_length, window, k_length)
    first_head = kv_head * FLAGS.GROUP
    intervals = extras.intervals
    at_head = interval_row(intervals, batch, first_head, heads)
    COUNT: tl.constexpr = FLAGS.INTERVALS
    place = Place(at_head, 0, q_length, q_length, k_length)
    pairs = key_intervals(intervals, place, exchanged, columns, COUNT)
    visible_keys, spans = query_spans(
        intervals, place, exchanged, pairs, columns, bounds, COUNT, FLAGS.INTERVAL_HEADS
    )
    k_tile = load_tiles(k_ptr, k, columns, visible_keys)  # [BLOCK_N, head_dim]
    v_tile = load_tiles(v_ptr, v, columns, visible_keys)  # [BLOCK_N, value_dim]

    MISSING: tl.constexpr = 0.0 if FLAGS.IDLE_ROWS else float("inf")  # p = exp(s - inf) = 0
    dk_acc = zero_tiles(BLOCK_N, k.columns, ACC_DTYPE)
    dv_acc = zero_tiles(BLOCK_N, v.columns, ACC_DTYPE)
    ranges = query_tile_ranges(query_bounds(k_start, k_stop, window, q_length))
    for RANGE in tl.static_range(RIGHT_EDGE, LEFT_EDGE - 1, -1):
        # An edge is at most BLOCK_N queries long. Its tiles are counted at compile time: with a
        # dynamic count ptxas serializes the wgmma of the loop that follows. So an interval mask,
        # whose edges may be long, has one range: FULL, with a mask.
        span = (ranges[RANGE],) if len(spans) == 0 else spans
        num_tiles = tl.cdiv(BLOCK_N, BLOCK_M) if RANGE != FULL else span_tiles(span, BLOCK_M)
        side = window_left if RANGE == LEFT_EDGE else window_right  # None has no edge
        if RANGE == FULL or (side is not None and len(spans) == 0):
            for step in tl.range(
                0, num_tiles * FLAGS.GROUP, num_stages=None if RANGE == FULL else FLAGS.EDGE_STAGES
            ):
                head, tile = grouped_step(step, num_tiles, kv_head, FLAGS.GROUP)
                q_at = (entry, head, q_begin)
                q_start, stop = span_tile(span, tile, BLOCK_M)
                rows = q_start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
                valid = tl.arange(0, BLOCK_M) < stop - q_start
                i, j = rows[None, :], columns[:, None]
                if FLAGS.INTERVAL_HEADS != 1:
                    pairs = key_intervals(
                        intervals, place, exchanged, columns, COUNT, head - first_head
                    )
                MASKED: tl.constexpr = RANGE != FULL or len(spans) != 0
                visible = visible_pairs(j, i, exchanged, q_length, pairs, 0) if MASKED else None
                slope = load_slope(extras.slopes, batch, head, heads, ACC_DTYPE, BASE_2)
                mask_ptr = mask_pointer(extras.mask, batch, head)
                bias = load_bias(mask_ptr, extras.mask, i, j, valid[None, :], k_length, ACC_DTYPE)
                kept = keep_factor(dropout, batch, head, i, j, ACC_DTYPE)
                row = row_index(heads, seqlen_q, q_at)
                q_ptr = row_pointer(q, q_at)
                q_tile = load_stream(q_ptr, q, q_descriptor, q_at, q_start, rows, valid, RANGE)
                shift_ptr = statistics.shift_ptr + row
                shift = load_rows(shift_ptr, rows, valid, MISSING, FLAGS.ROW_COPIES)
                scores = dot_rows(k_tile, q_tile, INPUT_PRECISION)  # [BLOCK_N, BLOCK_M]
                distance = i + window.offset - j
                p, tanh_score = probabilities(
                    scores, scale, softcap, slope, bias, distance, visible, shift[None, :], BASE_2
                )
                do_ptr = row_pointer(do, q_at)
                do_tile = load_stream(do_ptr, do, do_descriptor, q_at, q_start, rows, valid, RANGE)
                p_kept = p if kept is None else p * kept
                dv_acc = dot_into(dv_acc, p_kept.to(do_tile[0].dtype), do_tile, INPUT_PRECISION)
                dp = dot_rows(v_tile, do_tile, INPUT_PRECISION)
                delta = load_rows(statistics.delta_ptr + row, rows, valid, 0.0, FLAGS.ROW_COPIES)
                ds = score_gradient(p, dp, delta[None, :], bias, kept)
                if FLAGS.SOFTCAP:
                    ds *= softcap_grad(tanh_score)
                dk_acc = dot_into(dk_acc, ds.to(q_tile[0].dtype), q_tile, INPUT_PRECISION)

    keys = tl.arange(0, BLOCK_N)
    exist = keys < k_length - k_start
    stored_at = (entry, kv_head, k_begin + k_start)
    store_tiles(row_pointer(dk, stored_at), dk, keys, exist, scaled(dk_acc, gradient_scale))
    store_tiles(row_pointer(dv, stored_at), dv, keys, exist, dv_acc)


@triton.jit(do_not_specialize=CHANGING)
def dq_kernel(
    q,
    k,
    v,
    k_descriptor,
    v_descriptor,
    do,
    dq,
    statistics,
    heads,
    group,
    seqlen_q,
    seqlen_k,
    num_blocks,
    heads_together,
    scale: tl.float64,
    offset,
    window_left,
    window_right,
    softcap: tl.float64,
    threshold: tl.int64,
    keep_scale: tl.float64,
    extras,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """One block of queries of one head per program, with the forward kernel's loop over keys."""
    missing, block, head, batch, place = query_block(
        num_blocks,
        heads,
        heads_together,
        extras.packing,
        seqlen_q,
        seqlen_k,
        window_right,
        BLOCK_M,
    )
    if extras.packing is not None and missing:
        return
    entry, q_begin, k_begin, q_length, k_length = place
    window = Window(window_left, window_right, query_offset(offset, q_length, k_length))
    dropout = Dropout(extras.seed_ptr, threshold, keep_scale)
    ACC_DTYPE: tl.constexpr = statistics.delta_ptr.dtype.element_ty
    INPUT_PRECISION: tl.constexpr = FLAGS.INPUT_PRECISION
    BASE_2: tl.constexpr = FLAGS.BASE_2
    gradient_scale = tl.full((), scale, ACC_DTYPE)
    scale = in_exponent(scale, ACC_DTYPE, BASE_2)
    softcap = in_exponent(softcap, ACC_DTYPE, BASE_2) if FLAGS.SOFTCAP else None

    q_at = (entry, head, q_begin)
    q_ptr = row_pointer(q, q_at)
    k_at = (entry, head // group, k_begin)
    k_ptr = row_pointer(k, k_at)
    v_ptr = row_pointer(v, k_at)
    do_ptr = row_pointer(do, q_at)
    row = row_index(heads, seqlen_q, q_at)
    slope = load_slope(extras.slopes, batch, head, heads, ACC_DTYPE, BASE_2)
    mask_ptr = mask_pointer(extras.mask, batch, head)

    q_start = block * BLOCK_M
    q_stop = tl.minimum(q_start + BLOCK_M, q_length)
    rows = q_start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    valid = rows < q_length
    q_tile = load_tiles(q_ptr, q, rows, valid)  # [BLOCK_M, head_dim]
    do_tile = load_tiles(do_ptr, do, rows, valid)  # [BLOCK_M, value_dim]
    shift = load_rows(statistics.shift_ptr + row, rows, valid, 0.0, 1)  # [BLOCK_M]
    delta = load_rows(statistics.delta_ptr + row, rows, valid, 0.0, 1)  # [BLOCK_M]

    dq_acc = zero_tiles(BLOCK_M, q.columns, ACC_DTYPE)
    bounds = key_bounds(q_start, q_stop, window, k_length)
    ranges = key_tile_ranges(bounds, BLOCK_N)
    exchanged = Window(window_right, window_left, -window.offset)
    intervals = extras.intervals
    at_head = interval_row(intervals, batch, head, heads)
    COUNT: tl.constexpr = FLAGS.INTERVALS
    place = Place(at_head, q_start, q_stop, q_length, k_length)
    FIRST: tl.constexpr = LEFT_EDGE if COUNT == 0 and window_left is not None else FULL
    for scan in tl.range(0, num_scans(bounds, COUNT, BLOCK_N)):
        scanned = scanned_ranges(ranges, intervals, place, scan, bounds, COUNT, BLOCK_N)
        for RANGE in tl.static_range(FIRST, RIGHT_EDGE + 1):
            start, stop = scanned[RANGE]
            for step in tl.range(
                start, stop, BLOCK_N, num_stages=None if RANGE == FULL else FLAGS.EDGE_STAGES
            ):
                k_start = edge_start(step, scanned[FULL], COUNT, RANGE)
                columns = k_start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
                i, j = rows[:, None], columns[None, :]
                keys = None
                visible = None
                if RANGE != FULL:
                    pairs = key_intervals(intervals, place, exchanged, columns, COUNT)
                    keys = keys_of_block(columns, bounds, pairs, q_start, q_stop)
                    visible = visible_pairs(i, j, window, k_length, pairs, 1)
                bias = load_bias(mask_ptr, extras.mask, i, j, valid[:, None], k_length, ACC_DTYPE)
                keys = unmasked_keys(bias, keys)
                kept = keep_factor(dropout, batch, head, i, j, ACC_DTYPE)
                k_tile = load_stream(k_ptr, k, k_descriptor, k_at, k_start, columns, keys, RANGE)
                scores = dot_rows(q_tile, k_tile, INPUT_PRECISION)  # [BLOCK_M, BLOCK_N]
                distance = i + window.offset - j
                p, tanh_score = probabilities(
                    scores, scale, softcap, slope, bias, distance, visible, shift[:, None], BASE_2
                )
                v_tile = load_stream(v_ptr, v, v_descriptor, k_at, k_start, columns, keys, RANGE)
                dp = dot_rows(do_tile, v_tile, INPUT_PRECISION)
                ds = score_gradient(p, dp, delta[:, None], bias, kept)
                if FLAGS.SOFTCAP:
                    ds *= softcap_grad(tanh_score)
                dq_acc = dot_into(dq_acc, ds.to(k_tile[0].dtype), k_tile, INPUT_PRECISION)

    queries = tl.arange(0, BLOCK_M)
    dq_ptr = row_pointer(dq, (entry, head, q_begin + q_start))
    store_tiles(dq_ptr, dq, queries, queries < q_length - q_start, scaled(dq_acc, gradient_scale))
