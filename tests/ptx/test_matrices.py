"""mma and wgmma against NumPy, with the ISA's own formulas for where elements lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.ptx.assembly import aligned, run
from tests.ptx.formats import LANES, SHARED_BASE, Array

RNG = np.random.default_rng(0)


def small_integers(shape: tuple[int, ...]) -> Array:
    """Exact in every format, and so is a product of 16 of them."""
    return RNG.integers(-8, 9, shape).astype(np.float64)


def encode(x: Array, kind: str) -> Array:
    """Numbers as the bits that registers and memory hold."""
    if kind == "f64":
        return x.view(np.uint64)
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.astype(np.float32).view(np.uint32)
    return bits if kind in ("tf32", "f32") else (bits >> 16).astype(np.uint16)


def a_position(rows: int, kind: str, lane: int, i: int) -> tuple[int, int]:
    """Row and column of a lane's i-th element of A (9.7.14.5.4, .5, .8, .9)."""
    group, thread = lane // 4, lane % 4
    if rows == 8:
        return group, thread
    if kind in ("tf32", "f64"):
        return group + 8 * (i % 2), thread + 4 * (i // 2)
    return group + 8 * (i // 2 % 2), thread * 2 + i % 2 + 8 * (i // 4)


def b_position(kind: str, lane: int, i: int) -> tuple[int, int]:
    """Row and column of a lane's i-th element of B."""
    group, thread = lane // 4, lane % 4
    if kind in ("tf32", "f64"):
        return thread + 4 * i, group
    return thread * 2 + i % 2 + 8 * (i // 2), group


@pytest.mark.parametrize(
    ("rows", "depth", "kind", "out"),
    [
        (16, 8, "bf16", "f32"),
        (16, 16, "bf16", "f32"),
        (16, 8, "f16", "f32"),
        (16, 16, "f16", "f32"),
        (16, 4, "tf32", "f32"),
        (16, 8, "tf32", "f32"),
        (8, 4, "f64", "f64"),
        (16, 4, "f64", "f64"),
        (16, 8, "f64", "f64"),
        (16, 16, "f64", "f64"),
    ],
)
def test_mma_multiplies_the_fragments_of_the_isa(
    rows: int, depth: int, kind: str, out: str
) -> None:
    a, b, c = small_integers((rows, depth)), small_integers((depth, 8)), small_integers((rows, 8))
    halves = 2 if kind in ("f16", "bf16") else 1
    element, register = ("b64", "%rd") if kind == "f64" else ("b32", "%r")
    size = 8 if kind == "f64" else 4
    counts = rows * depth // LANES, depth * 8 // LANES, rows * 8 // LANES
    packed = [aligned((LANES, n), encode(x, k).dtype) for n, x, k in zip(
        counts, (a, b, c), (kind, kind, out), strict=True)]  # fmt: skip
    for lane in range(LANES):
        packed[0][lane] = [
            encode(a, kind)[a_position(rows, kind, lane, i)] for i in range(counts[0])
        ]
        packed[1][lane] = [encode(b, kind)[b_position(kind, lane, i)] for i in range(counts[1])]
        for i in range(counts[2]):
            packed[2][lane, i] = encode(c, out)[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2]
    result = aligned((LANES, counts[2]), np.float64 if out == "f64" else np.float32)
    lines, names = [], []
    slot = 10
    for argument, (n, per) in enumerate(zip(counts, (halves, halves, 1), strict=True)):
        registers = [f"{register}{slot + i}" for i in range(n // per)]
        slot += n // per
        names.append(registers)
        lines.append(f"mul.wide.u32 %rd0, %lane, {size * len(registers)};")
        lines.append(f"add.s64 %rd0, %a{argument}, %rd0;")
        lines += [f"ld.global.{element} {r}, [%rd0+{size * i}];" for i, r in enumerate(registers)]
    d = [f"{register}{slot + i}" for i in range(counts[2])]
    groups = ["{" + ", ".join(x) + "}" for x in (d, *names)]
    lines.append(
        f"mma.sync.aligned.m{rows}n8k{depth}.row.col.{out}.{kind}.{kind}.{out} "
        + ", ".join(groups)
        + ";"
    )
    lines.append(f"mul.wide.u32 %rd0, %lane, {size * len(d)};")
    lines.append("add.s64 %rd0, %a3, %rd0;")
    lines += [f"st.global.{element} [%rd0+{size * i}], {r};" for i, r in enumerate(d)]
    run("\n".join(lines), *packed, result)
    expected = a @ b + c
    for lane in range(LANES):
        for i in range(counts[2]):
            row, column = lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2
            assert result[lane, i] == expected[row, column], (lane, i)


def test_mma_in_tf32_ignores_the_low_bits_of_its_operands() -> None:
    ones = aligned((LANES, 1), np.uint32, np.float32(1).view(np.uint32) | 0x1FFF)
    out = aligned(LANES, np.float32)
    body = """
        mul.wide.u32 %rd0, %lane, 4;
        add.s64 %rd1, %a0, %rd0;
        add.s64 %rd2, %a1, %rd0;
        ld.global.b32 %r0, [%rd1];
        mov.b32 %r1, 0;
        mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%r2, %r3, %r4, %r5}, {%r0, %r0}, {%r0},
            {%r1, %r1, %r1, %r1};
        st.global.b32 [%rd2], %r2;
    """
    run(body, ones, out)
    np.testing.assert_array_equal(out, 4)


# ------------------------------------------------------------------------------------------ wgmma

MODES = {0: 16, 1: 128, 2: 64, 3: 32}  # bits 62 and 63 of a descriptor: bytes that swizzling keeps


def k_major(x: Array, width: int) -> tuple[Array, int, int]:
    """``(rows, 32 bytes of k)`` as the bytes of shared memory, and both offsets (9.7.15.5.1).

    Canonical layouts, written out byte by byte: core matrices of 8 rows of 16 bytes without a
    swizzle; rows of ``width`` bytes with one, of which the product takes the first 32. The XOR is
    CUTLASS's ``Swizzle<log2(width / 16), 4, 3>``.
    """
    rows, size = len(x), x.dtype.itemsize
    if width == 16:
        leading, stride = 128, 256  # next 16 bytes of k; next 8 rows
        image = np.full(rows * 32, 0xFF, np.uint8)
    else:
        leading, stride = 16, 8 * width
        image = np.full(rows * width, 0xFF, np.uint8)
    for row in range(rows):
        for i, byte in enumerate(x[row].view(np.uint8)):
            if width == 16:
                at = row // 8 * stride + i // 16 * leading + row % 8 * 16 + i % 16
            else:
                at = xor(row * width + i, width)
            image[at] = byte
    assert x.shape[1] * size == 32
    return image, leading, stride


def mn_major(x: Array, width: int) -> tuple[Array, int, int]:
    """``(rows, 16 of k)`` of 16-bit elements with the rows contiguous: each k is a line."""
    rows, depth = x.shape
    per_line = width // 2  # rows that lie side by side
    if width == 16:
        stride, leading = 128, rows * 16  # next 8 rows; next 8 of k
    else:
        stride, leading = 8 * width, depth * width  # next 8 of k; next block of rows
    image = np.full(rows * depth * 2, 0xFF, np.uint8)
    for row in range(rows):
        for k in range(depth):
            if width == 16:
                at = row // 8 * stride + k // 8 * leading + k % 8 * 16 + row % 8 * 2
            else:
                line = k // 8 * stride + k % 8 * width
                at = xor(row // per_line * leading + line + row % per_line * 2, width)
            image[at : at + 2] = x[row, k : k + 1].view(np.uint8)
    return image, leading, stride


def xor(at: int, width: int) -> int:
    """Swizzling by the address's bits: 4 to 6 change, by 7 to 9 (fewer in the narrow modes)."""
    bits = {128: 0b111, 64: 0b11, 32: 0b1}[width]
    return at ^ ((at >> 7 & bits) << 4)


def descriptor(start: int, leading: int, stride: int, mode: int) -> int:
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


COPY_IN = """
    mov.b32 %r0, global_smem;
    add.s32 %r0, %r0, {to};
    shl.b32 %r1, %tid, 4;
    mov.b32 %r2, 0;
$copy{n}:
    add.s32 %r3, %r1, %r2;
    setp.ge.u32 %p0, %r3, {nbytes};
    @%p0 bra $copied{n};
    cvt.u64.u32 %rd0, %r3;
    add.s64 %rd0, %a{n}, %rd0;
    ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd0];
    add.s32 %r8, %r0, %r3;
    st.shared.v4.b32 [%r8], {{%r4, %r5, %r6, %r7}};
    add.s32 %r2, %r2, 2048;
    bra $copy{n};
$copied{n}:
"""


def multiply(
    kind: str,
    a_image: Array,
    b_image: Array,
    a_desc: int,
    b_desc: int,
    columns: int,
    *,
    flags: str = "",
    prologue: str = "",
    keeps: int = 0,
    signs: str = "1, 1",
    a_registers: str | None = None,
    fence: str = "fence.proxy.async.shared::cta;",
    wait: str = "wgmma.wait_group.sync.aligned 0;",
    **options: Any,
) -> Array:
    """One ``wgmma`` of a warpgroup over two images in shared memory: ``(64, columns)``."""
    depth = 8 if kind == "tf32" else 16
    out = aligned((4 * LANES, columns // 2), np.float32)
    d = ", ".join(f"%f{i}" for i in range(columns // 2))
    at = len(a_image)
    body = COPY_IN.format(n=0, to=0, nbytes=at)
    body += COPY_IN.format(n=1, to=at, nbytes=len(b_image))
    body += "".join(f"mov.b32 %f{i}, 0f40A00000;" for i in range(columns // 2))  # 5
    body += f"""
        {prologue}
        {fence}
        bar.sync 0;
        setp.ne.b32 %p1, {keeps}, 0;
        mov.b64 %rd10, {a_desc};
        mov.b64 %rd11, {b_desc};
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{kind}.{kind}
            {{{d}}}, {a_registers or "%rd10"}, %rd11, %p1, {signs}{flags};
        wgmma.commit_group.sync.aligned;
        {wait}
        mul.wide.u32 %rd0, %tid, {2 * columns};
        add.s64 %rd0, %a2, %rd0;
    """
    body += "".join(f"st.global.b32 [%rd0+{4 * i}], %f{i};" for i in range(columns // 2))
    shared = at + len(b_image)
    run(body, a_image, b_image, out, warps=4, shared=shared, **options)
    # 9.7.15.5.1.1: register i of thread 4 g + t of warp w.
    result = np.empty((64, columns), np.float32)
    for thread in range(4 * LANES):
        warp, lane = divmod(thread, LANES)
        for i in range(columns // 2):
            row = 16 * warp + lane // 4 + 8 * (i // 2 % 2)
            result[row, i // 4 * 8 + lane % 4 * 2 + i % 2] = out[thread, i]
    return result


def image(x: Array) -> Array:
    out = aligned(len(x), np.uint8)
    out[:] = x
    return out


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_wgmma_reads_operands_that_lie_along_k(kind: str, mode: int, late: bool) -> None:
    depth, columns = (8 if kind == "tf32" else 16), 24
    a, b = small_integers((64, depth)), small_integers((columns, depth))
    a_image, *a_offsets = k_major(encode(a, kind), MODES[mode])
    b_image, *b_offsets = k_major(encode(b, kind), MODES[mode])
    flags = "" if kind == "tf32" else ", 0, 0"
    result = multiply(
        kind,
        image(a_image),
        image(b_image),
        descriptor(SHARED_BASE, *a_offsets, mode),
        descriptor(SHARED_BASE + len(a_image), *b_offsets, mode),
        columns,
        flags=flags,
        late=late,
    )
    np.testing.assert_array_equal(result, a @ b.T)


@pytest.mark.parametrize("mode", MODES)
def test_wgmma_reads_operands_that_lie_across_k(mode: int) -> None:
    """Transposed: the elements of one k are contiguous. 64 columns, so that blocks repeat."""
    a, b = small_integers((64, 16)), small_integers((64, 16))
    a_image, *a_offsets = mn_major(encode(a, "bf16"), MODES[mode])
    b_image, *b_offsets = mn_major(encode(b, "bf16"), MODES[mode])
    result = multiply(
        "bf16",
        image(a_image),
        image(b_image),
        descriptor(SHARED_BASE, *a_offsets, mode),
        descriptor(SHARED_BASE + len(a_image), *b_offsets, mode),
        64,
        flags=", 1, 1",
    )
    np.testing.assert_array_equal(result, a @ b.T)


def test_wgmma_takes_a_from_registers_keeps_d_and_negates() -> None:
    a, b = small_integers((64, 16)), small_integers((8, 16))
    fragments = aligned((4 * LANES, 8), np.uint16)
    for thread in range(4 * LANES):
        warp, lane = divmod(thread, LANES)
        rows = encode(a[16 * warp : 16 * warp + 16], "bf16")
        fragments[thread] = [rows[a_position(16, "bf16", lane, i)] for i in range(8)]
    b_image, *b_offsets = k_major(encode(b, "bf16"), 32)
    load = """
        mul.wide.u32 %rd0, %tid, 16;
        add.s64 %rd0, %a0, %rd0;
        ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd0];
    """
    fragment_bytes = fragments.reshape(-1).view(np.uint8)
    result = multiply(
        "bf16",
        fragment_bytes,
        image(b_image),
        0,
        descriptor(SHARED_BASE + len(fragment_bytes), *b_offsets, 3),
        8,
        flags=", 0",
        prologue=load,
        keeps=1,
        signs="1, -1",
        a_registers="{%r10, %r11, %r12, %r13}",
    )
    np.testing.assert_array_equal(result, 5 - a @ b.T)


def test_wgmma_late_has_no_result_before_the_wait() -> None:
    """Without it the accumulator is read as it was: 5 everywhere."""
    a, b = small_integers((64, 16)), small_integers((8, 16))
    a_image, *a_offsets = k_major(encode(a, "bf16"), 128)
    b_image, *b_offsets = k_major(encode(b, "bf16"), 128)
    operands = (
        image(a_image),
        image(b_image),
        descriptor(SHARED_BASE, *a_offsets, 1),
        descriptor(SHARED_BASE + len(a_image), *b_offsets, 1),
        8,
    )
    result = multiply("bf16", *operands, flags=", 0, 0", wait="")
    np.testing.assert_array_equal(result, 5)
    early = multiply("bf16", *operands, flags=", 0, 0", wait="", late=False)
    np.testing.assert_array_equal(early, a @ b.T)
