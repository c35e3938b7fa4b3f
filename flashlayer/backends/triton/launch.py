"""The launches of one forward and one backward pass."""

import warnings
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashlayer.backends.triton import specialized, tiling
from flashlayer.backends.triton.arguments import base_2, flags, options, scalars, strided
from flashlayer.spec import AttentionExtras, AttentionSpec, Tensors


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    max_scores: Tensor | None,
    entropy: Tensor | None,
    spec: AttentionSpec,
    extras: AttentionExtras,
) -> None:
    """Fill ``o``, which is not empty, ``lse`` and those of the other two that are there."""
    from flashlayer.kernels.arguments import RowResults
    from flashlayer.kernels.forward import forward_kernel

    heads, kv_heads = q.shape[1], k.shape[1]
    packed = extras.cu_seqlens_q is not None
    tiles = tiling.tiles_of("forward", q, v, spec, extras)
    if tiles.specialized:
        # Tuned by a call that shares its bucket; options, strides and Triton may differ.
        if specialized.refuses(q, k, v, spec, extras) is None:
            with launching(q):
                specialized.launch(q, k, v, o, lse, spec, tiles)
            return
        tiles = tiling.table_tiles("forward", q, v, spec, extras)
    num_blocks = _num_blocks(spec.max_seqlen_q, q.shape[2], tiles.BLOCK_M)
    grid = num_blocks * heads * _sequences(q, extras)
    if grid == 0:
        return
    streams = {"k_descriptor": k, "v_descriptor": v}
    stages, edge_stages = tiling.pipeline("forward", tiles, tiles.BLOCK_N, extras, streams)
    sums = tiling.row_sums(q)
    from_tile = tiling.from_tile(q, v, spec, extras)
    sign = (spec.scale > 0) - (spec.scale < 0)
    launch: Any = forward_kernel[(grid,)]  # Triton types its launcher as the kernel it is not
    with launching(q):
        launch(
            q=strided(q, packed),
            k=strided(k, packed, from_tile),
            v=strided(v, packed, from_tile),
            o=strided(o, packed),
            results=RowResults(lse, max_scores, entropy),
            extras=options(extras, sinks=True, keys=tiles.BLOCK_N),
            heads=heads,
            group=heads // kv_heads,
            num_blocks=num_blocks,
            heads_together=tiling.heads_together(tiles, spec, heads, spec.max_seqlen_k, k, v),
            scale=max(abs(spec.scale), 1e-30),  # with sign 0 any positive factor will do
            FLAGS=flags(q, spec, extras, SCALE_SIGN=sign, EDGE_STAGES=edge_stages, ROW_SUMS=sums),
            **scalars(q, k, spec, extras),
            **stages,
        )


def launch_merge(
    parts: tuple[Tensor, ...],
    results: tuple[Tensor, ...],
    spec: AttentionSpec,
    extras: AttentionExtras,
) -> None:
    """Fill ``results``, in the order of a forward pass, from :func:`split_keys.split_forward`'s."""
    from flashlayer.kernels.arguments import RowResults
    from flashlayer.kernels.merge import merge_kernel
    from flashlayer.kernels.tiles import merge_tile

    def of_rows(lse: Tensor, *others: Tensor) -> Any:
        max_scores = others[0] if spec.max_scores else None
        return RowResults(lse, max_scores, others[-1] if spec.entropy else None)

    o = results[0]
    batch, heads, seqlen, value_dim = o.shape
    cu_seqlens = extras.cu_seqlens_q
    strides = parts[1].stride()
    names = ("batch_stride", "kv_head_stride", "group_stride", "row_stride", "part_stride")
    launch: Any = merge_kernel[(batch * heads * seqlen,)]
    with launching(o):
        launch(
            o_parts_ptr=parts[0],
            parts=of_rows(*parts[1:]),
            o=strided(o),
            results=of_rows(*results[1:]),
            sinks_ptr=None if extras.sinks is None else extras.sinks.contiguous(),
            cu_seqlens_q=cu_seqlens,
            heads=heads,
            group=parts[1].shape[2],
            seqlen_q=seqlen,
            num_parts=parts[1].shape[4],
            sequences=0 if cu_seqlens is None else len(cu_seqlens) - 1,
            VALUE_DIM=value_dim,
            **dict(zip(names, strides, strict=True)),
            **merge_tile(parts[1].shape[4], value_dim),
        )


