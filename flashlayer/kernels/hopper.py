"""The forward kernel for Hopper in Gluon: a producer warp loads what two warp groups consume.

Shah et al., "FlashAttention-3", arXiv 2407.08608, sections 3.1 and 3.2. The plain kernel leaves
waits and buffers to Triton, which overlaps products with loads, not with the softmax. Here they are
written out:

- The *producer*, one warp, copies tiles of q, k and v to shared memory by TMA and computes nothing.
- Two *consumers*, a warp group (4 warps) each, hold 64 queries each and share the keys. A consumer
  issues ``q k^T`` of one tile, then ``p v`` of the tile before, and computes the softmax of the
  first while the tensor cores work on the second.
- With ``TAKE_TURNS`` a consumer issues its products only when the other has issued its own: the
  softmax of one overlaps the products of the other ("ping-pong", section 3.1).

Each buffer of k and v has two mbarriers. ``loaded`` completes a phase when the bytes of a copy have
arrived, ``free`` when both consumers have done with them. Use ``n`` of a ring of ``STAGES`` buffers
is of buffer ``n % STAGES`` and is its phase ``n // STAGES``; a wait names a phase by its parity.

Written by TMA and read by wgmma, tiles never leave the asynchronous proxy: no fence between them.
"""

import math
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
from flashlayer.kernels.primitives import program_coordinates

LN2 = gl.constexpr(math.log(2))
CONSUMERS = gl.constexpr(2)
CONSUMER_WARPS = 4  # what the kernel is launched with: the others are workers
ROWS = gl.constexpr(64)  # queries a consumer: the rows of one wgmma
# Registers a thread of the second consumer and of the producer may have (setmaxnreg); the first
# consumer takes what they leave of the 65,536: 240 too.
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)


class Tiles(NamedTuple):
    """Buffers in shared memory, each ``[count, 1, 1, rows, HEAD_DIM]``."""

    q: Any  # one for each consumer
    k: Any
    v: Any


class Barriers(NamedTuple):
    """mbarriers, as many as buffers of a kind.

    ``turn``: one for each consumer, if they take turns. An mbarrier that no partition uses would
    be a race: Triton gives its bytes to the values that the partitions capture, which it writes
    with no barrier after the initialisation.
    """

    q_loaded: Any
    k_loaded: Any
    k_free: Any
    v_loaded: Any
    v_free: Any
    turn: Any


class Results(NamedTuple):
    """Where the results of one head lie."""

    o_ptr: Any  # rows of HEAD_DIM contiguous elements
    row_stride: Any  # int64
    lse_ptr: Any


class Config(NamedTuple):
    """What the kernel is compiled for besides its arguments' types (constexpr).

    Attributes:
        BLOCK: rows of a tile that is streamed: of k and v in the forward kernel.
        HEAD_DIM: of q, k and v: 64 or 128.
        STAGES: buffers for the tiles of each tensor that is streamed.
        CAUSAL: whether query ``i`` sees no key past ``i + offset``.
        TAKE_TURNS: whether the consumers issue their products in turns.
    """

    BLOCK: int
    HEAD_DIM: int
    STAGES: int
    CAUSAL: bool
    TAKE_TURNS: bool


class Block(NamedTuple):
    """What one program computes: a block of queries and the tiles of keys that they see."""

    batch: Any
    head: Any
    kv_head: Any
    q_start: Any
    seqlen_q: Any
    k_length: Any  # keys behind it are hidden from all queries
    offset: Any
    num_tiles: Any


