"""Which of Lightning's Trainer options ``fit`` and ``parity`` take, and why not the others.

Every option works as Lightning documents it or is refused in one sentence, before anything is
written. An option in no table, of a newer Lightning, is refused unless it has its default.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import lightning as L
from jsonargparse import Namespace

from train import UsageError

Command = Literal["fit", "parity"]


@dataclass(frozen=True)
class Only:
    """An option that takes some values and no others.

    Attributes:
        words: what it must be, for the message.
        reason: why, and what to use in its place.
        allowed: whether it takes the value.
    """

    words: str
    reason: str
    allowed: Callable[[Any], bool]


def _one_of(*values: Any) -> Callable[[Any], bool]:
    # True == 1 and 1 == 1.0, but Lightning treats them differently.
    return lambda value: any(type(value) is type(one) and value == one for one in values)


def _alone(default: Any, reason: str) -> Only:
    """An option that must keep its default, or be null."""
    return Only("left alone", reason, _one_of(default, None))


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_duration(value: Any) -> bool:
    return value is not None and not isinstance(value, int | float)


WORKS = Only("", "", lambda value: True)
NO_EPOCHS = "a run counts steps, its batches never end"
ENDLESS = f"{NO_EPOCHS}: use trainer.max_steps for fewer of them, data.max_bytes for less text"
NOT_THERE = "training has neither a test nor a prediction"
SPREAD = "parallel.data, parallel.context and parallel.shard say how a run is spread over processes"

FIT: dict[str, Only] = {
    "accelerator": Only(
        "a name",
        "an object can't be compared with what the machine has",
        lambda value: isinstance(value, str),
    ),
    "strategy": _alone("auto", SPREAD),
    "devices": WORKS,  # or refused, see train.config.check_parallel
    "num_nodes": _alone(1, SPREAD),
    "precision": Only(
        "one that the optimizer can compute in",
        "AdamW's epsilon, 1e-8, is 0 in fp16, and the first update NaN: use 16-mixed or bf16-true",
        lambda value: value != "16-true",
    ),
    "logger": Only(
        "true, one or several loggers, or left out",
        "fit logs to metrics.csv, which a run that resumes is cut by, and to these besides",
        lambda value: value is not False,
    ),
    "callbacks": WORKS,
    "fast_dev_run": _alone(
        False,
        "a trial run is a few trainer.max_steps under a --name of its own",
    ),
    "max_epochs": _alone(-1, f"{NO_EPOCHS}: use trainer.max_steps"),
    "min_epochs": _alone(0, f"{NO_EPOCHS}: use trainer.min_steps"),
    "max_steps": Only(
        "at least 1", "the schedule needs to know the end", lambda value: _is_count(value, 1)
    ),
    "min_steps": Only(
        "at least 0 or left out",
        "so many steps are trained whatever stops the run early",
        lambda value: value is None or _is_count(value, 0),
    ),
    "max_time": WORKS,
    "limit_train_batches": _alone(1.0, ENDLESS),
    "limit_val_batches": WORKS,
    "limit_test_batches": _alone(1.0, NOT_THERE),
    "limit_predict_batches": _alone(1.0, NOT_THERE),
    "overfit_batches": Only("0", ENDLESS, _one_of(0, 0.0)),
    "val_check_interval": Only(
        "a whole number of batches, at least 1, or a time such as 00:00:10:00",
        f"{NO_EPOCHS}, so that there is no part of an epoch",
        lambda value: _is_duration(value) or _is_count(value, 1),
    ),
    "check_val_every_n_epoch": _alone(None, f"{NO_EPOCHS}: use trainer.val_check_interval"),
    "num_sanity_val_steps": Only(
        "at least -1 or left out",
        "-1 is the whole validation",
        lambda value: value is None or _is_count(value, -1),
    ),
    "log_every_n_steps": Only(
        "at least 0 or left out",
        "0 logs the validation alone",
        lambda value: value is None or _is_count(value, 0),
    ),
    "enable_checkpointing": Only(
        "true or left out",
        "fit goes on from its checkpoints: use checkpoint.every_n_steps and checkpoint.keep for "
        "fewer",
        lambda value: value is not False,
    ),
    "enable_progress_bar": WORKS,
    "enable_model_summary": WORKS,
    "accumulate_grad_batches": Only(
        "at least 1", "an update needs a batch", lambda value: _is_count(value, 1)
    ),
    "gradient_clip_val": WORKS,
    "gradient_clip_algorithm": WORKS,
    "deterministic": WORKS,
    "benchmark": WORKS,
    "inference_mode": WORKS,
    "use_distributed_sampler": _alone(
        False, "all ranks read the same batches and take their rows of each"
    ),
    "profiler": Only(
        "one that can run here",
        "PyTorch/XLA is not installed",
        lambda value: value != "xla" or find_spec("torch_xla") is not None,
    ),
    "detect_anomaly": WORKS,
    "barebones": _alone(
        False, "it switches off the logs, checks and checkpoints that the run is made of"
    ),
    "plugins": _alone(
        None, "the run brings its own for checkpoints, and trainer.precision is the one for numbers"
    ),
    "sync_batchnorm": WORKS,  # there is no batch normalisation to synchronise
    "reload_dataloaders_every_n_epochs": _alone(0, NO_EPOCHS),
    "default_root_dir": _alone(None, "the run's folder is runs/<name>"),
    "enable_autolog_hparams": WORKS,
    "model_registry": _alone(None, "a run is kept in runs/<name> and nowhere else"),
}

ARMS = "arms must train on the same steps"
PARITY: dict[str, Only] = FIT | {
    "logger": _alone(False, "every step of every arm is in the report's metrics.csv"),
    "enable_checkpointing": Only(
        "false or left out", "an arm is trained in one go", lambda value: value is not True
    ),
    "num_sanity_val_steps": _alone(-1, "the whole validation is the loss at step 0"),
    "log_every_n_steps": _alone(None, "every step of every arm is in the report's metrics.csv"),
    "max_time": _alone(None, ARMS),
    "val_check_interval": Only(
        "a whole number of batches, at least 1", ARMS, lambda value: _is_count(value, 1)
    ),
    "limit_val_batches": Only(
        "above 0 or left out", "arms are judged by it", lambda value: value is None or value > 0
    ),
    "accumulate_grad_batches": Only("1", "arms are compared batch by batch", _one_of(1)),
    "profiler": _alone(None, "it would slow down what is measured"),
}
TABLES: dict[Command, dict[str, Only]] = {"fit": FIT, "parity": PARITY}


def check_options(options: Namespace, command: Command) -> None:
    """Refuse the first option that the command can't do as Lightning documents it.

    Args:
        options: the group ``trainer`` of the parsed configuration.
        command: ``fit`` or ``parity``.

    Raises:
        UsageError: names the option, what it must be, what it is, and why.
    """
    defaults = inspect.signature(L.Trainer.__init__).parameters
    for name, value in vars(options).items():
        only = TABLES[command].get(name) or _alone(
            defaults[name].default, f"{command} does not know this option of Lightning"
        )
        if not only.allowed(value):
            raise UsageError(f"trainer.{name} must be {only.words}, not {value!r}: {only.reason}")
