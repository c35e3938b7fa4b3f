"""Loads, stores, copies and barriers in memory.

PTX ISA 9.7.9.8 (``ld``), 9.7.9.11 (``st``), 9.7.9.25 (``cp.async``), 9.7.9.27 (tensor copies, TMA),
9.7.13 (``fence``, ``mbarrier``), 9.7.14.5 (``ldmatrix``, ``stmatrix``).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from tests.ptx.asynchronous import Copy, Transfer
from tests.ptx.decode import Decoder, Run, executes
from tests.ptx.formats import (
    TYPES,
    UNSIGNED,
    Array,
    Mask,
    i4,
    i8,
    u2,
    u4,
    u8,
    widened,
    width_of,
)
from tests.ptx.syntax import Instruction, operands, vector

_ORDER_AND_CACHE = re.compile(
    r"volatile|weak|relaxed|acquire|release|cta|gpu|sys|nc|ca|cg|cs|wb|wt|L[12]::\w+(::\w+)?|v[24]"
)


def _state_space(ins: Instruction) -> tuple[bool, Any]:
    """Whether a load or store is to shared memory, and its type; no generic addresses."""
    _, *modifiers, kind = ins.parts
    spaces = [x for x in modifiers if x in ("global", "shared", "shared::cta")]
    rest = [x for x in modifiers if x not in spaces]
    if len(spaces) != 1 or kind not in TYPES or kind == "pred":
        raise ins.unknown()
    if not all(_ORDER_AND_CACHE.fullmatch(x) for x in rest):
        raise ins.unknown()
    return spaces[0] != "global", TYPES[kind]


@executes("ld")
def ld(decoder: Decoder, ins: Instruction) -> Run:
    """``ld.space.vec.type {d, ...}, [address]``; narrow values are extended to their register."""
    if ins.parts[1] == "param":
        return _ld_param(decoder, ins)
    shared, dtype = _state_space(ins)
    size = width_of(dtype)
    names = vector(ins.operands[0])
    targets = [decoder.lookup(ins, x) if x != "_" else (None, size) for x in names]
    kind = u4 if shared else u8
    slot, offset = decoder.address(ins, ins.operands[1], kind)
    if shared:
        decoder.granule = min(decoder.granule, size)
    unsigned, count = UNSIGNED[size], len(names)
    unread = [k for k, name in enumerate(names) if name in decoder.unread]
    options = {"unread": unread} if shared and len(unread) < count else {}

    def run(x: Any, m: Mask) -> None:
        memory = x.machine.shared if shared else x.machine.memory
        address = x.lanes(slot, m).view(kind).astype(i8) + offset
        loaded = memory.load(x, m, address, unsigned, count, **options)
        for (d, width), value in zip(targets, loaded, strict=True):
            if d is not None:
                if width > size:
                    value = value.view(dtype).astype(widened(dtype, width))
                x.scatter(d, value, m)

    return run


def _ld_param(decoder: Decoder, ins: Instruction) -> Run:
    if len(ins.parts) != 3 or ins.parts[2] not in TYPES:
        raise ins.unknown()
    dtype = TYPES[ins.parts[2]]
    d, width = decoder.lookup(ins, ins.operands[0])
    index = decoder.parameter_index(ins, ins.operands[1])
    kind = widened(dtype, width) if width > width_of(dtype) else dtype
    return lambda x, m: x.put(d, x.machine.arguments[index].view(dtype).astype(kind), m)


@executes("st")
def st(decoder: Decoder, ins: Instruction) -> Run:
    """``st.space.vec.type [address], {a, ...}``."""
    shared, dtype = _state_space(ins)
    size = width_of(dtype)
    kind, unsigned = u4 if shared else u8, UNSIGNED[size]
    slot, offset = decoder.address(ins, ins.operands[0], kind)
    sources = [decoder.source(ins, x, unsigned) for x in vector(ins.operands[1])]
    if shared:
        decoder.granule = min(decoder.granule, size)

    def run(x: Any, m: Mask) -> None:
        memory = x.machine.shared if shared else x.machine.memory
        address = x.lanes(slot, m).view(kind).astype(i8) + offset
        memory.store(x, m, address, [x.lanes(s, m).view(unsigned) for s in sources])

    return run


# ------------------------------------------------------------------------------- 8 x 8 matrices


def _matrix_shape(ins: Instruction) -> bool:
    """Whether the rows are transposed; ``m8n8`` of 16-bit elements only."""
    form = r"(ld|st)matrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared(::cta)?\.b16"
    found = re.fullmatch(form, ins.opcode)
    if found is None:
        raise ins.unknown()
    return found[2] is not None


@executes("ldmatrix")
def ldmatrix(decoder: Decoder, ins: Instruction) -> Run:
    """Up to four 8 x 8 matrices of 16 bits, one register each.

    Lane ``8 i + r`` has the address of row r of matrix i. Lane ``4 r + c`` gets elements ``2 c``,
    ``2 c + 1`` of row r, or of column r where transposed.
    """
    transposed = _matrix_shape(ins)
    targets = [decoder.lookup(ins, x)[0] for x in vector(ins.operands[0])]
    slot, offset = decoder.address(ins, ins.operands[1], u4)

    def run(x: Any, m: Mask) -> None:
        rows = x.whole_warps(m)
        address = (x.wide(slot).view(u4).astype(i8) + offset)[rows, : 8 * len(targets)]
        data = x.machine.shared.load_rows(x, rows, address)  # (CTAs, rows, 8 of 16 bits)
        for i, d in enumerate(targets):
            tile = data[:, 8 * i : 8 * i + 8]
            tile = np.ascontiguousarray(tile.swapaxes(1, 2) if transposed else tile)
            x.put_rows(d, tile.reshape(-1, 64).view(u4), rows)

    return run


@executes("stmatrix")
def stmatrix(decoder: Decoder, ins: Instruction) -> Run:
    """The inverse of :func:`ldmatrix`."""
    transposed = _matrix_shape(ins)
    slot, offset = decoder.address(ins, ins.operands[0], u4)
    sources = [decoder.source(ins, x, u4) for x in vector(ins.operands[1])]

    def run(x: Any, m: Mask) -> None:
        rows = x.whole_warps(m)
        address = (x.wide(slot).view(u4).astype(i8) + offset)[rows, : 8 * len(sources)]
        tiles: list[Array] = []
        for s in sources:
            tile = np.ascontiguousarray(x.wide(s)[rows]).view(u2).reshape(-1, 8, 8)
            tiles.append(tile.swapaxes(1, 2) if transposed else tile)
        x.machine.shared.store_rows(x, rows, address, np.concatenate(tiles, 1))

    return run


# ------------------------------------------------------------------------------ asynchronous copies


@executes("cp")
def cp(decoder: Decoder, ins: Instruction) -> Run:
    """``cp.async`` and its groups; ``cp.async.bulk.tensor`` is TMA."""
    name = ins.opcode
    if name.startswith("cp.async.bulk.tensor"):
        return _bulk_tensor(decoder, ins)
    if name == "cp.async.commit_group":
        return lambda x, m: x.copies.commit(m)
    if name == "cp.async.wait_group":
        left = int(ins.operands[0], 0)
        return lambda x, m: x.copies.wait(left, m)
    if name == "cp.async.wait_all":
        return lambda x, m: (x.copies.commit(m), x.copies.wait(0, m))
    if not re.fullmatch(r"cp\.async\.c[ag]\.shared(::cta)?\.global(\.L2::\w+)*", name):
        raise ins.unknown()
    to, to_offset = decoder.address(ins, ins.operands[0], u4)
    of, of_offset = decoder.address(ins, ins.operands[1], u8)
    size = int(ins.operands[2], 0)
    if size not in ((4, 8, 16) if ".ca." in name else (16,)):
        raise ins.unknown()
    length = decoder.source(ins, ins.operands[3] if len(ins.operands) > 3 else str(size), u4)

    def run(x: Any, m: Mask) -> None:
        target = x.wide(to).view(u4).astype(i8) + to_offset
        source = x.wide(of).view(u8).astype(i8) + of_offset
        copied = x.wide(length).view(u4).astype(i8)
        x.issue(x.copies, Copy(x, x.mask(m), target, source, size, copied))

    return run


def _bulk_tensor(decoder: Decoder, ins: Instruction) -> Run:
    """``cp.async.bulk.tensor.Nd.shared.global.tile [to], [map, {corner}], [mbarrier]``."""
    form = (
        r"cp\.async\.bulk\.tensor\.[1-5]d\.shared::(cta|cluster)\.global(\.tile)?"
        r"\.mbarrier::complete_tx::bytes(\.L2::cache_hint)?"
    )
    if not re.fullmatch(form, ins.opcode):
        raise ins.unknown()
    to, to_offset = decoder.address(ins, ins.operands[0], u4)
    name, corner = operands(ins.operands[1].strip("[]"))
    tensor_map = decoder.source(ins, name, u8)
    coordinates = [decoder.source(ins, c, i4) for c in vector(corner)]
    barrier, barrier_offset = decoder.address(ins, ins.operands[2], u4)

    def run(x: Any, m: Mask) -> None:
        target = x.wide(to).view(u4).astype(i8) + to_offset
        mbarrier = x.wide(barrier).view(u4).astype(i8) + barrier_offset
        maps = x.wide(tensor_map).view(u8)
        corners = [x.wide(c).view(i4) for c in coordinates]
        for cta, lane in np.argwhere(x.mask(m)):
            at = cta, lane
            transfer = Transfer(
                machine=x.machine,
                cta=int(cta),
                source=x.machine.tensor_map(int(maps[at])),
                to=int(target[at]),
                corner=[int(c[at]) for c in corners],
                mbarrier=int(mbarrier[at]),
            )
            transfer.start(x)

    return run


# --------------------------------------------------------------------------- fences and mbarriers


@executes("fence")
def fence(decoder: Decoder, ins: Instruction) -> Run:
    """``fence.proxy.async`` makes visible to wgmma what other instructions wrote (8.2.2)."""
    if re.fullmatch(r"fence\.proxy\.async(\.shared::cta)?", ins.opcode):
        return lambda x, m: x.machine.shadow.fence(x, m)
    if not re.fullmatch(
        r"fence(\.(acq_rel|sc|mbarrier_init|release|cta|cluster|gpu|sys))+", ins.opcode
    ):
        raise ins.unknown()
    return lambda x, m: None  # threads of one CTA see each other's writes at once


@executes("mbarrier")
def mbarrier(decoder: Decoder, ins: Instruction) -> Run:
    """``init``, ``inval``, ``arrive`` and ``expect_tx`` (9.7.13.15); a wait ends its block."""
    kinds = r"init|inval|arrive|arrive\.expect_tx|expect_tx"
    form = rf"mbarrier\.({kinds})(\.relaxed\.cta)?\.shared(::cta)?\.b64"
    found = re.fullmatch(form, ins.opcode)
    if found is None:
        raise ins.unknown()
    what = found[1]
    arguments = ins.operands
    if what.startswith("arrive") and not arguments[0].startswith("["):
        state, *arguments = arguments
        if state != "_":  # the token of a phase, which only test_wait without a parity takes
            raise ins.unknown()
    slot, offset = decoder.address(ins, arguments[0], u4)
    count = decoder.source(ins, arguments[1] if len(arguments) > 1 else "1", u4)

    def run(x: Any, m: Mask) -> None:
        address = x.wide(slot).view(u4).astype(i8) + offset
        counts = x.wide(count).view(u4).astype(i8)
        for cta, lane in np.argwhere(x.mask(m)):
            arguments = x, int(cta), int(address[cta, lane]), int(counts[cta, lane])
            x.machine.mbarriers.execute(what, *arguments)
            if what == "init":
                x.machine.shared.init_mbarrier(*arguments[:3])

    return run
