"""Runs one case on the emulator and judges it by the project's accuracy rule."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashlayer import AuxOutput, AuxRequest, flash_attention, flash_attention_varlen
from flashlayer.backends import split_keys
from flashlayer.kernels import tiles
from flashlayer.testing import accuracy
from tests import tangents
from tests.ptx.cases import Case
from tests.ptx.driver import Device, emulated
from tests.ptx.formats import EmulatorError, Race

Results = dict[str, Tensor]
Run = tuple[bool, int]
"""(late, seed) of one execution."""


@dataclass
class Verdict:
    """How a case came out.

    Attributes:
        case: its name.
        runs: how many executions, each with asynchronous operations late or early, and a seed.
        passed: whether every run ended, kept the rule and gave the same bits.
        message: the first error.
        unfenced: for each kernel that multiplies what no ``fence.proxy.async`` covers, the error;
            found only with ``without_fences``.
        errors: for each tensor, its largest error over its bound.
        kernels: for each kernel that ran, its opcodes and how many of them are in its text.
        executed: instructions that warps executed.
        seconds: CPU time.
    """

    case: str
    runs: int = 1
    passed: bool = True
    message: str = ""
    unfenced: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, dict[str, int]] = field(default_factory=dict)
    executed: int = 0
    seconds: float = 0.0


def judge(
    case: Case,
    arch: int,
    runs: tuple[Run, ...] = ((True, 0),),
    *,
    edit: Callable[[str], str] | None = None,
    without_fences: bool = False,
    open_device: Callable[..., Any] = emulated,
) -> Verdict:
    """Run a case once for each of ``runs``.

    Args:
        case: what is computed.
        arch: 80 or 90.
        runs: the first is judged, the others must give the same bits.
        edit: changes the PTX first: a planted fault.
        without_fences: where a fence is missing, go on and judge the values all the same.
        open_device: :func:`tests.ptx.driver.emulated`, or another way to launch.
    """
    verdict, start = Verdict(case.name, len(runs)), time.process_time()
    first: Results | None = None
    for late, seed in runs:
        options: dict[str, Any] = {"late": late, "seed": seed, "edit": edit}
        options["barrier_fences"] = bool(case.specialized or case.specialized_backward)
        try:
            results = None
            while results is None:
                options["unfenced"] = frozenset(verdict.unfenced)
                try:
                    results = _execute(case, arch, verdict, open_device, options)
                except Race as error:
                    kernel, _, what = str(error).partition(": ")
                    if not (without_fences and "without fence.proxy.async" in what):
                        raise
                    verdict.unfenced[kernel] = what
        except (AssertionError, EmulatorError) as error:
            verdict.passed, verdict.message = False, f"{'late' if late else 'early'}: {error}"
            break
        first = first or results
        differing = [n for n, x in results.items() if not torch.equal(x, first[n])]
        if differing:
            verdict.passed = False
            verdict.message = f"late={late}, seed={seed}: other bits in {differing}"
            break
    verdict.seconds = time.process_time() - start
    return verdict


def _execute(
    case: Case,
    arch: int,
    verdict: Verdict,
    open_device: Callable[..., Any],
    options: dict[str, Any],
) -> Results:
    """One run, held against standard attention; its errors go into ``verdict``."""
    q, k, v, arguments = case.draw()
    with contextlib.ExitStack() as stack:
        device: Device = stack.enter_context(open_device(arch, **options))
        stack.enter_context(_recorded(verdict))
        if case.tf32:
            stack.enter_context(_tf32_allowed())
        stack.enter_context(_tiles(case))
        if case.splits:  # as on a GPU
            splits = mock.patch.object(split_keys, "num_splits", return_value=case.splits)
            stack.enter_context(splits)
        if case.auxiliary:
            results = _auxiliary(case, q, k, v, arguments)
        elif case.tangents:
            directions = [torch.randn_like(x) for x in (q, k, v)]
            results = tangents.check((q, k, v), directions, **arguments)
        else:
            arguments["gradients"] = case.gradients
            results = accuracy.assert_attention_close("triton", q, k, v, **arguments)
    for launch in device.launches:
        verdict.kernels[launch.kernel] = dict(launch.program.counts)
        verdict.executed += launch.executed
    return results


def _auxiliary(case: Case, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Results:
    """The numbers from inside the softmax."""
    attend = flash_attention_varlen if "cu_seqlens_q" in options else flash_attention

    def numbers(backend: str, tensors: Sequence[Tensor], of: dict[str, Any]) -> AuxOutput:
        return attend(*tensors, return_aux=AuxRequest(True, True, True), backend=backend, **of)[1]

    found = numbers("triton", (q, k, v), options)
    with _TF32Products() if case.tf32 else contextlib.nullcontext():
        same = numbers("standard", (q, k, v), options)
    wide = {n: x.double() if _is_float(n, x) else x for n, x in options.items()}
    reference = numbers("standard", [x.double() for x in (q, k, v)], wide)
    for name, *results in zip(found._fields, found, same, reference, strict=True):
        # An entropy of 0 is a difference of two logarithms.
        noise = torch.finfo(results[0].dtype).eps if name == "entropy" else 0.0
        accuracy.assert_accurate(name, *results, accuracy.FACTORS["lse"], noise)
    return found._asdict()


def _is_float(name: str, option: Any) -> bool:
    return isinstance(option, Tensor) and option.is_floating_point() and name != "alibi_slopes"


@contextlib.contextmanager
def _recorded(verdict: Verdict) -> Iterator[None]:
    """Note error over bound of every tensor that is judged."""
    judge_tensor = accuracy.assert_accurate

    def record(
        name: str, actual: Tensor, same: Tensor, reference: Tensor, factor: float, noise: float = 0
    ) -> None:
        judge_tensor(name, actual, same, reference, factor, noise)
        ratio = accuracy.compare(actual, same, reference, factor, noise).ratio
        verdict.errors[name] = max(ratio, verdict.errors.get(name, 0.0))

    with mock.patch.object(accuracy, "assert_accurate", record):
        yield


def _tiles(case: Case) -> Any:
    """The tile table, with what a case changes in it."""
    look_up = tiles.tile_config

    def changed(kernel: str, target: str, dtype: str, head_dim: int, mask: str) -> Any:
        config = look_up(kernel, target, dtype, head_dim, mask)
        wanted = case.specialized
        offered = tiles.specialized_candidates(kernel, head_dim)
        if kernel != "forward":
            stages = min(case.specialized_backward, max(each.num_stages for each in offered))
            wanted = (stages, False) if stages else None
        if wanted:
            (config,) = (each for each in offered if (each.num_stages, each.takes_turns) == wanted)
        descriptors = case.descriptors or config.descriptors
        return dataclasses.replace(
            config, descriptors=descriptors, heaviest_first=case.heaviest_first
        )

    return mock.patch.object(tiles, "tile_config", changed)


@contextlib.contextmanager
def _tf32_allowed() -> Iterator[None]:
    """TF32 in the kernels, and in the standard attention that they are measured by."""

    def in_tf32(run: Callable[..., Results]) -> Callable[..., Results]:
        def run_in_tf32(attention: Any, *args: Any, **options: Any) -> Results:
            with _TF32Products() if attention == "standard" else contextlib.nullcontext():
                return run(attention, *args, **options)

        return run_in_tf32

    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with (
            mock.patch.object(accuracy, "run", in_tf32(accuracy.run)),
            mock.patch.object(tangents, "push", in_tf32(tangents.push)),
        ):
            yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


class _TF32Products(TorchDispatchMode):
    """fp32 matrix products whose operands lose their low 13 bits, as in a tensor core's TF32.

    A CPU has no TF32: without this, the formula's own error would be that of fp32. The bits are cut
    off and not rounded because Triton emits no ``cvt.rna``: mma and wgmma ignore them (9.7.14.5.6).
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            args = tuple(self._cut(x) for x in args)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _cut(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return x
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
