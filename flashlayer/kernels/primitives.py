"""The steps that every attention kernel repeats, each under one name.

Geometry. The window ``i + offset - left <= j <= i + offset + right`` is an interval of keys for
every query, and an interval of queries for every key: with the two sequences exchanged, ``offset``
changes its sign and ``left`` and ``right`` their places. One function, :func:`visible_interval`,
therefore serves all kernels, for one position, for the two ends of a block, and for a whole vector
of positions. An unbounded side of the window is ``None``, which Triton compiles away.

Addresses. A stride is only ever multiplied by a 64-bit index. Where a sequence begins in a tensor
is ``(batch, head, row)``, called ``q_at`` and ``k_at``.

Column tiles. A tile's sides are powers of two, a head dimension is any number. It is covered by one
or two *column tiles* (:func:`flashlayer.kernels.tiles.head_tiles`): 96 = 64 + 32 instead of a
padded 128. Rows of q, k, v and of the accumulators are tuples of them, and only the functions here
look inside.
"""

import math

import triton
import triton.language as tl

from flashlayer.kernels.arguments import FULL, Window
from flashlayer.kernels.tiles import head_tiles

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


@triton.jit
def visible_interval(position, window, length):
    """Positions ``[start, stop)`` of the other sequence that ``position`` is paired with.

    Keys of a query, or with the window exchanged queries of a key. ``position`` is a scalar or a
    vector, ``length`` the other sequence's; an interval that misses the other sequence is empty.
    """
    start = position * 0
    stop = start + length
    if window.left is not None:
        start = tl.minimum(tl.maximum(position + window.offset - window.left, 0), length)
    if window.right is not None:
        stop = tl.minimum(tl.maximum(position + window.offset + window.right + 1, 0), length)
    return start, stop


@triton.jit
def key_bounds(q_start, q_stop, window, seqlen_k):
    """Keys visible to the queries ``[q_start, q_stop)``: any_start, all_start, all_stop, any_stop.

    The keys ``[any_start, any_stop)`` are visible to some query, ``[all_start, all_stop)`` to all
    of them: the twin of :meth:`flashlayer.spec.AttentionSpec.key_bounds`.
    """
    any_start, all_stop = visible_interval(q_start, window, seqlen_k)
    all_start, any_stop = visible_interval(q_stop - 1, window, seqlen_k)
    return any_start, all_start, all_stop, any_stop


@triton.jit
def query_bounds(k_start, k_stop, window, seqlen_q):
    """Queries that may attend to the keys ``[k_start, k_stop)``, as :func:`key_bounds`."""
    exchanged = Window(window.right, window.left, -window.offset)
    return key_bounds(k_start, k_stop, exchanged, seqlen_q)


@triton.jit
def key_tile_ranges(bounds, BLOCK_N: tl.constexpr):
    """Cut the keys of :func:`key_bounds` into tiles: ``(start, stop)`` by LEFT_EDGE, FULL, ....

    Tiles start at ``any_start``. FULL is whole tiles that are visible to every query; only the last
    tile of RIGHT_EDGE may be ragged.
    """
    any_start, all_start, all_stop, any_stop = bounds
    full_start = any_start + tl.cdiv(all_start - any_start, BLOCK_N) * BLOCK_N
    full_stop = full_start + tl.maximum(all_stop - full_start, 0) // BLOCK_N * BLOCK_N
    return (any_start, full_start), (full_start, full_stop), (full_stop, any_stop)


@triton.jit
def query_tile_ranges(bounds):
    """Cut the queries of :func:`query_bounds`: ``(start, stop)`` by LEFT_EDGE, FULL, RIGHT_EDGE.

    The names are the window's edges: the first queries that may attend to a key lie on its right
    edge. Every range is tiled from its own start and may be ragged: in rows past its end
    p = exp(s - inf) = 0. Neither edge is longer than the block of keys.
    """
    any_start, all_start, all_stop, any_stop = bounds
    full_start = tl.minimum(all_start, any_stop)
    full_stop = tl.maximum(full_start, all_stop)
    return (full_stop, any_stop), (full_start, full_stop), (any_start, full_start)


@triton.jit
def in_window(i, j, window, length):
    """Whether key ``j`` is visible to query ``i``; two index tensors that broadcast to a tile.

    Also for key ``i`` and query ``j`` with the window exchanged; ``length`` is that of ``j``'s
    sequence.
    """
    start, stop = visible_interval(i, window, length)
    visible = j < stop
    if window.left is not None:
        visible &= j >= start
    return visible


