"""The mask function that transformers calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flashlayer.integrations.transformers.masks import DenseMask, GuardedMask, Window, WindowMask
from flashlayer.integrations.transformers.packing import boundaries, readable
from flashlayer.integrations.transformers.patterns import Keys, Pattern, in_intervals, recognise


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
    # Dynamo of torch 2.11 imports no name from transformers itself, whose module is a lazy one.
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    owner = getattr(config, "model_type", None) or "model"
    if mask_function is None:  # `or` would branch on a function, which Dynamo of torch 2.11 refuses
        mask_function = causal_mask_function
    shape, device = (batch_size, 1, q_length, kv_length), torch.device(device)
    keys = Keys(q_length, kv_length, kv_offset, device)
    pattern = recognise(mask_function, keys)
    # A decoding step that may be compiled gets a dense mask, O(Sk): the numbers of a WindowMask
    # change with every token, and each change would recompile.
    if pattern is not None and q_length == 1 and pattern.right == 0 and not allow_is_causal_skip:
        pattern = None
    if pattern is not None:
        made = window_mask(pattern, attention_mask, shape, q_offset, keys, owner)
        if made is not None:
            return made
    mask: Tensor = sdpa_mask(  # pyright: ignore[reportAssignmentType]
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
    # Blocks are dense while compiling, but restarting positions must still be separated.
    without_past = 1 < q_length == kv_length and not isinstance(q_offset, Tensor) and q_offset == 0
    packable = attention_mask is None and not use_vmap and without_past
    if packable and torch.compiler.is_compiling():
        full = Window((None, None), "bottom_right", owner, packable=True)
        return WindowMask(shape, mask.device, tuple(full), pattern=mask)
    return DenseMask(mask, owner)


def window_mask(
    pattern: Pattern,
    attention_mask: Tensor | None,
    shape: tuple[int, int, int, int],
    q_offset: int | Tensor,
    keys: Keys,
    owner: str,
) -> WindowMask | None:
    """The mask of a pattern; None for one query that needs intervals, and where there are none.

    Windows, with a row of padding, and packed sequences whose boundaries may be read are left to
    the options of ``flash_attention`` that are made for them.
    """
    _, _, q_length, kv_length = shape
    if pattern.right == 0 and keys.offset + kv_length <= pattern.idle_below:
        pattern = pattern._replace(starts=None, stops=None)
    has_intervals = pattern.starts is not None or pattern.stops is not None
    window, in_use = None, kv_length
    # Intervals are computed from an offset on the device, so it need not be read for them.
    if not isinstance(q_offset, Tensor) or (readable(q_offset) and not has_intervals):
        q_offset = int(q_offset)
        window, in_use = _window(pattern, q_length, kv_length, q_offset - keys.offset)
    if window is None and (pattern.sequences is not None or pattern.remapped):
        return None
    padding = None
    if attention_mask is not None:
        padding = attention_mask[:, keys.offset : keys.offset + in_use]
        padding = nn.functional.pad(padding, (0, in_use - padding.shape[1]))
        if not has_intervals and readable(padding) and bool(padding.all()):
            padding = None
    if window is not None:
        packable = attention_mask is None and pattern.sequences is None
        window = window._replace(owner=owner, packable=packable)
        made = _without_intervals(pattern, window, in_use, padding, shape, keys)
        if made is not None:
            return made
        pattern = pattern._replace(left=None, right=None)
    if q_length == 1:  # a dense mask is O(Sk) too
        return None
    intervals = _intervals(pattern, padding, in_use, q_offset, keys)
    if intervals is None:
        return None
    window = window or Window((None, None), "bottom_right", owner)
    return WindowMask(shape, keys.device, tuple(window), in_use, intervals=intervals)


def _without_intervals(
    pattern: Pattern,
    window: Window,
    in_use: int,
    padding: Tensor | None,
    shape: tuple[int, int, int, int],
    keys: Keys,
) -> WindowMask | None:
    """The mask as a window and a row of padding, or as packed sequences; None if it is neither."""
    if pattern.starts is not None or pattern.stops is not None:
        return None
    if pattern.sequences is None:
        return WindowMask(shape, keys.device, tuple(window), in_use, padding=padding)
    if padding is not None or not pattern.remapped or not readable(pattern.sequences):
        return None
    cu_seqlens, longest = boundaries(pattern.sequences)
    window = window._replace(max_seqlen=longest, packable=False)
    return WindowMask(shape, keys.device, tuple(window), in_use, cu_seqlens=cu_seqlens)


def _intervals(
    pattern: Pattern,
    padding: Tensor | None,
    in_use: int,
    q_offset: int | Tensor,
    keys: Keys,
) -> Tensor | None:
    """Of each key in use the queries that may attend to it; None if they are not one interval.

    Returns:
        int32 ``(B or 1, 1, 2, in use)``, as :class:`flashlayer.masks.IntervalMask` has them.
    """
    bounds = in_intervals(pattern, keys)
    if bounds is None:
        return None
    more = [x for x in (bounds.more_before, bounds.more_after) if x is not None]
    if more:
        inexact = torch.stack(more).any(0)[:, :in_use]
        # A key that is padding is hidden, whatever its id.
        inexact = inexact if padding is None else inexact & padding
        if not readable(inexact) or bool(inexact.any()):
            return None
    starts, stops = (
        torch.full((1, keys.length), fill, device=keys.device)
        if edge is None
        else (edge - q_offset).clamp(0, keys.queries)
        for edge, fill in ((bounds.starts, 0), (bounds.stops, keys.queries))
    )
    intervals = torch.stack(torch.broadcast_tensors(starts, stops), dim=1)[:, None, :, :in_use]
    if padding is not None:
        intervals = intervals.where(padding[:, None, None], 0)
    return intervals.to(torch.int32)


def _window(
    pattern: Pattern, q_length: int, kv_length: int, offset: int
) -> tuple[Window | None, int]:
    """The window of a pattern, query ``i`` at position ``i + offset``, and how many keys it uses.

    None if there is no such window.
    """
    window_size = (pattern.left, pattern.right)
    bottom_right = Window(window_size, "bottom_right")
    if pattern.sequences is not None or pattern.remapped:
        # Within a sequence positions rise by one: a window of positions is one of indices.
        packed = pattern.sequences is not None and offset == 0 and q_length == kv_length
        return bottom_right if packed else None, kv_length
    if window_size == (None, None) or offset == kv_length - q_length:
        return bottom_right, kv_length
    if pattern.right == 0 and offset >= 0 and offset + q_length <= kv_length:
        # The unwritten end of a static cache lies after every query.
        return bottom_right, offset + q_length
    return Window(window_size, "top_left") if offset == 0 else None, kv_length
