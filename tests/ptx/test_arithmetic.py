"""Instructions on registers against NumPy, Python's integers and fractions."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tests.ptx.assembly import elementwise, run
from tests.ptx.formats import EmulatorError, UnknownInstruction

INTEGERS = [0, 1, 2, 3, 5, 31, 32, 33, 100, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 0x9E3779B9]
FLOATS = [0.0, -0.0, 1.0, -1.5, 3.25, 1e-30, 1e30, np.inf, -np.inf, np.nan, 1e-40, 2.5, -0.3]


def pairs(values: list[Any], dtype: Any) -> tuple[Any, Any]:
    both = np.array(list(itertools.product(values, values)))
    return both[:, 0].astype(dtype), both[:, 1].astype(dtype)


def integers(dtype: Any) -> tuple[Any, Any]:
    """Pairs of bit patterns of 32 or 64 bits."""
    wide = np.uint64 if np.dtype(dtype).itemsize == 8 else np.uint32
    values = [x << 31 | x for x in INTEGERS] if wide is np.uint64 else INTEGERS
    a, b = pairs(values, wide)
    return a.view(dtype), b.view(dtype)


def exact(fn: Any, dtype: Any, *arrays: Any) -> Any:
    """``fn`` of Python's integers, cut to the dtype."""
    bits = np.dtype(dtype).itemsize * 8
    unsigned = [fn(*map(int, row)) & ((1 << bits) - 1) for row in zip(*arrays, strict=True)]
    return np.array(unsigned, f"u{bits // 8}").view(dtype)


def truncating(a: int, b: int) -> int:
    if b == 0:
        return -1
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_integer_arithmetic_is_pythons_cut_to_the_width(kind: str) -> None:
    dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")
    bits = dtype.itemsize * 8
    a, b = integers(dtype)
    cases = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul.lo": lambda a, b: a * b,
        "mul.hi": lambda a, b: a * b >> bits,
        "div": truncating,
        "rem": lambda a, b: a - truncating(a, b) * b,
        "min": min,
        "max": max,
    }
    if kind == "s32":
        cases |= {
            "min.relu": lambda a, b: max(min(a, b), 0),
            "max.relu": lambda a, b: max(a, b, 0),
        }
    for name, fn in cases.items():
        actual = elementwise(f"{name}.{kind} d, a, b;", a, b, out=dtype)
        np.testing.assert_array_equal(actual, exact(fn, dtype, a, b), err_msg=name)
    if bits == 32:
        wide = np.dtype(f"{dtype.kind}8")
        product = elementwise(f"mul.wide.{kind} d, a, b;", a, b, out=wide)
        np.testing.assert_array_equal(product, exact(lambda a, b: a * b, wide, a, b))
        c = a.astype(wide)[::-1].copy()
        total = elementwise(f"mad.wide.{kind} d, a, b, c;", a, b, c, out=wide)
        np.testing.assert_array_equal(total, exact(lambda a, b, c: a * b + c, wide, a, b, c))
        c = a[::-1].copy()
        total = elementwise(f"mad.lo.{kind} d, a, b, c;", a, b, c, out=dtype)
        np.testing.assert_array_equal(total, exact(lambda a, b, c: a * b + c, dtype, a, b, c))


def test_shifts_past_the_width_are_clamped() -> None:
    a, n = pairs(INTEGERS, np.uint32)
    left = elementwise("shl.b32 d, a, b;", a, n, out=np.uint32)
    np.testing.assert_array_equal(
        left, exact(lambda a, n: a << min(n, 32) & 0xFFFFFFFF, np.uint32, a, n)
    )
    right = elementwise("shr.u32 d, a, b;", a, n, out=np.uint32)
    np.testing.assert_array_equal(right, exact(lambda a, n: a >> min(n, 32), np.uint32, a, n))
    signed = elementwise("shr.s32 d, a, b;", a.view(np.int32), n, out=np.int32)
    np.testing.assert_array_equal(
        signed, exact(lambda a, n: a >> min(n, 31), np.int32, a.view(np.int32), n)
    )


