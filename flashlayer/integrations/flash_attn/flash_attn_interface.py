"""``flash_attn.flash_attn_interface``: the functions, by :func:`flashlayer.flash_attention`.

The arguments that several functions share:

- ``dropout_p``, ``causal`` (bottom-right aligned) and ``alibi_slopes`` ``(H,)`` or ``(B, H)``: as
  in :func:`flashlayer.flash_attention`.
- ``softmax_scale``: ``D ** -0.5`` if None.
- ``window_size``: ``(left, right)``, -1 for unbounded.
- ``softcap``: 0.0 for none.
- ``deterministic``: makes no difference, see the package.
- ``return_attn_probs``: return ``(out, softmax_lse, S_dmask)``. ``S_dmask`` is empty, ``(0,)``,
  without dropout; with dropout it is every probability ``(B, H, Sq, Sk)``, negative where it was
  dropped. That costs O(Sq * Sk) memory and is meant for tests, as in flash_attn.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from flashlayer.functional import dropout_keep_mask, flash_attention, flash_attention_varlen
from flashlayer.integrations.flash_attn.checks import (
    check_block_table,
    check_cache_arguments,
    check_cache_lengths,
    check_pages,
    check_qkv,
    check_rotary,
    raises_runtime_error,
    unpacked,
)
from flashlayer.integrations.flash_attn.layers.rotary import apply_rotary_emb

WindowSize = tuple[int, int]
Result = Tensor | tuple[Tensor, Tensor, Tensor]


@raises_runtime_error
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention of ``q`` ``(B, Sq, H, D)`` over ``k``, ``v`` ``(B, Sk, Hkv, D)``.

    The other arguments are described in this module's docstring.

    Returns:
        ``(B, Sq, H, D)``; with ``return_attn_probs`` also ``softmax_lse`` ``(B, H, Sq)`` and
        ``S_dmask``.
    """
    check_qkv(q, k, v, ("batch", "sequence"))
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    dropout = _dropout(dropout_p, return_attn_probs, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    result = flash_attention(q, k, v, **options, **dropout, return_lse=return_attn_probs)
    if isinstance(result, Tensor):
        return result.transpose(1, 2).contiguous()
    out, lse = result
    probabilities = q.new_empty(0)
    if dropout_p > 0:
        with torch.no_grad():
            eye = torch.eye(k.shape[2], dtype=q.dtype, device=q.device)
            probabilities = flash_attention(q, k, eye.expand(*k.shape[:2], -1, -1), **options)
            probabilities = _sign_by_dropout(probabilities, **dropout)
    return out.transpose(1, 2).contiguous(), lse, probabilities


@raises_runtime_error
def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` with keys and values in one tensor ``(B, Sk, 2, Hkv, D)``."""
    k, v = unpacked("kv", kv, 2, 2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


@raises_runtime_error
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` with all three in one tensor ``(B, S, 3, H, D)``."""
    q, k, v = unpacked("qkv", qkv, 3, 2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


@raises_runtime_error
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Attention over packed sequences, ``q`` ``(Tq, H, D)``, ``k`` and ``v`` ``(Tk, Hkv, D)``.

    ``cu_seqlens_q`` and ``cu_seqlens_k``, ``(N + 1,)`` int32, say where the sequences begin and
    end; ``max_seqlen_q`` and ``max_seqlen_k`` are the longest lengths, or more. The arguments from
    ``dropout_p`` on are described in this module's docstring.

    With ``block_table`` ``(N, blocks of a sequence)`` int32, ``k`` and ``v`` are pages ``(blocks,
    page, Hkv, D)`` and ``cu_seqlens_k`` is the running sum of the key lengths. The pages are copied
    into packed keys for the call, O(Tk).

    Returns:
        ``(Tq, H, D)``; with ``return_attn_probs`` also ``softmax_lse`` ``(H, Tq)`` and ``S_dmask``
        ``(N, H, max_seqlen_q, max_seqlen_k)``.
    """
    if block_table is not None:
        check_block_table(block_table, len(cu_seqlens_k) - 1)
        check_pages(block_table, cu_seqlens_k.diff(), k, "cu_seqlens_k")
        k, v = (_packed_pages(x, block_table, cu_seqlens_k) for x in (k, v))
    check_qkv(q, k, v, ("tokens",))
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes) | {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": (max_seqlen_q := _longest(max_seqlen_q, q)),
        "max_seqlen_k": (max_seqlen_k := _longest(max_seqlen_k, k)),
    }
    dropout = _dropout(dropout_p, return_attn_probs, q.device)
    result = flash_attention_varlen(q, k, v, **options, **dropout, return_lse=return_attn_probs)
    if isinstance(result, Tensor):
        return result.contiguous()
    out, lse = result
    probabilities = q.new_empty(0)
    if dropout_p > 0:
        with torch.no_grad():
            sequence, position = _unpack(len(q), cu_seqlens_q, max_seqlen_q)
            _, key_position = _unpack(len(k), cu_seqlens_k, max_seqlen_k)
            index = key_position.view(-1, 1, 1).expand(-1, k.shape[1], 1)
            eye = q.new_zeros(len(k), k.shape[1], max(max_seqlen_k, 1)).scatter_(2, index, 1)
            packed: Any = flash_attention_varlen(q, k, eye, **options)  # [Tq, H, max_seqlen_k]
            # One sequence more, for the tokens past the last one.
            shape = len(cu_seqlens_q), max(max_seqlen_q, 1), q.shape[1], packed.shape[2]
            probabilities = q.new_zeros(shape)
            probabilities[sequence, position] = packed
            probabilities = probabilities[:-1, :max_seqlen_q, :, :max_seqlen_k].transpose(1, 2)
            probabilities = _sign_by_dropout(probabilities, **dropout)
    return out.contiguous(), lse, probabilities


