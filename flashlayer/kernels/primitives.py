"""The steps that every attention kernel repeats, each under one name.

Geometry. The band ``i + offset - left <= j <= i + offset + right`` is an interval of keys for every
query, and just as well an interval of queries for every key: with the two sequences exchanged,
``offset`` changes its sign and ``left`` and ``right`` their places. One function,
:func:`visible_interval`, therefore serves all kernels, for one position, for the two ends of a
block, and for a whole vector of positions. An unbounded side of the window is ``None``, which
Triton compiles away.

Addresses. A stride is only ever multiplied by a 64-bit index.

Column tiles. A tile's sides are powers of two, a head dimension is any number. It is covered by one
or two *column tiles* whose widths ``BLOCK_D`` lists: 96 = 64 + 32 instead of a padded 128. Rows of
q, k, v and of the accumulators are tuples of them, and only the functions here look inside.
"""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))

# Integers that differ from call to call: specialised on being 1 or a multiple of 16, each would
# compile a kernel again and again while lengths and head counts change. Strides stay specialised:
# loads are vectorized by what is known of them.
CHANGING = (
    "seqlen_q",
    "seqlen_k",
    "offset",
    "window_left",
    "window_right",
    "threshold",
    "num_blocks",
    "heads",
    "kv_heads",
    "group",
    "slopes_stride",
    "mask_batch",
    "mask_head",
    "mask_row",
    "mask_column",
    "batches",
    "mask_heads",
    "q_blocks",
    "k_blocks",
)


@triton.jit
def visible_interval(position, offset, left, right, length):
    """Positions ``[start, stop)`` of the other sequence that ``position`` is paired with.

    Keys of a query as written; queries of a key with ``-offset, right, left``. ``position`` is a
    scalar or a vector, ``length`` the other sequence's; an interval that misses the other sequence
    is empty.
    """
    start = position * 0
    stop = start + length
    if left is not None:
        start = tl.minimum(tl.maximum(position + offset - left, 0), length)
    if right is not None:
        stop = tl.minimum(tl.maximum(position + offset + right + 1, 0), length)
    return start, stop


@triton.jit
def key_bounds(q_start, q_stop, offset, left, right, seqlen_k):
    """Keys seen by the queries ``[q_start, q_stop)``: any_start, all_start, all_stop, any_stop.

    Some query sees the keys ``[any_start, any_stop)``, all of them see ``[all_start, all_stop)``:
    the twin of :meth:`flashlayer.spec.AttentionSpec.key_bounds`.
    """
    any_start, all_stop = visible_interval(q_start, offset, left, right, seqlen_k)
    all_start, any_stop = visible_interval(q_stop - 1, offset, left, right, seqlen_k)
    return any_start, all_start, all_stop, any_stop


@triton.jit
def query_bounds(k_start, k_stop, offset, left, right, seqlen_q):
    """Queries that see the keys ``[k_start, k_stop)``: any_start, all_start, all_stop, any_stop."""
    return key_bounds(k_start, k_stop, -offset, right, left, seqlen_q)


@triton.jit
def key_tile_edges(bounds, BLOCK_N: tl.constexpr):
    """Cut the keys of :func:`key_bounds` into three ranges of tiles: left edge, full, right edge.

    Tiles start at ``any_start``. The middle range, from the second edge to the third, is whole
    tiles that every query sees; only the last tile of the last range may be ragged.
    """
    any_start, all_start, all_stop, any_stop = bounds
    full_start = any_start + tl.cdiv(all_start - any_start, BLOCK_N) * BLOCK_N
    full_stop = full_start + tl.maximum(all_stop - full_start, 0) // BLOCK_N * BLOCK_N
    return any_start, full_start, full_stop, any_stop


@triton.jit
def query_tile_edges(bounds):
    """Cut the queries of :func:`query_bounds` into three ranges: right edge, full, left edge.

    The names are the band's edges: the first queries to see a key lie on its right edge. Every
    range is tiled from its own start and may be ragged, for a query that doesn't exist costs no
    mask. Neither edge is longer than the block of keys.
    """
    any_start, all_start, all_stop, any_stop = bounds
    full_start = tl.minimum(all_start, any_stop)
    return any_start, full_start, tl.maximum(full_start, all_stop), any_stop


@triton.jit
def in_band(i, j, offset, left, right, length):
    """Whether query ``i`` sees key ``j``; two index tensors that broadcast to a tile.

    As :func:`visible_interval` also for key ``i`` and query ``j``, with ``-offset, right, left``;
    ``length`` is that of ``j``'s sequence.
    """
    start, stop = visible_interval(i, offset, left, right, length)
    visible = j < stop
    if left is not None:
        visible &= j >= start
    return visible