def test_bits_are_counted_logic_is_bitwise() -> None:
    a, b = integers(np.uint32)
    for name, fn in {
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b,
    }.items():
        actual = elementwise(f"{name}.b32 d, a, b;", a, b, out=np.uint32)
        np.testing.assert_array_equal(actual, exact(fn, np.uint32, a, b))
    not_a = elementwise("not.b32 d, a;", a, out=np.uint32)
    np.testing.assert_array_equal(not_a, exact(lambda a: ~a, np.uint32, a))
    ones = elementwise("popc.b32 d, a;", a, out=np.uint32)
    np.testing.assert_array_equal(ones, exact(int.bit_count, np.uint32, a))
    for width in (4, 8):
        x, _ = integers(np.dtype(f"u{width}"))
        zeros = elementwise(f"clz.b{8 * width} d, a;", x, out=np.uint32)
        expected = exact(lambda a, w=width: 8 * w - a.bit_length(), np.uint32, x)
        np.testing.assert_array_equal(zeros, expected)


def bit_field(a: int, start: int, length: int, signed: bool) -> int:
    """The ISA's own loop (9.7.1.21)."""
    start, length = start & 0xFF, length & 0xFF
    sign = 0 if not signed or length == 0 else a >> min(start + length - 1, 31) & 1
    return sum(
        (a >> (start + i) & 1 if i < length and start + i <= 31 else sign) << i for i in range(32)
    )


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_bfe_extracts_as_the_isas_loop_does(kind: str) -> None:
    numbers = [0, 1, 5, 0x80000000, 0xFFFFFFFF, 0x9E3779B9]
    cases = list(itertools.product(numbers, [0, 3, 31, 32, 40, 200], [0, 1, 7, 31, 32, 33, 255]))
    a, start, length = (np.array(x, np.uint32) for x in zip(*cases, strict=True))
    actual = elementwise(f"bfe.{kind} d, a, b, c;", a, start, length, out=np.uint32)
    expected = exact(lambda *x: bit_field(*x, kind == "s32"), np.uint32, a, start, length)
    np.testing.assert_array_equal(actual, expected)


def test_bfi_prmt_lop3_and_shf_against_a_loop_over_bits() -> None:
    rng = np.random.default_rng(0)
    a, b, c, n = rng.integers(0, 2**32, (4, 64), np.uint64).astype(np.uint32)
    start, length = (n % 40).astype(np.uint32), (n // 40 % 40).astype(np.uint32)

    def insert(a: int, b: int, start: int, length: int) -> int:
        for i in range(length):
            if start + i < 32:
                b = b & ~(1 << (start + i)) | (a >> i & 1) << (start + i)
        return b

    actual = elementwise("bfi.b32 d, a, b, c, e;", a, b, start, length, out=np.uint32)
    np.testing.assert_array_equal(actual, exact(insert, np.uint32, a, b, start, length))

    def permute(a: int, b: int, selector: int) -> int:
        raw = (b << 32 | a).to_bytes(8, "little")
        picks = [selector >> 4 * i & 0xF for i in range(4)]
        chosen = [raw[p & 7] if p < 8 else 0xFF * (raw[p & 7] >> 7) for p in picks]
        return int.from_bytes(bytes(chosen), "little")

    actual = elementwise("prmt.b32 d, a, b, c;", a, b, c, out=np.uint32)
    np.testing.assert_array_equal(actual, exact(permute, np.uint32, a, b, c))

    for table in (0x80, 0xFE, 0x96, 0xCA, 0x1B):

        def look_up(a: int, b: int, c: int, table: int = table) -> int:
            index = [4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1) for i in range(32)]
            return sum((table >> x & 1) << i for i, x in enumerate(index))

        actual = elementwise(f"lop3.b32 d, a, b, c, {table};", a, b, c, out=np.uint32)
        np.testing.assert_array_equal(actual, exact(look_up, np.uint32, a, b, c))

    distance = (n % 50).astype(np.uint32)
    for mode, limit in (("wrap", lambda n: n & 31), ("clamp", lambda n: min(n, 32))):
        left = elementwise(f"shf.l.{mode}.b32 d, a, b, c;", a, b, distance, out=np.uint32)
        right = elementwise(f"shf.r.{mode}.b32 d, a, b, c;", a, b, distance, out=np.uint32)
        shift_left = lambda a, b, n, f=limit: (b << 32 | a) << f(n) >> 32  # noqa: E731
        shift_right = lambda a, b, n, f=limit: (b << 32 | a) >> f(n)  # noqa: E731
        np.testing.assert_array_equal(left, exact(shift_left, np.uint32, a, b, distance))
        np.testing.assert_array_equal(right, exact(shift_right, np.uint32, a, b, distance))


