"""The forward kernel: one pass over the keys, with the online softmax in base 2.

Milakov & Gimelshein, arXiv 1805.02867; Dao, "FlashAttention-2", arXiv 2307.08691, section 3.1.
"""

import triton
import triton.language as tl

from flashlayer.kernels.primitives import (
    LN2,
    LOG2E,
    dot_into,
    head_pointer,
    key_bounds,
    key_tile_edges,
    load_tile,
    mask_scores,
    program_coordinates,
    store_tile,
)


@triton.jit
def online_softmax_update(m_i, l_i, acc, scores, scale_log2, v, INPUT_PRECISION: tl.constexpr):
    """Take one tile of keys into the state ``(m_i, l_i, acc)`` of a block of queries.

    With ``x = scale_log2 * scores``, ``scale_log2 > 0``, the state of a row stands for the maximum
    ``m = max x``, the denominator ``l = sum 2^(x - m)`` and the numerator ``acc = sum 2^(x - m) v``
    over all keys so far; a larger maximum rescales what was summed before by ``2^(m_old - m_new)``.
    The maximum is taken before scaling, so that ``x - m`` is one fused multiply-add.
    """
    m_new = tl.maximum(m_i, tl.max(scores, 1) * scale_log2)  # [BLOCK_M]
    # Until a row has seen a key its maximum is -inf, and -inf - -inf is NaN: subtract 0 instead.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # [BLOCK_M]
    rescale = tl.exp2(m_i - shift)  # [BLOCK_M]
    p = tl.exp2(scores * scale_log2 - shift[:, None])  # [BLOCK_M, BLOCK_N]
    l_i = l_i * rescale + tl.sum(p, 1)
    acc = dot_into(acc * rescale[:, None], p.to(v.dtype), v, INPUT_PRECISION)
    return m_new, l_i, acc


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "offset", "window_left", "window_right"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    q_strides,
    k_strides,
    v_strides,
    o_strides,
    heads,
    group,
    seqlen_q,
    seqlen_k,
    scale: tl.float64,
    offset,
    window_left,
    window_right,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCALE_SIGN: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One block of queries of one head per program.

    Shapes: q ``(B, heads, seqlen_q, HEAD_DIM)``, k and v ``(B, heads // group, seqlen_k, ...)``,
    o ``(B, heads, seqlen_q, VALUE_DIM)``, each with its four strides; lse ``(B, heads, seqlen_q)``
    contiguous, whose dtype is the one of the accumulation. A side of the window is None when it is
    unbounded. ``BLOCK_D`` and ``BLOCK_DV`` are the head dimensions padded to a power of two. The
    scores are ``SCALE_SIGN * scale * q k^T`` with ``scale > 0``: the sign (1, -1, 0) goes into q,
    where it is exact, so that the factor after the maximum is always positive.
    """
    num_blocks = tl.cdiv(seqlen_q, BLOCK_M)
    block, head, batch = program_coordinates(num_blocks, heads)
    if window_right is not None:
        block = num_blocks - 1 - block  # the last queries see most keys: they go first
    ACC_DTYPE: tl.constexpr = lse_ptr.dtype.element_ty

    q_ptr = head_pointer(q_ptr, q_strides, batch, head)
    k_ptr = head_pointer(k_ptr, k_strides, batch, head // group)
    v_ptr = head_pointer(v_ptr, v_strides, batch, head // group)
    o_ptr = head_pointer(o_ptr, o_strides, batch, head)

    q_start = block * BLOCK_M
    q_stop = tl.minimum(q_start + BLOCK_M, seqlen_q)
    rows = q_start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    q = load_tile(q_ptr, q_strides, rows, rows < seqlen_q, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    if SCALE_SIGN != 1:
        q = (q * SCALE_SIGN).to(q.dtype)
    scale_log2 = tl.full((), scale, ACC_DTYPE) * LOG2E

    m_i = tl.full((BLOCK_M,), float("-inf"), ACC_DTYPE)
    l_i = tl.zeros((BLOCK_M,), ACC_DTYPE)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), ACC_DTYPE)

    bounds = key_bounds(q_start, q_stop, offset, window_left, window_right, seqlen_k)
    edges = key_tile_edges(bounds, BLOCK_N)
    for part in tl.static_range(3):  # left edge of the band, what all queries see, right edge
        if part > 0 or window_left is not None:
            for k_start in tl.range(edges[part], edges[part + 1], BLOCK_N):
                columns = k_start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
                seen = None if part == 1 else columns < edges[3]
                k = load_tile(k_ptr, k_strides, columns, seen, HEAD_DIM, BLOCK_D)
                scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)
                if part != 1:
                    scores = mask_scores(
                        scores, rows, columns, offset, window_left, window_right, seqlen_k
                    )
                v = load_tile(v_ptr, v_strides, columns, seen, VALUE_DIM, BLOCK_DV)
                m_i, l_i, acc = online_softmax_update(
                    m_i, l_i, acc, scores, scale_log2, v, INPUT_PRECISION
                )

    # A row that saw no key has m_i = -inf and l_i = 0: o = 0 / 1 and lse = -inf + log2(1).
    l_i = tl.where(l_i == 0.0, 1.0, l_i)
    store_tile(o_ptr, o_strides, rows, rows < seqlen_q, acc / l_i[:, None], VALUE_DIM, BLOCK_DV)
    lse_ptr += (batch * heads + head).to(tl.int64) * seqlen_q
    tl.store(lse_ptr + rows, (m_i + tl.log2(l_i)) * LN2, mask=rows < seqlen_q)
