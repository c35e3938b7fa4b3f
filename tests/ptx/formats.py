"""Fundamental types and errors that every room of the emulator shares (PTX ISA 5.2, Types).

A register of one warp is an array ``(CTAs, 32)``, or anything that broadcasts to it. It has no
type but a width: instructions view its bits as the type that they name. ``bf16``, ``tf32`` and the
packed pairs have no NumPy type; they are unsigned bits that :mod:`tests.ptx.arithmetic` interprets.

Section numbers everywhere in this folder are those of the PTX ISA 9.0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Mask = Array | None
"""Which threads execute, ``(CTAs, 32)``; None where all do, which is the fast path."""

LANES = 32

# Hopper reserves the first KiB of the shared window (7.1.1: %reserved_smem_offset_begin).
SHARED_BASE = 1024
# Parameter i lies at PARAM_BASE + i, in the param window and generically. 32 bits: Triton 3.9 moves
# the address of a tensor map through a b32 register.
PARAM_BASE = 0x7F00_0000

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64

UNSIGNED: dict[int, Any] = {1: u1, 2: u2, 4: u4, 8: u8}
"""The unsigned type of a width in bytes."""

TYPES: dict[str, Any] = {
    "pred": np.bool_,
    "b8": u1,
    "u8": u1,
    "s8": i1,
    "b16": u2,
    "u16": u2,
    "s16": i2,
    "f16": f2,
    "bf16": u2,
    "b32": u4,
    "u32": u4,
    "s32": i4,
    "f32": f4,
    "tf32": u4,
    "f16x2": u4,
    "bf16x2": u4,
    "b64": u8,
    "u64": u8,
    "s64": i8,
    "f64": f8,
}
"""The NumPy type that stands for each PTX type."""

FLOATS = (f2, f4, f8)


class EmulatorError(Exception):
    """The program did something invalid, or something the emulator can't execute."""


class UnknownInstruction(EmulatorError):
    """An instruction, or a modifier of one, that the emulator does not implement."""

    def __init__(self, text: str) -> None:
        super().__init__(f"unknown instruction {text!r}")


class Race(EmulatorError):
    """Two accesses to shared memory that no barrier, wait or fence orders."""


def width_of(dtype: Any) -> int:
    """Bytes of a NumPy type."""
    return np.dtype(dtype).itemsize


def widened(dtype: Any, width: int) -> Any:
    """The type of the same kind (signed, unsigned, float) with ``width`` bytes."""
    return np.dtype(f"{np.dtype(dtype).kind}{width}").type
