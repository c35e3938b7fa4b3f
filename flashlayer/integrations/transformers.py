"""Hugging Face transformers: an attention function and a mask function of our own.

transformers asks two functions by the name of the attention implementation. The *mask function*
hears what a model means (causal, a window, padding, packed sequences, where in the cache the
queries stand) and answers with a mask; the *attention function* gets that mask next to query, key
and value. The answer here is a :class:`BandMask`: for everybody else a bool tensor
``(B, 1, Sq, Sk)``, for the attention function a band, a row of padding or packed boundaries, so
nothing of size ``Sq x Sk`` is made. A pattern that is none of these becomes the dense bool mask
that SDPA would get. The mask function never answers None, so a None that reaches the attention
function is the model's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from flashlayer.functional import WindowSize, flash_attention, flash_attention_varlen

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
    ``model.set_attn_implementation``. Registering twice changes nothing.

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
    **_: Any,
) -> Tensor:
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

    Returns:
        A :class:`BandMask`, or a plain bool mask ``(B, 1, Sq, Sk)`` where the pattern is no band.
    """
    from transformers import masking_utils

    mask_function = mask_function or masking_utils.causal_mask_function
    pattern = None if use_vmap else _recognise(mask_function)
    # A decoding step that may be compiled gets O(Sk) of plain mask: a band's numbers change with
    # every token, and each change would compile anew.
    if pattern is not None and q_length == 1 and pattern.right == 0 and not allow_is_causal_skip:
        pattern = None
    if pattern is not None:
        shape = (batch_size, 1, q_length, kv_length)
        device = torch.device(device)
        banded = _band_mask(pattern, attention_mask, shape, q_offset, kv_offset, device)
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
        return BandMask(shape, mask.device, everything, pattern=mask, packable=True)
    return mask


class Band(NamedTuple):
    """Which keys a query sees, in the terms of :func:`flashlayer.flash_attention`.

    Attributes:
        window: keys to the left and right of a query's own position; ``(None, 0)`` is causal.
        diagonal: where a query's own position is among the first ``keys`` keys.
        keys: how many keys there are to see: a static cache holds room for more.
        chunked: the packed sequences are chunks of longer ones.
    """

    window: WindowSize
    diagonal: Literal["bottom_right", "top_left"]
    keys: int
    chunked: bool = False


