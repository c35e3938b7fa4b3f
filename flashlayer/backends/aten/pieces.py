"""How a call is cut into pieces that ATen's kernel computes: full and top-left causal attention.

==================================  ============================================================
the call                            its pieces
==================================  ============================================================
full; causal, top-left              the whole call
packed sequences                    each sequence, cut further as below
bool mask ``(B or 1, 1, 1, Sk)``    each batch entry with its visible keys: a slice, or gathered
any other mask                      the whole call, or blocks of queries with the keys they reach
causal, bottom-right, unequal       the first keys, full, and the triangle behind them, causal
window on both sides, wide          triangles, two for each block of queries
any other window                    blocks of queries with the keys they reach, and a mask
==================================  ============================================================

Pieces of the same queries are merged by their LSE. A key that no piece holds costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashlayer.backends.aten.mask import (
    BLOCK_MIN,
    NUMBERS_AT_ONCE,
    added,
    as_added,
    blocks,
    hides_an_end,
    mask_dtype,
)
from flashlayer.spec import AttentionExtras, AttentionSpec

# Windows at least this wide become triangles of their width: the kernel is slow on smaller ones.
TRIANGLE_MIN = 32
# Queries of triangles a call: enough to fill the cores, few enough to keep their copies small.
TRIANGLE_ROWS = 4096

# Queries a masked block, a quarter of the window's width within these limits: a larger block
# computes more hidden scores, smaller ones are more calls (benchmarks/NOTES.md).
MASKED_BLOCK_MIN, MASKED_BLOCK_MAX = 128, 512

# From so many queries on, blocks of them are searched for keys that a mask hides from all.
TRIMMED_MIN = 1024

# From so many hidden scores times D in a batch entry on, the visible keys of a padded batch are
# sliced, a call for each entry; below, one call with an additive mask is faster. Under causal a
# slice also leaves out the queries before its keys.
SLICED_MIN, SLICED_MIN_CAUSAL = 2**24, 2**20


class Piece(NamedTuple):
    """Queries and keys for one call of the kernel."""

    batch: slice = slice(None)
    q_rows: slice = slice(None)
    k_rows: Any = slice(None)  # a slice is a view, an index tensor gathers
    causal: bool = False  # top-left
    mask: Tensor | None = None  # (B or 1, H or 1, M or 1, N or 1), added to the scores
    blocks: int = 1  # the rows are this many blocks, each with keys of its own
    is_flipped: bool = False  # rows and keys reversed, which makes an upper triangle a causal one
    shares_rows: bool = False  # the same queries may be in another piece
    merges: bool = False  # an earlier piece had the same queries

    def queries(self, x: Tensor) -> Tensor:
        """From ``(B, H, Sq, ...)`` what the kernel gets: ``(B * blocks, H, M, ...)``."""
        return self._arrange(x[self.batch, :, self.q_rows])

    def keys(self, x: Tensor) -> Tensor:
        """The same for keys or values."""
        return self._arrange(x[self.batch][:, :, self.k_rows])

    def _arrange(self, x: Tensor) -> Tensor:
        if self.blocks > 1:
            x = x.unflatten(2, (self.blocks, -1)).movedim(2, 1).flatten(0, 1)
        return x.flip(2) if self.is_flipped else x

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of the arrangement, for a result of the kernel."""
        x = x.flip(2) if self.is_flipped else x
        if self.blocks > 1:
            x = x.unflatten(0, (-1, self.blocks)).movedim(1, 2).flatten(2, 3)
        return x

    def cut(self, q_start: int, q_stop: int, k_start: int, k_stop: int, **fields: Any) -> Piece:
        """These queries and keys of the piece, counted from its first ones."""
        q_rows = slice(self.q_rows.start + q_start, self.q_rows.start + q_stop)
        k_rows = slice(self.k_rows.start + k_start, self.k_rows.start + k_stop)
        return Piece(self.batch, q_rows, k_rows, shares_rows=self.shares_rows, **fields)

    def lengths(self) -> tuple[int, int]:
        """How many queries and keys it has."""
        return self.q_rows.stop - self.q_rows.start, self.k_rows.stop - self.k_rows.start


FULL, CAUSAL = Piece(), Piece(causal=True)


def whole(q: Tensor, k: Tensor, spec: AttentionSpec, extras: AttentionExtras) -> Piece | None:
    """The whole call as one piece, or None if it has to be cut."""
    if extras.cu_seqlens_q is not None or extras.intervals is not None:
        return None
    if q.numel() == 0 or k.numel() == 0:  # the kernel would divide by 0 and end the process
        return None
    uncut = _uncut(spec, spec.diagonal == "top_left")
    mask = extras.attn_mask
    if uncut is None or mask is None:
        return uncut
    if _slices(q, k, spec, mask) or _at_once(q, k, spec, mask) != (q.shape[2], q.shape[0]):
        return None
    return uncut._replace(mask=as_added(mask, q.dtype))


