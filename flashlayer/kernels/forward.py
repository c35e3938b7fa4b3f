"""The forward kernel: one pass over the keys, with the online softmax in base 2.

Milakov & Gimelshein, arXiv 1805.02867; Dao, "FlashAttention-2", arXiv 2307.08691, section 3.1.

An option that is off is None: Triton compiles its code away.
"""

import math

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
    scanned_ranges,
    visible_pairs,
)
from flashlayer.kernels.primitives import (
    LN2,
    divided,
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
    query_block,
    query_offset,
    row_index,
    row_pointer,
    scaled,
    store_tiles,
    unmasked_keys,
    zero_tiles,
)

# 2 to it is 0 in fp64. What stands for log2(p) where p is 0: 0 * -inf would be NaN.
LOWEST_EXPONENT = tl.constexpr(-1500.0)


@triton.constexpr_function
def lowest(dtype: object) -> float:
    """The least finite number of fp32 or fp64."""
    return -math.ldexp(2 - 2.0**-52, 1023) if dtype == tl.float64 else math.ldexp(2.0**-23 - 2, 127)


@triton.jit
def initial_state(sinks_ptr, head, BLOCK_M: tl.constexpr, DTYPE: tl.constexpr, FLAGS: tl.constexpr):
    """``m_i`` and ``l_i`` of a block of queries that has seen no key.

    A sink is a key that all have seen: its score is the sink, its value 0.
    """
    ROW_SUMS: tl.constexpr = FLAGS.ROW_SUMS
    BASE_2: tl.constexpr = FLAGS.BASE_2
    m_i = tl.full((BLOCK_M,), lowest(DTYPE), DTYPE)
    l_i = tl.zeros((BLOCK_M,), DTYPE)
    if ROW_SUMS != 1:
        l_i = tl.zeros((BLOCK_M, ROW_SUMS), DTYPE)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(DTYPE)
        m_i = tl.maximum(m_i, in_exponent(sink, DTYPE, BASE_2))
        l_i += tl.where(sink == float("-inf"), 0.0, 1.0 / ROW_SUMS)
    return m_i, l_i


@triton.jit
def log_sum_exp(m_i, l_i, sinks_ptr, head, BASE_2: tl.constexpr):
    """The natural LSE ``[BLOCK_M]``; -inf where ``l_i`` is 0."""
    log_l = tl.log(l_i)
    lse = m_i * LN2 + log_l if BASE_2 else m_i + log_l
    if BASE_2 and sinks_ptr is not None:  # a sink of finfo.min is lower than that in base 2
        sink = tl.load(sinks_ptr + head).to(lse.dtype)
        lse = tl.where(m_i == lowest(m_i.dtype), sink, lse)
    return lse


