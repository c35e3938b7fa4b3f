"""What a stage leaves behind when it ends, is cut, raises, dies or never begins."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, stages
from benchmarks.stages import Context, Item, Result, Stage, line, run_stage
from tests.processes import PRELOADED


@pytest.fixture(scope="module", autouse=True)
def preloaded() -> None:
    multiprocessing.set_forkserver_preload([*PRELOADED, "benchmarks.stages"])


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context("cpu", tmp_path)


def names(results: dict[str, Result]) -> str:
    return ", ".join(results)


def this_process() -> Result:
    return {"pid": os.getpid()}


def wrong() -> Result:
    raise ValueError("a bad\nexample")


def crash() -> Result:
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def items_that_fail(context: Context) -> Iterator[Item]:
    yield "first", this_process
    yield "wrong", wrong
    yield "off", lambda: {"error": "twice its bound", "share": 2.0}
    yield "elsewhere", lambda: {"skipped": "no such tool"}
    yield "crash", crash
    yield "last", this_process


def test_what_fails_is_recorded_and_the_rest_goes_on(context: Context) -> None:
    stage = Stage("failing", 60, 1, items_that_fail, names)
    record = run_stage(stage, context, 60)
    assert record == json.loads((context.out / "failing.json").read_text())
    items = record["items"]
    assert list(items) == ["first", "wrong", "off", "elsewhere", "crash", "last"]
    assert items["wrong"]["error"] == "ValueError: a bad"
    assert "in wrong\n" in items["wrong"]["traceback"]
    assert items["off"]["share"] == 2.0
    assert items["crash"] == {"died": "the process was killed by SIGSEGV"}
    assert "Segmentation fault" in record["log"]
    assert items["first"]["pid"] != items["last"]["pid"]
    assert record["environment"]["torch"] == torch.__version__
    text = line(stage, record)
    assert text.startswith("failing: first, last; 3 FAILED, the first: wrong: ValueError: a bad; ")
    assert "elsewhere skipped: no such tool" in text
    assert [path.name for path in context.out.iterdir()] == ["failing.json"]


def endless(context: Context) -> Result:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (context.out / "child").write_text(str(child.pid))
    time.sleep(600)
    return {}


def items_without_end(context: Context) -> Iterator[Item]:
    yield "first", this_process
    yield "endless", lambda: endless(context)
    yield "never", this_process


def test_a_stage_that_is_cut_keeps_what_it_has(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "GRACE_SECONDS", 1.0)
    stage = Stage("endless", 60, 1, items_without_end, names)
    began = time.monotonic()
    record = run_stage(stage, context, 5)
    assert time.monotonic() - began < 30
    assert list(record["items"]) == ["first"]
    assert (record["cut"], record["left"]) == ("endless", ["never"])
    assert "first; cut in endless; 1 not begun; " in line(stage, record)
    # What it had started is ended with it: gone, or a zombie until init has reaped it.
    status = Path("/proc", (context.out / "child").read_text(), "stat")
    deadline = time.monotonic() + 10
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def slow_items(context: Context) -> Iterator[Item]:
    for index in range(1000):
        yield f"{index}", lambda: time.sleep(0.05) or {}


def test_no_item_begins_after_the_deadline(context: Context) -> None:
    record = run_stage(Stage("slow", 60, 1, slow_items, names), context, 2)
    assert "cut" not in record
    assert len(record["items"]) + len(record["left"]) == 1000
    assert len(record["items"]) < 50
    assert record["seconds"] < 2 + stages.GRACE_SECONDS


def items_of_a_lost_context(context: Context) -> Iterator[Item]:
    stages._context_lives = lambda device: False
    return items_that_fail(context)


def test_a_lost_cuda_context_is_left_for_a_fresh_process(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run_stage(Stage("lost", 60, 1, items_of_a_lost_context, names), context, 60)
    assert record["left"] == []
    assert "error" not in record
    assert record["items"]["last"]["pid"] != record["items"]["first"]["pid"]

    def illegal() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", illegal)
    assert not stages._context_lives("cuda")
    assert stages._context_lives("cpu")


def items_at_the_second_try(context: Context) -> Iterator[Item]:
    if not (context.out / "tried").exists():
        (context.out / "tried").touch()
        raise RuntimeError("no CUDA in a forked process")
    yield "first", this_process


def no_items(context: Context) -> Iterator[Item]:
    raise RuntimeError("no such suite")


def test_a_stage_that_does_not_begin_is_spawned_once_more(context: Context) -> None:
    record = run_stage(Stage("late", 60, 1, items_at_the_second_try, names), context, 60)
    assert list(record["items"]) == ["first"]
    assert "error" not in record
    record = run_stage(Stage("none", 60, 1, no_items, names), context, 60)
    assert record["error"] == "the process ended with status 1 before or after its items"
    assert "RuntimeError: no such suite" in record["log"]


def two_items(context: Context) -> Iterator[Item]:
    yield "first", this_process
    yield "second", this_process


def page(results: dict[str, Result]) -> list[str]:
    return ["## Table", *results]


def no_line(results: dict[str, Result]) -> str:
    return results["absent"]["line"]


def test_stages_share_the_time_and_failures_are_the_status(
    context: Context, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = []
    run_one = gpu.run_stage

    def run(stage: Stage, context: Context, seconds: float) -> Any:
        boxes.append(round(seconds))
        return run_one(stage, context, seconds)

    monkeypatch.setattr(gpu, "run_stage", run)
    good = Stage("good", 20, 1, two_items, names, page)
    bad = Stage("bad", 20, 1, items_that_fail, names)
    late = Stage("late", 20, 1000, two_items, names)
    assert gpu.run([good, late], context, 120) == 0
    assert boxes == [60]  # 120 s for 40 s: all boxes are stretched
    mute = Stage("mute", 20, 1, two_items, no_line)
    assert gpu.run([mute, good], context, 60) == 1
    del boxes[1:]
    assert gpu.run([bad, good], context, 40) == 1
    assert boxes[1] == 20
    assert boxes[2] <= 20  # or what the first and the grace have left
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("good: first, second; ")
    assert lines[1].startswith("late: skipped, ")
    assert lines[1].endswith(" s are left and it takes 1000")
    assert "mute: no line, KeyError: 'absent'" in lines
    assert any("bad: crash: the process was killed by SIGSEGV" in text for text in lines)
    text = (context.out / "gpu.md").read_text()
    assert "- good: first, second; " in text
    assert "\n## Table\nfirst\nsecond" in text
