"""A run survives being killed: the curve and the weights are those of a run that never was."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.train.running.lives import DEATHS, FULL_DISKS, ROOT, curve, live, state
from train.running.checkpoint import candidates, read_checkpoint, step_of

SEED = 20261124
RUN = Path("runs/tiny")


@pytest.fixture
def arguments(fit_arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two batches a step; some validations and some deaths fall between the two."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(Path("datasets").absolute()))
    return [
        *fit_arguments,
        "--trainer.max_steps=30",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.val_check_interval=5",
        "--trainer.log_every_n_steps=1",
        "--checkpoint.every_n_steps=2",
    ]


def assert_the_same_run(killed: Path, whole: Path) -> None:
    assert curve(killed) == curve(whole)
    assert board(killed) == board(whole)
    torch.testing.assert_close(state(killed), state(whole), rtol=0, atol=0)
    names = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert names == sorted(path.name for path in (whole / "checkpoints").iterdir())


def board(run: Path) -> list[tuple[int, float]]:
    """The curve that TensorBoard shows."""
    events = EventAccumulator(str(run / "tensorboard")).Reload().Scalars("train_loss")
    return [(event.step, event.value) for event in events]


def test_killed_wherever_it_hurts_it_is_the_same_run(arguments: list[str]) -> None:
    status, printed = live(arguments)
    assert status == 0, printed
    whole = RUN.rename("whole")
    assert len(curve(whole)) == 30 + 30 + 12

    draw = random.Random(SEED)
    for where in draw.sample(sorted(DEATHS), len(DEATHS)):
        count = draw.randint(1, 6)
        print(f"seed {SEED}: killed at passage {count} {where}")
        status, printed = live(arguments, where, count)
        assert status == -signal.SIGKILL, printed
    status, printed = live(arguments)
    assert status == 0, printed
    assert_the_same_run(RUN, whole)


def test_killed_from_outside_it_is_the_same_run(arguments: list[str]) -> None:
    """The command as a user gives it, killed at no particular place."""
    status, printed = live(arguments)
    assert status == 0, printed
    whole = RUN.rename("whole")

    rows = random.Random(SEED).randint(10, 40)
    print(f"seed {SEED}: killed after {rows} rows of metrics")
    with started(arguments) as process:
        while len(metrics()) < rows and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    with started(arguments) as process:
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert "from step " in printed
    assert_the_same_run(RUN, whole)


@contextmanager
def started(arguments: list[str]) -> Iterator[subprocess.Popen]:
    """``python -m train``, which does not outlive the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def metrics() -> list[str]:
    path = RUN / "metrics.csv"
    return path.read_text().splitlines()[1:] if path.exists() else []


@pytest.mark.parametrize("what", FULL_DISKS)
def test_a_full_disk_is_told_and_spoils_nothing(what: str, arguments: list[str]) -> None:
    status, printed = live(arguments)
    assert status == 0, printed
    whole = RUN.rename("whole")

    status, printed = live(arguments, what, 8)
    assert status == 3, printed
    last = printed.splitlines()[-1]
    newest = candidates(RUN / "checkpoints")[0]
    assert last.startswith(f"error: cannot write {RUN / what}")
    assert last.endswith(f": File too large; the last checkpoint is {newest}")
    assert "Traceback" not in printed
    read_checkpoint(newest)
    assert not list(RUN.rglob("*.part"))

    status, printed = live(arguments)
    assert status == 0, printed
    assert f"from step {step_of(newest)} on: {newest}" in printed
    assert_the_same_run(RUN, whole)


# What happens on which rank, and what is said about it.
LOST = "error: rank {rank} of 2 was ended by SIGKILL, so the others were stopped; {left}"
ENDS = {
    "in a batch": LOST,
    "in a checkpoint": LOST,
    "silence": "error: rank {rank} of 2 no longer answered, so the run was stopped; {left}",
    "a NaN": "error: the loss is nan at step {step}: the first module with a non-finite gradient "
    "is model.tokens; the backward pass, from the last to the first, began with model.norm; in the "
    "forward pass model.blocks.0.attention is the first with an output that is not finite; {left}",
}


@pytest.mark.parametrize(
    ("layout", "events"),
    [
        (
            ["context=2"],
            [
                ("in a batch", "1"),
                ("in a checkpoint", "0"),
                ("before a batch", "parent"),
                ("silence", "1"),
                ("SIGTERM", "1"),
            ],
        ),
        (["data=2", "shard=true"], [("a NaN", "1")]),
    ],
    ids=["context", "fsdp"],
)
def test_whatever_happens_to_a_rank_the_run_goes_on(
    layout: list[str], events: list[tuple[str, str]], arguments: list[str]
) -> None:
    arguments = [*arguments, *(f"--parallel.{option}" for option in layout)]
    status, printed = live(arguments, victim="none")
    assert status == 0, printed
    whole = RUN.rename("whole")

    draw = random.Random(SEED)
    for event, rank in events:
        # Late enough that there is a checkpoint; a batch passes two layers.
        count = {"in a checkpoint": 3, "a NaN": 30}.get(event) or draw.randint(6, 9)
        print(f"seed {SEED}: {event}, passage {count}, of {rank}")
        patience = ["--parallel.timeout=10"] if event == "silence" else []
        status, printed = live([*arguments, *patience], event, count, rank)
        newest = candidates(RUN / "checkpoints")[0]
        read_checkpoint(newest)
        assert "Traceback" not in printed
        last = printed.splitlines()[-1] if printed else ""
        if rank == "parent":
            assert status == -signal.SIGKILL, printed
        elif event == "SIGTERM":
            assert status == 128 + signal.SIGTERM, printed
            assert "stopped at step " in printed
        else:
            assert status == 3, printed
            assert re.fullmatch(sentence(event, rank, newest), last), printed
    status, printed = live(arguments, victim="none")
    assert status == 0, printed
    assert f"from step {step_of(newest)} on: " in printed
    assert_the_same_run(RUN, whole)


def sentence(event: str, rank: str, newest: Path) -> str:
    """What the run ends with, as an expression: where exactly it was is not foreseen."""
    left = f"the last checkpoint is {newest}"
    return re.escape(ENDS[event].format(rank=rank, left=left, step="STEP")).replace("STEP", r"\d+")
