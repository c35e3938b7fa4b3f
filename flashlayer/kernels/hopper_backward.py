"""dK/dV and dQ for Hopper in Gluon: a producer warp loads what two warp groups consume.

The formulas are those of ``backward.py``, the parts those of ``hopper.py``. A consumer holds 64
rows of one side, and tiles of the other side are streamed past both consumers:

| | held by a consumer | streamed | scores | results |
|---|---|---|---|---|
| dK/dV | k and v of 64 keys | q and do of all heads of the group | ``k q^T`` | dk, dv |
| dQ | q and do of 64 queries | k and v | ``q k^T`` | dq |

Either way q and k, the *sources*, give the scores, and v and do, the *weights*, give dp: one loop
serves both kernels. In it a consumer issues the scores of a tile, the product of ds of the tile
before, and dp; it computes p while the tensor cores work on the last two, and ds while they work on
``p^T do``. The first tile has no ds before it and takes zeros, one product a program. dK/dV at D =
128 has no registers for a ds that waits: its product comes last in its own tile.

Nothing is added up across programs or consumers: two runs are bitwise equal.
"""

from typing import Any, NamedTuple

from flashlayer.kernels.arguments import CHANGING
from flashlayer.kernels.gluon_api import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from flashlayer.kernels.hopper import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    PRODUCER_REGISTERS,
    ROWS,
    Config,
    buffers,
    ring,
    set_free,
    store_rows,
    tile_of,
    wait_free,
    wait_loaded,
)
from flashlayer.kernels.primitives import program_coordinates

__all__ = ["Config", "hopper_dkdv_kernel", "hopper_dq_kernel"]


class Tiles(NamedTuple):
    """Buffers in shared memory: of what is held one for each consumer, else ``STAGES``."""

    held_source: Any  # [count, 1, 1, rows, HEAD_DIM]
    held_weight: Any
    source: Any
    weight: Any
    shift: Any  # [STAGES, BLOCK]; not used where the consumers hold queries
    delta: Any
    columns: Any  # [BLOCK] int32: 0, 1, ...


class Barriers(NamedTuple):
    """mbarriers, as many as buffers of a kind.

    The two tiles that a consumer holds arrive together, and a streamed tile with its statistics.
    """

    held_loaded: Any
    source_loaded: Any
    source_free: Any
    weight_loaded: Any
    weight_free: Any


class Walk(NamedTuple):
    """What one program computes: a block of rows, held, and the tiles of rows that pass by."""

    batch: Any
    held_head: Any
    held_row: Any
    held_length: Any
    head: Any  # the first that is streamed
    start: Any  # the first row of each head that is streamed
    length: Any  # rows behind it are hidden from the rows held
    offset: Any
    num_tiles: Any  # of all heads
    query: Any  # number of query 0 of head ``head``, of all batch entries and heads


class Results(NamedTuple):
    """Where the results of one head lie: rows of ``HEAD_DIM`` contiguous elements."""

    source_ptr: Any  # dk or dq
    source_stride: Any  # int64
    weight_ptr: Any  # dv; not used where the consumers hold queries
    weight_stride: Any


@gluon.jit
def next_row(row, walk, CONFIG: gl.constexpr):
    """The first row of the tile after this one: of the same head, or the start of the next."""
    row += CONFIG.BLOCK
    return gl.where(row < walk.length, row, walk.start)


@gluon.jit
def load_held(source, weight, tiles, barriers, walk, RANK: gl.constexpr):
    """Start the copies of both tiles that a consumer holds."""
    loaded = barriers.held_loaded.index(RANK)
    at = [walk.batch, walk.held_head, walk.held_row + RANK * ROWS, 0]
    mbarrier.expect(loaded, source.block_type.nbytes + weight.block_type.nbytes)
    tma_load(source, at, loaded, tiles.held_source.index(RANK))
    tma_load(weight, at, loaded, tiles.held_weight.index(RANK))


