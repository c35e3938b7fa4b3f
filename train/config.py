"""The options of a training run, on the command line and in YAML, and the objects they describe."""

import logging
import os
import threading
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from tqdm import tqdm

from train import UsageError
from train.data import TextData, vocab_size
from train.lit import GPTModule
from train.model import BACKENDS, GPTConfig
from train.parallel import Parallel

RUNS = Path("runs")

# A run counts steps, not epochs: its batches never end, see train.data.StepSampler.
TRAINER_DEFAULTS = {
    "max_epochs": -1,
    "max_steps": 200,
    "gradient_clip_val": 1.0,
    "check_val_every_n_epoch": None,
    "val_check_interval": 50,
}


def training_parser(description: str) -> LightningArgumentParser:
    """``name``, ``seed``, ``parallel``, ``model``, ``data``, ``trainer``, ``--config`` files."""
    parser = LightningArgumentParser(description=description, exit_on_error=False)
    parser.add_argument(
        "-c", "--config", action="config", help="YAML file with any of the options below"
    )
    parser.add_argument("--name", type=str, required=True, help="the run's folder is runs/<name>")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the initial weights and the order of the batches"
    )
    parser.add_argument("--parallel", type=Parallel, default=Parallel())
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
    check_parallel(config)
    data = TextData(**config.data.as_dict())
    data.prepare_data()
    data.setup()


def check_parallel(config: Namespace) -> None:
    """Refuse a model, batch or machine that can't be shared out so; says what must divide what."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UsageError(
            "python -m train starts the processes of a run itself: run it without torchrun, and "
            "say with --parallel.data and --parallel.context how many there are"
        )
    parallel, gpt = as_parallel(config.parallel), GPTConfig(**config.model.gpt.as_dict())
    for name in ("data", "context"):
        if getattr(parallel, name) < 1:
            raise UsageError(f"parallel.{name} must be at least 1, not {getattr(parallel, name)}")
    if parallel.timeout <= 0:
        raise UsageError(f"parallel.timeout must be above 0, not {parallel.timeout}")
    ranks, trainer = parallel.ranks, config.trainer
    if trainer.strategy != "auto" or trainer.num_nodes != 1:
        raise UsageError(
            "trainer.strategy and trainer.num_nodes must be left alone: parallel.data, "
            "parallel.context and parallel.shard say how a run is spread over processes"
        )
    if str(trainer.devices) not in ("auto", str(ranks)):
        raise UsageError(
            f"trainer.devices ({trainer.devices}) must be parallel.data x parallel.context "
            f"({parallel.data} x {parallel.context} = {ranks}), or be left out"
        )
    gpus = torch.cuda.device_count()
    if trainer.accelerator != "cpu" and 0 < gpus < ranks:
        raise UsageError(
            f"parallel.data x parallel.context is {ranks} and this machine has {gpus} "
            f"GPU{'s' * (gpus > 1)}: set trainer.accelerator to cpu, or use fewer ranks"
        )
    if parallel.shard and ranks == 1:
        raise UsageError("parallel.shard needs more than one rank: raise parallel.data")
    if config.data.batch_size % parallel.data:
        raise UsageError(
            f"data.batch_size ({config.data.batch_size}) must be a multiple of parallel.data "
            f"({parallel.data})"
        )
    if parallel.context > 1:
        _check_context(parallel, gpt)


def _check_context(parallel: Parallel, gpt: GPTConfig) -> None:
    """Refuse a model whose sequences can't be shared out."""
    # Stretches of positions that are dealt out, equally many to each rank.
    stretches = parallel.context * (2 if parallel.placement == "zigzag" else 1)
    if gpt.context % stretches:
        raise UsageError(
            f"model.gpt.context ({gpt.context}) must be a multiple of {stretches} for "
            f"parallel.context {parallel.context} with placement {parallel.placement}"
        )
    if parallel.attention == "ulysses" and gpt.n_head % parallel.context:
        raise UsageError(
            f"model.gpt.n_head ({gpt.n_head}) must be a multiple of parallel.context "
            f"({parallel.context}) with ulysses: use parallel.attention ring"
        )
    able = [name for name in BACKENDS if name != "standard" or parallel.attention == "ulysses"]
    if gpt.attention not in able:
        raise UsageError(
            f"attention {gpt.attention!r} can't attend across ranks: with parallel.context above 1 "
            f"choose one of {', '.join(able)}"
        )


def as_parallel(options: Namespace) -> Parallel:
    """What the parser read as the options of one."""
    return Parallel(**options.as_dict())


def strategy(parallel: Parallel) -> Strategy | str:
    """Lightning's strategy for it."""
    if parallel.ranks == 1:
        return "auto"
    timeout = timedelta(seconds=parallel.timeout)
    if parallel.shard:
        return ModelParallelStrategy(
            timeout=timeout,
            data_parallel_size=parallel.data,
            tensor_parallel_size=parallel.context,
            # One file with whole tensors, as the other strategies write.
            save_distributed_checkpoint=False,
        )
    return DDPStrategy(gradient_as_bucket_view=True, timeout=timeout)


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
    options |= {
        "devices": objects.parallel.ranks,
        "strategy": strategy(objects.parallel),
        "use_distributed_sampler": False,  # the ranks read the same batches, see train.parallel
    }
    if objects.parallel.ranks > 1 and not torch.cuda.is_available():
        options["accelerator"] = "cpu"  # "auto" may be a GPU that has no process groups
    options["enable_progress_bar"] = any(
        isinstance(callback, ProgressBar) for callback in options["callbacks"]
    )
    objects.model.parallel = objects.parallel
    return L.Trainer(**options), objects.model, objects.data


def quiet() -> None:
    """Leave the terminal to our own lines: no start-up notices, no advice that does not apply."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    # Its bars would still make a lock for several processes, and a killed one leaves that behind.
    tqdm.set_lock(threading.RLock())
    # Blocks come ready from a memory-mapped file: a worker process would only cost its start.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # It is not empty whenever a run goes on.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # Lightning 2.6 on torch 2.13.
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec")
