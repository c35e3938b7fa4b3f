"""The compile ledger: what every kernel becomes on every chip, on a machine that has none of them.

    python -m benchmarks codegen --out benchmarks/results

Each kernel is compiled ahead of time exactly as the backend would launch it: the backend runs on
tensors without memory, its launches are recorded instead of made, and Triton's own JIT specialises
and compiles them for a chip that is only named. From the machine code come registers, spills,
shared memory, the blocks an SM holds, the tensor-core instructions, and the hot loop
(:mod:`benchmarks.machine_code`) with the share of peak it can reach (:mod:`benchmarks.chips`).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver

from benchmarks import chips, codegen_specialized, machine_code
from benchmarks.codegen_report import markdown
from flashlayer.backends import triton as backend
from flashlayer.backends.triton import launch as backend_launch
from flashlayer.backends.triton import tiling
from flashlayer.kernels.primitives import INTERPRETED
from flashlayer.spec import AttentionExtras, AttentionSpec, Problem

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
MASKS = {"full": (None, None), "causal": (None, 0)}  # (left, right)
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
BATCH, HEADS, SEQLEN = 4, 16, 4096
WINDOW = 1023

# Where each option is compiled on its own, unless --options or --full say otherwise.
OPTIONS_TARGET, OPTIONS_DTYPE, OPTIONS_HEAD_DIMS = "sm_90", "bf16", (64, 128)
# Products of BLOCK_M, BLOCK_N and the head dimension that the mathematics needs.
PRODUCTS = {
    "forward_kernel": 2,
    "dkdv_kernel": 4,
    "dq_kernel": 3,
    "dmask_kernel": 2,
    "tangent_kernel": 6,
}


def _window(spec: AttentionSpec) -> AttentionSpec:
    right = WINDOW if spec.window_right is None else spec.window_right
    return replace(spec, window_left=WINDOW, window_right=right)


def _mask(q: Tensor) -> Tensor:
    return q.new_empty(BATCH, 1, SEQLEN, SEQLEN).requires_grad_()


def _intervals(q: Tensor) -> Tensor:
    return q.new_empty(BATCH, 1, 2, SEQLEN, dtype=torch.int32)


def _slopes(q: Tensor) -> Tensor:
    return q.new_empty(1, HEADS, dtype=torch.float32)


def _seed(q: Tensor) -> Tensor:
    return q.new_empty((), dtype=torch.int64)


def _packed(spec: AttentionSpec, q: Tensor) -> tuple[AttentionSpec, AttentionExtras]:
    edges = q.new_empty(BATCH + 1, dtype=torch.int32)
    return replace(spec, max_seqlen_q=SEQLEN, max_seqlen_k=SEQLEN), AttentionExtras(
        cu_seqlens_q=edges, cu_seqlens_k=edges
    )


def _everything(spec: AttentionSpec, q: Tensor) -> tuple[AttentionSpec, AttentionExtras]:
    return replace(_window(spec), softcap=30.0, dropout_p=0.1), AttentionExtras(
        attn_mask=_mask(q),
        alibi_slopes=_slopes(q),
        sinks=q.new_empty(HEADS),
        dropout_seed=_seed(q),
    )


OPTIONS: dict[str, Callable[[AttentionSpec, Tensor], tuple[AttentionSpec, AttentionExtras]]] = {
    "none": lambda spec, q: (spec, AttentionExtras()),
    "packed": _packed,
    "window": lambda spec, q: (_window(spec), AttentionExtras()),
    "mask": lambda spec, q: (spec, AttentionExtras(attn_mask=_mask(q))),
    "intervals": lambda spec, q: (spec, AttentionExtras(intervals=_intervals(q))),
    "softcap": lambda spec, q: (replace(spec, softcap=30.0), AttentionExtras()),
    "alibi": lambda spec, q: (spec, AttentionExtras(alibi_slopes=_slopes(q))),
    "sinks": lambda spec, q: (spec, AttentionExtras(sinks=q.new_empty(HEADS))),
    "dropout": lambda spec, q: (
        replace(spec, dropout_p=0.1),
        AttentionExtras(dropout_seed=_seed(q)),
    ),
    "return_aux": lambda spec, q: (
        replace(spec, max_scores=True, entropy=True),
        AttentionExtras(),
    ),
    "all": _everything,
}
# Tangents of q, k and v: forward mode, instead of a forward and a backward pass.
OPTIONS["tangents"] = OPTIONS["none"]
OPTIONS |= dict.fromkeys(codegen_specialized.VARIANTS, OPTIONS["none"])


class Case(NamedTuple):
    """One call of attention, forward and backward."""

    target: str
    dtype: str
    head_dim: int
    mask: str
    group: int
    options: str


class Launch(NamedTuple):
    """One kernel launch, as the backend asked for it."""

    kernel: triton.JITFunction
    arguments: dict[str, Any]


class NamedDevice:
    """Stands in for Triton's driver: a chip that kernels are compiled for, not run on."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_device(self) -> str:
        """The key under which Triton keeps what it has compiled."""
        return self.target

    def get_current_stream(self, device: str) -> int:
        """No stream, as nothing is launched."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What Triton compiles for."""
        return TARGETS[self.target]


