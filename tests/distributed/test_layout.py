"""Which positions the shards hold, and which pairs of them are computed; needs no processes."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashlayer.distributed.layout import (
    Layout,
    make_layout,
    plan_route,
    rectangles,
    visited_hops,
)
from flashlayer.masks import IntervalMask, chunks


def visible_pairs(
    layout: Layout, rank: int, source: int, window: Any, ranges: Any = None
) -> Tensor:
    """How often each (query, key) of two shards is computed; no row or column may be empty."""
    q_length, k_length = (sum(map(len, layout[index])) for index in (rank, source))
    count = torch.zeros(q_length, k_length, dtype=torch.int)
    for q_rows, k_rows, (left, right) in rectangles(layout[rank], layout[source], *window, ranges):
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
shard_lengths = st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple) | st.tuples(
    st.integers(1, 5), st.integers(0, 4)
).map(lambda x: (2 * x[1],) * x[0])


def layout_of(shards: tuple[int, ...], zigzag: bool) -> tuple[Layout, list[Tensor]]:
    zigzag = zigzag and len(set(shards)) == 1 and shards[0] % 2 == 0
    layout = make_layout(shards, "zigzag" if zigzag else "contiguous")
    return layout, [torch.tensor([i for r in ranges for i in r]).long() for ranges in layout]


def in_window(distance: Tensor, window: tuple[int | None, int | None]) -> Tensor:
    left, right = window
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        visible &= distance <= left
    if right is not None:
        visible &= distance >= -right
    return visible


@settings(deadline=None, max_examples=100)
@given(
    shards=shard_lengths,
    zigzag=st.booleans(),
    window=st.tuples(side, side),
)
def test_rectangles_hold_every_visible_pair_once(
    shards: tuple[int, ...], zigzag: bool, window: tuple[int | None, int | None]
) -> None:
    """Over all steps, and no step is without a visible pair on some rank."""
    layout, positions = layout_of(shards, zigzag)
    assert torch.cat(positions).sort().values.tolist() == list(range(sum(shards)))
    needed = {0}
    for rank in range(len(shards)):
        for source in range(len(shards)):
            visible = in_window(positions[rank][:, None] - positions[source], window)
            assert torch.equal(visible_pairs(layout, rank, source, window), visible.int())
            if visible.any():
                needed.add((rank - source) % len(shards))
    assert set(visited_hops(layout, *window)) == needed


@settings(deadline=None, max_examples=100)
@given(
    shards=shard_lengths,
    zigzag=st.booleans(),
    window=st.tuples(side, side),
    heads=st.integers(1, 2),
    longest=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_a_mask_leaves_the_pairs_it_shows_and_no_hop_more(
    shards: tuple[int, ...],
    zigzag: bool,
    window: tuple[int | None, int | None],
    heads: int,
    longest: int,
    seed: int,
) -> None:
    """Cropped to each rectangle it is the whole mask's part; the route follows from the pairs."""
    layout, positions = layout_of(shards, zigzag)
    generator, total = torch.Generator().manual_seed(seed), sum(shards)
    starts = torch.randint(0, total + 1, (1, heads, 2, total), generator=generator)
    stops = torch.randint(0, longest, starts.shape, generator=generator) + starts
    ends = torch.stack((starts, stops.clamp(max=total)), dim=3).flatten(2, 3)
    mask = IntervalMask(ends, total)
    dense, route = mask.materialize(), plan_route(mask, layout, *window)
    assert route is plan_route(mask, layout, *window)
    needed, last = {0}, [0] * len(shards)
    cuts = [[slice(r.start, r.stop) for r in ranges] for ranges in layout]
    for rank, q_position in enumerate(positions):
        for source, k_position in enumerate(positions):
            shown = mask.crop(cuts[rank], cuts[source]).materialize()
            assert torch.equal(shown, dense[:, :, q_position][..., k_position])
            computed = visible_pairs(layout, rank, source, window, route.visible)
            visible = shown & in_window(q_position[:, None] - k_position, window)
            assert torch.equal((shown & (computed == 1)), visible)
            assert computed.any() == visible.any()
            if visible.any():
                hops = (rank - source) % len(shards)
                needed.add(hops)
                last[source] = max(last[source], hops)
    assert set(route.hops) == needed
    assert list(route.last) == last


def test_a_route_is_kept_as_long_as_its_mask() -> None:
    layout, mask = make_layout((8, 8), "contiguous"), chunks(8, seqlen=16)
    route = weakref.ref(plan_route(mask, layout, None, None).visible)
    assert route() == {(range(8), range(8)), (range(8, 16), range(8, 16))}
    del mask
    gc.collect()
    assert route() is None


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
