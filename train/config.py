"""The options of a training run, on the command line and in YAML, and the objects they describe."""

import logging
import warnings
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser

from train import UsageError
from train.data import TextData, vocab_size
from train.lit import GPTModule
from train.model import GPTConfig

RUNS = Path("runs")

# A run counts steps, not epochs: its batches never end, see train.data.StepSampler.
TRAINER_DEFAULTS = {
    "max_epochs": -1,
    "max_steps": 200,
    "devices": 1,
    "gradient_clip_val": 1.0,
    "check_val_every_n_epoch": None,
    "val_check_interval": 50,
}


def training_parser(description: str) -> LightningArgumentParser:
    """Options ``name``, ``seed``, ``model``, ``data``, ``trainer``, and ``--config`` files."""
    parser = LightningArgumentParser(description=description, exit_on_error=False)
    parser.add_argument(
        "-c", "--config", action="config", help="YAML file with any of the options below"
    )
    parser.add_argument("--name", type=str, required=True, help="the run's folder is runs/<name>")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the initial weights and the order of the batches"
    )
    parser.add_lightning_class_args(GPTModule, "model")
    parser.add_lightning_class_args(TextData, "data")
    parser.add_lightning_class_args(L.Trainer, "trainer")
    parser.link_arguments("data.tokenizer", "model.gpt.vocab_size", compute_fn=vocab_size)
    parser.link_arguments("model.gpt.context", "data.context")
    parser.link_arguments("seed", "data.seed")
    parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()})
    return parser


def check(config: Namespace) -> None:
    """Refuse what can't be trained, before anything is written; fills the data cache on the way."""
    GPTConfig(**config.model.gpt.as_dict())
    if config.trainer.max_steps < 1:
        raise UsageError(f"trainer.max_steps must be at least 1, not {config.trainer.max_steps}")
    if config.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UsageError(
            f"trainer.accelerator is {config.trainer.accelerator!r} but PyTorch finds no GPU on "
            "this machine: use a machine that has one, or a configuration for the CPU"
        )
    if str(config.trainer.devices) != "1" or config.trainer.num_nodes != 1:
        # Batches are keyed by step and seed alone: every device would train on the same ones.
        raise UsageError(
            "trainer.devices and trainer.num_nodes must be 1: training uses one device"
        )
    data = TextData(**config.data.as_dict())
    data.prepare_data()
    data.setup()


def build(
    config: Namespace, callbacks: list[L.Callback], **trainer_options: Any
) -> tuple[L.Trainer, GPTModule, TextData]:
    """The objects that ``config`` describes; the weights are drawn from ``config.seed`` alone.

    Args:
        config: what :func:`training_parser` parsed.
        callbacks: added to the ones in ``config.trainer``.
        trainer_options: override ``config.trainer``.
    """
    quiet()
    L.seed_everything(config.seed, verbose=False)
    objects = training_parser("").instantiate(config)
    options = objects.trainer.as_dict() | trainer_options
    options["callbacks"] = [*(objects.trainer.callbacks or []), *callbacks]
    options["enable_progress_bar"] = any(
        isinstance(callback, ProgressBar) for callback in options["callbacks"]
    )
    return L.Trainer(**options), objects.model, objects.data


def quiet() -> None:
    """Leave the terminal to our own lines: no start-up notices, no advice that does not apply."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    # Blocks come ready from a memory-mapped file: a worker process would only cost its start.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # It is not empty whenever a run goes on.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # Lightning 2.6 on torch 2.13.
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec")
