"""Reading machine code, on code small enough to count by hand."""

import pytest

from benchmarks import chips
from benchmarks.machine_code import (
    WORK,
    Fp32Work,
    count_classes,
    count_work,
    fp32_work,
    hot_loop,
    multiply_adds,
    natural_loops,
    parse,
    size,
    tcgen05_multiply_adds,
    tensor_core_kinds,
)

NO_FP32 = Fp32Work(0, 0, 0)


def listing(*lines: str) -> str:
    """As nvdisasm prints a cubin with one kernel."""
    body = "\n".join(
        line if line.endswith(":") else f"        /*{16 * n:04x}*/    {line} ;"
        for n, line in enumerate(lines)
    )
    return f'\t.section\t.text.kernel,"ax",@progbits\n.text.kernel:\n{body}\n'


# Two loops multiply: the first masks its scores, the second waits in a loop that stands after the
# end of the kernel. Only the second one's header dominates that loop.
TWO_LOOPS = listing(
    "S2R R0, SR_TID.X",
    ".L_masked:",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT",
    "FFMA R5, R5, R6, R7",
    *("ISETP.GE.AND P1, PT, R3, R4, PT", "FSEL R5, R5, -INF , P1") * 4,
    "MUFU.EX2 R5, R5",
    "LDS R8, [R9]",
    "@!P0 BRA `(.L_masked)",
    ".L_plain:",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT",
    "@!P2 BRA `(.L_wait)",
    ".L_done:",
    "FFMA R5, R5, R6, R7",
    "MUFU.EX2 R5, R5",
    "LDS R8, [R9]",
    "BRA.U UP0, `(.L_plain)",
    "EXIT",
    ".L_wait:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [R1], R2",
    "@!P2 BRA `(.L_wait)",
    "BRA `(.L_done)",
    ".L_end:",
    "BRA `(.L_end)",
    "NOP",
)


def test_the_hot_loop_is_the_one_without_a_mask() -> None:
    code = parse(TWO_LOOPS)
    assert size(code) == 25
    assert sorted(len(loop) for loop in natural_loops(code)) == [2, 9, 13]
    loop = hot_loop(code)
    assert loop is not None
    expected = {"mma": 1, "mufu": 1, "fma": 1, "alu": 0, "memory": 1, "control": 5}
    assert count_classes(loop) == expected
    assert tensor_core_kinds(code.instructions) == {"wgmma": 2}
    # Two groups of four warps, 64 x 64 x 16 each.
    assert multiply_adds(loop, 8, 0) == {"half": 2 * 64 * 64 * 16}


def test_what_the_instructions_of_a_loop_do() -> None:
    """Every kind once, two packed numbers as one instruction."""
    kinds = {
        "exp2": "MUFU.EX2 R5, R5",
        "fma": "FFMA2 R4, R6, R8, R10",
        "mul": "FMUL R5, R6, R7",
        "add": "FADD R5, R6, R7",
        "max": "FMNMX3 R5, R6, R7, R8, !PT",
        "convert": "F2FP.BF16.F32.PACK_AB R5, R6, R7",
        "select": "FSETP.NEU.AND P0, PT, R5, -INF , PT",
        "shuffle": "SHFL.BFLY PT, R5, R6, 0x1, 0x1f",
        "integer": "IMAD.WIDE R4, R6, 0x2, R8",
        "matrix": "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "memory": "LDGSTS.E.BYPASS.128 [R5], [R6.64]",
        "control": "BAR.SYNC.DEFER_BLOCKING 0x0",
    }
    assert tuple(kinds) == tuple(WORK)
    for kind, line in kinds.items():
        expected = dict.fromkeys(WORK, 0) | {kind: 1}
        assert count_work(parse(listing(line)).instructions) == expected, line


def test_without_tensor_cores_the_product_is_ffma() -> None:
    code = parse(
        listing(
            ".L_0:",
            "FFMA R1, R2, R3, R1",
            "FADD R1, R2, R3",
            "@P0 BRA `(.L_0)",
            ".L_1:",
            "FFMA R1, R2, R3, R1",
            "@P0 BRA `(.L_1)",
            "EXIT",
        )
    )
    loop = hot_loop(code)
    assert loop is not None
    assert [x.opcode for x in loop] == ["FFMA", "BRA"]
    assert fp32_work([*loop, *parse(listing("FFMA2 R2, R4, R6, R8")).instructions]) == (2, 3, 1)
    assert hot_loop(parse(listing("FADD R1, R2, R3", "EXIT"))) is None