# ---------------------------------------------------------------------------------- floating point


@pytest.mark.parametrize(("kind", "dtype"), [("f32", np.float32), ("f64", np.float64)])
def test_floating_point_arithmetic_is_ieee(kind: str, dtype: Any) -> None:
    a, b = pairs(FLOATS, dtype)
    with np.errstate(all="ignore"):
        cases = {
            f"add.rn.{kind}": a + b,
            f"sub.{kind}": a - b,
            f"mul.{kind}": a * b,
            f"div.rn.{kind}": a / b,
            f"min.{kind}": np.fmin(a, b),
            f"max.{kind}": np.fmax(a, b),
        }
        if kind == "f32":
            cases |= {"max.NaN.f32": np.maximum(a, b), "min.NaN.f32": np.minimum(a, b)}
    for name, expected in cases.items():
        actual = elementwise(f"{name} d, a, b;", a, b, out=dtype)
        np.testing.assert_array_equal(actual, expected, err_msg=name)
    negated = elementwise(f"neg.{kind} d, a;", a, out=dtype)
    np.testing.assert_array_equal(np.signbit(negated), ~np.signbit(a))


def test_fma_in_fp32_is_rounded_once() -> None:
    """Also where fp64 holds the product and lands the sum on a tie of fp32."""
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 512)).astype(np.float32)
    c = (-a * b + rng.standard_normal(512) * 2.0 ** rng.integers(-40, 3, 512)).astype(np.float32)
    # a b = 2**-24 - 2**-60. fp64 rounds the sum up to the tie between c and the next number, and a
    # second rounding would go to the next one, which is even.
    a[0], b[0], c[0] = 2**-24 * (1 + 2**-18), 1 - 2**-18, 1 + 2**-23
    a[1:3], b[1:3], c[1:3] = -a[0], b[0], (-c[0], 1 + 2**-22)
    actual = elementwise("fma.rn.f32 d, a, b, c;", a, b, c, out=np.float32)
    for i in range(512):
        total = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        near = [np.nextafter(actual[i], np.float32(d), dtype=np.float32) for d in (-np.inf, np.inf)]
        error = abs(Fraction(float(actual[i])) - total)
        assert all(error <= abs(Fraction(float(x)) - total) for x in near), i


def test_ftz_flushes_subnormal_inputs_and_results_and_nothing_else_does() -> None:
    a = np.array([1e-40, -1e-40, 2.0, 1e-20], np.float32)
    b = np.array([1.0, 1.0, 1.0, 1e-20], np.float32)
    flushed = elementwise("mul.rn.ftz.f32 d, a, b;", a, b, out=np.float32)
    np.testing.assert_array_equal(flushed, np.float32([0, 0, 2, 0]))
    np.testing.assert_array_equal(np.signbit(flushed), [False, True, False, False])
    kept = elementwise("mul.rn.f32 d, a, b;", a, b, out=np.float32)
    np.testing.assert_array_equal(kept, a * b)
    x = np.array([-130.0, -149.0, -126.0, 3.5, -np.inf, np.nan], np.float32)
    power = elementwise("ex2.approx.ftz.f32 d, a;", x, out=np.float32)
    np.testing.assert_array_equal(power, np.float32([0, 0, 2.0**-126, 2**3.5, 0, np.nan]))
    power = elementwise("ex2.approx.f32 d, a;", x, out=np.float32)
    np.testing.assert_array_equal(power, np.exp2(x))


