"""Masks by what they mean, each from a formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashlayer.masks.intervals import IntervalMask, canonical, joined, require


def documents(
    ids: Tensor | None = None, *, cu_seqlens: Tensor | None = None, seqlen: int | None = None
) -> IntervalMask:
    """Tokens of one document attend to each other: ``ids[i] == ids[j]``.

    With ``causal=True`` to the earlier ones only. It is what
    :func:`flashlayer.flash_attention_varlen` computes, in a batch of rows.

    Args:
        ids: ``(S,)`` or ``(B, S)``, integers: the document of each token. A document is one stretch
            of tokens. A negative id is padding: hidden, and without a visible key.
        cu_seqlens: ``(N + 1,)`` in place of ``ids``: 0 and the running sum of the lengths. Tokens
            past the last document are padding.
        seqlen: ``S`` with ``cu_seqlens``; ``cu_seqlens[-1]`` if None, which waits for the device.

    Raises:
        TypeError: an argument is not an integer tensor.
        ValueError: both or none are given, a shape does not fit, or a document is in two places.
    """
    if (ids is None) == (cu_seqlens is None):
        raise ValueError("documents needs either ids or cu_seqlens")
    if cu_seqlens is not None:
        edges = _integers("cu_seqlens", cu_seqlens, 1).long()
        seqlen = int(edges[-1]) if seqlen is None else seqlen
        ordered = (edges.diff() >= 0).all() & (edges[0] == 0) & (edges[-1] <= seqlen)
        require(ordered, f"cu_seqlens must start at 0, not fall, and end at seqlen={seqlen}")
        position = torch.arange(seqlen, device=edges.device)
        ids = torch.searchsorted(edges[1:].contiguous(), position, right=True)
        ids = torch.where(position < edges[-1], ids, -1)
    ids = _rows("ids", ids)
    is_padding = ids < 0
    starts, stops = runs(ids)
    require(_in_one_place(ids, ~is_padding), "ids: a document must be one stretch of tokens")
    return _column("documents", starts, torch.where(is_padding, starts, stops))


def prefix_lm(prefix_lengths: Tensor | int, *, seqlen: int) -> IntervalMask:
    """Causal, but the tokens of a prefix are visible to all: ``j <= i or j < prefix``.

    Raffel et al., arXiv 1910.10683, section 3.2.1; the form of PaliGemma's prompts.

    Args:
        prefix_lengths: ``(B,)``, integers from 0 to ``seqlen``; or one for all.
        seqlen: ``S``.

    Raises:
        TypeError: ``prefix_lengths`` is not of integers.
        ValueError: it is not ``(B,)``, or a prefix is longer than the sequence.
    """
    lengths = torch.as_tensor(prefix_lengths)
    lengths = _integers("prefix_lengths", lengths.reshape(-1) if lengths.ndim == 0 else lengths, 1)
    require(
        ((lengths >= 0) & (lengths <= seqlen)).all(),
        f"prefix_lengths must be from 0 to seqlen={seqlen}",
    )
    position = torch.arange(seqlen, device=lengths.device)
    starts = torch.where(position < lengths[:, None], 0, position)
    return _column("prefix_lm", starts, torch.full_like(starts, seqlen))


def blocks_bidirectional(ids: Tensor) -> IntervalMask:
    """Causal, and both ways within a block: ``j <= i or ids[i] == ids[j] != 0``.

    The tokens of an image attend to each other in a causal model (Gemma 3, arXiv 2503.19786).

    Args:
        ids: ``(S,)`` or ``(B, S)``, integers: the block of each token, 0 for a causal one. A block
            is one stretch of tokens.

    Raises:
        TypeError: ``ids`` is not an integer tensor.
        ValueError: its shape does not fit, or a block is in two places.
    """
    ids = _rows("ids", ids)
    in_block = ids != 0
    require(_in_one_place(ids, in_block), "ids: a block must be one stretch of tokens")
    position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    starts = torch.where(in_block, runs(ids)[0], position)
    return _column("blocks_bidirectional", starts, torch.full_like(starts, ids.shape[1]))


def chunks(size: int, *, seqlen: int, device: torch.device | str | None = None) -> IntervalMask:
    """Tokens of one chunk attend to each other: ``i // size == j // size``.

    With ``causal=True`` the chunked attention of Llama 4.

    Args:
        size: tokens a chunk.
        seqlen: ``S``.
        device: of the mask.

    Raises:
        ValueError: ``size`` is less than 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    position = torch.arange(seqlen, device=device)[None]
    starts = position // size * size
    return _column(f"chunks of {size}", starts, (starts + size).clamp(max=seqlen))


