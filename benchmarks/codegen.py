"""The compile ledger: what every kernel becomes on every chip, on a machine that has none of them.

    python -m benchmarks.codegen --out benchmarks/results/codegen/triton-3.7.1.json

Each kernel is compiled ahead of time exactly as the backend would launch it: the launch itself is
recorded (arguments, specialised strides, tile sizes), not written down a second time. The ledger
holds registers, spills, shared memory against the chip's limit, tensor-core instructions, and
whether ptxas serialized them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from flashlayer.backends import triton as backend
from flashlayer.kernels import backward as backward_kernels
from flashlayer.kernels import forward as forward_kernels
from flashlayer.spec import AttentionExtras, AttentionSpec

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
POINTER_TYPES = DTYPES | {"u8": torch.uint8, "i32": torch.int32, "i64": torch.int64}
MASKS = {"full": (None, None), "causal": (None, 0), "window": (1023, 0)}  # (left, right)
HEAD_DIMS = (64, 128, 256)
TENSOR_CORE = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"\bmma\.sync",
    "mfma": r"v_mfma",
}
BATCH, HEADS, SEQLEN = 4, 16, 4096


def _plain(spec: AttentionSpec, q: Tensor) -> tuple[AttentionSpec, AttentionExtras]:
    return spec, AttentionExtras()


def _everything(spec: AttentionSpec, q: Tensor) -> tuple[AttentionSpec, AttentionExtras]:
    return replace(spec, softcap=30.0, dropout_p=0.1), AttentionExtras(
        attn_mask=q.new_empty(BATCH, 1, SEQLEN, SEQLEN),
        alibi_slopes=q.new_empty(1, HEADS, dtype=torch.float32),
        sinks=q.new_empty(HEADS),
        dropout_seed=q.new_empty((), dtype=torch.int64),
    )


def _packed(spec: AttentionSpec, q: Tensor) -> tuple[AttentionSpec, AttentionExtras]:
    edges = q.new_empty(BATCH + 1, dtype=torch.int32)
    return replace(spec, max_seqlen_q=SEQLEN, max_seqlen_k=SEQLEN), AttentionExtras(
        cu_seqlens_q=edges, cu_seqlens_k=edges
    )


OPTIONS = {"none": _plain, "all": _everything, "packed": _packed}


class Launch(NamedTuple):
    """One kernel launch, as the backend asked for it."""

    kernel: triton.JITFunction
    arguments: dict[str, Any]


class Recorder:
    """Stands in for a kernel and notes its launches."""

    def __init__(self, kernel: triton.JITFunction, launches: list[Launch]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        """``kernel[grid](...)``: note the arguments, launch nothing."""
        return lambda **arguments: self.launches.append(Launch(self.kernel, arguments))


def record_launches(
    target: str, dtype: torch.dtype, head_dim: int, mask: str, group: int, option: str
) -> list[Launch]:
    """What one forward and backward pass launches on ``target``."""
    launches: list[Launch] = []
    kernels = (
        (forward_kernels, "forward_kernel"),
        (backward_kernels, "delta_kernel"),
        (backward_kernels, "dkdv_kernel"),
        (backward_kernels, "dq_kernel"),
        (backward_kernels, "dmask_kernel"),
    )
    q = torch.empty(BATCH, HEADS, SEQLEN, head_dim, dtype=dtype, device="meta")
    kv = torch.empty(BATCH, HEADS // group, SEQLEN, head_dim, dtype=dtype, device="meta")
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    lse = torch.empty(BATCH, HEADS, SEQLEN, dtype=lse_dtype, device="meta")
    left, right = MASKS[mask]
    spec, extras = OPTIONS[option](AttentionSpec(head_dim**-0.5, left, right), q)
    d_mask = torch.empty(0, device="meta")
    if extras.attn_mask is not None:
        d_mask = torch.empty_like(extras.attn_mask)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(backend, "_target", return_value=target))
        for module, name in kernels:
            recorder = Recorder(getattr(module, name), launches)
            stack.enter_context(mock.patch.object(module, name, recorder))
        backend.launch_forward(q, kv, kv, q, lse, spec, extras)
        wants_d_mask = d_mask.numel() > 0
        gradients = (q, kv, kv, lse, d_mask)
        backend.launch_backward(q, None, q, kv, kv, q, lse, *gradients, wants_d_mask, spec, extras)
    return launches


def as_source(launch: Launch) -> ASTSource:
    """The launch as the JIT would specialise it: 16-byte alignment and constants in the type."""
    signature, constants, attributes = {}, {}, {}

    def describe(value: Any, path: tuple[int, ...], parameter: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(
                describe(item, (*path, index), parameter) for index, item in enumerate(value)
            )
        if parameter.is_constexpr or value is None:
            constants[path] = value
            return "constexpr"
        if isinstance(value, Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return "*" + next(name for name, dtype in POINTER_TYPES.items() if dtype == value.dtype)
        if parameter.annotation_type:
            return parameter.annotation_type
        if not parameter.do_not_specialize:
            if value == 1:
                constants[path] = 1
                return "constexpr"
            if value % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
        return "i32" if value < 2**31 else "i64"

    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        signature[parameter.name] = describe(value, (parameter.num,), parameter)
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_launch(launch: Launch, target: str) -> dict[str, Any]:
    """Compile one launch and read the machine code's own report."""
    options = {name: launch.arguments[name] for name in ("num_warps", "num_stages")}
    compiled = triton.compile(as_source(launch), target=TARGETS[target], options=options)
    row = {
        "kernel": launch.kernel.__name__,
        **{name: launch.arguments.get(name) for name in ("BLOCK_M", "BLOCK_N")},
        **options,
        "shared_bytes": compiled.metadata.shared,
        "shared_limit": SHARED_LIMIT[target],
    }
    if target.startswith("sm_"):
        code = compiled.asm["ptx"]
        row |= ptxas_report(code, TARGETS[target].arch)
    else:
        code = compiled.asm["amdgcn"]
        row |= {
            "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1]),
            "spill_bytes": 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", code)[1]),
            "serialized": False,
        }
    counts = {name: len(re.findall(pattern, code)) for name, pattern in TENSOR_CORE.items()}
    row["tensor_core"] = {name: count for name, count in counts.items() if count}
    return row


