"""The race check: each kind of unordered access is found, and the ordered form passes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.assembly import aligned, run
from tests.ptx.formats import SHARED_BASE, Race
from tests.ptx.test_asynchronous import ADDRESSES, COPY_OUT, LOAD, OUT, lines, tensor_map
from tests.ptx.test_matrices import descriptor, encode, image, k_major, multiply, small_integers

SEEDS = range(6)  # orders of the warps: the check must not depend on which one ran first


def races(body: str, **options: object) -> list[str]:
    """What is reported, over several orders of the warps."""
    found = []
    for seed in SEEDS:
        try:
            run(body, warps=2, shared=256, seed=seed, **options)
        except Race as race:
            found.append(str(race))
    return found


TWO_WARPS = """
    mov.b32 %r0, global_smem;
    setp.eq.u32 %p0, %warp, 0;
    setp.eq.u32 %p1, %warp, 1;
    shl.b32 %r2, %lane, 2;
    add.s32 %r0, %r0, %r2;
"""


@pytest.mark.parametrize("sync", [True, False])
def test_a_read_of_what_another_warp_wrote_needs_a_barrier(sync: bool) -> None:
    barrier = "bar.sync 0;" if sync else ""
    body = f"""
        @%p0 st.shared.b32 [%r0], %lane;
        {barrier}
        @%p1 ld.shared.b32 %r1, [%r0];
    """
    found = races(TWO_WARPS + body)
    if sync:
        assert not found
    else:  # before the write it reads what nobody has written
        assert len(found) == len(SEEDS)
        assert any("reads what another warp wrote, without a barrier" in x for x in found)


@pytest.mark.parametrize("sync", [True, False])
def test_a_write_over_what_another_warp_read_needs_a_barrier(sync: bool) -> None:
    barrier = "bar.sync 0;" if sync else ""
    body = f"""
        @%p0 st.shared.b32 [%r0], %lane;
        bar.sync 0;
        @%p1 ld.shared.b32 %r1, [%r0];
        {barrier}
        @%p0 st.shared.b32 [%r0], %tid;
    """
    body += "@%p0 st.shared.b32 [%r0], 77;"
    found = races(TWO_WARPS + body)
    assert len(found) == (0 if sync else len(SEEDS))
    assert sync or any("has read" in x for x in found)
    assert all("has read" in x or "without a barrier between" in x for x in found)


def test_a_write_over_another_warps_write_is_a_race_unless_nothing_changes() -> None:
    same = "st.shared.b32 [%r0], 5;"
    assert not races(TWO_WARPS + same)
    different = "add.s32 %r1, %warp, 5; st.shared.b32 [%r0], %r1;"
    found = races(TWO_WARPS + different)
    assert len(found) == len(SEEDS)
    assert all("writes over what another warp" in x for x in found)


def test_a_read_of_what_nobody_has_written_is_reported() -> None:
    found = races("mov.b32 %r0, global_smem; ld.shared.b32 %r1, [%r0+16];")
    assert len(found) == len(SEEDS)
    assert all("nobody has written (shared byte 16" in x for x in found)


def test_a_lane_of_a_vector_that_nothing_reads_is_no_access() -> None:
    body = """
        mov.b32 %r0, global_smem;
        shl.b32 %r9, %warp, 4;
        add.s32 %r9, %r0, %r9;
        st.shared.v2.b32 [%r9], {1, 2};
        ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r9];
        add.s32 %r5, %r1, %r2;
    """
    assert not races(body)
    found = races(body + "add.s32 %r6, %r1, %r4;")
    assert len(found) == len(SEEDS)
    assert all("nobody has written" in x for x in found)


def test_named_barriers_order_only_those_that_meet() -> None:
    body = """
        setp.eq.u32 %p2, %warp, 2;
        @%p0 st.shared.b32 [%r0], 5;
        @!%p2 bar.sync 1, 64;
        @{reader} ld.shared.b32 %r1, [%r0];
    """
    for seed in SEEDS:
        ordered = TWO_WARPS + body.format(reader="%p1")
        run(ordered, warps=3, shared=256, seed=seed)
        with pytest.raises(Race):
            run(TWO_WARPS + body.format(reader="%p2"), warps=3, shared=256, seed=seed)


def test_an_mbarrier_orders_what_was_done_before_arriving_and_nothing_after() -> None:
    body = """
        mov.b32 %r9, global_smem;
        setp.eq.u32 %p2, %tid, 0;
        @%p2 mbarrier.init.shared::cta.b64 [%r9+192], 32;
        bar.sync 0;
        @%p1 bra $reader;
        {before}
        mbarrier.arrive.shared::cta.b64 _, [%r9+192], 1;
        {after}
        bra $end;
    $reader:
        mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r9+192], 0;
        ld.shared.b32 %r1, [%r0];
    $end:
    """
    store = "st.shared.b32 [%r0], 5;"
    assert not races(TWO_WARPS + body.format(before=store, after=""))
    assert len(races(TWO_WARPS + body.format(before="", after=store))) == len(SEEDS)


# ------------------------------------------------------------------------- asynchronous operations


@pytest.mark.parametrize("late", [False, True])
def test_a_copy_must_be_waited_for_before_its_bytes_are_touched(late: bool) -> None:
    copy = "cp.async.cg.shared.global [%r9], [%rd1], 16; cp.async.commit_group;"
    out = aligned((32, 4), np.uint32)
    with pytest.raises(Race, match="reads what an asynchronous copy still writes"):
        run(ADDRESSES + copy + OUT, lines(), out, shared=512, late=late)
    store = "st.shared.v4.b32 [%r9], {%r0, %r0, %r0, %r0};"
    with pytest.raises(Race, match="writes over what another warp, or an asynchronous copy"):
        run(ADDRESSES + copy + store, lines(), out, shared=512, late=late)
    for group in ("cp.async.wait_group 1;", ""):
        with pytest.raises(Race):
            run(ADDRESSES + copy + group + OUT, lines(), out, shared=512, late=late)
    run(ADDRESSES + copy + "cp.async.wait_group 0;" + OUT, lines(), out, shared=512, late=late)


def test_waiting_for_a_copy_tells_the_own_warp_alone() -> None:
    """The other warp reads after the wait of the first one: without a barrier a race."""
    body = """
        @%p1 bra $reader;
        cvt.u64.u32 %rd0, %r2;
        add.s64 %rd0, %a0, %rd0;
        cp.async.ca.shared.global [%r0], [%rd0], 4;
        cp.async.wait_all;
    $reader:
        {barrier}
        @%p1 ld.shared.b32 %r1, [%r0];
    """
    x = aligned(32, np.uint32)
    for seed in SEEDS:
        run(TWO_WARPS + body.format(barrier="bar.sync 0;"), x, warps=2, shared=256, seed=seed)
        with pytest.raises(Race):
            run(TWO_WARPS + body.format(barrier=""), x, warps=2, shared=256, seed=seed)


def product(**changes: object) -> np.ndarray:
    a, b = small_integers((64, 16)), small_integers((8, 16))
    a_image, *a_offsets = k_major(encode(a, "bf16"), 128)
    b_image, *b_offsets = k_major(encode(b, "bf16"), 128)
    a_desc = descriptor(SHARED_BASE, *a_offsets, 1)
    b_desc = descriptor(SHARED_BASE + len(a_image), *b_offsets, 1)
    images = image(a_image), image(b_image)
    return multiply("bf16", *images, a_desc, b_desc, 8, flags=", 0, 0", **changes)


def test_wgmma_needs_a_fence_after_ordinary_writes() -> None:
    product()
    with pytest.raises(Race, match="without fence"):
        product(fence="")
    product(fence="", fences=False)


def test_a_fence_covers_what_was_written_before_it_and_not_after() -> None:
    again = """
        bar.sync 0;
        mov.b32 %r0, global_smem;
        shl.b32 %r1, %tid, 4;
        add.s32 %r0, %r0, %r1;
        ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r0];
        st.shared.v4.b32 [%r0], {%r4, %r5, %r6, %r7};
    """
    with pytest.raises(Race, match="without fence"):
        product(fence="fence.proxy.async.shared::cta;" + again)


def test_a_fence_does_not_cover_a_copy_that_is_still_under_way() -> None:
    """B comes by cp.async, with the fence before its wait, or after it."""
    copy = """
        bar.sync 0;
        mov.b32 %r0, global_smem;
        add.s32 %r0, %r0, 8192;
        shl.b32 %r1, %tid, 4;
        add.s32 %r0, %r0, %r1;
        cvt.u64.u32 %rd0, %r1;
        add.s64 %rd0, %a1, %rd0;
        setp.lt.u32 %p2, %tid, 64;
        @%p2 cp.async.cg.shared.global [%r0], [%rd0], 16;
        {first}
        {second}
    """
    fence, wait = "fence.proxy.async.shared::cta;", "cp.async.wait_all;"
    product(fence=fence + copy.format(first=wait, second=fence))
    with pytest.raises(Race, match="without fence"):
        product(fence=fence + copy.format(first=fence, second=wait))


def test_wgmma_needs_a_barrier_after_other_warps_writes() -> None:
    without = "fence.proxy.async.shared::cta; bra $skip; bar.sync 1; $skip:"
    product(fence=without)
    with pytest.raises(Race):
        _without_barrier()


def _without_barrier() -> None:
    """The product of :func:`product` with the barrier before it taken out."""
    from tests.ptx import assembly

    whole = assembly.module

    def edited(body: str, *rest: object) -> str:
        assert body.count("bar.sync 0;") == 1
        return whole(body.replace("bar.sync 0;", ""), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "module", edited)
        product()


def test_what_a_wgmma_reads_may_not_be_written_before_its_wait() -> None:
    store = """
        mov.b32 %r0, global_smem;
        shl.b32 %r1, %tid, 4;
        add.s32 %r0, %r0, %r1;
        st.shared.v4.b32 [%r0], {{%r1, %r1, %r1, %r1}};
        {wait}
    """
    wait = "wgmma.wait_group.sync.aligned 0;"
    for seed in SEEDS:  # a warp writes what its own product reads, or what another's will read
        with pytest.raises(Race, match=r"a wgmma still reads|another warp wrote"):
            product(wait=store.format(wait=wait), seed=seed)
    product(wait=wait + "bar.sync 1;" + store.format(wait=""))
    # The own warp's wait is not enough: every warp of the group reads all of B.
    with pytest.raises(Race, match=r"has read|another warp wrote"):
        product(wait=wait + store.format(wait=""))


@pytest.mark.parametrize("late", [False, True])
def test_a_tensor_copy_must_be_waited_for_by_its_mbarrier(late: bool) -> None:
    x, out = aligned((7, 32), np.uint16), aligned((2, 16), np.uint16)
    body = (LOAD + COPY_OUT).format(mbarrier=128, nbytes=64, rank=2, corner="0, 0")
    arguments = tensor_map(x, (2, 16)), out, x
    run(body, *arguments, shared=256, late=late)
    without = "\n".join(line for line in body.splitlines() if "try_wait" not in line)
    with pytest.raises(Race, match=r"reads what|still writes"):
        run(without, *arguments, shared=256, late=late)


def test_waiting_for_a_tensor_copy_tells_of_its_bytes_and_of_nothing_else() -> None:
    """Warp 0 copies and waits; what warp 1 wrote meanwhile it may not read."""
    x, out = aligned((7, 32), np.uint16), aligned((2, 16), np.uint16)
    load = LOAD.format(mbarrier=128, nbytes=64, rank=2, corner="0, 0")
    start, wait = load.split("    mbarrier.try_wait")
    start += "setp.eq.u32 %p2, %warp, 1; @%p2 st.shared.b32 [%r0+192], 5; @%p2 bra $end;"
    body = start + "mbarrier.try_wait" + wait + "ld.shared.b32 %r5, [%r0+{offset}]; $end:"
    arguments = tensor_map(x, (2, 16)), out, x
    for seed in SEEDS:
        options = {"warps": 2, "shared": 256, "seed": seed}
        run(body.replace("{offset}", "0"), *arguments, **options)
        with pytest.raises(Race, match=r"another warp wrote|nobody has written"):
            run(body.replace("{offset}", "192"), *arguments, **options)


def test_a_tensor_copy_may_need_a_fence_after_its_mbarriers_initialisation() -> None:
    x, out = aligned((7, 32), np.uint16), aligned((2, 16), np.uint16)
    body = LOAD.format(mbarrier=128, nbytes=64, rank=2, corner="0, 0")
    arguments = tensor_map(x, (2, 16)), out, x
    run(body, *arguments, shared=256)
    with pytest.raises(Race, match="an mbarrier that was initialised without fence"):
        run(body, *arguments, shared=256, barrier_fences=True)
    fenced = body.replace("bar.sync 0;", "fence.proxy.async.shared::cta; bar.sync 0;")
    run(fenced, *arguments, shared=256, barrier_fences=True)


def test_the_check_can_be_switched_off() -> None:
    run("mov.b32 %r0, global_smem; ld.shared.b32 %r1, [%r0];", shared=64, races=False)
