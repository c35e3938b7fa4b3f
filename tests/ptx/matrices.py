"""Where the elements of a matrix lie: in a warp's registers and in shared memory.

PTX ISA 9.7.14.5 (fragments of ``mma``), 9.7.15.5 (register fragments, matrix descriptors and
swizzling of ``wgmma``), 5.5.7 (swizzling modes of tensor maps).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from tests.ptx.arithmetic import bf16_to_f32
from tests.ptx.formats import (
    LANES,
    TYPES,
    Array,
    EmulatorError,
    Mask,
    f2,
    f4,
    i8,
    u2,
    u4,
    u8,
)


class FragmentMaps(NamedTuple):
    """Each element's place in ``(registers, lanes, halves)``: of A (m, k), B (k, 8), C (m, 8)."""

    a: Array
    b: Array
    c: Array


@cache
def fragment_maps(rows: int, depth: int, kind: str) -> FragmentMaps:
    """How ``mma.m{rows}n8k{depth}`` spreads its matrices over a warp.

    Lane ``4 g + t`` holds row g of A and column g of B; its registers step through k by 4 lanes'
    worth of elements, A's through rows by 8 in between.
    """
    per_register = {"f64": 1, "tf32": 1, "f16": 2, "bf16": 2}[kind]
    row_blocks = rows // 8

    def a(row: int, k: int) -> tuple[int, int, int]:
        group, inner = divmod(k, 4 * per_register)
        lane = row % 8 * 4 + inner // per_register
        return group * row_blocks + row // 8, lane, inner % per_register

    def b(k: int, column: int) -> tuple[int, int, int]:
        group, inner = divmod(k, 4 * per_register)
        return group, column * 4 + inner // per_register, inner % per_register

    def c(row: int, column: int) -> tuple[int, int, int]:
        return row // 8 * 2 + column % 2, row % 8 * 4 + column // 2, 0

    def table(place: Callable[..., tuple[int, int, int]], n: int, m: int, halves: int) -> Array:
        out = np.empty((n, m), int)
        for i, j in np.ndindex(n, m):
            register, lane, half = place(i, j)
            out[i, j] = (register * LANES + lane) * halves + half
        return out

    return FragmentMaps(
        table(a, rows, depth, per_register),
        table(b, depth, 8, per_register),
        table(c, rows, 8, 1),
    )


def decode(bits: Array, kind: str) -> Array:
    """Bits as numbers that NumPy can multiply: fp32, or fp64. tf32 ignores the low 13 bits."""
    if kind == "bf16":
        return bf16_to_f32(bits.view(u2))
    if kind == "f16":
        return bits.view(f2).astype(f4)
    if kind == "tf32":
        return (bits.view(u4) & u4(0xFFFFE000)).view(f4)
    return bits.view(TYPES[kind])


def operand(x: Any, slots: list[int], kind: str, table: Array) -> Array:
    """A matrix ``(CTAs, n, m)`` from a warp's registers; kept while the registers are the same."""
    registers = [x.registers[s] for s in slots]
    key = (kind, *slots, len(table))
    kept = x.matrices.get(key)
    if kept is None or any(a is not b for a, b in zip(kept[0], registers, strict=True)):
        dtype = u8 if kind == "f64" else u4
        flat = np.empty((x.ctas, len(slots), LANES), dtype)
        for i, register in enumerate(registers):
            flat[:, i] = register.view(dtype)
        matrix = decode(flat, kind).reshape(x.ctas, -1)[:, table]
        kept = x.matrices[key] = registers, matrix
    return kept[1]