@raises_runtime_error
def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_varlen_func`, keys and values in one tensor ``(Tk, 2, Hkv, D)``."""
    k, v = unpacked("kv", kv, 2, 1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


@raises_runtime_error
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_varlen_func` with all three in one tensor ``(T, 3, H, D)``."""
    q, k, v = unpacked("qkv", qkv, 3, 1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


@raises_runtime_error
@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append new keys and values to a cache, in place, and attend to all of it. No gradient.

    A contiguous cache is read where it lies; one that is a slice of a longer buffer, is indexed by
    ``cache_batch_idx`` or is paged is copied for the call, O(B * capacity).

    Args:
        q: ``(B, Sq, H, D)``.
        k_cache: ``(B, capacity, Hkv, D)``; with ``block_table`` pages, ``(blocks, page, Hkv, D)``.
        v_cache: likewise.
        k: ``(B, Snew, Hkv, D)``, written to the cache from position ``cache_seqlens`` on.
        v: likewise.
        rotary_cos: ``(positions, R / 2)``: rotate ``k``, and ``q``, by position before that; needs
            ``k``. With ``causal`` or a window query ``i`` is at position ``cache_seqlens + i``,
            else every query at ``cache_seqlens``.
        rotary_sin: likewise.
        cache_seqlens: positions that are filled, an int or ``(B,)``; all if None.
        cache_batch_idx: ``(B,)``, which row of the cache belongs to which query.
        cache_leftpad: ``(B,)``, positions at the start of each row to be ignored.
        block_table: ``(B, blocks of a sequence)``, which pages hold a sequence.
        softmax_scale: ``D ** -0.5`` if None.
        causal: the last query sees all keys, the one before all but the last.
        window_size: ``(left, right)``, -1 for unbounded.
        softcap: 0.0 for none.
        rotary_interleaved: pair features 0 and 1 rather than ``i`` and ``i + R / 2``.
        alibi_slopes: ``(H,)`` or ``(B, H)``.
        num_splits: makes no difference.
        return_softmax_lse: also return the log-sum-exp.

    Returns:
        ``(B, Sq, H, D)``; with ``return_softmax_lse`` also ``(B, H, Sq)``.

    Raises:
        ValueError: an argument that another one needs is missing, the cache or the block table is
            too short, or names what is not there; a RuntimeError as well.
    """
    check_cache_arguments(
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos,
        rotary_sin,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        block_table,
    )
    batch, seqlen_q, heads, head_dim = q.shape
    page = k_cache.shape[1]
    capacity = page if block_table is None else page * block_table.shape[1]
    filled = capacity if cache_seqlens is None else cache_seqlens
    if not isinstance(filled, Tensor):
        filled = torch.full((batch,), filled, device=q.device)
    filled = filled.long()
    stop = filled if k is None else filled + k.shape[1]
    check_cache_lengths(cache_leftpad, filled, stop, k_cache, cache_batch_idx, block_table)
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    if k is not None and v is not None:
        if rotary_cos is not None and rotary_sin is not None:
            by_position = causal or options["window_size"] != (None, None)
            last = torch.maximum(stop, filled + seqlen_q) if by_position else stop
            check_rotary(rotary_cos, rotary_sin, last, head_dim)
            rotary = (rotary_cos, rotary_sin, rotary_interleaved, False, filled)
            k = apply_rotary_emb(k, *rotary)
            if by_position:
                q = apply_rotary_emb(q, *rotary)
            else:  # every query at one position: they count as heads of one token
                q = apply_rotary_emb(q.flatten(1, 2).unsqueeze(1), *rotary).view_as(q)
        _write(k_cache, v_cache, k, v, filled, cache_batch_idx, block_table)
    if block_table is not None:
        used = _used_blocks(block_table, stop, page)
        k_cache, v_cache = (x[used].flatten(1, 2) for x in (k_cache, v_cache))
    elif cache_batch_idx is not None:
        k_cache, v_cache = k_cache[cache_batch_idx], v_cache[cache_batch_idx]
    # The caches, one after the other, as packed sequences: what is before a row's first position
    # and after its last are sequences of their own, which no query belongs to.
    row = torch.arange(batch, device=q.device)
    start = torch.zeros_like(stop) if cache_leftpad is None else cache_leftpad
    k_edges = torch.stack((torch.zeros_like(stop), start, stop), dim=1) + capacity * row[:, None]
    q_edges = torch.stack((row, row, row + 1), dim=1) * seqlen_q
    if alibi_slopes is not None and alibi_slopes.ndim == 2:
        options["alibi_slopes"] = alibi_slopes.repeat_interleave(3, dim=0)
    out, lse = flash_attention_varlen(
        q.flatten(0, 1),
        k_cache.flatten(0, 1),
        v_cache.flatten(0, 1),
        cu_seqlens_q=_closed(q_edges, batch * seqlen_q),
        cu_seqlens_k=_closed(k_edges, batch * capacity),
        max_seqlen_q=seqlen_q,
        max_seqlen_k=capacity,
        return_lse=True,
        **options,
    )
    out = out.reshape(batch, seqlen_q, heads, -1)
    lse = lse.view(heads, batch, seqlen_q).transpose(0, 1).contiguous()
    return (out, lse) if return_softmax_lse else out