@gluon.jit
def wait_loaded(loaded, use, CONFIG: gl.constexpr, pred=True):
    """Wait until the tile of ``use`` has arrived; not at all without ``pred``."""
    mbarrier.wait(loaded.index(use % CONFIG.STAGES), (use // CONFIG.STAGES) & 1, pred=pred)


@gluon.jit
def wait_free(free, use, CONFIG: gl.constexpr):
    """Wait until the buffer of ``use`` is free: its use before this one is done with.

    That is the phase before; "the phase before the first" counts as complete.
    """
    mbarrier.wait(free.index(use % CONFIG.STAGES), ((use // CONFIG.STAGES) & 1) ^ 1)


@gluon.jit
def set_free(free, use, CONFIG: gl.constexpr, pred=True):
    """Say that this consumer has done with the tile of ``use``; nothing without ``pred``."""
    mbarrier.arrive(free.index(use % CONFIG.STAGES), count=1, pred=pred)


@gluon.jit
def tile_of(buffers, use, CONFIG: gl.constexpr):
    """The tile of ``use`` in shared memory: ``[BLOCK, HEAD_DIM]``."""
    return buffers.index(use % CONFIG.STAGES).reshape([CONFIG.BLOCK, CONFIG.HEAD_DIM])


@gluon.jit
def take_turn(turn, RANK: gl.constexpr, use, CONFIG: gl.constexpr):
    """Wait until the other consumer has issued its products."""
    if CONFIG.TAKE_TURNS:
        mbarrier.wait(turn.index(RANK), use & 1)


@gluon.jit
def pass_turn(turn, RANK: gl.constexpr, CONFIG: gl.constexpr):
    """Let the other consumer issue its products."""
    if CONFIG.TAKE_TURNS:
        mbarrier.arrive(turn.index(1 - RANK), count=1)


@gluon.jit
def load_tile(descriptor, batch, head, row, loaded, buffer):
    """Start the copy of whole rows from ``row`` on; ``loaded`` completes when they have arrived."""
    mbarrier.expect(loaded, descriptor.block_type.nbytes)
    tma_load(descriptor, [batch, head, row, 0], loaded, buffer)


@gluon.jit
def produce(q, k, v, tiles, barriers, block, CONFIG: gl.constexpr):
    """Load the queries, then the tiles of keys and values from the last to the first."""
    for c in gl.static_range(CONSUMERS):
        row = block.q_start + c * ROWS
        load_tile(q, block.batch, block.head, row, barriers.q_loaded.index(c), tiles.q.index(c))
    for n in range(block.num_tiles):
        stage = n % CONFIG.STAGES
        row = (block.num_tiles - 1 - n) * CONFIG.BLOCK
        wait_free(barriers.k_free, n, CONFIG)
        loaded = barriers.k_loaded.index(stage)
        load_tile(k, block.batch, block.kv_head, row, loaded, tiles.k.index(stage))
        wait_free(barriers.v_free, n, CONFIG)
        loaded = barriers.v_loaded.index(stage)
        load_tile(v, block.batch, block.kv_head, row, loaded, tiles.v.index(stage))


@gluon.jit
def softmax_update(scores, m_i, l_i, scale_log2, stops, k_start, MASKED: gl.constexpr):
    """Take a tile's scores into the running maximum and denominator of each row.

    As ``online_softmax_update`` of the plain kernel, with the maximum in base 2: one multiply-add
    and one exp2 for each score. Rows see the keys before ``stops``. Returns ``m_i``, ``l_i``, the
    factor for what was summed before, and ``p``.
    """
    if MASKED:
        columns = k_start + gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(columns[None, :] < stops[:, None], scores, float("-inf"))
    m_new = gl.maximum(m_i, gl.max(scores, 1) * scale_log2)  # [ROWS]
    # Without a visible key so far the maximum is -inf, and -inf - -inf is NaN: subtract 0 instead.
    shift = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(scores * scale_log2 - shift[:, None])  # [ROWS, BLOCK_N]
    rescale = gl.exp2(m_i - shift)
    return m_new, l_i * rescale + gl.sum(p, 1), rescale, p


@gluon.jit
def consume(RANK: gl.constexpr, results, tiles, barriers, block, scale_log2, CONFIG: gl.constexpr):
    """Attention of 64 queries; the tile of use ``n`` is tile ``num_tiles - 1 - n`` of the keys.

    The last tiles of keys come first, which are those to mask: ragged, or crossed by the causal
    edge. All tiles before them need no mask.
    """
    BLOCK_N: gl.constexpr = CONFIG.BLOCK
    HEAD_DIM: gl.constexpr = CONFIG.HEAD_DIM
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    DTYPE: gl.constexpr = results.o_ptr.dtype.element_ty
    first_row = block.q_start + RANK * ROWS
    rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    stops = gl.full([ROWS], 0, gl.int32, gl.SliceLayout(1, SCORES)) + block.k_length
    num_full = block.k_length // BLOCK_N  # tiles that all of these queries see whole
    if CONFIG.CAUSAL:
        stops = gl.minimum(rows + block.offset + 1, stops)
        num_full = gl.minimum(gl.maximum(first_row + block.offset + 1, 0) // BLOCK_N, num_full)
    last = block.num_tiles - 1
    num_masked = gl.maximum(block.num_tiles - num_full, 1)

    m_i = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    l_i = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, OUT)
    unset = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, SCORES)

    mbarrier.wait(barriers.q_loaded.index(RANK), 0)
    q = tiles.q.index(RANK).reshape([ROWS, HEAD_DIM])
    wait_loaded(barriers.k_loaded, 0, CONFIG)
    take_turn(barriers.turn, RANK, 0, CONFIG)
    k = tile_of(tiles.k, 0, CONFIG).permute([1, 0])
    scores = warpgroup_mma(q, k, unset, use_acc=False, is_async=True)
    pass_turn(barriers.turn, RANK, CONFIG)
    scores = warpgroup_mma_wait(0, deps=[scores])
    set_free(barriers.k_free, 0, CONFIG)
    m_i, l_i, _, p = softmax_update(scores, m_i, l_i, scale_log2, stops, last * BLOCK_N, True)
    wait_loaded(barriers.k_loaded, 1, CONFIG, last > 0)
    for MASKED in gl.static_range(1 if CONFIG.CAUSAL else 0, -1, -1):
        start = 1 if MASKED else num_masked
        stop = num_masked if MASKED else block.num_tiles
        for n in range(start, stop):
            weights = gl.convert_layout(p.to(DTYPE), WEIGHTS)
            take_turn(barriers.turn, RANK, n, CONFIG)
            k = tile_of(tiles.k, n, CONFIG).permute([1, 0])
            scores = warpgroup_mma(q, k, unset, use_acc=False, is_async=True)
            wait_loaded(barriers.v_loaded, n - 1, CONFIG)
            acc = warpgroup_mma(weights, tile_of(tiles.v, n - 1, CONFIG), acc, is_async=True)
            pass_turn(barriers.turn, RANK, CONFIG)
            scores = warpgroup_mma_wait(1, deps=[scores])
            set_free(barriers.k_free, n, CONFIG)
            k_start = (last - n) * BLOCK_N
            m_i, l_i, rescale, p = softmax_update(
                scores, m_i, l_i, scale_log2, stops, k_start, MASKED
            )
            # The loop that waits for the next keys ends a basic block: ptxas can't move the wait
            # for p v, which comes after it, above the exponentials.
            wait_loaded(barriers.k_loaded, n + 1, CONFIG, n < last)
            acc = warpgroup_mma_wait(0, deps=[acc])
            set_free(barriers.v_free, n - 1, CONFIG)
            acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, OUT))[:, None]
    weights = gl.convert_layout(p.to(DTYPE), WEIGHTS)
    wait_loaded(barriers.v_loaded, last, CONFIG)
    acc = warpgroup_mma(weights, tile_of(tiles.v, last, CONFIG), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    store_results(results, rows, rows < block.seqlen_q, m_i, l_i, acc, CONFIG)


@gluon.jit
def store_results(results, rows, valid, m_i, l_i, acc, CONFIG: gl.constexpr):
    """Divide by the denominators and store the rows that exist."""
    OUT: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    # A row without a visible key has m_i = -inf and l_i = 0, and its lse is -inf + -inf.
    gl.store(results.lse_ptr + rows, (m_i + gl.log2(l_i)) * LN2, mask=valid)
    # Its p are zeros, but 0 times a NaN of a value that other rows see is NaN: o is set to 0.
    empty = gl.convert_layout(l_i == 0.0, OUT)[:, None]
    inverse = gl.convert_layout(1.0 / gl.where(l_i == 0.0, 1.0, l_i), OUT)[:, None]
    out = gl.where(empty, 0.0, acc * inverse)
    store_rows(results.o_ptr, results.row_stride, rows, valid, out, CONFIG)


@gluon.jit
def store_rows(ptr, row_stride, rows, valid, tile, CONFIG: gl.constexpr):
    """Store the valid rows of a tile: 16 bytes a thread, whole rows a warp."""
    LANES: gl.constexpr = CONFIG.HEAD_DIM // 8
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    rows = gl.convert_layout(rows, gl.SliceLayout(1, STORE))[:, None]
    valid = gl.convert_layout(valid, gl.SliceLayout(1, STORE))[:, None]
    columns = gl.arange(0, CONFIG.HEAD_DIM, gl.SliceLayout(0, STORE))[None, :]
    tile = gl.convert_layout(tile.to(ptr.dtype.element_ty), STORE)
    gl.store(ptr + rows * row_stride + columns, tile, mask=valid)


@gluon.jit
def buffers(descriptor, COUNT: gl.constexpr, BLOCK: gl.constexpr, CONFIG: gl.constexpr):
    """Shared memory for ``COUNT`` tiles of a tensor."""
    shape: gl.constexpr = [COUNT, 1, 1, BLOCK, CONFIG.HEAD_DIM]
    return gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)


@gluon.jit
def ring(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """As many mbarriers, whose phases take ``ARRIVALS`` arrivals each."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def block_of_program(
    heads, group, seqlen_q, k_length, num_blocks, heads_together, offset, CONFIG: gl.constexpr
):
    """The block of this program. Causal: the last queries see most keys and start first."""
    index, head, batch = program_coordinates(num_blocks, heads, heads_together)
    stop = k_length
    if CONFIG.CAUSAL:
        index = num_blocks - 1 - index
        last_row = gl.minimum((index + 1) * CONSUMERS * ROWS, seqlen_q) - 1
        stop = gl.minimum(last_row + offset + 1, k_length)
    # A block without a visible key takes one tile, all of it masked.
    num_tiles = gl.maximum((stop + CONFIG.BLOCK - 1) // CONFIG.BLOCK, 1)
    q_start = index * CONSUMERS * ROWS
    return Block(batch, head, head // group, q_start, seqlen_q, k_length, offset, num_tiles)


@gluon.jit(do_not_specialize=(*CHANGING, "k_length"))
def hopper_forward_kernel(
    q,
    k,
    v,
    o,
    lse_ptr,
    heads,
    group,
    seqlen_q,
    k_length,
    num_blocks,
    heads_together,
    offset,
    scale_log2,
    CONFIG: gl.constexpr,
):
    """128 queries of one head per program: the contract of ``forward_kernel`` without options.

    ``q`` ``(B, heads, seqlen_q, HEAD_DIM)``, ``k`` and ``v`` ``(B, heads // group, k_length,
    HEAD_DIM)`` tensor descriptors in fp16 or bf16, with boxes of ``ROWS`` and ``BLOCK_N`` rows: TMA
    reads zeros past the last one. ``o`` :class:`Strided` with contiguous rows, ``lse`` ``(B, heads,
    seqlen_q)`` contiguous fp32, natural log. ``k_length`` at least 1: the keys that any query sees.
    ``scale_log2 > 0`` is the factor of scores times ``log2(e)``. ``CAUSAL``: query ``i`` sees keys
    up to ``i + offset``.
    """
    block = block_of_program(
        heads, group, seqlen_q, k_length, num_blocks, heads_together, offset, CONFIG
    )
    results = Results(
        o.ptr + block.batch.to(gl.int64) * o.batch_stride + block.head.to(gl.int64) * o.head_stride,
        o.row_stride.to(gl.int64),
        lse_ptr + (block.batch * heads + block.head).to(gl.int64) * seqlen_q,
    )
    tiles = Tiles(
        q=buffers(q, CONSUMERS, ROWS, CONFIG),
        k=buffers(k, CONFIG.STAGES, CONFIG.BLOCK, CONFIG),
        v=buffers(v, CONFIG.STAGES, CONFIG.BLOCK, CONFIG),
    )
    q_loaded = ring(CONSUMERS, 1)
    barriers = Barriers(
        q_loaded=q_loaded,
        k_loaded=ring(CONFIG.STAGES, 1),
        k_free=ring(CONFIG.STAGES, CONSUMERS),
        v_loaded=ring(CONFIG.STAGES, 1),
        v_free=ring(CONFIG.STAGES, CONSUMERS),
        turn=ring(CONSUMERS, 1) if CONFIG.TAKE_TURNS else q_loaded,
    )
    fence_async_shared()  # TMA, in the asynchronous proxy, must find the barriers initialised
    pass_turn(barriers.turn, 1, CONFIG)  # the first turn is that of consumer 0
    gl.warp_specialize(
        [
            (consume, (0, results, tiles, barriers, block, scale_log2, CONFIG)),
            (consume, (1, results, tiles, barriers, block, scale_log2, CONFIG)),
            (produce, (q, k, v, tiles, barriers, block, CONFIG)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
