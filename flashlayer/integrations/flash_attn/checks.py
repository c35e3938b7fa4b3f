"""Checks and conversion of arguments in flash_attn's names and layouts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

WindowSize = tuple[int, int]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


# The C++ checks of flash_attn raise RuntimeError; this library raises ValueError, TypeError and, if
# an index is out of range, torch's IndexError. These are both, so callers can catch either.
class _FailedValue(ValueError, RuntimeError):
    pass


class _FailedType(TypeError, RuntimeError):
    pass


class _FailedIndex(IndexError, RuntimeError):
    pass


_FAILED = {ValueError: _FailedValue, TypeError: _FailedType, IndexError: _FailedIndex}


def raises_runtime_error(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make the errors of ``function`` instances of ``RuntimeError`` too."""

    @functools.wraps(function)
    def door(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except tuple(_FAILED) as error:
            if isinstance(error, RuntimeError):
                raise
            kind = next(kind for base, kind in _FAILED.items() if isinstance(error, base))
            raise kind(str(error)) from error

    return door


def attention_options(
    softmax_scale: float | None,
    causal: bool,
    window_size: WindowSize,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    """Options of :func:`flashlayer.flash_attention`, with None where flash_attn has -1 or 0."""
    if len(window_size) != 2:
        raise ValueError(f"window_size must be (left, right), got {len(window_size)} numbers")
    left, right = map(as_int, window_size)
    return {
        "scale": softmax_scale,
        "causal": causal,
        "window_size": (None if left < 0 else left, None if right < 0 else right),
        "softcap": softcap if softcap > 0 else None,
        "alibi_slopes": alibi_slopes,
    }


def as_int(number: int | Tensor) -> int:
    """An int; lengths may be ``cu_seqlens.diff().max()``, windows a tensor of two."""
    return int(number) if isinstance(number, Tensor) else number


def has_values(x: Tensor) -> bool:
    """Whether reading the values of ``x`` neither synchronizes a GPU nor breaks a graph."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def unpacked(name: str, x: Tensor, count: int, dim: int) -> tuple[Tensor, ...]:
    """The ``count`` tensors stacked along ``dim`` of one packed tensor."""
    layout = "(tokens, " if dim == 1 else "(batch, sequence, "
    if not isinstance(x, Tensor) or x.ndim != dim + 3 or x.shape[dim] != count:
        raise ValueError(f"{name} must be {layout}{count}, heads, head_dim), got {_shape(x)}")
    return x.unbind(dim)


class Cache(NamedTuple):
    """The cache and what indexes it, as in ``flash_attn_with_kvcache``."""

    k: Tensor
    v: Tensor
    batch_idx: Tensor | None
    leftpad: Tensor | None
    block_table: Tensor | None


def check_qkv(q: Any, k: Any, v: Any, layout: tuple[str, ...]) -> None:
    """Check ``(B, S, H, D)`` or packed ``(T, H, D)``; ``layout`` names the dimensions before H."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        names = _check_layout(name, x, layout)
    if k.shape[-1] != q.shape[-1] or (len(layout) == 2 and k.shape[0] != q.shape[0]):
        raise ValueError(
            f"k must be {names} with q's {'batch and ' if len(layout) == 2 else ''}head_dim, "
            f"got q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    _check_values("k", k, "v", v)
    _check_heads(q, "k's and v's", k)


def _check_layout(name: str, x: Any, layout: tuple[str, ...]) -> str:
    """Check the dimensions before heads and head_dim; returns the names of all."""
    names = f"({', '.join((*layout, 'heads', 'head_dim'))})"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.ndim != len(layout) + 2:
        raise ValueError(f"{name} must be {names}, got {tuple(x.shape)}")
    return names


def _check_values(k_name: str, k: Tensor, v_name: str, v: Tensor) -> None:
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"{v_name} must be {k_name}'s shape but for head_dim, "
            f"got {k_name} {tuple(k.shape)} and {v_name} {tuple(v.shape)}"
        )


def _check_heads(q: Tensor, of_keys: str, k: Tensor) -> None:
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if heads == 0 or kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"q's heads must be a positive multiple of {of_keys}, got {heads} and {kv_heads}"
        )


def check_cache_arguments(
    q: Tensor,
    cache: Cache,
    k: Tensor | None,
    v: Tensor | None,
    rotary: tuple[Tensor | None, Tensor | None],
    cache_seqlens: int | Tensor | None,
) -> None:
    """Check which arguments need each other, and their shapes."""
    paged, batch_idx = cache.block_table is not None, cache.batch_idx
    pages = ("blocks", "page") if paged else ("batch", "sequence")
    _check_layout("q", q, ("batch", "sequence"))
    _check_layout("k_cache", cache.k, pages)
    _check_layout("v_cache", cache.v, pages)
    _check_values("k_cache", cache.k, "v_cache", cache.v)
    if cache.k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k_cache must have q's head_dim {q.shape[3]}, got k_cache {tuple(cache.k.shape)}"
        )
    _check_heads(q, "k_cache's", cache.k)
    cos, sin = rotary
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together")
    if (cos is None) != (sin is None):
        raise ValueError("rotary_cos and rotary_sin must be given together")
    if k is not None and cache_seqlens is None:
        raise ValueError("cache_seqlens must be given with k: it says where k is written")
    if cos is not None and k is None:
        raise ValueError("rotary_cos needs k: the keys in the cache are rotated already")
    if paged and batch_idx is not None:
        raise ValueError("cache_batch_idx can't be combined with block_table, which says as much")
    batch = q.shape[0]
    if not paged and batch_idx is None and cache.k.shape[0] != batch:
        raise ValueError(
            f"k_cache must have query's batch size {batch} without cache_batch_idx, "
            f"got {cache.k.shape[0]}"
        )
    # The indexed write to the cache would broadcast them.
    for name, x, held in (("k", k, cache.k), ("v", v, cache.v)):
        if x is None or k is None:
            continue
        expected = (batch, k.shape[1], *held.shape[2:])
        if x.shape != expected:
            raise ValueError(f"{name} must be {expected} to fit the cache, got {tuple(x.shape)}")
        if x.dtype != held.dtype:
            raise TypeError(f"{name} must be {held.dtype} as {name}_cache, got {x.dtype}")
    if isinstance(cache_seqlens, Tensor) and cache_seqlens.shape != (batch,):
        raise ValueError(
            f"cache_seqlens must be an int or of shape ({batch},), got {tuple(cache_seqlens.shape)}"
        )
    for name, x in (("cache_batch_idx", batch_idx), ("cache_leftpad", cache.leftpad)):
        if x is not None and x.shape != (batch,):
            raise ValueError(f"{name} must be of shape ({batch},), got {_shape(x)}")
    if paged:
        check_block_table(cache.block_table, batch)