def launch_tangents(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: Tensors,
    results: tuple[Tensor, Tensor, Tensor, Tensor],
    spec: AttentionSpec,
    extras: AttentionExtras,
) -> None:
    """Fill ``results``: o, which is not empty, lse, and the tangents of both.

    ``tangents`` are those of q, k and v, None where absent.
    """
    from flashlayer.kernels.arguments import Given
    from flashlayer.kernels.tangents import tangent_kernel

    q, k, v = primals
    o, lse, o_tangent, lse_tangent = results
    heads = q.shape[1]
    packed = extras.cu_seqlens_q is not None
    tiles = tiling.tiles_of("tangents", q, v, spec, extras)
    num_blocks = _num_blocks(spec.max_seqlen_q, q.shape[2], tiles.BLOCK_M)
    grid = num_blocks * heads * _sequences(q, extras)
    if grid == 0:
        return
    q_tangent, k_tangent, v_tangent = (None if x is None else strided(x, packed) for x in tangents)
    sign = (spec.scale > 0) - (spec.scale < 0)
    stages = {"num_stages": 1} if tiling.lacks_fences("tangents", q) else {}
    options_of_dropout = ("threshold", "keep_scale")
    numbers = {n: x for n, x in scalars(q, k, spec, extras).items() if n not in options_of_dropout}
    launch: Any = tangent_kernel[(grid,)]
    with launching(q):
        launch(
            q=strided(q, packed),
            k=strided(k, packed),
            v=strided(v, packed),
            q_tangent=q_tangent,
            k_tangent=k_tangent,
            v_tangent=v_tangent,
            o=strided(o, packed),
            lse_ptr=lse,
            o_tangent=strided(o_tangent, packed),
            lse_tangent_ptr=lse_tangent,
            extras=options(extras, sinks=True),
            heads=heads,
            group=heads // k.shape[1],
            num_blocks=num_blocks,
            scale=max(abs(spec.scale), 1e-30),  # with sign 0 any positive factor will do
            GIVEN=Given(*(x is not None for x in tangents)),
            FLAGS=flags(q, spec, extras, SCALE_SIGN=sign),
            **numbers,
            **tiles.launch_options() | stages,
        )


def launch_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    delta: Tensor,
    d_mask: Tensor | None,
    spec: AttentionSpec,
    extras: AttentionExtras,
) -> None:
    """Fill ``dq``, ``dk``, ``dv``, ``delta`` (B, H, Sq), not empty, and ``d_mask`` where wanted."""
    from flashlayer.kernels.arguments import RowStatistics

    with launching(q):
        statistics = RowStatistics(torch.empty_like(lse), delta)
        _launch_delta(o, do, lse, dlse, statistics, base_2(q, extras))
        packed = extras.cu_seqlens_q is not None
        from_tile = tiling.from_tile(q, v, spec, extras)
        if k.shape[2] == 0 or _sequences(q, extras) == 0:
            return
        shared = {
            "q": strided(q, packed, from_tile),
            "k": strided(k, packed, from_tile),
            "v": strided(v, packed, from_tile),
            "do": strided(do, packed, from_tile),
            "statistics": statistics,
            "extras": options(extras),
            "scale": spec.scale,
            **scalars(q, k, spec, extras),
        }
        call = _BackwardCall(do, q, k, v, spec, extras, shared)
        _launch_dkdv(call, dk, dv)
        _launch_dq(call, dq)
        if d_mask is not None:
            _launch_dmask(call, d_mask)


class _BackwardCall(NamedTuple):
    """What the kernels of one backward pass have in common."""

    do: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    spec: AttentionSpec
    extras: AttentionExtras
    arguments: dict[str, Any]


def _launch_delta(
    o: Tensor, do: Tensor, lse: Tensor, dlse: Tensor | None, statistics: Any, base_2: bool
) -> None:
    from flashlayer.kernels.backward import delta_kernel
    from flashlayer.kernels.tiles import delta_rows

    batch, heads, seqlen, value_dim = o.shape
    rows = delta_rows(value_dim)
    launch: Any = delta_kernel[(_num_blocks(None, seqlen, rows) * heads * batch,)]
    launch(
        o=strided(o),
        do=strided(do),
        lse_ptr=lse,
        dlse_ptr=None if dlse is None else dlse.contiguous(),
        statistics=statistics,
        heads=heads,
        seqlen_q=seqlen,
        BLOCK_M=rows,
        BASE_2=base_2,
    )


