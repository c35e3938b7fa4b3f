"""The proof in small: sound attentions pass, and planted bugs turn the verdict."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jsonargparse import Namespace
from torch import Tensor

from flashlayer import flash_attention
from train.cli import main, make_parser
from train.model import ATTENTIONS
from train.proof import report
from train.proof.parity import run_parity, train_arm
from train.proof.verdict import ArmRun, Rule, gap, judge

FILES = {"metrics.csv", "summary.json", "report.md", "loss.png", "loss_gap.png", "memory.png"}
BUG_STEPS = ["--trainer.max_steps", "80", "--trainer.val_check_interval", "20"]


def parse(arguments: list[str]) -> Namespace:
    return make_parser().parse_args(arguments).parity


class ScaledGradient(torch.autograd.Function):
    """Identity forward; backward 1 % too large."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return 1.01 * gradient


def without_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attention(q, k, v)


def wrong_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attention(q, k, v, causal=True, scale=1.05 * q.shape[-1] ** -0.5)


def wrong_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ScaledGradient.apply(flash_attention(q, k, v, causal=True))


def wrong_dq(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attention(ScaledGradient.apply(q), k, v, causal=True)


def wrong_dv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attention(q, k, ScaledGradient.apply(v), causal=True)


@pytest.fixture(scope="module")
def sound_runs() -> dict[str, ArmRun]:
    """Filled by the first test that needs it: the arms no bug is planted in."""
    return {}


def run_arms(arguments: list[str], sound_runs: dict[str, ArmRun], flash: str) -> dict[str, ArmRun]:
    config = parse([*arguments, *BUG_STEPS])
    for arm in ("standard", "control"):
        if arm not in sound_runs:
            sound_runs[arm] = train_arm(config, arm)
    config.parity.arms["flash"] = flash
    return {**sound_runs, "flash": train_arm(config, "flash")}


@pytest.mark.parametrize("attention", ["flash", "tiled", "sdpa"])
def test_sound_attentions_pass(
    attention: str, parity_arguments: list[str], sound_runs: dict[str, ArmRun]
) -> None:
    runs = run_arms(parity_arguments, sound_runs, attention)
    checks = judge(runs, Rule(min_fall=0.05))
    assert [check for check in checks if not check["passed"]] == []
    assert runs["flash"].batches == runs["standard"].batches
    assert len(set(runs["flash"].batches)) == 80
    assert all(gap(runs[arm], runs["standard"])["max"] < 1e-5 for arm in ("flash", "control"))


@pytest.mark.parametrize("bug", [without_mask, wrong_scale, wrong_gradient, wrong_dq, wrong_dv])
def test_planted_bugs_fail(
    bug: object,
    parity_arguments: list[str],
    sound_runs: dict[str, ArmRun],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ATTENTIONS, "planted", bug)
    runs = run_arms(parity_arguments, sound_runs, "planted")
    failed = {check["check"] for check in judge(runs, Rule(min_fall=0.05)) if not check["passed"]}
    assert any("gap" in words for words in failed)
    # What tells a bug from a broken comparison: the arms were fair and trained.
    assert all("gap" in words for words in failed)


def test_a_bug_ends_in_status_1_and_the_report_says_so(
    parity_arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(ATTENTIONS, "planted", wrong_scale)
    monkeypatch.setattr("train.cli.run_parity", lambda *a: run_parity(*a, isolate=False))
    assert main([*parity_arguments, "--parity.arms.flash", "planted"]) == 1
    assert "verdict: fail" in capsys.readouterr().out
    assert json.loads(Path("runs/tiny/summary.json").read_text())["verdict"] == "fail"
    page = Path("runs/tiny/report.md").read_text()
    assert page.startswith("# tiny: fail\n")
    assert "**The proof fails.** What failed: largest loss gap" in page
    assert "**FAIL** | largest loss gap" in page


def test_a_loss_that_is_no_number_fails_and_is_null_in_json(
    parity_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ATTENTIONS, "planted", lambda q, k, v: (q + k + v) * float("nan"))
    config = parse([*parity_arguments, "--parity.arms.flash", "planted"])
    assert run_parity(config, "command", isolate=False)["verdict"] == "fail"
    summary = json.loads(Path("runs/tiny/summary.json").read_text())
    assert summary["flash_gap"]["max"] is None
    assert summary["arms"]["flash"]["final_train_loss"] is None


def command(arguments: list[str], datasets_cache: Path) -> tuple[list[str], dict[str, str]]:
    """A process of its own, which finds the checkout and the cache of the tests."""
    root = Path(report.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "HF_DATASETS_CACHE": str(datasets_cache)}
    return [sys.executable, "-m", "train", *arguments], environment


def test_the_command_leaves_the_promised_files(
    parity_arguments: list[str], datasets_cache: Path
) -> None:
    argv, environment = command(
        [*parity_arguments, "--parity.layer.lengths", "[32]"], datasets_cache
    )
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "report: runs/tiny/report.md" in done.stdout
    folder = Path("runs/tiny")
    assert {path.name for path in folder.iterdir()} == FILES

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["verdict"] == "pass"
    assert set(summary["arms"]) == {"standard", "flash", "control"}
    for arm in summary["arms"].values():
        for key in ("final_train_loss", "final_val_loss", "tokens_per_second", "peak_memory_bytes"):
            assert arm[key] > 0
        assert arm["final_val_loss"] < arm["initial_val_loss"]
    for key in ("flash_gap", "control_gap"):
        assert 0 <= summary[key]["mean"] <= summary[key]["max"] <= 1e-4
    assert "10 times" in summary["rule"]
    assert summary["environment"]["torch"] == torch.__version__
    assert [row["length"] for row in summary["layer"]["lengths"]] == [32]
    assert summary["speed"]["flash_over_standard"] > 0

    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(report.COLUMNS)
    assert [int(row["step"]) for row in rows] == [*range(1, 13)] * 3
    with_validation = [int(row["step"]) for row in rows if row["val_loss"]]
    assert with_validation == [6, 12] * 3
    last = {row["arm"]: row for row in rows}
    for arm, result in summary["arms"].items():
        assert float(last[arm]["train_loss"]) == result["final_train_loss"]
        assert float(last[arm]["val_loss"]) == result["final_val_loss"]


def test_ctrl_c_ends_the_proof_and_leaves_nothing(
    parity_arguments: list[str], datasets_cache: Path
) -> None:
    argv, environment = command(
        [*parity_arguments, "--trainer.max_steps", "100000"], datasets_cache
    )
    process = subprocess.Popen(
        argv,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    while "step     6" not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert not Path("runs").exists()


def test_a_last_step_between_two_validations_is_validated(parity_arguments: list[str]) -> None:
    run = train_arm(parse([*parity_arguments, "--trainer.max_steps", "8"]), "standard")
    assert run.validations()[0].tolist() == [6, 8]
