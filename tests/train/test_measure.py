import contextlib
import multiprocessing
import os
import signal
import time

import pytest
import torch

from train import measure
from train.measure import (
    PeakMemory,
    in_fresh_process,
    interleaved,
)

CPU = torch.device("cpu")
MIB = 2**20


def test_a_fresh_process_is_another_one_and_passes_errors_on() -> None:
    assert in_fresh_process(os.getpid) != os.getpid()
    with pytest.raises(ZeroDivisionError):
        in_fresh_process(divmod, 1, 0)


def swallow_what_ends_it() -> None:
    os.kill(os.getppid(), signal.SIGINT)
    for _ in range(2):
        with contextlib.suppress(SystemExit):
            time.sleep(60)


def test_ctrl_c_ends_a_process_that_does_not_obey(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training proof hung where a SystemExit was swallowed while an arm trained."""
    monkeypatch.setattr(measure, "GRACE_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        in_fresh_process(swallow_what_ends_it)
    assert time.monotonic() - start < 50
    assert not multiprocessing.active_children()


def peak_of_64_mib_after_200() -> tuple[int, int]:
    torch.ones(200 * MIB // 4)
    memory = PeakMemory(CPU)
    torch.ones(64 * MIB // 4)
    return memory.extra(), memory.peak()


def test_peak_memory_sees_what_is_freed_again_and_forgets_earlier_peaks() -> None:
    # In a process of its own: what other tests left behind may be freed meanwhile.
    extra, peak = in_fresh_process(peak_of_64_mib_after_200)
    assert 60 * MIB < extra < 100 * MIB
    assert peak > extra


def test_rounds_are_interleaved_and_the_first_is_not_timed() -> None:
    calls = []

    def slow_at_first() -> None:
        time.sleep(0.2 if "a" not in calls else 0.0)
        calls.append("a")

    seconds = interleaved({"a": slow_at_first, "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert seconds["a"] < 0.1


def test_a_stopwatch_is_of_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not be the current one."""
    recorded = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str = "the current device's") -> None:
            recorded.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"{device}'s")
    measure.Stopwatch(torch.device("cuda", 1)).now()
    assert recorded == ["cuda:1's"]