@cache
def _places(rows: int, columns: int) -> Array:
    """``(registers, lanes)``: which element of a row-major ``(rows, columns)`` C each one holds."""
    lane = np.arange(LANES)
    in_block = rows // 8 * 2
    register = np.arange(columns // 8 * in_block)[:, None]
    block, within = register // in_block, register % in_block
    row, column = lane // 4 + within // 2 * 8, block * 8 + lane % 4 * 2 + within % 2
    return row * columns + column


def spread(x: Any, m: Mask, targets: list[int], matrix: Array, rows: int) -> None:
    """Write a C fragment ``(CTAs, rows, columns)``, 8 or 16 rows, into registers."""
    values = matrix.reshape(matrix.shape[0], -1)[:, _places(rows, matrix.shape[2])]
    for i, d in enumerate(targets):
        x.put(d, values[:, i], m)


def unspread(x: Any, slots: list[int], columns: int) -> Array:
    """The inverse of :func:`spread` for 16 rows: ``(CTAs, 16, columns)`` in fp32."""
    flat = np.empty((x.ctas, len(slots), LANES), f4)
    for i, slot in enumerate(slots):
        flat[:, i] = x.registers[slot].view(f4)
    out = np.empty((x.ctas, 16 * columns), f4)
    out[:, _places(16, columns)] = flat
    return out.reshape(-1, 16, columns)


def swizzled(address: Array, width: int) -> Array:
    """The address of a 16-byte chunk under a swizzle of ``width`` bytes (16: none).

    From bit 4 on, as many bits as a row of ``width`` bytes has chunks are XORed with those from
    bit 7 on, that is with the row within the pattern of 128-byte lines.
    """
    return address ^ (((address >> 7) & (width // 16 - 1)) << 4)


def chunk_addresses(
    descriptor: Array, first: int, count: int, depth: int, size: int, *, transposed: bool
) -> Array:
    """Addresses of the 16-byte chunks of a ``wgmma`` operand, ``(CTAs, chunks)``.

    Args:
        descriptor: ``(CTAs,)`` matrix descriptors (9.7.15.5.1.2).
        first: the first row of A, or column of B, that is wanted.
        count: how many of them.
        depth: k of the instruction.
        size: bytes of an element.
        transposed: whether the rows of A, or columns of B, are contiguous, and not k.
    """
    start, leading, stride = (
        ((descriptor >> u8(bit) & u8(0x3FFF)) << u8(4)).astype(i8)[:, None] for bit in (0, 16, 32)
    )
    if ((descriptor >> u8(49)) & u8(7)).any():
        raise EmulatorError("a matrix descriptor with a base offset")
    modes = set((descriptor >> u8(62)).tolist())
    if len(modes) != 1:
        raise EmulatorError("matrix descriptors whose swizzling differs between CTAs")
    width = {0: 16, 1: 128, 2: 64, 3: 32}[modes.pop()]  # bytes that swizzling keeps together
    per_chunk = 16 // size
    if transposed:
        groups = first // per_chunk + np.arange(count // per_chunk)
        k, outer = (g.ravel() for g in np.meshgrid(np.arange(depth), groups, indexing="ij"))
        if width == 16:
            address = start + k // 8 * leading + outer * stride + k % 8 * 16
        else:
            across = width // 16
            address = start + outer // across * leading + outer % across * 16
            address = address + k // 8 * stride + k % 8 * width
    else:
        rows, chunks = first + np.arange(count), np.arange(depth // per_chunk)
        row, k = (g.ravel() for g in np.meshgrid(rows, chunks, indexing="ij"))
        if width == 16:
            address = start + row // 8 * stride + row % 8 * 16 + k * leading
        else:
            address = start + row // 8 * stride + row % 8 * width + k * 16
    return swizzled(address, width)


def tile_of_chunks(chunks: Array, kind: str, count: int, depth: int, *, transposed: bool) -> Array:
    """``(CTAs, count, depth)`` from the chunks ``(CTAs, n, 16 bytes)`` at those addresses."""
    data = decode(np.ascontiguousarray(chunks).reshape(len(chunks), -1).view(u4), kind)
    if transposed:
        return data.reshape(-1, depth, count).swapaxes(1, 2)
    return data.reshape(-1, count, depth)
