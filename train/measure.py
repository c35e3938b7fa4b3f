"""Time and memory of a process, for training and for benchmarks.

Needs torch and flashlayer only, so that a fresh process starts fast and carries nothing else.
"""

import os
import platform
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

import flashlayer

Result = TypeVar("Result")

# Seconds that a terminated process has to close its files.
GRACE_SECONDS = 10.0


def in_fresh_process(function: Callable[..., Result], *args: Any) -> Result:
    """``function(*args)`` in a new interpreter, free of any earlier run's memory and threads."""
    with ProcessPoolExecutor(
        max_workers=1,
        mp_context=get_context("spawn"),
        initializer=_ignore_interrupts,
    ) as pool:
        try:
            return pool.submit(function, *args).result()
        except KeyboardInterrupt:
            for child in active_children():
                child.terminate()
                # The function may catch the SystemExit that SIGTERM raises.
                child.join(GRACE_SECONDS)
                if child.is_alive():
                    child.kill()
            raise


def _ignore_interrupts() -> None:
    """Ignore Ctrl-C, which a terminal sends to every process: the parent ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def machine(device: torch.device) -> dict[str, Any]:
    """What a measurement was made on: the device and the versions."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "flashlayer": flashlayer.__version__,
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU ({names[0] if names else platform.processor() or platform.machine()})"


class PeakMemory:
    """Highest memory use since construction, in bytes.

    On CUDA what the tensors of this process hold; on the CPU the process's resident memory,
    libraries included.
    """

    def __init__(self, device: torch.device) -> None:
        """Forget earlier peaks and note the level now."""
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            import psutil

            _reset_resident_peak()
            self.before = psutil.Process().memory_info().rss

    def peak(self) -> int:
        """The highest level so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _resident_peak()

    def extra(self) -> int:
        """How far the highest level is above the level at construction."""
        return max(0, self.peak() - self.before)


def _reset_resident_peak() -> None:
    """Reset the kernel's high-water mark; possible on Linux only."""
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def _resident_peak() -> int:
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    # Kibibytes everywhere but on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Seconds between two points in the device's own stream of work."""

    def __init__(self, device: torch.device) -> None:
        """Time work on ``device``, which need not be the current one."""
        self.device, self.on_cuda = device, device.type == "cuda"

    def now(self) -> Any:
        """A moment, to be given to :meth:`seconds`."""
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: Any, stop: Any) -> float:
        """The time from one to the other; waits for the device."""
        if not self.on_cuda:
            return stop - start
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3


class Yardstick:
    """A large matrix product, timed repeatedly: the speed that the device can reach."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make the factor, from a generator of its own, and multiply once to warm up."""
        self.size = 8192 if device.type == "cuda" else 1024
        generator = torch.Generator().manual_seed(0)
        self.factor = torch.randn(self.size, self.size, generator=generator).to(device, dtype)
        self.watch, self.taken = Stopwatch(device), []
        torch.mm(self.factor, self.factor)

    def sample(self) -> None:
        """Time one product."""
        start = self.watch.now()
        torch.mm(self.factor, self.factor)
        self.taken.append(self.watch.seconds(start, self.watch.now()))

    def typical(self) -> float:
        """FLOP/s, of the median time."""
        return 2 * self.size**3 / statistics.median(self.taken)

    def peak(self) -> float:
        """FLOP/s, of the shortest time."""
        return 2 * self.size**3 / min(self.taken)


def interleaved(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of every step over ``rounds`` rounds of one run each, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for timed in [False] + [True] * rounds:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if timed:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