def ptxas_report(ptx: str, arch: int) -> dict[str, Any]:
    """``ptxas -v``: registers, spilled bytes (stores plus loads), the serialization warning."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={name}", str(source)]
        process = subprocess.run(
            [*command, "-o", str(Path(folder, "kernel.cubin"))],
            capture_output=True,
            text=True,
            check=True,
        )
    log = process.stdout + process.stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spill_bytes": sum(int(count) for count in re.findall(r"(\d+) bytes spill", log)),
        "serialized": "serialized" in log,
    }


def main(argv: list[str] | None = None) -> int:
    """Compile the matrix, print a line a kernel, write the ledger."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the ledger here, as JSON")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp16", "fp32"])
    parser.add_argument("--head-dims", nargs="+", type=int, default=list(HEAD_DIMS))
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=["full", "causal"])
    parser.add_argument(
        "--groups", nargs="+", type=int, default=[1], help="query heads per kv head"
    )
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=["none"])
    args = parser.parse_args(argv)
    if not isinstance(forward_kernels.forward_kernel, triton.JITFunction):
        parser.error("the kernels are interpreted: unset TRITON_INTERPRET to compile them")

    rows = []
    matrix = itertools.product(
        args.targets, args.dtypes, args.head_dims, args.masks, args.groups, args.options
    )
    for target, dtype, head_dim, mask, group, option in matrix:
        for launch in record_launches(target, DTYPES[dtype], head_dim, mask, group, option):
            case = {"target": target, "dtype": dtype, "head_dim": head_dim}
            case |= {"mask": mask, "group": group, "options": option}
            rows.append(case | compile_launch(launch, target))
            print(" ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n  ".join(json.dumps(row) for row in rows)  # one row a line: diffs stay readable
        args.out.write_text(
            f'{{"triton": "{triton.__version__}", "rows": [\n  {lines}\n]}}\n', encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
