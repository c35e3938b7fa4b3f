"""Exchange within a warp, divergence, and barriers of a CTA."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.assembly import aligned, run
from tests.ptx.formats import LANES, EmulatorError

STORE = """
    mul.wide.u32 %rd0, %tid, 4;
    add.s64 %rd0, %a0, %rd0;
    st.global.b32 [%rd0], %r0;
"""
LANE = np.arange(LANES)


@pytest.mark.parametrize(
    ("mode", "n", "c", "source"),
    [
        ("bfly", 1, 31, LANE ^ 1),
        ("bfly", 16, 31, LANE ^ 16),
        ("idx", 5, 31, np.full(LANES, 5)),
        ("idx", 2, 0x181F, LANE // 8 * 8 + 2),  # segments of 8
        ("up", 3, 0, np.where(LANE >= 3, LANE - 3, LANE)),
        ("down", 3, 31, np.where(LANE < 29, LANE + 3, LANE)),
        ("down", 1, 0x1807, np.where(LANE % 8 < 7, LANE + 1, LANE)),
    ],
)
def test_shfl_reads_the_lane_that_its_mode_says(
    mode: str, n: int, c: int, source: np.ndarray
) -> None:
    out = aligned(LANES, np.uint32)
    run(f"mul.lo.s32 %r1, %lane, 3; shfl.sync.{mode}.b32 %r0, %r1, {n}, {c}, -1;" + STORE, out)
    np.testing.assert_array_equal(out, 3 * source)


def test_shfl_from_a_thread_that_does_not_take_part_is_an_error() -> None:
    body = "setp.lt.u32 %p0, %lane, 16; @%p0 shfl.sync.bfly.b32 %r0, %lane, 16, 31, 65535;"
    with pytest.raises(EmulatorError, match="does not take part"):
        run(body)


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("add.s32", (LANE - 9).sum()),
        ("min.s32", -9),
        ("max.s32", LANES - 10),
        ("max.u32", 2**32 - 1),
        ("min.u32", 0),
        ("or.b32", 2**32 - 1),
    ],
)
def test_redux_reduces_the_warp(op: str, expected: int) -> None:
    out = aligned(LANES, np.uint32)
    run(f"sub.s32 %r1, %lane, 9; redux.sync.{op} %r0, %r1, -1;" + STORE, out)
    np.testing.assert_array_equal(out, np.full(LANES, expected % 2**32, np.uint32))


def test_redux_by_a_part_of_its_threads_is_an_error() -> None:
    body = "setp.lt.u32 %p0, %lane, 16; @%p0 redux.sync.add.s32 %r0, %lane, -1;"
    with pytest.raises(EmulatorError, match="other threads than those of its mask"):
        run(body)


def test_vote_counts_the_threads_that_take_part() -> None:
    out = aligned(LANES, np.uint32)
    body = """
        setp.lt.u32 %p0, %lane, 5;
        vote.sync.ballot.b32 %r1, %p0, -1;
        vote.sync.any.pred %p1, %p0, -1;
        vote.sync.all.pred %p2, !%p0, -1;
        selp.b32 %r2, 64, 0, %p1;
        selp.b32 %r3, 128, 0, %p2;
        add.s32 %r0, %r1, %r2;
        add.s32 %r0, %r0, %r3;
    """
    run(body + STORE, out)
    np.testing.assert_array_equal(out, 31 + 64)


def test_elect_chooses_one_lane() -> None:
    out = aligned(LANES, np.uint32)
    run("elect.sync _|%p0, -1; selp.b32 %r0, 1, 0, %p0;" + STORE, out)
    assert out.sum() == 1


def test_threads_that_diverge_meet_again() -> None:
    """A loop of as many trips as the lane's number; the shuffle after it needs every lane."""
    out = aligned(2 * LANES, np.uint32)
    body = """
        mov.b32 %r1, 0;
        mov.b32 %r2, 0;
    $loop:
        setp.ge.u32 %p0, %r2, %lane;
        @%p0 bra $done;
        add.s32 %r1, %r1, %r2;
        add.s32 %r2, %r2, 1;
        bra.uni $loop;
    $done:
        shfl.sync.bfly.b32 %r0, %r1, 1, 31, -1;
    """
    run(body + STORE, out, warps=2)
    sums = LANE * (LANE - 1) // 2
    np.testing.assert_array_equal(out, np.tile(sums[LANE ^ 1], 2))


def test_a_guard_holds_back_the_lanes_whose_predicate_is_false() -> None:
    out = aligned(LANES, np.uint32, 9)
    body = """
        mov.b32 %r0, 1;
        setp.lt.u32 %p0, %lane, 4;
        @!%p0 mov.b32 %r0, 2;
        setp.lt.u32 %p1, %lane, 8;
        mul.wide.u32 %rd0, %lane, 4;
        add.s64 %rd0, %a0, %rd0;
        @%p1 st.global.b32 [%rd0], %r0;
    """
    run(body, out)
    np.testing.assert_array_equal(out, [1] * 4 + [2] * 4 + [9] * 24)


def test_brx_goes_where_its_table_says() -> None:
    out = aligned(LANES, np.uint32)
    body = """
        and.b32 %r1, %lane, 1;
    $table: .branchtargets $even, $odd;
        brx.idx %r1, $table;
    $even:
        mov.b32 %r0, 10;
        bra $end;
    $odd:
        mov.b32 %r0, 20;
    $end:
    """
    run(body + STORE, out)
    np.testing.assert_array_equal(out, 10 + 10 * (LANE % 2))


def test_every_cta_has_its_own_number() -> None:
    out = aligned(40, np.uint32)
    body = """
        mov.u32 %r0, %ctaid.x;
        mov.u32 %r1, %nctaid.x;
        mad.lo.s32 %r2, %r0, 100, %r1;
        mul.wide.u32 %rd0, %r0, 4;
        add.s64 %rd0, %a0, %rd0;
        st.global.b32 [%rd0], %r2;
    """
    run(body, out, grid=40, at_once=16)
    np.testing.assert_array_equal(out, 100 * np.arange(40) + 40)


def test_a_part_of_a_warp_may_not_execute_an_aligned_instruction() -> None:
    body = "setp.lt.u32 %p0, %lane, 16; @%p0 wgmma.fence.sync.aligned;"
    with pytest.raises(EmulatorError, match="only a part of the warp"):
        run(body)


def test_a_barrier_that_not_all_reach_is_a_deadlock() -> None:
    body = "setp.eq.u32 %p0, %warp, 0; @%p0 bra $end; bar.sync 0; $end:"
    with pytest.raises(EmulatorError, match="deadlock: warp 1: barrier"):
        run(body, warps=2)


def test_named_barriers_count_the_threads_they_are_given() -> None:
    """Warps 0 and 1 meet at barrier 1; warp 2 arrives at barrier 2 without waiting."""
    out = aligned(3 * LANES, np.uint32)
    body = """
        mov.b32 %r0, 1;
        setp.eq.u32 %p0, %warp, 2;
        @%p0 bra $third;
        bar.sync 1, 64;
        setp.eq.u32 %p1, %warp, 0;
        @!%p1 bra $end;
        bar.sync 2, 64;
        bra $end;
    $third:
        bar.arrive 2, 64;
    $end:
    """
    for seed in range(4):
        run(body + STORE, out, warps=3, seed=seed)
    np.testing.assert_array_equal(out, 1)


def test_trap_ends_the_launch() -> None:
    with pytest.raises(EmulatorError, match="trap"):
        run("trap;")
