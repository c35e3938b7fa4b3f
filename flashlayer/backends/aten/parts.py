"""A problem that the kernel does not know, as parts that it knows: full or top-left causal ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flashlayer.spec import AttentionExtras, AttentionSpec

# A window that is as wide as this is cut into causal triangles, of its width: narrower ones are too
# small for the kernel.
TRIANGLE_MIN = 32
# As many queries of triangles are one call: enough to fill the cores, and their copies are small.
TRIANGLE_ROWS = 4096

# What is no triangle is cut into blocks of a quarter as many queries as the window is wide, within
# these limits, with a mask: wider blocks meet more keys that they hide, narrower ones are more
# calls (benchmarks/NOTES.md).
WINDOW_BLOCK_MIN, WINDOW_BLOCK_MAX = 128, 512


class Part(NamedTuple):
    """Some queries and the keys they see: all of them, the causal triangle, or the band's."""

    batch: slice
    q_rows: slice
    k_rows: slice | Tensor  # a slice is a view, a tensor of indices gathers
    causal: bool = False
    band: Tensor | None = None  # (M, N): 0 where seen, else -inf
    blocks: int = 1  # the rows are this many blocks, each of which sees its own keys only
    is_flipped: bool = False  # last query and key first: the triangle over the diagonal is causal
    merges: bool = False  # an earlier part had these queries

    def queries(self, x: Tensor) -> Tensor:
        """The rows of ``(B, H, Sq, ...)`` as the kernel gets them: ``(B * blocks, H, M, ...)``."""
        return self._arranged(x[self.batch, :, self.q_rows])

    def keys(self, x: Tensor) -> Tensor:
        """The same of keys or values."""
        return self._arranged(x[self.batch][:, :, self.k_rows])

    def _arranged(self, x: Tensor) -> Tensor:
        if self.blocks > 1:
            x = x.unflatten(2, (self.blocks, -1)).movedim(2, 1).flatten(0, 1)
        return x.flip(2) if self.is_flipped else x

    def restored(self, x: Tensor) -> Tensor:
        """What came of rows, in the order in which they are in the sequence."""
        x = x.flip(2) if self.is_flipped else x
        if self.blocks > 1:
            x = x.unflatten(0, (-1, self.blocks)).movedim(1, 2).flatten(2, 3)
        return x


def split(q: Tensor, k: Tensor, band: AttentionSpec, extras: AttentionExtras) -> Iterator[Part]:
    """The parts of a problem, none of them empty; together they hold every pair that is seen."""
    if is_empty(q, k):
        return
    causal = band.window_left is None and band.window_right == 0
    if extras.cu_seqlens_q is not None and extras.cu_seqlens_k is not None:
        stretches = _sequences(extras.cu_seqlens_q.tolist(), extras.cu_seqlens_k.tolist())
    elif extras.attn_mask is not None:
        mask = extras.attn_mask.expand(-1, -1, -1, k.shape[2])
        stretches = _unmasked(mask, q.shape[2], causal)
    else:
        stretches = iter((Part(slice(None), slice(0, q.shape[2]), slice(0, k.shape[2])),))
    has_window = not causal and (band.window_left, band.window_right) != (None, None)
    for stretch in stretches:
        if has_window:
            yield from _window(stretch, band)
        elif causal:
            yield from _causal(stretch, band)
        else:
            yield stretch


def _sequences(q_edges: list[int], k_edges: list[int]) -> Iterator[Part]:
    for index in range(len(q_edges) - 1):
        q_rows = slice(q_edges[index], q_edges[index + 1])
        k_rows = slice(k_edges[index], k_edges[index + 1])
        if q_rows.start < q_rows.stop and k_rows.start < k_rows.stop:
            yield Part(slice(None), q_rows, k_rows)


def _unmasked(mask: Tensor, seqlen_q: int, causal: bool) -> Iterator[Part]:
    """For each batch entry of the mask the keys that it shows."""
    for index, shown in enumerate(mask[:, 0, 0]):
        batch = slice(index, index + 1) if len(mask) > 1 else slice(None)
        keys = shown.nonzero().flatten()
        if len(keys) == 0 or seqlen_q == 0:
            continue
        start, stop = int(keys[0]), int(keys[-1]) + 1
        k_rows = slice(start, stop) if stop - start == len(keys) else keys
        # Causal is top-left: the queries before the first key that is shown see none.
        q_rows = slice(start if causal else 0, seqlen_q)
        if q_rows.start < seqlen_q:
            yield Part(batch, q_rows, k_rows)