def _uncut(spec: AttentionSpec, is_top_left: bool) -> Piece | None:
    """``FULL`` or ``CAUSAL`` if the kernel computes each sequence in one call, else None."""
    if spec.window_left is not None:
        return None
    if spec.window_right is None:
        return FULL
    return CAUSAL if spec.window_right == 0 and is_top_left else None


def split(q: Tensor, k: Tensor, spec: AttentionSpec, extras: AttentionExtras) -> Iterator[Piece]:
    """The pieces of a call, none of them empty; each visible pair is in exactly one."""
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    if q.numel() == 0 or k.numel() == 0:
        return
    # With one tensor of boundaries each sequence has as many keys as queries: both diagonals agree.
    equal_lengths = extras.cu_seqlens_q is not None and extras.cu_seqlens_q is extras.cu_seqlens_k
    uncut = _uncut(spec, spec.diagonal == "top_left" or equal_lengths)
    base = Piece(shares_rows=True) if uncut is None else uncut
    mask = extras.attn_mask
    if mask is not None:
        if _slices(q, k, spec, mask):
            yield from _visible_keys(base, mask, seqlen_q, seqlen_k)
            return
        for block in blocks(q, k, spec, extras, *_at_once(q, k, spec, mask)):
            own = added(block, spec, extras, q.dtype)
            yield Piece(block.batch, block.q_rows, block.k_rows, mask=own, shares_rows=True)
        return
    if extras.cu_seqlens_q is not None and extras.cu_seqlens_k is not None:
        pieces = _sequences(base, extras.cu_seqlens_q.tolist(), extras.cu_seqlens_k.tolist())
    else:
        pieces = iter((base._replace(q_rows=slice(0, seqlen_q), k_rows=slice(0, seqlen_k)),))
    cut = _causal if spec.window_left is None and spec.window_right == 0 else window_pieces
    for piece in pieces:
        if uncut is not None:
            yield piece
        else:
            yield from cut(piece, spec, q.dtype)


def _slices(q: Tensor, k: Tensor, spec: AttentionSpec, mask: Tensor) -> bool:
    """Whether the call is a padded batch whose entries are best computed one by one."""
    if mask.dtype != torch.bool or mask.shape[1] > 1 or mask.shape[2] > 1 or mask.shape[3] == 1:
        return False
    uncut = _uncut(spec, spec.diagonal == "top_left")
    if uncut is None:
        return False
    numbers, least = q.numel() // q.shape[0], SLICED_MIN_CAUSAL if uncut.causal else SLICED_MIN
    if numbers * k.shape[2] < least:
        return False
    hidden = mask.numel() - int(mask.count_nonzero())
    if numbers * hidden < least * len(mask):
        return False
    if not uncut.causal:
        return True
    # Removing hidden keys keeps the causal positions of the others only if they are at the ends.
    edges = mask[:, 0, 0].long().diff(dim=-1).ne_(0).sum(dim=-1)
    starts_hidden = ~mask[:, 0, 0, 0]
    return not bool((edges > starts_hidden + 1).any())


