"""A run survives being killed: the curve and the weights are those of a run that never was."""

import random
import signal
from pathlib import Path

import pytest
import torch

from tests.train.lives import DEATHS, curve, live, state

SEED = 20261124
RUN = Path("runs/tiny")


@pytest.fixture
def arguments(fit_arguments: list[str]) -> list[str]:
    """Two batches a step; some validations and some deaths fall between the two."""
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
    torch.testing.assert_close(state(killed), state(whole), rtol=0, atol=0)
    names = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert names == sorted(path.name for path in (whole / "checkpoints").iterdir())


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
