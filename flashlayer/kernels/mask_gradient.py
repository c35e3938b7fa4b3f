"""The gradient of a float attention mask: ds, summed over what the mask was broadcast over."""

import triton
import triton.language as tl

from flashlayer.kernels.arguments import CHANGING, Dropout, Window
from flashlayer.kernels.backward import load_rows, probabilities, score_gradient
from flashlayer.kernels.primitives import (
    dot_rows,
    in_exponent,
    in_window,
    keep_factor,
    key_bounds,
    load_bias,
    load_slope,
    load_tiles,
    mask_pointer,
    row_index,
    row_pointer,
    unmasked_keys,
)


@triton.jit
def store_sum(ptr, total, at, seqlen_q, seqlen_k, BROADCAST: tl.constexpr):
    """Store a tile ``total`` at (head, query, key) ``at``, summed over broadcast queries and keys.

    ``ptr`` is contiguous, ``(entries, heads, 1 or seqlen_q, 1 or seqlen_k)``. A sum stands in the
    tile's first row, its first column, or both.
    """
    rows = tl.arange(0, total.shape[0])
    columns = tl.arange(0, total.shape[1])
    if BROADCAST.queries:
        total = tl.where(rows[:, None] == 0, tl.sum(total, 0)[None, :], 0.0)
        rows_exist = rows == 0
    else:
        rows += at[1]
        rows_exist = rows < seqlen_q
    if BROADCAST.keys:
        total = tl.where(columns[None, :] == 0, tl.sum(total, 1)[:, None], 0.0)
        columns_exist = columns == 0
    else:
        columns += at[2]
        columns_exist = columns < seqlen_k
    mask_rows = 1 if BROADCAST.queries else seqlen_q
    mask_columns = 1 if BROADCAST.keys else seqlen_k
    row_index = at[0].to(tl.int64) * mask_rows + rows.to(tl.int64)
    pointers = ptr + row_index[:, None] * mask_columns + columns.to(tl.int64)[None, :]
    exist = rows_exist[:, None] & columns_exist[None, :]
    tl.store(pointers, total.to(ptr.dtype.element_ty), mask=exist)


@triton.jit(do_not_specialize=CHANGING)
def dmask_kernel(
    q,
    k,
    v,
    do,
    statistics,
    dmask_ptr,
    batches,
    heads,
    group,
    seqlen_q,
    seqlen_k,
    scale: tl.float64,
    offset,
    window_left,
    window_right,
    softcap: tl.float64,
    threshold: tl.int64,
    keep_scale: tl.float64,
    extras,
    BROADCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """The gradient of the mask, contiguous with the mask's sizes.

    One program per batch entry, head, block of queries and block of keys of the mask; it loops over
    the dimensions that are ``BROADCAST``. So every sum is in one program and in one order.
    """
    q_blocks = 1 if BROADCAST.queries else tl.cdiv(seqlen_q, BLOCK_M)
    k_blocks = 1 if BROADCAST.keys else tl.cdiv(seqlen_k, BLOCK_N)
    mask_heads = 1 if BROADCAST.heads else heads
    program = tl.program_id(0)
    k_block = program % k_blocks
    q_block = program // k_blocks % q_blocks
    mask_head = program // (k_blocks * q_blocks) % mask_heads
    mask_entry = program // (k_blocks * q_blocks * mask_heads)
    window = Window(window_left, window_right, offset)
    dropout = Dropout(extras.seed_ptr, threshold, keep_scale)
    ACC_DTYPE: tl.constexpr = statistics.delta_ptr.dtype.element_ty
    INPUT_PRECISION: tl.constexpr = FLAGS.INPUT_PRECISION
    BASE_2: tl.constexpr = FLAGS.BASE_2
    scale = in_exponent(scale, ACC_DTYPE, BASE_2)
    softcap = in_exponent(softcap, ACC_DTYPE, BASE_2) if FLAGS.SOFTCAP else None

    total = tl.zeros((BLOCK_M, BLOCK_N), ACC_DTYPE)
    num_batches = batches if BROADCAST.batch else 1
    num_heads = heads if BROADCAST.heads else 1
    num_q = tl.cdiv(seqlen_q, BLOCK_M) if BROADCAST.queries else 1
    for outer in tl.range(0, num_batches * num_heads * num_q):
        batch = outer // (num_heads * num_q) if BROADCAST.batch else mask_entry
        head = outer // num_q % num_heads if BROADCAST.heads else mask_head
        q_start = (outer % num_q if BROADCAST.queries else q_block) * BLOCK_M
        q_stop = tl.minimum(q_start + BLOCK_M, seqlen_q)
        rows = q_start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        valid = rows < seqlen_q
        q_at = (batch, head, 0)
        k_at = (batch, head // group, 0)
        row = row_index(heads, seqlen_q, q_at)
        q_ptr = row_pointer(q, q_at)
        do_ptr = row_pointer(do, q_at)
        k_ptr = row_pointer(k, k_at)
        v_ptr = row_pointer(v, k_at)
        mask_ptr = mask_pointer(extras.mask, batch, head)
        q_tile = load_tiles(q_ptr, q, rows, valid)  # [BLOCK_M, head_dim]
        do_tile = load_tiles(do_ptr, do, rows, valid)  # [BLOCK_M, value_dim]
        shift = load_rows(statistics.shift_ptr + row, rows, valid, 0.0, 1)  # [BLOCK_M]
        delta = load_rows(statistics.delta_ptr + row, rows, valid, 0.0, 1)  # [BLOCK_M]
        slope = load_slope(extras.slopes, batch, head, heads, ACC_DTYPE, BASE_2)
        bounds = key_bounds(q_start, q_stop, window, seqlen_k)
        start = bounds[0]
        stop = bounds[3]
        if not BROADCAST.keys:  # the one tile of keys, or none if no key of it is visible
            first = k_block * BLOCK_N
            stop = tl.where((first < stop) & (first + BLOCK_N > start), first + 1, first)
            start = first
        for k_start in tl.range(start, stop, BLOCK_N):
            columns = k_start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
            i, j = rows[:, None], columns[None, :]
            bias = load_bias(mask_ptr, extras.mask, i, j, valid[:, None], seqlen_k, ACC_DTYPE)
            visible_keys = unmasked_keys(bias, columns < bounds[3]) & (columns >= bounds[0])
            k_tile = load_tiles(k_ptr, k, columns, visible_keys)
            scores = dot_rows(q_tile, k_tile, INPUT_PRECISION)
            visible = in_window(i, j, window, seqlen_k)
            distance = i + window.offset - j
            p, _ = probabilities(
                scores, scale, softcap, slope, bias, distance, visible, shift[:, None], BASE_2
            )  # [BLOCK_M, BLOCK_N]
            v_tile = load_tiles(v_ptr, v, columns, visible_keys)
            dp = dot_rows(do_tile, v_tile, INPUT_PRECISION)
            kept = keep_factor(dropout, batch, head, i, j, ACC_DTYPE)
            total += score_gradient(p, dp, delta[:, None], bias, kept)

    at = (mask_entry * mask_heads + mask_head, q_block * BLOCK_M, k_block * BLOCK_N)
    store_sum(dmask_ptr, total, at, seqlen_q, seqlen_k, BROADCAST)