def tree(parents: Tensor) -> IntervalMask:
    """A token attends to itself and its ancestors.

    Continuations that share a prompt, in one row without repeating it: rollouts of one question,
    drafts of speculative decoding. In depth-first order a token's descendants are the stretch
    behind it, so its column is one interval.

    Args:
        parents: ``(S,)`` or ``(B, S)``, integers: the position of each token's parent, -1 for a
            root, in depth-first order.

    Raises:
        TypeError: ``parents`` is not an integer tensor.
        ValueError: its shape does not fit, or the order is another one.
    """
    parents = _rows("parents", parents)
    seqlen = parents.shape[1]
    position = torch.arange(seqlen, device=parents.device).expand_as(parents)
    require(
        ((parents >= -1) & (parents < position)).all(),
        "parents must be -1 or the position of an earlier token",
    )
    # Pointer doubling: after round n, `last` and `count` of a token are over its descendants less
    # than 2 ** n generations away, and `ancestor` is the one 2 ** n generations up. The last column
    # stands for no ancestor.
    root = torch.full_like(parents[:, :1], seqlen)
    ancestor = torch.cat((torch.where(parents < 0, seqlen, parents), root), dim=1)
    last = torch.cat((position, root), dim=1)
    count = torch.ones_like(last)
    for _ in range(seqlen.bit_length()):
        last = last.scatter_reduce(1, ancestor, last, "amax")
        count = count.scatter_add(1, ancestor, count)
        ancestor = ancestor.gather(1, ancestor)
    stops = last[:, :seqlen] + 1
    require(
        (stops - position == count[:, :seqlen]).all(),
        "parents must be in depth-first order: a token's descendants follow it without a gap",
    )
    return _column("tree", position, stops)


def global_and_window(
    n_global: int,
    window: int | tuple[int, int],
    *,
    seqlen: int,
    device: torch.device | str | None = None,
) -> IntervalMask:
    """A causal window, and the first tokens visible to all behind them.

    ``j <= i and (j < n_global or i - j <= window)``: StreamingLLM's mask (Xiao et al., arXiv
    2309.17453). With a pair ``(left, right)`` it is Longformer's (Beltagy et al., arXiv
    2004.05150), which is not causal: global tokens attend to all, and a window reaches ``right``
    keys ahead.

    Args:
        n_global: how many tokens are global.
        window: how many keys before its own position are visible to a query, as in
            ``window_size``; or ``(left, right)``.
        seqlen: ``S``.
        device: of the mask.

    Raises:
        ValueError: a number is negative.
    """
    left, right = (window, None) if isinstance(window, int) else window
    if min(n_global, left, right or 0) < 0:
        raise ValueError(f"n_global and window must be at least 0, got {n_global} and {window}")
    position = torch.arange(seqlen, device=device)[None, None]
    is_global = position < n_global
    stops = torch.where(is_global, seqlen, (position + left + 1).clamp(max=seqlen))
    kind = f"{n_global} global and a window of {window}"
    if right is None:
        return IntervalMask.made(joined(position[None], stops[None]), seqlen, kind)
    starts = torch.where(is_global, 0, (position - right).clamp(min=0))
    first = torch.cat((torch.zeros_like(starts), starts), dim=1)
    ends = torch.cat((torch.full_like(stops, min(n_global, seqlen)), stops), dim=1)
    return IntervalMask.made(joined(*canonical(first[None], ends[None])), seqlen, kind)


def _column(kind: str, starts: Tensor, stops: Tensor) -> IntervalMask:
    """The mask of one interval a key, ``(B, S)`` each, of a sequence with itself."""
    intervals = torch.stack((starts, stops), dim=1)[:, None]
    return IntervalMask.made(intervals, starts.shape[1], kind)


def _integers(name: str, x: Any, ndim: int) -> Tensor:
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {kind}")
    if x.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(x.shape)}")
    return x


def _rows(name: str, x: Any) -> Tensor:
    """``(S,)`` or ``(B, S)`` as int64 ``(B, S)``."""
    if isinstance(x, Tensor) and x.ndim == 1:
        x = x[None]
    return _integers(name, x, 2).long()


def runs(ids: Tensor) -> tuple[Tensor, Tensor]:
    """For each token of ``(B, S)`` where its stretch of equal ids starts and stops."""
    position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    changes = ids[:, 1:] != ids[:, :-1]
    edge = torch.ones_like(ids[:, :1], dtype=torch.bool)
    is_first, is_last = torch.cat((edge, changes), 1), torch.cat((changes, edge), 1)
    if ids.shape[1] == 0:
        return position, position
    starts = torch.where(is_first, position, 0).cummax(dim=1).values
    stops = torch.where(is_last, position + 1, ids.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    return starts, stops


def _in_one_place(ids: Tensor, counted: Tensor) -> Tensor:
    """Whether each id among the ``counted`` tokens is one stretch of them: a () bool."""
    if ids.shape[1] == 0:
        return torch.ones((), dtype=torch.bool, device=ids.device)
    starts, _ = runs(ids)
    # Sorted by id, tokens of one id are neighbours: its stretches must all start at one position.
    ordered, order = ids.sort(dim=1, stable=True)
    starts, counted = starts.gather(1, order), counted.gather(1, order)
    same = (ordered[:, 1:] == ordered[:, :-1]) & counted[:, 1:]
    return (~same | (starts[:, 1:] == starts[:, :-1])).all()
