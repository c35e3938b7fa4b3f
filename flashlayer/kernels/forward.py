"""The forward kernel: one pass over the keys, with the online softmax in base 2.

Milakov & Gimelshein, arXiv 1805.02867; Dao, "FlashAttention-2", arXiv 2307.08691, section 3.1.

An option that is off is None: Triton compiles its code away.
"""

import triton
import triton.language as tl

from flashlayer.kernels.primitives import (
    CHANGING,
    LOG2E,
    diagonal_offset,
    divided,
    dot_into,
    dot_rows,
    head_pointer,
    in_band,
    in_elements,
    keep_factor,
    key_bounds,
    key_tile_edges,
    load_bias,
    load_described,
    load_tiles,
    log2_ratio,
    modify_scores,
    program_coordinates,
    scaled,
    sequence,
    store_tiles,
    zero_tiles,
)


@triton.jit
def online_softmax_update(
    m_i, l_i, acc, x, scale, v, kept, MODIFIED: tl.constexpr, INPUT_PRECISION: tl.constexpr
):
    """Take one tile of keys into the state ``(m_i, l_i, acc)`` of a block of queries.

    The state of a row stands for the maximum ``m = max s`` of its scores, the denominator
    ``l = sum exp(s - m)`` and the numerator ``acc = sum exp(s - m) v`` over all keys so far; a
    larger maximum rescales what was summed before by ``exp(m_old - m_new)``. Exponentials are taken
    in base 2. ``s = x`` where an option has ``MODIFIED`` the scores, else ``s = scale * x`` with
    ``scale > 0``, which is applied after the maximum. Dropout's ``kept`` weighs the values only.
    """
    tile_max = tl.max(x, 1) if MODIFIED else tl.max(x, 1) * scale
    m_new = tl.maximum(m_i, tile_max)  # [BLOCK_M]
    # Until a row has seen a key its maximum is -inf, and -inf - -inf is NaN: subtract 0 instead.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # [BLOCK_M]
    rescale = tl.exp2((m_i - shift) * LOG2E)  # [BLOCK_M]
    p = tl.exp2(log2_ratio(x, shift[:, None], scale, MODIFIED))  # [BLOCK_M, BLOCK_N]
    l_i = l_i * rescale + tl.sum(p, 1)
    if kept is not None:
        p = p * kept
    acc = dot_into(scaled(acc, rescale[:, None]), p.to(v[0].dtype), v, INPUT_PRECISION)
    return m_new, l_i, acc


