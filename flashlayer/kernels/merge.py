"""The merge kernel: the attention of parts of the keys, made one by their log-sum-exp.

A part that is finished is one key of score ``lse`` and value ``o``, so parts are merged by the
online softmax (:mod:`flashlayer.online_softmax`). For decoding, where the keys of a query are split
(:mod:`flashlayer.backends.split_keys`).
"""

import triton
import triton.language as tl

from flashlayer.kernels.primitives import row_pointer

# Parameters that no compilation depends on, see ``CHANGING`` of the other kernels.
CHANGING = (
    "heads",
    "group",
    "seqlen_q",
    "num_parts",
    "sequences",
    "batch_stride",
    "kv_head_stride",
    "group_stride",
    "row_stride",
    "part_stride",
)


@triton.jit(do_not_specialize=CHANGING)
def merge_kernel(
    o_parts_ptr,
    parts,
    o,
    results,
    sinks_ptr,
    cu_seqlens_q,
    heads,
    group,
    seqlen_q,
    num_parts,
    sequences,
    batch_stride,
    kv_head_stride,
    group_stride,
    row_stride,
    part_stride,
    NUM_PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One query of one head in each program.

    Args:
        o_parts_ptr: outputs of the parts, rows of ``VALUE_DIM`` that follow one another.
        parts: :class:`RowResults` of the parts. The row of a query's part is at
            ``batch * batch_stride + kv_head * kv_head_stride + head_of_group * group_stride
            + query * row_stride + part * part_stride``, also in ``o_parts_ptr``.
        o: :class:`Strided`, the output.
        results: :class:`RowResults`.
        sinks_ptr: ``(heads,)``, or None: one more part of value 0, the same for all queries.
        cu_seqlens_q: of packed sequences, or None; tokens past the last one have no sink.
        heads: query heads.
        group: query heads for each kv head.
        seqlen_q: queries, of all packed sequences together.
        num_parts: of every query.
        sequences: number of packed ones.
        batch_stride: in rows, as all strides.
        kv_head_stride: likewise.
        group_stride: likewise.
        row_stride: likewise.
        part_stride: likewise.
        NUM_PARTS: a power of two, ``num_parts`` or more.
        BLOCK_P: parts whose outputs are loaded at a time.
        VALUE_DIM: head dimension of the values.
        BLOCK_D: a power of two, ``VALUE_DIM`` or more.
    """
    row = tl.program_id(0).to(tl.int64)
    query = row % seqlen_q
    head = row // seqlen_q % heads
    batch = row // seqlen_q // heads
    at = batch * batch_stride + head // group * kv_head_stride
    at += head % group * group_stride + query * row_stride
    part = tl.arange(0, NUM_PARTS)
    valid = part < num_parts
    lse = tl.load(parts.lse_ptr + at + part * part_stride, mask=valid, other=float("-inf"))
    m = tl.max(lse, 0)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(lse.dtype)
        if cu_seqlens_q is not None:
            sink = tl.where(query < tl.load(cu_seqlens_q + sequences), sink, float("-inf"))
        m = tl.maximum(m, sink)
    # A query that sees no key: exp(-inf - -inf) would be NaN.
    m = tl.where(m == float("-inf"), 0.0, m)
    weights = tl.exp(lse - m)
    l = tl.sum(weights, 0)  # noqa: E741 - the name of both papers
    if sinks_ptr is not None:
        l += tl.exp(sink - m)  # noqa: E741
    column = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), lse.dtype)
    for start in tl.range(0, num_parts, BLOCK_P):
        some = start + tl.arange(0, BLOCK_P)
        present = some < num_parts
        rows = at + some * part_stride
        weight = tl.exp(tl.load(parts.lse_ptr + rows, mask=present, other=float("-inf")) - m)
        values = tl.load(
            o_parts_ptr + rows[:, None] * VALUE_DIM + column[None, :],
            mask=present[:, None] & (column < VALUE_DIM)[None, :],
            other=0.0,
        )
        acc += tl.sum(values.to(lse.dtype) * weight[:, None], 0)
    out = (acc / tl.where(l == 0, 1.0, l)).to(o.ptr.dtype.element_ty)
    o_ptr = row_pointer(o, (batch, head, query)) + column * o.column_stride
    tl.store(o_ptr, out, mask=column < VALUE_DIM)
    total = m + tl.log(l)
    tl.store(results.lse_ptr + row, total)
    if results.max_ptr is not None:
        largest = tl.load(parts.max_ptr + at + part * part_stride, mask=valid, other=float("-inf"))
        tl.store(results.max_ptr + row, tl.max(largest, 0))
    if results.entropy_ptr is not None:
        # The grouping property: a part of probability w adds w (its entropy - log w).
        entropy = tl.load(parts.entropy_ptr + at + part * part_stride, mask=valid, other=0.0)
        log_w = tl.minimum(lse - total, 0.0)  # 0 but for rounding where one part has it all
        terms = tl.where(lse == float("-inf"), 0.0, tl.exp(log_w) * (entropy - log_w))
        merged = tl.sum(terms, 0)
        if sinks_ptr is not None:
            sink_log_w = tl.minimum(sink - total, 0.0)
            sink_term = tl.exp(sink_log_w) * sink_log_w
            merged -= tl.where(sink == float("-inf"), 0.0, sink_term)
        tl.store(results.entropy_ptr + row, merged)
