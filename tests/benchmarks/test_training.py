"""The whole step: every arm measured or refused with its reason, and a wrong arm seen."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import training
from benchmarks.__main__ import main as dispatch
from train import model

CPU = torch.device("cpu")


def test_a_run_writes_times_memory_and_agreement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = replace(training.SETUPS["cpu"], tokens=64).score_bytes(64)
    monkeypatch.setattr(training, "CPU_MEMORY_LIMIT", limit)
    arguments = ["--contexts", "32", "96", "--tokens", "64", "--rounds", "1"]
    assert dispatch(["training", *arguments, "--out", str(tmp_path)]) == 0
    short, long = json.loads((tmp_path / "training.json").read_text())["cells"]
    assert (short["batch"], long["batch"]) == (2, 1)
    for arm in training.ARMS:
        assert short["arms"][arm]["seconds"] > 0
        assert short["arms"][arm]["loss"] == pytest.approx(5.55, abs=0.2)  # log(257)
    assert long["arms"]["standard"] == {"refused": "its scores need about 0 GiB"}
    assert long["arms"]["flash"]["extra_bytes"] > 0
    page = (tmp_path / "training.md").read_text()
    assert "| 96 | 1 |" in page
    assert (tmp_path / "training.png").stat().st_size > 10_000


def test_a_wrong_arm_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = model.ATTENTIONS["sdpa"]
    monkeypatch.setitem(model.ATTENTIONS, "sdpa", lambda q, k, v: right(1.1 * q, k, v))
    monkeypatch.setattr(training, "in_fresh_process", lambda function, *args: function(*args))
    arguments = ["--contexts", "32", "--tokens", "32", "--rounds", "1", "--out", str(tmp_path)]
    assert training.main(arguments) == 1


def test_no_room_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 80 * 2**30

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(training, "prepare", full)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    result = training.one_step(training.SETUPS["cpu"], "standard", 64, CPU)
    assert result == {"refused": "out of memory on a device of 80 GiB"}
