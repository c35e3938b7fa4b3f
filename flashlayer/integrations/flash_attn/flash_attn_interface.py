"""``flash_attn.flash_attn_interface``: the functions, by :func:`flashlayer.flash_attention`.

The arguments that several functions share:

- ``dropout_p``, ``causal`` (bottom-right aligned) and ``alibi_slopes`` ``(H,)`` or ``(B, H)``: as
  in :func:`flashlayer.flash_attention`.
- ``softmax_scale``: ``D ** -0.5`` if None.
- ``window_size``: ``(left, right)``, -1 for unbounded.
- ``softcap``: 0.0 for none.
- ``deterministic``: ignored, see the package.
- ``return_attn_probs``: return ``(out, softmax_lse, S_dmask)``. ``S_dmask`` is empty, ``(0,)``,
  without dropout; with dropout it holds every probability ``(B, H, Sq, Sk)``, negative where it was
  dropped. That takes O(Sq * Sk) memory and is meant for tests, as in flash_attn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from flashlayer.functional import dropout_keep_mask, flash_attention, flash_attention_varlen
from flashlayer.integrations.flash_attn.checks import (
    WindowSize,
    as_int,
    attention_options,
    check_block_table,
    check_pages,
    check_qkv,
    raises_runtime_error,
    unpacked,
)
from flashlayer.integrations.flash_attn.kvcache import (
    flash_attn_with_kvcache as flash_attn_with_kvcache,
)
from flashlayer.integrations.flash_attn.kvcache import packed_pages
from flashlayer.modules.positions import sequence_ids

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
    options = attention_options(softmax_scale, causal, window_size, softcap, alibi_slopes)
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
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return flash_attn_func(q, k, v, *options, deterministic, return_attn_probs)


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
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return flash_attn_func(q, k, v, *options, deterministic, return_attn_probs)


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

    ``cu_seqlens_q`` and ``cu_seqlens_k``, ``(N + 1,)`` int32, are the boundaries of the sequences;
    ``max_seqlen_q`` and ``max_seqlen_k`` are at least the longest lengths. The arguments from
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
        k, v = (packed_pages(x, block_table, cu_seqlens_k) for x in (k, v))
    check_qkv(q, k, v, ("tokens",))
    options = attention_options(softmax_scale, causal, window_size, softcap, alibi_slopes) | {
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
            sequence, position = _locate(len(q), cu_seqlens_q, max_seqlen_q)
            _, key_position = _locate(len(k), cu_seqlens_k, max_seqlen_k)
            index = key_position.view(-1, 1, 1).expand(-1, k.shape[1], 1)
            eye = q.new_zeros(len(k), k.shape[1], max(max_seqlen_k, 1)).scatter_(2, index, 1)
            packed: Any = flash_attention_varlen(q, k, eye, **options)  # [Tq, H, max_seqlen_k]
            # One more sequence, which takes the tokens past the last boundary.
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
    sizes = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return flash_attn_varlen_func(q, k, v, *sizes, *options, deterministic, return_attn_probs)


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
    sizes = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return flash_attn_varlen_func(q, k, v, *sizes, *options, deterministic, return_attn_probs)


def _dropout(dropout_p: float, return_mask: bool, device: torch.device) -> dict[str, Any]:
    """The dropout options, with an explicit seed if the mask is returned."""
    if dropout_p > 0 and return_mask:
        return {"dropout_p": dropout_p, "dropout_seed": torch.randint(2**63 - 1, (), device=device)}
    return {"dropout_p": dropout_p}


def _longest(max_seqlen: int | Tensor, tokens: Tensor) -> int:
    """A bound on the longest sequence; all tokens if it is a tensor without values."""
    if isinstance(max_seqlen, FakeTensor):
        return tokens.shape[0]
    return as_int(max_seqlen)


def _sign_by_dropout(probabilities: Any, dropout_p: float, dropout_seed: Tensor) -> Tensor:
    batch, heads, rows, keys = probabilities.shape
    device = probabilities.device
    kept = dropout_keep_mask(batch, heads, rows, keys, dropout_p, dropout_seed, device)
    return torch.where(kept, probabilities, -probabilities)


def _locate(tokens: int, cu_seqlens: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Sequence of every token, and its position there, below ``longest`` for every token."""
    token = torch.arange(tokens, device=cu_seqlens.device)
    sequence = sequence_ids(token, cu_seqlens)
    return sequence, (token - cu_seqlens[sequence]).clamp(max=max(longest - 1, 0))
