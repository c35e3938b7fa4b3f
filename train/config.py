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
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from train import UsageError
from train.data import TextData, vocab_size
from train.lit import GPTModule
from train.model import BACKENDS, GPTConfig
from train.running.parallel import Parallel
from train.running.progress import progress
from train.running.trainer_options import Command, check_options

RUNS = Path("runs")
# What Lightning's constructor raises, besides its own exception, and what a class that the
# configuration names as a callback or logger may raise.
CONSTRUCTOR_ERRORS = (ValueError, TypeError, RuntimeError, LookupError, AttributeError, OSError)

# A run counts steps, not epochs: its batches never end, see train.data.StepSampler.
TRAINER_DEFAULTS = {
    "max_epochs": -1,
    "min_epochs": 0,  # the default with min_steps is 1 epoch, which never ends
    "max_steps": 200,
    "gradient_clip_val": 1.0,
    "check_val_every_n_epoch": None,
    "val_check_interval": 50,
    "use_distributed_sampler": False,
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


def check(config: Namespace, command: Command, **trainer_options: Any) -> None:
    """Refuse what can't be trained, before anything is written; fills the data cache on the way.

    Args:
        config: what :func:`training_parser` parsed.
        command: who asks.
        trainer_options: override ``config.trainer`` when it is built.
    """
    GPTConfig(**config.model.gpt.as_dict())
    check_options(config.trainer, command)
    if config.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UsageError(
            f"trainer.accelerator is {config.trainer.accelerator!r} but PyTorch finds no GPU on "
            "this machine: use a machine that has one, or a configuration for the CPU"
        )
    check_parallel(config)
    _check_constructor(config, trainer_options)
    data = TextData(**config.data.as_dict())
    data.prepare_data()
    data.setup()
    _check_validation(config, len(data.val_blocks))


def _check_constructor(config: Namespace, trainer_options: dict[str, Any]) -> None:
    """Refuse what Lightning's constructor refuses: names it doesn't know, a missing package."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(L.Trainer, "trainer")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the trainer of the run warns again
            options = parser.instantiate(Namespace(trainer=config.trainer.clone())).trainer
            make_trainer(options.as_dict(), as_parallel(config.parallel), [], **trainer_options)
    except (MisconfigurationException, ArgumentError, ImportError, *CONSTRUCTOR_ERRORS) as error:
        raise UsageError(f"Lightning refuses the trainer's options: {error}") from error


def _check_validation(config: Namespace, blocks: int) -> None:
    """Refuse a fraction of the validation that is less than a batch."""
    limit, batches = config.trainer.limit_val_batches, -(-blocks // config.data.batch_size)
    if isinstance(limit, float) and 0 < limit * batches < 1:
        raise UsageError(
            f"trainer.limit_val_batches ({limit}) of {batches} batches is less than one: give at "
            f"least {1 / batches:.3g}, a number of batches, or 0 for no validation"
        )


def check_parallel(config: Namespace) -> None:
    """Refuse what can't be split over the ranks; the error says what must divide what."""
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
    if ranks > 1 and not isinstance(trainer.val_check_interval, int):
        # Lightning compares times by each rank's own clock: ranks would validate at different steps
        # and wait for each other.
        raise UsageError(
            "trainer.val_check_interval must be a number of batches with more than one rank, not "
            f"{trainer.val_check_interval!r}: ranks would not agree on a time"
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
    """Refuse a model whose sequences can't be split."""
    # Equal chunks of positions, the same number for each rank.
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
    """The :class:`Parallel` that the parsed options describe."""
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
    config: Namespace,
    callbacks: list[L.Callback],
    *,
    label: str | None = None,
    **trainer_options: Any,
) -> tuple[L.Trainer, GPTModule, TextData]:
    """The objects that ``config`` describes; the weights are drawn from ``config.seed`` alone.

    Args:
        config: what :func:`training_parser` parsed.
        callbacks: added to the ones in ``config.trainer``.
        label: show progress under this name, unless ``config.trainer`` has a bar of its own or
            wants none.
        trainer_options: override ``config.trainer``; loggers are added to the ones there.
    """
    quiet()
    L.seed_everything(config.seed, verbose=False)
    objects = training_parser("").instantiate(config)
    options = objects.trainer.as_dict()
    has_bar = any(isinstance(one, ProgressBar) for one in _listed(options["callbacks"]))
    if label is not None and options["enable_progress_bar"] is not False and not has_bar:
        callbacks = [*callbacks, *progress(label)]
    objects.model.parallel = objects.parallel
    trainer = make_trainer(options, objects.parallel, callbacks, **trainer_options)
    return trainer, objects.model, objects.data


def make_trainer(
    options: dict[str, Any],
    parallel: Parallel,
    callbacks: list[L.Callback],
    **trainer_options: Any,
) -> L.Trainer:
    """Lightning's trainer.

    Args:
        options: instantiated ``config.trainer``.
        parallel: how the run is spread.
        callbacks: added to the ones in ``options``.
        trainer_options: override ``options``; loggers are added to the ones there.
    """
    loggers = [] if options["logger"] is True else _listed(options["logger"])
    options |= trainer_options
    if isinstance(options["logger"], list):
        options["logger"] = [*options["logger"], *loggers]
    options["callbacks"] = [*_listed(options["callbacks"]), *callbacks]
    options |= {
        "devices": parallel.ranks,
        "strategy": strategy(parallel),
        "enable_model_summary": options["enable_model_summary"] is True,
    }
    if parallel.ranks > 1 and not torch.cuda.is_available():
        options["accelerator"] = "cpu"  # "auto" may be a GPU that has no process groups
    if options["enable_progress_bar"] is not False:
        options["enable_progress_bar"] = any(
            isinstance(callback, ProgressBar) for callback in options["callbacks"]
        )
    trainer = L.Trainer(**options)
    profiler = trainer.profiler  # pyright: ignore[reportAttributeAccessIssue]
    if profiler.filename is None:
        # It would describe what it found to Lightning's log, which quiet() has silenced.
        profiler.describe = lambda: _print_profile(profiler)
    return trainer


def _listed(value: Any) -> list[Any]:
    """An option that may be nothing, one object or several, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


@rank_zero_only
def _print_profile(profiler: Profiler) -> None:
    if found := profiler.summary():
        print(found, flush=True)


def quiet() -> None:
    """Leave the terminal to our own lines: no start-up notices, no advice that does not apply."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    # A disabled bar still creates a multiprocessing lock, which a killed process leaves behind.
    tqdm.set_lock(threading.RLock())
    # Blocks come ready from a memory-mapped file: a worker process would only cost its start.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # The checkpoint folder is never empty when a run resumes.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # Lightning 2.6 on torch 2.13.
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec")
