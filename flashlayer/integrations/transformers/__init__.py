"""Hugging Face transformers: an attention function and a mask function of our own.

transformers asks two functions by the name of the attention implementation. The *mask function*
hears what a model means (causal, a window, padding, packed sequences, where in the cache the
queries stand) and answers with a mask; the *attention function* gets that mask next to query, key
and value. The answer here is a :class:`BandMask`: for everybody else a bool tensor
``(B, 1, Sq, Sk)``, for the attention function a band, a row of padding or packed boundaries, so
nothing of size ``Sq x Sk`` is made. A pattern that is none of these becomes a :class:`DenseMask`
with the values that SDPA would get. Both raise when a model reads them in its own way. The mask
function never answers None, so a None that reaches the attention function is the model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from flashlayer.functional import flash_attention, flash_attention_varlen
from flashlayer.integrations.transformers.masks import (
    Band,
    BandMask,
    DenseMask,
    GuardedMask,
    Packing,
)
from flashlayer.integrations.transformers.patterns import band_mask, recognise
from flashlayer.integrations.transformers.tables import knows_is_causal, refuse_tables

# transformers takes every name with "flash" in it for one of flash_attn's; the case saves this one.
NAME = "FlashLayer"

# Options that change the result in a way that is none of flash_attention's.
UNSUPPORTED = {
    "cache": "a paged cache (continuous batching) must be read in its own layout",
    "block_table": "a paged cache must be read in its own layout",
    "indices": "keys chosen query by query are no mask",
    "block_indices": "blocks of keys chosen query by query are no mask",
    "sinks": "there is one sink a head (s_aux), not one a query",
    "output_attentions": "the attention weights are never stored; use 'eager' to see them",
}


def register() -> str:
    """Make flashlayer known to transformers and return the name it goes by.

    Pass the name as ``attn_implementation`` to ``from_config`` or ``from_pretrained``, or to
    ``model.set_attn_implementation``. Registering twice changes nothing. Models that choose their
    attention from a table of classes (GPT-Neo, GPT-J, Falcon) are refused when they are built with
    the name: a check in ``PreTrainedModel.get_correct_attn_implementation`` that looks at this name
    alone.

    Raises:
        ImportError: transformers is not installed.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_config(config, attn_implementation=register())
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "flashlayer.integrations.transformers needs transformers: "
            "pip install 'flashlayer[hf]' or pip install 'transformers>=5.23'"
        ) from error
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, make_mask)
    refuse_tables(NAME)
    return NAME


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
        module: the attention module: whether it trains, and which model it is of.
        query: ``(B, H, Sq, D)``; a batch of 1 is broadcast to the keys'.
        key: ``(B, Hkv, Sk, D)``.
        value: ``(B, Hkv, Sk, Dv)``.
        attention_mask: what :func:`make_mask` made, or the user's own 4-D mask, bool or added to
            the scores. A mask says it all; ``is_causal`` and ``sliding_window`` count without one.
        scaling: factor on the scores, ``D ** -0.5`` if None.
        dropout: probability; acts while ``module`` trains.
        is_causal: without a mask, whether the attention is causal; ``module.is_causal`` if None.
        sliding_window: without a mask, how many keys a query sees, its own included.
        softcap: as in :func:`flashlayer.flash_attention`.
        s_aux: ``(H,)``: the sinks of gpt-oss, differentiable.
        position_bias: broadcastable to ``(B, H, Sq, Sk)``, added to the scores, differentiable.
        position_ids: ``(B, Sq)``: where they restart a new sequence begins, without a past and if
            the model was given no ``attention_mask``. While compiling that is a dense mask.
        cu_seq_lens_q: ``(N + 1,)``: boundaries of the sequences packed along ``B * Sq``.
        cu_seq_lens_k: the same of the keys; ``cu_seq_lens_q`` if None.
        max_length_q: the longest query sequence.
        max_length_k: the longest key sequence.
        **others: what else the model hands on; what would change the result is refused.

    Returns:
        ``(B, Sq, H, Dv)``, contiguous; and None in the place of the weights.

    Raises:
        ValueError: something can't be done; the message names the model and the option.
        TypeError: likewise, for a dtype or a type.
    """
    config = getattr(module, "config", None)
    for option, reason in UNSUPPORTED.items():
        asked = others.get(option)
        if option == "output_attentions":
            # Some layers (Whisper's) hand on their own default, False, whatever the config says.
            asked = asked or getattr(config, option, None)
        if asked is not None and asked is not False:
            _refuse(module, option, reason)
    if query.shape[0] == 1:
        query = query.expand(key.shape[0], -1, -1, -1)
    packing = None
    if cu_seq_lens_q is not None:
        packing = Packing(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    if isinstance(attention_mask, DenseMask):
        attention_mask = attention_mask.dense()
    if attention_mask is None:
        band = _band_without_mask(module, query, key, is_causal, sliding_window, packing)
        shape = (key.shape[0], 1, query.shape[2], key.shape[2])
        attention_mask = BandMask(shape, key.device, band, packable=True)
    if attention_mask.ndim != 4:
        _refuse(module, "attention_mask", f"it must have 4 dimensions, got {attention_mask.ndim}")
    if packing is not None:
        _check_packing(module, attention_mask, position_bias)
    elif isinstance(attention_mask, BandMask):
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        attention_mask = attention_mask.separated(position_ids, causal)
        if isinstance(attention_mask, BandMask) and position_bias is None:
            packing = attention_mask.packing
    options = {
        "scale": scaling,
        "softcap": softcap,
        "sinks": s_aux,
        "dropout_p": dropout if module.training else 0.0,
    }
    try:
        if packing is not None and isinstance(attention_mask, BandMask):
            out = _attend_packed(query, key, value, attention_mask.band, packing, options)
        else:
            out = _attend(query, key, value, attention_mask, position_bias, options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{_name(module)}: {error}") from error
    return out, None


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **_: Any,
) -> GuardedMask:
    """The mask function, as ``transformers.masking_utils`` calls it.

    Args:
        batch_size: ``B``.
        q_length: ``Sq``.
        kv_length: ``Sk``; of a static cache all there is room for.
        q_offset: position of the first query.
        kv_offset: position of the first key.
        mask_function: of batch, head, query position and key position; None is causal.
        attention_mask: bool ``(B, positions)``, False for padding.
        allow_is_causal_skip: False (for a causal mask) when what takes the mask may be compiled.
        use_vmap: ``mask_function`` is the user's and may compute anything.
        device: where the mask is needed.
        config: of the model that asks; its type is named if the model misreads the mask.

    Returns:
        A :class:`BandMask`, or a :class:`DenseMask` ``(B, 1, Sq, Sk)`` where the pattern is no
        band.
    """
    from transformers import masking_utils

    owner = getattr(config, "model_type", None) or "model"
    mask_function = mask_function or masking_utils.causal_mask_function
    pattern = None if use_vmap else recognise(mask_function)
    # A decoding step that may be compiled gets O(Sk) of dense mask: a band's numbers change with
    # every token, and each change would compile anew.
    if pattern is not None and q_length == 1 and pattern.right == 0 and not allow_is_causal_skip:
        pattern = None
    if pattern is not None:
        shape = (batch_size, 1, q_length, kv_length)
        device = torch.device(device)
        banded = band_mask(pattern, attention_mask, shape, q_offset, kv_offset, device, owner)
        if banded is not None:
            return banded
    mask: Tensor = masking_utils.sdpa_mask(  # pyright: ignore[reportAssignmentType]
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # pyright: ignore[reportArgumentType]
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device,
    )
    # A graph can't look into a window's closure, but restarting positions still count there.
    without_past = 1 < q_length == kv_length and not isinstance(q_offset, Tensor) and q_offset == 0
    packable = attention_mask is None and not use_vmap and without_past
    if packable and torch.compiler.is_compiling():
        shape = (batch_size, 1, q_length, kv_length)
        everything = Band((None, None), "bottom_right", kv_length)
        return BandMask(shape, mask.device, everything, pattern=mask, packable=True, owner=owner)
    return DenseMask(mask, owner)


def _band_without_mask(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    is_causal: bool | None,
    sliding_window: int | None,
    packing: Packing | None,
) -> Band:
    """What None means: the model made no mask, so there is nothing but ``is_causal`` to go by."""
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
        _refuse(
            module,
            "attention_mask=None",
            f"is_causal, and no mask says where {seqlen_q} queries stand among {seqlen_k} keys",
        )
    window = (None, 0) if causal else (None, None)
    return Band(window, "bottom_right", seqlen_k)


def _check_packing(module: nn.Module, mask: Tensor, position_bias: Tensor | None) -> None:
    band_alone = (
        isinstance(mask, BandMask)
        and mask.padding is None
        and mask.pattern is None
        and not mask.band.chunked
    )
    if not band_alone:
        _refuse(module, "cu_seq_lens_q", "packed sequences have no padding, and no mask but a band")
    if position_bias is not None:
        _refuse(module, "cu_seq_lens_q", "packed sequences can't have a position_bias")


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    position_bias: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """Dense attention; the band as geometry, its padding as a mask of one row."""
    if isinstance(mask, BandMask):
        sizes = (query.shape[2], key.shape[2])
        if any(size not in (1, wanted) for size, wanted in zip(mask.shape[2:], sizes, strict=True)):
            raise ValueError(
                f"attention_mask is for {tuple(mask.shape[2:])} queries and keys, got {sizes}"
            )
        if mask.shape[2:] != sizes or mask.cu_seqlens is not None or mask.pattern is not None:
            mask = mask.dense()
    if isinstance(mask, BandMask):
        keys, padding = mask.band.keys, mask.padding
        options = options | {"window_size": mask.band.window, "diagonal": mask.band.diagonal}
        if position_bias is not None and position_bias.shape[-1] > 1:
            position_bias = position_bias[..., :keys]
        key, value = key[:, :, :keys], value[:, :, :keys]
        attn_mask = None if padding is None else padding[:, None, None, :]
    else:
        attn_mask = mask
    if position_bias is None:
        bias = attn_mask
    elif attn_mask is None:
        bias = position_bias
    elif attn_mask.dtype == torch.bool:
        bias = torch.where(attn_mask, position_bias, -torch.inf)
    else:
        bias = position_bias + attn_mask
    out = flash_attention(query, key, value, attn_mask=bias, **options)
    return out.transpose(1, 2).contiguous()  # pyright: ignore[reportAttributeAccessIssue]


def _attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    band: Band,
    packing: Packing,
    options: dict[str, Any],
) -> Tensor:
    """Attention within sequences packed along the batch and the sequence dimension."""
    out = flash_attention_varlen(
        *(x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)),
        **packing._asdict(),
        window_size=band.window,
        diagonal=band.diagonal,
        **options,
    )
    return out.unflatten(0, (query.shape[0], -1)).contiguous()  # pyright: ignore


def _refuse(module: nn.Module, option: str, reason: str) -> NoReturn:
    raise ValueError(f"{_name(module)}: flashlayer can't do {option}: {reason}")


def _name(module: nn.Module) -> str:
    """The model's type and the class of its attention."""
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    return f"{model_type or 'model'} ({type(module).__name__})"