class Packing(NamedTuple):
    """Boundaries of packed sequences, as :func:`flashlayer.flash_attention_varlen` has them."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None


# A model that never asks for flashlayer's attention has a mask from it all the same, if it was made
# with our name. Eager's is added to the scores, or hides where it is not zero: for a bool mask that
# would be no mask and the opposite.
_aten = torch.ops.aten
OTHER_READINGS = (_aten.add, _aten.add_, _aten.masked_fill, _aten.masked_fill_)


class BandMask(Tensor):
    """A bool mask ``(B, 1, Sq, Sk)``, True = attend, that is made only if somebody reads it.

    Until then it is a :class:`Band` and at most O(Sk) of tensors. Moving it to another device keeps
    that; every other operation works on the dense mask, so code that slices or combines masks
    gets what it expects.

    Attributes:
        padding: bool ``(B, band.keys)``, False for padding; None without any.
        cu_seqlens: boundaries of the sequences packed along ``B * Sq``; None for one a row.
        pattern: bool ``(B or 1, 1, Sq, Sk)``, what the band does not say; None if it says all.
    """

    padding: Tensor | None
    cu_seqlens: Tensor | None
    pattern: Tensor | None

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], device: torch.device, *_: Any, **__: Any) -> BandMask:
        """A tensor of this shape without storage."""
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)

    def __init__(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        band: Band,
        padding: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        anchor: Tensor | None = None,
        pattern: Tensor | None = None,
        packable: bool = False,
    ) -> None:
        # For a graph that makes or takes the mask: plain numbers, tensors, and at least one tensor.
        self.numbers: tuple[Any, ...] = (*band, max_seqlen, packable)
        self.padding = padding
        self.cu_seqlens = cu_seqlens
        self.pattern = pattern
        self.anchor = torch.empty(0, device=device) if anchor is None else anchor

    @property
    def band(self) -> Band:
        """The geometry."""
        return Band(*self.numbers[:-2])

    @property
    def packable(self) -> bool:
        """Whether restarting positions count: no ``attention_mask``, and nobody has read them."""
        return self.numbers[-1]

    @property
    def packing(self) -> Packing | None:
        """The packed sequences, None for one a row."""
        if self.cu_seqlens is None:
            return None
        return Packing(self.cu_seqlens, None, self.numbers[-2], self.numbers[-2])

    # What comes out of an operation is a plain tensor, not a mask without a band.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    def __repr__(self, *, tensor_contents: object = None) -> str:
        """The geometry; the dense mask is ``repr(mask.dense())``."""
        tensors = self.__tensor_flatten__()[0][1:]
        return f"BandMask(shape={tuple(self.shape)}, {self.band}, with {tensors})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run ``func`` on the dense mask."""
        kwargs = {} if kwargs is None else kwargs
        if func is torch.ops.aten.detach.default:
            return args[0]
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, torch.bool):
            return args[0]._moved(kwargs.get("device"))
        if func.overloadpacket in OTHER_READINGS and args[0].is_floating_point():
            raise ValueError(
                f"the model's attention is its own, not flashlayer's ({func} takes the mask for "
                "something else than the keys to see): use 'eager'"
            )
        return func(
            *tree_map_only(BandMask, BandMask.dense, args),
            **tree_map_only(BandMask, BandMask.dense, kwargs),
        )

    def __tensor_flatten__(self) -> tuple[list[str], tuple]:
        """The tensors within, by name, and what else it takes to make the mask again."""
        names = ["anchor", "padding", "cu_seqlens", "pattern"]
        return [name for name in names if getattr(self, name) is not None], self.numbers

    @staticmethod
    def __tensor_unflatten__(
        tensors: dict[str, Tensor], numbers: tuple, size: Any, stride: Any
    ) -> BandMask:
        """The inverse of :meth:`__tensor_flatten__`."""
        *band, longest, packable = numbers
        device = tensors["anchor"].device
        return BandMask(size, device, Band(*band), max_seqlen=longest, packable=packable, **tensors)

    def separated(self, position_ids: Tensor | None, causal: bool) -> Tensor:
        """The mask with a sequence of its own from each restart of the positions ``(B, S)`` on.

        Causal masks only, without a past and without an ``attention_mask``. Restarts are read once
        for each mask: reading waits for the GPU, and the layers share a mask. A graph and a meta
        tensor can't be read; there the mask becomes dense.
        """
        if position_ids is None or position_ids.ndim != 2 or not self.packable:
            return self
        batch, _, q_length, kv_length = self.shape
        without_past = q_length == kv_length == self.band.keys == position_ids.shape[-1] > 1
        causal = causal if self.pattern is not None else self.band.window[1] == 0
        told = self.cu_seqlens is not None and not self.band.chunked
        if not without_past or not causal or told:
            return self
        sequences = _restarted(position_ids).expand(batch, -1)
        if not _readable(sequences):
            return self.dense() & _same(sequences)
        *_, longest, _ = self.numbers
        if bool(sequences.any()):
            if self.cu_seqlens is not None:
                # Both only rise along a row, so their sum changes where either does.
                sequences = sequences + self._sequences(self.cu_seqlens)
            self.cu_seqlens, longest = _boundaries(sequences)
        self.numbers = (*self.band, longest, False)
        return self

    def dense(self) -> Tensor:
        """The mask as a plain tensor, bool ``(B, 1, Sq, Sk)``."""
        batch, _, q_length, kv_length = self.shape
        band = self.band
        offset = band.keys - q_length if band.diagonal == "bottom_right" else 0
        query = torch.arange(q_length, device=self.device)[:, None]
        key = torch.arange(kv_length, device=self.device)
        mask = (key < band.keys).expand(q_length, -1)
        left, right = band.window
        if left is not None:
            mask = mask & (key >= query + offset - left)
        if right is not None:
            mask = mask & (key <= query + offset + right)
        mask = mask.expand(batch, 1, -1, -1)
        if self.padding is not None:
            padding = nn.functional.pad(self.padding, (0, kv_length - band.keys))
            mask = mask & padding[:, None, None, :]
        if self.cu_seqlens is not None:
            mask = mask & _same(self._sequences(self.cu_seqlens))
        return mask if self.pattern is None else mask & self.pattern

    def _sequences(self, cu_seqlens: Tensor) -> Tensor:
        """Numbers ``(B, S)`` of the packed sequences."""
        batch, _, length, _ = self.shape
        token = torch.arange(batch * length, device=self.device)
        return torch.bucketize(token, cu_seqlens, right=True).view(batch, length)

    def _moved(self, device: torch.device | None) -> BandMask:
        device = self.device if device is None else device
        names, numbers = self.__tensor_flatten__()
        tensors = {name: getattr(self, name).to(device) for name in names}
        return self.__tensor_unflatten__(tensors, numbers, self.shape, self.stride())