def _launch_dkdv(call: _BackwardCall, dk: Tensor, dv: Tensor) -> None:
    from flashlayer.kernels.backward import dkdv_kernel

    do, q, k, v, spec, extras, arguments = call
    kv_heads = k.shape[1]
    group = q.shape[1] // kv_heads
    tiles = tiling.tiles_of("dkdv", q, v, spec, extras)
    if tiles.specialized:
        if specialized.refuses_backward(do, q, k, v, spec, extras) is None:
            statistics = arguments["statistics"]
            specialized.launch_dkdv(do, q, k, v, dk, dv, statistics, spec, tiles)
            return
        tiles = tiling.table_tiles("dkdv", q, v, spec, extras)
    num_blocks = _num_blocks(spec.max_seqlen_k, k.shape[2], tiles.BLOCK_N)
    if num_blocks == 0:
        return
    packed = extras.cu_seqlens_q is not None
    # Behind a ragged tile of packed queries a descriptor would load those of the next sequence.
    streams = {"q_descriptor": q, "do_descriptor": do}
    stages, edge_stages = tiling.pipeline("dkdv", tiles, tiles.BLOCK_M, extras, streams, not packed)
    copies = tiling.row_copies(tiles)
    of_heads = extras.intervals is not None and extras.intervals.shape[1] > 1
    described = any(stages[name] is not None for name in streams)
    followed = spec.window_left is not None or extras.intervals is not None
    constants = {
        "GROUP": group,
        "INTERVAL_HEADS": group if of_heads else 1,
        "IDLE_ROWS": extras.alibi_slopes is None and not (described and followed),
    }
    launch: Any = dkdv_kernel[(num_blocks * kv_heads * _sequences(q, extras),)]
    launch(
        **arguments,
        dk=strided(dk, packed),
        dv=strided(dv, packed),
        kv_heads=kv_heads,
        num_blocks=num_blocks,
        heads_together=tiling.heads_together(tiles, spec, kv_heads, spec.max_seqlen_q, q, do),
        FLAGS=flags(q, spec, extras, EDGE_STAGES=edge_stages, ROW_COPIES=copies, **constants),
        **stages,
    )


def _launch_dq(call: _BackwardCall, dq: Tensor) -> None:
    from flashlayer.kernels.backward import dq_kernel

    do, q, k, v, spec, extras, arguments = call
    heads = q.shape[1]
    tiles = tiling.tiles_of("dq", q, v, spec, extras)
    if tiles.specialized:
        if specialized.refuses_backward(do, q, k, v, spec, extras) is None:
            specialized.launch_dq(do, q, k, v, dq, arguments["statistics"], spec, tiles)
            return
        tiles = tiling.table_tiles("dq", q, v, spec, extras)
    num_blocks = _num_blocks(spec.max_seqlen_q, q.shape[2], tiles.BLOCK_M)
    if num_blocks == 0:
        return
    streams = {"k_descriptor": k, "v_descriptor": v}
    stages, edge_stages = tiling.pipeline("dq", tiles, tiles.BLOCK_N, extras, streams)
    if extras.intervals is not None:
        arguments = arguments | {"extras": options(extras, keys=tiles.BLOCK_N)}
    launch: Any = dq_kernel[(num_blocks * heads * _sequences(q, extras),)]
    launch(
        **arguments,
        dq=strided(dq, extras.cu_seqlens_q is not None),
        heads=heads,
        group=heads // k.shape[1],
        num_blocks=num_blocks,
        heads_together=tiling.heads_together(tiles, spec, heads, spec.max_seqlen_k, k, v),
        FLAGS=flags(q, spec, extras, EDGE_STAGES=edge_stages),
        **stages,
    )


def _launch_dmask(call: _BackwardCall, d_mask: Tensor) -> None:
    from flashlayer.kernels.arguments import Broadcast
    from flashlayer.kernels.mask_gradient import dmask_kernel

    _, q, k, v, spec, extras, arguments = call
    batch, heads, _, _ = q.shape
    mask_entries, mask_heads, mask_q, mask_k = d_mask.shape
    tiles = tiling.tiles_of("dq", q, v, spec, extras)
    q_blocks = _num_blocks(None, mask_q, tiles.BLOCK_M)
    k_blocks = _num_blocks(None, mask_k, tiles.BLOCK_N)
    launch: Any = dmask_kernel[(q_blocks * k_blocks * mask_heads * mask_entries,)]
    stages = {"num_stages": 1} if tiling.lacks_fences("dq", q) else {}
    launch(
        **arguments,
        dmask_ptr=d_mask,
        batches=batch,
        heads=heads,
        group=heads // k.shape[1],
        BROADCAST=Broadcast(*(size == 1 for size in d_mask.shape)),
        FLAGS=flags(q, spec, extras),
        **tiles.launch_options() | stages,
    )


def _num_blocks(longest: int | None, length: int, block: int) -> int:
    """Blocks of the longest packed sequence, or of a dense one."""
    return -(-(length if longest is None else longest) // block)


def _sequences(q: Tensor, extras: AttentionExtras) -> int:
    return q.shape[0] if extras.cu_seqlens_q is None else len(extras.cu_seqlens_q) - 1


def launching(q: Tensor) -> AbstractContextManager:
    """The tensors' own device; or, in the interpreter, NumPy as quiet about inf as a GPU is."""
    if tiling.interpreted():
        return warnings.catch_warnings(action="ignore", category=RuntimeWarning)
    return torch.cuda.device_of(q)
