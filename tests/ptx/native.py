"""Triton's own ``CudaDriver`` and C launcher over a libcuda that hands launches to the emulator.

    with native(90, folder) as device:
        flash_attention(q, k, v, backend="triton")

:mod:`tests.ptx.driver` plays the driver in Python. Here only the output of ptxas is replaced: the C
code that unpacks arguments and encodes tensor maps is Triton's, compiled and called, and what it
passes to ``cuLaunchKernelEx`` is read back parameter by parameter. Needs a C compiler. Triton links
its launcher against this libcuda and keeps it in its cache: the ``TRITON_CACHE_DIR`` must be new.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from tests.ptx.asynchronous import TensorMap
from tests.ptx.decode import Program
from tests.ptx.driver import SHARED_LIMIT, Device, emulated, expose
from tests.ptx.formats import UNSIGNED, EmulatorError
from tests.ptx.memory import Memory

STUB = Path(__file__).with_name("libcuda_stub.c")

# CUtensorMapDataType: bytes of an element.
_MAP_SIZES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 8, 9: 2, 10: 4, 11: 4, 12: 4}
_INTEGERS = {
    "64": ctypes.c_uint64,
    "32": ctypes.c_uint32,
    "16": ctypes.c_uint16,
    "8": ctypes.c_uint8,
}
_ON_LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 3)
_ON_MAP = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint,
    *[ctypes.c_void_p] * 4,
    ctypes.c_int,
)


class _Config(ctypes.Structure):
    """The head of CUlaunchConfig."""

    _fields_ = [
        (name, ctypes.c_uint)
        for name in ("x", "y", "z", "threads_x", "threads_y", "threads_z", "shared")
    ]


def compiler() -> str | None:
    """The C compiler that Triton would take, if there is one."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


class _Callbacks:
    """What the stub calls; an exception is kept until the launcher is back in Python."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._maps: dict[int, TensorMap] = {}
        self.memory = Memory()
        self.kernel = ""
        self.failure: Exception | None = None

    def on_launch(self, config: int, function: int, parameters: int) -> int:
        """``cuLaunchKernelEx``."""
        try:
            shape = _Config.from_address(config)
            program = self._device.program(ctypes.string_at(function).decode())
            threads = shape.threads_x * shape.threads_y * shape.threads_z
            if threads != program.threads or (shape.y, shape.z) != (1, 1):
                raise EmulatorError(
                    f"launched with {threads} threads on a grid of {(shape.x, shape.y, shape.z)}, "
                    f"compiled for {program.threads} threads and one dimension"
                )
            values = self._read(program, parameters)
            self._device.execute(program, shape.x, values, self.memory, self.kernel, shape.shared)
        except Exception as error:
            self.failure = error
            return 1
        return 0

    def on_map(
        self,
        where: int,
        dtype: int,
        rank: int,
        address: int,
        shape: int,
        strides: int,
        box: int,
        swizzle: int,
    ) -> int:
        """``cuTensorMapEncodeTiled``: the 128 bytes of the map begin with its number here."""
        try:
            size = _MAP_SIZES[dtype]
            number = len(self._maps) + 1
            self._maps[number] = TensorMap(
                address=address,
                dtype=UNSIGNED[size],
                shape=list((ctypes.c_uint64 * rank).from_address(shape)),
                strides=[size, *(ctypes.c_uint64 * (rank - 1)).from_address(strides)],
                box=list((ctypes.c_uint32 * rank).from_address(box)),
                swizzle=swizzle,
            )
            ctypes.c_uint64.from_address(where).value = number
        except Exception as error:
            self.failure = error
            return 1
        return 0

    def _read(self, program: Program, parameters: int) -> list[Any]:
        """The kernel's arguments from the launcher's array of pointers."""
        pointers = (ctypes.c_void_p * len(program.parameters)).from_address(parameters)
        values: list[Any] = []
        for (_, kind), pointer in zip(program.parameters, pointers, strict=True):
            if kind == "blob":
                values.append(self._maps[ctypes.c_uint64.from_address(pointer).value])
            elif kind in ("f64", "f32"):
                number = ctypes.c_double if kind == "f64" else ctypes.c_float
                values.append(number.from_address(pointer).value)
            else:
                values.append(_INTEGERS[kind[1:]].from_address(pointer).value)
        return values


class _Driver(nvidia.CudaDriver):
    """Triton's driver without torch.cuda, and with the tensors of a launch made known."""

    def __init__(self, device: Device, callbacks: _Callbacks) -> None:
        super().__init__()
        self.callbacks = callbacks
        real = self.launcher_cls
        self.launcher_cls = lambda src, metadata: self._wrapped(real(src, metadata), metadata)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda index=0: (device.arch // 10, device.arch % 10)

    @staticmethod
    def _wrapped(launcher: Callable[..., None], metadata: Any) -> Callable[..., None]:
        def call(*args: Any) -> None:
            # Triton keeps a launcher longer than one native(): ask who is active now.
            callbacks: _Callbacks = driver.active.callbacks
            callbacks.memory, callbacks.kernel = Memory(), metadata.name
            callbacks.failure = None
            _expose(callbacks.memory, args)
            try:
                launcher(*args)
            finally:
                if callbacks.failure is not None:
                    raise callbacks.failure

        return call


def _expose(memory: Memory, value: Any) -> None:
    """Every tensor among the arguments, in tuples and descriptors too."""
    if isinstance(value, torch.Tensor):
        expose(memory, value)
    elif isinstance(value, tuple | list):
        for each in value:
            _expose(memory, each)
    elif hasattr(value, "base"):
        _expose(memory, value.base)


def _library(folder: Path) -> ctypes.CDLL:
    """Compile the stub; Triton links against the libcuda.so.1 in ``TRITON_LIBCUDA_PATH``."""
    path = folder / "libcuda.so.1"
    if not path.exists():
        flags = ["-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([compiler() or "gcc", *flags, "-o", str(path), str(STUB)], check=True)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


@contextlib.contextmanager
def native(arch: int, folder: Path, **options: Any) -> Iterator[Device]:
    """Like :func:`tests.ptx.driver.emulated`, through Triton's own driver.

    Args:
        arch: 80 or 90.
        folder: where the libcuda is built, outside of the repository.
        options: those of :class:`tests.ptx.driver.Device`.
    """
    library = _library(folder)
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(emulated(arch, **options))
        environment = {"TRITON_LIBCUDA_PATH": str(folder)}
        stack.enter_context(mock.patch.dict(os.environ, environment))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", return_value=0))
        callbacks = _Callbacks(device)
        # Kept in variables: ctypes frees a callback that Python no longer refers to.
        on_launch, on_map = _ON_LAUNCH(callbacks.on_launch), _ON_MAP(callbacks.on_map)
        library.emulator_connect(arch, SHARED_LIMIT[arch], on_launch, on_map)
        driver.set_active(_Driver(device, callbacks))
        yield device
