"""Instructions on registers alone: arithmetic, comparison, conversion, and exchange in a warp.

PTX ISA 9.7.1 to 9.7.8; ``mov``, ``cvt``, ``cvta``, ``prmt`` and ``shfl`` of 9.7.9; ``vote``,
``redux``, ``elect`` and ``activemask`` of 9.7.13. Instructions without an effect here, such as
hints to the cache or to the register allocator, stand at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx import arithmetic
from tests.ptx.decode import Decoder, Run, executes
from tests.ptx.formats import (
    FLOATS,
    LANES,
    TYPES,
    UNSIGNED,
    Array,
    EmulatorError,
    Mask,
    f2,
    f4,
    i8,
    u2,
    u4,
    u8,
    widened,
    width_of,
)
from tests.ptx.syntax import Instruction, vector

_LOGIC = ("and", "or", "xor", "not")


@executes(*{name.split(".")[0] for name in arithmetic.UNARY})
@executes(*{name.split(".")[0] for name in arithmetic.BINARY})
@executes(*{name.split(".")[0] for name in arithmetic.TERNARY})
def pure(decoder: Decoder, ins: Instruction) -> Run:
    """``d = fn(a, ...)``: the tables of :mod:`tests.ptx.arithmetic`, by mnemonic and modifiers."""
    base, *modifiers, kind = ins.parts
    dtype = TYPES.get(kind)
    if dtype is None or not set(modifiers) <= arithmetic.MODIFIERS.get(base, set()):
        raise ins.unknown()
    meant = [x for x in modifiers if x not in ("rn", "ftz", "approx", "full")]
    name = ".".join([base, *meant])
    tables = (arithmetic.UNARY, arithmetic.BINARY, arithmetic.TERNARY)
    fn: Callable[..., Array] | None = next((t[name] for t in tables if name in t), None)
    if kind == "pred":
        fn = arithmetic.PREDICATES.get(base)
    if fn is None or (dtype in FLOATS and base in _LOGIC) or ("relu" in meant and kind != "s32"):
        raise ins.unknown()
    if kind in ("bf16", "f16x2", "bf16x2") and base not in _LOGIC:
        fn = arithmetic.on_halves(fn, kind)
    if "ftz" in modifiers and kind == "f32":
        fn = _flushing(fn)
    if base == "rcp" and kind == "f64":
        if modifiers != ["approx", "ftz"]:
            raise ins.unknown()
        fn = (lambda f: lambda a: arithmetic.keep_upper_half(f(a)))(fn)
    kinds = [dtype] * len(ins.operands[1:])
    if base in ("shl", "shr"):
        kinds[1] = u4
    elif base == "bfe":
        kinds[1:] = [u4, u4]
    elif name == "mad.wide":
        kinds[2] = widened(dtype, 2 * width_of(dtype))
    slots = [decoder.source(ins, x, k) for x, k in zip(ins.operands[1:], kinds, strict=True)]
    return decoder.apply(decoder.target(ins, ins.operands[0]), fn, slots, kinds)


def _flushing(fn: Callable[..., Array]) -> Callable[..., Array]:
    flush = arithmetic.flush_subnormals
    return lambda *args: flush(fn(*(flush(a) for a in args)))


@executes("lop3")
def lop3(decoder: Decoder, ins: Instruction) -> Run:
    """``lop3.b32 d, a, b, c, table``."""
    if ins.opcode != "lop3.b32":
        raise ins.unknown()
    d, *sources, table = ins.operands
    slots, bits = [decoder.source(ins, x, u4) for x in sources], int(table, 0)
    compute = lambda a, b, c: arithmetic.lop3(a, b, c, bits)  # noqa: E731
    return decoder.apply(decoder.target(ins, d), compute, slots, [u4] * 3)


@executes("bfi")
def bfi(decoder: Decoder, ins: Instruction) -> Run:
    """``bfi.b32 d, a, b, start, length``."""
    if ins.opcode != "bfi.b32":
        raise ins.unknown()
    slots = [decoder.source(ins, x, u4) for x in ins.operands[1:]]
    d = decoder.target(ins, ins.operands[0])
    return decoder.apply(d, arithmetic.insert_bits, slots, [u4] * 4)


@executes("shf")
def shf(decoder: Decoder, ins: Instruction) -> Run:
    """``shf.l.wrap.b32 d, a, b, n`` and its kin."""
    _, way, mode, kind = (*ins.parts, "", "")[:4]
    if way not in ("l", "r") or mode not in ("wrap", "clamp") or kind != "b32":
        raise ins.unknown()
    slots = [decoder.source(ins, x, u4) for x in ins.operands[1:]]

    def compute(a: Array, b: Array, n: Array) -> Array:
        return arithmetic.funnel_shift(a, b, n, left=way == "l", wrap=mode == "wrap")

    return decoder.apply(decoder.target(ins, ins.operands[0]), compute, slots, [u4] * 3)


# ---------------------------------------------------------------------- comparison and selection


@executes("setp")
def setp(decoder: Decoder, ins: Instruction) -> Run:
    """``setp.lt.and.f32 p|q, a, b, c``: ``p = (a < b) and c``, ``q = not (a < b) and c``."""
    _, name, *boolean, kind = (x for x in ins.parts if x != "ftz")
    if kind not in TYPES or len(boolean) > 1 or not set(boolean) <= {"and", "or", "xor"}:
        raise ins.unknown()
    dtype = TYPES[kind]
    try:
        compare: Callable[..., Any] = arithmetic.comparison(name)
    except KeyError:
        raise ins.unknown() from None
    if kind in ("bf16", "bf16x2", "f16x2"):
        compare = arithmetic.on_halves(compare, kind)
    if "ftz" in ins.parts:
        inner, flush = compare, arithmetic.flush_subnormals
        compare = lambda a, b: inner(flush(a), flush(b))  # noqa: E731
    targets = [decoder.target(ins, x) for x in ins.operands[0].split("|")]
    a, b = (decoder.source(ins, x, dtype) for x in ins.operands[1:3])
    combine = arithmetic.PREDICATES[boolean[0]] if boolean else None
    negated = combine is not None and ins.operands[3].startswith("!")
    c = decoder.source(ins, ins.operands[3].lstrip("!"), np.bool_) if combine else 0
    paired = kind.endswith("x2")

    def run(x: Any, m: Mask) -> None:
        registers = x.registers
        value = compare(registers[a].view(dtype), registers[b].view(dtype))
        values = value if paired else (value, ~value)
        for d, each in zip(targets, values, strict=False):
            if d is not None:
                x.put(d, combine(each, registers[c] ^ negated) if combine else each, m)

    return run


@executes("selp")
def selp(decoder: Decoder, ins: Instruction) -> Run:
    """``selp.b32 d, a, b, p``: a where p."""
    if len(ins.parts) != 2 or ins.parts[1] not in TYPES:
        raise ins.unknown()
    dtype = TYPES[ins.parts[1]]
    kinds = [dtype, dtype, np.bool_]
    slots = [decoder.source(ins, x, t) for x, t in zip(ins.operands[1:], kinds, strict=True)]
    choose = lambda a, b, p: np.where(p, a, b)  # noqa: E731
    return decoder.apply(decoder.target(ins, ins.operands[0]), choose, slots, kinds)


# ---------------------------------------------------------------------- movement and conversion


@executes("mov")
def mov(decoder: Decoder, ins: Instruction) -> Run:
    """A copy, or packing and unpacking of a vector, lowest element first."""
    if len(ins.parts) != 2 or ins.parts[1] not in TYPES:
        raise ins.unknown()
    dtype = TYPES[ins.parts[1]]
    to, value = ins.operands
    if to.startswith("{") and "," in to:
        return _unpack(decoder, ins, dtype)
    if value.startswith("{") and "," in value:
        return _pack(decoder, ins, dtype)
    slot = decoder.source(ins, value, dtype)
    return decoder.apply(decoder.target(ins, to), lambda a: a, [slot], [dtype])


def _unpack(decoder: Decoder, ins: Instruction, dtype: Any) -> Run:
    targets = [decoder.target(ins, x) for x in vector(ins.operands[0])]
    size = width_of(dtype) // len(targets)
    slot, small = decoder.source(ins, ins.operands[1], dtype), UNSIGNED[size]

    def run(x: Any, m: Mask) -> None:
        bits = x.registers[slot].view(dtype)
        for i, d in enumerate(targets):
            if d is not None:
                x.put(d, (bits >> dtype(8 * size * i)).astype(small), m)

    return run


def _pack(decoder: Decoder, ins: Instruction, dtype: Any) -> Run:
    names = vector(ins.operands[1])
    size = width_of(dtype) // len(names)
    slots = [decoder.source(ins, x, UNSIGNED[size]) for x in names]
    d = decoder.lookup(ins, ins.operands[0])[0]

    def run(x: Any, m: Mask) -> None:
        bits = dtype(0)
        for i, slot in enumerate(slots):
            part = x.registers[slot].view(UNSIGNED[size]).astype(dtype)
            bits = bits | (part << dtype(8 * size * i))
        x.put(d, bits, m)

    return run


@executes("cvta")
def cvta(decoder: Decoder, ins: Instruction) -> Run:
    """Global, parameter and generic addresses are the same numbers here."""
    if not set(ins.parts[1:]) <= {"to", "global", "param", "u64"}:
        raise ins.unknown()
    slot = decoder.source(ins, ins.operands[1], u8)
    return decoder.apply(decoder.target(ins, ins.operands[0]), lambda a: a, [slot], [u8])


@executes("cvt")
def cvt(decoder: Decoder, ins: Instruction) -> Run:
    """``cvt{.rounding}{.ftz}.to.of d, a``; two sources where ``to`` is a pair."""
    _, *modifiers, to, of = ins.parts
    if to not in TYPES or of not in TYPES or len(set(modifiers) - {"ftz"}) > 1:
        raise ins.unknown()
    rounding = next((x for x in modifiers if x != "ftz"), "")
    d, width = decoder.lookup(ins, ins.operands[0])
    slots = [decoder.source(ins, x, TYPES[of]) for x in ins.operands[1:]]
    fn = _pair_conversion(to, of, rounding) if len(slots) == 2 else _conversion(to, of, rounding)
    if fn is None:
        raise ins.unknown()
    if "ftz" in modifiers:
        if of != "f32" or len(slots) == 2:
            raise ins.unknown()
        narrow = fn
        fn = lambda a: narrow(arithmetic.flush_subnormals(a))  # noqa: E731
    if to[0] in "us" and width_of(TYPES[to]) < width:  # 9.4.1: extended to the register's width
        exact, wide = fn, widened(TYPES[to], width)
        fn = lambda a: exact(a).astype(wide)  # noqa: E731
    return decoder.apply(d, fn, slots, [TYPES[of]] * len(slots))


def _pair_conversion(to: str, of: str, rounding: str) -> Callable[[Array, Array], Array] | None:
    """The first source goes to the upper half."""
    if of != "f32" or rounding != "rn" or to not in ("bf16x2", "f16x2"):
        return None
    if to == "bf16x2":
        half: Callable[[Array], Array] = arithmetic.f32_to_bf16
    else:
        half = lambda x: x.astype(f2).view(u2)  # noqa: E731
    return lambda a, b: half(a).astype(u4) << 16 | half(b).astype(u4)


def _conversion(to: str, of: str, rounding: str) -> Callable[[Array], Array] | None:
    target, source = TYPES[to], TYPES[of]
    if to == "bf16":
        return arithmetic.f32_to_bf16 if (of, rounding) == ("f32", "rn") else None
    if to == "tf32":
        return arithmetic.f32_to_tf32 if (of, rounding) == ("f32", "rna") else None
    if {to, of} & {"pred", "f16x2", "bf16x2"} or of == "tf32":
        return None
    if of == "bf16":
        if target not in (f4, TYPES["f64"]) or rounding not in ("", "rn"):
            return None
        return lambda a: arithmetic.bf16_to_f32(a).astype(target)
    if source in FLOATS and rounding in arithmetic.ROUND_TO_INTEGER:
        if target in FLOATS:
            whole = arithmetic.ROUND_TO_INTEGER[rounding]
            return lambda a: whole(a).astype(target)
        return lambda a: arithmetic.float_to_integer(a, target, rounding)
    if rounding not in ("", "rn") or (source in FLOATS and target not in FLOATS):
        return None
    return lambda a: a.astype(target)


# ---------------------------------------------------------------------------------- within a warp


@executes("shfl")
def shfl(decoder: Decoder, ins: Instruction) -> Run:
    """``shfl.sync.mode.b32 d|p, a, b, c, membermask`` (9.7.9.6)."""
    parts = ins.parts
    if len(parts) != 4 or parts[1] != "sync" or parts[3] != "b32":
        raise ins.unknown()
    mode = parts[2]
    if mode not in ("bfly", "idx", "up", "down"):
        raise ins.unknown()
    targets = [decoder.target(ins, x) for x in ins.operands[0].split("|")]
    a, b, c = (decoder.source(ins, x, u4) for x in ins.operands[1:4])
    lane = np.arange(LANES)

    def run(x: Any, m: Mask) -> None:
        value, n, clamp = (x.wide(s).view(u4).astype(i8) for s in (a, b, c))
        segment, limit = (clamp >> 8) & 31, clamp & 31
        n = n & 31
        low, high = lane & segment, (lane & segment) | (limit & ~segment)
        if mode == "bfly":
            other = lane ^ n
        elif mode == "idx":
            other = low | (n & ~segment)
        else:
            other = lane - n if mode == "up" else lane + n
        inside = other >= high if mode == "up" else other <= high
        other = np.where(inside, other, lane)
        if m is not None and not np.take_along_axis(m, other, 1)[m].all():
            raise EmulatorError("shfl from a thread that does not take part")
        if targets[0] is not None:
            x.put(targets[0], np.take_along_axis(value, other, 1).astype(u4), m)
        if len(targets) > 1 and targets[1] is not None:
            x.put(targets[1], np.broadcast_to(inside, value.shape), m)

    return run


@executes("vote")
def vote(decoder: Decoder, ins: Instruction) -> Run:
    """``vote.sync.any/all/ballot`` over the threads that take part."""
    parts = ins.parts
    if parts[1] != "sync" or ".".join(parts[2:]) not in ("any.pred", "all.pred", "ballot.b32"):
        raise ins.unknown()
    mode, d = parts[2], decoder.lookup(ins, ins.operands[0])[0]
    negated = ins.operands[1].startswith("!")
    p = decoder.source(ins, ins.operands[1].lstrip("!"), np.bool_)
    weights = u8(1) << np.arange(LANES, dtype=u8)

    def run(x: Any, m: Mask) -> None:
        value = x.wide(p) ^ negated
        active = np.ones_like(value) if m is None else m
        if mode == "ballot":
            x.put(d, ((value & active) * weights).sum(1, keepdims=True).astype(u4), m)
        elif mode == "any":
            x.put(d, (value & active).any(1, keepdims=True), m)
        else:
            x.put(d, (value | ~active).all(1, keepdims=True), m)

    return run


@executes("redux")
def redux(decoder: Decoder, ins: Instruction) -> Run:
    """``redux.sync.op.type d, a, membermask``: one integer for all threads of the mask (9.7.13)."""
    operations = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    _, sync, op, *kind = ins.parts
    types = {"s32": np.int32, "u32": u4} if op in ("add", "min", "max") else {"b32": u4}
    if sync != "sync" or op not in operations or len(kind) != 1 or kind[0] not in types:
        raise ins.unknown()
    reduce, dtype = operations[op].reduce, types[kind[0]]
    d = decoder.target(ins, ins.operands[0])
    a, members = (decoder.source(ins, operand, u4) for operand in ins.operands[1:3])
    lane = np.arange(LANES, dtype=u4)

    def run(x: Any, m: Mask) -> None:
        named = ((x.wide(members).view(u4) >> lane) & 1).astype(np.bool_)
        active = x.mask(m)
        if (named != active)[active.any(1)].any():
            raise EmulatorError("redux by other threads than those of its mask")
        value = x.wide(a).view(dtype)
        result = np.zeros((x.ctas, 1), dtype)
        for cta in active.any(1).nonzero()[0]:
            result[cta] = reduce(value[cta][active[cta]], dtype=dtype)
        if d is not None:
            x.put(d, result.view(u4), m)

    return run


@executes("elect")
def elect(decoder: Decoder, ins: Instruction) -> Run:
    """``elect.sync d|p``: lane 0 leads; the ISA leaves the choice open."""
    if ins.opcode != "elect.sync":
        raise ins.unknown()
    lane, p = (decoder.target(ins, x) for x in ins.operands[0].split("|"))

    def run(x: Any, m: Mask) -> None:
        x.whole_warps(m)
        if lane is not None:
            x.put(lane, np.zeros(1, u4), m)
        if p is not None:
            x.put(p, (np.arange(LANES) == 0)[None, :], m)

    return run


# ------------------------------------------------------------------------------------ no effect


@executes("bar", "membar", "nanosleep", "prefetch", "griddepcontrol", "setmaxnreg")
def no_effect(decoder: Decoder, ins: Instruction) -> Run:
    """``bar.warp.sync`` (a warp's threads run in step), waiting, hints.

    Other ``bar`` instructions end a block and never come here. ``membar`` orders global memory,
    whose order between CTAs is not checked.
    """
    return lambda x, m: None


@executes("createpolicy")
def createpolicy(decoder: Decoder, ins: Instruction) -> Run:
    """A cache policy: any number will do, the accesses that take it ignore it."""
    d = decoder.lookup(ins, ins.operands[0])[0]
    return lambda x, m: x.put(d, np.zeros(1, u8), m)


@executes("trap")
def trap(decoder: Decoder, ins: Instruction) -> Run:
    """Ends the launch with an error."""

    def run(x: Any, m: Mask) -> None:
        raise EmulatorError("trap")

    return run