@triton.jit
def sequence(batch, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seqlen_q, seqlen_k):
    """Where the sequence of this program is: first query, first key, and how many of each.

    A dense tensor holds one per batch entry, from its row 0 on; packed tensors hold them one after
    the other, and ``batch`` counts sequences.
    """
    if cu_seqlens_q_ptr is not None:
        q_begin = tl.load(cu_seqlens_q_ptr + batch)
        k_begin = tl.load(cu_seqlens_k_ptr + batch)
        q_length = tl.load(cu_seqlens_q_ptr + batch + 1) - q_begin
        k_length = tl.load(cu_seqlens_k_ptr + batch + 1) - k_begin
    else:
        q_begin = 0
        k_begin = 0
        q_length = seqlen_q
        k_length = seqlen_k
    return q_begin, k_begin, q_length, k_length


@triton.jit
def diagonal_offset(offset, q_length, k_length):
    """Key position of query 0; ``offset`` is None for the bottom right of each sequence."""
    return k_length - q_length if offset is None else offset


@triton.jit
def tanh(x):
    """Hyperbolic tangent, accurate for small arguments too; Triton itself has none everywhere."""
    e = tl.exp(2.0 * x)
    result = 1.0 - 2.0 / (e + 1.0)
    if x.dtype != tl.float64:
        # Near 0 the difference cancels: five terms of the series, good to 2e-8 below 0.3.
        y = x * x
        series = x + x * y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835))))
        result = tl.where(tl.abs(x) < 0.3, series, result)
    return result


@triton.jit
def in_elements(batch, head, row, column, UNIT: tl.constexpr, STEP: tl.constexpr):
    """Strides of a mask in elements; the first three come in units of ``UNIT`` elements.

    ``UNIT`` is 16 where all three are multiples of it, so that loads of a row are vectorized. The
    last one is ``STEP``, 0 or 1, or ``column`` where ``STEP`` is None.
    """
    unit = tl.full((), UNIT, tl.int64)
    return batch * unit, head * unit, row * unit, column if STEP is None else STEP


@triton.jit
def load_bias(mask_ptr, mask_strides, i, j, exists, ACC_DTYPE: tl.constexpr):
    """Tile of an additive mask; of a bool mask (stored as uint8), 0 where True and -inf elsewhere.

    ``mask_ptr`` points to one head; dimensions that are broadcast have stride 0.
    """
    pointers = mask_ptr + i.to(tl.int64) * mask_strides[2] + j.to(tl.int64) * mask_strides[3]
    if mask_ptr.dtype.element_ty == tl.uint8:
        attend = tl.load(pointers, mask=exists, other=0) != 0
        bias = tl.where(attend, 0.0, float("-inf")).to(ACC_DTYPE)
    else:
        bias = tl.load(pointers, mask=exists, other=float("-inf")).to(ACC_DTYPE)
    return bias


@triton.jit
def modify_scores(scores, scale, softcap, slope, bias, distance):
    """Scale, softcap, ALiBi and mask, in this order; also tanh, for the derivative of the softcap.

    With none of the three the scores stay as they came: :func:`log2_ratio` scales them.
    """
    capped = scores
    x = scores
    if softcap is not None or slope is not None or bias is not None:
        x = scores * scale
        if softcap is not None:
            capped = tanh(x / softcap)
            x = softcap * capped
        if slope is not None:
            x -= slope * tl.abs(distance)
        if bias is not None:
            x = tl.where(bias == float("-inf"), bias, x + bias)
    return x, capped


@triton.jit
def log2_ratio(x, reference, scale, MODIFIED: tl.constexpr):
    """``log2(exp(score) / exp(reference))`` for the scores of :func:`modify_scores`.

    The difference is taken before the change of base: large scores stay exact, and an LSE of
    ``finfo.min`` finite. Scores that came unscaled take one fused multiply-add on the way.
    """
    score = x if MODIFIED else x * scale
    return (score - reference) * LOG2E


@triton.jit
def keep_factor(seed_ptr, threshold, keep_scale, batch, head, i, j, DTYPE: tl.constexpr):
    """Dropout's factors of a tile: 0 or ``keep_scale``; the twin of :mod:`flashlayer.philox`."""
    zero = i * 0 + j * 0
    word, _, _, _ = tl.philox(
        tl.load(seed_ptr),
        (zero + batch).to(tl.uint32),
        (zero + head).to(tl.uint32),
        (zero + i).to(tl.uint32),
        (zero + j).to(tl.uint32),
    )
    return tl.where(word.to(tl.int64) >= threshold, tl.full((), keep_scale, DTYPE), 0.0)


@triton.jit
def zero_tiles(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr):
    """Column tiles of zeros: one ``[BLOCK_M, width]`` for each width of ``BLOCK_D``."""
    tiles = ()
    for part in tl.static_range(len(BLOCK_D)):
        tiles += (tl.full((BLOCK_M, BLOCK_D[part]), 0.0, DTYPE),)
    return tiles