@triton.jit
def by_thread(tile, ROW_SUMS: tl.constexpr):
    """``[BLOCK_M, BLOCK_N]`` as ``[BLOCK_M, BLOCK_N // (2 * ROW_SUMS), ROW_SUMS, 2]``.

    A row of an accumulator of mma or wgmma is spread over 4 threads: columns ``8 a + 2 b`` and
    ``8 a + 2 b + 1`` are thread ``b``'s (PTX ISA, "Matrix Fragments"). With ``ROW_SUMS = 4`` sums
    over dimensions 3 and 1 stay in a thread.
    """
    return tl.reshape(tile, (tile.shape[0], tile.shape[1] // (2 * ROW_SUMS), ROW_SUMS, 2))


@triton.jit
def row_sums(tile, ROW_SUMS: tl.constexpr):
    """The sum of each row, or its ``[BLOCK_M, ROW_SUMS]`` terms of :func:`by_thread`."""
    return tl.sum(tile, 1) if ROW_SUMS == 1 else tl.sum(tl.sum(by_thread(tile, ROW_SUMS), 3), 1)


@triton.jit
def spread(rows, tile, ROW_SUMS: tl.constexpr):
    """One number a row, in the layout of :func:`row_sums` of ``tile``.

    A maximum of equal numbers, which the compiler drops: a plain broadcast would be laid out
    otherwise and moved between threads.
    """
    if ROW_SUMS != 1:
        whole = tl.broadcast_to(rows[:, None], tile.shape)
        rows = tl.max(tl.max(by_thread(whole, ROW_SUMS), 3), 1)
    return rows


@triton.jit
def tile_exponents(m_i, x, scale, MODIFIED: tl.constexpr, FLAGS: tl.constexpr):
    """The new ``m_i``, and the exponents of 2 of the factor of earlier sums and of p."""
    BASE_2: tl.constexpr = FLAGS.BASE_2
    tile_max = tl.max(x, 1) if MODIFIED else tl.max(x, 1) * scale
    m_new = tl.maximum(m_i, tile_max)  # [BLOCK_M]
    log2_rescale = log2_ratio(m_i, m_new, scale, True, BASE_2)  # [BLOCK_M]
    log2_p = log2_ratio(x, m_new[:, None], scale, MODIFIED, BASE_2)  # [BLOCK_M, BLOCK_N]
    return m_new, log2_rescale, log2_p


@triton.jit
def online_softmax_update(
    m_i,
    l_i,
    acc,
    x,
    scale,
    v,
    kept,
    MODIFIED: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """Take one tile of keys into the state ``(m_i, l_i, acc)`` of a block of queries.

    The state of a row stands for the maximum ``m = max s`` of its scores, the denominator
    ``l = sum exp(s - m)`` and the numerator ``acc = sum exp(s - m) v`` over all keys so far; a
    larger maximum rescales what was summed before by ``exp(m_old - m_new)``. Exponentials are taken
    in base 2, of scores that ``FLAGS.BASE_2`` has made exponents of 2 already: then m is in that
    unit. ``s = x`` where an option has ``MODIFIED`` the scores, else ``s = scale * x`` with
    ``scale > 0``, which is applied after the maximum. Dropout's ``kept`` weighs the values only.

    ``m_i`` is never -inf: -inf - -inf is NaN. It starts at :func:`lowest`, and while a row has no
    visible key p is ``exp(-inf - lowest) = 0``.
    """
    ROW_SUMS: tl.constexpr = FLAGS.ROW_SUMS
    INPUT_PRECISION: tl.constexpr = FLAGS.INPUT_PRECISION
    m_new, log2_rescale, log2_p = tile_exponents(m_i, x, scale, MODIFIED, FLAGS)
    rescale = tl.exp2(log2_rescale)  # [BLOCK_M]
    p = tl.exp2(log2_p)  # [BLOCK_M, BLOCK_N]
    l_i = l_i * spread(rescale, p, ROW_SUMS) + row_sums(p, ROW_SUMS)
    if kept is not None:
        p = p * kept
    acc = dot_into(scaled(acc, rescale[:, None]), p.to(v[0].dtype), v, INPUT_PRECISION)
    return m_new, l_i, acc


@triton.jit
def initial_auxiliary(l_i, results, BLOCK_M: tl.constexpr):
    """``aux_i`` of a block of queries that has seen no key, see :func:`auxiliary_update`."""
    aux_i = ()
    if results.entropy_ptr is not None:
        aux_i += (l_i * 0.0,)
    if results.max_ptr is not None:
        aux_i += (tl.full((BLOCK_M,), float("-inf"), l_i.dtype),)
    return aux_i


@triton.jit
def auxiliary_update(
    aux_i, m_i, l_i, x, scale, results, MODIFIED: tl.constexpr, FLAGS: tl.constexpr
):
    """Take one tile of keys into ``aux_i``, before :func:`online_softmax_update` does.

    What both compute is computed once, by the compiler's elimination of common subexpressions.
    ``aux_i`` is a tuple of what is asked for: for the entropy ``t = sum p log2(p)`` with
    ``p = exp(s - m)``, in the layout of ``l_i``, where a larger maximum adds
    ``log2(exp(m_old - m_new)) l`` before it rescales; and the largest score of the keys, to which
    ``m_i`` adds that of the sink.
    """
    ROW_SUMS: tl.constexpr = FLAGS.ROW_SUMS
    tile_max = tl.max(x, 1) if MODIFIED else tl.max(x, 1) * scale
    updated = ()
    if results.entropy_ptr is not None:
        _, log2_rescale, log2_p = tile_exponents(m_i, x, scale, MODIFIED, FLAGS)
        rescale = tl.exp2(log2_rescale)
        p = tl.exp2(log2_p)
        shift = spread(tl.maximum(log2_rescale, LOWEST_EXPONENT), p, ROW_SUMS)
        t_i = (aux_i[0] + shift * l_i) * spread(rescale, p, ROW_SUMS)
        updated += (t_i + row_sums(p * tl.maximum(log2_p, LOWEST_EXPONENT), ROW_SUMS),)
    if results.max_ptr is not None:
        updated += (tl.maximum(aux_i[len(aux_i) - 1], tile_max),)
    return updated


@triton.jit
def store_auxiliary(results, at, valid, l_i, aux_i, FLAGS: tl.constexpr):
    """Store the entropy and the largest score in nats at the indices ``at`` (:class:`RowResults`).

    A row without a visible key has ``l_i`` and ``t_i`` 0, and entropy 0.
    """
    BASE_2: tl.constexpr = FLAGS.BASE_2
    if results.entropy_ptr is not None:
        t_i = aux_i[0] if FLAGS.ROW_SUMS == 1 else tl.sum(aux_i[0], 1)  # [BLOCK_M]
        l_i = tl.where(l_i == 0.0, 1.0, l_i)
        # Of a row that is all on one key the two terms are equal, but for rounding.
        entropy = tl.maximum(tl.log(l_i) - t_i / l_i * LN2, 0.0)
        tl.store(results.entropy_ptr + at, entropy, mask=valid)
    if results.max_ptr is not None:
        max_i = aux_i[len(aux_i) - 1]
        tl.store(results.max_ptr + at, max_i * LN2 if BASE_2 else max_i, mask=valid)


@triton.jit(do_not_specialize=CHANGING)
def forward_kernel(
    q,
    k,
    v,
    k_descriptor,
    v_descriptor,
    o,
    results,
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
    """One block of queries of one head per program.

    ``q``, ``o`` :class:`Strided` of ``heads`` heads; ``k``, ``v`` of ``heads // group``;
    ``results`` :class:`RowResults`. ``num_blocks`` counts the blocks of the longest sequence;
    ``heads_together``, or None, orders the programs, see ``program_coordinates``. Scores are
    ``SCALE_SIGN * scale * q k^T`` with ``scale > 0``: the sign goes into q, where it is exact, so
    that the factor after the maximum is positive. ``k_descriptor`` and ``v_descriptor``, or None,
    load the tiles of the FULL range (TMA). ``offset`` is None for the bottom right of each packed
    sequence. Options that are off are None: a side of the window, a field of ``extras`` or of
    ``results``; the softcap by ``FLAGS.SOFTCAP``.
    """
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
    ACC_DTYPE: tl.constexpr = results.lse_ptr.dtype.element_ty
    INPUT_PRECISION: tl.constexpr = FLAGS.INPUT_PRECISION
    MODIFIED: tl.constexpr = FLAGS.SOFTCAP or extras.slopes is not None or extras.mask is not None

    q_at = (entry, head, q_begin)
    q_ptr = row_pointer(q, q_at)
    k_at = (entry, head // group, k_begin)
    k_ptr = row_pointer(k, k_at)
    v_ptr = row_pointer(v, k_at)
    q_start = block * BLOCK_M
    q_stop = tl.minimum(q_start + BLOCK_M, q_length)
    rows = q_start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    valid = rows < q_length
    q_tile = load_tiles(q_ptr, q, rows, valid)  # [BLOCK_M, head_dim]
    if FLAGS.SCALE_SIGN != 1:
        q_tile = scaled(q_tile, FLAGS.SCALE_SIGN)
    BASE_2: tl.constexpr = FLAGS.BASE_2
    scale = in_exponent(scale, ACC_DTYPE, BASE_2)
    softcap = in_exponent(softcap, ACC_DTYPE, BASE_2) if FLAGS.SOFTCAP else None
    slope = load_slope(extras.slopes, batch, head, heads, ACC_DTYPE, BASE_2)
    mask_ptr = mask_pointer(extras.mask, batch, head)

    m_i, l_i = initial_state(extras.sinks_ptr, head, BLOCK_M, ACC_DTYPE, FLAGS)
    acc = zero_tiles(BLOCK_M, v.columns, ACC_DTYPE)
    AUXILIARY: tl.constexpr = results.max_ptr is not None or results.entropy_ptr is not None
    if AUXILIARY:
        aux_i = initial_auxiliary(l_i, results, BLOCK_M)

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
                if RANGE != FULL:
                    pairs = key_intervals(intervals, place, exchanged, columns, COUNT)
                    keys = keys_of_block(columns, bounds, pairs, q_start, q_stop)
                bias = load_bias(mask_ptr, extras.mask, i, j, valid[:, None], k_length, ACC_DTYPE)
                keys = unmasked_keys(bias, keys)
                k_tile = load_stream(k_ptr, k, k_descriptor, k_at, k_start, columns, keys, RANGE)
                scores = dot_rows(q_tile, k_tile, INPUT_PRECISION)  # [BLOCK_M, BLOCK_N]
                distance = i + window.offset - j
                x, _ = modify_scores(scores, scale, softcap, slope, bias, distance)
                if RANGE != FULL:
                    visible = visible_pairs(i, j, window, k_length, pairs, 1)
                    x = tl.where(visible, x, float("-inf"))
                v_tile = load_stream(v_ptr, v, v_descriptor, k_at, k_start, columns, keys, RANGE)
                kept = keep_factor(dropout, batch, head, i, j, ACC_DTYPE)
                if AUXILIARY:
                    aux_i = auxiliary_update(aux_i, m_i, l_i, x, scale, results, MODIFIED, FLAGS)
                m_i, l_i, acc = online_softmax_update(
                    m_i, l_i, acc, x, scale, v_tile, kept, MODIFIED, FLAGS
                )

    # A row without a visible key has l_i = 0: o = 0 / 1, lse = -inf.
    if FLAGS.ROW_SUMS != 1:
        l_i = tl.sum(l_i, 1)  # [BLOCK_M]
    queries = tl.arange(0, BLOCK_M)
    valid = queries < q_length - q_start
    o_ptr = row_pointer(o, (entry, head, q_begin + q_start))
    store_tiles(o_ptr, o, queries, valid, divided(acc, tl.where(l_i == 0.0, 1.0, l_i)[:, None]))
    at = row_index(heads, seqlen_q, q_at)
    lse_ptr = results.lse_ptr + at
    lse = log_sum_exp(m_i, l_i, extras.sinks_ptr, head, BASE_2)
    tl.store(lse_ptr + rows, lse, mask=valid)
    if AUXILIARY:
        store_auxiliary(results, at + rows, valid, l_i, aux_i, FLAGS)
