"""Interval masks from masks in other forms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashlayer.masks.intervals import IntervalMask, joined, require_two, two_at_most

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Pairs of a BlockMask that are evaluated at once: 16 MB.
PAIRS_AT_ONCE = 2**24


def from_dense(mask: Tensor) -> IntervalMask:
    """The intervals of a bool mask.

    Args:
        mask: bool ``(Sq, Sk)``, ``(B, Sq, Sk)`` or ``(B, H, Sq, Sk)``, True = may attend.

    Raises:
        TypeError: ``mask`` is not a bool tensor.
        ValueError: its shape does not fit, or a key has more than two intervals.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, got {kind}")
    if not 2 <= mask.ndim <= 4:
        raise ValueError(
            "mask must be (queries, keys) with (batch,) or (batch, heads) before, "
            f"got {tuple(mask.shape)}"
        )
    mask = mask[:, None] if mask.ndim == 3 else mask
    mask = mask[(None,) * (4 - mask.ndim)]
    return IntervalMask.made(_dense_intervals(mask, 0), mask.shape[2], "from_dense")


def from_block_mask(block_mask: BlockMask) -> IntervalMask:
    """The intervals of a ``torch.nn.attention.flex_attention.BlockMask``, stretch by stretch.

    Raises:
        TypeError: it is not a BlockMask.
        ValueError: a key has more than two intervals.
    """
    from torch.nn.attention.flex_attention import BlockMask, create_mask

    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask must be a BlockMask, got {type(block_mask).__name__}")
    seqlen_q, seqlen_k = block_mask.seq_lengths
    q_block, k_block = block_mask.BLOCK_SIZE
    batch, heads = block_mask.kv_num_blocks.shape[:2]
    device = block_mask.kv_num_blocks.device
    # Blocks that are listed as full are not passed through mask_mod, others are.
    partial = _listed(block_mask.kv_num_blocks, block_mask.kv_indices)
    full = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    q_blocks = torch.arange(seqlen_q, device=device) // q_block
    at_once = max(1, PAIRS_AT_ONCE // max(1, batch * heads * seqlen_q))
    parts = []
    for start in range(0, seqlen_k, at_once):
        stop = min(start + at_once, seqlen_k)

        def shifted(b: Tensor, h: Tensor, i: Tensor, j: Tensor, start: int = start) -> Tensor:
            return block_mask.mask_mod(b, h, i, j + start)

        allowed = create_mask(shifted, batch, heads, seqlen_q, stop - start, device=str(device))
        k_blocks = torch.arange(start, stop, device=device) // k_block
        some, whole = (x[:, :, q_blocks][..., k_blocks] for x in (partial, full))
        parts.append(_dense_intervals(allowed & some | whole, start, pad=True))
    intervals = torch.cat(parts, dim=-1)
    starts, stops = two_at_most(intervals[:, :, ::2], intervals[:, :, 1::2])
    return IntervalMask.made(joined(starts, stops), seqlen_q, "from_block_mask")


def _listed(num_blocks: Tensor, indices: Tensor) -> Tensor:
    """Bool ``(B, H, rows, columns)`` from the number of blocks in each row and their columns."""
    columns = indices.shape[-1]
    counted = torch.arange(columns, device=indices.device) < num_blocks[..., None]
    # Entries past the number are not blocks: they go to a column that is cut off.
    target = torch.where(counted, indices, columns).long()
    grid = torch.zeros(*num_blocks.shape, columns + 1, dtype=torch.bool, device=indices.device)
    return grid.scatter_(-1, target, True)[..., :columns]


def _dense_intervals(mask: Tensor, first_key: int, pad: bool = False) -> Tensor:
    """Intervals ``(B, H, 2 or 4, Sk)`` of a bool ``(B, H, Sq, Sk)``; with ``pad`` always 4."""
    edge = torch.zeros_like(mask[:, :, :1])
    before, after = torch.cat((edge, mask), dim=2), torch.cat((mask, edge), dim=2)
    begins, ends = ~before & after, before & ~after  # [B, H, Sq + 1, Sk]
    count = begins.sum(dim=2)
    require_two(count, first_key)
    first_start, first_stop = begins.byte().argmax(dim=2), ends.byte().argmax(dim=2)
    starts, stops = [first_start], [first_stop]
    if pad or bool((count > 1).any()):
        last = mask.shape[2]
        is_second = count == 2
        starts.append(torch.where(is_second, last - begins.flip(2).byte().argmax(dim=2), 0))
        stops.append(torch.where(is_second, last - ends.flip(2).byte().argmax(dim=2), 0))
    return joined(torch.stack(starts, dim=2), torch.stack(stops, dim=2))
