"""When two arms of the training proof agree: the gaps, the rule, the checks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

REFERENCE, CANDIDATE, CONTROL = "standard", "flash", "control"


@dataclass
class Rule:
    """What the verdict asks for.

    Attributes:
        control_factor: flash's gaps may be this many times the control's.
        loss_floor: loss gaps up to this always pass, however small the control's are; by default
            ten units in the last place of an fp32 loss near 5.
        grad_norm_floor: the same for relative gaps of the gradient norm.
        max_loss_gap: no loss gap may be larger, however large the control's are; None for no such
            limit.
        min_fall: every arm's validation loss must fall by this fraction.
    """

    control_factor: float = 10.0
    loss_floor: float = 5e-6
    grad_norm_floor: float = 1e-3
    max_loss_gap: float | None = 1e-4
    min_fall: float = 0.4

    def loss_bound(self, control_gap: float) -> float:
        """The largest loss gap that passes beside a gap ``control_gap`` of the control."""
        bound = max(self.control_factor * control_gap, self.loss_floor)
        return bound if self.max_loss_gap is None else min(bound, self.max_loss_gap)

    def grad_norm_bound(self, control_gap: float) -> float:
        """The same for the relative gap of the gradient norm."""
        return max(self.control_factor * control_gap, self.grad_norm_floor)

    def __str__(self) -> str:
        """The rule in words."""
        cap = "" if self.max_loss_gap is None else f" No loss gap may exceed {self.max_loss_gap:g}."
        return (
            "Every arm starts from the same weights and sees the same batches. Flash is compared "
            "with standard on every training loss, validation loss and gradient norm, and its "
            f"largest and mean gaps may be at most {self.control_factor:g} times those of the "
            "control, which differs from standard by rounding alone (loss gaps up to "
            f"{self.loss_floor:g} and relative gradient-norm gaps up to {self.grad_norm_floor:g} "
            f"always pass).{cap} All numbers must be finite, and every arm's validation loss must "
            f"fall by at least {self.min_fall:.0%}."
        )


@dataclass
class ArmRun:
    """What one arm leaves behind.

    Attributes:
        rows: one per step, in the columns of metrics.csv; ``val_loss`` is None at steps without a
            validation.
        initial_val_loss: before the first step.
        weights: digest of the initial weights.
        batches: digest of the token ids of every step.
        extra_memory_bytes: peak above the level just before the first step.
        parameters: how many numbers are trained.
        seconds: wall time, start-up included.
    """

    rows: list[dict[str, Any]]
    initial_val_loss: float
    weights: str
    batches: list[str]
    extra_memory_bytes: int
    parameters: int
    seconds: float

    def column(self, name: str) -> np.ndarray:
        """One column of ``rows``."""
        return np.array([row[name] for row in self.rows])

    def validations(self) -> tuple[np.ndarray, np.ndarray]:
        """The steps after which there was a validation, and its losses."""
        rows = [row for row in self.rows if row["val_loss"] is not None]
        return np.array([row["step"] for row in rows]), np.array([row["val_loss"] for row in rows])

    def val_loss_fall(self) -> float:
        """The fraction of its first value by which the validation loss fell."""
        return float(1 - self.validations()[1][-1] / self.initial_val_loss)


def gap(run: ArmRun, reference: ArmRun) -> dict[str, float]:
    """How far ``run`` is from ``reference``: in loss absolutely, in gradient norm relatively."""
    train = np.abs(run.column("train_loss") - reference.column("train_loss"))
    val = np.abs(run.validations()[1] - reference.validations()[1])
    grad_norm = np.abs(run.column("grad_norm") - reference.column("grad_norm")) / reference.column(
        "grad_norm"
    )
    both = np.concatenate([train, val])
    return {
        "max": float(both.max()),
        "mean": float(both.mean()),
        "grad_norm_max": float(grad_norm.max()),
        "grad_norm_mean": float(grad_norm.mean()),
    }


def judge(
    runs: dict[str, ArmRun], rule: Rule, candidates: Sequence[str] = (CANDIDATE,)
) -> list[dict[str, Any]]:
    """Every check of the rule: its words, whether it passed, and what was found and allowed."""
    control = gap(runs[CONTROL], runs[REFERENCE])
    fall = min(run.val_loss_fall() for run in runs.values())
    checks = [
        _same("initial weights are the same in all arms", [run.weights for run in runs.values()]),
        _same("batches are the same in all arms", [run.batches for run in runs.values()]),
        {
            "check": "all losses and gradient norms are finite",
            "passed": all(map(_finite, runs.values())),
        },
        {
            "check": "validation loss falls by at least this fraction in every arm",
            "passed": fall >= rule.min_fall,
            "found": fall,
            "bound": rule.min_fall,
        },
    ]
    for arm in candidates:
        found = gap(runs[arm], runs[REFERENCE])
        for key, words, bound in (
            ("max", "largest loss gap", rule.loss_bound),
            ("mean", "mean loss gap", rule.loss_bound),
            ("grad_norm_max", "largest relative gradient-norm gap", rule.grad_norm_bound),
            ("grad_norm_mean", "mean relative gradient-norm gap", rule.grad_norm_bound),
        ):
            allowed = bound(control[key])
            checks.append(
                {
                    "check": words if arm == CANDIDATE else f"{words} of {arm}",
                    # False for a NaN gap.
                    "passed": found[key] <= allowed,
                    "found": found[key],
                    "bound": allowed,
                }
            )
    return checks


def _same(words: str, values: list[Any]) -> dict[str, Any]:
    return {"check": words, "passed": all(value == values[0] for value in values)}


def _finite(run: ArmRun) -> bool:
    numbers = [
        run.column("train_loss"),
        run.column("grad_norm"),
        run.validations()[1],
        [run.initial_val_loss],
    ]
    return bool(np.isfinite(np.concatenate(numbers)).all())
