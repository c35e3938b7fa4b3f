"""The backward kernels: delta, then dK and dV, then dQ; the probabilities are recomputed.

With ``s = scale * q k^T``, ``p = exp(s - lse)`` and ``o = p v``, for gradients ``do`` and ``dlse``:

    dv = p^T do        dp = do v^T        ds = p * (dp - delta)        delta = rowsum(o * do) - dlse
    dq = scale * ds k                     dk = scale * ds^T q

Nothing is accumulated across programs, so there are no atomics and two runs are bitwise equal.
Dao, "FlashAttention-2", arXiv 2307.08691, section 3.1. The options are those of the forward kernel;
with an additive mask its gradient is ds, summed over what the mask was broadcast over.
"""

import triton
import triton.language as tl

from flashlayer.kernels.primitives import (
    CHANGING,
    diagonal_offset,
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
    query_bounds,
    query_tile_edges,
    scaled,
    sequence,
    store_tiles,
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
def load_lse(lse_ptr, rows, valid_rows):
    """The LSE of some rows; +inf, which makes p = exp(s - inf) = 0, for rows without one.

    Those are the rows that are not valid and the rows that see no key, whose LSE is -inf.
    """
    lse = tl.load(lse_ptr + rows, mask=valid_rows, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def probabilities(scores, scale, softcap, slope, bias, distance, visible, lse):
    """``p = exp(s - lse)`` of a tile from its raw scores, and the softcap's tanh.

    Either orientation: ``distance`` and ``lse`` broadcast to the tile. ``visible`` is a tile where
    the band's edge runs through it, else None.
    """
    x, capped = modify_scores(scores, scale, softcap, slope, bias, distance)
    MODIFIED: tl.constexpr = softcap is not None or slope is not None or bias is not None
    exponent = log2_ratio(x, lse, scale, MODIFIED)
    if visible is not None:
        exponent = tl.where(visible, exponent, float("-inf"))
    return tl.exp2(exponent), capped


@triton.jit
def score_gradient(p, dp, delta, bias, kept):
    """``ds = p * (dp - delta)``, before the softcap's derivative: the gradient of the mask."""
    if kept is not None:
        dp = dp * kept
    ds = p * (dp - delta)
    if bias is not None:  # a hidden value may hold NaN, and dp with it
        ds = tl.where(bias == float("-inf"), 0.0, ds)
    return ds


@triton.jit(do_not_specialize=CHANGING)
def delta_kernel(
    o_ptr,
    do_ptr,
    dlse_ptr,
    delta_ptr,
    o_strides,
    do_strides,
    heads,
    seqlen_q,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """``delta = rowsum(o * do) - dlse``, one block of queries of one head per program.

    o and do ``(B, heads, seqlen_q, VALUE_DIM)`` with their strides; dlse (or None) and delta
    ``(B, heads, seqlen_q)`` contiguous.
    """
    block, head, batch = program_coordinates(tl.cdiv(seqlen_q, BLOCK_M), heads)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    valid = rows < seqlen_q
    o_ptr = head_pointer(o_ptr, o_strides, batch, head, 0)
    do_ptr = head_pointer(do_ptr, do_strides, batch, head, 0)
    o = load_tiles(o_ptr, o_strides, rows, valid, VALUE_DIM, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    do = load_tiles(do_ptr, do_strides, rows, valid, VALUE_DIM, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    ACC_DTYPE: tl.constexpr = delta_ptr.dtype.element_ty
    delta = tl.zeros((BLOCK_M,), ACC_DTYPE)
    for part in tl.static_range(len(BLOCK_DV)):
        delta += tl.sum(o[part].to(ACC_DTYPE) * do[part].to(ACC_DTYPE), 1)
    head_row = (batch * heads + head).to(tl.int64) * seqlen_q
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + head_row + rows, mask=valid, other=0.0)
    tl.store(delta_ptr + head_row + rows, delta, mask=valid)


@triton.jit(do_not_specialize=CHANGING)
def dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    q_descriptor,
    do_descriptor,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    dk_strides,
    dv_strides,
    kv_heads,
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
    seed_ptr,
    threshold: tl.int64,
    keep_scale: tl.float64,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK_UNIT: tl.constexpr,
    MASK_STEP: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
    ROW_COPIES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One block of keys of one kv head per program: dK and dV, summed over its ``GROUP`` heads.

    Shapes and options as in the forward kernel; do like o, dk like k, dv like v, lse and delta
    contiguous. The tiles are transposed: keys down, queries across.
    """
    block, kv_head, batch = program_coordinates(num_blocks, kv_heads)
    q_begin, k_begin, q_length, k_length = sequence(
        batch, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seqlen_q, seqlen_k
    )
    entry = batch
    if cu_seqlens_k_ptr is not None:
        entry = batch * 0
        if block >= tl.cdiv(k_length, BLOCK_N):
            return
    diagonal = diagonal_offset(offset, q_length, k_length)
    ACC_DTYPE: tl.constexpr = lse_ptr.dtype.element_ty
    scale = tl.full((), scale, ACC_DTYPE)
    cap = tl.full((), softcap, ACC_DTYPE) if SOFTCAP else None
    if mask_ptr is not None:
        mask_strides = in_elements(
            mask_batch, mask_head, mask_row, mask_column, MASK_UNIT, MASK_STEP
        )

    k_ptr = head_pointer(k_ptr, k_strides, entry, kv_head, k_begin)
    v_ptr = head_pointer(v_ptr, v_strides, entry, kv_head, k_begin)
    k_start = block * BLOCK_N
    k_stop = tl.minimum(k_start + BLOCK_N, k_length)
    columns = k_start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    # A key that no query at all sees counts as 0: its p is 0, and 0 * NaN would be NaN.
    seen_bounds = key_bounds(0, q_length, diagonal, window_left, window_right, k_length)
    seen = (columns >= seen_bounds[0]) & (columns < seen_bounds[3])
    k = load_tiles(k_ptr, k_strides, columns, seen, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v = load_tiles(v_ptr, v_strides, columns, seen, VALUE_DIM, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]

    dk = zero_tiles(BLOCK_N, BLOCK_D, ACC_DTYPE)
    dv = zero_tiles(BLOCK_N, BLOCK_DV, ACC_DTYPE)
    bounds = query_bounds(k_start, k_stop, diagonal, window_left, window_right, q_length)
    edges = query_tile_edges(bounds)
    for part in tl.static_range(3):  # right edge of the band, queries that see all keys, left edge
        # An edge is at most BLOCK_N queries long. Its tiles are counted at compile time: with a
        # dynamic count ptxas serializes the wgmma of the loop that follows.
        if part == 1:
            num_tiles = tl.cdiv(edges[2] - edges[1], BLOCK_M)
        else:
            num_tiles = tl.cdiv(BLOCK_N, BLOCK_M)
        # The band's edges exist only where the window has that side.
        if part == 1 or (window_right if part == 0 else window_left) is not None:
            # The tiles of one query head after another.
            for step in tl.range(
                0, num_tiles * GROUP, num_stages=None if part == 1 else EDGE_STAGES
            ):
                if GROUP == 1:
                    head = kv_head
                    tile = step
                else:
                    head = kv_head * GROUP + step // num_tiles
                    tile = step % num_tiles
                q_start = edges[part] + tile * BLOCK_M
                rows = q_start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
                valid = tl.arange(0, BLOCK_M) < edges[part + 1] - q_start
                i, j = rows[None, :], columns[:, None]
                slope = None
                bias = None
                kept = None
                visible = None
                if part != 1:  # queries of a key: that interval does not change in this loop
                    visible = in_band(j, i, -diagonal, window_right, window_left, q_length)
                if slopes_ptr is not None:
                    slope = tl.load(slopes_ptr + batch * slopes_stride + head).to(ACC_DTYPE)
                if mask_ptr is not None:
                    bias_head = head_pointer(mask_ptr, mask_strides, batch, head, 0)
                    exists = valid[None, :] & (j < k_length)
                    bias = load_bias(bias_head, mask_strides, i, j, exists, ACC_DTYPE)
                if seed_ptr is not None:
                    kept = keep_factor(
                        seed_ptr, threshold, keep_scale, batch, head, i, j, ACC_DTYPE
                    )
                head_row = (entry * kv_heads * GROUP + head).to(tl.int64) * seqlen_q + q_begin
                q_head = head_pointer(q_ptr, q_strides, entry, head, q_begin)
                if part == 1 and q_descriptor is not None:
                    q = load_described(q_descriptor, entry, head, q_begin + q_start)
                else:
                    q = load_tiles(q_head, q_strides, rows, valid, HEAD_DIM, BLOCK_D)
                lse = load_rows(lse_ptr + head_row, rows, valid, float("inf"), ROW_COPIES)
                lse = tl.where(lse == float("-inf"), float("inf"), lse)  # [BLOCK_M]
                scores = dot_rows(k, q, INPUT_PRECISION)
                p, capped = probabilities(
                    scores,
                    scale,
                    cap,
                    slope,
                    bias,
                    i + diagonal - j,
                    visible,
                    lse[None, :],
                )  # [BLOCK_N, BLOCK_M]
                do_head = head_pointer(do_ptr, do_strides, entry, head, q_begin)
                if part == 1 and do_descriptor is not None:
                    do = load_described(do_descriptor, entry, head, q_begin + q_start)
                else:
                    do = load_tiles(do_head, do_strides, rows, valid, VALUE_DIM, BLOCK_DV)
                p_kept = p if kept is None else p * kept
                dv = dot_into(dv, p_kept.to(do[0].dtype), do, INPUT_PRECISION)
                dp = dot_rows(v, do, INPUT_PRECISION)
                delta = load_rows(delta_ptr + head_row, rows, valid, 0.0, ROW_COPIES)
                ds = score_gradient(p, dp, delta[None, :], bias, kept)  # [BLOCK_N, BLOCK_M]
                if SOFTCAP:
                    ds *= 1.0 - capped * capped
                dk = dot_into(dk, ds.to(q[0].dtype), q, INPUT_PRECISION)

    exists = columns < k_length
    dk_ptr = head_pointer(dk_ptr, dk_strides, entry, kv_head, k_begin)
    dv_ptr = head_pointer(dv_ptr, dv_strides, entry, kv_head, k_begin)
    store_tiles(dk_ptr, dk_strides, columns, exists, scaled(dk, scale), HEAD_DIM, BLOCK_D)
    store_tiles(dv_ptr, dv_strides, columns, exists, dv, VALUE_DIM, BLOCK_DV)


@triton.jit(do_not_specialize=CHANGING)
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_descriptor,
    v_descriptor,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    dq_strides,
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
    SOFTCAP: tl.constexpr,
    MASK_UNIT: tl.constexpr,
    MASK_STEP: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One block of queries of one head per program, with the forward kernel's loop over keys."""
    block, head, batch = program_coordinates(num_blocks, heads)
    q_begin, k_begin, q_length, k_length = sequence(
        batch, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seqlen_q, seqlen_k
    )
    own_blocks = num_blocks
    entry = batch
    if cu_seqlens_q_ptr is not None:
        entry = batch * 0
        own_blocks = tl.cdiv(q_length, BLOCK_M)
        if block >= own_blocks:
            return
    if window_right is not None:
        block = own_blocks - 1 - block  # the last queries see most keys: they go first
    diagonal = diagonal_offset(offset, q_length, k_length)
    ACC_DTYPE: tl.constexpr = lse_ptr.dtype.element_ty
    scale = tl.full((), scale, ACC_DTYPE)
    cap = tl.full((), softcap, ACC_DTYPE) if SOFTCAP else None

    q_ptr = head_pointer(q_ptr, q_strides, entry, head, q_begin)
    k_ptr = head_pointer(k_ptr, k_strides, entry, head // group, k_begin)
    v_ptr = head_pointer(v_ptr, v_strides, entry, head // group, k_begin)
    do_ptr = head_pointer(do_ptr, do_strides, entry, head, q_begin)
    dq_ptr = head_pointer(dq_ptr, dq_strides, entry, head, q_begin)
    head_row = (entry * heads + head).to(tl.int64) * seqlen_q + q_begin
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + batch * slopes_stride + head).to(ACC_DTYPE)
    if mask_ptr is not None:
        mask_strides = in_elements(
            mask_batch, mask_head, mask_row, mask_column, MASK_UNIT, MASK_STEP
        )
        mask_ptr = head_pointer(mask_ptr, mask_strides, batch, head, 0)

    q_start = block * BLOCK_M
    q_stop = tl.minimum(q_start + BLOCK_M, q_length)
    rows = q_start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    valid = rows < q_length
    q = load_tiles(q_ptr, q_strides, rows, valid, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    do = load_tiles(do_ptr, do_strides, rows, valid, VALUE_DIM, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    lse = load_lse(lse_ptr + head_row, rows, valid)  # [BLOCK_M]
    delta = tl.load(delta_ptr + head_row + rows, mask=valid, other=0.0)  # [BLOCK_M]

    dq = zero_tiles(BLOCK_M, BLOCK_D, ACC_DTYPE)
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
                kept = None
                visible = None
                if part != 1:
                    visible = in_band(i, j, diagonal, window_left, window_right, k_length)
                if mask_ptr is not None:
                    exists = (i < q_length) & (j < k_length)
                    bias = load_bias(mask_ptr, mask_strides, i, j, exists, ACC_DTYPE)
                    attended = tl.max(bias, 0) > float("-inf")
                    seen = attended if part == 1 else attended & (columns < edges[3])
                if seed_ptr is not None:
                    kept = keep_factor(
                        seed_ptr, threshold, keep_scale, batch, head, i, j, ACC_DTYPE
                    )
                if part == 1 and k_descriptor is not None:
                    k = load_described(k_descriptor, entry, head // group, k_begin + k_start)
                else:
                    k = load_tiles(k_ptr, k_strides, columns, seen, HEAD_DIM, BLOCK_D)
                scores = dot_rows(q, k, INPUT_PRECISION)
                p, capped = probabilities(
                    scores,
                    scale,
                    cap,
                    slope,
                    bias,
                    i + diagonal - j,
                    visible,
                    lse[:, None],
                )  # [BLOCK_M, BLOCK_N]
                if part == 1 and v_descriptor is not None:
                    v = load_described(v_descriptor, entry, head // group, k_begin + k_start)
                else:
                    v = load_tiles(v_ptr, v_strides, columns, seen, VALUE_DIM, BLOCK_DV)
                dp = dot_rows(do, v, INPUT_PRECISION)
                ds = score_gradient(p, dp, delta[:, None], bias, kept)  # [BLOCK_M, BLOCK_N]
                if SOFTCAP:
                    ds *= 1.0 - capped * capped
                dq = dot_into(dq, ds.to(k[0].dtype), k, INPUT_PRECISION)

    store_tiles(dq_ptr, dq_strides, rows, valid, scaled(dq, scale), HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=CHANGING)
def dmask_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    mask_ptr,
    dmask_ptr,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    mask_batch,
    mask_head,
    mask_row,
    mask_column,
    batches,
    heads,
    group,
    seqlen_q,
    seqlen_k,
    mask_heads,
    q_blocks,
    k_blocks,
    scale: tl.float64,
    offset,
    window_left,
    window_right,
    softcap: tl.float64,
    slopes_ptr,
    slopes_stride,
    seed_ptr,
    threshold: tl.int64,
    keep_scale: tl.float64,
    OVER_BATCH: tl.constexpr,
    OVER_HEADS: tl.constexpr,
    OVER_QUERIES: tl.constexpr,
    OVER_KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK_UNIT: tl.constexpr,
    MASK_STEP: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """The gradient of a float mask: ds, summed over the dimensions that ``OVER_*`` name.

    One program per element-of-batch, head, block of queries and block of keys that the mask has of
    its own; it loops over all there are where the mask has one for all. So every sum is in one
    program and in one order.
    """
    program = tl.program_id(0)
    k_block = program % k_blocks
    q_block = program // k_blocks % q_blocks
    own_head = program // (k_blocks * q_blocks) % mask_heads
    own_batch = program // (k_blocks * q_blocks * mask_heads)
    mask_strides = in_elements(mask_batch, mask_head, mask_row, mask_column, MASK_UNIT, MASK_STEP)
    ACC_DTYPE: tl.constexpr = lse_ptr.dtype.element_ty
    scale = tl.full((), scale, ACC_DTYPE)
    cap = tl.full((), softcap, ACC_DTYPE) if SOFTCAP else None

    total = tl.zeros((BLOCK_M, BLOCK_N), ACC_DTYPE)
    num_batches = batches if OVER_BATCH else 1
    num_heads = heads if OVER_HEADS else 1
    num_q = tl.cdiv(seqlen_q, BLOCK_M) if OVER_QUERIES else 1
    for outer in tl.range(0, num_batches * num_heads * num_q):
        batch = outer // (num_heads * num_q) if OVER_BATCH else own_batch
        head = outer // num_q % num_heads if OVER_HEADS else own_head
        q_start = (outer % num_q if OVER_QUERIES else q_block) * BLOCK_M
        q_stop = tl.minimum(q_start + BLOCK_M, seqlen_q)
        rows = q_start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        valid = rows < seqlen_q
        head_row = (batch * heads + head).to(tl.int64) * seqlen_q
        q_head = head_pointer(q_ptr, q_strides, batch, head, 0)
        do_head = head_pointer(do_ptr, do_strides, batch, head, 0)
        k_head = head_pointer(k_ptr, k_strides, batch, head // group, 0)
        v_head = head_pointer(v_ptr, v_strides, batch, head // group, 0)
        bias_head = head_pointer(mask_ptr, mask_strides, batch, head, 0)
        q = load_tiles(q_head, q_strides, rows, valid, HEAD_DIM, BLOCK_D)
        do = load_tiles(do_head, do_strides, rows, valid, VALUE_DIM, BLOCK_DV)
        lse = load_lse(lse_ptr + head_row, rows, valid)  # [BLOCK_M]
        delta = tl.load(delta_ptr + head_row + rows, mask=valid, other=0.0)  # [BLOCK_M]
        slope = None
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + batch * slopes_stride + head).to(ACC_DTYPE)
        bounds = key_bounds(q_start, q_stop, offset, window_left, window_right, seqlen_k)
        start = bounds[0]
        stop = bounds[3]
        if not OVER_KEYS:  # the one tile of keys, unless these queries see nothing of it
            first = k_block * BLOCK_N
            stop = tl.where((first < stop) & (first + BLOCK_N > start), first + 1, first)
            start = first
        for k_start in tl.range(start, stop, BLOCK_N):
            columns = k_start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
            i, j = rows[:, None], columns[None, :]
            exists = (i < seqlen_q) & (j < seqlen_k)
            bias = load_bias(bias_head, mask_strides, i, j, exists, ACC_DTYPE)
            seen = (tl.max(bias, 0) > float("-inf")) & (columns < bounds[3])
            seen &= columns >= bounds[0]
            k = load_tiles(k_head, k_strides, columns, seen, HEAD_DIM, BLOCK_D)
            scores = dot_rows(q, k, INPUT_PRECISION)
            p, _ = probabilities(
                scores,
                scale,
                cap,
                slope,
                bias,
                i + offset - j,
                in_band(i, j, offset, window_left, window_right, seqlen_k),
                lse[:, None],
            )  # [BLOCK_M, BLOCK_N]
            v = load_tiles(v_head, v_strides, columns, seen, VALUE_DIM, BLOCK_DV)
            dp = dot_rows(do, v, INPUT_PRECISION)
            kept = None
            if seed_ptr is not None:
                kept = keep_factor(seed_ptr, threshold, keep_scale, batch, head, i, j, ACC_DTYPE)
            total += score_gradient(p, dp, delta[:, None], bias, kept)

    # What was summed over stands in the first row, the first column, or both.
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    if OVER_QUERIES:
        total = tl.where(rows[:, None] == 0, tl.sum(total, 0)[None, :], 0.0)
        rows_exist = rows == 0
    else:
        rows += q_block * BLOCK_M
        rows_exist = rows < seqlen_q
    if OVER_KEYS:
        total = tl.where(columns[None, :] == 0, tl.sum(total, 1)[:, None], 0.0)
        columns_exist = columns == 0
    else:
        columns += k_block * BLOCK_N
        columns_exist = columns < seqlen_k
    # The gradient is contiguous, with the mask's sizes.
    mask_rows = 1 if OVER_QUERIES else seqlen_q
    mask_columns = 1 if OVER_KEYS else seqlen_k
    first_row = (own_batch * mask_heads + own_head).to(tl.int64) * mask_rows
    pointers = (
        dmask_ptr
        + (first_row + rows.to(tl.int64))[:, None] * mask_columns
        + columns.to(tl.int64)[None, :]
    )
    exist = rows_exist[:, None] & columns_exist[None, :]
    tl.store(pointers, total.to(dmask_ptr.dtype.element_ty), mask=exist)
