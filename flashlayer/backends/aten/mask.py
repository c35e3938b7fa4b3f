"""The additive mask of a block of queries and a stretch of keys, as the kernel takes it.

The kernel adds a float mask to the scores, in the queries' dtype or in the one it sums in, and
reads any dimension of size 1 and any strides without a copy. So a float mask of these dtypes is
passed as it is. A bool mask, and what causal or a window hides besides, becomes 0 and -inf, a block
of queries at a time (:data:`NUMBERS_AT_ONCE`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flashlayer.spec import AttentionExtras, AttentionSpec, accumulation_dtype

# Numbers of additive mask made at once, and the fewest queries of a block: 16 MB in fp32.
NUMBERS_AT_ONCE = 2**22
BLOCK_MIN = 128

# Of each dtype: integers of its size, and the lowest bit of its exponent. -inf has the sign and all
# of the exponent set, which as an integer is minus that bit.
_BITS = {
    torch.float64: (torch.int64, 1 << 52),
    torch.float32: (torch.int32, 1 << 23),
    torch.float16: (torch.int16, 1 << 10),
    torch.bfloat16: (torch.int16, 1 << 7),
}
_MINUS_INF = {
    dtype: torch.tensor(-bit, dtype=integers, device="cpu")
    for dtype, (integers, bit) in _BITS.items()
}


class Block(NamedTuple):
    """Consecutive queries of some batch entries and the keys that they may reach."""

    batch: slice
    q_rows: slice
    k_rows: slice
    lengths: tuple[int, int]  # queries and keys of the problem

    def size(self) -> tuple[int, int]:
        """How many queries and keys it has."""
        return self.q_rows.stop - self.q_rows.start, self.k_rows.stop - self.k_rows.start

    def of(self, x: Tensor) -> Tensor:
        """The view of ``x`` (B or 1, H or 1, Sq or 1, Sk or 1) that broadcasts to the block."""
        x = x[self.batch] if x.shape[0] > 1 else x
        x = x[:, :, self.q_rows] if x.shape[2] > 1 else x
        return x[..., self.k_rows] if x.shape[3] > 1 else x


def mask_dtype(mask: Tensor, dtype: torch.dtype) -> torch.dtype:
    """In which dtype the kernel gets the mask of queries in ``dtype``."""
    if mask.dtype == torch.bool or mask.dtype == dtype:
        return dtype
    return accumulation_dtype(dtype)


def as_added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask of queries in ``dtype`` as the kernel takes it."""
    if mask.dtype == torch.bool:
        return additive(mask, dtype)
    return mask.to(mask_dtype(mask, dtype))


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where True, -inf where False, contiguous.

    In integers, ``bit * visible - bit``: an eighth of the time of ``torch.where``.
    """
    integers, bit = _BITS[dtype]
    bits = torch.empty(visible.shape, dtype=integers, device=visible.device).copy_(visible)
    return torch.add(_MINUS_INF[dtype], bits, alpha=bit, out=bits).view(dtype)


def added(block: Block, spec: AttentionSpec, extras: AttentionExtras, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of a block, (B or 1, H or 1, M or 1, N or 1).

    A view of the user's mask where it has the kernel's dtype and no edge of a window cuts the
    block, else made anew.
    """
    mask, edges = extras.attn_mask, _edges(block, spec)
    assert mask is not None
    if not edges:
        return as_added(block.of(mask), dtype)
    cpu = torch.device("cpu")  # whatever torch's default device is
    q_start, q_stop = block.q_rows.start, block.q_rows.stop
    own = block.of(mask)
    own = own.expand(*own.shape[:2], *block.size()).clone()
    for start, stop in edges:
        visible = spec.visible(q_start, q_stop, start, stop, *block.lengths, cpu)
        columns = own[..., start - block.k_rows.start : stop - block.k_rows.start]
        if own.dtype == torch.bool:
            columns &= visible
        else:
            columns.masked_fill_(~visible, -torch.inf)
    return as_added(own, dtype)


def _edges(block: Block, spec: AttentionSpec) -> list[tuple[int, int]]:
    """The stretches of the block's keys that a window hides from some of its queries."""
    bounds = spec.key_bounds(block.q_rows.start, block.q_rows.stop, *block.lengths)
    start, stop = block.k_rows.start, block.k_rows.stop
    all_start, all_stop = max(bounds.all_start, start), min(bounds.all_stop, stop)
    if all_start >= all_stop:
        return [(start, stop)]
    return [(x, y) for x, y in ((start, all_start), (all_stop, stop)) if x < y]


