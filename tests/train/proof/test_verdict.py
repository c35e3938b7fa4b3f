"""The rule on made-up runs: one number changed at a time."""

import math
from collections.abc import Callable

import pytest

from train.proof.verdict import ArmRun, Rule, gap, judge

RULE = Rule(
    control_factor=10, loss_floor=2e-5, grad_norm_floor=1e-4, max_loss_gap=1e-4, min_fall=0.4
)


def make_run(shift: float = 0.0) -> ArmRun:
    """Ten steps; ``shift`` is what rounding adds to loss and gradient norm at the last of them."""
    rows = [
        {
            "step": step,
            "train_loss": 5.0 - 0.3 * step + (shift if step == 10 else 0.0),
            "val_loss": 5.1 - 0.3 * step if step % 5 == 0 else None,
            "grad_norm": 1.0 + (shift if step == 10 else 0.0),
        }
        for step in range(1, 11)
    ]
    return ArmRun(rows, 5.1, "weights", [str(step) for step in range(10)], 0, 1, 1.0)


def verdict(flash: ArmRun, control: ArmRun, rule: Rule = RULE) -> dict[str, bool]:
    checks = judge({"standard": make_run(), "flash": flash, "control": control}, rule)
    return {check["check"]: check["passed"] for check in checks}


def failures(flash: ArmRun, control: ArmRun, rule: Rule = RULE) -> list[str]:
    return [words for words, passed in verdict(flash, control, rule).items() if not passed]


def test_gap() -> None:
    run = make_run(shift=2e-3)
    run.rows[4]["val_loss"] += 1e-2
    found = gap(run, make_run())
    assert found["max"] == pytest.approx(1e-2)
    assert found["mean"] == pytest.approx((2e-3 + 1e-2) / 12)  # 10 steps and 2 validations
    assert found["grad_norm_max"] == pytest.approx(2e-3)
    assert found["grad_norm_mean"] == pytest.approx(2e-4)


@pytest.mark.parametrize(
    ("flash", "control", "expected"),
    [
        (0.0, 0.0, []),
        (1.9e-5, 0.0, []),  # below the floor
        (2.1e-5, 0.0, ["largest loss gap"]),
        (5e-5, 6e-6, []),  # within ten times the control
        (5e-5, 4e-6, ["largest loss gap"]),
        (1.1e-4, 1e-4, ["largest loss gap"]),  # above the cap, whatever the control does
        (
            1e-3,
            1e-6,
            [
                "largest loss gap",
                "mean loss gap",
                "largest relative gradient-norm gap",
            ],
        ),
    ],
)
def test_bounds(flash: float, control: float, expected: list[str]) -> None:
    assert failures(make_run(flash), make_run(control)) == expected


def test_without_a_cap_the_control_alone_sets_the_bound() -> None:
    relative = Rule(control_factor=3, max_loss_gap=None)
    assert failures(make_run(2.5e-2), make_run(1e-2), relative) == []
    assert "largest loss gap" in failures(make_run(3.5e-2), make_run(1e-2), relative)


def other_weights(run: ArmRun) -> None:
    run.weights = "others"


def other_batches(run: ArmRun) -> None:
    run.batches[3] = "another"


def no_number(run: ArmRun) -> None:
    run.rows[2]["train_loss"] = math.nan


def infinite_gradient(run: ArmRun) -> None:
    run.rows[2]["grad_norm"] = math.inf


def no_progress(run: ArmRun) -> None:
    run.initial_val_loss = 2.2


@pytest.mark.parametrize("arm", ["flash", "control"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (other_weights, "initial weights are the same in all arms"),
        (other_batches, "batches are the same in all arms"),
        (no_number, "all losses and gradient norms are finite"),
        (infinite_gradient, "all losses and gradient norms are finite"),
        (no_progress, "validation loss falls by at least this fraction in every arm"),
    ],
)
def test_unfair_or_broken_runs_fail(
    change: Callable[[ArmRun], None], expected: str, arm: str
) -> None:
    runs = {"flash": make_run(), "control": make_run()}
    change(runs[arm])
    assert expected in failures(**runs)


def test_the_rule_says_its_numbers() -> None:
    for number in ("10 times", "2e-05", "0.0001", "40%"):
        assert number in str(RULE)
    assert "may exceed" not in str(Rule(max_loss_gap=None))
