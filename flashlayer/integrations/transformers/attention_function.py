"""The attention function that transformers calls."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from flashlayer.functional import flash_attention, flash_attention_varlen
from flashlayer.integrations.transformers.masks import (
    DenseMask,
    Window,
    WindowMask,
    keys_in_use,
)
from flashlayer.integrations.transformers.tables import knows_is_causal
from flashlayer.masks import IntervalMask
from flashlayer.problem import Packing

# Options that change the result and have no equivalent in flash_attention.
UNSUPPORTED = {
    "cache": "a paged cache (continuous batching) must be read in its own layout",
    "block_table": "a paged cache must be read in its own layout",
    "indices": "keys chosen query by query are no mask",
    "block_indices": "blocks of keys chosen query by query are no mask",
    "sinks": "there is one sink a head (s_aux), not one a query",
    "output_attentions": "the attention weights are never stored; use 'eager' to see them",
}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function, as the models of transformers call it.

    Args:
        module: the attention module, for its training mode and its model's name in errors.
        query: ``(B, H, Sq, D)``; a batch of 1 is broadcast to the keys'.
        key: ``(B, Hkv, Sk, D)``.
        value: ``(B, Hkv, Sk, Dv)``.
        attention_mask: what :func:`make_mask` made, or the user's own 4-D mask, bool or added to
            the scores. With a mask, ``is_causal`` and ``sliding_window`` are ignored.
        scaling: factor on the scores, ``D ** -0.5`` if None.
        dropout: probability; applied while ``module`` trains.
        is_causal: without a mask, whether the attention is causal; ``module.is_causal`` if None.
        sliding_window: without a mask, the number of visible keys, the query's own included.
        softcap: as in :func:`flashlayer.flash_attention`.
        s_aux: ``(H,)``: the sinks of gpt-oss, differentiable.
        position_bias: broadcastable to ``(B, H, Sq, Sk)``, added to the scores, differentiable.
        position_ids: ``(B, Sq)``: each restart begins a new sequence, without a past and if the
            model was given no ``attention_mask``.
        cu_seq_lens_q: ``(N + 1,)``: boundaries of the sequences packed along ``B * Sq``.
        cu_seq_lens_k: the same of the keys; ``cu_seq_lens_q`` if None.
        max_length_q: the longest query sequence.
        max_length_k: the longest key sequence.
        **others: ignored, but for options that would change the result, which raise.

    Returns:
        ``(B, Sq, H, Dv)``, contiguous; and None in place of the weights.

    Raises:
        ValueError: an option can't be computed; the message names it and the model.
        TypeError: likewise, for a dtype or a type.
    """
    config = getattr(module, "config", None)
    for option, reason in UNSUPPORTED.items():
        value_given = others.get(option)
        if option == "output_attentions":
            # Some layers (Whisper's) pass their own default, False, instead of the config's value.
            value_given = value_given or getattr(config, option, None)
        if value_given is not None and value_given is not False:
            _refuse(module, option, reason)
    if query.shape[0] == 1 < key.shape[0]:
        query = query.expand(key.shape[0], -1, -1, -1)
    packing = None
    if cu_seq_lens_q is not None:
        packing = Packing(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    if isinstance(attention_mask, DenseMask):
        attention_mask = attention_mask.dense()
    if attention_mask is None:
        window = _window_without_mask(module, query, key, is_causal, sliding_window, packing)
        shape = (key.shape[0], 1, query.shape[2], key.shape[2])
        attention_mask = WindowMask(shape, key.device, window._replace(packable=True))
    if attention_mask.ndim != 4:
        _refuse(module, "attention_mask", f"it must have 4 dimensions, got {attention_mask.ndim}")
    if packing is not None:
        if not _is_window_only(attention_mask):
            reason = "packed sequences have no padding, and no mask but a window"
            _refuse(module, "cu_seq_lens_q", reason)
        if position_bias is not None:
            _refuse(module, "cu_seq_lens_q", "packed sequences can't have a position_bias")
    elif isinstance(attention_mask, WindowMask):
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        attention_mask = attention_mask.separated(position_ids, causal)
        if isinstance(attention_mask, WindowMask) and position_bias is None:
            packing = attention_mask.packing
    options = {
        "scale": scaling,
        "softcap": softcap,
        "sinks": s_aux,
        "dropout_p": dropout if module.training else 0.0,
    }
    try:
        if packing is not None and isinstance(attention_mask, WindowMask):
            # Within sequences packed along the batch and the sequence dimension.
            packed = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
            options |= attention_mask.window.options()
            out: Any = flash_attention_varlen(*packed, **packing._asdict(), **options)
            out = out.unflatten(0, (query.shape[0], -1)).contiguous()
        else:
            out = _attend(query, key, value, attention_mask, position_bias, options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{_name(module)}: {error}") from error
    return out, None


def _window_without_mask(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    is_causal: bool | None,
    sliding_window: int | None,
    packing: Packing | None,
) -> Window:
    """The window of a call whose model made no mask, so that only ``is_causal`` describes it."""
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    if causal is None and seqlen_q > 1:
        _refuse(module, "attention_mask=None", "neither is_causal nor the module says what it is")
    ambiguous = causal and is_causal is None and seqlen_q > 1 and packing is None
    if ambiguous and not knows_is_causal(type(module).__module__):
        _refuse(module, "attention_mask=None", "SDPA takes it for causal, and eager for no mask")
    if sliding_window is not None and sliding_window < seqlen_k:
        _refuse(module, "sliding_window", "it comes without a mask to say where the queries stand")
    if causal and seqlen_q not in (1, seqlen_k) and packing is None:
        where = f"where {seqlen_q} queries stand among {seqlen_k} keys"
        _refuse(module, "attention_mask=None", f"is_causal, and no mask says {where}")
    return Window((None, 0) if causal else (None, None), "bottom_right")


def _is_window_only(mask: Tensor) -> bool:
    if not isinstance(mask, WindowMask):
        return False
    return mask.padding is None and mask.intervals is None and mask.pattern is None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    position_bias: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """Dense attention; a window mask as window_size and O(Sk) of attn_mask."""
    attn_mask: Any = mask
    if isinstance(mask, WindowMask):
        has_bias = position_bias is not None
        signature = query.shape[2], key.shape[2], query.dtype, has_bias
        # Symbolic sizes can't be looked up: a compiler's, or those of another tracer.
        symbolic = any(isinstance(size, torch.SymInt) for size in signature[:2])
        if torch.compiler.is_compiling() or symbolic:
            found = _arguments(mask, *signature)
        elif (found := mask.arguments.get(signature)) is None:
            # All layers of a step share the mask: in a short step this took half of their time.
            found = mask.arguments[signature] = _arguments(mask, *signature)
        keys, attn_mask, window = found
        options = options | window
        if keys < key.shape[2]:
            key, value = key[:, :, :keys], value[:, :, :keys]
            if has_bias and position_bias.shape[-1] > 1:
                position_bias = position_bias[..., :keys]
    if position_bias is None or attn_mask is None:
        bias = attn_mask if position_bias is None else position_bias
    elif attn_mask.dtype == torch.bool:
        bias = torch.where(attn_mask, position_bias, -torch.inf)
    else:
        bias = position_bias + attn_mask
    out = flash_attention(query, key, value, attn_mask=bias, **options)
    return out.transpose(1, 2).contiguous()  # pyright: ignore[reportAttributeAccessIssue]


def _arguments(
    mask: WindowMask, seqlen_q: int, seqlen_k: int, dtype: torch.dtype, has_bias: bool
) -> tuple[int, Any, dict[str, Any]]:
    """How many keys are used of a call with this mask, its ``attn_mask``, and its window."""
    sizes = (seqlen_q, seqlen_k)
    if any(size not in (1, wanted) for size, wanted in zip(mask.shape[2:], sizes, strict=True)):
        raise ValueError(
            f"attention_mask is for {tuple(mask.shape[2:])} queries and keys, got {sizes}"
        )
    is_dense = mask.shape[2:] != sizes or mask.cu_seqlens is not None
    is_dense |= mask.pattern is not None
    if is_dense or (mask.intervals is not None and has_bias):
        return seqlen_k, mask.dense(), {}
    attn_mask: Any = None if mask.padding is None else mask.padding[:, None, None, :]
    if attn_mask is not None and seqlen_q == 1 and attn_mask.is_cpu and not has_bias:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(dtype)  # as ATen's kernel takes it
    if mask.intervals is not None:
        attn_mask = IntervalMask.made(mask.intervals, seqlen_q, "transformers")
    return keys_in_use(mask), attn_mask, mask.window.options()


def _refuse(module: nn.Module, option: str, reason: str) -> NoReturn:
    raise ValueError(f"{_name(module)}: flashlayer can't do {option}: {reason}")


def _name(module: nn.Module) -> str:
    """The model's type and the class of its attention."""
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    return f"{model_type or 'model'} ({type(module).__name__})"
