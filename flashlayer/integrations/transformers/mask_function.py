"""The mask function that transformers calls, and the patterns that it recognises."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flashlayer.integrations.transformers.masks import DenseMask, GuardedMask, Window, WindowMask
from flashlayer.integrations.transformers.packing import boundaries, readable


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
        kv_length: ``Sk``; for a static cache its capacity.
        q_offset: position of the first query.
        kv_offset: position of the first key.
        mask_function: of the indices of batch, head, query and key; None is causal.
        attention_mask: bool ``(B, positions)``, False for padding.
        allow_is_causal_skip: False (for a causal mask) if the attention may be compiled.
        use_vmap: ``mask_function`` is the user's and may compute anything.
        device: device of the mask.
        config: the model's, whose type is named in the error if the model misreads the mask.

    Returns:
        A :class:`WindowMask`, or a :class:`DenseMask` ``(B, 1, Sq, Sk)`` for any other pattern.
    """
    from transformers import masking_utils

    owner = getattr(config, "model_type", None) or "model"
    mask_function = mask_function or masking_utils.causal_mask_function
    pattern = None if use_vmap else recognise(mask_function)
    # A decoding step that may be compiled gets a dense mask, O(Sk): the numbers of a WindowMask
    # change with every token, and each change would recompile.
    if pattern is not None and q_length == 1 and pattern.right == 0 and not allow_is_causal_skip:
        pattern = None
    shape, device = (batch_size, 1, q_length, kv_length), torch.device(device)
    if pattern is not None:
        made = window_mask(pattern, attention_mask, shape, q_offset, kv_offset, device, owner)
        if made is not None:
            return made
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
    # Dynamo can't read the closure of a window, but restarting positions must still be separated.
    without_past = 1 < q_length == kv_length and not isinstance(q_offset, Tensor) and q_offset == 0
    packable = attention_mask is None and not use_vmap and without_past
    if packable and torch.compiler.is_compiling():
        full = Window((None, None), "bottom_right", kv_length, owner, packable=True)
        return WindowMask(shape, mask.device, full, pattern=mask)
    return DenseMask(mask, owner)


class Pattern(NamedTuple):
    """The window that a mask function of ``transformers.masking_utils`` describes.

    ``left`` and ``right`` count keys beside the query's own, ``sequences`` ``(B, S)`` numbers the
    packed sequences, ``remapped`` means that positions are counted within them. With a ``chunk``
    only the keys of a query's own chunk of positions are visible (Llama 4).
    """

    left: int | None = None
    right: int | None = None
    sequences: Tensor | None = None
    remapped: bool = False
    chunk: int | None = None


def recognise(mask_function: Callable) -> Pattern | None:
    """Read the closures that transformers composes a mask function of; None if one is unknown.

    Closures are recognised by the identity of their code, so a mask function that a later version
    builds differently gives a dense mask: slower, but correct.
    """
    from transformers import masking_utils

    if mask_function is masking_utils.causal_mask_function:
        return Pattern(right=0)
    if mask_function is masking_utils.bidirectional_mask_function:
        return Pattern()
    if torch.compiler.is_compiling():
        return None  # Dynamo can't read closures
    code = getattr(mask_function, "__code__", None)
    reader = _readers().get(code)
    if code is None or reader is None:
        return None
    cells = getattr(mask_function, "__closure__", None) or ()
    return reader(dict(zip(code.co_freevars, (x.cell_contents for x in cells), strict=True)))


