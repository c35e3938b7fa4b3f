"""What the chips can hold and how fast they go: residency, and the share of peak a loop can reach.

Sources. CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" for what an
SM holds, and the table of "Throughput of Native Arithmetic Instructions" for results per clock:
exp2 and the other special functions 16 on all of these chips; fp32 add, multiply and fused
multiply-add 64 (8.0) or 128 (9.0, 10.0); compare, minimum, maximum, integer add, shift and logic
64. Four schedulers issue one warp instruction a clock each. Dense matrix peaks are the published
ones per SM and clock: A100 312 TFLOP/s bf16 on 108 SMs at 1.41 GHz, H100 SXM 989 on 132 at 1.83
GHz, B200 2250 on 148 at 1.85 GHz give 1024, 2048 and 4096 multiply-adds a clock; TF32 has half.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.machine_code import Fp32Work

KIB = 1024
WARP = 32
SCHEDULERS = 4
REGISTERS = 65536  # per SM, on 8.0, 9.0 and 10.0
REGISTER_UNIT = 256  # a warp's registers are allocated in multiples of this
MAX_WARPS = 64
MAX_BLOCKS = 32
RESERVED_SHARED = KIB  # what the system takes of every block's shared memory
TENSOR_COLUMNS = 512  # of tensor memory per SM, where there is any
MUFU_RATE = 16
ALU_RATE = 64


class Chip(NamedTuple):
    """Per SM: bytes of shared memory (in all, for one block), results per clock."""

    shared: int
    shared_per_block: int
    fma_rate: int
    mma_rates: dict[str, int]  # multiply-adds per clock by element type


CHIPS = {
    "sm_80": Chip(164 * KIB, 163 * KIB, 64, {"half": 1024, "tf32": 512}),
    "sm_90": Chip(228 * KIB, 227 * KIB, 128, {"half": 2048, "tf32": 1024}),
    "sm_100": Chip(228 * KIB, 227 * KIB, 128, {"half": 4096, "tf32": 2048}),
}
SHARED_LIMIT = {name: chip.shared_per_block for name, chip in CHIPS.items()} | {"gfx942": 64 * KIB}


class Residency(NamedTuple):
    """Blocks that fit one SM at a time, and what keeps the next one out."""

    blocks: int
    limit: str


def residency(
    target: str, registers: int, shared_bytes: int, num_warps: int, tensor_columns: int
) -> Residency:
    """Blocks of one kernel that an SM holds at a time; 0 where not even one fits.

    ``registers`` a thread, ``shared_bytes`` and ``tensor_columns`` (of tensor memory) a block.
    """
    chip = CHIPS[target]
    per_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    warps = REGISTERS // SCHEDULERS // per_warp * SCHEDULERS
    room = {
        "registers": warps // num_warps,
        "shared memory": chip.shared // (shared_bytes + RESERVED_SHARED),
        "threads": MAX_WARPS // num_warps,
        "blocks": MAX_BLOCKS,
    }
    if shared_bytes > chip.shared_per_block:
        room["shared memory"] = 0
    if tensor_columns:
        room["tensor memory"] = TENSOR_COLUMNS // tensor_columns
    limit = min(room, key=room.__getitem__)
    return Residency(room[limit], limit)


class PeakShare(NamedTuple):
    """Bounds on the share of the chip's matrix peak, and the busiest of the other units."""

    no_overlap: float
    full_overlap: float
    bound: str


def peak_share(
    target: str, num_warps: int, counts: dict[str, int], macs: dict[str, float], fp32: Fp32Work
) -> PeakShare | None:
    """How much of its time a loop can keep the matrix unit busy, from its instruction counts.

    One trip of the loop by a block of ``num_warps`` warps, in clocks of an SM it has to itself::

        mma    = sum over element types of multiply-adds / rate
        other  = max(MUFU * 32 * W / 16,  FMA * 32 * W / rate,  ALU * 32 * W / 64,  issue)
                 where a packed FMA instruction (two results a lane) counts twice
        issue  = all instructions of a warp * W / 4

        no_overlap   = mma / (mma + other)        full_overlap = mma / max(mma, other)

    ``no_overlap`` is a lone block whose softmax and products take turns; ``full_overlap`` has other
    blocks or warp groups fill every gap. Neither knows of memory, latency, barriers or bank
    conflicts, so a kernel may fall short of both. A loop without matrix instructions (exact fp32)
    multiplies in FFMA: then ``mma`` is their time, ``other`` leaves them out of FMA and of issue,
    the overlapped bound doesn't, and the share is one of the fp32 peak.

    Args:
        target: ``"sm_80"``, ``"sm_90"`` or ``"sm_100"``.
        num_warps: warps of the block, all of which run the loop.
        counts: instructions of one warp by class, as in :mod:`benchmarks.machine_code`.
        macs: multiply-adds that a block's matrix instructions do, by element type.
        fp32: what of it is FFMA, or packed.

    Returns:
        None where the loop has neither, or multiplies in a type without a published rate here.
    """
    chip = CHIPS[target]
    if (not macs and not fp32.products) or not macs.keys() <= chip.mma_rates.keys():
        return None
    lanes = WARP * num_warps
    units = {
        "MUFU": counts["mufu"] * lanes / MUFU_RATE,
        "FMA": (counts["fma"] + fp32.packed) * lanes / chip.fma_rate,
        "ALU": counts["alu"] * lanes / ALU_RATE,
        "issue": sum(counts.values()) * num_warps / SCHEDULERS,
    }
    others = dict(units)
    product = sum(amount / chip.mma_rates[kind] for kind, amount in macs.items())
    if not macs:
        product = fp32.multiply_adds * lanes / chip.fma_rate
        others["FMA"] -= product
        others["issue"] -= fp32.products * num_warps / SCHEDULERS
    bound = max(others, key=others.__getitem__)
    return PeakShare(
        no_overlap=product / (product + others[bound]),
        full_overlap=product / max(product, *units.values()),
        bound=bound,
    )
