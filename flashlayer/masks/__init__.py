"""Attention masks of O(Sk) memory: for each key, the intervals of queries that may attend to it.

The masks that models are trained with (documents in one row, a bidirectional prefix, image tokens,
chunks, a tree of continuations, global tokens and a window) are a few intervals in each column of
the score matrix. An :class:`IntervalMask` stores their ends, as FlashMask does (Wang et al., arXiv
2410.01359), and goes wherever a dense ``attn_mask`` goes. A tile of the score matrix is skipped, or
computed without a mask, by comparing its queries with the least and greatest ends of its keys.

    >>> import torch
    >>> from flashlayer import flash_attention, masks
    >>> q = k = v = torch.randn(1, 4, 10, 16)
    >>> mask = masks.documents(torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2]))
    >>> flash_attention(q, k, v, attn_mask=mask, causal=True).shape
    torch.Size([1, 4, 10, 16])
"""

from flashlayer.masks.builders import (
    blocks_bidirectional,
    chunks,
    documents,
    global_and_window,
    prefix_lm,
    tree,
)
from flashlayer.masks.conversion import from_block_mask, from_dense
from flashlayer.masks.intervals import IntervalMask

__all__ = [
    "IntervalMask",
    "blocks_bidirectional",
    "chunks",
    "documents",
    "from_block_mask",
    "from_dense",
    "global_and_window",
    "prefix_lm",
    "tree",
]
