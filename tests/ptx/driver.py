"""Triton's driver, played by the emulator: ``kernel[grid](...)`` runs compiled PTX on CPU tensors.

    with emulated(80) as device:
        flash_attention(q, k, v, backend="triton")

Everything up to the launch is Triton's own: binding, specialisation, the cache key, the compiler.
The "binary" that it stores is the PTX; ptxas, which takes most of the time, is left out. So the
process needs a ``TRITON_CACHE_DIR`` of its own, and must not run under ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from tests.ptx.asynchronous import TensorMap
from tests.ptx.decode import Program
from tests.ptx.formats import UNSIGNED, EmulatorError
from tests.ptx.machine import launch
from tests.ptx.memory import Memory
from tests.ptx.program import parse

# Dynamic shared memory that a CTA may have (CUDA C++ programming guide, compute capabilities).
SHARED_LIMIT = {80: 166912, 90: 232448}

_parse = lru_cache(maxsize=None)(parse)


@dataclass
class Launch:
    """What one launch was.

    Attributes:
        kernel: its name.
        grid: number of CTAs.
        executed: instructions that warps executed.
        program: what ran; ``program.counts`` has its opcodes.
    """

    kernel: str
    grid: int
    executed: int
    program: Program = field(repr=False)


@dataclass(eq=False)
class Device:
    """The driver that Triton asks, and the utilities it loads binaries with.

    Attributes:
        arch: 80 or 90.
        late: whether asynchronous operations take effect at their waits, or when issued.
        races: whether unordered accesses to shared memory are errors.
        unfenced: kernels in which a missing ``fence.proxy.async`` is none.
        barrier_fences: whether tensor copies of the warp-specialised kernels need one after an
            mbarrier's initialisation; Triton 3.6 writes none into its own.
        seed: of the order in which warps run.
        edit: changes the PTX before it is run: a planted fault.
        at_once: CTAs side by side.
        launches: one entry for each launch.
    """

    arch: int
    late: bool = True
    races: bool = True
    unfenced: frozenset[str] = frozenset()
    barrier_fences: bool = False
    seed: int = 0
    edit: Callable[[str], str] | None = None
    at_once: int = 16
    launches: list[Launch] = field(default_factory=list)

    @property
    def utils(self) -> Device:
        """Triton's name for the functions further down."""
        return self

    def program(self, ptx: str) -> Program:
        """The program of a text, after :attr:`edit`."""
        return _parse(self.edit(ptx) if self.edit else ptx)

    def execute(
        self, program: Program, grid: int, values: list[Any], memory: Memory, name: str, shared: int
    ) -> None:
        """Run one launch."""
        executed = launch(
            program,
            grid,
            values,
            memory,
            num_warps=program.threads // 32,
            shared=shared,
            seed=self.seed,
            late=self.late,
            races=self.races,
            fences=name not in self.unfenced,
            barrier_fences=self.barrier_fences and name.startswith("hopper_"),
            at_once=self.at_once,
        )
        self.launches.append(Launch(name, grid, executed, program))

    # What triton.runtime.driver.active is asked.

    def get_current_device(self) -> str:
        """A key of Triton's caches in this process: each target has its own."""
        return f"emulated sm_{self.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        return _Launcher(src, metadata)

    # What its utilities are asked.

    def get_device_properties(self, device: str) -> dict[str, int]:
        limit = SHARED_LIMIT[self.arch]
        return {"max_shared_mem": limit, "multiprocessor_count": 108, "warpSize": 32}

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: str
    ) -> tuple[Any, Any, int, int, int]:
        """(module, function, registers, spills, most threads)."""
        return name, binary.decode(), 0, 0, 1024


class _Launcher:
    """Calls the active device: Triton keeps a launcher longer than one :func:`emulated`."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self._metadata, self._signature = metadata, dict(src.signature)

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        function: str,
        kernel_metadata: Any,
        launch_metadata: Any,
        enter_hook: Any,
        exit_hook: Any,
        *args: Any,
    ) -> None:
        metadata = self._metadata
        if (y, z) != (1, 1):
            raise EmulatorError(f"a grid of one dimension is expected, got {(x, y, z)}")
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise EmulatorError("a kernel that wants scratch memory")
        memory = Memory()
        maps = iter(getattr(metadata, "tensordesc_meta", None) or ())
        values: list[Any] = []
        for kind, value in zip(self._signature.values(), args, strict=True):
            _flatten(kind, value, maps, memory, values)
        device: Device = driver.active
        program = device.program(function)
        values += [0] * (len(program.parameters) - len(values))  # Triton's scratch pointers
        device.execute(program, x, values, memory, metadata.name, metadata.shared)


def _flatten(
    kind: Any, value: Any, maps: Iterator[dict[str, Any]], memory: Memory, values: list[Any]
) -> None:
    """One argument as the kernel's parameters: tuples by element, nothing for constants."""
    if isinstance(kind, tuple):
        for each, element in zip(kind, value, strict=True):
            _flatten(each, element, maps, memory, values)
    elif kind == "constexpr":
        return
    elif kind.startswith("tensordesc"):
        expose(memory, value.base)
        values.append(_tensor_map(value, next(maps)))
        values.extend([*value.shape, *value.strides])
    elif isinstance(value, torch.Tensor):
        expose(memory, value)
        values.append(value.data_ptr())
    else:
        values.append(value)


def _tensor_map(descriptor: Any, meta: dict[str, Any]) -> TensorMap:
    """What Triton's launcher encodes from a ``TensorDescriptor`` and the kernel's metadata."""
    size = meta["elem_size"]
    return TensorMap(
        address=descriptor.base.data_ptr(),
        dtype=UNSIGNED[size],
        shape=list(descriptor.shape)[::-1],
        strides=[stride * size for stride in descriptor.strides][::-1],
        box=list(meta["block_size"])[::-1],
        swizzle=meta["swizzle"],
    )


def expose(memory: Memory, tensor: torch.Tensor) -> None:
    """Let a kernel touch the elements of a tensor, and not what lies between them."""
    storage, size = tensor.untyped_storage(), tensor.element_size()
    count = storage.nbytes() // size
    if count == 0:
        return
    valid = torch.zeros(count, dtype=torch.bool)
    if tensor.numel():
        valid.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    valid_bytes = np.zeros(storage.nbytes(), np.bool_)
    valid_bytes[: count * size] = np.repeat(valid.numpy(), size)
    memory.add(storage.data_ptr(), storage.nbytes(), valid_bytes)


@contextlib.contextmanager
def emulated(arch: int, **options: Any) -> Iterator[Device]:
    """Triton and flashlayer's backend on an emulated chip, for tensors on the CPU.

    Args:
        arch: 80 or 90.
        options: those of :class:`Device`.
    """
    from flashlayer.backends import triton as backend
    from flashlayer.backends.triton import launch as launches

    device = Device(arch, **options)
    patches = (
        (CUDABackend, "make_cubin", lambda self, src, metadata, opt, capability: src.encode()),
        (backend, "refuses", lambda problem: None),
        (launches, "launching", lambda q: contextlib.nullcontext()),
        (torch.cuda, "get_device_capability", lambda device=None: (arch // 10, arch % 10)),
        (torch.version, "hip", None),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        before = driver._active
        driver.set_active(device)
        stack.callback(driver.set_active, before)
        yield device
