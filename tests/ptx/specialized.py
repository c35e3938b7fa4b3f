"""A warp-specialised matrix product in Gluon: a TMA producer and a wgmma consumer.

flashlayer's kernels leave this to Triton; here the waits are written by hand, and can be left out.
The emulator must run the whole program and stop each that lacks one.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.ptx.driver import emulated
from tests.ptx.formats import EmulatorError

# Which waits are there: the producer's for an empty buffer, the consumer's for a full one, and the
# consumer's for its product before it hands the buffer back.
PROGRAMS = {
    "whole": (True, True, True),
    "no wait for an empty buffer": (False, True, True),
    "no wait for a full buffer": (True, False, True),
    "no wait for the product": (True, True, False),
}


@gluon.jit
def producer(
    a_desc,
    b_desc,
    a_buffers,
    b_buffers,
    full,
    empty,
    depth,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    WAITS: gl.constexpr,
):
    for i in range(depth // BLOCK_K):
        stage = i % STAGES
        if WAITS:
            mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        nbytes: gl.constexpr = a_desc.block_type.nbytes + b_desc.block_type.nbytes
        mbarrier.expect(full.index(stage), nbytes)
        k = i * BLOCK_K
        tma.async_copy_global_to_shared(a_desc, [0, k], full.index(stage), a_buffers.index(stage))
        tma.async_copy_global_to_shared(b_desc, [k, 0], full.index(stage), b_buffers.index(stage))


@gluon.jit
def consumer(
    c_ptr,
    a_buffers,
    b_buffers,
    full,
    empty,
    depth,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    WAITS: gl.constexpr,
    SETTLES: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout)
    for i in range(depth // BLOCK_K):
        stage = i % STAGES
        if WAITS:
            mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        acc = warpgroup_mma(a_buffers.index(stage), b_buffers.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0 if SETTLES else 1, deps=[acc])
        mbarrier.arrive(empty.index(stage), count=1)
    acc = warpgroup_mma_wait(0, deps=[acc])
    rows = gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    gl.store(c_ptr + rows[:, None] * BLOCK_N + columns[None, :], acc)


@gluon.jit
def matmul(
    a_desc,
    b_desc,
    c_ptr,
    depth,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    EMPTY: gl.constexpr,
    FULL: gl.constexpr,
    SETTLES: gl.constexpr,
):
    a_buffers = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, BLOCK_K], a_desc.layout)
    b_buffers = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_K, BLOCK_N], b_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                consumer,
                (
                    c_ptr,
                    a_buffers,
                    b_buffers,
                    full,
                    empty,
                    depth,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    STAGES,
                    FULL,
                    SETTLES,
                ),
            ),
            (
                producer,
                (a_desc, b_desc, a_buffers, b_buffers, full, empty, depth, BLOCK_K, STAGES, EMPTY),
            ),
        ],
        [1],
        [24],
    )


def run(name: str, *, late: bool = True, races: bool = True) -> dict[str, Any]:
    """One of ``PROGRAMS``: the error of its product, or what stopped it."""
    m, n, depth, block, stages = 64, 64, 512, 64, 2
    torch.manual_seed(0)
    a, b = torch.randn(m, depth).bfloat16(), torch.randn(depth, n).bfloat16()
    c = torch.full((m, n), torch.nan)
    descriptors = [
        TensorDescriptor(
            x,
            list(x.shape),
            list(x.stride()),
            box,
            gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16),
        )
        for x, box in ((a, [m, block]), (b, [block, n]))
    ]
    message = ""
    with emulated(90, late=late, races=races) as device:
        try:
            matmul[(1,)](*descriptors, c, depth, m, n, block, stages, *PROGRAMS[name], num_warps=4)
        except EmulatorError as error:
            message = str(error)
    return {
        "case": name,
        "error": (c.double() - a.double() @ b.double()).abs().max().item(),
        "message": message,
        "opcodes": sorted(device.launches[0].program.counts) if device.launches else [],
    }
