"""cp.async, tensor copies (TMA) and mbarriers: values, edges, and when they take effect."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.ptx.assembly import aligned, run
from tests.ptx.asynchronous import TensorMap
from tests.ptx.formats import LANES, SHARED_BASE, UNSIGNED, Array, EmulatorError

# ---------------------------------------------------------------------------------------- cp.async

ADDRESSES = """
    mul.wide.u32 %rd0, %lane, 16;
    add.s64 %rd1, %a0, %rd0;
    add.s64 %rd2, %a1, %rd0;
    mov.b32 %r9, global_smem;
    shl.b32 %r8, %lane, 4;
    add.s32 %r9, %r9, %r8;
"""
OUT = """
    ld.shared.v4.b32 {%r0, %r1, %r2, %r3}, [%r9];
    st.global.v4.b32 [%rd2], {%r0, %r1, %r2, %r3};
"""


def lines() -> Array:
    x = aligned((LANES, 4), np.uint32)
    x[...] = np.arange(4 * LANES).reshape(LANES, 4) + 1
    return x


@pytest.mark.parametrize("late", [False, True])
def test_cp_async_copies_and_fills_with_zeros_past_its_source_size(late: bool) -> None:
    x, out = lines(), aligned((LANES, 4), np.uint32, 7)
    body = """
        and.b32 %r7, %lane, 1;
        mul.lo.s32 %r7, %r7, 8;
        cp.async.cg.shared.global [%r9], [%rd1], 16, %r7;
        cp.async.commit_group;
        cp.async.wait_group 0;
    """
    run(ADDRESSES + body + OUT, x, out, shared=512, late=late)
    expected = np.where(np.arange(LANES)[:, None] % 2 * (np.arange(4) < 2), x, 0)
    np.testing.assert_array_equal(out, expected)


def test_cp_async_of_no_bytes_reads_nothing() -> None:
    """Its source may be outside of every tensor."""
    out = aligned((LANES, 4), np.uint32, 7)
    body = "mov.b64 %rd1, 4096; cp.async.cg.shared.global [%r9], [%rd1], 16, 0;"
    run(ADDRESSES + body + "cp.async.wait_all;" + OUT, lines(), out, shared=512)
    np.testing.assert_array_equal(out, 0)


def test_cp_async_late_takes_effect_at_the_wait_for_its_group() -> None:
    """``wait_group 1`` completes all but the last group; memory is read only then."""
    x, out = lines(), aligned((LANES, 4), np.uint32, 7)
    before = x.copy()
    body = """
        cp.async.cg.shared.global [%r9], [%rd1], 16;
        cp.async.commit_group;
        cp.async.cg.shared.global [%r9+512], [%rd1], 16;
        cp.async.commit_group;
        cp.async.wait_group 1;
        mov.b32 %r0, 99;
        st.global.v4.b32 [%rd1], {%r0, %r0, %r0, %r0};
    """
    run(ADDRESSES + body + OUT, x, out, shared=1024)
    np.testing.assert_array_equal(out, before)
    x[...] = before
    second = OUT.replace("[%r9]", "[%r9+512]")
    run(ADDRESSES + body + "cp.async.wait_group 0;" + second, x, out, shared=1024)
    np.testing.assert_array_equal(out, 99)
    x[...] = before
    run(ADDRESSES + body + "cp.async.wait_all;" + second, x, out, shared=1024, late=False)
    np.testing.assert_array_equal(out, before)


def test_groups_are_counted_thread_by_thread() -> None:
    """Half of the lanes commit an empty group more: their first copy is complete, not the others'.

    What the others read is what was there before, without a race check that would stop it.
    """
    x, out = lines(), aligned((LANES, 4), np.uint32, 7)
    body = """
        cp.async.cg.shared.global [%r9], [%rd1], 16;
        cp.async.commit_group;
        setp.lt.u32 %p0, %lane, 16;
        @%p0 cp.async.commit_group;
        cp.async.wait_group 1;
    """
    run(ADDRESSES + body + OUT, x, out, shared=512, races=False)
    np.testing.assert_array_equal(out[:16], x[:16])
    np.testing.assert_array_equal(out[16:], 0xFFFFFFFF)


# ------------------------------------------------------------------------------------ tensor copies

LOAD = """
    mov.b32 %r0, global_smem;
    add.s32 %r1, %r0, {mbarrier};
    setp.eq.u32 %p0, %tid, 0;
    @%p0 mbarrier.init.shared::cta.b64 [%r1], 1;
    bar.sync 0;
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], {nbytes};
    @%p0 cp.async.bulk.tensor.{rank}d.shared::cta.global.mbarrier::complete_tx::bytes
        [%r0], [%a0, {{{corner}}}], [%r1];
    mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], 0;
"""
COPY_OUT = """
    mov.b32 %r2, 0;