def check_block_table(block_table: Any, sequences: int) -> None:
    """Check type and shape: an integer tensor with one row per sequence."""
    if not isinstance(block_table, Tensor) or block_table.dtype not in (torch.int32, torch.int64):
        kind = block_table.dtype if isinstance(block_table, Tensor) else type(block_table).__name__
        raise TypeError(f"block_table must be an int32 or int64 tensor, got {kind}")
    if block_table.ndim != 2 or block_table.shape[0] != sequences:
        raise ValueError(
            f"block_table must be (sequences={sequences}, blocks of a sequence), "
            f"got {tuple(block_table.shape)}"
        )


def check_pages(block_table: Tensor, lengths: Tensor, pages: Tensor, needed_by: str) -> None:
    """Check that the table has room for ``lengths`` ``(N,)`` and names existing pages.

    ``needed_by`` names the arguments that the lengths came from.
    """
    if not (has_values(block_table) and has_values(lengths)):
        return
    blocks, page = pages.shape[:2]
    per_row = block_table.shape[1]
    longest = int(lengths.max()) if len(lengths) else 0
    if longest > per_row * page:
        raise ValueError(
            f"block_table holds {per_row} pages of {page} = {per_row * page} positions a "
            f"sequence, {needed_by} need {longest}"
        )
    used = block_table[page * torch.arange(per_row) < lengths[:, None]]
    wrong = used[(used < 0) | (used >= blocks)]
    if len(wrong):
        raise ValueError(
            f"block_table must name pages 0 to {blocks - 1} of k and v where a sequence has one, "
            f"got {int(wrong[0])}"
        )


def check_cache_lengths(cache: Cache, filled: Tensor, stop: Tensor) -> None:
    """Check the values of the arguments that index the cache, where reading them is free.

    ``filled`` is ``cache_seqlens`` and ``stop`` the same with the new keys, ``(B,)`` each.
    """
    if not has_values(stop) or len(stop) == 0:
        return
    start, rows, (held, capacity) = cache.leftpad, cache.batch_idx, cache.k.shape[:2]
    if cache.block_table is None and int(stop.max()) > capacity:
        raise ValueError(
            f"k_cache holds {capacity} positions, cache_seqlens and k need {int(stop.max())}"
        )
    if int(filled.min()) < 0:
        raise ValueError(f"cache_seqlens must be at least 0, got {int(filled.min())}")
    if start is not None and has_values(start):
        outside = ((start < 0) | (start > stop)).nonzero()
        if len(outside):
            row = int(outside[0])
            raise ValueError(
                f"cache_leftpad must be from 0 to the {int(stop[row])} positions of row {row}, "
                f"got {int(start[row])}"
            )
    if rows is not None and has_values(rows):
        wrong = rows[(rows < 0) | (rows >= held)]
        if len(wrong):
            raise ValueError(
                f"cache_batch_idx must name rows 0 to {held - 1} of the cache, got {int(wrong[0])}"
            )
    if cache.block_table is not None:
        check_pages(cache.block_table, stop, cache.k, "cache_seqlens and k")


def check_rotary(rotary_cos: Tensor, rotary_sin: Tensor, last: Tensor, head_dim: int) -> None:
    """Check the tables ``(positions, R / 2)``; ``last`` ``(B,)`` are the ends of the positions."""
    if rotary_cos.ndim != 2 or rotary_cos.shape != rotary_sin.shape:
        raise ValueError(
            f"rotary_cos and rotary_sin must be (positions, rotated features / 2), "
            f"got {tuple(rotary_cos.shape)} and {tuple(rotary_sin.shape)}"
        )
    if 2 * rotary_cos.shape[1] > head_dim:
        raise ValueError(
            f"rotary_cos must rotate at most head_dim={head_dim} features, "
            f"got {2 * rotary_cos.shape[1]}"
        )
    if has_values(last) and len(last) and int(last.max()) > rotary_cos.shape[0]:
        raise ValueError(
            f"rotary_cos holds {rotary_cos.shape[0]} positions, cache_seqlens and the new tokens "
            f"need {int(last.max())}"
        )


def _shape(x: Any) -> Any:
    return tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
