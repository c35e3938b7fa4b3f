"""The kernels' interval arithmetic against ``AttentionSpec`` and against the mask itself."""

import itertools

import pytest
import torch
import triton
import triton.language as tl

from flashlayer.kernels.arguments import FULL, LEFT_EDGE, RIGHT_EDGE, Window
from flashlayer.kernels.primitives import (
    key_bounds,
    key_tile_ranges,
    query_bounds,
    query_tile_ranges,
)
from flashlayer.spec import AttentionSpec
from tests.kernels.reference import DEVICE

SIZES = range(1, 7)
WINDOWS = (None, 0, 1, 2, 5)
BLOCK = 2


@triton.jit
def bounds_kernel(
    cases_ptr,
    results_ptr,
    N: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    OF_QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One case a lane: start, stop, offset, length, left, right -> four bounds, three ranges."""
    lane = tl.arange(0, N)
    start = tl.load(cases_ptr + lane)
    stop = tl.load(cases_ptr + N + lane)
    offset = tl.load(cases_ptr + 2 * N + lane)
    length = tl.load(cases_ptr + 3 * N + lane)
    left = tl.load(cases_ptr + 4 * N + lane) if HAS_LEFT else None
    right = tl.load(cases_ptr + 5 * N + lane) if HAS_RIGHT else None
    window = Window(left, right, offset)
    if OF_QUERIES:
        bounds = key_bounds(start, stop, window, length)
        ranges = key_tile_ranges(bounds, BLOCK)
    else:
        bounds = query_bounds(start, stop, window, length)
        ranges = query_tile_ranges(bounds)
    for i in tl.static_range(4):
        tl.store(results_ptr + i * N + lane, bounds[i])
    for i in tl.static_range(3):
        tl.store(results_ptr + (4 + 2 * i) * N + lane, ranges[i][0])
        tl.store(results_ptr + (5 + 2 * i) * N + lane, ranges[i][1])


def exhaustive(left: int | None, right: int | None, of_queries: bool) -> list[tuple]:
    """Every block of every small problem: ``(spec, seqlen_q, seqlen_k, start, stop)``."""
    cases = []
    for diagonal, seqlen_q, seqlen_k in itertools.product(
        ("bottom_right", "top_left"), SIZES, SIZES
    ):
        spec = AttentionSpec(1.0, left, right, diagonal)
        length = seqlen_q if of_queries else seqlen_k
        cases += [
            (spec, seqlen_q, seqlen_k, start, stop)
            for start, stop in itertools.combinations(range(length + 1), 2)
        ]
    return cases


def run(cases: list[tuple], left: int | None, right: int | None, of_queries: bool) -> list:
    size = triton.next_power_of_2(len(cases))
    table = torch.ones(6, size, dtype=torch.int32)
    for lane, (spec, seqlen_q, seqlen_k, start, stop) in enumerate(cases):
        length = seqlen_k if of_queries else seqlen_q
        offset = spec.offset(seqlen_q, seqlen_k)
        row = [start, stop, offset, length, left or 0, right or 0]
        table[:, lane] = torch.tensor(row, dtype=torch.int32)
    results = torch.zeros(10, size, dtype=torch.int32, device=DEVICE)
    bounds_kernel[(1,)](
        table.to(DEVICE),
        results,
        N=size,
        HAS_LEFT=left is not None,
        HAS_RIGHT=right is not None,
        OF_QUERIES=of_queries,
        BLOCK=BLOCK,
    )
    return results.T[: len(cases)].tolist()


def edges_of(ranges: list[int], order: tuple) -> list[int]:
    """The four edges of three ranges, each of which begins where the one before it stops."""
    pairs = [ranges[2 * r.value : 2 * r.value + 2] for r in order]
    assert [stop for _, stop in pairs[:-1]] == [start for start, _ in pairs[1:]]
    return [pairs[0][0], *(stop for _, stop in pairs)]


@pytest.mark.parametrize("right", WINDOWS)
@pytest.mark.parametrize("left", WINDOWS)
def test_key_bounds(left: int | None, right: int | None) -> None:
    cases = exhaustive(left, right, of_queries=True)
    for case, result in zip(cases, run(cases, left, right, True), strict=True):
        spec, seqlen_q, seqlen_k, start, stop = case
        bounds, edges = result[:4], edges_of(result[4:], (LEFT_EDGE, FULL, RIGHT_EDGE))
        assert bounds == list(spec.key_bounds(start, stop, seqlen_q, seqlen_k)), case
        any_start, all_start, all_stop, any_stop = bounds
        # Every visible key lies in a range; FULL is whole tiles, visible to every query.
        assert edges[0] == any_start
        assert edges[3] == any_stop
        assert edges[0] <= edges[1] <= edges[2], case
        assert (edges[1] - edges[0]) % BLOCK == (edges[2] - edges[1]) % BLOCK == 0, case
        assert edges[2] == edges[1] or all_start <= edges[1] <= edges[2] <= all_stop, case


@pytest.mark.parametrize("right", WINDOWS)
@pytest.mark.parametrize("left", WINDOWS)
def test_query_bounds(left: int | None, right: int | None) -> None:
    cases = exhaustive(left, right, of_queries=False)
    for case, result in zip(cases, run(cases, left, right, False), strict=True):
        spec, seqlen_q, seqlen_k, start, stop = case
        any_start, all_start, all_stop, any_stop = result[:4]
        edges = edges_of(result[4:], (RIGHT_EDGE, FULL, LEFT_EDGE))
        visible = spec.visible(0, seqlen_q, start, stop, seqlen_q, seqlen_k, torch.device("cpu"))
        queries = range(seqlen_q)
        some = [i for i in queries if visible[i].any()]
        every = [i for i in queries if visible[i].all()]
        assert [i for i in queries if any_start <= i < any_stop] == some, case
        assert [i for i in queries if all_start <= i < all_stop] == every, case
        # In FULL every pair is visible; the edges fit the static count.
        assert edges == sorted(edges), case
        assert (edges[0], edges[3]) == (any_start, max(any_start, any_stop)), case
        assert edges[2] == edges[1] or (edges[1], edges[2]) == (all_start, all_stop), case
        assert max(edges[1] - edges[0], edges[3] - edges[2]) < stop - start, case
        if left is None:
            assert edges[3] == edges[2], case
        if right is None:
            assert edges[1] == edges[0], case
