"""What is shown while a model trains: a bar, or lines where the output is not a terminal."""

import sys

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar


def progress(label: str) -> list[L.Callback]:
    """The callbacks that show the progress of the run called ``label``."""
    return [LabelledBar(label)] if sys.stdout.isatty() else [ProgressLines(label)]


class LabelledBar(RichProgressBar):
    """Lightning's bar with the run's name in place of the epoch: training here counts steps."""

    def __init__(self, label: str) -> None:
        """Name the bar."""
        super().__init__()
        self.label = label

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rename the bar that Lightning has just made."""
        super().on_train_epoch_start(trainer, pl_module)
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, description=self.label)


class ProgressLines(L.Callback):
    """A line per validation, for logs and pipes, where a bar would only repeat itself."""

    def __init__(self, label: str) -> None:
        """Begin every line with the run's name."""
        self.label = label

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Step and losses."""
        losses = "  ".join(
            f"{name} {trainer.callback_metrics[name]:.4f}"
            for name in ("train_loss", "val_loss")
            if name in trainer.callback_metrics
        )
        print(
            f"  {self.label:<9} step {trainer.global_step:>5}/{trainer.max_steps}  {losses}",
            flush=True,
        )
