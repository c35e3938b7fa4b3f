"""Which band a mask function of transformers means."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flashlayer.integrations.transformers.masks import Band, BandMask, boundaries, readable


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


def recognise(mask_function: Callable) -> Pattern | None:
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
            return _intersection([recognise(part) for part in made_of["mask_functions"]])
        case "sliding_window_overlay" if made_of["sliding_window"] >= 1:
            return Pattern(left=made_of["sliding_window"] - 1)
        case "sliding_window_bidirectional_overlay" if made_of["sliding_window"] >= 0:
            return Pattern(left=made_of["sliding_window"], right=made_of["sliding_window"])
        case "chunked_overlay":
            return Pattern(chunk=made_of["chunk_size"])
        case "packed_sequence_mask_function":
            return Pattern(sequences=made_of["packed_sequence_mask"])
        case "remap_positions_for_packed_sequence":
            inner = recognise(made_of["mask_function"])
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


def band_mask(
    pattern: Pattern,
    attention_mask: Tensor | None,
    shape: tuple[int, int, int, int],
    q_offset: int | Tensor,
    kv_offset: int,
    device: torch.device,
    owner: str,
) -> BandMask | None:
    """The mask of a pattern; None where it is not one band for all rows and sequences."""
    if isinstance(q_offset, Tensor) and not readable(q_offset):
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
    options = {"packable": attention_mask is None, "owner": owner}
    if sequences is None:
        return BandMask(shape, device, band, padding, **options)
    if padding is not None or not readable(sequences):
        return None
    cu_seqlens, longest = boundaries(sequences)
    return BandMask(shape, device, band, cu_seqlens=cu_seqlens, max_seqlen=longest, **options)


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
    return None if readable(padding) and bool(padding.all()) else padding
