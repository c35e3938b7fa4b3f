"""The tangent kernel: o, lse and their tangents in one pass over the keys.

With ``s = scale * q k^T``, ``p = exp(s - lse)`` and tangents marked by a dash:

    s' = scale * (q' k^T + q k'^T)                    (times the softcap's derivative)
    lse' = rowsum(p * s')
    o' = (p * (s' - lse')) v + p v'

which is the differential of the softmax (Dao et al., "FlashAttention", arXiv 2205.14135, appendix
B.4), online: see :func:`tangent_update`. A tangent that is absent is None, and its products are
compiled away.
"""

import triton
import triton.language as tl

from flashlayer.kernels.arguments import CHANGING, FULL, LEFT_EDGE, RIGHT_EDGE, Window
from flashlayer.kernels.backward import softcap_grad
from flashlayer.kernels.forward import initial_state, log_sum_exp, tile_exponents
from flashlayer.kernels.primitives import (
    divided,
    dot_into,
    dot_rows,
    in_exponent,
    in_window,
    key_bounds,
    key_tile_ranges,
    load_slope,
    load_stream,
    load_tiles,
    modify_scores,
    query_block,
    query_offset,
    row_index,
    row_pointer,
    scaled,
    store_tiles,
    zero_tiles,
)


@triton.jit
def moved(tangent_acc, acc, rescale, shift):
    """``rescale * (tangent_acc + shift * acc)``: sums over earlier keys, about another mean."""
    tiles = ()
    for d in tl.static_range(len(acc)):
        tiles += ((tangent_acc[d] + acc[d] * shift) * rescale,)
    return tiles