def test_functions_of_one_number() -> None:
    x = np.array([0.1, 0.5, 1.0, 2.0, 7.25, 1e10, 1e-10], np.float32)
    wide = x.astype(np.float64)
    for name, fn in {
        "lg2.approx.f32": np.log2,
        "rcp.approx.f32": lambda x: 1 / x,
        "sqrt.rn.f32": np.sqrt,
        "rsqrt.approx.f32": lambda x: 1 / np.sqrt(x),
        "sin.approx.f32": np.sin,
        "cos.approx.f32": np.cos,
        "tanh.approx.f32": np.tanh,
    }.items():
        actual = elementwise(f"{name} d, a;", x, out=np.float32)
        np.testing.assert_allclose(actual, fn(wide), rtol=3e-7, err_msg=name)
    reciprocal = elementwise("rcp.approx.ftz.f64 d, a;", wide, out=np.float64)
    assert not (reciprocal.view(np.uint64) & 0xFFFFFFFF).any()
    np.testing.assert_allclose(reciprocal, 1 / wide, rtol=2e-6)


def test_half_precision_works_on_pairs() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, 64)).astype(np.float16)
    total = elementwise("add.f16x2 d, a, b;", a.view(np.uint32), b.view(np.uint32), out=np.uint32)
    np.testing.assert_array_equal(total.view(np.float16), a + b)
    # bf16 with 8 significant bits: these products and sums are exact.
    bits = (rng.integers(0, 256, 64).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    numbers = (bits.astype(np.uint32) << 16).view(np.float32)
    packed = bits.view(np.uint32)
    largest = elementwise("max.bf16x2 d, a, b;", packed, packed[::-1].copy(), out=np.uint32)
    other = packed[::-1].copy().view(np.uint16)
    expected = np.maximum(numbers, (other.astype(np.uint32) << 16).view(np.float32))
    result = (largest.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(result, expected)


# ----------------------------------------------------------------------- comparison and conversion


def test_ordered_comparisons_are_false_of_nan_and_the_others_true() -> None:
    a, b = pairs(FLOATS, np.float32)
    nan = np.isnan(a) | np.isnan(b)
    for name, fn in {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }.items():
        ordered = elementwise(f"setp.{name}.f32 d, a, b;", a, b, out=bool)
        np.testing.assert_array_equal(ordered, fn(a, b) & ~nan, err_msg=name)
        unordered = elementwise(f"setp.{name}u.f32 d, a, b;", a, b, out=bool)
        np.testing.assert_array_equal(unordered, fn(a, b) | nan, err_msg=name)
    np.testing.assert_array_equal(elementwise("setp.nan.f32 d, a, b;", a, b, out=bool), nan)
    np.testing.assert_array_equal(elementwise("setp.num.f32 d, a, b;", a, b, out=bool), ~nan)


def test_comparisons_of_integers_know_their_sign() -> None:
    a, b = integers(np.uint32)
    for kind, dtype in (("u32", np.uint32), ("s32", np.int32)):
        less = elementwise(f"setp.lt.{kind} d, a, b;", a, b, out=bool)
        np.testing.assert_array_equal(less, a.view(dtype) < b.view(dtype))
    lower = elementwise("setp.lo.u32 d, a, b;", a, b, out=bool)
    np.testing.assert_array_equal(lower, a < b)


def test_a_comparison_combines_with_a_predicate_and_gives_its_complement() -> None:
    a, b = integers(np.int32)
    c = np.arange(len(a)) % 3 == 0
    for boolean, fn in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        both = elementwise(f"setp.lt.{boolean}.s32 d, a, b, c;", a, b, c, out=bool)
        np.testing.assert_array_equal(both, fn(a < b, c))
        second = elementwise(f"setp.lt.{boolean}.s32 %p9|d, a, b, !c;", a, b, c, out=bool)
        np.testing.assert_array_equal(second, fn(~(a < b), ~c))


def test_selp_chooses_by_lane() -> None:
    a, b = integers(np.uint32)
    p = np.arange(len(a)) % 2 == 0
    chosen = elementwise("selp.b32 d, a, b, c;", a, b, p, out=np.uint32)
    np.testing.assert_array_equal(chosen, np.where(p, a, b))


def test_conversion_to_bf16_and_tf32_rounds_and_keeps_nan() -> None:
    import torch

    rng = np.random.default_rng(3)
    x = np.concatenate([rng.standard_normal(200), FLOATS, [1 + 2**-8, 1 + 3 * 2**-8]])
    x = x.astype(np.float32)
    x[:2] = np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)  # NaNs of all ones
    actual = elementwise("cvt.rn.bf16.f32 d, a;", x, out=np.uint16)
    expected = torch.from_numpy(x).bfloat16()
    result = torch.from_numpy(actual.view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    back = elementwise("cvt.f32.bf16 d, a;", actual, out=np.float32)
    np.testing.assert_array_equal(back, expected.float().numpy())
    tf32 = elementwise("cvt.rna.tf32.f32 d, a;", x, out=np.uint32).view(np.float32)
    assert np.isnan(tf32[np.isnan(x)]).all()
    finite = np.isfinite(x)
    assert not (tf32[finite].view(np.uint32) & 0x1FFF).any()
    step = np.spacing(np.abs(x[finite])) * 2.0**13
    assert (np.abs(tf32[finite] - x[finite]) <= step / 2).all()
    half = np.float32(1 + 2**-11)  # a tie of tf32: away from zero
    tie = elementwise("cvt.rna.tf32.f32 d, a;", np.array([half, -half]), out=np.uint32)
    np.testing.assert_array_equal(tie.view(np.float32), np.float32([1 + 2**-10, -1 - 2**-10]))


def test_conversion_packs_the_first_source_into_the_upper_half() -> None:
    a, b = np.float32([1.5, -2.0]), np.float32([0.25, 8.0])
    packed = elementwise("cvt.rn.bf16x2.f32 d, a, b;", a, b, out=np.uint32)
    np.testing.assert_array_equal(packed, a.view(np.uint32) & 0xFFFF0000 | b.view(np.uint32) >> 16)
    packed = elementwise("cvt.rn.f16x2.f32 d, a, b;", a, b, out=np.uint32)
    halves = packed.view(np.float16).reshape(-1, 2)
    np.testing.assert_array_equal(halves, np.stack([b, a], 1).astype(np.float16))


def test_conversion_to_integers_rounds_as_asked_and_clamps() -> None:
    x = np.float32([1.5, 2.5, -1.5, -0.7, 3e9, -3e9, 1e20, np.inf, -np.inf, np.nan])
    low, high = -(2**31), 2**31 - 1
    for rounding, values in {
        "rni": [2, 2, -2, -1],
        "rzi": [1, 2, -1, 0],
        "rmi": [1, 2, -2, -1],
        "rpi": [2, 3, -1, 0],
    }.items():
        actual = elementwise(f"cvt.{rounding}.s32.f32 d, a;", x, out=np.int32)
        clamped = [high, low, high, high, low, 0]
        np.testing.assert_array_equal(actual, np.array(values + clamped, np.int32))
    unsigned = elementwise("cvt.rzi.u32.f32 d, a;", x, out=np.uint32)
    top = 2**32 - 1
    np.testing.assert_array_equal(unsigned, [1, 2, 0, 0, 3e9, 0, top, top, 0, 0])
    wide = elementwise("cvt.rzi.s64.f64 d, a;", np.float64([np.nan, -2.9]), out=np.int64)
    np.testing.assert_array_equal(wide, [np.iinfo(np.int64).min, -2])


def test_conversion_between_integers_extends_by_the_sign() -> None:
    a = np.array([-1, 5, -(2**31)], np.int32)
    np.testing.assert_array_equal(elementwise("cvt.s64.s32 d, a;", a, out=np.int64), a)
    unsigned = elementwise("cvt.u64.u32 d, a;", a, out=np.uint64)
    np.testing.assert_array_equal(unsigned, a.view(np.uint32))
    low = elementwise("cvt.u32.u64 d, a;", np.array([2**40 + 7], np.uint64), out=np.uint32)
    np.testing.assert_array_equal(low, [7])
    number = elementwise("cvt.rn.f32.s32 d, a;", a, out=np.float32)
    np.testing.assert_array_equal(number, a.astype(np.float32))


def test_mov_packs_and_unpacks_the_lowest_element_first() -> None:
    out = np.zeros(4, np.uint32)
    run(
        """
        mov.b64 %rd0, {1, 2};
        mov.b64 {%r0, %r1}, %rd0;
        mov.b32 {%h0, _}, 0x00030004;
        mov.b32 {_, %h1}, 0x00030004;
        mov.b32 %r2, {%h1, %h0};
        st.global.v2.b32 [%a0], {%r0, %r1};
        st.global.b32 [%a0+8], %r2;
        """,
        out,
    )
    np.testing.assert_array_equal(out, [1, 2, 0x00040003, 0])


@pytest.mark.parametrize(
    "text",
    [
        "frobnicate.b32 %r0, %r1;",
        "add.sat.s32 %r0, %r1, %r2;",
        "add.rz.f32 %f0, %f1, %f2;",
        "fma.rn.sat.f32 %f0, %f1, %f2, %f3;",
        "mul24.lo.s32 %r0, %r1, %r2;",
        "min.xorsign.abs.f32 %f0, %f1, %f2;",
        "max.relu.f16x2 %r0, %r1, %r2;",
        "add.cc.u32 %r0, %r1, %r2;",
        "prmt.b32.f4e %r0, %r1, %r2, %r3;",
        "cvt.rn.satfinite.e4m3x2.f32 %h0, %f0, %f1;",
        "cvt.rz.bf16.f32 %h0, %f0;",
        "cvt.rn.relu.bf16x2.f32 %r0, %f0, %f1;",
        "cvt.f64.f32.sat %fd0, %f0;",
        "setp.almost.f32 %p0, %f0, %f1;",
        "shfl.up.b32 %r0, %r1, 1, 0;",
        "vote.sync.uni.pred %p0, %p1, -1;",
        "ld.local.b32 %r0, [%rd0];",
        "ld.b32 %r0, [%rd0];",
        "ld.global.v8.b32 {%r0,%r1,%r2,%r3,%r4,%r5,%r6,%r7}, [%rd0];",
        "st.shared::cluster.b32 [%r0], %r1;",
        "atom.global.add.f32 %f0, [%rd0], %f1;",
        "red.global.add.f32 [%rd0], %f1;",
        "ldmatrix.sync.aligned.m8n16.x1.shared.b8x16.b6x16_p32 {%r0}, [%r1];",
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%r0,%r1,%r2,%r3}, {%r4,%r5,%r6,%r7}, {%r8,%r9}, {%r0,%r1,%r2,%r3};",
        "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 "
        "{%f0,%f1,%f2,%f3}, %rd0, %rd1, %p0, 1, 1;",
        "cp.async.bulk.shared::cta.global [%r0], [%rd0], 16, [%r1];",
        "cp.async.cg.shared.global [%r0], [%rd0], 8;",
        "mbarrier.pending_count.b64 %r0, %rd0;",
        "fence.proxy.tensormap::generic.acquire.gpu [%rd0], 128;",
        "barrier.cluster.arrive;",
        "bar.red.popc.u32 %r0, 0, %p0;",
        "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r0], 32;",
    ],
    ids=lambda text: text.split()[0],
)
def test_an_unknown_instruction_is_an_error_that_names_it(text: str) -> None:
    with pytest.raises(UnknownInstruction) as caught:
        run(text)
    opcode = text.split()[0].rstrip(";")
    assert opcode in str(caught.value)


def test_an_unknown_register_label_or_directive_is_an_error() -> None:
    with pytest.raises(EmulatorError, match="no register '%r999'"):
        run("add.s32 %r0, %r999, 1;")
    with pytest.raises(EmulatorError, match="no label '\\$nowhere'"):
        run("bra $nowhere;")
    with pytest.raises(EmulatorError, match="unknown directive"):
        run(".pragmatic .b32 %r0;")
