"""Small PTX kernels for the emulator's own tests: a body, NumPy arrays in and out."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.ptx.asynchronous import TensorMap
from tests.ptx.formats import LANES, Array
from tests.ptx.machine import launch
from tests.ptx.memory import Memory
from tests.ptx.program import parse

# Registers that every body may use. %tid, %lane and %warp are set, %a0, %a1, ... are the arguments.
_HEAD = """
.version 9.0
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 global_smem[];
.visible .entry test({parameters})
.reqntid {threads}
{{
    .reg .pred %p<32>;
    .reg .b16 %h<64>;
    .reg .b32 %r<256>;
    .reg .f32 %f<256>;
    .reg .b64 %rd<64>;
    .reg .f64 %fd<64>;
    .reg .b64 %a<16>;
    .reg .b32 %tid, %lane, %warp;
{prologue}
    mov.u32 %tid, %tid.x;
    and.b32 %lane, %tid, 31;
    shr.u32 %warp, %tid, 5;
{body}
    ret;
}}
"""


def module(body: str, arguments: int, threads: int, blobs: tuple[int, ...] = ()) -> str:
    """A PTX module around a body; ``blobs`` are the arguments that are tensor maps."""
    kinds = [
        f".param .align 64 .b8 p{i}[128]" if i in blobs else f".param .u64 p{i}"
        for i in range(arguments)
    ]
    loads = [
        f"    mov.b64 %a{i}, p{i};" if i in blobs else f"    ld.param.u64 %a{i}, [p{i}];"
        for i in range(arguments)
    ]
    return _HEAD.format(
        parameters=", ".join(kinds), threads=threads, prologue="\n".join(loads), body=body
    )


def run(
    body: str, *arguments: Any, warps: int = 1, grid: int = 1, shared: int = 0, **options: Any
) -> int:
    """Run a body.

    Args:
        body: PTX.
        arguments: arrays, passed by address and changed in place; numbers; tensor maps.
        warps: of a CTA.
        grid: CTAs.
        shared: bytes of shared memory.
        options: those of :func:`tests.ptx.machine.launch`.

    Returns:
        The number of instructions that warps executed.
    """
    memory, values = Memory(), []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            memory.add(argument.ctypes.data, argument.nbytes)
            values.append(argument.ctypes.data)
        else:
            values.append(argument)
    blobs = tuple(i for i, x in enumerate(arguments) if isinstance(x, TensorMap))
    program = parse(module(body, len(arguments), warps * LANES, blobs))
    return launch(program, grid, values, memory, num_warps=warps, shared=shared, **options)


def aligned(shape: int | tuple[int, ...], dtype: Any, value: float = 0) -> Array:
    """An array whose address is a multiple of 128, as tensor copies want it."""
    shape = (shape,) if isinstance(shape, int) else shape
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 128
    out = raw[start : start + nbytes].view(dtype).reshape(shape)
    out[...] = value
    return out


_REGISTERS = {1: "%h", 2: "%h", 4: "%r", 8: "%rd"}
_LOADS = {1: "b8", 2: "b16", 4: "b32", 8: "b64"}


def elementwise(instruction: str, *inputs: Any, out: Any) -> Array:
    """``instruction`` with ``d, a, b, ...`` in it, once for each element.

    Args:
        instruction: ``"add.s32 d, a, b;"``.
        inputs: arrays of one length, a multiple of 32 not needed; a bool array is a predicate.
        out: dtype of the result; ``bool`` for a predicate.

    Returns:
        The results.
    """
    arrays = [np.ascontiguousarray(x) for x in inputs]
    n = max(len(x) for x in arrays)
    count = -(-n // LANES) * LANES
    padded = [aligned(count, x.dtype) for x in arrays]
    for whole, x in zip(padded, arrays, strict=True):
        whole[:n] = x
    is_predicate = np.dtype(out) == np.bool_
    result = aligned(count, np.uint32 if is_predicate else out)
    lines, names = ["mov.u32 %r100, %ctaid.x;", "mad.lo.s32 %r101, %r100, 32, %lane;"], {}
    for i, x in enumerate(padded):
        size = x.dtype.itemsize
        register = f"{_REGISTERS[size]}{i + 10}"
        lines += [
            f"mul.wide.u32 %rd0, %r101, {size};",
            f"add.s64 %rd1, %a{i}, %rd0;",
            f"ld.global.{_LOADS[size]} {register}, [%rd1];",
        ]
        if x.dtype == np.bool_:
            lines.append(f"setp.ne.b16 %p{i + 1}, {register}, 0;")
            register = f"%p{i + 1}"
        names["abcefg"[i]] = register
    size = result.dtype.itemsize
    target = "%p0" if is_predicate else f"{_REGISTERS[size]}9"
    names["d"] = target
    opcode, operands = instruction.split(None, 1)
    lines.append(opcode + " " + "".join(names.get(character, character) for character in operands))
    if is_predicate:
        target = "%r9"
        lines.append("selp.b32 %r9, 1, 0, %p0;")
    lines += [
        f"mul.wide.u32 %rd0, %r101, {size};",
        f"add.s64 %rd1, %a{len(padded)}, %rd0;",
        f"st.global.{_LOADS[size]} [%rd1], {target};",
    ]
    run("\n".join(lines), *padded, result, grid=count // LANES)
    return result[:n].astype(np.bool_) if is_predicate else result[:n]