@triton.jit
def sequence(batch, packing, seqlen_q, seqlen_k):
    """The sequence of a program: ``(entry, q_begin, k_begin, q_length, k_length)``.

    A dense tensor holds one in each ``entry`` of its first dimension. Packed tensors have one entry
    with all sequences one after the other, and ``batch`` counts these.
    """
    if packing is not None:
        entry = batch * 0
        q_begin = tl.load(packing.cu_seqlens_q + batch)
        k_begin = tl.load(packing.cu_seqlens_k + batch)
        q_length = tl.load(packing.cu_seqlens_q + batch + 1) - q_begin
        k_length = tl.load(packing.cu_seqlens_k + batch + 1) - k_begin
    else:
        entry = batch
        q_begin = 0
        k_begin = 0
        q_length = seqlen_q
        k_length = seqlen_k
    return entry, q_begin, k_begin, q_length, k_length


@triton.jit
def program_coordinates(num_blocks, heads, heads_together):
    """Block, head and batch entry of this program.

    Programs start in the order of their numbers. The blocks of one head are neighbours, or block 0
    of ``heads_together`` heads comes first, then block 1 of them, and after their last block the
    next heads'. Where block 0 has most tiles to visit, the last programs to start then have few,
    and multiprocessors run out of work at about the same time. What is over after full groups of
    heads is the first group: a small last one would leave much of the chip idle.
    """
    program = tl.program_id(0)
    head = program // num_blocks  # of all batch entries
    block = program % num_blocks
    if heads_together is not None:
        over = tl.num_programs(0) // num_blocks % heads_together
        first = tl.maximum(head - (head - over + heads_together) % heads_together, 0)
        present = tl.where(head < over, over, heads_together)
        place = program - first * num_blocks
        head = first + place % present
        block = place // present
    return block, head % heads, head // heads


@triton.jit
def query_block(
    num_blocks,
    heads,
    heads_together,
    packing,
    seqlen_q,
    seqlen_k,
    window_right,
    BLOCK_M: tl.constexpr,
):
    """The block of queries of this program: ``(missing, block, head, batch)`` and its sequence.

    ``num_blocks`` counts the blocks of the longest packed sequence; in others the last are missing.
    """
    block, head, batch = program_coordinates(num_blocks, heads, heads_together)
    entry, q_begin, k_begin, q_length, k_length = sequence(batch, packing, seqlen_q, seqlen_k)
    blocks = num_blocks
    if packing is not None:
        blocks = tl.cdiv(q_length, BLOCK_M)
    missing = block >= blocks
    if window_right is not None:
        block = blocks - 1 - block  # the last queries have most visible keys: they start first
    return missing, block, head, batch, (entry, q_begin, k_begin, q_length, k_length)


@triton.jit
def query_offset(offset, q_length, k_length):
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
def in_exponent(number, DTYPE: tl.constexpr, BASE_2: tl.constexpr):
    """A number in a score's unit, as a scalar of ``DTYPE`` in the unit that scores have here.

    That is the exponent of 2 where ``BASE_2`` says so, with log2(e) multiplied in once, else of e.
    """
    return tl.full((), number * LOG2E if BASE_2 else number, DTYPE)


@triton.jit
def load_slope(slopes, batch, head, heads, DTYPE: tl.constexpr, BASE_2: tl.constexpr):
    """The ALiBi slope of one head in the unit of :func:`in_exponent`, None without ALiBi."""
    slope = None
    if slopes is not None:
        ptr = slopes.ptr + head
        if slopes.PER_BATCH:
            ptr += batch * heads
        slope = in_exponent(tl.load(ptr).to(DTYPE), DTYPE, BASE_2)
    return slope


@triton.jit
def mask_strides(mask):
    """Strides of a :class:`Mask` in elements."""
    batch = mask.strides[0].to(tl.int64)
    head = mask.strides[1].to(tl.int64)
    row = mask.strides[2].to(tl.int64)
    if not mask.ALIGNED:
        batch = batch >> 2
        head = head >> 2
        row = row >> 2
    return batch, head, row, mask.strides[3] >> 2 if mask.COLUMN is None else mask.COLUMN


@triton.jit
def mask_pointer(mask, batch, head):
    """Pointer to the mask of one head, None without a mask."""
    ptr = None
    if mask is not None:
        strides = mask_strides(mask)
        ptr = mask.ptr + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    return ptr