@triton.jit
def tangent_update(
    m_i,
    l_i,
    acc,
    mean,
    tangent_acc,
    x,
    x_tangent,
    scale,
    v,
    v_tangent,
    MODIFIED: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """Take one tile of keys into ``(m_i, l_i, acc)`` and into their tangents.

    ``mean`` is that of the scores' tangents s' under the probabilities of all keys so far, and
    ``tangent_acc = sum exp(s - m) ((s' - mean) v + v')``. When the mean moves, what was summed
    about the old one is moved by ``(old - new) * acc``. Summed about 0 instead and corrected at the
    end by ``mean * o``, the difference of two large sums would be left with the rounding of p to
    half precision: where one key has all the weight, o' is small and ``mean * o`` is not. Chan,
    Golub & LeVeque, "Updating formulae", 1979, for variances.

    ``x_tangent`` is s' in its natural unit, or None if neither q nor k has a tangent; ``v_tangent``
    is None if v has none. The rest is :func:`flashlayer.kernels.forward.online_softmax_update`.
    """
    INPUT_PRECISION: tl.constexpr = FLAGS.INPUT_PRECISION
    m_new, log2_rescale, log2_p = tile_exponents(m_i, x, scale, MODIFIED, FLAGS)
    rescale = tl.exp2(log2_rescale)  # [BLOCK_M]
    p = tl.exp2(log2_p)  # [BLOCK_M, BLOCK_N]
    l_before = l_i * rescale
    l_i = l_before + tl.sum(p, 1)  # [BLOCK_M]
    weights = p.to(v[0].dtype)  # [BLOCK_M, BLOCK_N]
    if x_tangent is not None:
        # Exactly s' where one key has all the weight; of a row without a key any divisor will do.
        total = mean * l_before + tl.sum(p * x_tangent, 1)
        mean_new = total / tl.where(l_i == 0.0, 1.0, l_i)  # [BLOCK_M]
        tangent_acc = moved(tangent_acc, acc, rescale[:, None], (mean - mean_new)[:, None])
        centred = (p * (x_tangent - mean_new[:, None])).to(v[0].dtype)
        tangent_acc = dot_into(tangent_acc, centred, v, INPUT_PRECISION)
        mean = mean_new
    else:
        tangent_acc = scaled(tangent_acc, rescale[:, None])
    if v_tangent is not None:
        tangent_acc = dot_into(tangent_acc, weights, v_tangent, INPUT_PRECISION)
    acc = dot_into(scaled(acc, rescale[:, None]), weights, v, INPUT_PRECISION)
    return m_new, l_i, acc, mean, tangent_acc


@triton.jit(do_not_specialize=CHANGING)
def tangent_kernel(
    q,
    k,
    v,
    q_tangent,
    k_tangent,
    v_tangent,
    o,
    lse_ptr,
    o_tangent,
    lse_tangent_ptr,
    heads,
    group,
    seqlen_q,
    seqlen_k,
    num_blocks,
    scale: tl.float64,
    offset,
    window_left,
    window_right,
    softcap: tl.float64,
    extras,
    GIVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """One block of queries of one head per program, with the forward kernel's loop over keys.

    Arguments as in the forward kernel; tangents like what they are of, and where not ``GIVEN``
    None. Of the options the window, the softcap, packing, ALiBi and sinks, which are
    constants here. The tangent of an lse of -inf is 0.
    """
    missing, block, head, batch, place = query_block(
        num_blocks,
        heads,
        None,
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
    ACC_DTYPE: tl.constexpr = lse_ptr.dtype.element_ty
    INPUT_PRECISION: tl.constexpr = FLAGS.INPUT_PRECISION
    BASE_2: tl.constexpr = FLAGS.BASE_2
    MODIFIED: tl.constexpr = FLAGS.SOFTCAP or extras.slopes is not None

    q_at = (entry, head, q_begin)
    k_at = (entry, head // group, k_begin)
    q_start = block * BLOCK_M
    q_stop = tl.minimum(q_start + BLOCK_M, q_length)
    rows = q_start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    valid = rows < q_length
    # Column tiles of q' k^T + q k'^T as one product: (q', q) (k, k')^T.
    q_tile = load_tiles(row_pointer(q, q_at), q, rows, valid)  # [BLOCK_M, head_dim]
    if FLAGS.SCALE_SIGN != 1:
        q_tile = scaled(q_tile, FLAGS.SCALE_SIGN)
    left = ()
    if GIVEN.q:
        tangent_tile = load_tiles(row_pointer(q_tangent, q_at), q_tangent, rows, valid)
        left += scaled(tangent_tile, FLAGS.SCALE_SIGN) if FLAGS.SCALE_SIGN != 1 else tangent_tile
    if GIVEN.k:
        left += q_tile
    k_ptr = row_pointer(k, k_at)
    v_ptr = row_pointer(v, k_at)
    tangent_scale = tl.full((), scale, ACC_DTYPE)
    scale = in_exponent(scale, ACC_DTYPE, BASE_2)
    softcap = in_exponent(softcap, ACC_DTYPE, BASE_2) if FLAGS.SOFTCAP else None
    slope = load_slope(extras.slopes, batch, head, heads, ACC_DTYPE, BASE_2)

    m_i, l_i = initial_state(extras.sinks_ptr, head, BLOCK_M, ACC_DTYPE, FLAGS)
    acc = zero_tiles(BLOCK_M, v.columns, ACC_DTYPE)
    mean = tl.zeros((BLOCK_M,), ACC_DTYPE)
    tangent_acc = zero_tiles(BLOCK_M, v.columns, ACC_DTYPE)

    bounds = key_bounds(q_start, q_stop, window, k_length)
    ranges = key_tile_ranges(bounds, BLOCK_N)
    FIRST: tl.constexpr = LEFT_EDGE if window_left is not None else FULL
    for RANGE in tl.static_range(FIRST, RIGHT_EDGE + 1):
        start, stop = ranges[RANGE]
        for k_start in tl.range(start, stop, BLOCK_N):
            columns = k_start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
            i, j = rows[:, None], columns[None, :]
            keys = None
            if RANGE != FULL:
                keys = columns < bounds[3]
            k_tile = load_stream(k_ptr, k, None, k_at, k_start, columns, keys, RANGE)
            scores = dot_rows(q_tile, k_tile, INPUT_PRECISION)  # [BLOCK_M, BLOCK_N]
            x, tanh_score = modify_scores(
                scores, scale, softcap, slope, None, i + window.offset - j
            )
            if RANGE != FULL:
                x = tl.where(in_window(i, j, window, k_length), x, float("-inf"))
            x_tangent = None
            if GIVEN.q or GIVEN.k:
                right = ()
                if GIVEN.q:
                    right += k_tile
                if GIVEN.k:
                    ptr = row_pointer(k_tangent, k_at)
                    right += load_stream(ptr, k_tangent, None, k_at, k_start, columns, keys, RANGE)
                x_tangent = dot_rows(left, right, INPUT_PRECISION) * tangent_scale
                if FLAGS.SOFTCAP:
                    x_tangent *= softcap_grad(tanh_score)
            v_tile = load_stream(v_ptr, v, None, k_at, k_start, columns, keys, RANGE)
            tangent_of_v = None
            if GIVEN.v:
                ptr = row_pointer(v_tangent, k_at)
                tangent_of_v = load_stream(
                    ptr, v_tangent, None, k_at, k_start, columns, keys, RANGE
                )
            m_i, l_i, acc, mean, tangent_acc = tangent_update(
                m_i,
                l_i,
                acc,
                mean,
                tangent_acc,
                x,
                x_tangent,
                scale,
                v_tile,
                tangent_of_v,
                MODIFIED,
                FLAGS,
            )

    # A row without a visible key has l_i = 0: o = 0 / 1, lse = -inf.
    divisor = tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    queries = tl.arange(0, BLOCK_M)
    valid = queries < q_length - q_start
    o_at = (entry, head, q_begin + q_start)
    store_tiles(row_pointer(o, o_at), o, queries, valid, divided(acc, divisor))
    ptr = row_pointer(o_tangent, o_at)
    store_tiles(ptr, o_tangent, queries, valid, divided(tangent_acc, divisor))
    row = row_index(heads, seqlen_q, q_at)
    lse = log_sum_exp(m_i, l_i, extras.sinks_ptr, head, BASE_2)
    tl.store(lse_ptr + row + rows, lse, mask=valid)
    tl.store(lse_tangent_ptr + row + rows, mean, mask=valid)
