"""Which positions the shards hold, and which pairs of them are computed; needs no processes."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashlayer.distributed.layout import Layout, make_layout, rectangles, visited_hops


def visible_pairs(layout: Layout, rank: int, source: int, window: Any) -> Tensor:
    """How often each (query, key) of two shards is computed; no row or column may be empty."""
    q_length, k_length = (sum(map(len, layout[index])) for index in (rank, source))
    count = torch.zeros(q_length, k_length, dtype=torch.int)
    for q_rows, k_rows, (left, right) in rectangles(layout[rank], layout[source], *window):
        tile = count[q_rows, k_rows]
        distance = torch.arange(tile.shape[0])[:, None] - torch.arange(tile.shape[1])
        visible = torch.ones_like(distance, dtype=torch.bool)
        for side, sign in ((left, 1), (right, -1)):
            if side is not None:
                assert side >= 0  # as the public functions require
                visible &= sign * distance <= side
        assert visible.any(dim=0).all()
        assert visible.any(dim=1).all()
        tile += visible
    return count


side = st.none() | st.integers(0, 30)


@settings(deadline=None, max_examples=100)
@given(
    shards=st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple)
    | st.tuples(st.integers(1, 5), st.integers(0, 4)).map(lambda x: (2 * x[1],) * x[0]),
    zigzag=st.booleans(),
    window=st.tuples(side, side),
)
def test_rectangles_hold_every_visible_pair_once(
    shards: tuple[int, ...], zigzag: bool, window: tuple[int | None, int | None]
) -> None:
    """Over all steps, and no step is without a visible pair on some rank."""
    zigzag = zigzag and len(set(shards)) == 1 and shards[0] % 2 == 0
    layout = make_layout(shards, "zigzag" if zigzag else "contiguous")
    positions = [torch.tensor([i for r in ranges for i in r]) for ranges in layout]
    assert torch.cat(positions).sort().values.tolist() == list(range(sum(shards)))
    needed = {0}
    left, right = window
    for rank in range(len(shards)):
        for source in range(len(shards)):
            distance = positions[rank][:, None] - positions[source]
            visible = torch.ones_like(distance, dtype=torch.bool)
            if left is not None:
                visible &= distance <= left
            if right is not None:
                visible &= distance >= -right
            assert torch.equal(visible_pairs(layout, rank, source, window), visible.int())
            if visible.any():
                needed.add((rank - source) % len(shards))
    assert set(visited_hops(layout, *window)) == needed


def test_zigzag_balances_causal_work_and_windows_end_the_ring() -> None:
    ranks, length = 8, 64
    layouts = {name: make_layout((length,) * ranks, name) for name in ("contiguous", "zigzag")}
    work = {
        name: [
            sum(int(visible_pairs(layout, rank, other, (None, 0)).sum()) for other in range(ranks))
            for rank in range(ranks)
        ]
        for name, layout in layouts.items()
    }
    assert len(set(work["zigzag"])) == 1
    assert max(work["contiguous"]) > 14 * min(work["contiguous"])
    # Every step of a zigzag ring but the first is one call, without a window.
    for source in range(1, ranks):
        (rectangle,) = rectangles(layouts["zigzag"][0], layouts["zigzag"][source], None, 0)
        assert rectangle.window_size == (None, None)
    assert visited_hops(layouts["contiguous"], 100, 0) == (0, 1, 2)
    assert visited_hops(layouts["contiguous"], 10, 10) == (0, 1, 7)