@triton.jit
def load_bias(ptr, mask, i, j, i_exists, k_length, DTYPE: tl.constexpr):
    """Tile of an additive mask, None without a mask; -inf past the last query or key.

    Of a bool mask (stored as uint8) 0 where True and -inf where False. ``ptr``: of the head.
    """
    bias = None
    if mask is not None:
        exist = i_exists & (j < k_length)
        strides = mask_strides(mask)
        pointers = ptr + i.to(tl.int64) * strides[2] + j.to(tl.int64) * strides[3]
        if mask.ptr.dtype.element_ty == tl.uint8:
            visible = tl.load(pointers, mask=exist, other=0) != 0
            bias = tl.where(visible, 0.0, float("-inf")).to(DTYPE)
        else:
            bias = tl.load(pointers, mask=exist, other=float("-inf")).to(DTYPE)
    return bias


@triton.jit
def unmasked_keys(bias, valid):
    """The ``valid`` keys (None: all) without those that the mask hides from all queries of a tile.

    Hidden keys and values may hold NaN and are not loaded.
    """
    keys = None  # Triton 3.6 returns None from a local name only
    if bias is not None:
        keys = tl.max(bias, 0) > float("-inf")
        if valid is not None:
            keys &= valid
    elif valid is not None:
        keys = valid
    return keys


@triton.jit
def modify_scores(scores, scale, softcap, slope, bias, distance):
    """Scale, softcap, ALiBi and mask, in this order; also the softcap's tanh, for its derivative.

    With none of the three the scores stay as they are: :func:`log2_ratio` scales them. ``scale``,
    ``softcap`` and ``slope`` are in the unit of :func:`in_exponent`, and the result with them; so
    is ``bias``, which is natural or, of a bool mask, 0 and -inf.
    """
    tanh_score = scores
    x = scores
    if softcap is not None or slope is not None or bias is not None:
        x = scores * scale
        if softcap is not None:
            tanh_score = tanh(x / softcap)
            x = softcap * tanh_score
        if slope is not None:
            x -= slope * tl.abs(distance)
        if bias is not None:
            x = tl.where(bias == float("-inf"), bias, x + bias)
    return x, tanh_score


@triton.jit
def log2_ratio(x, shift, scale, MODIFIED: tl.constexpr, BASE_2: tl.constexpr):
    """``log2(exp(score) / exp(shift))`` for the scores of :func:`modify_scores`.

    ``shift`` is in their unit. Scores that are not ``MODIFIED`` are scaled by one fused
    multiply-add. In ``BASE_2`` that is all. Its rounding of ``scale * log2(e)`` is the same in both
    passes, and that of the shift cancels between numerator and denominator; gradients at scores
    around 100 lose a bit, which half precision doesn't see and fp32 would. Else the difference is
    taken before the change of base: large scores stay exact, and an LSE of ``finfo.min`` finite.
    """
    exponent = (x if MODIFIED else x * scale) - shift
    return exponent if BASE_2 else exponent * LOG2E


@triton.jit
def keep_factor(dropout, batch, head, i, j, DTYPE: tl.constexpr):
    """Dropout's factors of a tile: 0 or ``keep_scale``; None without dropout.

    The twin of :mod:`flashlayer.philox`.
    """
    factor = None
    if dropout.seed_ptr is not None:
        zero = i * 0 + j * 0
        word, _, _, _ = tl.philox(
            tl.load(dropout.seed_ptr),
            (zero + batch).to(tl.uint32),
            (zero + head).to(tl.uint32),
            (zero + i).to(tl.uint32),
            (zero + j).to(tl.uint32),
        )
        kept = word.to(tl.int64) >= dropout.threshold
        factor = tl.where(kept, tl.full((), dropout.keep_scale, DTYPE), 0.0)
    return factor


@triton.jit
def zero_tiles(rows: tl.constexpr, columns: tl.constexpr, DTYPE: tl.constexpr):
    """Column tiles of zeros: ``[rows, width]`` for each."""
    WIDTHS: tl.constexpr = head_tiles(columns)
    tiles = ()
    for d in tl.static_range(len(WIDTHS)):
        tiles += (tl.full((rows, WIDTHS[d]), 0.0, DTYPE),)
    return tiles


@triton.jit
def scaled(tiles, factor):
    """Column tiles times a factor that broadcasts, each in its own dtype."""
    products = ()
    for d in tl.static_range(len(tiles)):
        products += ((tiles[d] * factor).to(tiles[d].dtype),)
    return products


@triton.jit
def divided(tiles, divisor):
    """Column tiles over a divisor that broadcasts."""
    quotients = ()
    for d in tl.static_range(len(tiles)):
        quotients += (tiles[d] / divisor,)
    return quotients