def _write(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    filled: Tensor,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
) -> None:
    """The new keys and values behind the ``filled`` positions of each row, in place."""
    position = filled[:, None] + torch.arange(k.shape[1], device=k.device)  # [B, Snew]
    if block_table is not None:
        page = k_cache.shape[1]
        row, position = block_table.long().gather(1, position // page), position % page
    elif cache_batch_idx is not None:
        row = cache_batch_idx[:, None]
    else:
        row = torch.arange(len(k), device=k.device)[:, None]
    for cache, new in ((k_cache, k), (v_cache, v)):
        with _writable(cache):
            cache[row, position] = new


def _writable(cache: Tensor) -> AbstractContextManager[Any]:
    """Only inference mode may write to a tensor that was made in it; Dynamo can't ask for it."""
    if not torch.compiler.is_compiling() and cache.is_inference():
        return torch.inference_mode()
    return nullcontext()


def _options(
    softmax_scale: float | None,
    causal: bool,
    window_size: WindowSize,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    """From flash_attn's way of saying "none" to flashlayer's."""
    if len(window_size) != 2:
        raise ValueError(f"window_size must be (left, right), got {len(window_size)} numbers")
    left, right = map(_integer, window_size)
    return {
        "scale": softmax_scale,
        "causal": causal,
        "window_size": (None if left < 0 else left, None if right < 0 else right),
        "softcap": softcap if softcap > 0 else None,
        "alibi_slopes": alibi_slopes,
    }


def _dropout(dropout_p: float, show: bool, device: torch.device) -> dict[str, Any]:
    """With a seed of our own where the mask is to be shown."""
    if dropout_p > 0 and show:
        return {"dropout_p": dropout_p, "dropout_seed": torch.randint(2**63 - 1, (), device=device)}
    return {"dropout_p": dropout_p}


def _integer(number: int | Tensor) -> int:
    """Lengths also come as ``cu_seqlens.diff().max()``, windows as a tensor of two."""
    return int(number) if isinstance(number, Tensor) else number


def _longest(max_seqlen: int | Tensor, tokens: Tensor) -> int:
    """A bound on the longest sequence; of a tensor without values, all tokens."""
    if isinstance(max_seqlen, FakeTensor):
        return tokens.shape[0]
    return _integer(max_seqlen)


def _sign_by_dropout(probabilities: Any, dropout_p: float, dropout_seed: Tensor) -> Tensor:
    batch, heads, rows, keys = probabilities.shape
    device = probabilities.device
    kept = dropout_keep_mask(batch, heads, rows, keys, dropout_p, dropout_seed, device)
    return torch.where(kept, probabilities, -probabilities)


def _unpack(tokens: int, cu_seqlens: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Sequence of every token, and its position there; both of tokens past the last are bounded."""
    token = torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    return sequence, (token - cu_seqlens[sequence]).clamp(max=max(longest - 1, 0))


def _packed_pages(pages: Tensor, block_table: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``(blocks, page, Hkv, D)`` to the packed ``(Tk, Hkv, D)``."""
    page, per_row = pages.shape[1], block_table.shape[1]
    # Where the sum of the lengths can't be read there are as many tokens as the table holds: those
    # past the last sequence take no part.
    tokens = int(cu_seqlens[-1]) if _is_readable(cu_seqlens) else page * block_table.numel()
    token = torch.arange(tokens, device=pages.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    inside = sequence < block_table.shape[0]
    sequence = torch.where(inside, sequence, 0)
    position = torch.where(inside, token - cu_seqlens[sequence], 0)
    used = _used_blocks(block_table, cu_seqlens.diff(), page)
    return pages[used[sequence, (position // page).clamp(max=per_row - 1)], position % page]


def _is_readable(x: Tensor) -> bool:
    return not isinstance(x, FakeTensor) and not torch.compiler.is_compiling()


def _used_blocks(block_table: Tensor, lengths: Tensor, page: int) -> Tensor:
    """The table with 0 where a sequence has no page: what stands there may be any number."""
    start = page * torch.arange(block_table.shape[1], device=block_table.device)
    return torch.where(start < lengths[:, None], block_table, 0)


def _closed(edges: Tensor, total: int) -> Tensor:
    """``cu_seqlens`` from where the sequences begin, and where the last one ends."""
    return torch.cat((edges.flatten(), edges.new_full((1,), total))).to(torch.int32)
