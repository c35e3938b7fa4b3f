"""Matrix products of a warp (PTX ISA 9.7.14.5, ``mma``) and a warpgroup (9.7.15, ``wgmma``)."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from tests.ptx.asynchronous import Product, ProductOperands
from tests.ptx.decode import Decoder, Run, executes
from tests.ptx.formats import TYPES, Mask, u4, u8
from tests.ptx.matrices import fragment_maps, operand, spread
from tests.ptx.syntax import Instruction, vector

# (m, k) of m x 8 x k for each type of A and B, and the type of C and D.
_MMA_SHAPES = {
    ("f16", "f32"): {(16, 8), (16, 16)},
    ("bf16", "f32"): {(16, 8), (16, 16)},
    ("tf32", "f32"): {(16, 4), (16, 8)},
    ("f64", "f64"): {(8, 4), (16, 4), (16, 8), (16, 16)},
}
_WGMMA_DEPTH = {"f16": 16, "bf16": 16, "tf32": 8}


@executes("mma")
def mma(decoder: Decoder, ins: Instruction) -> Run:
    """``mma.sync.aligned.mMn8kK.row.col.d.a.b.c``: ``D = A B + C``, in registers."""
    form = r"mma\.sync\.aligned\.m(\d+)n8k(\d+)\.row\.col\.(\w+)\.(\w+)\.\4\.\3"
    found = re.fullmatch(form, ins.opcode)
    if found is None:
        raise ins.unknown()
    rows, depth, out, kind = int(found[1]), int(found[2]), found[3], found[4]
    if (rows, depth) not in _MMA_SHAPES.get((kind, out), set()):
        raise ins.unknown()
    register = u8 if kind == "f64" else u4
    d = [decoder.target(ins, x) for x in vector(ins.operands[0])]
    a, b = ([decoder.source(ins, x, register) for x in vector(o)] for o in ins.operands[1:3])
    c = [decoder.source(ins, x, TYPES[out]) for x in vector(ins.operands[3])]
    maps = fragment_maps(rows, depth, kind)

    def run(x: Any, m: Mask) -> None:
        x.whole_warps(m)
        left, right = operand(x, a, kind, maps.a), operand(x, b, kind, maps.b)
        product = left @ right + operand(x, c, out, maps.c)
        spread(x, m, d, product, rows)
        if m is None:  # the next product of a chain finds its C here
            x.matrices[(out, *d, len(maps.c))] = [x.registers[i] for i in d], product

    return run


@executes("wgmma")
def wgmma(decoder: Decoder, ins: Instruction) -> Run:
    """``wgmma.mma_async``, and the fence, commit and wait that order it.

    ``wgmma.fence`` orders registers only (9.7.15.7.1): reading or writing them too early shows in
    the values when products complete late.
    """
    name = ins.opcode
    if name == "wgmma.fence.sync.aligned":
        return lambda x, m: x.whole_warps(m)
    if name == "wgmma.commit_group.sync.aligned":
        return lambda x, m: x.products.commit(m)
    if name == "wgmma.wait_group.sync.aligned":
        left = int(ins.operands[0], 0)
        return lambda x, m: x.products.wait(left, m)
    form = r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(\w+)\.\3"
    found = re.fullmatch(form, name)
    if found is None or _WGMMA_DEPTH.get(found[3]) != int(found[2]):
        raise ins.unknown()
    a: int | list[int]
    if ins.operands[1].startswith("{"):
        a = [decoder.source(ins, x, u4) for x in vector(ins.operands[1])]
    else:
        a = decoder.source(ins, ins.operands[1], u8)
    transposes = [int(x) for x in ins.operands[6:]]
    a_transposed, b_transposed = ([0, 0, *transposes])[-2:]
    what = ProductOperands(
        d=[decoder.lookup(ins, x)[0] for x in vector(ins.operands[0])],
        a=a,
        b=decoder.source(ins, ins.operands[2], u8),
        keeps=decoder.source(ins, ins.operands[3], np.bool_),
        columns=int(found[1]),
        depth=int(found[2]),
        kind=found[3],
        signs=(int(ins.operands[4]), int(ins.operands[5])),
        a_transposed=bool(a_transposed),
        b_transposed=bool(b_transposed),
    )
    return lambda x, m: x.issue(x.products, Product(x, x.mask(m), what))