@functools.cache
def _readers() -> dict[Any, Callable[[dict[str, Any]], Pattern | None]]:
    """By the code of a closure that mask functions consist of: its pattern, from its variables."""
    from transformers import masking_utils as utils

    def window(left: int, right: int | None) -> Pattern | None:
        return Pattern(left, right) if left >= 0 else None

    def remapped(closed_over: dict[str, Any]) -> Pattern | None:
        inner = recognise(closed_over["mask_function"])
        return None if inner is None else inner._replace(remapped=True)

    empty, causal = torch.empty(0), utils.causal_mask_function
    readers: dict[Any, Callable[[dict[str, Any]], Pattern | None]] = {
        utils.and_masks(): lambda x: _intersection(*map(recognise, x["mask_functions"])),
        utils.sliding_window_overlay(1): lambda x: window(x["sliding_window"] - 1, None),
        utils.sliding_window_bidirectional_overlay(1): lambda x: window(
            x["sliding_window"], x["sliding_window"]
        ),
        utils.chunked_overlay(1, empty): lambda x: Pattern(chunk=x["chunk_size"]),
        utils.packed_sequence_mask_function(empty): lambda x: Pattern(
            sequences=x["packed_sequence_mask"]
        ),
        utils.remap_positions_for_packed_sequence(causal, empty): remapped,
    }
    return {closure.__code__: reader for closure, reader in readers.items()}


def _intersection(*patterns: Pattern | None) -> Pattern | None:
    """The pattern whose keys are visible in all of them; None if one is unknown."""
    known = [pattern for pattern in patterns if pattern is not None]

    def given(field: str) -> list[Any]:
        values = (getattr(pattern, field) for pattern in known)
        return [value for value in values if value is not None]

    sequences, chunks = given("sequences"), given("chunk")
    if len(known) < len(patterns) or len(sequences) > 1 or len(chunks) > 1:
        return None
    return Pattern(
        left=min(given("left"), default=None),
        right=min(given("right"), default=None),
        sequences=sequences[0] if sequences else None,
        remapped=any(pattern.remapped for pattern in known),
        chunk=chunks[0] if chunks else None,
    )


def window_mask(
    pattern: Pattern,
    attention_mask: Tensor | None,
    shape: tuple[int, int, int, int],
    q_offset: int | Tensor,
    kv_offset: int,
    device: torch.device,
    owner: str,
) -> WindowMask | None:
    """The mask of a pattern; None if it is not one window for all rows and sequences."""
    if isinstance(q_offset, Tensor) and not readable(q_offset):
        return None
    offset = int(q_offset) - kv_offset
    batch, _, q_length, kv_length = shape
    window = _window(pattern, q_length, kv_length, offset)
    if window is None:
        return None
    window = window._replace(owner=owner, packable=attention_mask is None)
    padding = None
    if attention_mask is not None:
        padding = attention_mask[:, kv_offset : kv_offset + window.keys]
        padding = nn.functional.pad(padding, (0, window.keys - padding.shape[1]))
        if readable(padding) and bool(padding.all()):
            padding = None
    sequences = pattern.sequences
    if pattern.chunk is not None and kv_offset + window.keys > pattern.chunk:
        # Without a past, chunks are packed sequences.
        if offset != 0 or q_length != kv_length or sequences is not None or device.type == "meta":
            return None
        sequences = (torch.arange(q_length, device=device) // pattern.chunk).expand(batch, -1)
        window = window._replace(chunked=True)
    if sequences is None:
        return WindowMask(shape, device, window, padding)
    if padding is not None or not readable(sequences):
        return None
    cu_seqlens, longest = boundaries(sequences)
    return WindowMask(shape, device, window._replace(max_seqlen=longest), cu_seqlens=cu_seqlens)


def _window(pattern: Pattern, q_length: int, kv_length: int, offset: int) -> Window | None:
    """The window of a pattern, query ``i`` at position ``i + offset``; None if there is none."""
    window_size = (pattern.left, pattern.right)
    if pattern.sequences is not None or pattern.remapped:
        # Within a sequence positions rise by one: a window of positions is one of indices.
        packed = pattern.sequences is not None and offset == 0 and q_length == kv_length
        return Window(window_size, "bottom_right", kv_length) if packed else None
    if window_size == (None, None) or offset == kv_length - q_length:
        return Window(window_size, "bottom_right", kv_length)
    if pattern.right == 0 and offset >= 0 and offset + q_length <= kv_length:
        # The unwritten end of a static cache lies after every query.
        return Window(window_size, "bottom_right", offset + q_length)
    return Window(window_size, "top_left", kv_length) if offset == 0 else None
