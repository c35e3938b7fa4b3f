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
            128: (32, 64, 8, 2),
            192: (16, 32, 8, 1),
            256: (32, 32, 8, 1),
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
            192: (128, 32, 8, 2),
            256: (64, 32, 8, 2),
            512: (32, 32, 8, 1),
        },
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
    },
}
# Wider types, up to 256: one row serves all chips.
_WIDE = {
    "tf32": {
        "forward": {64: (64, 64, 4, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1)},
        "dkdv": {64: (32, 64, 8, 2), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
        "dq": {64: (64, 32, 8, 2), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
    },
    "fp32": {
        "forward": {64: (64, 32, 8, 1), 128: (64, 16, 8, 1), 256: (32, 16, 8, 1)},
        "dkdv": {64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 32, 8, 1)},
        "dq": {64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    },
    "fp64": {
        "forward": {64: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
        "dkdv": {64: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
        "dq": {64: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
    },
}
# Small and not square, so that small tests cross many tile edges.
_INTERPRETER = {
    "forward": (64, 32, 4, 1),
    "dkdv": (32, 64, 4, 1),
    "dq": (64, 32, 4, 1),
}


def nearest_target(capability: tuple[int, int]) -> str:
    """The column of the table for a CUDA compute capability: its own wgmma, tcgen05, or neither."""
    return {9: "sm_90", 10: "sm_100"}.get(capability[0], "sm_80")


def tile_config(kernel: str, target: str, dtype: str, head_dim: int) -> dict[str, int]:
    """Tile sizes and launch options of one kernel.

    Args:
        kernel: ``"forward"``, ``"delta"``, ``"dkdv"`` or ``"dq"``.
        target: ``"sm_80"``, ``"sm_90"``, ``"sm_100"``, ``"gfx942"`` or ``"interpreter"``.
        dtype: ``"half"`` (fp16, bf16), ``"fp32"``, ``"tf32"`` (fp32 with TF32 allowed), ``"fp64"``.
        head_dim: the larger of the two head dimensions, 1 to 512 in half precision, else to 256.

    Returns:
        ``BLOCK_M``, ``BLOCK_N``, ``num_warps`` and ``num_stages``, as a kernel launch takes them
        (delta has no keys, so no ``BLOCK_N``).
    """
    if kernel == "delta":  # streams o and do once, in rows that 4 warps hold in registers
        columns = 1 << (sum(head_tiles(head_dim)) - 1).bit_length()
        return {"BLOCK_M": 4096 // columns, "num_warps": 4, "num_stages": 1}
    if target == "interpreter":
        sizes = _INTERPRETER[kernel]
    else:
        rows = (_HALF[target] if dtype == "half" else _WIDE[dtype])[kernel]
        sizes = rows[min(widest for widest in rows if widest >= head_dim)]
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), sizes, strict=True))


def head_tiles(head_dim: int) -> tuple[int, ...]:
    """Widths of the column tiles that cover a head dimension: one power of two from 16 up, or two.

    The second one is there where it saves columns: 96 is 64 + 32 and not 128, 40 is 32 + 16.
    """
    whole = _power_of_two(head_dim)
    rest = _power_of_two(head_dim - whole // 2)
    return (whole // 2, rest) if whole // 2 + rest < whole else (whole,)


def _power_of_two(columns: int) -> int:
    """The least one that holds so many columns and that a matrix product takes: from 16 up."""
    return max(16, 1 << max(columns - 1, 0).bit_length())