def test_what_is_not_understood_is_an_error() -> None:
    with pytest.raises(ValueError, match="not understood"):
        parse(listing("EXIT") + "        /*0040*/    ???\n")
    with pytest.raises(ValueError, match="one kernel"):
        parse("")


def test_shapes_of_the_matrix_instructions() -> None:
    code = parse(
        listing(
            "HMMA.16816.F32.BF16 R4, R8, R12, R4",
            "HMMA.1688.F32.TF32 R4, R8, R9, R4",
            "DMMA.8x8x4 R4, R8, R9, R4",
        )
    )
    amounts = multiply_adds(code.instructions, 4, 0)
    assert amounts == {"half": 4 * 16 * 8 * 16, "tf32": 4 * 16 * 8 * 8, "fp64": 4 * 8 * 8 * 4}
    ttgir = """
    ttng.tc_gen5_mma %a, %b : !ttg.memdesc<64x64xbf16, #s>, !ttg.memdesc<64x64xbf16, #s>
    %x = scf.for %i = %c0 to %n step %c1 {
      ttng.tc_gen5_mma %a, %b : !ttg.memdesc<128x64xbf16, #s>, !ttg.memdesc<64x128xbf16, #s>
    }
    ttng.tc_gen5_mma %a, %b : !ttg.memdesc<64x64xbf16, #s>, !ttg.memdesc<64x64xbf16, #s>
    """
    assert tcgen05_multiply_adds(ttgir) == 128 * 128 * 16


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "columns", "expected"),
    [
        # 65536 registers: 128 a thread for two blocks of 256 threads, 129 (rounded to 136) for one.
        ("sm_90", 128, 65536, 8, 0, (2, "registers")),
        ("sm_90", 129, 65536, 8, 0, (1, "registers")),
        ("sm_90", 32, 0, 4, 0, (16, "registers")),
        ("sm_90", 24, 0, 8, 0, (8, "threads")),
        ("sm_90", 16, 0, 1, 0, (32, "blocks")),
        # 228 KiB less 1 KiB a block: two blocks of 113 KiB, one of 114.
        ("sm_90", 64, 113 * 1024, 4, 0, (2, "shared memory")),
        ("sm_90", 64, 114 * 1024, 4, 0, (1, "shared memory")),
        ("sm_80", 64, 164 * 1024, 4, 0, (0, "shared memory")),
        ("sm_100", 64, 1024, 4, 256, (2, "tensor memory")),
    ],
)
def test_residency(
    target: str, registers: int, shared: int, warps: int, columns: int, expected: tuple[int, str]
) -> None:
    assert chips.residency(target, registers, shared, warps, columns) == expected


def test_peak_share_of_the_exponentials_alone() -> None:
    """A forward pass that is only products and exp2: FIELD_NOTES' 495 of 989 TFLOP/s at D = 64."""
    warps, m, n, d = 8, 128, 64, 64
    counts = dict.fromkeys(("mma", "fma", "alu", "memory", "control"), 0)
    counts["mufu"] = m * n // (32 * warps)
    share = chips.peak_share("sm_90", warps, counts, {"half": 2 * m * n * d}, NO_FP32)
    assert share is not None
    assert share.no_overlap == pytest.approx(495 / 989.4, abs=1e-3)
    assert share.full_overlap == 1.0
    assert share.bound == "MUFU"
    assert chips.peak_share("sm_90", warps, counts, {"fp64": 1}, NO_FP32) is None
    assert chips.peak_share("sm_90", warps, counts, {}, NO_FP32) is None


def test_peak_share_without_a_matrix_unit() -> None:
    counts = {"mma": 0, "mufu": 0, "fma": 300, "alu": 0, "memory": 100, "control": 0}
    share = chips.peak_share("sm_90", 4, counts, {}, Fp32Work(200, 200, 0))
    assert share is not None
    # 200 FFMA; 400 instructions to issue. Either unit takes one a clock from each scheduler.
    assert share.full_overlap == pytest.approx(200 / 400)
    assert share.bound == "issue"
    # 100 packed ones are 200 results, and 200 + 100 instructions to issue: both units take 300.
    counts["fma"] = 200
    share = chips.peak_share("sm_90", 4, counts, {}, Fp32Work(100, 200, 100))
    assert share is not None
    assert share.full_overlap == pytest.approx(200 / 300)