@gluon.jit
def produce(
    held_source,
    held_weight,
    source,
    weight,
    shift,
    delta,
    tiles,
    barriers,
    walk,
    seqlen_q,
    HOLDS_KEYS: gl.constexpr,
    CONFIG: gl.constexpr,
):
    """Load what each consumer holds, then the tiles that are streamed.

    The weight before the source: a consumer may wait for the next weight while it holds the source
    of the tile before, and with it the next source's buffer.
    """
    for c in gl.static_range(CONSUMERS):
        load_held(held_source, held_weight, tiles, barriers, walk, c)
    STATISTICS_BYTES: gl.constexpr = 4 * CONFIG.BLOCK if HOLDS_KEYS else 0
    row, head, query = walk.start, walk.head, walk.query
    for n in range(walk.num_tiles):
        stage = n % CONFIG.STAGES
        wait_free(barriers.weight_free, n, CONFIG)
        loaded = barriers.weight_loaded.index(stage)
        mbarrier.expect(loaded, weight.block_type.nbytes + STATISTICS_BYTES)
        tma_load(weight, [walk.batch, head, row, 0], loaded, tiles.weight.index(stage))
        if HOLDS_KEYS:
            tma_load(delta, [query + row], loaded, tiles.delta.index(stage))
        wait_free(barriers.source_free, n, CONFIG)
        loaded = barriers.source_loaded.index(stage)
        mbarrier.expect(loaded, source.block_type.nbytes + STATISTICS_BYTES)
        tma_load(source, [walk.batch, head, row, 0], loaded, tiles.source.index(stage))
        if HOLDS_KEYS:
            tma_load(shift, [query + row], loaded, tiles.shift.index(stage))
            if row + CONFIG.BLOCK >= walk.length:
                head += 1
                query += seqlen_q
        row = next_row(row, walk, CONFIG)


