"""What instructions compute, on arrays of any shape; no registers, no memory.

PTX ISA 9.7.1 (integer arithmetic), 9.7.3 to 9.7.5 (floating point), 9.7.6 and 9.7.7 (comparison),
9.7.8 (logic and shift).

Results are IEEE, to nearest even. What differs from the hardware:

* ``ex2``, ``lg2``, ``rcp``, ``div.full``, ``tanh``, ``sin``, ``cos`` and ``rsqrt`` are NumPy's,
  which are more accurate than the approximations of the ISA;
* bf16 is computed in fp32 and rounded to bf16;
* ``fma.f32`` is rounded once where the result is a normal number; ``fma.f64`` is computed in
  ``np.longdouble`` and rounded to fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.formats import UNSIGNED, Array, f2, f4, f8, i8, u2, u4, u8, widened

# -------------------------------------------------------------------------------- floating point


def bf16_to_f32(bits: Array) -> Array:
    """Bits of bf16 as fp32."""
    return (bits.astype(u4) << 16).view(f4)


def f32_to_bf16(x: Array) -> Array:
    """fp32 to bits of bf16, to nearest even; every NaN becomes the canonical one."""
    bits = x.view(u4)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(u2)
    return np.where(np.isnan(x), u2(0x7FFF), rounded)


def f32_to_tf32(x: Array) -> Array:
    """fp32 to bits of tf32, to nearest with ties away from zero (``cvt.rna``)."""
    rounded = (x.view(u4) + u4(0x1000)) & u4(0xFFFFE000)
    return np.where(np.isnan(x), u4(0x7FFFE000), rounded)


def flush_subnormals(x: Array) -> Array:
    """What ``.ftz`` does to inputs and results of f32: subnormal numbers become 0 of their sign."""
    return np.where(np.abs(x) < np.finfo(f4).tiny, np.copysign(f4(0), x), x)


def fma(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c``, rounded once (see the module's docstring)."""
    if a.dtype == f8:
        return (a.astype(np.longdouble) * b + c).astype(f8)
    product = a.astype(f8) * b  # exact: 48 bits of 53
    total = product + c
    if a.dtype == f4:
        # The sum was rounded to fp64. A second rounding goes wrong only where the first one landed
        # on a tie: 1 followed by zeros in the 29 bits that fp32 lacks.
        tied = (total.view(u8) & u8(0x1FFFFFFF)) == u8(0x10000000)
        if tied.any():
            total = _off_the_tie(product, c.astype(f8), total, tied)
    return total.astype(a.dtype)


def _off_the_tie(product: Array, c: Array, total: Array, tied: Array) -> Array:
    """Move rounded sums on a tie by one unit towards the exact sum, by Knuth's TwoSum."""
    part = total - product
    rest = (product - (total - part)) + (c - part)
    moved = np.nextafter(total, np.where(rest > 0, np.inf, -np.inf))
    return np.where(tied & (rest != 0), moved, total)


def keep_upper_half(x: Array) -> Array:
    """``rcp.approx.ftz.f64`` leaves 0 in the low 32 bits of its result (9.7.3)."""
    return (x.view(u8) & u8(0xFFFFFFFF00000000)).view(f8)


# ---------------------------------------------------------------------------------------- integers


def divide(a: Array, b: Array) -> Array:
    """Integer division towards zero; division by zero gives all ones."""
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    quotient = a // safe
    if a.dtype.kind == "i":
        inexact = a - quotient * safe != 0
        quotient = quotient + (inexact & ((a < 0) != (safe < 0))).astype(a.dtype)
    ones = a.dtype.type(-1) if a.dtype.kind == "i" else ~a.dtype.type(0)
    return np.where(b == 0, ones, quotient)


def remainder(a: Array, b: Array) -> Array:
    """What :func:`divide` leaves, with the sign of ``a``."""
    return a - divide(a, b) * b


def multiply_wide(a: Array, b: Array) -> Array:
    """The whole product, in twice the width."""
    to = widened(a.dtype, 2 * a.dtype.itemsize)
    return a.astype(to) * b.astype(to)


def multiply_high(a: Array, b: Array) -> Array:
    """The upper half of the product."""
    width = a.dtype.itemsize
    if width < 8:
        return (multiply_wide(a, b) >> (8 * width)).astype(a.dtype)
    x, y = a.astype(u8), b.astype(u8)
    x_low, x_high = x & u8(0xFFFFFFFF), x >> u8(32)
    y_low, y_high = y & u8(0xFFFFFFFF), y >> u8(32)
    low = ((x_low * y_low) >> u8(32)) + ((x_low * y_high) & u8(0xFFFFFFFF)) + x_high * y_low
    high = x_high * y_high + ((x_low * y_high) >> u8(32)) + (low >> u8(32))
    if a.dtype.kind == "i":  # a negative number is its bits less 2 ** 64
        high = high - np.where(a < 0, y, u8(0)) - np.where(b < 0, x, u8(0))
    return high.astype(a.dtype)