def record_launches(case: Case) -> list[Launch]:
    """What one forward and one backward pass launch."""
    launches: list[Launch] = []

    def run(self: triton.JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = (x.name for x in self.params)
        launches.append(Launch(self, dict(zip(names, args, strict=False)) | kwargs))

    dtype = DTYPES[case.dtype]
    q = torch.empty(BATCH, HEADS, SEQLEN, case.head_dim, dtype=dtype, device="meta")
    if case.options == "packed":
        q = q.reshape(1, HEADS, BATCH * SEQLEN, case.head_dim)
    kv = q[:, : HEADS // case.group].contiguous()
    left, right = MASKS[case.mask]
    spec, extras = OPTIONS[case.options](AttentionSpec(case.head_dim**-0.5, left, right), q)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(tiling, "target", return_value=case.target))
        stack.enter_context(
            mock.patch.object(backend_launch, "launching", return_value=nullcontext())
        )
        stack.enter_context(mock.patch.object(triton.JITFunction, "run", run))
        if case.options in codegen_specialized.VARIANTS:
            stack.enter_context(codegen_specialized.chosen(case.options, case.head_dim))
            backend.forward(q, kv, kv, spec, extras)
            return launches
        if case.options == "tangents":
            backend.forward_tangents((q, kv, kv), (q, kv, kv), spec, extras)
            return launches
        o, lse, *_ = backend.forward(q, kv, kv, spec, extras)
        backend.backward(torch.empty_like(o), None, q, kv, kv, o, lse, spec, extras)
    return launches


def compile_launch(launch: Launch, target: str) -> tuple[Any, str]:
    """Triton's compiled kernel and what ``ptxas -v`` said of it (nothing for AMD)."""
    driver.set_active(NamedDevice(target))  # type: ignore[arg-type]
    # A kernel taken from Triton's cache on disk would come without the log.
    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        compiled: Any = launch.kernel.run(grid=(1,), warmup=True, **launch.arguments)
    log = _logs.setdefault(compiled.hash, printed.getvalue())
    return compiled, log


_logs: dict[str, str] = {}  # within a process Triton compiles each kernel once


@lru_cache(maxsize=1024)
def disassemble(cubin: bytes) -> machine_code.Code:
    """The machine code of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name]
        process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"nvdisasm: {process.stderr}")
    return machine_code.parse(process.stdout)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern!r} in the compiler's report:\n{text[-2000:]}")
    return int(found[1])


def describe(launch: Launch, target: str, head_dim: int) -> dict[str, Any]:
    """Compile one launch and read the machine code and the compiler's report."""
    compiled, log = compile_launch(launch, target)
    metadata = compiled.metadata
    row: dict[str, Any] = {
        "kernel": launch.kernel.__name__,
        **{name: launch.arguments.get(name) for name in ("BLOCK_M", "BLOCK_N")},
        "num_warps": metadata.num_warps,
        "num_stages": metadata.num_stages,
    }
    if "CONFIG" in launch.arguments:
        row |= codegen_specialized.shape(launch.arguments["CONFIG"])
    shared = {
        "shared_bytes": metadata.shared,
        "shared_limit": chips.SHARED_LIMIT[target],
    }
    unread = "blocks_per_sm limited_by instructions loop per_score products peak_share"
    nothing = dict.fromkeys(unread.split())
    if target not in chips.CHIPS:
        text = compiled.asm["amdgcn"]
        mfma = len(re.findall(r"^\s*v_mfma", text, flags=re.MULTILINE))
        return row | {
            "registers": _number(r"\.vgpr_count:\s+(\d+)", text),
            "spill_bytes": 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text),
            **shared,
            "tensor_core": {"mfma": mfma} if mfma else {},
            "serialized": None,
            **nothing,
        }
    code = disassemble(compiled.asm["cubin"])
    registers = _number(r"Used (\d+) registers", log)
    tensor_columns = getattr(metadata, "tmem_size", None) or 0
    resident = chips.residency(
        target, registers, metadata.shared, metadata.num_warps, tensor_columns
    )
    row |= {
        "registers": registers,
        "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        **shared,
        "tensor_core": machine_code.tensor_core_kinds(code.instructions),
        "serialized": "serialized" in log,
        **nothing,
        "blocks_per_sm": resident.blocks,
        "limited_by": resident.limit,
        "instructions": machine_code.size(code),
    }
    loop = machine_code.hot_loop(code)
    # Warp groups that do different work have loops of their own, which one block's count can't mix.
    if loop is None or "ttg.warp_specialize" in compiled.asm["ttgir"]:
        return row
    row["loop"] = machine_code.count_classes(loop)
    per_tcgen05 = machine_code.tcgen05_multiply_adds(compiled.asm["ttgir"])
    macs = machine_code.multiply_adds(loop, metadata.num_warps, per_tcgen05)
    fp32 = machine_code.fp32_work(loop)
    done = sum(macs.values()) or fp32.multiply_adds * chips.WARP * metadata.num_warps
    useful = 1.0
    if row["BLOCK_N"]:
        each = chips.WARP * metadata.num_warps / (row["BLOCK_M"] * row["BLOCK_N"])
        work = machine_code.count_work(loop).items()
        row["per_score"] = {name: round(count * each, 3) for name, count in work}
        row["products"] = round(done / (row["BLOCK_M"] * row["BLOCK_N"] * head_dim), 3)
        useful = min(1.0, PRODUCTS.get(row["kernel"], row["products"]) / row["products"])
    share = chips.peak_share(target, metadata.num_warps, row["loop"], macs, fp32)
    if share is not None:
        row["peak_share"] = {
            "of": "matrix" if macs else "fp32",
            "no_overlap": round(share.no_overlap * useful, 3),
            "full_overlap": round(share.full_overlap * useful, 3),
            "bound": share.bound,
        }
    return row