@triton.jit(do_not_specialize=CHANGING)
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_descriptor,
    v_descriptor,
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
    num_blocks,
    scale: tl.float64,
    offset,
    window_left,
    window_right,
    softcap: tl.float64,
    slopes_ptr,
    slopes_stride,
    mask_ptr,
    mask_batch,
    mask_head,
    mask_row,
    mask_column,
    sinks_ptr,
    seed_ptr,
    threshold: tl.int64,
    keep_scale: tl.float64,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCALE_SIGN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK_UNIT: tl.constexpr,
    MASK_STEP: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One block of queries of one head per program.

    Shapes: q ``(B, heads, seqlen_q, HEAD_DIM)``, k and v ``(B, heads // group, seqlen_k, ...)``,
    o ``(B, heads, seqlen_q, VALUE_DIM)``, each with its four strides; lse ``(B, heads, seqlen_q)``
    contiguous, whose dtype is the one of the accumulation. ``num_blocks`` counts the blocks of the
    longest sequence. ``BLOCK_D`` and ``BLOCK_DV``: widths of the head dimensions' column tiles.
    The scores are ``SCALE_SIGN * scale * q k^T`` with ``scale > 0``: the sign (1, -1, 0) goes into
    q, where it is exact, so that the factor after the maximum is always positive.
    ``k_descriptor`` and ``v_descriptor``, or None, load the tiles that every query sees (TMA).
    ``EDGE_STAGES``, or None for the launch's ``num_stages``: tiles in flight where they don't.

    Options, None when off (the softcap by ``SOFTCAP``): a side of the window; ``slopes_ptr``, fp32,
    one per head, ``slopes_stride`` from one batch entry to the next; ``mask_ptr``, uint8 or float,
    with the strides that :func:`in_elements` reads, 0 where it is broadcast; ``sinks_ptr``,
    one per head; ``seed_ptr``, with dropout's ``threshold`` and ``keep_scale``;
    ``cu_seqlens_*_ptr``, packed sequences (then B = 1).
    """
    block, head, batch = program_coordinates(num_blocks, heads)
    q_begin, k_begin, q_length, k_length = sequence(
        batch, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seqlen_q, seqlen_k
    )
    own_blocks = num_blocks
    entry = batch  # which entry of the tensors' first dimension
    if cu_seqlens_q_ptr is not None:
        entry = batch * 0
        own_blocks = tl.cdiv(q_length, BLOCK_M)
        if block >= own_blocks:
            return
    if window_right is not None:
        block = own_blocks - 1 - block  # the last queries see most keys: they go first
    diagonal = diagonal_offset(offset, q_length, k_length)
    ACC_DTYPE: tl.constexpr = lse_ptr.dtype.element_ty
    MODIFIED: tl.constexpr = SOFTCAP or slopes_ptr is not None or mask_ptr is not None

    q_ptr = head_pointer(q_ptr, q_strides, entry, head, q_begin)
    k_ptr = head_pointer(k_ptr, k_strides, entry, head // group, k_begin)
    v_ptr = head_pointer(v_ptr, v_strides, entry, head // group, k_begin)
    o_ptr = head_pointer(o_ptr, o_strides, entry, head, q_begin)

    q_start = block * BLOCK_M
    q_stop = tl.minimum(q_start + BLOCK_M, q_length)
    rows = q_start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    valid = rows < q_length
    q = load_tiles(q_ptr, q_strides, rows, valid, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    if SCALE_SIGN != 1:
        q = scaled(q, SCALE_SIGN)
    scale = tl.full((), scale, ACC_DTYPE)
    cap = tl.full((), softcap, ACC_DTYPE) if SOFTCAP else None
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + batch * slopes_stride + head).to(ACC_DTYPE)
    if mask_ptr is not None:
        mask_strides = in_elements(
            mask_batch, mask_head, mask_row, mask_column, MASK_UNIT, MASK_STEP
        )
        mask_ptr = head_pointer(mask_ptr, mask_strides, batch, head, 0)

    m_i = tl.full((BLOCK_M,), float("-inf"), ACC_DTYPE)
    l_i = tl.zeros((BLOCK_M,), ACC_DTYPE)
    acc = zero_tiles(BLOCK_M, BLOCK_DV, ACC_DTYPE)
    if sinks_ptr is not None:  # one more key, whose score is the sink and whose value is 0
        sink = tl.load(sinks_ptr + head).to(ACC_DTYPE)
        m_i = tl.zeros((BLOCK_M,), ACC_DTYPE) + sink
        l_i += tl.where(sink == float("-inf"), 0.0, 1.0)

    bounds = key_bounds(q_start, q_stop, diagonal, window_left, window_right, k_length)
    edges = key_tile_edges(bounds, BLOCK_N)
    for part in tl.static_range(3):  # left edge of the band, what all queries see, right edge
        if part > 0 or window_left is not None:
            for k_start in tl.range(
                edges[part],
                edges[part + 1],
                BLOCK_N,
                num_stages=None if part == 1 else EDGE_STAGES,
            ):
                columns = k_start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
                seen = None if part == 1 else columns < edges[3]
                i, j = rows[:, None], columns[None, :]
                bias = None
                if mask_ptr is not None:
                    exists = (i < q_length) & (j < k_length)
                    bias = load_bias(mask_ptr, mask_strides, i, j, exists, ACC_DTYPE)
                    # What the mask hides from all these queries may hold NaN.
                    attended = tl.max(bias, 0) > float("-inf")
                    seen = attended if part == 1 else attended & (columns < edges[3])
                if part == 1 and k_descriptor is not None:
                    k = load_described(k_descriptor, entry, head // group, k_begin + k_start)
                else:
                    k = load_tiles(k_ptr, k_strides, columns, seen, HEAD_DIM, BLOCK_D)
                scores = dot_rows(q, k, INPUT_PRECISION)  # [BLOCK_M, BLOCK_N]
                x, _ = modify_scores(scores, scale, cap, slope, bias, i + diagonal - j)
                if part != 1:
                    visible = in_band(i, j, diagonal, window_left, window_right, k_length)
                    x = tl.where(visible, x, float("-inf"))
                if part == 1 and v_descriptor is not None:
                    v = load_described(v_descriptor, entry, head // group, k_begin + k_start)
                else:
                    v = load_tiles(v_ptr, v_strides, columns, seen, VALUE_DIM, BLOCK_DV)
                kept = None
                if seed_ptr is not None:
                    kept = keep_factor(
                        seed_ptr, threshold, keep_scale, batch, head, i, j, ACC_DTYPE
                    )
                m_i, l_i, acc = online_softmax_update(
                    m_i, l_i, acc, x, scale, v, kept, MODIFIED, INPUT_PRECISION
                )

    # A row that saw no key has m_i = -inf and l_i = 0: o = 0 / 1 and lse = -inf + log(1).
    l_i = tl.where(l_i == 0.0, 1.0, l_i)
    o = divided(acc, l_i[:, None])
    store_tiles(o_ptr, o_strides, rows, valid, o, VALUE_DIM, BLOCK_DV)
    lse_ptr += (entry * heads + head).to(tl.int64) * seqlen_q + q_begin
    tl.store(lse_ptr + rows, m_i + tl.log(l_i), mask=valid)