def _readable(tensor: Tensor) -> bool:
    """Whether Python may look at the values."""
    return not torch.compiler.is_compiling() and not tensor.is_meta


def _restarted(position_ids: Tensor) -> Tensor:
    """Numbers ``(B, S)`` of the sequences that restarting positions begin; gaps begin none.

    A position lower than the one before begins a sequence. So does a repeated 0, after a sequence
    of one token, unless other positions repeat in the row, too, or all are 0.
    """
    step = position_ids.diff(dim=-1)
    zero = position_ids[:, 1:] == 0
    repeat = step == 0
    repeats_mean_nothing = (repeat & ~zero).any(-1, keepdim=True) | zero.all(-1, keepdim=True)
    begins = (step < 0) | (repeat & zero & ~repeats_mean_nothing)
    return nn.functional.pad(begins.cumsum(-1), (1, 0))


def _same(sequences: Tensor) -> Tensor:
    """Bool ``(B, 1, S, S)``: whether two tokens are of the same sequence."""
    return (sequences[:, :, None] == sequences[:, None, :])[:, None]


class Pattern(NamedTuple):
    """What a mask function of ``transformers.masking_utils`` says, as far as it is a band.

    ``left`` and ``right`` count keys beside the query's own, ``sequences`` ``(B, S)`` numbers the
    packed sequences, ``remapped`` says that positions are counted within them. With a ``chunk``
    a query sees the keys of its own chunk of positions (Llama 4).
    """

    left: int | None = None
    right: int | None = None
    sequences: Tensor | None = None
    remapped: bool = False
    chunk: int | None = None


def _recognise(mask_function: Callable) -> Pattern | None:
    """Read the closures that transformers combines a mask function from; None if one is unknown.

    Known is known by identity of the code, so a mask function that some later version builds
    otherwise is no longer recognised and gives a dense mask: slower, but right.
    """
    from transformers import masking_utils

    if mask_function is masking_utils.causal_mask_function:
        return Pattern(right=0)
    if mask_function is masking_utils.bidirectional_mask_function:
        return Pattern()
    if torch.compiler.is_compiling():
        return None  # a graph can't look into closures
    code = getattr(mask_function, "__code__", None)
    made_by = _makers().get(code)
    if code is None or made_by is None:
        return None
    cells = getattr(mask_function, "__closure__", None) or ()
    contents = (cell.cell_contents for cell in cells)
    made_of: dict[str, Any] = dict(zip(code.co_freevars, contents, strict=True))
    match made_by:
        case "and_masks":
            return _intersection([_recognise(part) for part in made_of["mask_functions"]])
        case "sliding_window_overlay" if made_of["sliding_window"] >= 1:
            return Pattern(left=made_of["sliding_window"] - 1)
        case "sliding_window_bidirectional_overlay" if made_of["sliding_window"] >= 0:
            return Pattern(left=made_of["sliding_window"], right=made_of["sliding_window"])
        case "chunked_overlay":
            return Pattern(chunk=made_of["chunk_size"])
        case "packed_sequence_mask_function":
            return Pattern(sequences=made_of["packed_sequence_mask"])
        case "remap_positions_for_packed_sequence":
            inner = _recognise(made_of["mask_function"])
            return None if inner is None else inner._replace(remapped=True)
    return None


@functools.cache
def _makers() -> dict[Any, str]:
    """The code of the closures that make up mask functions, and what makes them."""
    from transformers import masking_utils

    closures = {
        "and_masks": masking_utils.and_masks(),
        "sliding_window_overlay": masking_utils.sliding_window_overlay(1),
        "sliding_window_bidirectional_overlay": masking_utils.sliding_window_bidirectional_overlay(
            1
        ),
        "chunked_overlay": masking_utils.chunked_overlay(1, torch.empty(0)),
        "packed_sequence_mask_function": masking_utils.packed_sequence_mask_function(
            torch.empty(0)
        ),
        "remap_positions_for_packed_sequence": masking_utils.remap_positions_for_packed_sequence(
            masking_utils.causal_mask_function, torch.empty(0)
        ),
    }
    return {closure.__code__: name for name, closure in closures.items()}  # pyright: ignore