def _at_once(q: Tensor, k: Tensor, spec: AttentionSpec, mask: Tensor) -> tuple[int, int]:
    """How many queries and how many batch entries a piece with a mask has."""
    (batch, _, seqlen_q, _), seqlen_k = q.shape, k.shape[2]
    uncut = _uncut(spec, spec.diagonal == "top_left")
    if uncut is not None and mask.shape[2] == 1:
        return seqlen_q, batch
    rows, entries = seqlen_q, batch
    if uncut is None or mask.dtype != mask_dtype(mask, q.dtype):  # the piece's mask is made
        row = mask.shape[1] * seqlen_k
        if mask.shape[0] > 1:
            entries = NUMBERS_AT_ONCE // (row * min(seqlen_q, MASKED_BLOCK_MAX))
            entries = min(max(entries, 1), batch)
            row *= entries
        rows = max(NUMBERS_AT_ONCE // row, BLOCK_MIN)
    if uncut is None and (spec.window_left is None or spec.window_right is None):
        rows = min(rows, max(seqlen_k // 8, BLOCK_MIN))
    elif uncut is None:
        rows = min(rows, _block_rows(spec, seqlen_k))
    elif not uncut.causal and rows >= TRIMMED_MIN and hides_an_end(mask[:, :, :BLOCK_MIN]):
        rows = min(rows, max(seqlen_q // 8, BLOCK_MIN))
    return min(rows, seqlen_q), entries


def _sequences(base: Piece, q_edges: list[int], k_edges: list[int]) -> Iterator[Piece]:
    q_slices, k_slices = (map(slice, edges, edges[1:]) for edges in (q_edges, k_edges))
    for q_rows, k_rows in zip(q_slices, k_slices, strict=True):
        if q_rows.start < q_rows.stop and k_rows.start < k_rows.stop:
            yield base._replace(q_rows=q_rows, k_rows=k_rows)


def _visible_keys(base: Piece, mask: Tensor, seqlen_q: int, seqlen_k: int) -> Iterator[Piece]:
    """For each batch entry of the mask its queries and its visible keys."""
    for index, visible in enumerate(mask.expand(-1, -1, -1, seqlen_k)[:, 0, 0]):
        keys = visible.nonzero().flatten()
        if len(keys) == 0:
            continue
        start, stop = int(keys[0]), int(keys[-1]) + 1
        q_start = start if base.causal else 0  # top-left: earlier queries have no visible key
        if q_start < seqlen_q:
            yield base._replace(
                batch=slice(index, index + 1) if len(mask) > 1 else slice(None),
                q_rows=slice(q_start, seqlen_q),
                k_rows=slice(start, stop) if stop - start == len(keys) else keys,
            )


def _causal(piece: Piece, spec: AttentionSpec, _: torch.dtype) -> Iterator[Piece]:
    """Bottom-right: the keys visible to every query if there are more of them, and the triangle."""
    queries, keys = piece.lengths()
    offset = spec.offset(queries, keys)
    if offset > 0:
        yield piece.cut(0, queries, 0, offset)
    # With more queries than keys, no key is visible to the first ones.
    first_query, first_key = max(-offset, 0), max(offset, 0)
    yield piece.cut(first_query, queries, first_key, keys, causal=True, merges=offset > 0)


def window_pieces(piece: Piece, spec: AttentionSpec, dtype: torch.dtype) -> Iterator[Piece]:
    r"""Triangles, and blocks with a mask at both ends; or blocks alone.

    With as many keys as queries, the keys visible to ``n = left + right`` queries from ``start`` on
    form two triangles of ``n`` keys each, an upper one from key ``start - left`` on and a lower one
    from ``start + right`` on, without overlap:

        \ \      query i, key j:  start - left + i <= j < start + right    (upper)
         \ \                      start + right <= j <= start + right + i   (lower)

    Both run as causal attention, so no mask is loaded and few hidden scores are computed.
    """
    left, right = spec.window_left, spec.window_right
    queries, keys = piece.lengths()
    size = (left or 0) + (right or 0)
    if left is None or right is None or queries != keys or not TRIANGLE_MIN <= size <= queries // 2:
        offset = spec.offset(queries, keys)
        # No key is visible to the queries before and after these.
        first = 0 if right is None else max(0, -offset - right)
        stop = queries if left is None else min(queries, keys - offset + left)
        yield from _masked(piece, spec, dtype, first, stop)
        return
    count = (queries - size) // size
    if right == 0:  # the window of the first queries hides no key
        yield piece.cut(0, left, 0, left, causal=True)
    else:
        yield from _masked(piece, spec, dtype, 0, left)
    at_once = max(1, TRIANGLE_ROWS // size)
    for index in range(0, count, at_once):
        blocks = min(at_once, count - index)
        rows, start = blocks * size, index * size
        q_range, fields = (left + start, left + start + rows), {"causal": True, "blocks": blocks}
        yield piece.cut(*q_range, start, start + rows, is_flipped=True, **fields)
        yield piece.cut(*q_range, start + size, start + size + rows, merges=True, **fields)
    yield from _masked(piece, spec, dtype, left + count * size, queries)


def _masked(
    piece: Piece, spec: AttentionSpec, dtype: torch.dtype, first: int, end: int
) -> Iterator[Piece]:
    """The queries ``[first, end)`` in blocks, each with the keys its windows reach."""
    lengths = piece.lengths()
    size = _block_rows(spec, lengths[1])
    masks: dict[tuple[int, int, int], Tensor] = {}  # inner blocks share theirs
    for start in range(first, end, size):
        stop = min(start + size, end)
        bounds = spec.key_bounds(start, stop, *lengths)
        k_start, k_stop = bounds.any_start, bounds.any_stop
        mask = None
        if bounds.all_start > k_start or bounds.all_stop < k_stop:
            shape = (stop - start, k_start - start, k_stop - start)
            if shape not in masks:
                cpu = torch.device("cpu")  # whatever torch's default device is
                visible = spec.visible(start, stop, k_start, k_stop, *lengths, cpu)
                mask = torch.zeros((1, 1, *visible.shape), dtype=dtype, device=cpu)
                masks[shape] = mask.masked_fill_(~visible, -torch.inf)
            mask = masks[shape]
        yield piece.cut(start, stop, k_start, k_stop, mask=mask)


def _block_rows(spec: AttentionSpec, keys: int) -> int:
    """Queries of a block whose mask a window cuts."""
    reach = sum(min(side, keys) for side in (spec.window_left, spec.window_right) if side)
    size = MASKED_BLOCK_MIN
    while size < min(reach // 4, MASKED_BLOCK_MAX):
        size *= 2
    return size
