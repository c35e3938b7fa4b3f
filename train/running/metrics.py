"""A run's metrics on disk: one file, also of a run that was killed and resumed."""

import csv
import io
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from train.running.disk import cannot_write, written_whole


class MetricsFile(Logger):
    """Appends what is logged to ``metrics.csv``; only the first of several processes writes.

    A row is flushed before the next step begins, and :meth:`cut` removes the rows that a resumed
    run computes again, so that every step has one row.
    """

    def __init__(self, folder: Path) -> None:
        """Go on with the file in ``folder`` if there is one."""
        super().__init__()
        self.path = folder / "metrics.csv"
        self.columns: list[str] = []

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """None: a run that resumes is the same run."""
        return ""

    @rank_zero_only
    def cut(self, step: int) -> None:
        """Keep the rows before ``step``, where the run goes on."""
        if self.path.exists():
            rows = self._rows()
            self.columns = list(rows[0]) if rows else []
            self._rewrite([row for row in rows if int(row["step"]) < step])

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add a row."""
        row = {"step": step, **metrics}
        new = sorted(row.keys() - set(self.columns))
        if new:
            self.columns += new if self.columns else ["step", *(set(new) - {"step"})]
            self._rewrite(self._rows() if self.path.exists() else [])
        try:
            with self.path.open("a", newline="") as file:
                file.write(self._lines([row]))
        except OSError as error:
            raise cannot_write(self.path, error) from error

    @rank_zero_only
    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Do nothing: checkpoints hold the hyperparameters."""

    @rank_zero_only
    def sync(self) -> None:
        """Flush the rows to the disk."""
        if self.path.exists():
            with self.path.open("a") as file:
                os.fsync(file.fileno())

    def _rows(self) -> list[dict[str, str]]:
        """The rows on disk, without an incomplete last line."""
        whole, _, _ = self.path.read_text().rpartition("\n")
        return list(csv.DictReader(whole.splitlines()))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with written_whole(self.path) as file:
            file.write((",".join(self.columns) + "\r\n" + self._lines(rows)).encode())

    def _lines(self, rows: list[dict[str, Any]]) -> str:
        lines = io.StringIO()
        csv.DictWriter(lines, self.columns).writerows(rows)
        return lines.getvalue()
