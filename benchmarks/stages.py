"""A long measurement in stages: each in a process of its own and within its time.

A stage is a sequence of named items. Its process writes the stage's JSON anew after each of them,
by a rename, so that the file is whole at any moment. An item that raises is recorded with its
traceback and the next one goes on. If the process dies, or its CUDA context is lost, which every
later call would report again, a fresh process goes on behind the item that did it.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, is_dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from train.measure import machine

# What an item in progress may take beyond the end of its stage's time.
GRACE_SECONDS = 10.0
# Exit status of a process whose CUDA context is lost.
CONTEXT_LOST = 70
LOG_CHARACTERS = 4000

Result = dict[str, Any]
Item = tuple[str, Callable[[], Result]]


@dataclass(frozen=True)
class Context:
    """What a stage is told.

    Attributes:
        device: ``"cuda"``, or ``"cpu"`` in a rehearsal.
        out: folder of the results.
        deadline: of the stage, by ``time.monotonic()``, which all processes of a machine share.
    """

    device: str
    out: Path
    deadline: float = float("inf")

    @property
    def rehearsal(self) -> bool:
        """Whether it is about running through all of it, on problems of toy size."""
        return self.device == "cpu"

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Stage:
    """One stage; its functions are at the top of a module.

    Attributes:
        name: of its JSON and of its line.
        seconds: that it gets where the whole has its usual time.
        least: seconds below which it is not begun.
        items: names and functions; a function returns what is recorded. ``{"skipped": reason}`` is
            an item that can't be done here, and ``"error"`` in a result marks a measurement that
            was made and is wrong.
        line: says in a few words what the results of the items without an error are.
        page: lines of Markdown about the same results.
    """

    name: str
    seconds: float
    least: float
    items: Callable[[Context], Iterable[Item]]
    line: Callable[[dict[str, Result]], str]
    page: Callable[[dict[str, Result]], list[str]] | None = None


def run_stage(stage: Stage, context: Context, seconds: float) -> dict[str, Any]:
    """Run a stage for at most ``seconds`` and the grace; returns what its JSON holds.

    The JSON is ``<out>/<name>.json``: ``items`` by name, each with its ``seconds``; ``cut``, the
    item that the end of the time fell into; ``left``, those that were not begun; ``error``, what
    kept the stage from its first item.
    """
    path = context.out / f"{stage.name}.json"
    record = {"stage": stage.name, "box_seconds": seconds, "items": {}}
    save(path, record | {"running": None, "left": ["everything"]})
    began = time.monotonic()
    context = replace(context, deadline=began + seconds)
    # A server that has imported torch forks a process in no time. Should CUDA refuse to start in a
    # forked process, a spawned one is tried.
    methods = ["forkserver", "spawn"]
    with tempfile.NamedTemporaryFile("r", suffix=".log", errors="replace") as log:
        while methods:
            status = _in_process(methods[0], stage, context, path, log.name)
            record = json.loads(path.read_text(encoding="utf-8"))
            name, record["running"] = record["running"], None
            if status is None:
                record["cut"] = name
            elif name is not None:
                record["items"][name] = {"died": _ending(status)}
            elif status not in (0, CONTEXT_LOST):
                record["error"] = f"{_ending(status)} before or after its items"
                methods.pop(0)
            if status is None or failures(record):
                record["log"] = _tail(log.name)
            save(path, record)
            if not status or not record["left"] or context.seconds_left <= 0:
                break
    record["seconds"] = time.monotonic() - began
    save(path, record)
    path.with_suffix(".unfinished").unlink(missing_ok=True)
    return record


def _in_process(method: str, stage: Stage, context: Context, path: Path, log: str) -> int | None:
    """The exit status of a process that went through the items; None if it had to be ended."""
    starting: Any = multiprocessing.get_context(method)
    process = starting.Process(target=_go_through, args=(stage, context, path, log))
    process.start()
    try:
        process.join(max(0.0, context.seconds_left) + GRACE_SECONDS)
        return process.exitcode
    finally:
        end_group(process.pid)
        process.kill()
        process.join()


def end_group(pid: int) -> None:
    """Kill a process that leads a session, and all that it has started."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # ended, or not yet a leader


def _go_through(stage: Stage, context: Context, path: Path, log: str) -> None:
    """What the stage's process does."""
    os.setsid()
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    record = json.loads(path.read_text(encoding="utf-8"))
    record.pop("error", None)
    record.setdefault("environment", environment(context.device))
    items = dict(stage.items(context))
    todo = {name: work for name, work in items.items() if name not in record["items"]}
    record["left"] = list(todo)
    for name, work in todo.items():
        if context.seconds_left <= 0:
            break
        record["running"] = name
        record["left"].remove(name)
        save(path, record)
        began = time.monotonic()
        try:
            result = work()
        except Exception as error:
            result = {"error": _sentence(error), "traceback": traceback.format_exc()}
        record["items"][name] = result | {"seconds": time.monotonic() - began}
        record["running"] = None
        save(path, record)
        if "error" in result and not _context_lives(context.device):
            sys.stdout.flush()
            os._exit(CONTEXT_LOST)


def environment(device: str) -> dict[str, Any]:
    """The device and the versions, in every file of results."""
    found = machine(torch.device(device))
    found["triton"] = version("triton") if find_spec("triton") else None
    if device == "cuda":
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found |= measure.clocks() if shutil.which("nvidia-smi") else {}
    return found


def _context_lives(device: str) -> bool:
    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:  # a sticky error, such as an illegal access, comes back at every call
        return False
    return True


def save(path: Path, record: dict[str, Any]) -> None:
    """Write JSON so that a reader finds the old or the new content, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, indent=1, default=_plain) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def _sentence(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _ending(status: int) -> str:
    if status < 0:
        return f"the process was killed by {signal.Signals(-status).name}"
    return f"the process ended with status {status}"


def _tail(log: str) -> str:
    return Path(log).read_text(errors="replace")[-LOG_CHARACTERS:]


def good(record: dict[str, Any]) -> dict[str, Result]:
    """Results of the items that were done, and found no error."""
    bad = {"error", "died", "skipped"}
    return {name: result for name, result in record["items"].items() if not bad & result.keys()}


def failures(record: dict[str, Any]) -> list[str]:
    """What went wrong in a stage, a sentence each."""
    found = [record["error"]] if "error" in record else []
    for name, result in record["items"].items():
        message = result.get("error") or result.get("died")
        found += [f"{name}: {message}"] if message else []
    return found


def line(stage: Stage, record: dict[str, Any]) -> str:
    """The one line that a stage leaves."""
    results = good(record)
    parts = [stage.line(results) if results else "nothing measured"]
    failed = failures(record)
    if failed:
        parts.append(f"{len(failed)} FAILED, the first: {failed[0]}")
    skipped = {n: r["skipped"] for n, r in record["items"].items() if "skipped" in r}
    parts += [f"{name} skipped: {reason}" for name, reason in skipped.items()]
    if record.get("cut"):
        parts.append(f"cut in {record['cut']}")
    if record["left"]:
        parts.append(f"{len(record['left'])} not begun")
    return f"{stage.name}: {'; '.join(parts)}; {record['seconds']:.0f} s"