@gluon.jit
def visible_pairs(
    columns,
    first_row,
    first,
    walk,
    HOLDS_KEYS: gl.constexpr,
    CONFIG: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Which pairs of a row that is held and one that is streamed, from ``first`` on, are visible.

    The columns are read from shared memory. Computed, they would not change in the loop, and the
    compiler would keep them in registers for all of it.
    """
    rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    columns = first + columns.load(gl.SliceLayout(0, LAYOUT))
    visible = (columns < walk.length)[None, :]
    if CONFIG.CAUSAL:
        if HOLDS_KEYS:
            visible = visible & (rows[:, None] <= columns[None, :] + walk.offset)
        else:
            visible = visible & (columns[None, :] <= rows[:, None] + walk.offset)
    return visible


@gluon.jit
def consume(
    RANK: gl.constexpr,
    results,
    statistics,
    tiles,
    barriers,
    walk,
    scale_log2,
    scale,
    HOLDS_KEYS: gl.constexpr,
    CONFIG: gl.constexpr,
):
    """The gradients of 64 rows."""
    BLOCK: gl.constexpr = CONFIG.BLOCK
    HEAD_DIM: gl.constexpr = CONFIG.HEAD_DIM
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    DELAYED: gl.constexpr = not HOLDS_KEYS or HEAD_DIM < 128
    DTYPE: gl.constexpr = results.source_ptr.dtype.element_ty
    first_row = walk.held_row + RANK * ROWS
    if not HOLDS_KEYS:
        # p is 0 in rows that don't exist.
        rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        valid = rows < walk.held_length
        rows += walk.query
        shift = gl.load(statistics.shift_ptr + rows, mask=valid, other=float("inf"))[:, None]
        delta = gl.load(statistics.delta_ptr + rows, mask=valid, other=0.0)[:, None]

    source_acc = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, OUT)
    weight_acc = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, OUT)
    unset = gl.full([ROWS, BLOCK], 0.0, gl.float32, SCORES)
    ds = gl.full([ROWS, BLOCK], 0.0, gl.float32, SCORES)
    mbarrier.wait(barriers.held_loaded.index(RANK), 0)
    held_source = tiles.held_source.index(RANK).reshape([ROWS, HEAD_DIM])
    held_weight = tiles.held_weight.index(RANK).reshape([ROWS, HEAD_DIM])
    if not HOLDS_KEYS:
        wait_loaded(barriers.weight_loaded, 0, CONFIG)
    row = walk.start
    for n in range(walk.num_tiles):
        wait_loaded(barriers.source_loaded, n, CONFIG)
        source = tile_of(tiles.source, n, CONFIG)
        scores = warpgroup_mma(
            held_source, source.permute([1, 0]), unset, use_acc=False, is_async=True
        )
        if DELAYED:
            operand = gl.convert_layout(ds.to(DTYPE), OPERAND)
            before = tile_of(tiles.source, gl.maximum(n - 1, 0), CONFIG)
            source_acc = warpgroup_mma(operand, before, source_acc, is_async=True)
        if HOLDS_KEYS:
            wait_loaded(barriers.weight_loaded, n, CONFIG)
        weight = tile_of(tiles.weight, n, CONFIG)
        dp = warpgroup_mma(held_weight, weight.permute([1, 0]), unset, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(2 if DELAYED else 1, deps=[scores])
        if HOLDS_KEYS:
            shift = tiles.shift.index(n % CONFIG.STAGES).load(gl.SliceLayout(0, SCORES))[None, :]
        exponent = scores * scale_log2 - shift
        edge = row + BLOCK > walk.length
        if CONFIG.CAUSAL:
            if HOLDS_KEYS:
                edge |= row + walk.offset < first_row + ROWS - 1
            else:
                edge |= first_row + walk.offset < row + BLOCK - 1
        if edge:
            visible = visible_pairs(tiles.columns, first_row, row, walk, HOLDS_KEYS, CONFIG, SCORES)
            exponent = gl.where(visible, exponent, float("-inf"))
        p = gl.exp2(exponent)
        if HOLDS_KEYS:
            operand = gl.convert_layout(p.to(DTYPE), OPERAND)
            weight_acc = warpgroup_mma(operand, weight, weight_acc, is_async=True)
        else:
            # The loop that waits ends a basic block: ptxas can't move the wait for the products,
            # which comes after it, above the exponentials.
            wait_loaded(barriers.weight_loaded, n + 1, CONFIG, n + 1 < walk.num_tiles)
        PENDING: gl.constexpr = 1 if HOLDS_KEYS else 0
        if DELAYED:
            dp, source_acc = warpgroup_mma_wait(PENDING, deps=[dp, source_acc])
            set_free(barriers.source_free, n - 1, CONFIG, n > 0)
        else:
            dp = warpgroup_mma_wait(PENDING, deps=[dp])
        if HOLDS_KEYS:
            delta = tiles.delta.index(n % CONFIG.STAGES).load(gl.SliceLayout(0, SCORES))[None, :]
        ds = p * (dp - delta)
        if edge:  # what is hidden may hold NaN, and dp or delta with it
            ds = gl.where(p == 0.0, 0.0, ds)
        if not DELAYED:
            operand = gl.convert_layout(ds.to(DTYPE), OPERAND)
            source_acc = warpgroup_mma(operand, source, source_acc, is_async=True)
        if HOLDS_KEYS:
            weight_acc = warpgroup_mma_wait(0 if DELAYED else 1, deps=[weight_acc])
        set_free(barriers.weight_free, n, CONFIG)
        if not DELAYED:
            source_acc = warpgroup_mma_wait(0, deps=[source_acc])
            set_free(barriers.source_free, n, CONFIG)
        row = next_row(row, walk, CONFIG)
    if DELAYED:
        operand = gl.convert_layout(ds.to(DTYPE), OPERAND)
        last = tile_of(tiles.source, walk.num_tiles - 1, CONFIG)
        source_acc = warpgroup_mma(operand, last, source_acc, is_async=True)
        source_acc = warpgroup_mma_wait(0, deps=[source_acc])
    gradient = source_acc * scale
    rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    valid = rows < walk.held_length
    store_rows(results.source_ptr, results.source_stride, rows, valid, gradient, CONFIG)
    if HOLDS_KEYS:
        store_rows(results.weight_ptr, results.weight_stride, rows, valid, weight_acc, CONFIG)


@gluon.jit
def initialised_barriers(CONFIG: gl.constexpr):
    """The mbarriers of a program."""
    return Barriers(
        held_loaded=ring(CONSUMERS, 1),
        source_loaded=ring(CONFIG.STAGES, 1),
        source_free=ring(CONFIG.STAGES, CONSUMERS),
        weight_loaded=ring(CONFIG.STAGES, 1),
        weight_free=ring(CONFIG.STAGES, CONSUMERS),
    )


@gluon.jit
def stored_columns(CONFIG: gl.constexpr):
    """Numbers of a tile's rows, in shared memory."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    WARP: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    numbers = gl.arange(0, CONFIG.BLOCK, WARP)
    return gl.allocate_shared_memory(gl.int32, [CONFIG.BLOCK], LAYOUT, numbers)


@gluon.jit
def head_pointer(x, batch, head):
    """Pointer to row 0 of a head."""
    return x.ptr + batch.to(gl.int64) * x.batch_stride + head.to(gl.int64) * x.head_stride


@gluon.jit(do_not_specialize=CHANGING)
def hopper_dkdv_kernel(
    q,
    k,
    v,
    do,
    shift,
    delta,
    dk,
    dv,
    kv_heads,
    group,
    seqlen_q,
    seqlen_k,
    num_blocks,
    heads_together,
    offset,
    scale_log2,
    scale,
    CONFIG: gl.constexpr,
):
    """128 keys of one kv head per program: the contract of ``dkdv_kernel`` without options.

    ``q`` and ``do`` ``(B, kv_heads * group, seqlen_q, HEAD_DIM)``, ``k`` and ``v`` ``(B, kv_heads,
    up to seqlen_k, HEAD_DIM)`` tensor descriptors in fp16 or bf16, with boxes of ``BLOCK`` and
    ``ROWS`` rows: TMA reads zeros past the last one. ``shift`` and ``delta`` 1-D descriptors of all
    rows of q, fp32, with boxes of ``BLOCK``; see ``RowStatistics``. ``dk``, ``dv``
    :class:`Strided` with contiguous rows. ``scale_log2`` is the factor of scores, ``scale``, times
    ``log2(e)``. ``CAUSAL``: query ``i`` sees keys up to ``i + offset``.
    """
    index, head, batch = program_coordinates(num_blocks, kv_heads, heads_together)
    k_start = index * CONSUMERS * ROWS
    start = k_start * 0
    if CONFIG.CAUSAL:
        start = gl.maximum(k_start - offset, 0)
    # A block that no query sees takes a tile of each head, all of it hidden.
    num_tiles = gl.maximum((seqlen_q - start + CONFIG.BLOCK - 1) // CONFIG.BLOCK, 1) * group
    first_head = head * group
    query = (batch * kv_heads * group + first_head) * seqlen_q
    walk = Walk(
        batch, head, k_start, seqlen_k, first_head, start, seqlen_q, offset, num_tiles, query
    )
    results = Results(
        head_pointer(dk, batch, head),
        dk.row_stride.to(gl.int64),
        head_pointer(dv, batch, head),
        dv.row_stride.to(gl.int64),
    )
    SHAPE: gl.constexpr = [CONFIG.STAGES, CONFIG.BLOCK]
    tiles = Tiles(
        held_source=buffers(k, CONSUMERS, ROWS, CONFIG),
        held_weight=buffers(v, CONSUMERS, ROWS, CONFIG),
        source=buffers(q, CONFIG.STAGES, CONFIG.BLOCK, CONFIG),
        weight=buffers(do, CONFIG.STAGES, CONFIG.BLOCK, CONFIG),
        shift=gl.allocate_shared_memory(gl.float32, SHAPE, shift.layout),
        delta=gl.allocate_shared_memory(gl.float32, SHAPE, delta.layout),
        columns=stored_columns(CONFIG),
    )
    barriers = initialised_barriers(CONFIG)
    fence_async_shared()  # TMA, in the asynchronous proxy, must find the barriers initialised
    gl.warp_specialize(
        [
            (consume, (0, results, 0, tiles, barriers, walk, scale_log2, scale, True, CONFIG)),
            (consume, (1, results, 0, tiles, barriers, walk, scale_log2, scale, True, CONFIG)),
            (produce, (k, v, q, do, shift, delta, tiles, barriers, walk, seqlen_q, True, CONFIG)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit(do_not_specialize=(*CHANGING, "k_length"))
def hopper_dq_kernel(
    q,
    k,
    v,
    do,
    dq,
    statistics,
    heads,
    group,
    seqlen_q,
    k_length,
    num_blocks,
    heads_together,
    offset,
    scale_log2,
    scale,
    CONFIG: gl.constexpr,
):
    """128 queries of one head per program: the contract of ``dq_kernel`` without options.

    Arguments as in :func:`hopper_dkdv_kernel`; ``dq`` :class:`Strided`, ``statistics``
    :class:`RowStatistics`; ``k`` and ``v`` have ``k_length`` rows, at least 1, and boxes of
    ``BLOCK``, ``q`` and ``do`` of ``ROWS``.
    """
    index, head, batch = program_coordinates(num_blocks, heads, heads_together)
    stop = k_length
    if CONFIG.CAUSAL:  # the last queries see most keys and start first
        index = num_blocks - 1 - index
        last_row = gl.minimum((index + 1) * CONSUMERS * ROWS, seqlen_q) - 1
        stop = gl.minimum(last_row + offset + 1, k_length)
    num_tiles = gl.maximum((stop + CONFIG.BLOCK - 1) // CONFIG.BLOCK, 1)
    q_start = index * CONSUMERS * ROWS
    query = (batch * heads + head) * seqlen_q
    walk = Walk(
        batch, head, q_start, seqlen_q, head // group, 0, k_length, offset, num_tiles, query
    )
    dq_ptr, dq_stride = head_pointer(dq, batch, head), dq.row_stride.to(gl.int64)
    results = Results(dq_ptr, dq_stride, dq_ptr, dq_stride)
    source = buffers(k, CONFIG.STAGES, CONFIG.BLOCK, CONFIG)
    tiles = Tiles(
        held_source=buffers(q, CONSUMERS, ROWS, CONFIG),
        held_weight=buffers(do, CONSUMERS, ROWS, CONFIG),
        source=source,
        weight=buffers(v, CONFIG.STAGES, CONFIG.BLOCK, CONFIG),
        shift=source,
        delta=source,
        columns=stored_columns(CONFIG),
    )
    barriers = initialised_barriers(CONFIG)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                consume,
                (0, results, statistics, tiles, barriers, walk, scale_log2, scale, False, CONFIG),
            ),
            (
                consume,
                (1, results, statistics, tiles, barriers, walk, scale_log2, scale, False, CONFIG),
            ),
            (produce, (q, do, k, v, 0, 0, tiles, barriers, walk, seqlen_q, False, CONFIG)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