def _causal(stretch: Part, band: AttentionSpec) -> Iterator[Part]:
    """The triangle; under a bottom-right diagonal next to the keys that all its queries see."""
    if isinstance(stretch.k_rows, Tensor) or band.diagonal == "top_left":
        yield stretch._replace(causal=True)
        return
    (q_start, q_stop), (k_start, k_stop) = (
        (rows.start, rows.stop) for rows in (stretch.q_rows, stretch.k_rows)
    )
    offset = band.offset(q_stop - q_start, k_stop - k_start)
    if offset > 0:
        yield stretch._replace(k_rows=slice(k_start, k_start + offset))
    yield stretch._replace(
        q_rows=slice(q_start + max(-offset, 0), q_stop),  # those before them see no key
        k_rows=slice(k_start + max(offset, 0), k_stop),
        causal=True,
        merges=offset > 0,
    )


def _window(stretch: Part, band: AttentionSpec) -> Iterator[Part]:
    r"""A stretch with a window as triangles, and in its corners as blocks with a mask.

    Where keys are as many as queries, ``n = left + right`` queries from ``start`` on see two
    triangles of ``n`` keys each, that which begins at ``start - left`` on and over its diagonal,
    that which begins at ``start + right`` on and under it, and together no key twice:

        \ \      query i, key j:  start - left + i <= j < start + right    (over)
         \ \                      start + right <= j <= start + right + i   (under)

    So no score is computed that a mask would hide but those that the kernel's own tiles hold.
    """
    left, right = band.window_left, band.window_right
    (q_start, length), (k_start, keys) = _extents(stretch)
    offset = band.offset(length, keys)
    # The queries that see a key.
    first = 0 if right is None else max(0, -offset - right)
    end = length if left is None else min(length, keys - offset + left)
    size = (left or 0) + (right or 0)
    if left is None or right is None or size < TRIANGLE_MIN or 2 * size > length or length != keys:
        yield from _masked(stretch, band, first, end)
        return
    count = (length - size) // size
    stop = left + count * size
    if right == 0:  # no query of the first ones has a window that hides a key
        q_rows, k_rows = (slice(start, start + left) for start in (q_start, k_start))
        yield stretch._replace(q_rows=q_rows, k_rows=k_rows, causal=True)
    else:
        yield from _masked(stretch, band, 0, left)
    at_once = max(1, TRIANGLE_ROWS // size)
    for index in range(0, count, at_once):
        blocks = min(at_once, count - index)
        q_first = q_start + left + index * size
        for k_first, is_over in ((k_start, True), (k_start + size, False)):
            k_first += index * size
            yield stretch._replace(
                q_rows=slice(q_first, q_first + blocks * size),
                k_rows=slice(k_first, k_first + blocks * size),
                causal=True,
                blocks=blocks,
                is_flipped=is_over,
                merges=not is_over,
            )
    yield from _masked(stretch, band, stop, length)


def _masked(stretch: Part, band: AttentionSpec, first: int, end: int) -> Iterator[Part]:
    """Queries that see a key cut into blocks, each with the keys its windows reach."""
    (q_start, length), (k_start, keys) = _extents(stretch)
    reach = sum(min(side, keys) for side in (band.window_left, band.window_right) if side)
    size = WINDOW_BLOCK_MIN
    while size < min(reach // 4, WINDOW_BLOCK_MAX):
        size *= 2
    seen: dict[tuple[int, int, int], Tensor] = {}  # all but the outermost blocks share their mask
    for start in range(first, end, size):
        stop = min(start + size, end)
        bounds = band.key_bounds(start, stop, length, keys)
        key_start, key_stop = bounds.any_start, bounds.any_stop
        part = stretch._replace(
            q_rows=slice(q_start + start, q_start + stop),
            k_rows=slice(k_start + key_start, k_start + key_stop),
        )
        if bounds.all_start <= key_start and bounds.all_stop >= key_stop:  # as of a single query
            yield part
            continue
        shape = (stop - start, key_start - start, key_stop - start)
        if shape not in seen:
            rows = start, stop, key_start, key_stop
            visible = band.visible(*rows, length, keys, torch.device("cpu"))
            zeros = torch.zeros(visible.shape, device=visible.device)  # whatever the default is
            seen[shape] = zeros.masked_fill_(~visible, -torch.inf)
        yield part._replace(band=seen[shape])


def _extents(stretch: Part) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where its queries and its keys start, and how many they are."""
    assert isinstance(stretch.k_rows, slice)  # windows and masks don't come together
    q_rows, k_rows = stretch.q_rows, stretch.k_rows
    return (q_rows.start, q_rows.stop - q_rows.start), (k_rows.start, k_rows.stop - k_rows.start)


def is_empty(q: Tensor, k: Tensor) -> bool:
    """Whether there is nothing to attend: the kernel would divide by zero, ending the process."""
    return q.numel() == 0 or k.numel() == 0
