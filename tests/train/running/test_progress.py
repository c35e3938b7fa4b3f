import sys

import pytest
from jsonargparse import Namespace

from train.cli import make_parser
from train.proof.parity import train_arm


def parse(arguments: list[str]) -> Namespace:
    return make_parser().parse_args(arguments).parity


def test_a_terminal_gets_a_bar_with_the_arms_name(
    parity_arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    train_arm(parse(parity_arguments), "control")
    printed = capsys.readouterr().out
    last = next(line for line in reversed(printed.splitlines()) if "12/12" in line)
    assert "control" in last
    assert "Epoch" not in last


def test_a_pipe_gets_a_line_per_validation(
    parity_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train_arm(parse(parity_arguments), "control")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["control", "step", f"{step}/12"] for step in (0, 6, 12)
    ]
    assert all("val_loss" in line for line in lines)