def _intersection(patterns: list[Pattern | None]) -> Pattern | None:
    """What all of them let through; None if one is unknown."""
    known = [pattern for pattern in patterns if pattern is not None]
    sequences = [pattern.sequences for pattern in known if pattern.sequences is not None]
    chunks = [pattern.chunk for pattern in known if pattern.chunk is not None]
    if len(known) < len(patterns) or len(sequences) > 1 or len(chunks) > 1:
        return None
    left = [pattern.left for pattern in known if pattern.left is not None]
    right = [pattern.right for pattern in known if pattern.right is not None]
    return Pattern(
        left=min(left, default=None),
        right=min(right, default=None),
        sequences=sequences[0] if sequences else None,
        remapped=any(pattern.remapped for pattern in known),
        chunk=chunks[0] if chunks else None,
    )


def _band_mask(
    pattern: Pattern,
    attention_mask: Tensor | None,
    shape: tuple[int, int, int, int],
    q_offset: int | Tensor,
    kv_offset: int,
    device: torch.device,
) -> BandMask | None:
    """The mask of a pattern; None where it is not one band for all rows and sequences."""
    if isinstance(q_offset, Tensor) and not _readable(q_offset):
        return None
    offset = int(q_offset) - kv_offset
    batch, _, q_length, kv_length = shape
    band = _band(pattern, q_length, kv_length, offset)
    if band is None:
        return None
    padding = _padding(attention_mask, kv_offset, band.keys)
    sequences = pattern.sequences
    if pattern.chunk is not None and kv_offset + band.keys > pattern.chunk:
        # Without a past, chunks are packed sequences.
        if offset != 0 or q_length != kv_length or sequences is not None or device.type == "meta":
            return None
        sequences = (torch.arange(q_length, device=device) // pattern.chunk).expand(batch, -1)
        band = band._replace(chunked=True)
    packable = attention_mask is None
    if sequences is None:
        return BandMask(shape, device, band, padding, packable=packable)
    if padding is not None or not _readable(sequences):
        return None
    cu_seqlens, longest = _boundaries(sequences)
    return BandMask(
        shape, device, band, cu_seqlens=cu_seqlens, max_seqlen=longest, packable=packable
    )


def _band(pattern: Pattern, q_length: int, kv_length: int, offset: int) -> Band | None:
    """The band of a pattern, query i standing at key ``i + offset``; None where there is none."""
    window = (pattern.left, pattern.right)
    if pattern.sequences is not None or pattern.remapped:
        # Within a sequence positions rise by one, so the band is the same in positions and indices.
        packed = pattern.sequences is not None and offset == 0 and q_length == kv_length
        return Band(window, "bottom_right", kv_length) if packed else None
    if window == (None, None) or offset == kv_length - q_length:
        return Band(window, "bottom_right", kv_length)
    if pattern.right == 0 and offset >= 0 and offset + q_length <= kv_length:
        # Of a static cache, what nobody has written yet is behind every query.
        return Band(window, "bottom_right", offset + q_length)
    return Band(window, "top_left", kv_length) if offset == 0 else None


def _padding(attention_mask: Tensor | None, kv_offset: int, keys: int) -> Tensor | None:
    """The part of the 2-D mask that is about the keys ``(B, keys)``; None if it hides none."""
    if attention_mask is None:
        return None
    padding = attention_mask[:, kv_offset : kv_offset + keys]
    padding = nn.functional.pad(padding, (0, keys - padding.shape[1]))
    return None if _readable(padding) and bool(padding.all()) else padding


def _boundaries(sequences: Tensor) -> tuple[Tensor, int]:
    """``cu_seqlens`` of the sequences that ``(B, S)`` numbers, and the length of the longest.

    Each row begins a new one.
    """
    begins = torch.ones_like(sequences, dtype=torch.bool)
    begins[:, 1:] = sequences.diff(dim=-1) != 0
    begins = begins.flatten().nonzero().flatten()
    cu_seqlens = nn.functional.pad(begins, (0, 1), value=sequences.numel())
    return cu_seqlens.to(torch.int32), int(cu_seqlens.diff().max())


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
    if isinstance(mask, BandMask) and (mask.cu_seqlens is not None or mask.pattern is not None):
        mask = mask.dense()
    if isinstance(mask, BandMask):
        if mask.shape[2:] != (query.shape[2], key.shape[2]):
            raise ValueError(
                f"attention_mask is for {tuple(mask.shape[2:])} queries and keys, "
                f"got {(query.shape[2], key.shape[2])}"
            )
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