def blocks(
    q: Tensor, k: Tensor, spec: AttentionSpec, extras: AttentionExtras, rows: int, entries: int
) -> Iterator[Block]:
    """The problem in blocks of ``rows`` queries and ``entries`` batch entries.

    Keys at both ends that no query of a block sees are left out, and blocks without a key.
    """
    batch, seqlen_q, lengths = q.shape[0], q.shape[2], (q.shape[2], k.shape[2])
    for entry in range(0, batch, entries):
        for start in range(0, seqlen_q, rows):
            q_rows = slice(start, min(start + rows, seqlen_q))
            bounds = spec.key_bounds(q_rows.start, q_rows.stop, *lengths)
            k_rows = slice(bounds.any_start, bounds.any_stop)
            block = Block(slice(entry, min(entry + entries, batch)), q_rows, k_rows, lengths)
            if k_rows.start < k_rows.stop and extras.attn_mask is not None:
                block = block._replace(k_rows=_trimmed(block, extras.attn_mask))
            if block.k_rows.start < block.k_rows.stop:
                yield block


def hides_an_end(mask: Tensor) -> bool:
    """Whether the first or the last key is hidden from all queries.

    Two numbers are looked at before the two columns, which are slow to read: the last key of the
    first query and the first key of the last one, which causal, windows and padding hide.
    """
    if mask.dtype == torch.bool:
        if mask[0, 0, 0, -1].item() and mask[-1, -1, -1, 0].item():
            return False
        return not mask[..., :: max(1, mask.shape[-1] - 1)].flatten(0, 2).any(dim=0).all().item()
    if mask[0, 0, 0, -1].item() > -math.inf and mask[-1, -1, -1, 0].item() > -math.inf:
        return False
    return hides_an_end(mask[..., :: max(1, mask.shape[-1] - 1)] != -torch.inf)


def _trimmed(block: Block, mask: Tensor) -> slice:
    """The block's keys without those at either end that the mask hides from all its queries.

    The search takes longer than the conversion of the mask, so the first and the last key are
    looked at before.
    """
    own, start = block.of(mask), block.k_rows.start
    if not hides_an_end(own):
        return block.k_rows
    visible = own if own.dtype == torch.bool else own != -torch.inf
    keys = visible.flatten(0, 2).any(dim=0).expand(block.size()[1]).nonzero()
    if len(keys) == 0:
        return slice(start, start)
    return slice(start + int(keys[0]), start + int(keys[-1]) + 1)


def visible_intervals(
    intervals: Tensor, spec: AttentionSpec, seqlen_q: int
) -> tuple[Tensor, Tensor]:
    """Starts and stops ``(B or 1, H or 1, n, Sk)`` of the intervals within the window."""
    starts, stops = intervals[:, :, ::2], intervals[:, :, 1::2]
    seqlen_k = intervals.shape[3]
    # Query i is at position i + offset: key j's window is that of queries around j - offset.
    at = torch.arange(seqlen_k, device=intervals.device, dtype=intervals.dtype)
    at -= spec.offset(seqlen_q, seqlen_k)
    if spec.window_right is not None:
        starts = torch.maximum(starts, at - spec.window_right)
    if spec.window_left is not None:
        stops = torch.minimum(stops, at + (spec.window_left + 1))
    return starts, stops


def without_hidden_keys(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
) -> tuple[Tensor, Tensor]:
    """``k`` and ``v`` with 0 for the keys that are visible to no query: 0 * NaN is NaN."""
    if extras.intervals is not None:
        starts, stops = visible_intervals(extras.intervals, spec, q.shape[2])
        visible = (starts < stops).any(dim=2, keepdim=True)
    else:
        visible = _keys_of_mask(q, k, spec, extras)
    if visible.shape[1] > 1:
        visible = visible.unflatten(1, (k.shape[1], -1)).any(dim=2)
    visible = visible.transpose(2, 3)  # [B or 1, Hkv or 1, Sk, 1]
    return torch.where(visible, k, 0), torch.where(visible, v, 0)


def _keys_of_mask(q: Tensor, k: Tensor, spec: AttentionSpec, extras: AttentionExtras) -> Tensor:
    """Bool ``(B or 1, H or 1, 1, Sk)``: whether a key is visible to some query."""
    mask = extras.attn_mask
    assert mask is not None
    visible = torch.zeros((*mask.shape[:2], 1, k.shape[2]), dtype=torch.bool, device=k.device)
    for block in blocks(q, k, spec, extras, BLOCK_MIN, q.shape[0]):
        own = added(block, spec, extras, q.dtype)
        visible[..., block.k_rows] |= (own != -torch.inf).any(dim=2, keepdim=True)
    return visible