def _shift(fn: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """Clamp the distance as PTX does: NumPy leaves shifts past the width undefined."""

    def shifted(a: Array, n: Array) -> Array:
        width = a.dtype.itemsize * 8
        clamped = np.minimum(n, width - 1).astype(a.dtype)
        if a.dtype.kind == "i":
            return fn(a, clamped)
        return np.where(n < width, fn(a, clamped), a.dtype.type(0))

    return shifted


def extract_bits(a: Array, start: Array, length: Array) -> Array:
    """``bfe``: ``length`` bits from bit ``start`` on, extended by the sign of ``a``'s type."""
    start, length = start.astype(u8) & u8(0xFF), length.astype(u8) & u8(0xFF)
    width = u8(8 * a.dtype.itemsize)
    bits = a.astype(i8).view(u8) if a.dtype.kind == "i" else a.astype(u8)
    one = u8(1)
    mask = np.where(length > 63, ~u8(0), (one << np.minimum(length, u8(63))) - one)
    field = np.where(start > 63, u8(0), bits >> np.minimum(start, u8(63))) & mask
    if a.dtype.kind == "i":
        # The sign is the field's last bit, or the last bit of ``a`` where the field goes past it.
        top = np.minimum(start + np.maximum(length, one) - one, width - one)
        negative = ((bits >> top) & one).astype(bool) & (length > 0)
        inside = np.minimum(length, np.where(start < width, width - np.minimum(start, width), 0))
        ones = np.where(inside > 63, u8(0), ~u8(0) << np.minimum(inside, u8(63)))
        field = np.where(negative, field | ones, field)
    return field.astype(UNSIGNED[a.dtype.itemsize])


def insert_bits(a: Array, b: Array, start: Array, length: Array) -> Array:
    """``bfi.b32``: the lowest ``length`` bits of ``a`` replace those of ``b`` from ``start`` on."""
    start = np.minimum(start & 0xFF, 32).astype(u8)
    length = np.minimum(length & 0xFF, 32).astype(u8)
    mask = ((u8(1) << length) - u8(1)) << start
    return ((b.astype(u8) & ~mask) | ((a.astype(u8) << start) & mask)).astype(u4)


def lop3(a: Array, b: Array, c: Array, table: int) -> Array:
    """Any function of three bits: ``table`` has its value for each ``4 a + 2 b + c``."""
    out = np.zeros(1, u4)
    for row in range(8):
        if table >> row & 1:
            out = out | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return out


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """``prmt.b32``: each nibble of ``selector`` picks a byte of ``b:a``, bit 3 spreads its sign."""
    both = a.astype(u8) | b.astype(u8) << u8(32)
    out = np.zeros(1, u4)
    for byte in range(4):
        pick = (selector >> (4 * byte)) & 0xF
        value = (both >> ((pick & 7).astype(u8) * u8(8))) & u8(0xFF)
        value = np.where(pick & 8, np.where(value & u8(0x80), u8(0xFF), u8(0)), value)
        out = out | (value.astype(u4) << (8 * byte))
    return out


def funnel_shift(a: Array, b: Array, n: Array, *, left: bool, wrap: bool) -> Array:
    """``shf``: the upper half of ``b:a << n``, or the lower half of ``b:a >> n``."""
    n = (n & 31 if wrap else np.minimum(n, 32)).astype(u8)
    both = b.astype(u8) << u8(32) | a.astype(u8)
    return ((both << n) >> u8(32) if left else both >> n).astype(u4)


def leading_zeros(a: Array) -> Array:
    """``clz``: fill every bit below the highest one, then count."""
    distance = 1
    while distance < 8 * a.dtype.itemsize:
        a = a | (a >> a.dtype.type(distance))
        distance *= 2
    return (8 * a.dtype.itemsize - np.bitwise_count(a)).astype(u4)


# ------------------------------------------------------------------------------------ instructions

UNARY: dict[str, Callable[[Array], Array]] = {
    "neg": lambda a: -a,
    "abs": np.abs,
    "not": lambda a: ~a,
    "sqrt": np.sqrt,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda a: a.dtype.type(1) / a,
    "rsqrt": lambda a: a.dtype.type(1) / np.sqrt(a),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "popc": lambda a: np.bitwise_count(a).astype(u4),
    "clz": leading_zeros,
}
BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mul.lo": lambda a, b: a * b,
    "mul.hi": multiply_high,
    "mul.wide": multiply_wide,
    "div": lambda a, b: a / b if a.dtype.kind == "f" else divide(a, b),
    "rem": remainder,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "min": np.fmin,  # of a number and NaN, the number
    "max": np.fmax,
    "min.NaN": np.minimum,
    "max.NaN": np.maximum,
    "min.relu": lambda a, b: np.maximum(np.minimum(a, b), 0).astype(a.dtype),
    "max.relu": lambda a, b: np.maximum(np.maximum(a, b), 0).astype(a.dtype),
    "shl": _shift(lambda a, n: a << n),
    "shr": _shift(lambda a, n: a >> n),
}
TERNARY: dict[str, Callable[[Array, Array, Array], Array]] = {
    "fma": fma,
    "mad": fma,
    "mad.lo": lambda a, b, c: a * b + c,
    "mad.hi": lambda a, b, c: multiply_high(a, b) + c,
    "mad.wide": lambda a, b, c: multiply_wide(a, b) + c,
    "bfe": extract_bits,
    "prmt": permute_bytes,
}
PREDICATES: dict[str, Callable[..., Array]] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
    "not": np.logical_not,
}
COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}

