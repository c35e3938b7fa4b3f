"""A run that is killed again and again, each life in a process of its own."""

from __future__ import annotations

import csv
import functools
import io
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import torch
from torch import Tensor

from train import cli
from train.lit import GPTModule
from train.model import CausalSelfAttention
from train.running.metrics import MetricsFile

ROOT = Path(__file__).parents[3]
TIME_LIMIT = 300.0

# A server that has imported everything once: a life begins in milliseconds, not seconds.
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.train.running.lives"])


def live(
    arguments: list[str], where: str = "", count: int = 0, victim: str = ""
) -> tuple[int, str]:
    """Run ``python -m train`` with ``arguments``; SIGKILL at the ``count``-th passage of ``where``.

    Args:
        arguments: of the command.
        where: a key of ``EVENTS``; nowhere if empty.
        count: passages of it, from 1.
        victim: with several ranks, the one that this happens to; ``parent`` is their parent,
            killed when rank 0 comes there.

    Returns:
        The exit status (negative: the signal that ended it), and all that was printed.
    """
    output = Path("output.txt")
    output.write_text("")
    process = CONTEXT.Process(target=_life, args=(arguments, where, count, victim, Path.cwd()))
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)):  # for the server, at its first use
        process.start()
    process.join(TIME_LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(output.read_text())
    assert process.exitcode is not None
    return process.exitcode, output.read_text()


def _life(arguments: list[str], where: str, count: int, victim: str, folder: Path) -> None:
    _settle(folder)
    if where and not victim:
        EVENTS[where](count)
    rank = functools.partial(_rank, where, count, victim, folder)
    with (
        mock.patch("train.cli.fit_rank", rank if victim else cli.fit_rank),
        mock.patch("train.running.ranks.multiprocessing.get_context", return_value=CONTEXT),
        mock.patch("train.running.ranks.GRACE_SECONDS", 1.0),
    ):
        status = cli.main(arguments)
    sys.stdout.flush()
    os._exit(status)


def _rank(where: str, count: int, victim: str, folder: Path, *arguments: Any) -> None:
    """What a rank of a run with a victim does."""
    _settle(folder)
    if where and os.environ["RANK"] == victim.replace("parent", "0"):
        if victim == "parent":
            mock.patch(f"{__name__}._die", functools.partial(_kill, _parent())).start()
        EVENTS[where](count)
    cli.fit_rank(*arguments)


def _settle(folder: Path) -> None:
    """Be where the test is, print to its file, use no more than one core."""
    os.chdir(folder)
    if os.environ.get("RANK", "0") == "0":
        sys.stdout = open("output.txt", "a", buffering=1)  # noqa: SIM115
    sys.stderr = open("output.txt", "a", buffering=1)  # noqa: SIM115
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = folder / "datasets"


def _die() -> None:
    _kill(os.getpid())


def _parent() -> int:
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    return parent.pid


def _kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    time.sleep(TIME_LIMIT)  # not a step further


def _at(
    target: Any,
    name: str,
    count: int,
    *,
    after: bool = False,
    act: Callable[[], object] | None = None,
) -> None:
    """Die, or ``act``, before or after the ``count``-th call of a method."""
    method, calls = getattr(target, name), 0

    @functools.wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and not after:
            (act or _die)()
        result = method(*args, **options)
        if calls == count and after:
            (act or _die)()
        return result

    mock.patch.object(target, name, call).start()


def _in_a_write(count: int) -> None:
    """Die when half of the ``count``-th checkpoint is on the disk."""
    save, calls = torch.save, 0

    def half(checkpoint: Any, file: Any) -> None:
        nonlocal calls
        calls += 1
        if calls < count:
            return save(checkpoint, file)
        whole = io.BytesIO()
        save(checkpoint, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        return _die()

    mock.patch("torch.save", half).start()


def _nan_in(layer: type[torch.nn.Module]) -> None:
    """From here on, one number that a layer puts out is none."""
    forward = layer.forward

    def spoil(self: torch.nn.Module, x: Tensor) -> Tensor:
        output = forward(self, x).clone()
        output[0, -1, 0] = float("nan")
        return output

    mock.patch.object(layer, "forward", spoil).start()


def _disk_full(size: int) -> None:
    """No file may grow past ``size`` bytes from here on: the system refuses, nobody pretends."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _no_room_for_a_write(count: int) -> None:
    """The disk is full when half of the ``count``-th checkpoint is on it."""
    save, calls = torch.save, 0

    def late(checkpoint: Any, file: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            whole = io.BytesIO()
            save(checkpoint, whole)
            _disk_full(whole.tell() // 2)
        save(checkpoint, file)

    mock.patch("torch.save", late).start()


def _no_room_for_a_row(count: int) -> None:
    """The disk is full when half of the ``count``-th row of the metrics is on it."""
    lines, calls = MetricsFile._lines, 0

    def late(self: MetricsFile, rows: list[dict]) -> str:
        nonlocal calls
        calls += 1
        text = lines(self, rows)
        if calls == count and rows:
            _disk_full(self.path.stat().st_size + len(text) // 2)
        return text

    mock.patch.object(MetricsFile, "_lines", late).start()


def _in_a_row(count: int) -> None:
    """Die when half of the ``count``-th row of the metrics is on the disk."""
    lines, calls = MetricsFile._lines, 0

    def half(self: MetricsFile, rows: list[dict]) -> str:
        nonlocal calls
        calls += 1
        text = lines(self, rows)
        if calls == count and rows:
            with self.path.open("a", newline="") as file:
                file.write(text[: len(text) // 2])
            _die()
        return text

    mock.patch.object(MetricsFile, "_lines", half).start()


DEATHS = {
    "before a batch": lambda count: _at(GPTModule, "on_train_batch_start", count),
    "in a batch": lambda count: _at(GPTModule, "training_step", count, after=True),
    "after an update": lambda count: _at(torch.optim.AdamW, "step", count, after=True),
    "in a validation": lambda count: _at(GPTModule, "validation_step", count),
    "in a checkpoint": _in_a_write,
    "before a checkpoint has its name": lambda count: _at(os, "fsync", count),
    "before old checkpoints go": lambda count: _at(
        sys.modules["train.running.checkpoint"].Checkpoints, "_prune", count
    ),
    "in a row of the metrics": _in_a_row,
}


# Of these a run ends by itself, with a sentence.
FULL_DISKS = {"checkpoints": _no_room_for_a_write, "metrics.csv": _no_room_for_a_row}
TROUBLES = {
    "a NaN": lambda count: _at(
        CausalSelfAttention, "forward", count, act=lambda: _nan_in(CausalSelfAttention)
    ),
    "silence": lambda count: _at(
        GPTModule, "training_step", count, act=lambda: os.kill(os.getpid(), signal.SIGSTOP)
    ),
    "SIGTERM": lambda count: _at(
        GPTModule, "training_step", count, act=lambda: os.kill(_parent(), signal.SIGTERM)
    ),
}
EVENTS = DEATHS | FULL_DISKS | TROUBLES


def curve(run: Path) -> dict[tuple[str, int], str]:
    """Every loss and gradient norm by name and step, as written; one that is there twice fails."""
    found: dict[tuple[str, int], str] = {}
    with (run / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for name in ("train_loss", "val_loss", "grad_norm"):
                if row.get(name):
                    key = name, int(row["step"])
                    assert key not in found, f"{key} is there twice"
                    found[key] = row[name]
    return found


def state(run: Path) -> dict[str, Any]:
    """What the run's last checkpoint holds of the model and the optimiser."""
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    return {name: saved[name] for name in ("global_step", "state_dict", "optimizer_states")}