$next:
    shl.b32 %r3, %lane, 4;
    add.s32 %r3, %r3, %r2;
    setp.ge.u32 %p2, %r3, {nbytes};
    @%p2 bra $end;
    add.s32 %r4, %r0, %r3;
    ld.shared.v4.b32 {{%r5, %r6, %r7, %r8}}, [%r4];
    cvt.u64.u32 %rd0, %r3;
    add.s64 %rd0, %a1, %rd0;
    st.global.v4.b32 [%rd0], {{%r5, %r6, %r7, %r8}};
    add.s32 %r2, %r2, 512;
    bra $next;
$end:
"""


def tensor_map(x: Array, box: tuple[int, ...], swizzle: int = 0) -> TensorMap:
    return TensorMap(
        address=x.ctypes.data,
        dtype=UNSIGNED[x.dtype.itemsize],
        shape=list(x.shape[::-1]),
        strides=list(x.strides[::-1]),
        box=list(box[::-1]),
        swizzle=swizzle,
    )


def copy_box(
    x: Array, box: tuple[int, ...], corner: tuple[int, ...], swizzle: int = 0, **options: Any
) -> Array:
    """What a tensor copy leaves in shared memory, as the elements of ``box``."""
    nbytes = int(np.prod(box)) * x.dtype.itemsize
    out = aligned(box, x.dtype)
    settings = {
        "mbarrier": -(-nbytes // 128) * 128,
        "nbytes": nbytes,
        "rank": len(box),
        "corner": ", ".join(str(c) for c in corner[::-1]),
    }
    body = (LOAD + COPY_OUT).format(**settings)
    # The map's tensor must be one of the launch's: it is the third argument.
    run(body, tensor_map(x, box, swizzle), out, x, shared=settings["mbarrier"] + 16, **options)
    return out


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("box", "corner"),
    [
        ((4, 16), (0, 0)),
        ((4, 16), (2, 8)),
        ((4, 16), (5, 24)),  # past the end of both dimensions
        ((4, 16), (-2, -8)),  # before the start
        ((4, 16), (7, 40)),  # wholly outside
    ],
)
def test_a_box_holds_zeros_where_the_tensor_ends(
    box: tuple[int, int], corner: tuple[int, int], late: bool
) -> None:
    x = aligned((7, 32), np.uint16)
    x[...] = np.arange(7 * 32).reshape(7, 32) + 1
    padded = np.zeros((7 + 32, 32 + 64), np.uint16)
    padded[16:23, 32:64] = x
    row, column = corner[0] + 16, corner[1] + 32
    expected = padded[row : row + box[0], column : column + box[1]]
    np.testing.assert_array_equal(copy_box(x, box, corner, late=late), expected)


def test_a_box_of_four_dimensions_ends_at_each_of_them() -> None:
    x = aligned((2, 3, 5, 8), np.uint32)
    x[...] = np.arange(x.size).reshape(x.shape) + 1
    expected = np.zeros((1, 1, 4, 8), np.uint32)
    expected[0, 0, :2] = x[1, 2, 3:]
    np.testing.assert_array_equal(copy_box(x, (1, 1, 4, 8), (1, 2, 3, 0)), expected)
    outside = copy_box(x, (1, 1, 4, 8), (1, 3, 0, 0))
    np.testing.assert_array_equal(outside, 0)


def test_strides_of_the_map_are_honoured() -> None:
    whole = aligned((6, 64), np.uint16)
    whole[...] = np.arange(whole.size).reshape(whole.shape)
    x = whole[::2, 8:40]
    out = aligned((2, 16), np.uint16)
    body = (LOAD + COPY_OUT).format(mbarrier=128, nbytes=64, rank=2, corner="0, 1")
    run(body, tensor_map(x, (2, 16)), out, whole, shared=144)
    np.testing.assert_array_equal(out, x[1:3, :16])


@pytest.mark.parametrize(("swizzle", "width"), [(1, 32), (2, 64), (3, 128)])
def test_swizzling_exchanges_chunks_of_16_bytes_by_the_row(swizzle: int, width: int) -> None:
    """Chunk c of row r lies where bits 7 and up of its address, XORed into bits 4 and up, say."""
    columns = width // 2
    x = aligned((16, columns), np.uint16)
    x[...] = np.arange(x.size).reshape(x.shape)
    out = copy_box(x, (16, columns), (0, 0), swizzle).reshape(-1, 8)
    for row in range(16):
        for chunk in range(width // 16):
            at = row * width + 16 * chunk
            moved = at ^ ((at // 128 % (width // 16)) * 16)
            np.testing.assert_array_equal(out[moved // 16], x[row, 8 * chunk : 8 * chunk + 8])
    assert not np.array_equal(out, x.reshape(-1, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"address": 8}, "not multiples of 16"),
        ({"strides": [2, 40]}, "not multiples of 16"),
        ({"strides": [4, 64]}, "not contiguous"),
        ({"box": [4, 2]}, r"a box of \[4, 2\]"),
        ({"box": [512, 2]}, r"a box of \[512, 2\]"),
        ({"shape": [32, 0]}, r"shape \[32, 0\]"),
        ({"box": [32, 2], "swizzle": 1}, "rows of 64 bytes, swizzled in 32"),
    ],
)
def test_a_map_that_the_driver_would_refuse_is_an_error(
    change: dict[str, Any], message: str
) -> None:
    arguments = {
        "address": 0,
        "dtype": np.uint16,
        "shape": [32, 7],
        "strides": [2, 64],
        "box": [16, 2],
        "swizzle": 0,
    }
    TensorMap(**arguments)
    with pytest.raises(EmulatorError, match=message):
        TensorMap(**(arguments | change))


def test_a_tensor_copy_needs_an_aligned_target_and_all_coordinates() -> None:
    x, out = aligned((7, 32), np.uint16), aligned((2, 16), np.uint16)
    body = LOAD.format(mbarrier=256, nbytes=64, rank=2, corner="0, 0")
    unaligned = body.replace("[%r0], [%a0", "[%r0+8], [%a0")
    with pytest.raises(EmulatorError, match="0x408, not aligned"):
        run(unaligned, tensor_map(x, (2, 16)), out, x, shared=512)
    with pytest.raises(EmulatorError, match="there is no tensor map at"):
        run(body.replace("[%a0", "[%a1"), tensor_map(x, (2, 16)), out, x, shared=512)
    with pytest.raises(EmulatorError, match="1 coordinates for a box"):
        run(body.replace("{0, 0}", "{0}"), tensor_map(x, (2, 16)), out, x, shared=512)


# --------------------------------------------------------------------------------------- mbarriers


def test_an_mbarrier_opens_when_all_have_arrived_and_again_in_the_next_phase() -> None:
    """Warp 0 waits for phases 0 and 1, to each of which 32 threads of warp 1 arrive."""
    out = aligned(1, np.uint32)
    body = """
        mov.b32 %r0, global_smem;
        setp.eq.u32 %p0, %tid, 0;
        @%p0 mbarrier.init.shared::cta.b64 [%r0+64], 32;
        bar.sync 0;
        setp.eq.u32 %p1, %warp, 0;
        @%p1 bra $wait;
        st.shared.b32 [%r0], %warp;
        mbarrier.arrive.shared::cta.b64 _, [%r0+64], 1;
        bar.sync 1, 64;
        st.shared.b32 [%r0+16], %warp;
        mbarrier.arrive.shared::cta.b64 _, [%r0+64], 1;
        bra $end;
    $wait:
        mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r0+64], 0;
        ld.shared.b32 %r1, [%r0];
        bar.sync 1, 64;
        mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r0+64], 1;
        ld.shared.b32 %r2, [%r0+16];
        add.s32 %r3, %r1, %r2;
        st.global.b32 [%a0], %r3;
    $end:
    """
    for seed in range(5):
        out[:] = 0
        run(body, out, warps=2, shared=128, seed=seed)
        assert out == 2


def test_waiting_for_the_phase_before_goes_on_at_once() -> None:
    """Parity 1 of a fresh barrier: how a producer finds its first buffer empty."""
    body = """
        mov.b32 %r0, global_smem;
        setp.eq.u32 %p0, %tid, 0;
        @%p0 mbarrier.init.shared::cta.b64 [%r0], 1;
        mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r0], 1;
    """
    run(body, shared=16)
    with pytest.raises(EmulatorError, match="deadlock: warp 0: mbarrier"):
        run(body.replace("%p1, [%r0], 1;", "%p1, [%r0], 0;"), shared=16)


def test_more_arrivals_than_an_mbarrier_counts_are_an_error() -> None:
    init = "mov.b32 %r0, global_smem; setp.eq.u32 %p0, %tid, 0;"
    arrive = "@%p0 mbarrier.arrive.shared::cta.b64 _, [%r0], 3;"
    with pytest.raises(EmulatorError, match="more arrivals"):
        run(init + "@%p0 mbarrier.init.shared::cta.b64 [%r0], 2;" + arrive, shared=16)
    with pytest.raises(EmulatorError, match=f"no mbarrier was initialised at {SHARED_BASE:#x}"):
        run(init + arrive, shared=16)
    invalidated = "@%p0 mbarrier.init.shared::cta.b64 [%r0], 4; @%p0 mbarrier.inval.shared::cta.b64"
    with pytest.raises(EmulatorError, match="no mbarrier was initialised"):
        run(init + invalidated + " [%r0];" + arrive, shared=16)


def test_a_phase_ends_only_when_the_expected_bytes_have_come() -> None:
    x, out = aligned((7, 32), np.uint16), aligned((2, 16), np.uint16)
    body = (LOAD + COPY_OUT).format(mbarrier=128, nbytes=64, rank=2, corner="0, 0")
    too_many = body.replace("_, [%r1], 64", "_, [%r1], 80")
    with pytest.raises(EmulatorError, match="deadlock: warp 0: mbarrier"):
        run(too_many, tensor_map(x, (2, 16)), out, x, shared=256)
