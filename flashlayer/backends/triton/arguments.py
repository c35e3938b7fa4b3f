"""Tensors and options as the kernels take them (:mod:`flashlayer.kernels.arguments`)."""

import functools
from typing import Any

import torch
from torch import Tensor

from flashlayer import philox
from flashlayer.backends.triton.tiling import input_precision
from flashlayer.spec import AttentionExtras, AttentionSpec


@functools.lru_cache(maxsize=None, typed=True)  # typed: 1 == True
def _constexpr(value: int) -> Any:
    """A constant in a tuple, whose plain integers are arguments of the kernel."""
    import triton.language as tl

    return tl.constexpr(value)


def strided(x: Tensor, packed: bool = False, from_tile: bool = False) -> Any:
    """A ``(B, H, S, D)`` tensor; B = 1 if it is packed; ``from_tile``: tiling's."""
    from flashlayer.kernels.arguments import Strided

    batch, head, row, column = x.stride()
    constants = _constexpr(x.shape[3]), _constexpr(from_tile)
    return Strided(x, None if packed else batch, head, row, column, *constants)


def options(extras: AttentionExtras, *, sinks: bool = False, keys: int | None = None) -> Any:
    """The tensors of the options; None where off, which compiles their code away.

    Args:
        extras: the options.
        sinks: whether the kernel takes the sinks.
        keys: tile size of a kernel that loops over keys.
    """
    from flashlayer.kernels.arguments import Extras, Packing, Slopes

    slopes = extras.alibi_slopes
    packed = extras.cu_seqlens_q is not None
    return Extras(
        mask=None if extras.attn_mask is None else _mask(extras.attn_mask),
        slopes=None if slopes is None else Slopes(slopes.contiguous(), _constexpr(len(slopes) > 1)),
        sinks_ptr=extras.sinks.contiguous() if sinks and extras.sinks is not None else None,
        seed_ptr=extras.dropout_seed,
        packing=Packing(extras.cu_seqlens_q, extras.cu_seqlens_k) if packed else None,
        intervals=None if extras.intervals is None else _intervals(extras.intervals, keys),
    )


def _intervals(intervals: Tensor, keys: int | None) -> Any:
    from flashlayer.kernels.arguments import Intervals

    batch, heads, _, _ = intervals.shape
    # Triton 3.6 can't compare a tuple that holds None with None: dK/dV gets bounds that it ignores.
    return Intervals(
        intervals.contiguous(),
        intervals if keys is None else _bounds(intervals.contiguous(), keys),
        _constexpr(batch > 1),
        _constexpr(heads > 1),
    )


def _bounds(intervals: Tensor, keys: int) -> Tensor:
    """As :func:`flashlayer.masks.intervals.tile_bounds`, in one launch for its dozen."""
    from flashlayer.kernels.intervals import bounds_kernel

    *rows, ends, seqlen_k = intervals.shape
    tiles = -(-seqlen_k // keys)
    bounds = intervals.new_empty(*rows, tiles, ends // 2, 4)
    if bounds.numel() > 0:
        launch: Any = bounds_kernel[(rows[0] * rows[1] * tiles,)]
        launch(intervals, bounds, seqlen_k, tiles, COUNT=ends // 2, BLOCK_N=keys)
    return bounds


def _mask(mask: Tensor) -> Any:
    from flashlayer.kernels.arguments import Mask

    *strides, column = (0 if mask.shape[dim] == 1 else mask.stride(dim) for dim in range(4))
    aligned = all(stride % 16 == 0 for stride in strides)
    if not aligned:
        strides = [4 * stride + 2 for stride in strides]
    return Mask(
        mask.view(torch.uint8) if mask.dtype == torch.bool else mask,
        (*strides, 4 * column + 2),
        _constexpr(aligned),
        _constexpr(column) if column in (0, 1) else None,
    )


def flags(q: Tensor, spec: AttentionSpec, extras: AttentionExtras, **more: Any) -> Any:
    """The constants of a kernel."""
    from flashlayer.kernels.arguments import Flags

    count = 0 if extras.intervals is None else extras.intervals.shape[2] // 2
    softcap = spec.softcap is not None
    return Flags(input_precision(q), softcap, base_2(q, extras), count, **more)


def base_2(q: Tensor, extras: AttentionExtras) -> bool:
    """See :class:`flashlayer.kernels.arguments.Flags`."""
    mask = extras.attn_mask
    return q.element_size() == 2 and (mask is None or mask.dtype == torch.bool)


def scalars(q: Tensor, k: Tensor, spec: AttentionSpec, extras: AttentionExtras) -> dict[str, Any]:
    """What every kernel takes of the geometry, the softcap and dropout, by name."""
    offset: int | None = spec.offset(q.shape[2], k.shape[2])
    if extras.cu_seqlens_q is not None:  # None: the bottom right of each sequence
        offset = None if spec.diagonal == "bottom_right" else 0
    drops = extras.dropout_seed is not None
    return {
        "seqlen_q": q.shape[2],
        "seqlen_k": k.shape[2],
        "offset": offset,
        "window_left": spec.window_left,
        "window_right": spec.window_right,
        "softcap": spec.softcap or 1.0,
        "threshold": philox.threshold(spec.dropout_p) if drops else 0,
        "keep_scale": 1 / ((1 - spec.dropout_p) or 1.0),
    }
