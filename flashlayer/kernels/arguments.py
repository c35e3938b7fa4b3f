"""What travels into a kernel together: tensors with their strides, and the tensors of the options.

A field that is None is a constant to Triton, which compiles the code of that option away.

Integers that change from call to call can't be fields: Triton specialises every integer of a tuple
on being 1 or a multiple of 16, ``do_not_specialize`` or not, and would compile a kernel again and
again while lengths change. They are parameters of their own (:data:`CHANGING`). Floats neither: in
a tuple they are fp32. And Triton before 3.9 launches no tensor descriptor that is in a tuple.
"""

from typing import Any, NamedTuple

import triton.language as tl

# Parameters that differ from call to call and that no kernel is specialised on. Strides are: loads
# are vectorized by what is known of them.
CHANGING = (
    "heads",
    "kv_heads",
    "group",
    "batches",
    "seqlen_q",
    "seqlen_k",
    "num_blocks",
    "heads_together",
    "offset",
    "window_left",
    "window_right",
    "threshold",
)

# The ranges of a loop over tiles: those that the window's left edge crosses, those in which every
# pair of a query and a key is visible, those that the right edge crosses.
LEFT_EDGE = tl.constexpr(0)
FULL = tl.constexpr(1)
RIGHT_EDGE = tl.constexpr(2)


class Strided(NamedTuple):
    """A ``(B, H, S, columns)`` tensor."""

    ptr: Any
    batch_stride: Any
    head_stride: Any
    row_stride: Any
    column_stride: Any
    columns: Any  # constexpr
    FROM_TILE: Any  # constexpr: whether whole tiles in a loop have a pointer of their own


class Mask(NamedTuple):
    """The attention mask, uint8 or float. Dimensions that are broadcast have stride 0.

    The strides change with the lengths. If ``ALIGNED``, the first three are multiples of 16 and
    Triton vectorizes loads of a row. Else each travels as ``4 * stride + 2``, which is neither 1
    nor a multiple of 16: two compilations serve all masks.
    """

    ptr: Any
    strides: Any  # batch, head and row; column, where COLUMN is None, is always 4 * stride + 2
    ALIGNED: Any  # constexpr
    COLUMN: Any  # constexpr: stride of the keys if it is 0 or 1; else None


class Slopes(NamedTuple):
    """ALiBi's factors, contiguous: ``(B, heads)`` fp32 if ``PER_BATCH``, else ``(heads,)``."""

    ptr: Any
    PER_BATCH: Any  # constexpr


class Intervals(NamedTuple):
    """An interval mask: for each key where the intervals of its queries start and stop.

    ``ptr`` int32 ``(B or 1, heads or 1, 2 n, Sk)`` and ``bounds_ptr`` int32
    ``(B or 1, heads or 1, tiles, n, 4)``, both contiguous; see
    :func:`flashlayer.masks.intervals.tile_bounds`.
    """

    ptr: Any
    bounds_ptr: Any  # of the kernel's BLOCK_N; ignored by dK/dV, whose programs hold their keys
    PER_BATCH: Any  # constexpr: whether the first dimension is B, and the second heads
    PER_HEAD: Any  # constexpr


class Packing(NamedTuple):
    """Where packed sequences begin, and where the last one ends: int32 ``(sequences + 1,)``."""

    cu_seqlens_q: Any
    cu_seqlens_k: Any


class Extras(NamedTuple):
    """The tensors of the options, each None where its option is off."""

    slopes: Any = None  # Slopes
    mask: Any = None  # Mask
    sinks_ptr: Any = None  # (heads,)
    seed_ptr: Any = None  # () int64: dropout's
    packing: Any = None  # Packing
    intervals: Any = None  # Intervals


class RowResults(NamedTuple):
    """What the forward kernel writes of every query: ``(B, heads, S)``, contiguous.

    In the dtype of the accumulation. See :class:`flashlayer.AuxOutput`.
    """

    lse_ptr: Any
    max_ptr: Any = None
    entropy_ptr: Any = None


class RowStatistics(NamedTuple):
    """What the backward kernels read of every query: ``(B, heads, S)``, contiguous.

    The delta kernel writes both. ``shift`` is the LSE as it is subtracted from scores: in their
    unit (``Flags.BASE_2``), and +inf in a row without a visible key, so that p = exp(s - inf) = 0.
    """

    shift_ptr: Any
    delta_ptr: Any


class Flags(NamedTuple):
    """What a kernel is compiled for besides its tile sizes and its arguments' types (constexpr).

    Attributes:
        INPUT_PRECISION: of fp32 products: ``"ieee"`` or ``"tf32"``.
        SOFTCAP: whether there is a softcap.
        BASE_2: whether scores are exponents of 2 and not of e: log2(e) multiplied into the scale
            once, instead of into every difference. So in half precision, but not with a float
            mask, whose ``finfo.min`` would overflow.
        INTERVALS: intervals a key of an interval mask, 1 or 2; 0 without one.
        SCALE_SIGN: 1, -1 or 0; in the forward kernel the factor ``scale`` itself is positive.
        GROUP: query heads for each kv head; in dK/dV only.
        INTERVAL_HEADS: of them those whose interval masks differ, GROUP or 1; in dK/dV only.
        IDLE_ROWS: whether rows past a range of queries are zeros in q and do and add nothing,
            whatever finite number p is; in dK/dV only. A pipelined load then fills in their shift.
            Not with ALiBi, where p may be inf, nor where a descriptor loads what follows a range.
        EDGE_STAGES: tiles in flight in the edge ranges, None for the launch's ``num_stages``.
        ROW_SUMS: terms of a row's denominator that the forward kernel adds at the end, see
            ``by_thread``: 4 where accumulators are those of mma or wgmma, else 1.
        ROW_COPIES: see ``load_rows`` of the backward kernels.
    """

    INPUT_PRECISION: str
    SOFTCAP: bool
    BASE_2: bool
    INTERVALS: int
    SCALE_SIGN: int = 1
    GROUP: int = 1
    INTERVAL_HEADS: int = 1
    IDLE_ROWS: bool = False
    EDGE_STAGES: int | None = None
    ROW_SUMS: int = 1
    ROW_COPIES: int = 1


class Broadcast(NamedTuple):
    """Which dimensions of a mask are of size 1, for all of the problem's (constexpr)."""

    batch: bool
    heads: bool
    queries: bool
    keys: bool


class Given(NamedTuple):
    """Which of q, k and v have a tangent (constexpr).

    Triton 3.6 can't compare a tuple that holds None, as those of packed tensors do, with None.
    """

    q: bool
    k: bool
    v: bool


class Window(NamedTuple):
    """Keys ``i + offset - left`` to ``i + offset + right`` of query ``i``; None is unbounded.

    Queries of key ``j`` are the same with ``right, left, -offset``. Built in a kernel.
    """

    left: Any
    right: Any
    offset: Any


class Place(NamedTuple):
    """Which part of an interval mask a program is about. Built in a kernel."""

    row: Any  # index of the head among those of the mask
    q_start: Any  # the block of queries
    q_stop: Any
    q_length: Any
    k_length: Any


class Dropout(NamedTuple):
    """Dropout's seed (None if off), and how its random words are read. Built in a kernel."""

    seed_ptr: Any
    threshold: Any  # int64: an attention weight is kept if its word is not below
    keep_scale: Any
