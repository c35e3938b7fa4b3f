"""Loads and stores, ldmatrix's fragments, and what an access may not touch."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.assembly import aligned, run
from tests.ptx.formats import LANES, SHARED_BASE, EmulatorError
from tests.ptx.machine import launch
from tests.ptx.memory import Memory
from tests.ptx.program import parse


def test_vectors_are_loaded_and_stored_in_order() -> None:
    x = aligned(4 * LANES, np.uint32)
    x[:] = np.arange(4 * LANES) * 7
    out = aligned(4 * LANES, np.uint32)
    body = """
        mul.wide.u32 %rd0, %lane, 16;
        add.s64 %rd1, %a0, %rd0;
        add.s64 %rd2, %a1, %rd0;
        ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%rd1];
        st.global.v2.b32 [%rd2], {%r3, %r2};
        st.global.v2.b32 [%rd2+8], {%r1, %r0};
    """
    run(body, x, out)
    np.testing.assert_array_equal(out.reshape(-1, 4), x.reshape(-1, 4)[:, ::-1])


def test_narrow_loads_are_extended_to_their_register() -> None:
    x = aligned(4, np.int8)
    x[:] = [-3, 5, -1, 127]
    out = aligned(4, np.int32)
    body = """
        ld.global.s8 %r0, [%a0];
        ld.global.u8 %r1, [%a0+2];
        ld.global.s16 %r2, [%a0+2];
        ld.global.u16 %r3, [%a0];
        st.global.v4.b32 [%a1], {%r0, %r1, %r2, %r3};
    """
    run(body, x, out)
    np.testing.assert_array_equal(out, [-3, 255, 127 * 256 + 255, 5 * 256 + 253])


def test_an_access_outside_of_the_tensors_names_thread_and_address() -> None:
    x = aligned(LANES, np.uint32)
    body = """
        mul.wide.u32 %rd0, %lane, 4;
        add.s64 %rd0, %a0, %rd0;
        ld.global.b32 %r0, [%rd0+16];
    """
    with pytest.raises(EmulatorError, match=r"thread 28: address .* is in no tensor of the launch"):
        run(body, x)
    with pytest.raises(EmulatorError, match=r"(?s)no tensor.*at st\.global\.b32 \[%a0\+-4\], %r0"):
        run("st.global.b32 [%a0+-4], %r0;", x)


def test_an_access_that_is_not_aligned_is_an_error() -> None:
    x = aligned(LANES, np.uint32)
    with pytest.raises(EmulatorError, match="is not aligned"):
        run("ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%a0+4];", x)
    with pytest.raises(EmulatorError, match="not aligned to 8"):
        run("mov.b32 %r0, global_smem; st.shared.b64 [%r0+4], %rd0;", shared=64)


def test_what_lies_between_the_elements_of_a_tensor_may_not_be_touched() -> None:
    import torch

    from tests.ptx.assembly import module

    torch_tensor = torch.zeros(8)[::2]
    valid = np.repeat(np.arange(8) % 2 == 0, 4)
    for offset, allowed in ((8, True), (4, False)):
        memory = Memory()
        memory.add(torch_tensor.data_ptr(), 32, valid)
        program = parse(module(f"ld.global.b32 %r0, [%a0+{offset}];", 1, LANES))
        arguments = (program, 1, [torch_tensor.data_ptr()], memory)
        if allowed:
            launch(*arguments, num_warps=1, shared=0)
            continue
        with pytest.raises(EmulatorError, match="between the elements of a tensor"):
            launch(*arguments, num_warps=1, shared=0)


def test_tensors_that_share_a_storage_add_up_and_others_may_not_overlap() -> None:
    x = aligned(64, np.uint8)
    memory = Memory()
    memory.add(x.ctypes.data, 64, np.arange(64) < 32)
    memory.add(x.ctypes.data, 64, np.arange(64) >= 48)
    address = np.array([x.ctypes.data + 4, x.ctypes.data + 48])
    memory.load(None, None, address, np.uint32, 1)
    with pytest.raises(EmulatorError, match="between the elements"):
        memory.load(None, None, address[:1] + 32, np.uint32, 1)
    with pytest.raises(EmulatorError, match="overlap"):
        memory.add(x.ctypes.data + 8, 64)


def test_shared_memory_is_as_large_as_the_launch_says() -> None:
    body = "mov.b32 %r0, global_smem; st.shared.b32 [%r0+60], %r1;"
    run(body, shared=64)
    with pytest.raises(EmulatorError, match=f"{SHARED_BASE + 60:#x} is outside of the CTA's 48"):
        run(body, shared=48)


def test_the_number_of_arguments_is_checked() -> None:
    from tests.ptx.assembly import module

    program = parse(module("", 2, LANES))
    with pytest.raises(EmulatorError, match="1 arguments for 2 parameters"):
        launch(program, 1, [0], Memory(), num_warps=1, shared=0)


# Four 8 x 8 matrices of 16 bits one after another; lane l has the address of row l.
FILL = """
    mul.wide.u32 %rd0, %lane, 16;
    add.s64 %rd0, %a0, %rd0;
    ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%rd0];
    mov.b32 %r9, global_smem;
    shl.b32 %r8, %lane, 4;
    add.s32 %r9, %r9, %r8;
    st.shared.v4.b32 [%r9], {%r0, %r1, %r2, %r3};
    bar.sync 0;
"""
EMPTY = """
    mul.wide.u32 %rd1, %lane, 16;
    add.s64 %rd1, %a1, %rd1;
    st.global.v4.b32 [%rd1], {%r10, %r11, %r12, %r13};
"""


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_gives_each_lane_two_neighbours_of_a_row(trans: str) -> None:
    """Lane t: elements 2 (t % 4) and the next of row t // 4, of each matrix (9.7.14.5.15)."""
    matrices = aligned((4, 8, 8), np.uint16)
    matrices[...] = np.arange(256).reshape(4, 8, 8)
    out = aligned((LANES, 4, 2), np.uint16)
    load = f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r9];"
    run(FILL + load + EMPTY, matrices, out, shared=512)
    source = matrices.swapaxes(1, 2) if trans else matrices
    for lane in range(LANES):
        for i in range(4):
            pair = source[i, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
            np.testing.assert_array_equal(out[lane, i], pair)


def test_ldmatrix_x2_takes_the_addresses_of_the_first_sixteen_lanes() -> None:
    matrices = aligned((4, 8, 8), np.uint16)
    matrices[...] = np.arange(256).reshape(4, 8, 8)
    out = aligned((LANES, 4, 2), np.uint16)
    # The other lanes' addresses are outside of shared memory, and are not looked at.
    load = """
        setp.ge.u32 %p0, %lane, 16;
        @%p0 mov.b32 %r9, 0;
        ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r10, %r11}, [%r9];
        mov.b32 %r12, 0;
        mov.b32 %r13, 0;
    """
    run(FILL + load + EMPTY, matrices, out, shared=512)
    np.testing.assert_array_equal(out[:, :2].swapaxes(0, 1).reshape(2, 8, 8), matrices[:2])


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_stmatrix_is_the_inverse_of_ldmatrix(trans: str) -> None:
    matrices = aligned((4, 8, 8), np.uint16)
    matrices[...] = np.arange(256).reshape(4, 8, 8)
    out = aligned((4, 8, 8), np.uint16)
    body = f"""
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r9];
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r9+512], {{%r10, %r11, %r12, %r13}};
        bar.sync 0;
        ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r9+512];
    """
    run(FILL + body + EMPTY, matrices, out, shared=1024)
    np.testing.assert_array_equal(out, matrices)
