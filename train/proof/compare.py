"""``python -m train compare``: the curves of several runs, laid over each other."""

import csv
import math
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from train import UsageError
from train.proof import plots, report

METRICS = "metrics.csv"

# What a run of fit calls its metrics; the proof's have the same names.
TRAIN_LOSS, VAL_LOSS, GRADIENT_NORM = "train_loss", "val_loss", "grad_norm"
SPEED, MFU, MEMORY = "tokens_per_second", "mfu", "peak_memory_bytes"


@dataclass
class Curves:
    """One training run: by metric, its values by the number of updates made so far."""

    values: dict[str, dict[int, float]] = field(default_factory=dict)

    def add(self, metric: str, updates: int, value: float) -> None:
        """Add a value."""
        self.values.setdefault(metric, {})[updates] = value

    def points(self, metric: str) -> tuple[list[int], list[float]]:
        """In order; empty where nothing was logged."""
        points = sorted(self.values.get(metric, {}).items())
        return [x for x, _ in points], [y for _, y in points]

    def last(self, metric: str) -> float | None:
        """The value after the most updates."""
        return next(reversed(self.points(metric)[1]), None)

    def best(self, metric: str) -> float | None:
        """The lowest value."""
        return min(self.values.get(metric, {}).values(), default=None)

    def highest(self, metric: str) -> float | None:
        """The highest value."""
        return max(self.values.get(metric, {}).values(), default=None)

    def median(self, metric: str) -> float | None:
        """The middle value."""
        values = self.values.get(metric)
        return statistics.median(values.values()) if values else None


def compare(runs: list[Path], out: Path = Path("runs/compare")) -> str:
    """Lay the curves of several runs over each other: pictures and a table.

    Args:
        runs: folders of ``fit`` or ``parity`` runs, such as runs/a; of a proof every arm is a run.
            The others are compared with the first.
        out: folder for ``compare.md``, ``loss.png`` and ``training.png``.

    Returns:
        The table, and where the pictures are.
    """
    curves = read_runs(runs)
    if len(curves) < 2:
        raise UsageError(
            f"there is one run in {runs[0]} and nothing to compare it with: name two folders"
            if runs
            else "name the folders of the runs to compare, such as runs/a runs/b"
        )
    first = next(iter(curves))
    for name, run in curves.items():
        if not shared(curves[first], run, TRAIN_LOSS):
            raise UsageError(
                f"{first} and {name} have no step in common at which both logged their training "
                "loss: set trainer.log_every_n_steps alike"
            )
    page = _page(curves)
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.md").write_text(page, encoding="utf-8")
    plots.compare_loss(out / "loss.png", _points(curves, TRAIN_LOSS), _points(curves, VAL_LOSS))
    plots.compare_training(
        out / "training.png",
        *(_points(curves, metric) for metric in (GRADIENT_NORM, SPEED, MEMORY)),
    )
    return f"{_table(curves)}\n\n{out / 'loss.png'}, {out / 'training.png'}, {out / 'compare.md'}"


def read_runs(folders: list[Path]) -> dict[str, Curves]:
    """The runs in these folders, by name; folders of one name are told apart by their paths."""
    names = [folder.resolve().name for folder in folders]
    found: dict[str, Curves] = {}
    for folder, name in zip(folders, names, strict=True):
        label = name if names.count(name) == 1 else os.fspath(folder)
        for arm, curves in read_run(folder).items():
            run = f"{label}/{arm}" if arm else label
            if run in found:
                raise UsageError(f"{folder} is named twice")
            found[run] = curves
    return found


def read_run(folder: Path) -> dict[str, Curves]:
    """A run of ``fit`` under the name "", or each arm of a proof under its own."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    path, runs = folder / METRICS, {}
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            runs = _read_rows(path, csv.DictReader(file))
    if not any(run.values.get(TRAIN_LOSS) for run in runs.values()):
        raise UsageError(
            f"there are no metrics in {folder}: name a run's folder, such as runs/<name>, that has "
            "logged at least once"
        )
    return runs


def _read_rows(path: Path, rows: csv.DictReader) -> dict[str, Curves]:
    runs: dict[str, Curves] = {}
    if "step" not in (rows.fieldnames or ()):
        raise UsageError(f"{path} has no column step: it is not of python -m train")
    for number, row in enumerate(rows, start=2):
        arm = row.pop("arm", None)
        run = runs.setdefault(arm or "", Curves())
        try:
            # Lightning counts the updates before a step, the proof the step's own too.
            updates = int(row.pop("step")) + (arm is None)
            for metric, value in row.items():
                if value:
                    run.add(metric, updates, float(value))
        except (TypeError, ValueError) as error:
            raise UsageError(f"{path}, line {number}: {error}") from error
    return runs


def shared(a: Curves, b: Curves, metric: str) -> list[int]:
    """Updates at which both have a value."""
    return sorted(a.values.get(metric, {}).keys() & b.values.get(metric, {}).keys())


def largest_gap(a: Curves, b: Curves, metric: str) -> tuple[float, int] | None:
    """The largest distance of two curves, and where; None if they have no step in common."""
    gaps = [(abs(a.values[metric][x] - b.values[metric][x]), x) for x in shared(a, b, metric)]
    # A NaN loss counts as infinitely far.
    return max(((math.inf if math.isnan(gap) else gap, -x) for gap, x in gaps), default=None)


def _points(curves: dict[str, Curves], metric: str) -> dict[str, tuple[list[int], list[float]]]:
    return {name: run.points(metric) for name, run in curves.items()}


def _table(curves: dict[str, Curves]) -> str:
    first, reference = next(iter(curves.items()))
    rows = []
    for name, run in curves.items():
        gaps = [largest_gap(reference, run, metric) for metric in (TRAIN_LOSS, VAL_LOSS)]
        memory = run.highest(MEMORY)
        rows.append(
            [
                name,
                f"{max(run.values[TRAIN_LOSS]):,}",
                _number(run.last(TRAIN_LOSS), ".4f"),
                _number(run.last(VAL_LOSS), ".4f"),
                _number(run.best(VAL_LOSS), ".4f"),
                _number(run.median(SPEED), ",.0f"),
                _number(run.median(MFU), ".1%"),
                "-" if memory is None else f"{memory / report.MIB:,.0f} MiB",
                *("-" if gap is None or name == first else _gap(*gap) for gap in gaps),
            ]
        )
    head = [
        "run",
        "steps",
        "last training loss",
        "last validation loss",
        "best",
        "tokens/s (median)",
        "MFU (median)",
        "peak memory",
        f"largest gap to {first}, training",
        "validation",
    ]
    return report.table(head, rows)


def _gap(gap: float, minus_updates: int) -> str:
    return f"{gap:.2g} (step {-minus_updates:,})"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _page(curves: dict[str, Curves]) -> str:
    parts = [
        f"# {' and '.join(curves)}" if len(curves) == 2 else f"# {len(curves)} runs",
        _table(curves),
        "Gaps are between the losses that both runs logged at the same step. `-` is what a run did "
        "not log.",
        "![Training and validation loss by step](loss.png)",
        "![Gradient norm, tokens per second and peak memory by step](training.png)",
    ]
    return "\n\n".join(parts) + "\n"