# The modifiers that may stand between a mnemonic and its type. The rounding and accuracy ones say
# what is computed anyway; every other one is an unknown instruction.
MODIFIERS: dict[str, set[str]] = {
    "add": {"rn", "ftz"},
    "sub": {"rn", "ftz"},
    "mul": {"rn", "ftz", "lo", "hi", "wide"},
    "mad": {"rn", "ftz", "lo", "hi", "wide"},
    "fma": {"rn", "ftz"},
    "div": {"rn", "ftz", "approx", "full"},
    "rcp": {"rn", "ftz", "approx"},
    "sqrt": {"rn", "ftz", "approx"},
    "rsqrt": {"ftz", "approx"},
    "ex2": {"ftz", "approx"},
    "lg2": {"ftz", "approx"},
    "sin": {"ftz", "approx"},
    "cos": {"ftz", "approx"},
    "tanh": {"approx"},
    "min": {"ftz", "NaN", "relu"},
    "max": {"ftz", "NaN", "relu"},
    "neg": {"ftz"},
    "abs": {"ftz"},
}


def comparison(name: str) -> Callable[[Array, Array], Array]:
    """A comparison of ``setp`` by name.

    Of a NaN the ordered ones are false, ``ne`` too, and those that end in ``u`` are true.

    Raises:
        KeyError: If there is no such comparison.
    """
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    unordered = len(name) == 3 and name.endswith("u")
    compare = COMPARISONS[name[:2] if unordered else name]

    def compared(a: Array, b: Array) -> Array:
        if a.dtype.kind != "f":
            return compare(a, b)
        nan = np.isnan(a) | np.isnan(b)
        return compare(a, b) | nan if unordered else compare(a, b) & ~nan

    return compared


def on_halves(fn: Callable[..., Array], kind: str) -> Callable[..., Any]:
    """A function of fp32 or fp16 applied to ``bf16``, ``bf16x2`` or ``f16x2``.

    A comparison of pairs gives two predicates, of the low and of the high half.
    """

    def unpack(bits: Array) -> Array:
        return bf16_to_f32(bits) if "bf16" in kind else bits.view(f2)

    def one(*args: Array) -> Array:
        out = fn(*(unpack(x) for x in args))
        if out.dtype == np.bool_:
            return out
        return f32_to_bf16(out) if "bf16" in kind else out.astype(f2).view(u2)

    def two(*args: Array) -> Any:
        low = one(*((x & u4(0xFFFF)).astype(u2) for x in args))
        high = one(*((x >> u4(16)).astype(u2) for x in args))
        if low.dtype == np.bool_:
            return low, high
        return low.astype(u4) | (high.astype(u4) << 16)

    return two if kind.endswith("x2") else one


ROUND_TO_INTEGER: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}


def float_to_integer(a: Array, dtype: Any, rounding: str) -> Array:
    """``cvt`` from floating point: out-of-range values are clamped (9.7.9.21).

    NaN becomes 0, but ``1 << 63`` where source or result has 64 bits.
    """
    limits = np.iinfo(dtype)
    whole = ROUND_TO_INTEGER[rounding](a.astype(np.longdouble))
    whole = np.clip(np.nan_to_num(whole, nan=0.0), limits.min, limits.max).astype(dtype)
    if a.dtype != f8 and np.dtype(dtype).itemsize < 8:
        return whole
    nan = np.array([1 << (limits.bits - 1)], u8).astype(UNSIGNED[limits.bits // 8]).view(dtype)
    return np.where(np.isnan(a), nan, whole)