def run_cases(cases: list[Case]) -> list[dict[str, Any]]:
    """Every row of some cases."""
    return [
        case._asdict() | describe(launch, case.target, case.head_dim)
        for case in cases
        for launch in record_launches(case)
    ]


def _has_tangents(case: Case) -> bool:
    q = torch.empty(1, 1, 1, case.head_dim, dtype=DTYPES[case.dtype], device="meta")
    return backend.has_tangents(Problem(q, q, q, AttentionSpec(1.0), AttentionExtras()))


def matrix(args: argparse.Namespace) -> Iterator[Case]:
    """The cases that the command line asks for."""
    axes = (args.targets, args.dtypes, args.head_dims, args.masks, args.groups, OPTIONS)
    for case in itertools.starmap(Case, itertools.product(*axes)):
        if case.options in codegen_specialized.VARIANTS and not codegen_specialized.covers(*case):
            continue
        if args.options is not None:
            wanted = case.options in args.options
        else:
            wanted = args.full or case.options == "none"
            if case.mask == "causal" and case.head_dim in OPTIONS_HEAD_DIMS:
                wanted |= (case.target, case.dtype) == (OPTIONS_TARGET, OPTIONS_DTYPE)
                everywhere = case.options in ("packed", "intervals")
                wanted |= everywhere and case.dtype == OPTIONS_DTYPE
            wanted |= case.options in codegen_specialized.VARIANTS
            wanted |= case.options == "tangents" and case.mask == "causal"
        if wanted and (case.options != "tangents" or _has_tangents(case)):
            yield case


def write(path: Path, versions: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """``path``.json with one row a line, so that differences stay readable, and ``path``.md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    parts = [f'"{name}": {json.dumps(value)}' for name, value in versions.items()]
    text = ",\n".join([*parts, f'"rows": [\n  {lines}\n]'])
    path.with_suffix(".json").write_text("{" + text + "}\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(versions, rows), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Compile the matrix, say how far it is, write the ledger."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks codegen", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, help="folder for codegen.json and codegen.md")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--head-dims", nargs="+", type=int, default=list(HEAD_DIMS))
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    parser.add_argument(
        "--groups", nargs="+", type=int, default=[1], help="query heads per kv head"
    )
    parser.add_argument(
        "--options",
        nargs="+",
        choices=OPTIONS,
        help="these everywhere (default: none everywhere; tangents, causal; packed and intervals "
        "in bf16 at 64 and 128; each option on its own, and all of them, on sm_90 in bf16 at 64 "
        "and 128, causal)",
    )
    parser.add_argument("--full", action="store_true", help="every option everywhere")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    args = parser.parse_args(argv)
    if INTERPRETED:
        parser.error("the kernels are interpreted: unset TRITON_INTERPRET to compile them")

    # Masks and groups of one shape share kernels (delta has neither): one process compiles them.
    tasks: dict[tuple[str, ...], list[Case]] = {}
    for case in matrix(args):
        key = (case.target, case.dtype, str(case.head_dim), case.options)
        tasks.setdefault(key, []).append(case)
    if not tasks:
        parser.error("nothing to compile")
    results: list[dict[str, Any]] = []
    with ExitStack() as stack:
        run: Callable[..., Iterator[Any]] = map
        if args.jobs > 1:
            context = multiprocessing.get_context("spawn")
            run = stack.enter_context(ProcessPoolExecutor(args.jobs, context)).map
        finished = run(run_cases, tasks.values())
        for count, (task, rows) in enumerate(zip(tasks, finished, strict=True), start=1):
            results += rows
            print(f"{count}/{len(tasks)}", *task, flush=True)
    if args.out is not None:
        ptxas = {
            name: get_ptxas(int(TARGETS[name].arch)).version
            for name in args.targets
            if name in chips.CHIPS
        }
        write(args.out / "codegen", {"triton": triton.__version__, "ptxas": ptxas}, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