@triton.jit
def dot_rows(a, b, INPUT_PRECISION: tl.constexpr):
    """``a b^T`` over the head dimension, whose column tiles add up."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision=INPUT_PRECISION)
    for d in tl.static_range(1, len(a)):
        product = tl.dot(
            a[d],
            tl.trans(b[d]),
            product,
            input_precision=INPUT_PRECISION,
            out_dtype=product.dtype,
        )
    return product


@triton.jit
def dot_into(acc, a, b, INPUT_PRECISION: tl.constexpr):
    """``acc + a b`` in the accumulator's dtype: a tile times column tiles."""
    sums = ()
    for d in tl.static_range(len(b)):
        sums += (
            tl.dot(
                a,
                b[d],
                acc[d],
                input_precision=INPUT_PRECISION,
                out_dtype=acc[d].dtype,
            ),
        )
    return sums


@triton.jit
def row_pointer(x, at):
    """Pointer to column 0 of the row ``at`` (batch, head, row) of a :class:`Strided`."""
    ptr = x.ptr
    if x.batch_stride is not None:
        ptr += at[0].to(tl.int64) * x.batch_stride
    ptr += at[1].to(tl.int64) * x.head_stride
    row = tl.full((), 0, tl.int64) + at[2]  # a 64-bit tensor also where it comes as a number
    return ptr + row * x.row_stride


@triton.jit
def row_index(heads, seqlen, at):
    """Index of a row in a contiguous ``(B, heads, seqlen)`` tensor."""
    return (at[0] * heads + at[1]).to(tl.int64) * seqlen + at[2]


@triton.jit
def tile_pointers(ptr, x, rows, first, WIDTH: tl.constexpr):
    """Pointers ``[rows, WIDTH]``, from column ``first`` on; ``rows`` counts from ``ptr``."""
    columns = (first + tl.arange(0, WIDTH)).to(tl.int64)
    return ptr + (rows.to(tl.int64)[:, None] * x.row_stride + columns[None, :] * x.column_stride)


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
def load_tiles(ptr, x, rows, valid_rows):
    """Load rows from ``ptr`` on in column tiles; 0 in rows not valid, in columns past the last.

    ``valid_rows`` is one bool a row, or None when all of them are valid.
    """
    WIDTHS: tl.constexpr = head_tiles(x.columns)
    tiles = ()
    for d in tl.static_range(len(WIDTHS)):
        mask = tile_mask(valid_rows, x.columns - d * WIDTHS[0], WIDTHS[d])
        other = None if mask is None else 0.0
        pointers = tile_pointers(ptr, x, rows, d * WIDTHS[0], WIDTHS[d])
        tiles += (tl.load(pointers, mask=mask, other=other),)
    return tiles


@triton.jit
def load_stream(ptr, x, descriptor, at, start, rows, valid_rows, RANGE: tl.constexpr):
    """One step of a loop over tiles: as :func:`load_tiles`; ``ptr`` points to ``at``.

    In the FULL range through a tensor descriptor if there is one (TMA): whole rows from ``start``
    on, in one column tile. Or else, ``FROM_TILE``, from a pointer to ``start``: what is added to it
    for each row does not change in the loop.
    """
    if RANGE == FULL and descriptor is not None:
        tile = descriptor.load([at[0], at[1], at[2] + start, 0])  # [1, 1, rows, width]
        tiles = (tile.reshape(descriptor.block_shape[2], descriptor.block_shape[3]),)
    elif RANGE == FULL and x.FROM_TILE:
        ptr += tl.full((), start, tl.int64) * x.row_stride
        tiles = load_tiles(ptr, x, tl.arange(0, rows.shape[0]), valid_rows)
    else:
        tiles = load_tiles(ptr, x, rows, valid_rows)
    return tiles


@triton.jit
def store_tiles(ptr, x, rows, valid_rows, tiles):
    """Store the valid rows of column tiles in the tensor's own dtype."""
    WIDTHS: tl.constexpr = head_tiles(x.columns)
    for d in tl.static_range(len(WIDTHS)):
        mask = tile_mask(valid_rows, x.columns - d * WIDTHS[0], WIDTHS[d])
        pointers = tile_pointers(ptr, x, rows, d * WIDTHS[0], WIDTHS[d])
        tl.store(pointers, tiles[d].to(x.ptr.dtype.element_ty), mask=mask)


# Whether TRITON_INTERPRET=1 was set when these kernels were defined, and when Triton's own were.
INTERPRETED = not isinstance(visible_interval, triton.JITFunction)
TRITON_INTERPRETED = not isinstance(tl.cdiv, triton.JITFunction)