@triton.jit
def scaled(tiles, factor):
    """Column tiles times a factor that broadcasts, each in its own dtype."""
    products = ()
    for part in tl.static_range(len(tiles)):
        products += ((tiles[part] * factor).to(tiles[part].dtype),)
    return products


@triton.jit
def divided(tiles, divisor):
    """Column tiles over a divisor that broadcasts."""
    quotients = ()
    for part in tl.static_range(len(tiles)):
        quotients += (tiles[part] / divisor,)
    return quotients


@triton.jit
def dot_rows(a, b, INPUT_PRECISION: tl.constexpr):
    """``a b^T`` over the head dimension, whose column tiles add up."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision=INPUT_PRECISION)
    for part in tl.static_range(1, len(a)):
        product = tl.dot(
            a[part],
            tl.trans(b[part]),
            product,
            input_precision=INPUT_PRECISION,
            out_dtype=product.dtype,
        )
    return product


@triton.jit
def dot_into(acc, a, b, INPUT_PRECISION: tl.constexpr):
    """``acc + a b`` in the accumulator's dtype: a tile times column tiles."""
    sums = ()
    for part in tl.static_range(len(b)):
        sums += (
            tl.dot(
                a,
                b[part],
                acc[part],
                input_precision=INPUT_PRECISION,
                out_dtype=acc[part].dtype,
            ),
        )
    return sums


@triton.jit
def program_coordinates(num_blocks, heads):
    """Block, head and batch entry of this program; the blocks of one head are neighbours."""
    program = tl.program_id(0)
    head = program // num_blocks
    return program % num_blocks, head % heads, head // heads


@triton.jit
def head_pointer(ptr, strides, batch, head, row):
    """Pointer to column 0 of a row of one head of a ``(B, H, S, D)`` tensor."""
    ptr += batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    row = tl.full((), 0, tl.int64) + row  # a 64-bit tensor also where it comes as a number
    return ptr + row * strides[2]


@triton.jit
def tile_pointers(ptr, strides, rows, first, WIDTH: tl.constexpr):
    """Pointers ``[rows, WIDTH]`` into one head, from column ``first`` on."""
    columns = (first + tl.arange(0, WIDTH)).to(tl.int64)
    return ptr + rows.to(tl.int64)[:, None] * strides[2] + columns[None, :] * strides[3]


@triton.jit
def tile_mask(valid_rows, columns: tl.constexpr, WIDTH: tl.constexpr):
    """Which elements of a tile exist, None if all do; ``valid_rows`` is one bool a row or None."""
    valid_columns = (tl.arange(0, WIDTH) < columns)[None, :]  # [1, WIDTH]
    if columns < WIDTH and valid_rows is not None:
        mask = valid_rows[:, None] & valid_columns
    elif columns < WIDTH:
        mask = valid_columns
    elif valid_rows is not None:
        mask = valid_rows[:, None]
    else:
        mask = None
    return mask


@triton.jit
def load_tiles(ptr, strides, rows, valid_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows of one head in column tiles; 0 in rows not valid and in columns past HEAD_DIM.

    ``valid_rows`` is one bool a row, or None when all of them are valid.
    """
    tiles = ()
    for part in tl.static_range(len(BLOCK_D)):
        mask = tile_mask(valid_rows, HEAD_DIM - part * BLOCK_D[0], BLOCK_D[part])
        other = None if mask is None else 0.0
        pointers = tile_pointers(ptr, strides, rows, part * BLOCK_D[0], BLOCK_D[part])
        tiles += (tl.load(pointers, mask=mask, other=other),)
    return tiles


@triton.jit
def load_described(descriptor, batch, head, row):
    """Whole rows of one head through a tensor descriptor: one column tile ``[rows, BLOCK_D]``."""
    tile = descriptor.load([batch, head, row, 0])  # [1, 1, rows, BLOCK_D]
    return (tile.reshape(descriptor.block_shape[2], descriptor.block_shape[3]),)


@triton.jit
def store_tiles(
    ptr, strides, rows, valid_rows, tiles, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Store the valid rows of column tiles in the tensor's own dtype."""
    for part in tl.static_range(len(BLOCK_D)):
        mask = tile_mask(valid_rows, HEAD_DIM - part * BLOCK_D[0], BLOCK_D[part])
        pointers = tile_pointers(ptr, strides, rows, part * BLOCK_D[0], BLOCK_D[part])
        tl.store(pointers, tiles[part].to(ptr.dtype.element_ty), mask=mask)


# Whether TRITON_INTERPRET=1 was set when these kernels were defined, and when Triton's own were.
INTERPRETED = not isinstance(visible_interval, triton.JITFunction)
TRITON_INTERPRETED = not isinstance(tl.cdiv, triton.JITFunction)
