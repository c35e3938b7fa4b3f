"""Checkpoints that survive a kill: written whole or not at all, and read only where they are good.

A run's folder holds the newest ones as ``step-00000050.ckpt``; ``last.ckpt`` and ``best.ckpt`` are
links to two of them. A checkpoint is the state between two updates, whenever it was written:
gradients in flight are left out, and the run that resumes computes them again.
"""

import pickle
import re
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only

from train import UsageError
from train.running.disk import UNFINISHED, written_whole
from train.running.metrics import MetricsFile
from train.running.stop import Stopped

LINKS = ("last.ckpt", "best.ckpt")
# Entries by which a checkpoint of fit is recognised, and their types.
PARTS = {
    "global_step": int,
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "callbacks": dict,
    "hyper_parameters": dict,
    "datamodule_hyper_parameters": dict,
    "TextData": dict,
}


class BadCheckpoint(UsageError):
    """A checkpoint that can't be resumed from; the message says why."""


@dataclass
class CheckpointOptions:
    """When ``fit`` writes a checkpoint, and how many it keeps.

    Attributes:
        every_n_steps: steps from one checkpoint to the next; there is one more whenever the
            validation loss is the best so far, and one at the end.
        keep: newest checkpoints that stay, besides the best.
    """

    every_n_steps: int = 50
    keep: int = 2

    def __post_init__(self) -> None:
        """Refuse values below 1."""
        for name in ("every_n_steps", "keep"):
            if getattr(self, name) < 1:
                raise UsageError(f"checkpoint.{name} must be at least 1, not {getattr(self, name)}")


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's file access: writes atomically, reads only files that are complete."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write the file atomically."""
        with written_whole(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load the file to the CPU; only tensors and options are unpickled."""
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What ``fit`` wrote to ``path``; nothing in the file is run.

    Raises:
        BadCheckpoint: it is missing, incomplete, damaged, or not written by ``fit``.
    """
    if not path.exists():
        raise BadCheckpoint(f"there is no checkpoint {path}")
    if not path.is_file():
        raise BadCheckpoint(f"{path} is a folder, not a checkpoint of python -m train fit")
    if not path.stat().st_size:
        raise BadCheckpoint(f"{path} is empty")
    if not zipfile.is_zipfile(path):
        raise BadCheckpoint(f"{path} is not a checkpoint, or not a whole one")
    try:
        # torch.load doesn't verify the checksums that torch.save writes.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises many types for damaged bytes
        raise BadCheckpoint(f"{path} is damaged: {error}") from error
    if damaged is not None:
        raise BadCheckpoint(f"{path} is damaged: the checksum of {damaged} is wrong")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BadCheckpoint(
            f"{path} is refused: it holds more than tensors and options; nothing in it was run"
        ) from error
    except Exception as error:
        raise BadCheckpoint(f"{path} is not a checkpoint of PyTorch: {error}") from error
    if not isinstance(loaded, dict) or any(
        not isinstance(loaded.get(name), kind) for name, kind in PARTS.items()
    ):
        raise BadCheckpoint(f"{path} is not a checkpoint of python -m train fit")
    return loaded


def last_good(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint in ``folder`` that is good, and what is in it.

    Warns of every newer one that is not.
    """
    for path in candidates(folder):
        try:
            return path, read_checkpoint(path)
        except BadCheckpoint as error:
            _warn(f"{error}: skipped")
    return None


def candidates(folder: Path) -> list[Path]:
    """The files that may be checkpoints: by step, the newest first, then the ones without a step.

    Those were put there by hand.
    """
    files = [path for path in folder.glob("*.ckpt") if not path.is_symlink()]
    return sorted(files, key=lambda path: (step_of(path), path.stat().st_mtime), reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name, or -1."""
    number = re.fullmatch(r"step-(\d+)\.ckpt", path.name)
    return int(number[1]) if number else -1


@rank_zero_only
def _warn(message: str) -> None:
    print(f"warning: {' '.join(message.split())}", file=sys.stderr)


class Checkpoints(Checkpoint):
    """Writes a run's checkpoints and brings its counters back when it resumes.

    They are written when a batch starts: then the batch before is complete, its losses logged and
    its validation done. So the curve of a resumed run equals that of an uninterrupted one.
    """

    def __init__(self, folder: Path, options: CheckpointOptions) -> None:
        """Keep what ``options`` say in ``folder``."""
        self.folder, self.options = folder, options
        self.best_val_loss = float("inf")
        self.best_is_new = False
        self.saved_step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove what a killed run had begun to write."""
        if trainer.is_global_zero:
            for path in self.folder.glob(f"*{UNFINISHED}"):
                path.unlink()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note whether this is the best so far."""
        loss = trainer.callback_metrics.get("val_loss")
        if loss is None or trainer.sanity_checking:
            return
        if trainer.strategy.reduce_boolean_decision(bool(loss < self.best_val_loss)):
            self.best_val_loss, self.best_is_new = loss.item(), True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write one if it is time; the state is that of the last update."""
        if self.best_is_new or trainer.global_step % self.options.every_n_steps == 0:
            self.save(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Write one after a request to stop, which is raised on all ranks at the same step."""
        if isinstance(exception, Stopped) and not exception.at_once:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the last one."""
        self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write the state of the last update unless it is there already; called on every rank."""
        step = trainer.global_step
        path = self.folder / f"step-{step:08d}.ckpt"
        if step > self.saved_step:
            for logger in trainer.loggers:
                if isinstance(logger, MetricsFile):
                    logger.sync()  # metrics.csv must never end before the checkpoint's step
            trainer.save_checkpoint(path)
        if trainer.is_global_zero and step > 0:
            self._link("last.ckpt", path)
            if self.best_is_new:
                self._link("best.ckpt", path)
            self._prune(step)
        self.saved_step, self.best_is_new = step, False

    def _link(self, name: str, path: Path) -> None:
        """Point ``name`` at ``path``, atomically: it always points at a complete checkpoint."""
        unfinished = self.folder / (name + UNFINISHED)
        unfinished.symlink_to(path.name)
        unfinished.replace(self.folder / name)

    def _prune(self, step: int) -> None:
        """Remove all but the newest and the best.

        A file of a later step is damaged, or this run would have resumed from it: it doesn't count,
        and is overwritten when its step comes.
        """
        written = [path for path in candidates(self.folder) if 0 <= step_of(path) <= step]
        linked = {(self.folder / name).resolve() for name in LINKS}
        for path in written[self.options.keep :]:
            if path.resolve() not in linked:
                path.unlink()

    def state_dict(self) -> dict[str, Any]:
        """The best validation loss so far."""
        return {"best_val_loss": self.best_val_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best validation loss."""
        self.best_val_loss = state_dict["best_val_loss"]

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Set Lightning's counters to the state between two updates.

        The saved counters include a batch that was begun, or an epoch that Ctrl-C ended; resuming
        from those skips a validation or shifts the logged step.
        """
        self.saved_step = step = checkpoint["global_step"]
        batches = step * trainer.accumulate_grad_batches
        loops = trainer.fit_loop.state_dict()
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = step
        loops["epoch_loop.batch_progress"]["total"] |= dict.fromkeys(
            ("ready", "started", "processed", "completed"), batches
        )
        optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        for counter in (optimizer["step"], loops["epoch_loop.scheduler_progress"]):
            counter["total"] |= {"ready": step, "completed": step}
        # In the middle of the first and only epoch.
        for counter in loops["epoch_progress"].values():
            counter |= {"ready": 1, "started": 1}
        checkpoint["loops"] = {"fit_loop": loops}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Clear Lightning's restart flag: the next batch has not been started before."""
        trainer.fit_loop.epoch_loop.restarting = False
