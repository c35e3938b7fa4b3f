"""The backward kernels: delta, then dK and dV, then dQ; the probabilities are recomputed.

With ``s = scale * q k^T``, ``p = exp(s - lse)`` and ``o = p v``, for gradients ``do`` and ``dlse``:

    dv = p^T do        dp = do v^T        ds = p * (dp - delta)        delta = rowsum(o * do) - dlse
    dq = scale * ds k                     dk = scale * ds^T q

Nothing is accumulated across programs, so there are no atomics and two runs are bitwise equal.
Dao, "FlashAttention-2", arXiv 2307.08691, section 3.1.
"""

import triton
import triton.language as tl

from flashlayer.kernels.primitives import (
    LOG2E,
    dot_into,
    head_pointer,
    key_bounds,
    key_tile_edges,
    load_tile,
    mask_scores,
    program_coordinates,
    query_bounds,
    query_tile_edges,
    store_tile,
)


@triton.jit
def load_lse_log2(lse_ptr, rows, valid_rows):
    """The LSE of some rows in base 2; +inf, which makes p = 2^(s - inf) = 0, for rows without one.

    Those are the rows that are not valid and the rows that see no key, whose LSE is -inf.
    """
    lse = tl.load(lse_ptr + rows, mask=valid_rows, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse) * LOG2E


@triton.jit(do_not_specialize=["seqlen_q"])
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
    o_ptr = head_pointer(o_ptr, o_strides, batch, head)
    do_ptr = head_pointer(do_ptr, do_strides, batch, head)
    o = load_tile(o_ptr, o_strides, rows, valid, VALUE_DIM, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    do = load_tile(do_ptr, do_strides, rows, valid, VALUE_DIM, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    ACC_DTYPE: tl.constexpr = delta_ptr.dtype.element_ty
    delta = tl.sum(o.to(ACC_DTYPE) * do.to(ACC_DTYPE), 1)  # [BLOCK_M]
    head_row = (batch * heads + head).to(tl.int64) * seqlen_q
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + head_row + rows, mask=valid, other=0.0)
    tl.store(delta_ptr + head_row + rows, delta, mask=valid)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "offset", "window_left", "window_right"])
def dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
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
    scale: tl.float64,
    offset,
    window_left,
    window_right,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One block of keys of one kv head per program: dK and dV, summed over its ``GROUP`` heads.

    Shapes as in the forward kernel; do like o, dk like k, dv like v, lse and delta contiguous.
    """
    num_blocks = tl.cdiv(seqlen_k, BLOCK_N)
    block, kv_head, batch = program_coordinates(num_blocks, kv_heads)
    ACC_DTYPE: tl.constexpr = lse_ptr.dtype.element_ty
    scale = tl.full((), scale, ACC_DTYPE)
    scale_log2 = scale * LOG2E

    k_ptr = head_pointer(k_ptr, k_strides, batch, kv_head)
    v_ptr = head_pointer(v_ptr, v_strides, batch, kv_head)
    k_start = block * BLOCK_N
    k_stop = tl.minimum(k_start + BLOCK_N, seqlen_k)
    columns = k_start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    # A key that no query at all sees counts as 0: its p is 0, and 0 * NaN would be NaN.
    seen_bounds = key_bounds(0, seqlen_q, offset, window_left, window_right, seqlen_k)
    seen = (columns >= seen_bounds[0]) & (columns < seen_bounds[3])
    k = load_tile(k_ptr, k_strides, columns, seen, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v = load_tile(v_ptr, v_strides, columns, seen, VALUE_DIM, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]

    dk = tl.zeros((BLOCK_N, BLOCK_D), ACC_DTYPE)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), ACC_DTYPE)
    bounds = query_bounds(k_start, k_stop, offset, window_left, window_right, seqlen_q)
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
            for step in tl.range(0, num_tiles * GROUP):  # the tiles of one query head after another
                if GROUP == 1:
                    head = kv_head
                    tile = step
                else:
                    head = kv_head * GROUP + step // num_tiles
                    tile = step % num_tiles
                q_start = edges[part] + tile * BLOCK_M
                rows = q_start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
                valid = tl.arange(0, BLOCK_M) < edges[part + 1] - q_start
                head_row = (batch * kv_heads * GROUP + head).to(tl.int64) * seqlen_q
                q_head = head_pointer(q_ptr, q_strides, batch, head)
                q = load_tile(q_head, q_strides, rows, valid, HEAD_DIM, BLOCK_D)
                lse_log2 = load_lse_log2(lse_ptr + head_row, rows, valid)  # [BLOCK_M]
                scores = tl.dot(k, tl.trans(q), input_precision=INPUT_PRECISION)
                exponent = scores * scale_log2 - lse_log2[None, :]  # [BLOCK_N, BLOCK_M]
                if part != 1:
                    exponent = mask_scores(
                        exponent, columns, rows, -offset, window_right, window_left, seqlen_q
                    )
                p = tl.exp2(exponent)  # [BLOCK_N, BLOCK_M]
                do_head = head_pointer(do_ptr, do_strides, batch, head)
                do = load_tile(do_head, do_strides, rows, valid, VALUE_DIM, BLOCK_DV)
                dv = dot_into(dv, p.to(do.dtype), do, INPUT_PRECISION)
                dp = tl.dot(v, tl.trans(do), input_precision=INPUT_PRECISION)
                delta = tl.load(delta_ptr + head_row + rows, mask=valid, other=0.0)  # [BLOCK_M]
                ds = p * (dp - delta[None, :])  # [BLOCK_N, BLOCK_M]
                dk = dot_into(dk, ds.to(q.dtype), q, INPUT_PRECISION)

    exists = columns < seqlen_k
    dk_ptr = head_pointer(dk_ptr, dk_strides, batch, kv_head)
    dv_ptr = head_pointer(dv_ptr, dv_strides, batch, kv_head)
    store_tile(dk_ptr, dk_strides, columns, exists, dk * scale, HEAD_DIM, BLOCK_D)
    store_tile(dv_ptr, dv_strides, columns, exists, dv, VALUE_DIM, BLOCK_DV)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "offset", "window_left", "window_right"])
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
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
    INPUT_PRECISION: tl.constexpr,
):
    """One block of queries of one head per program, with the forward kernel's loop over keys."""
    num_blocks = tl.cdiv(seqlen_q, BLOCK_M)
    block, head, batch = program_coordinates(num_blocks, heads)
    if window_right is not None:
        block = num_blocks - 1 - block  # the last queries see most keys: they go first
    ACC_DTYPE: tl.constexpr = lse_ptr.dtype.element_ty
    scale = tl.full((), scale, ACC_DTYPE)
    scale_log2 = scale * LOG2E

    q_ptr = head_pointer(q_ptr, q_strides, batch, head)
    k_ptr = head_pointer(k_ptr, k_strides, batch, head // group)
    v_ptr = head_pointer(v_ptr, v_strides, batch, head // group)
    do_ptr = head_pointer(do_ptr, do_strides, batch, head)
    dq_ptr = head_pointer(dq_ptr, dq_strides, batch, head)
    head_row = (batch * heads + head).to(tl.int64) * seqlen_q

    q_start = block * BLOCK_M
    q_stop = tl.minimum(q_start + BLOCK_M, seqlen_q)
    rows = q_start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    valid = rows < seqlen_q
    q = load_tile(q_ptr, q_strides, rows, valid, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    do = load_tile(do_ptr, do_strides, rows, valid, VALUE_DIM, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    lse_log2 = load_lse_log2(lse_ptr + head_row, rows, valid)  # [BLOCK_M]
    delta = tl.load(delta_ptr + head_row + rows, mask=valid, other=0.0)  # [BLOCK_M]

    dq = tl.zeros((BLOCK_M, BLOCK_D), ACC_DTYPE)
    bounds = key_bounds(q_start, q_stop, offset, window_left, window_right, seqlen_k)
    edges = key_tile_edges(bounds, BLOCK_N)
    for part in tl.static_range(3):  # left edge of the band, what all queries see, right edge
        if part > 0 or window_left is not None:
            for k_start in tl.range(edges[part], edges[part + 1], BLOCK_N):
                columns = k_start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
                seen = None if part == 1 else columns < edges[3]
                k = load_tile(k_ptr, k_strides, columns, seen, HEAD_DIM, BLOCK_D)
                scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)
                exponent = scores * scale_log2 - lse_log2[:, None]  # [BLOCK_M, BLOCK_N]
                if part != 1:
                    exponent = mask_scores(
                        exponent, rows, columns, offset, window_left, window_right, seqlen_k
                    )
                p = tl.exp2(exponent)  # [BLOCK_M, BLOCK_N]
                v = load_tile(v_ptr, v_strides, columns, seen, VALUE_DIM, BLOCK_DV)
                dp = tl.dot(do, tl.trans(v), input_precision=INPUT_PRECISION)
                ds = p * (dp - delta[:, None])  # [BLOCK_M, BLOCK_N]
                dq = dot_into(dq, ds.to(k.dtype), k, INPUT_PRECISION)

    store_tile(dq_ptr, dq_strides, rows, valid, dq * scale, HEAD_DIM, BLOCK_D)
