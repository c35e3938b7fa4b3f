"""The tile table: how much of the problem one program holds, chosen by looking it up.

Every row was picked from compiled code (``python -m benchmarks codegen``): it fits the chip's
shared memory, and in fp16 and bf16 it neither spills nor makes ``ptxas`` serialize the tensor
cores; a few head dimensions that need a column mask or lie between 128 and 256 spill under 150
bytes. There is no autotuning: the same call always runs the
same kernel.

Two things bound a tile. The accumulators live in registers (forward ``BLOCK_M x Dv``, dQ
``BLOCK_M x D``, dK/dV ``BLOCK_N x (D + Dv)``), at most 255 for each thread of ``32 * num_warps``.
The tiles that are streamed past them live in shared memory, ``num_stages`` of each. Exact fp32 has
no tensor core to run on and keeps whole rows of both operands in registers: its tiles are small.
"""

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class TileConfig:
    """How one kernel is launched.

    Attributes:
        BLOCK_M: queries a tile.
        BLOCK_N: keys a tile.
        num_warps: warps a program.
        num_stages: tiles in flight.
        descriptors: whether whole tiles are loaded through tensor descriptors (TMA) where the
            tensor allows it. Off in the table: compiled for sm_90 they save up to 15 registers and
            move the loop's reachable share of peak by 2 % either way (benchmarks/NOTES.md), which
            is for a measurement to decide, see :func:`flashlayer.tune`.
        specialized: the warp-specialised kernel, see :mod:`flashlayer.kernels.hopper`: two
            consumers of ``num_warps`` each share ``BLOCK_M``, in dK/dV ``BLOCK_N``. Never in the
            table.
        takes_turns: whether its consumers take turns.
        heaviest_first: whether programs of a causal call start in the order of their work over as
            many heads as the L2 cache has room for, and not head by head; see
            ``program_coordinates``. Never in the table: a model of the scheduler has more of the
            chip at work (``python -m benchmarks schedule``), but it was never timed.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    specialized: bool = False
    takes_turns: bool = False
    heaviest_first: bool = False

    def launch_options(self) -> dict[str, int]:
        """What a kernel launch takes."""
        return {
            "BLOCK_M": self.BLOCK_M,
            "BLOCK_N": self.BLOCK_N,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# The widest head dimension a row is for: (BLOCK_M, BLOCK_N, num_warps, num_stages).
_HALF = {
    "sm_80": {  # also sm_86, sm_89 and sm_120, which have 101376 bytes: every row fits them
        "forward": {
            48: (128, 64, 8, 2),
            64: (128, 64, 4, 3),
            128: (128, 64, 8, 2),
            192: (64, 32, 8, 1),
            256: (64, 32, 8, 2),
            512: (32, 32, 8, 1),
        },
        "dkdv": {
            64: (64, 128, 8, 2),
            96: (32, 128, 8, 2),
            128: (64, 64, 8, 2),
            192: (16, 32, 8, 1),
            256: (32, 32, 4, 1),
            512: (16, 16, 8, 1),
        },
        "dq": {
            64: (64, 64, 4, 2),
            96: (64, 32, 4, 2),
            128: (64, 64, 8, 2),
            192: (32, 32, 8, 2),
            256: (64, 32, 8, 1),
            512: (16, 16, 8, 1),
        },
        "tangents": {
            96: (64, 32, 4, 2),
            128: (32, 32, 4, 2),
            192: (16, 32, 4, 1),
            256: (16, 32, 8, 1),
        },
    },
    "sm_90": {
        "forward": {
            64: (128, 64, 8, 3),
            128: (128, 128, 8, 2),
            256: (128, 64, 8, 2),
            512: (32, 32, 8, 1),
        },
        "dkdv": {
            128: (64, 128, 8, 2),
            256: (32, 64, 8, 2),
            512: (32, 16, 8, 1),
        },
        "dq": {
            64: (128, 64, 8, 3),
            128: (128, 64, 8, 2),
            256: (128, 32, 8, 2),
            512: (32, 32, 8, 1),
        },
        "tangents": {96: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (16, 32, 8, 1)},
    },
    "sm_100": {
        "forward": {
            64: (128, 128, 8, 3),
            128: (128, 128, 8, 2),
            256: (128, 64, 8, 2),
            512: (32, 32, 8, 1),
        },
        "dkdv": {128: (64, 128, 8, 2), 256: (32, 64, 8, 2), 512: (32, 16, 8, 1)},
        "dq": {
            64: (128, 64, 8, 3),
            128: (128, 64, 4, 2),
            256: (64, 32, 8, 2),
            512: (32, 32, 8, 1),
        },
        "tangents": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (16, 32, 8, 1)},
    },
    "gfx942": {
        "forward": {
            64: (128, 64, 4, 2),
            128: (128, 32, 4, 2),
            192: (64, 32, 4, 1),
            256: (64, 16, 4, 1),
            512: (32, 16, 4, 1),
        },
        "dkdv": {
            64: (32, 64, 4, 1),
            128: (32, 32, 4, 1),
            256: (16, 32, 4, 1),
            512: (16, 16, 4, 1),
        },
        "dq": {
            64: (64, 64, 4, 1),
            128: (64, 32, 4, 1),
            256: (32, 16, 4, 1),
            512: (16, 16, 4, 1),
        },
        "tangents": {64: (64, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
    },
}
# A dense mask's tile takes registers too, and its loads none of the stages. An interval mask takes
# those of its keys' intervals and of one loop in the other.
_HALF_MASKED = {
    # Loops over the edges of a window, causal included, spill in 64x64: 2.6 to 4.5 KB, the causal
    # one with Triton 3.9.
    "edges": {"sm_80": {"dkdv": {64: (64, 128, 8, 2), 128: (32, 128, 8, 2)}}},
    "dense": {
        "sm_90": {
            "forward": {128: (128, 64, 8, 1)},
            "dkdv": {128: (32, 128, 8, 2)},
            "dq": {64: (128, 64, 8, 1), 128: (128, 32, 8, 2)},
        },
    },
    "intervals": {
        "sm_80": {"forward": {64: (128, 64, 8, 3), 128: (128, 32, 8, 3)}},
        "sm_90": {"forward": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2)}},
        "sm_100": {
            "forward": {64: (128, 64, 8, 3), 128: (64, 64, 8, 2)},
            "dq": {64: (128, 64, 8, 3), 128: (128, 32, 8, 2)},
        },
    },
}
# Wider types, up to 256: one row serves all chips.
_WIDE = {
    "tf32": {
        "forward": {64: (64, 64, 4, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1)},
        "dkdv": {64: (32, 64, 8, 2), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
        "dq": {64: (64, 32, 8, 2), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
        "tangents": {64: (32, 32, 4, 1), 128: (16, 32, 8, 1)},
    },
    "fp32": {
        "forward": {
            64: (64, 32, 8, 1),
            96: (32, 32, 8, 1),
            128: (64, 16, 8, 1),
            256: (32, 16, 8, 1),
        },
        "dkdv": {64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 32, 8, 1)},
        "dq": {64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
        "tangents": {64: (32, 16, 8, 1), 128: (16, 16, 8, 1)},
    },
    "fp64": {
        "forward": {64: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
        "dkdv": {64: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
        "dq": {64: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
        "tangents": {128: (16, 16, 4, 1)},
    },
}
# Small and not square, so that small tests cross many tile edges.
_INTERPRETER = {
    "forward": (64, 32, 4, 1),
    "dkdv": (32, 64, 4, 1),
    "dq": (64, 32, 4, 1),
    "tangents": (64, 32, 4, 1),
}


def nearest_target(capability: tuple[int, int]) -> str:
    """The column of the table for a CUDA compute capability: its own wgmma, tcgen05, or neither."""
    return {9: "sm_90", 10: "sm_100"}.get(capability[0], "sm_80")


def tile_config(
    kernel: str, target: str, dtype: str, head_dim: int, mask: str = "none"
) -> TileConfig:
    """Tile sizes and launch options of one kernel.

    Args:
        kernel: ``"forward"``, ``"dkdv"``, ``"dq"`` or ``"tangents"``.
        target: ``"sm_80"``, ``"sm_90"``, ``"sm_100"``, ``"gfx942"`` or ``"interpreter"``.
        dtype: ``"half"`` (fp16, bf16), ``"fp32"``, ``"tf32"`` (fp32 with TF32 allowed), ``"fp64"``.
        head_dim: the larger of the two head dimensions, 1 to 512 in half precision, else to 256;
            for ``"tangents"`` half of that.
        mask: ``"none"``, ``"dense"``, ``"intervals"``; ``"edges"`` for dK/dV with a window.
    """
    if target == "interpreter":
        return TileConfig(*_INTERPRETER[kernel])
    tables = [_HALF[target] if dtype == "half" else _WIDE[dtype]]
    if dtype == "half" and mask != "none":
        tables.insert(0, _HALF_MASKED[mask].get(target, {}))
    rows = next(table[kernel] for table in tables if max(table.get(kernel, {0: ()})) >= head_dim)
    return TileConfig(*rows[min(widest for widest in rows if widest >= head_dim)])


def candidates(kernel: str, dtype: str) -> list[TileConfig]:
    """Every row for a kernel and dtype, with each number of stages next to its own."""
    by_target = (_HALF, *_HALF_MASKED.values()) if dtype == "half" else ({"any": _WIDE[dtype]},)
    tables = [table for tables in by_target for table in tables.values()]
    found = {}  # a dict for its order
    for table in tables:
        for block_m, block_n, warps, stages in table.get(kernel, {}).values():
            for near in (stages - 1, stages, stages + 1):
                for descriptors in (False, True) if dtype == "half" else (False,):
                    if near > 0:
                        found[TileConfig(block_m, block_n, warps, near, descriptors)] = None
    return list(found)


def specialized_candidates(kernel: str, head_dim: int) -> list[TileConfig]:
    """Variants of a warp-specialised kernel for a head dimension of 64 or 128.

    Each fits a Hopper SM's shared memory and registers (``python -m benchmarks codegen``).
    """
    if kernel == "dq":
        return [TileConfig(128, 64, 4, stages, True, True) for stages in (2, 3)]
    few = (2, 3) if head_dim == 64 else (2,)
    if kernel == "dkdv":
        return [TileConfig(64, 128, 4, stages, True, True) for stages in few]
    return [
        TileConfig(128, 128, 4, stages, True, True, takes_turns)
        for stages in few
        for takes_turns in (False, True)
    ]


def delta_rows(value_dim: int) -> int:
    """Rows a program of the delta kernel takes: it streams o and do, and 4 warps hold them."""
    columns = 1 << (sum(head_tiles(value_dim)) - 1).bit_length()
    return 4096 // columns


def merge_tile(num_parts: int, value_dim: int) -> dict[str, int]:
    """Sizes of the merge kernel: 4 warps hold the LSEs of all parts and the outputs of some.

    One compilation serves all numbers of parts that keys are split into as a sequence grows.
    """
    columns = _power_of_two(value_dim)
    parts = max(512, _power_of_two(num_parts))
    return {"NUM_PARTS": parts, "BLOCK_P": 4096 // columns, "BLOCK_D": columns}


@triton.constexpr_function  # also called in kernels, at compile time
def head_tiles(head_dim: int) -> tuple[int, ...]:
    """Widths of the column tiles that cover a head dimension: one power of two from 16 up, or two.

    The second one is there where it saves columns: 96 is 64 + 32 and not 128, 40 is 32 + 16.
    """
    whole = _power_of_two(head_dim)
    rest = _power_of_two(head_dim - whole // 2)
    return (whole // 2, rest) if whole // 2 + rest < whole else (whole,)


@triton.constexpr_function
def _power_of_two(columns: int) -> int:
    """The least one that holds so many columns and that a matrix product takes: from 16 up."""
    return max(16, 1 << max(columns - 1, 0).bit_length())
